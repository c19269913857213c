# %% [markdown]
"""
# Embeddings learnt before: trained on, or frozen

**Question.** What are embeddings worth that other text has taught, and what does freezing them do?

**The course** (07) gives Model 1 width 768, copies GPT-2's token embeddings in, and trains it for
10 epochs twice: once with the embeddings, once with them frozen. Frozen ends higher.

**Expect** the same of the training loss: a frozen table leaves fewer weights to fit the text with.
The test loss, and a table of random numbers beside it, tell how much comes of what the table knows.
And its size counts: AdamW moves the head at its own rate, so that a table of small numbers moves
the logits little.

Three minutes on two CPU cores; on a GPU not measured. GPT-2's weights are not here. Where there is
a network, `python -m jax_model5.huggingface import gpt2 --out runs/gpt2` fetches them; the rows
`vocabulary` of their `wte` then take the place of `learnt_VxD`, at width 768. Here it is 128, and
the table comes of counts in the later part of the text, which Model 1 never sees.

How to read the names, such as `x_BxLxD`: `docs/lessons.md`. PyTorch's words in JAX:
`docs/from_pytorch.md`.
"""

# %%
import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
import scipy.sparse
import torch
from lesson import Lesson, furthest, spread
from scipy.sparse.linalg import svds

from jax_model5.config import OptimizerConfig
from jax_model5.corpus import load_corpus
from jax_model5.losses import nll
from jax_model5.optimizer import optimizer, split_frozen
from jax_model5.trees import merge
from torch_ref.step import make_optimizer, make_scheduler
from torch_ref.step import train_step as torch_train_step

lesson = Lesson("07", "Embeddings learnt before: trained on, or frozen")
torch.set_num_threads(1)  # two that wait for each other take minutes where the cores are busy
WIDTH, EPOCHS, BATCH = lesson.pick(128, 32), lesson.pick(10, 6), 64
FREE = OptimizerConfig(learning_rate=1e-3)
FROZEN = dataclasses.replace(FREE, freeze=("embed/embedding",))

tokens_T = np.array(load_corpus(lesson.model5(steps=1)).tokens_T)
n_tokens = min(lesson.pick(12_000, 2_000), len(tokens_T) // 2)
vocabulary, text_T = np.unique(tokens_T[:n_tokens], return_inverse=True)
V = len(vocabulary)
places_WxL1 = np.arange(0, len(text_T) - 8, 2)[:, None] + np.arange(9)  # 8 tokens and the next
is_test_WxL1 = places_WxL1 // 100 % 10 == 9  # every tenth piece of 100 tokens
TRAIN = text_T[places_WxL1[~is_test_WxL1.any(1)]]
TEST = text_T[places_WxL1[is_test_WxL1.all(1)]]

# %% [markdown]
"""
## A table from counts

For each token, how much more often than by chance each other stands at most two places from it
(PPMI, positive pointwise mutual information), and of that matrix the directions that say most, by a
singular value decomposition: embeddings as they were made before they were trained. All rows get
the same length, that of N(0, 1), PyTorch's own start. A token that the later text lacks stays
random.
"""


# %%
def learn_table(text_T, random_VxD):
    """embed_VxD of the tokens of `vocabulary`, from another text."""
    ones, shape = np.ones(len(text_T)), (50257, 50257)
    pairs = [(ones[apart:], (text_T[:-apart], text_T[apart:])) for apart in (1, 2)]
    after = sum(scipy.sparse.coo_array(of_apart, shape).tocsr() for of_apart in pairs)
    counts = after + after.T
    total = counts.sum(1)
    table = counts[vocabulary].tocoo()
    by_chance = total[vocabulary[table.row]] * total[table.col] / total.sum()
    table.data = np.maximum(np.log(table.data / by_chance), 0)
    u_VxD, s_D, _ = svds(table, WIDTH, v0=np.ones(V))
    embed_VxD = np.where(total[vocabulary, None] > 0, u_VxD * np.sqrt(s_D), random_VxD)
    return embed_VxD * np.sqrt(WIDTH) / np.linalg.norm(embed_VxD, axis=1, keepdims=True)


random_VxD = np.random.default_rng(0).normal(0, 1, (V, WIDTH))
learnt_VxD = learn_table(tokens_T[n_tokens:], random_VxD)

# %% [markdown]
"""
## Freezing, twice

In PyTorch a frozen weight has `requires_grad = False`: it gets no gradient, and AdamW skips it. In
JAX the weights are split in two trees; the gradient and the optimizer are given one, and a merge
gives the model both. (PyTorch's step is the reference's; lesson 06 writes it out.)
"""


# %%
class Model1(nn.Module):
    @nn.compact
    def __call__(self, tokens_BxL):
        x_BxLxD = nn.gelu(nn.Embed(V, WIDTH, name="embed")(tokens_BxL), approximate=False)
        return nn.Dense(V, use_bias=False, name="head")(x_BxLxD)


def twins(embed_VxD, seed, dtype=torch.float32):
    """The parameters of Model 1, and the same in PyTorch."""
    torch.manual_seed(seed)
    head = torch.nn.Linear(WIDTH, V, bias=False)
    embed = torch.nn.Embedding.from_pretrained(torch.tensor(embed_VxD), freeze=False)
    twin = torch.nn.Sequential(embed, torch.nn.GELU(), head).to(dtype)
    params = {"embed": {"embedding": embed.weight}, "head": {"kernel": head.weight.T}}
    return jax.tree.map(lambda weight: jnp.array(weight.numpy(force=True)), params), twin


@jax.jit
def mean_nll(params, windows_BxL1):
    logits_BxLxV = Model1().apply({"params": params}, windows_BxL1[:, :-1])
    return nll(logits_BxLxV, windows_BxL1[:, 1:]).mean()


@jax.jit(static_argnames="config", donate_argnames=("params", "moments"))
def train_step(config, params, moments, windows_BxL1):
    moving, frozen = split_frozen(params, config)
    of_moving = lambda moving: mean_nll(merge(moving, frozen), windows_BxL1)  # noqa: E731
    loss, gradients = jax.value_and_grad(of_moving)(moving)
    updates, moments = optimizer(config, 1).update(gradients, moments, moving)
    return merge(optax.apply_updates(moving, updates), frozen), moments, loss


def batches(seed, epoch):
    order_W = np.random.default_rng([seed, epoch]).permutation(len(TRAIN))
    return TRAIN[order_W[: len(order_W) // BATCH * BATCH].reshape(-1, BATCH)]


def epoch_of_both(config):
    """How far the loss curves of an epoch are apart at most, and how far the tables have moved."""
    with jax.enable_x64():
        params, twin = twins(learnt_VxD, 0, torch.float64)
        moments, curves = optimizer(config, 1).init(split_frozen(params, config)[0]), []
        twin[0].weight.requires_grad_(config == FREE)
        update = make_optimizer(twin, config)
        scheduler, run = make_scheduler(update, config, 1), lesson.model5(1, seq_len=8)
        for windows_BxL1 in batches(0, 0):
            params, moments, loss = train_step(config, params, moments, windows_BxL1)
            windows_BxL1 = torch.from_numpy(windows_BxL1)
            theirs = torch_train_step(twin, update, scheduler, windows_BxL1, run)
            curves.append((float(loss), theirs["loss"]))
        tables = params["embed"]["embedding"], twin[0].weight.numpy(force=True)
    return furthest(*zip(*curves, strict=True)), furthest(tables, (learnt_VxD, learnt_VxD))


# %% [markdown]
"""
## Four ways, and a small table

The fifth has the size of GPT-2's, whose numbers have a standard deviation of about 0.14. A step of
AdamW moves each weight of the head by the learning rate, so it moves a logit by that times the sum
of |x|: size 0.14 at width 768 is as much as 0.8 at width 128, and the course is nearer to the other
four. The seeds change the head and the order of the windows.
"""


# %%
def learn(embed_VxD, config, seed):
    """The loss on a tenth of the training windows, and on all of the test, after each epoch."""
    params, _ = twins(embed_VxD, seed)
    moments, curve = optimizer(config, 1).init(split_frozen(params, config)[0]), []
    for epoch in range(EPOCHS):
        for windows_BxL1 in batches(seed, epoch):
            params, moments, _ = train_step(config, params, moments, windows_BxL1)
        curve.append([float(mean_nll(params, part)) for part in (TRAIN[::10], TEST)])
    return np.array(curve)


WAYS = {
    "learnt, trained on": (learnt_VxD, FREE),
    "learnt, frozen": (learnt_VxD, FROZEN),
    "random, trained on": (random_VxD, FREE),
    "random, frozen": (random_VxD, FROZEN),
    "learnt × 0.14, frozen": (0.14 * learnt_VxD, FROZEN),
}
SEEDS = lesson.pick(range(3), range(1))
curves = {way: np.array([learn(*how, seed) for seed in SEEDS]) for way, how in WAYS.items()}

figure, axes = plt.subplots(1, 2, figsize=(8, 4), layout="constrained", sharey=True)
for part, ax in enumerate(axes):
    for way, curve in curves.items():
        ax.plot(range(1, EPOCHS + 1), curve[0, :, part], label=way)
    ax.set(xlabel="epoch", ylabel="loss [nats]", title=("training", "test")[part])
axes[1].legend()
lesson.save(figure, "four_ways")

# %% [markdown]
"""
## What holds

A trap on the way: `jax.lax.stop_gradient` makes the gradient of the table zero, but AdamW still
takes the decay off it at every step, 0.01 times the learning rate.
"""

# %%
(free, free_test), (frozen, frozen_test), (_, chance_test), (_, frozen_chance_test), (small, _) = (
    curve[:, -1].T for curve in curves.values()
)
lesson.check(
    "frozen ends higher",
    "higher",
    f"training {spread(frozen, 3)} against {spread(free, 3)}; "
    f"test {spread(frozen_test, 3)} against {spread(free_test, 3)}",
    min(frozen - free) > 0,
)
lesson.check(
    "what was learnt before helps",
    "–",
    f"random rows: test {spread(frozen_chance_test, 3)} frozen, {spread(chance_test, 3)} trained",
    max(frozen_test) < min(frozen_chance_test) and max(free_test) < min(chance_test),
    in_fast=False,
)
lesson.check("its size counts", "–", f"× 0.14: training {spread(small)}", min(small - frozen) > 0)
(gap, moved), (frozen_gap, frozen_moved) = epoch_of_both(FREE), epoch_of_both(FROZEN)
lesson.check(
    "JAX's curves are PyTorch's",
    "–",
    f"float64, an epoch: {gap:.1e} apart, frozen {frozen_gap:.1e}; the frozen tables moved by "
    f"{frozen_moved:.0e}",
    max(gap, frozen_gap) < 1e-12 and frozen_moved == 0 < moved,
)
table_VxD, update = jnp.array(learnt_VxD), optimizer(FREE, 1)
step_VxD, _ = update.update(0 * table_VxD, update.init(table_VxD), table_VxD)
taken = float(jnp.linalg.norm(step_VxD) / jnp.linalg.norm(table_VxD))
lesson.check(
    "stop_gradient alone does not freeze",
    "–",
    f"at gradient 0 a step takes {taken:.1e} of the table",
    taken > 0,
)
lesson.end()
