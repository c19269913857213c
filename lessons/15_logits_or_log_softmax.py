# %% [markdown]
"""
# Logits or log-softmax: what the temperature needs, and what the loss

**Question.** Should the model itself end in a log-softmax?

**The course** (015) says that a log-softmax inside the model freezes the temperature at 1, for
P_i ~ exp(z_i / T) asks for logits z. Lesson 018 calls it a serious error to forget it altogether.

**Expect** the second to hold and the first not to. A log-softmax subtracts one number from all the
logits of a position, and the next softmax does not see it: softmax(log_softmax(z) / T) *is*
softmax(z / T). That number is all that is lost. What does freeze the temperature is a *softmax* in
the model, unless its logarithm is taken first: outputs between 0 and 1, divided by any T, are as
good as equal logits.

About 20 seconds on two CPU cores; no GPU needed, and none measured.

How to read the names, such as `x_BxLxD`: `docs/lessons.md`. PyTorch's words in JAX:
`docs/from_pytorch.md`.
"""

# %%
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.nn.functional as F
from lesson import Lesson, furthest

from jax_model5.batches import test_batches
from jax_model5.config import DataConfig, OptimizerConfig
from jax_model5.corpus import load_corpus
from jax_model5.generate import Sampling, draw
from jax_model5.losses import nll, position_losses
from jax_model5.programs import steps

lesson = Lesson("15", "Logits or log-softmax: what the temperature needs, and what the loss")
TEMPERATURES = (0.5, 1.0, 1.1, 2.0)
B, V = lesson.pick(8, 2), 50257
z_BxV = 3 * np.random.default_rng(0).standard_normal((B, V))
targets_B = np.arange(B)


def listed(values, digits=2):
    return ", ".join(f"{value:.{digits}f}" for value in values)


# %% [markdown]
"""
## The temperature, after three kinds of output

The model hands out z, log_softmax(z) or softmax(z); each is divided by T and goes through a
softmax. The entropy of what comes out, in float64, says how far T spreads it: ln 50257 = 10.82 is
the most.
"""


# %%
def entropy(p_BxV):
    """Of each row, in nats."""
    p_BxV = np.asarray(p_BxV)
    return -(p_BxV * np.log(np.maximum(p_BxV, 1e-300))).sum(-1)


OUTPUTS = {"logits": jnp.asarray, "log-softmax": jax.nn.log_softmax, "softmax": jax.nn.softmax}
with jax.enable_x64(True):
    p_by_output = {
        name: [jax.nn.softmax(output(z_BxV) / T) for T in TEMPERATURES]
        for name, output in OUTPUTS.items()
    }
    apart = furthest(p_by_output["logits"], p_by_output["log-softmax"])
    entropies = {
        name: [float(entropy(p_BxV).mean()) for p_BxV in p] for name, p in p_by_output.items()
    }

# %% [markdown]
"""
## The sampler

`draw` wants raw logits. Here it gets the same 50 logits in many rows, each of which draws on its
own, so that frequencies can be held against softmax(z / T). JAX's draw is a function of its key:
the same key and log-probabilities instead of logits must give the same tokens, one by one.
"""

# %%
N = lesson.pick(50_000, 5_000)
z_NxV = jnp.broadcast_to(jnp.float32(z_BxV[0, :50]), (N, 50))
log_p_NxV, key = jax.nn.log_softmax(z_NxV), jax.random.key(0)
drawn, agreement = [], []
for T in TEMPERATURES:
    tokens_N = np.asarray(draw(key, z_NxV, Sampling(temperature=T)))
    agreement.append(np.mean(draw(key, log_p_NxV, Sampling(temperature=T)) == tokens_N))
    drawn.append(float(entropy(np.bincount(tokens_N, minlength=50) / N)))
exact = [float(entropy(jax.nn.softmax(z_NxV[0] / T))) for T in TEMPERATURES]

# %% [markdown]
"""
## The loss: once, twice, and on top of a softmax

PyTorch's `cross_entropy` is `nll_loss` of a log-softmax, and the library's `nll` is the two in one
pass. A second log-softmax changes neither value nor gradient. On top of a *softmax* the loss has a
floor far above 0: at probability 1 for the target, ln(e + V − 1) − 1 is left.
"""


# %%
def losses_in_torch(z_BxV):
    """Four losses of each row, and the gradient of the third."""
    z_BxV, of = torch.tensor(z_BxV, requires_grad=True), {"reduction": "none"}
    targets_B = torch.arange(B)
    once_B = F.nll_loss(F.log_softmax(z_BxV, dim=-1), targets_B, **of)
    in_one_B = F.cross_entropy(z_BxV, targets_B, **of)
    twice_B = F.cross_entropy(F.log_softmax(z_BxV, dim=-1), targets_B, **of)
    on_softmax_B = F.cross_entropy(z_BxV.softmax(-1), targets_B, **of)
    twice_B.sum().backward()
    values = [loss_B.detach().numpy() for loss_B in (once_B, in_one_B, twice_B, on_softmax_B)]
    return values, z_BxV.grad.numpy()


with jax.enable_x64(True):
    ours_B = nll(jnp.asarray(z_BxV), targets_B)
    gradient_BxV = jax.grad(lambda z_BxV: nll(z_BxV, targets_B).sum())(jnp.asarray(z_BxV))
(once_B, in_one_B, twice_B, _), gradient_in_torch = losses_in_torch(z_BxV)
losses_apart = furthest([ours_B] * 3, [once_B, in_one_B, twice_B])
gradients_apart = furthest(gradient_BxV, gradient_in_torch)
floor = losses_in_torch(1e3 * np.eye(B, V))[0][3].mean()

# %% [markdown]
"""
## No log-softmax at all

The loss is then −z of the target, and `nll_loss` takes raw logits without a word. Model 5, of one
layer and width 32, on bytes, is trained on it; the NLL of the same weights says what they know.
"""


# %%
def forgotten(logits_BxCxV, targets_BxC):
    """What `nll_loss` makes of raw logits."""
    return -jnp.take_along_axis(logits_BxCxV, targets_BxC[..., None], axis=-1)[..., 0]


@jax.jit
def test_nll(params):
    L = config.model.seq_len
    return position_losses(params, windows_BxL1, config, n_last=L, deterministic=True).mean()


config = lesson.model5(
    lesson.pick(300, 200),
    data=DataConfig(source=lesson.source, separator="none", tokenizer="bytes"),
    optimizer=OptimizerConfig(learning_rate=1e-2),
    **{"vocab_size": 257, "seq_len": 16, "d_model": 32, "n_layers": 1},
)
corpus = load_corpus(config)
windows_BxL1 = test_batches(corpus, config)[0]
curve = []  # loss, the size of its gradient, the NLL of the weights after it
for _, state, metrics in steps(config, corpus, forgotten):
    curve.append((metrics["loss"], metrics["grad_norm"], test_nll(state.params)))
loss_S, norm_S, nll_S = np.array(curve).T

# %% [markdown]
"""
## log(softmax(z)) is not log_softmax(z)

In mathematics it is. In floats a probability below 1e-38 becomes 0, and its logarithm −inf: XLA on
a CPU flushes the subnormal numbers that PyTorch keeps down to 1e-45. bfloat16 has the range of
float32 and 8 bits of precision, and no order of operations gives it more.
"""

# %%
SCALES = lesson.pick((1, 3, 10, 15, 20, 30, 100), (3, 30))


def lost_and_wrong(scale, dtype):
    """Share of −inf in log(softmax(z)), in JAX and PyTorch; the largest error of log_softmax."""
    z = jnp.asarray(z_BxV / 3 * scale, dtype)
    z_exact = np.asarray(z, np.float64)
    exact = z_exact - np.logaddexp.reduce(z_exact, axis=-1, keepdims=True)
    z_in_torch = torch.tensor(z_exact).to(getattr(torch, dtype))
    in_torch = z_in_torch.softmax(-1).log().isinf().double().mean()
    direct = np.asarray(jax.nn.log_softmax(z), np.float64)
    return float(jnp.isinf(jnp.log(jax.nn.softmax(z))).mean()), in_torch, furthest(direct, exact)


table = {d: [lost_and_wrong(s, d) for s in SCALES] for d in ("float32", "bfloat16")}
at_30 = {dtype: rows[SCALES.index(30)] for dtype, rows in table.items()}

# %%
figure, (left, middle, right) = plt.subplots(1, 3, figsize=(11, 3.8), layout="constrained")
left.plot(loss_S)
left.set(xlabel="step", ylabel="loss without log-softmax")
middle.plot(nll_S)
middle.axhline(np.log(257), color="0.7", linestyle="--", label="ln 257: every byte alike")
middle.set(xlabel="step", ylabel="NLL of the same weights [nats], test text")
middle.legend()
for (name, rows), style in zip(table.items(), ("-o", ":s"), strict=True):
    in_jax, in_torch, _ = zip(*rows, strict=True)
    right.semilogx(SCALES, in_jax, f"C0{style}", label=f"JAX, {name}")
    right.semilogx(SCALES, in_torch, f"C1{style}", label=f"PyTorch, {name}")
right.set(xlabel="standard deviation of the logits", ylabel="share of −inf in log(softmax(z))")
right.legend()
lesson.save(figure, "without")

# %% [markdown]
"""
## What holds

A generator that *exponentiates* the output gets the probabilities of T = 1; the cure is to divide
by T first, which log-probabilities allow as well as logits. So the course's advice, raw logits out
of the model, is sound, but for other reasons: one pass for softmax and loss, and no V numbers a
position that nobody needs.
"""

# %%
lesson.check(
    "A log-softmax in the model freezes the temperature at 1",
    "freezes it",
    f"the same p at T = 0.5, 1, 1.1, 2, to {apart:.0e}: entropy "
    f"{listed(entropies['log-softmax'])} nats with it, {listed(entropies['logits'])} without",
    apart > 1e-6,
)
lesson.check(
    "A softmax in the model freezes it",
    "–",
    f"entropy {listed(entropies['softmax'], 4)} of at most {np.log(V):.4f} nats: equal tokens",
    np.ptp(entropies["softmax"]) < 0.001,
)
lesson.check(
    "Tokens are drawn by P_i ~ exp(z_i / T)",
    "P_i ~ exp(z_i / T)",
    f"entropy of {N} draws {listed(drawn)}, of softmax(z / T) {listed(exact)}; with log-softmax "
    f"{min(agreement):.2%} the same tokens",
    furthest(drawn, exact) < 0.05 and min(agreement) > 0.999,
)
lesson.check(
    "nll_loss of log-softmax, cross_entropy, our nll are one; a second log-softmax changes nothing",
    "–",
    f"furthest apart {losses_apart:.0e}, gradients {gradients_apart:.0e}",
    max(losses_apart, gradients_apart) < 1e-12,
)
lesson.check(
    "cross_entropy on a softmax is another loss",
    "–",
    f"never below {floor:.2f} nats, however sure the model",
    abs(floor - (np.log(np.e + V - 1) - 1)) < 1e-6,
)
lesson.check(
    "Forgetting the log-softmax is a serious error",
    "a serious error",
    f"the loss is {loss_S[-1]:.0f} after {config.steps} steps, its gradient has grown from "
    f"{norm_S[0]:.2f} to {norm_S[-1]:.2f}; the NLL falls to {nll_S.min():.2f} by step "
    f"{nll_S.argmin() + 1}, then rises to {nll_S[-1]:.1f}",
    loss_S[-1] < -50 and norm_S[-1] > norm_S[0] and nll_S[-1] > np.log(257),
)
lesson.check(
    "log(softmax(z)) loses what log_softmax(z) keeps, at large z",
    "–",
    f"at std 30 {at_30['float32'][0]:.0%} is −inf in JAX, {at_30['float32'][1]:.0%} in PyTorch; "
    f"log_softmax is off by {at_30['float32'][2]:.0e}, in bfloat16 by {at_30['bfloat16'][2]:.1f}",
    at_30["float32"][0] > 0.5 and at_30["float32"][2] < 1e-3,
)
lesson.end()
