# %% [markdown]
"""
# A model that likes "x": a loss that asks for a distribution, not for a token

**Question.** What does Model 5 learn from random tokens, if the loss asks for tokens with an "x"?

**The course** (010) feeds Model 5 uniform random tokens for 200 steps. Its loss is KL(target ‖
model) of the final token, the target uniform over the tokens whose text contains "x". It sees the
loss fall from about ln V ≈ 11 to about 0, and counts the letter in 188 of 200 generated tokens.

**Expect** the fall and the count, but another start: 897 of the 50257 tokens contain "x", so the KL
of a uniform model is ln(50257 / 897) = 4.03. And expect the model to ignore its input, which tells
it nothing. It does where the head has a table of its own, as the course's has on a GPU; with a
tied head, which is the library's default, it may not.

Ten minutes of processor time, which two CPU cores share; on a GPU not measured.

How to read the names, such as `x_BxLxD`: `docs/lessons.md`. PyTorch's words in JAX:
`docs/from_pytorch.md`.
"""

# %%
import functools

import jax
import matplotlib.pyplot as plt
import numpy as np
import optax
import torch
import torch.nn.functional as F
from lesson import Lesson, furthest, spread

from jax_model5 import tokenizer
from jax_model5.generate import Sampling, generate
from jax_model5.model import Model5
from jax_model5.programs import steps

lesson = Lesson("10", 'A model that likes "x"')
STEPS = lesson.pick(200, 20)
SIZE = lesson.pick({"seq_len": 32, "d_model": 384, "n_layers": 2}, {"n_layers": 1})
N_TOKENS = lesson.pick(200, 20)
SEEDS = lesson.pick(range(3), range(1))

# %% [markdown]
"""
## The target

GPT-2's tokens, case-sensitive: 90 tokens contain "X", and 88 of them no "x". The end-of-text token
is spelled `<|endoftext|>`, so that the model is to like it as well.
"""

# %%
encoding = tokenizer.load("gpt2")
V = encoding.n_vocab
is_liked_V = np.array(["x" in encoding.decode([token]) for token in range(V)])
n_liked = int(is_liked_V.sum())
target_V = is_liked_V / n_liked
either = sum("x" in encoding.decode([token]).lower() for token in range(V))
print(f"{n_liked} of {V} tokens contain the letter, {either} with capitals")

# %% [markdown]
"""
## The loss twice

To the library a loss is a function of logits and targets; this one has its target already.
PyTorch's `F.kl_div` computes the same, with three surprises: the model comes first although the
divergence is KL(target ‖ model), it takes the model's *log*-probabilities but the target's
probabilities, and its default `reduction="mean"` divides by B · V. The mean over the batch is
`"batchmean"`. The cell holds both losses to each other, and their gradients, in float64.
"""


# %%
def kl(logits_BxCxV, targets_BxC):
    """KL(target ‖ model) of each position [nats]."""
    return optax.losses.kl_divergence(jax.nn.log_softmax(logits_BxCxV), target_V)


def kl_in_torch(logits_BxV, reduction="batchmean"):
    """Its mean over the batch."""
    log_p_BxV = F.log_softmax(logits_BxV, dim=-1)
    target_BxV = torch.from_numpy(target_V).expand_as(log_p_BxV)
    return F.kl_div(log_p_BxV, target_BxV, reduction=reduction)


logits_BxV = np.random.default_rng(0).normal(size=(16, V))
with jax.enable_x64(True):
    ours = jax.value_and_grad(lambda z_BxV: kl(z_BxV, None).mean())(logits_BxV)
leaf_BxV = torch.tensor(logits_BxV, requires_grad=True)
theirs = kl_in_torch(leaf_BxV)
theirs.backward()
apart = furthest(ours, (theirs.item(), leaf_BxV.grad.numpy()))
print(f'"batchmean" {theirs.item():.4f}, "mean" {kl_in_torch(leaf_BxV, "mean").item():.1e}')

# %% [markdown]
"""
## Training

`steps` takes the loss and the batches, here without a corpus; `objective="final_token"` asks for
the logits of one position. The last token of each window would be its target; `kl` never reads it.
"""


# %%
def random_tokens(seed, shape, step):
    """The windows [B, L + 1] of a step."""
    return np.random.default_rng([seed, step]).integers(0, V, shape, np.int32)


def train(seed, tied_head):
    """The loss of each step, the model, and its parameters after the last."""
    config = lesson.model5(STEPS, seed=seed, objective="final_token", tied_head=tied_head, **SIZE)
    shape = (config.batch_size, config.model.seq_len + 1)
    batches = functools.partial(random_tokens, seed, shape)
    losses, params = [], None
    for _, state, metrics in steps(config, None, kl, batches):
        losses.append(metrics["loss"])
        params = state.params
    return np.array(jax.device_get(losses)), config.model, params


NAMES = {False: "a head of its own", True: "a tied head"}
runs = {tied: [train(seed, tied) for seed in SEEDS] for tied in NAMES}

# %% [markdown]
"""
## What it learned

Two questions of each model: what it writes, and how much its context matters. For the second, how
much probability "x" gets after contexts in which none to all of the L tokens contain it. For the
first, 200 tokens at temperature 1, which samples from just what the loss trained. A temperature
below 1 favours the likely ones further, so that a count of the letter says little without it; that
of the course's count we do not know.
"""


# %%
@functools.partial(jax.jit, static_argnames="model")
def p_of_next(params, tokens_BxL, temperature, model):
    logits_Bx1xV = Model5(model).apply({"params": params}, tokens_BxL, n_last=1, deterministic=True)
    return jax.nn.softmax(logits_Bx1xV[:, 0] / temperature)


def contexts(n_with_x, L, n_rows=32):
    """Random windows of L tokens, n_with_x of which, anywhere, contain the letter."""
    draw = np.random.default_rng(1)
    plain_BxL = draw.choice(np.flatnonzero(~is_liked_V), (n_rows, L))
    liked_BxL = draw.choice(np.flatnonzero(is_liked_V), (n_rows, L))
    order_BxL = draw.permuted(np.tile(np.arange(L), (n_rows, 1)), axis=1)
    return np.where(order_BxL < n_with_x, liked_BxL, plain_BxL)


def p_of_x(run, n_with_x, temperature=1.0):
    """Probability that the next token contains the letter, mean over contexts."""
    _, model, params = run
    p_BxV = p_of_next(params, contexts(n_with_x, model.seq_len), temperature, model)
    return float(p_BxV[:, is_liked_V].sum(axis=1).mean())


def written(run, seed):
    """Tokens that follow a window of random ones."""
    _, model, params = run
    prompt = random_tokens(seed, model.seq_len, STEPS)
    how = {"config": model, "sampling": Sampling(temperature=1.0), "n_tokens": N_TOKENS}
    return np.array(list(generate(params, [prompt], jax.random.key(seed), **how)))[:, 0]


def parted(run):
    """How far the mean embeddings of the tokens with and without the letter are apart."""
    wte_VxD = np.asarray(run[2]["wte"])
    return float(np.linalg.norm(wte_VxD[is_liked_V].mean(0) - wte_VxD[~is_liked_V].mean(0)))


L = runs[True][0][1].seq_len
counts = sorted({0, L // 4, L // 2, 3 * L // 4, 7 * L // 8, L - 1, L})
curves = {tied: [[p_of_x(run, n) for n in counts] for run in runs[tied]] for tied in NAMES}
with_x = {}
for tied, name in NAMES.items():
    texts = [written(run, seed) for run, seed in zip(runs[tied], SEEDS, strict=True)]
    with_x[tied] = [int(is_liked_V[tokens].sum()) for tokens in texts]
    print(f"{name}: {encoding.decode(list(texts[0][:40]))!r}")

# %%
figure, (left, right) = plt.subplots(1, 2, figsize=(9, 4), layout="constrained")
for tied, style in ((False, "C0o-"), (True, "C1.--")):
    for i, curve in enumerate(curves[tied]):
        right.plot(np.array(counts) / L, curve, style, label=NAMES[tied] if i == 0 else None)
losses = runs[False][0][0]
left.plot(losses + np.log(n_liked), "C2", label="cross-entropy with the target")
left.plot(losses, "C0", label="KL(target ‖ model)")
for height, name in ((np.log(V), "ln V"), (np.log(n_liked), f"ln {n_liked}")):
    left.axhline(height, color="0.7", linewidth=0.8)
    left.text(0, height + 0.15, name, color="0.4")
left.set(xlabel="step", ylabel="nats", ylim=(0, 14))
left.legend(loc="upper right")
right.set(xlabel='share of the context that contains "x"', ylabel='probability of "x" next')
right.set(ylim=(-0.03, 1.03))
right.legend(loc="lower left")
lesson.save(figure, "likes_x")

# %% [markdown]
"""
## What holds

The article's start of ln V is that of the *cross-entropy* with the target. But the cross-entropy is
the KL plus ln 897 = 6.80, the entropy of the target, and cannot fall below it; the KL reaches 0 and
starts at 4.03. No one loss goes from 11 to 0.

Where the head has a table of its own, the embedding of a token hardly changes, and the answer is
in the head and the final layer norm: generation draws 200 times from one constant distribution. A
tied table is both. The loss pulls the rows of the 897 tokens to one side and all others to the
opposite one, and the same rows are the input: random tokens, 98 % of them without "x", have become
a signal that the blocks may use. A context full of "x", which training never showed, then turns it
round, and the model writes something else: it was right only on inputs like those that it saw. The
seed decides whether.
"""

# %%
first, last = ([run[0][i] for run in runs[False]] for i in (0, -1))
untied, tied = (np.array(curves[key]) for key in NAMES)
distance = {key: [parted(run) for run in runs[key]] for key in NAMES}
lesson.check('tokens that contain "x"', "897", f"{n_liked}", n_liked == 897)
lesson.check(
    "the loss starts at about ln V",
    "≈ 11",
    f"KL {spread(first)} = ln(V / {n_liked}); the cross-entropy {first[0] + np.log(n_liked):.2f}",
    abs(np.mean(first) - np.log(V)) < 0.5,
)
lesson.check(
    "the loss falls to about 0",
    "≈ 0",
    f"{spread(last, 3)} after {STEPS} steps",
    max(last) < 0.1,
    in_fast=False,
)
cooler = [p_of_x(run, 0, temperature=0.5) for run in runs[False]]
lesson.check(
    'generated tokens contain "x"',
    "188 of 200",
    f"{', '.join(map(str, with_x[False]))} of {N_TOKENS} at temperature 1; "
    f"at 0.5 {100 * np.mean(cooler):.1f} % are likely to",
    min(with_x[False]) >= 0.9 * N_TOKENS,
    in_fast=False,
)
lesson.check(
    "with its own head it ignores its input",
    "–",
    f'"x" {100 * untied[:, 0].mean():.1f} % likely after no "x", '
    f"{100 * untied[:, -1].mean():.1f} % after nothing else; embeddings {spread(distance[False])} "
    "apart",
    np.abs(untied - untied[:, :1]).max() < 0.01,
)
lesson.check(
    "with a tied head too",
    "–",
    f"{100 * tied[:, 0].mean():.1f} %, and {', '.join(f'{100 * p:.2f}' for p in tied[:, -1])} %; "
    f"{', '.join(map(str, with_x[True]))} of {N_TOKENS} generated; embeddings "
    f"{spread(distance[True])} apart",
    np.abs(tied - tied[:, :1]).max() < 0.01,
    in_fast=False,
)
lesson.check("JAX's loss and gradient are PyTorch's", "–", f"{apart:.1e} apart", apart < 1e-12)
lesson.end()
