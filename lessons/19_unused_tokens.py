# %% [markdown]
"""
# Tokens that never occur: every position pushes them down

**Question.** What does training do to the tokens that its text does not contain?

**The course** (019) follows, while Model 5 learns *Gulliver's Travels*, the mean log-softmax of the
100 most common tokens, the 100 least common and 100 never used, over inputs that are not in the
group. All start near −10.8; after training the common stay, the rare fall, the never-used fall far.

**Expect** the three to part in this order. The gradient of the loss with respect to a logit is p
at every position, less 1 where the token is the target. Over the text its mean is the mean p less
the token's frequency: it pushes up a token whose frequency is above 1 / V, and one of a lower
frequency down to it. A token that is never a target is pushed down at every position, for as long
as training lasts. The common, then, should not stay but rise.

Five minutes of processor time, which two CPU cores share; on a GPU not measured. Offline the text
is what Python ships, and the figures are others; the course's is Project Gutenberg's book 829,
given by `--data.source`. The course has no test part; here a tenth of the text is, and the counts
are those of the rest.

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

from jax_model5 import tokenizer
from jax_model5.batches import test_batches, train_batch
from jax_model5.corpus import describe, load_corpus
from jax_model5.losses import nll
from jax_model5.model import Model5
from jax_model5.programs import Programs, steps

lesson = Lesson("19", "Tokens that never occur: every position pushes them down")
STEPS, EVERY = lesson.pick((300, 5), (10, 5))
size = lesson.pick({"seq_len": 32}, {"n_layers": 1, "batch_size": 4})
config = lesson.model5(STEPS, eval_batches=1, **size)
corpus, encoding, V = load_corpus(config), tokenizer.load("gpt2"), config.model.vocab_size
print(describe(corpus))

# %% [markdown]
"""
## The groups

Many tokens occur once; which of them are "the 100 least common" is left to chance.

The course takes token numbers that do not occur, and looks them up in the list of those that do,
which holds no others. "Looked up" is what the first 100 such numbers give.
"""

# %%
counts_V = np.bincount(corpus.tokens_T[: corpus.n_train], minlength=V)
shuffled = np.random.default_rng(0).permutation(V)
by_count_V = shuffled[np.argsort(counts_V[shuffled], kind="stable")]
used, unused = np.flatnonzero(counts_V), np.flatnonzero(counts_V == 0)
groups = {
    "common": by_count_V[-100:],
    "rare": by_count_V[len(unused) :][:100],
    "never used": by_count_V[:100],
    "looked up": used[unused[:100]],
}
for name, group in groups.items():
    sample = encoding.decode_batch(group[:8, None].tolist())
    print(f"{name}: {counts_V[group].min()} to {counts_V[group].max()} times, such as {sample}")

# %% [markdown]
"""
## Training, and the curves

Every few steps, not at each as in the course, a compiled function looks at the same 8 windows of
the test part: the logits of V tokens are most of what this model computes.
"""

# %%
tokens_BxL = test_batches(corpus, config)[0, :8, :-1]


@jax.jit
def logits_of(params, tokens_BxL):
    L = tokens_BxL.shape[1]
    return Model5(config.model).apply({"params": params}, tokens_BxL, n_last=L, deterministic=True)


@jax.jit
def follow(params):
    """Of each group the mean log-probability and logit, over inputs that are not in it."""
    logits_BxLxV = logits_of(params, tokens_BxL)
    both_2xBxLxV = jnp.stack([jax.nn.log_softmax(logits_BxLxV), logits_BxLxV])
    means = {"all": both_2xBxLxV.mean((1, 2, 3))}
    for name, group in groups.items():
        is_other_BxL = ~jnp.isin(tokens_BxL, group)
        of_group_2xBxL = both_2xBxLxV[..., group].mean(-1)
        means[name] = (of_group_2xBxL * is_other_BxL).sum((1, 2)) / is_other_BxL.sum()
    return means


programs = Programs(config)
start = programs.init().params  # `steps` begins with the same, from another call of `init`
curves = {0: follow(start)}
for step, state, _ in steps(config, corpus, programs=programs):
    if step % EVERY == 0:
        curves[step] = follow(state.params)
trained = state.params
of_group = {name: np.array([means[name] for means in curves.values()]) for name in curves[0]}

# %%
figure, (left, right) = plt.subplots(1, 2, figsize=(9, 4), layout="constrained")
styles = {"common": "C0-", "rare": "C1-", "never used": "C3-", "looked up": "C7--"}
for name, style in styles.items():
    left.plot(list(curves), of_group[name][:, 0], style, label=name)
    right.plot(list(curves), of_group[name][:, 1], style)
right.plot(list(curves), of_group["all"][:, 1], "k:", label="all of V")
left.axhline(-np.log(V), color="0.7", linewidth=0.8)
left.set(xlabel="step", ylabel="mean log-probability [nats]")
right.set(xlabel="step", ylabel="mean logit")
figure.legend(loc="outside upper center", ncols=5)
lesson.save(figure, "groups")

# %% [markdown]
"""
## Why

The gradient of the loss with respect to every logit, on a batch that no step took. It is
positive where it pushes the logit down. PyTorch leaves the gradient in `leaf.grad` once `backward`
has run; `jax.grad` returns it.
"""


# %%
def pushes(logits_BxLxV, targets_BxL):
    return jax.grad(lambda z_BxLxV: nll(z_BxLxV, targets_BxL).sum())(logits_BxLxV)


def pushes_in_torch(logits_BxLxV, targets_BxL):
    leaf_BxLxV = torch.tensor(logits_BxLxV, requires_grad=True)
    targets_BL = torch.tensor(targets_BxL).long().flatten()
    F.cross_entropy(leaf_BxLxV.flatten(0, 1), targets_BL, reduction="sum").backward()
    return leaf_BxLxV.grad.numpy()


windows_BxL1 = train_batch(corpus, config, STEPS)
inputs_BxL, targets_BxL = windows_BxL1[:, :-1], windows_BxL1[:, 1:]
logits = {"before": logits_of(start, inputs_BxL), "after": logits_of(trained, inputs_BxL)}
push = {when: np.asarray(pushes(z_BxLxV, targets_BxL)) for when, z_BxLxV in logits.items()}
with jax.enable_x64(True):
    few = np.asarray(logits["after"][:2], np.float64), targets_BxL[:2]
    apart = furthest(pushes(*few), pushes_in_torch(*few))

# %% [markdown]
"""
One batch holds few of the rare tokens. Over the whole text the mean gradient of a token's logit is
its mean p, which a batch tells well, less its frequency, which is counted: the token is pushed down
where mean p is the higher.

And how far do the rows of the embedding go? The never-used tokens are no inputs, so that they move
by this gradient alone. It is small, but AdamW divides a gradient by its own size: a push that keeps
its sign makes nearly the full step each time, and it is the same push for all of them.
"""

# %%
kinds = ("common", "rare", "never used")
pushed_down = {}
for when, z_BxLxV in logits.items():
    mean_p_V = np.asarray(jax.nn.softmax(z_BxLxV).mean((0, 1)))
    is_down_V = mean_p_V > counts_V / corpus.n_train
    pushed_down[when] = [int(is_down_V[groups[name]].sum()) for name in kinds]

moved_VxD = np.asarray(trained["wte"]) - np.asarray(start["wte"])
size_V = np.abs(push["before"].sum((0, 1)))
way = {name: np.linalg.norm(moved_VxD[groups[name]], axis=1).mean() for name in kinds}
shared = np.linalg.norm(moved_VxD[groups["never used"]].mean(0)) / way["never used"]
times_smaller = size_V[groups["common"]].mean() / size_V[groups["never used"]].mean()

# %% [markdown]
"""
## What holds

The order does. But the common tokens cannot stay where all start: the loss asks for their
frequency, and 1 / V is far below it. The rare ones fall until their p is their frequency,
ln(1 / 142,335) = −11.9 in *Gulliver's Travels*, and are pushed both ways from there on. The
never-used ones meet no such end. While most of V falls together it hardly shows in the
log-probabilities, which know only differences of logits: the logits tell it from the first step on.
"""

# %%
begin = [of_group[name][0, 0] for name in kinds]
common, rare, never = (of_group[name][-1, 0] for name in kinds)
lesson.check(
    "all start near −10.8",
    "≈ −10.8",
    ", ".join(f"{value:.2f}" for value in begin),
    max(abs(value + np.log(V)) for value in begin) < 0.1,
)
lesson.check(
    "they part: common, rare, never used",
    "in this order",
    f"{common:.2f}, {rare:.2f}, {never:.2f} after {STEPS} steps",
    common > rare > never,
    in_fast=False,
)
changes = {
    "the common stay": ("stay", "common", abs(common - begin[0]) < 1),
    "the rare fall": ("fall", "rare", rare < begin[1]),
    "the never-used fall far": ("fall far", "never used", never < begin[2] - 1),
}
for claim, (course, name, holds) in changes.items():
    log_p, logit = of_group[name][-1] - of_group[name][0]
    ours = f"{log_p:+.2f}, their logits {logit:+.2f}"
    lesson.check(claim, course, ours, holds, in_fast=False)
counts_G = counts_V[groups["looked up"]]
lesson.check(
    "the course's third group is never used",
    "never used",
    f"{(counts_G == 0).sum()} of 100 are; half of them occur {np.median(counts_G):.0f} times "
    f"or more; {of_group['looked up'][-1, 0]:.2f} at the end",
    (counts_G == 0).all(),
)
is_down = {name: min((p[..., groups[name]] > 0).mean() for p in push.values()) for name in kinds}
lesson.check(
    "every position pushes a never-used token down",
    "–",
    f"at {100 * is_down['never used']:.1f} % the gradient is positive, before and after; of the "
    f"common at {100 * is_down['common']:.1f} %",
    is_down["never used"] == 1 > is_down["common"],
)
lesson.check(
    "the whole text pushes only these for ever",
    "–",
    "pushed down, of 100 common, rare, never used: "
    f"{pushed_down['before']} before, {pushed_down['after']} after",
    pushed_down["after"][2] == 100 > max(pushed_down["after"][:2]),
    in_fast=False,
)
lesson.check(
    "AdamW carries them as far as the common",
    "–",
    f"gradient {times_smaller:.0f} times smaller, way {way['never used']:.2f}, of the common "
    f"{way['common']:.2f}; {100 * shared:.1f} % of it is one direction for all",
    way["never used"] > way["common"],
    in_fast=False,
)
lesson.check("JAX's gradient is PyTorch's", "–", f"{apart:.1e} apart", apart < 1e-12)
lesson.end()
