# %% [markdown]
"""
# Model 1: a model without context, and a test set that leaks

**Question.** What can a model learn that sees one token at a time, and what does a test set say of
it whose windows overlap those of training?

**The course** (05, 06) trains an embedding, a GELU and a linear layer to the vocabulary, first of
width 64 with a bias, 25 epochs, then of width 128 without, 10 epochs, on *The Time Machine*:
windows of 8 tokens at every second token, batches of 64, AdamW at 1e-3. The loss falls from about
11 to about 3.7. A random tenth of the windows is the test set.

**Expect** a bigram model: no position sees another, so no training brings the loss below the
entropy of the next token given this one. And a test loss near the training loss, however much is
learnt by heart: nearly every pair of tokens of a test window stands, at the same place of the text,
in training windows too.

Five minutes on two CPU cores; on a GPU not measured. The text is the first 16,000 tokens of what
Python ships; the course's is Project Gutenberg's book 35, for `--data.source`. The vocabulary is
that of the text, not of GPT-2. A shorter text has fewer pairs, and a lower entropy.

How to read the names, such as `x_BxLxD`: `docs/lessons.md`. PyTorch's words in JAX:
`docs/from_pytorch.md`.
"""

# %%
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
import torch
from lesson import Lesson, furthest, spread

from jax_model5.config import OptimizerConfig
from jax_model5.corpus import load_corpus
from jax_model5.losses import nll
from jax_model5.optimizer import optimizer

lesson = Lesson("06", "Model 1: a model without context, and a test set that leaks")
torch.set_num_threads(1)  # two that wait for each other take minutes where the cores are busy
CONTEXT, STRIDE, BATCH, COMPARED = 8, 2, 64, lesson.pick(100, 40)
MODELS = (64, True), (128, False)  # width and bias, of 05 and of 06

tokens_T = load_corpus(lesson.model5(steps=1)).tokens_T[: lesson.pick(16_000, 2_000)]
text_T = np.unique(tokens_T, return_inverse=True)[1]  # from here on tokens are 0 to V − 1
T, V = len(text_T), int(text_T.max()) + 1
# Of each window, where its tokens stand in the text.
places_WxL1 = np.arange(0, T - CONTEXT, STRIDE)[:, None] + np.arange(CONTEXT + 1)

# %% [markdown]
"""
## The model, twice

A module of Flax holds no weights: `model` is a recipe, and `params` a dictionary that goes in with
the tokens, by `apply`; the model itself is never called. `width` and `bias` are what `__init__`
would take. Under `@nn.compact` a layer is described where it is used, and its `name` finds its
weights in `params`: `params["embed"]["embedding"]`, `params["head"]["kernel"]`. `nn.Dense` keeps
its kernel [in, out], `torch.nn.Linear` [out, in]. PyTorch draws the weights here, N(0, 1) and
uniform to ± 1 / sqrt(width), and both start from them.
"""


# %%
class Model1(nn.Module):
    width: int
    bias: bool

    @nn.compact
    def __call__(self, tokens_BxL):
        x_BxLxD = nn.Embed(V, self.width, name="embed")(tokens_BxL)
        x_BxLxD = nn.gelu(x_BxLxD, approximate=False)
        return nn.Dense(V, use_bias=self.bias, name="head")(x_BxLxD)


def twins(width, bias, seed=0, dtype=torch.float32):
    """The model and its parameters in Flax, and the same in PyTorch."""
    torch.manual_seed(seed)
    embed, head = torch.nn.Embedding(V, width), torch.nn.Linear(width, V, bias=bias)
    twin = torch.nn.Sequential(embed, torch.nn.GELU(), head).to(dtype)
    params = {"embed": {"embedding": embed.weight}, "head": {"kernel": head.weight.T}}
    if bias:
        params["head"]["bias"] = head.bias
    params = jax.tree.map(lambda weight: jnp.array(weight.numpy(force=True)), params)
    return Model1(width, bias), params, twin


# %% [markdown]
"""
## Training, twice

A `DataLoader` is an object that shuffles; here the order of the windows is a function of the seed
and the epoch, and both get the same. `zero_grad`, `backward` and `step` change things in place; in
JAX the gradient is one value, and the next parameters are another. To `jit` the `model` is static:
no array, and another one is compiled again. `params` and `moments` are donated: their memory is
used for the next ones, so they are not read again.
"""

# %%
ADAMW = optimizer(OptimizerConfig(learning_rate=1e-3), steps=1)  # a constant rate


def batches(places_WxL1, seed, epoch):
    """All windows in a new order, [S, B, L + 1], but those that fill no batch."""
    order_W = np.random.default_rng([seed, epoch]).permutation(len(places_WxL1))
    return text_T[places_WxL1[order_W[: len(order_W) // BATCH * BATCH].reshape(-1, BATCH)]]


@jax.jit(static_argnames="model", donate_argnames=("params", "moments"))
def train_step(model, params, moments, windows_BxL1):
    def mean_nll(params):
        logits_BxLxV = model.apply({"params": params}, windows_BxL1[:, :-1])
        return nll(logits_BxLxV, windows_BxL1[:, 1:]).mean()

    loss, gradients = jax.value_and_grad(mean_nll)(params)
    updates, moments = ADAMW.update(gradients, moments, params)
    return optax.apply_updates(params, updates), moments, loss


def gap(sizes, dtype, x64):
    """How far the two loss curves are apart at most, over the first steps from the same weights.

    `x64`: JAX may use float64, which optax then does for the numbers that are no arrays.
    """
    with jax.enable_x64(x64):
        model, params, twin = twins(*sizes, dtype=dtype)
        moments, curves = ADAMW.init(params), []
        update = torch.optim.AdamW(twin.parameters(), lr=1e-3)
        many_SxBxL1 = np.concatenate([batches(places_WxL1, 0, epoch) for epoch in range(8)])
        for windows_BxL1 in many_SxBxL1[:COMPARED]:
            params, moments, loss = train_step(model, params, moments, windows_BxL1)
            windows_BxL1 = torch.from_numpy(windows_BxL1)
            update.zero_grad()
            logits_BxLxV = twin(windows_BxL1[:, :-1])
            theirs = torch.nn.functional.cross_entropy(logits_BxLxV.mT, windows_BxL1[:, 1:])
            theirs.backward()
            update.step()
            curves.append((float(loss), theirs.item()))
    return furthest(*zip(*curves, strict=True))


in_float64, in_float32, without_x64 = (
    max(gap(sizes, *precision) for sizes in lesson.pick(MODELS, MODELS[1:]))
    for precision in ((torch.float64, True), (torch.float32, True), (torch.float32, False))
)

# %% [markdown]
"""
## A table of V × V

All that Model 1 says of the next token is a function of this one: a table of V × V probabilities.
So its loss on any windows follows from how often each pair of tokens stands in them, and the least
that a model of this kind can reach is the entropy of those counts.
"""


# %%
def pairs(places_WxL1):
    """How often each token is followed by each, in these windows."""
    count_VxV = np.zeros((V, V), np.float32)
    np.add.at(count_VxV, (text_T[places_WxL1[:, :-1]], text_T[places_WxL1[:, 1:]]), 1)
    return count_VxV


def entropy(count_VxV):
    """Of the next token given this one [nats]."""
    p_VxV = count_VxV / np.maximum(count_VxV.sum(1, keepdims=True), 1)
    return -(count_VxV * np.log(np.where(p_VxV > 0, p_VxV, 1))).sum() / count_VxV.sum()


def learn(sizes, epochs, train_places, test_places, seed=0):
    """The loss on the training and on the test windows, and the entropy; from 0 to all epochs."""
    model, params, _ = twins(*sizes, seed)
    moments, curve = ADAMW.init(params), []
    counts = [pairs(places) for places in (train_places, test_places)]
    for epoch in range(epochs + 1):
        log_p_VxV = jax.nn.log_softmax(model.apply({"params": params}, jnp.arange(V)))
        losses = [float(-(count * log_p_VxV).sum() / count.sum()) for count in counts]
        curve.append((*losses, entropy(counts[0])))
        if epoch == epochs:
            break
        for windows_BxL1 in batches(train_places, seed, epoch):
            params, moments, _ = train_step(model, params, moments, windows_BxL1)
    return np.array(curve)


# %% [markdown]
"""
## Three ways to set a tenth aside

As the course does: all windows are cut, and a tenth of them is drawn. Or the text is cut first, and
no window has tokens of both parts: a tenth of its pieces of 100 tokens, drawn at random, so that
both parts are alike; or its last tenth, as of Model 5, which may be about something else.
"""


# %%
def split(how, seed):
    """The windows for training, and those for the test."""
    order, W = np.random.default_rng(seed).permutation, len(places_WxL1)
    n_pieces = math.ceil(T / 100)
    is_test_WxL1 = {
        "windows": (order(W) < W // 10)[:, None],
        "pieces": (order(n_pieces) < n_pieces // 10)[places_WxL1 // 100],
        "the end": places_WxL1 >= 0.9 * T,
    }[how]
    return places_WxL1[~is_test_WxL1.any(1)], places_WxL1[is_test_WxL1.all(1)]


EPOCHS = lesson.pick((25, 10), (1, 4))
SPLITS, SEEDS = ("windows", "pieces", "the end"), lesson.pick(range(3), range(1))
splits = {(how, seed): split(how, seed) for how in SPLITS for seed in SEEDS}
curves = {key: learn(MODELS[1], EPOCHS[1], *splits[key], key[1]) for key in splits}
curve_05 = learn(MODELS[0], EPOCHS[0], places_WxL1, places_WxL1)

figure, axes = plt.subplots(1, 3, figsize=(8, 4), layout="constrained", sharex=True, sharey=True)
for ax, how in zip(axes, SPLITS, strict=True):
    ax.plot(curves[how, 0], label=["training", "test", "entropy"])
    ax.set(xlabel="epochs", title=f"test: {how}", xticks=range(0, EPOCHS[1] + 1, 2))
axes[0].set(ylabel="loss [nats]")
axes[0].legend()
lesson.save(figure, "splits")

# %% [markdown]
"""
## What holds

In float32 most of the difference between the frameworks (the last row) is one rounding: Adam's 1 −
0.999^t. In float32 it is wrong by up to 2 in 100,000. PyTorch computes it in Python's float64,
optax in JAX's precision: float32, or float64 under `jax.enable_x64`, while the weights stay
float32.
"""

# %%
start, end, least = curve_05[0, 0], curve_05[-1, 0], curve_05[-1, 2]
lesson.check(
    "the loss falls from 11 to 3.7",
    "≈ 11 → ≈ 3.7",
    f"{start:.2f} → {end:.2f} in {EPOCHS[0]} epochs (05); ln V = {math.log(V):.2f} with our {V:,} "
    f"tokens, {math.log(50257):.2f} with GPT-2's",
    abs(start - math.log(V)) < 0.3 and abs(end - 3.7) < 0.3,
    in_fast=False,
)
above = [curve[-1, 0] - curve[-1, 2] for curve in curves.values()]
lesson.check(
    "it learns no more than pairs",
    "–",
    f"ends {end - least:.2f} above their entropy, {least:.2f} (05); {min(above):.2f} or more (06)",
    min(end - least, *above) > 0,
)
seen = [np.isin(test[:, 1:], train[:, 1:]).mean() for train, test in splits.values()]
gap_of = {how: [np.diff(curves[how, seed])[-1, 0] for seed in SEEDS] for how in SPLITS}
best = {how: np.mean([curves[how, seed][:, 1].argmin() for seed in SEEDS]) for how in SPLITS}
lesson.check(
    "the test shows what is only learnt by heart",
    "a random tenth of the windows",
    f"{seen[0]:.1%} of its pairs are trained on; the test's loss ends above training's by "
    + ", ".join(
        f"{spread(gap_of[how])} ({how}; its own lowest at epoch {best[how]:.0f})" for how in SPLITS
    ),
    np.mean(gap_of["windows"]) > 0.5 * np.mean(gap_of["pieces"]),  # half of the gap of pieces
)
lesson.check(
    "JAX's curves are PyTorch's",
    "–",
    f"{COMPARED} steps: {in_float64:.1e} apart in float64, {in_float32:.1e} in float32, "
    f"{without_x64:.1e} with optax's scalars in float32 too",
    in_float64 < 1e-12 and in_float32 < 1e-5 and in_float32 < without_x64 < 2e-5,
)
lesson.end()
