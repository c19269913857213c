# %% [markdown]
"""
# Numerical scaling: what a division by a square root keeps in range

**Question.** Why are attention's products divided by the square root of their width, what does
LayerNorm learn, and what does Model 5 gain by dividing its logits too?

**The course** (011) multiplies two 50 x 50 normal matrices, Q Kᵀ, finds a standard deviation of
about sqrt(50), repeats it for sizes 2 to 99, and compares softmax of scaled and unscaled products.
Then it looks at GPT-2's LayerNorm: weights from 0 to 3, biases from −5 to 5.

**Expect** the square root, of the *width*: the length has no part in it. Unscaled products make a
softmax that nearly picks one key. That its gradient vanishes is half the truth: at widths of a head
it does for some queries, while others have a larger one. And Model 5 divides logits that its small
initial weights had made small already; unscaled, it learns faster at first.

About 50 seconds on two CPU cores; no GPU needed, and none measured.

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
from lesson import Lesson, furthest, spread

from jax_model5.config import DataConfig
from jax_model5.corpus import load_corpus
from jax_model5.layer_norm import layer_norm
from jax_model5.model import LAYER_NORM_EPSILON
from jax_model5.programs import steps
from jax_model5.trees import leaves_of

lesson = Lesson("11", "Numerical scaling: what a division by a square root keeps in range")
SEEDS = lesson.pick(range(3), range(1))
SIZES = np.arange(2, 100)

# %% [markdown]
"""
## The size of Q Kᵀ

A product of W terms of variance 1 has variance W. Square matrices of 2 to 99, as in the course,
change width and length together; here one of them stays at 50.
"""


# %%
def stds(seed):
    """std(Q Kᵀ) of two 50 x 50 matrices, by width of 50 rows, and by rows of width 50."""
    q, k = np.asarray(jax.random.normal(jax.random.key(seed), (2, 99, 99)))
    by_width = [(q[:50, :n] @ k[:50, :n].T).std() for n in SIZES]
    by_length = [(q[:n, :50] @ k[:n, :50].T).std() for n in SIZES]
    return by_width[48], by_width, by_length


def exponent(stds):
    """The b of std ~ size^b."""
    return np.polyfit(np.log(SIZES), np.log(stds), 1)[0]


at_50, by_width, by_length = zip(*map(stds, SEEDS), strict=True)
exponents = [list(map(exponent, curves)) for curves in (by_width, by_length)]

# %% [markdown]
"""
## The softmax of it, and its gradient

50 keys, many queries, at each width. Of each query: its largest probability, and the size of the
softmax's Jacobian (Frobenius norm), by which a gradient at the probabilities reaches the products.
"""

# %%
WIDTHS = (1, 2, 4, 8, 16, 32, 50, 64, 128, 256, 512)
QUANTILES = (0.1, 0.5, 0.9)
M, L = lesson.pick(2000, 200), 50
jacobians = jax.jit(jax.vmap(jax.jacobian(jax.nn.softmax)))
q_MxK = np.asarray(jax.random.normal(jax.random.key(0), (M, WIDTHS[-1])))
k_LxK = np.asarray(jax.random.normal(jax.random.key(1), (L, WIDTHS[-1])))


def softmax_at(width, is_scaled):
    """Quantiles over the queries: largest probability, entropy [nats], size of the gradient."""
    scores_MxL = q_MxK[:, :width] @ k_LxK[:, :width].T
    scores_MxL = scores_MxL / np.sqrt(width) if is_scaled else scores_MxL
    p_MxL = np.asarray(jax.nn.softmax(scores_MxL))
    entropy_M = -(p_MxL * np.log(np.maximum(p_MxL, 1e-30))).sum(1)
    size_M = np.linalg.norm(np.asarray(jacobians(scores_MxL)), axis=(1, 2))
    return [np.quantile(values_M, QUANTILES) for values_M in (p_MxL.max(1), entropy_M, size_M)]


by_softmax = {s: np.array([softmax_at(w, s) for w in WIDTHS]) for s in (True, False)}
at_width_50 = {s: rows[WIDTHS.index(50)] for s, rows in by_softmax.items()}
at_width_512 = {s: rows[-1] for s, rows in by_softmax.items()}

# %% [markdown]
"""
## What LayerNorm learns

Its weights start at 1, its biases at 0. A small Model 5 is trained on bytes, with its logits
divided, and (at full size) without. AdamW moves a parameter by about the learning rate, 0.001, a
step; GPT-2 had some hundred thousand steps. To look at GPT-2's own, with a network:

    python -m jax_model5.huggingface import gpt2 --out runs/gpt2

    from jax_model5.checkpoint import read_params
    from jax_model5.config import config_of_run
    from jax_model5.step import abstract_state

    shapes = abstract_state(config_of_run("runs/gpt2", "lesson")).params
    layer_norms = layer_norm_leaves(read_params("runs/gpt2", shapes))
"""


# %%
def layer_norm_leaves(params):
    """Every weight of every LayerNorm in one array, and every bias."""
    leaves = {path: np.asarray(leaf).ravel() for path, leaf in leaves_of(params).items()}
    of_norms = {path: leaf for path, leaf in leaves.items() if "ln_" in path}
    ends = ("scale", "bias")
    return [np.concatenate([of_norms[p] for p in of_norms if p.endswith(e)]) for e in ends]


def trained(is_scaled):
    """The loss of each step, and the last parameters."""
    config = lesson.model5(
        lesson.pick(200, 20),
        data=DataConfig(source=lesson.source, separator="none", tokenizer="bytes"),
        **{"vocab_size": 257, "n_layers": lesson.pick(2, 1), "scale_logits": is_scaled},
    )
    losses, params = [], None
    for _, state, metrics in steps(config, load_corpus(config)):
        losses.append(metrics["loss"])
        params = state.params
    return np.array(losses), params


runs = {s: trained(s) for s in lesson.pick((True, False), (True,))}
losses, params = runs[True]
scales, biases = layer_norm_leaves(params)

# %% [markdown]
"""
## The same in PyTorch

`scaled_dot_product_attention` divides by the square root of the width unless told otherwise; with
the identity for values it hands out its weights. `std` differs: PyTorch's divides by n − 1,
NumPy's and JAX's by n. Model 5's LayerNorm is `nn.LayerNorm`, here with what it has learned.
"""

# %%
K = 64
q, k = torch.tensor(q_MxK[:, :K]).double(), torch.tensor(k_LxK[:, :K]).double()
weights_MxL = F.scaled_dot_product_attention(q, k, torch.eye(L).double())
norm = torch.nn.LayerNorm(len(params["ln_f"]["scale"])).double()
with torch.no_grad():
    norm.weight.copy_(torch.tensor(np.asarray(params["ln_f"]["scale"])))
    norm.bias.copy_(torch.tensor(np.asarray(params["ln_f"]["bias"])))
x_MxD = 3 + 5 * torch.randn(100, norm.weight.numel()).double()
with jax.enable_x64(True):
    products_MxL = jnp.asarray(q.numpy()) @ k.numpy().T
    learned = [jnp.asarray(norm.weight.detach().numpy()), jnp.asarray(norm.bias.detach().numpy())]
    ours = {
        "weights": jax.nn.softmax(products_MxL / np.sqrt(K)),
        "std": products_MxL.std(ddof=1),
        "norm": layer_norm(jnp.asarray(x_MxD.numpy()), *learned, LAYER_NORM_EPSILON),
    }
theirs = {"weights": weights_MxL, "std": (q @ k.T).std(), "norm": norm(x_MxD).detach()}
apart = furthest(ours, theirs)

# %%
figure, axes = plt.subplots(2, 2, figsize=(9, 7), layout="constrained")
(size, gradient), (of_scales, of_loss) = axes
size.plot(SIZES, by_width[0], label="width, of 50 rows")
size.plot(SIZES, by_length[0], label="rows, of width 50")
size.plot(SIZES, np.sqrt(SIZES), "k:", label="square root")
size.set(xlabel="size", ylabel="std of Q Kᵀ")
for is_scaled, rows in by_softmax.items():
    low, middle, high = rows[:, 2].T
    (line,) = gradient.loglog(WIDTHS, middle, label="scaled" if is_scaled else "unscaled")
    gradient.fill_between(WIDTHS, low, high, color=line.get_color(), alpha=0.2)
gradient.set(xlabel="width", ylabel="size of softmax's gradient", ylim=(1e-5, 1))
of_scales.hist(scales - 1, 60, alpha=0.6, label="weights − 1")
of_scales.hist(biases, 60, alpha=0.6, label="biases")
of_scales.set(xlabel=f"LayerNorm after {len(losses)} steps", ylabel="parameters")
for is_scaled, (curve, _) in runs.items():
    of_loss.plot(curve, label="logits / sqrt(D)" if is_scaled else "logits")
of_loss.set(xlabel="step", ylabel="training loss [nats]")
for ax in axes.flat:
    ax.legend()
lesson.save(figure, "scaling")

# %% [markdown]
"""
## What holds

The line of the gradient is the median query, its shade the middle 80 percent. Scaling keeps the
gradient of every query at one size at every width; that is what it is for.

Model 5 divides its logits too, by sqrt(D), which the final LayerNorm has already made of size 1.
Divided logits can only grow with the head's rows and the final LayerNorm's weights, and these grow
by a full learning rate at every step: the group at +0.2 after 200 steps of 0.001. Undivided, the
same model is ahead at once, but one step of the default text doubles its loss for that one step.
That is the training's, not the program's: the PyTorch reference, from the same weights on the same
batches, has the same spike at the same step.
"""


# %%
(top, entropy, slope), (top_un, entropy_un, slope_un) = at_width_50[True], at_width_50[False]
lesson.check(
    "std(Q Kᵀ) of two 50 x 50 normal matrices is about sqrt(50)",
    "≈ 7.07",
    spread(at_50),
    abs(np.mean(at_50) - np.sqrt(50)) < 0.5,
)
lesson.check(
    "It grows as the square root of the width, and not with the length",
    "sizes 2 to 99",
    f"as width^{spread(exponents[0])}, as length^{spread(exponents[1])}",
    abs(np.mean(exponents[0]) - 0.5) < 0.05 and abs(np.mean(exponents[1])) < 0.05,
)
lesson.check(
    "Unscaled, softmax saturates",
    "scaled against unscaled",
    f"width 50, median query: largest of 50 probabilities {top_un[1]:.2f}, entropy "
    f"{entropy_un[1]:.2f} nats; scaled {top[1]:.2f} and {entropy[1]:.2f}, ln 50 = 3.91",
    top_un[1] > 0.6 and top[1] < 0.2,
)
lesson.check(
    "Unscaled, softmax has no gradient left",
    "–",
    f"width 50: {slope_un[1]:.3f} in the median, {slope_un[0]:.3f} for every tenth query; scaled "
    f"{slope[1]:.3f} and {slope[0]:.3f}; width 512: median {at_width_512[False][2][1]:.4f}",
    slope_un[1] < slope[1] / 2,
)
lesson.check(
    "Training moves LayerNorm's parameters from 1 and 0",
    "GPT-2's: weights 0 to 3, biases −5 to 5",
    f"after {len(losses)} steps weights {scales.min():.2f} to {scales.max():.2f}, biases "
    f"{biases.min():.2f} to {biases.max():.2f}; the final one's weights "
    f"{np.mean(params['ln_f']['scale']):.2f} on average, of all {scales.mean():.2f}",
    min(scales.std(), biases.std()) > 0.001,
)
undivided = runs[False][0] if False in runs else np.full_like(losses, np.nan)
lesson.check(
    "Dividing the logits slows the first steps",
    "–",
    f"loss at step 50 {losses[:50][-1]:.2f} with, {undivided[:50][-1]:.2f} without; at the end "
    f"{losses[-10:].mean():.2f} and {undivided[-10:].mean():.2f}; the most it rises in a step "
    f"{np.diff(losses).max():.2f} and {np.diff(undivided).max():.2f}",
    losses[:50].mean() > undivided[:50].mean(),
    in_fast=False,
)
lesson.check(
    "PyTorch's attention weights, std and LayerNorm are JAX's",
    "–",
    f"furthest apart {apart:.0e} in float64",
    apart < 1e-12,
)
lesson.end()
