# %% [markdown]
"""
# Dropout: who switches it off, and what it does to a loss

**Question.** What does dropout change, and what turns it off when a model is evaluated?

**The course** (014) drops ones at p = 0.2: those that stay become 1.25, and the mean is kept. The
class `nn.Dropout` follows `eval()`; the function `F.dropout` drops on, unless told
`training=False`. Lesson 018 adds that `scaled_dot_product_attention` does not switch its dropout
off by itself either.

**Expect** the same here. JAX has no mode to forget: every call says `deterministic=...`, and one
that drops must bring a key. And expect what the course does not say: dropout keeps the mean of what
it is given, but not the loss. With it the same weights are worse, and a batch's loss depends on the
key.

Half a minute on two CPU cores; no GPU needed, and none measured.

How to read the names, such as `x_BxLxD`: `docs/lessons.md`. PyTorch's words in JAX:
`docs/from_pytorch.md`.
"""

# %%
import dataclasses

import flax.errors
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.nn.functional as F
from lesson import Lesson, furthest

from jax_model5.batches import test_batches
from jax_model5.config import DROPOUT_SITES, DataConfig, OptimizerConfig
from jax_model5.corpus import load_corpus
from jax_model5.losses import nll, position_losses
from jax_model5.model import Dropout, Model5
from jax_model5.programs import steps
from jax_model5.trees import to_layout
from torch_ref.model import Model5 as Model5InTorch

lesson = Lesson("14", "Dropout: who switches it off, and what it does to a loss")
P, N = 0.2, 1_000_000  # the rate, and how many ones

# %% [markdown]
"""
## Ones

The mean of N of them after dropout is 1, give or take its standard error sqrt(p / (1 − p) / N).
PyTorch draws from a generator that each call moves on; `manual_seed` sets it back. In JAX the
randomness is an argument: the same key gives the same mask, whenever it is called. Of the key that
a whole model is given Flax makes another one for each of its layers. `fold_in` makes a new key of a
key and a number, `split` makes many. `apply` takes the weights first: a dropout layer has none,
`{}`.
"""


# %%
def dropped(x, key):
    """`jax_model5`'s dropout layer, in training."""
    return Dropout(P).apply({}, x, deterministic=False, rngs={"dropout": key})


ones_N, key = np.ones(N, np.float32), jax.random.key(0)
ours_N = np.asarray(dropped(ones_N, key))
torch.manual_seed(0)
theirs_N = F.dropout(torch.tensor(ones_N), P).numpy()
torch.manual_seed(0)
again_N = F.dropout(torch.tensor(ones_N), P).numpy()
values = np.unique([ours_N, theirs_N]).tolist()
off_by = [(y_N.mean(dtype=float) - 1) / np.sqrt(P / (1 - P) / N) for y_N in (ours_N, theirs_N)]
is_repeated = {
    "same key": np.array_equal(ours_N, dropped(ones_N, key)),
    "other key": np.array_equal(ours_N, dropped(ones_N, jax.random.fold_in(key, 1))),
    "same seed": np.array_equal(theirs_N, again_N),
}
print(f"values {values}; repeated: {is_repeated}")

# %% [markdown]
"""
## One mask, two frameworks

The generators differ, and so do the masks. PyTorch's mask (of R rows and C columns) in JAX gives
PyTorch's numbers.
"""

# %%
x_RxC = np.random.default_rng(0).standard_normal((100, 100))
y_RxC = F.dropout(torch.tensor(x_RxC), P).numpy()
with jax.enable_x64(True):
    replayed_RxC = jnp.where(y_RxC != 0, x_RxC / (1 - P), 0)
mask_apart = furthest(replayed_RxC, y_RxC)

# %% [markdown]
"""
## Who follows `eval()`

Only what asks `self.training`. The class does. A function cannot: its module must pass the mode on.
"""


# %%
class OfFunctions(torch.nn.Module):
    """Dropout by the class, and by two functions, one told of the mode and one not."""

    def __init__(self):
        super().__init__()
        self.drop = torch.nn.Dropout(P)

    def forward(self, x):
        attend, rate = F.scaled_dot_product_attention, P if self.training else 0.0
        return {
            "nn.Dropout": self.drop(x),
            "F.dropout": F.dropout(x, P),
            "F.dropout, training=self.training": F.dropout(x, P, self.training),
            "attention": attend(x, x, x, dropout_p=P),
            "attention, rate by mode": attend(x, x, x, dropout_p=rate),
        }


x_BxLxK = torch.randn(4, 16, 8)
module = OfFunctions().eval()
first, second = module(x_BxLxK), module(x_BxLxK)
drops_in_eval = {name: not torch.equal(first[name], second[name]) for name in first}

# %% [markdown]
"""
## Model 5's four sites

A small Model 5 is trained on bytes, with dropout 0.1 at its four kinds of site. Then its weights
stand still: one test batch, 64 keys, and dropout at one kind of site, or at all four. In the figure
the boxes hold the middle half of the keys, the whiskers all of them.

`steps` yields (step, state, metrics). A step reuses the memory of the state before it, so only the
last one is left at the end. `lax.map` is a loop over the keys inside one compiled function.
"""

# %%
config = lesson.model5(
    lesson.pick(1000, 20),
    data=DataConfig(source=lesson.source, separator="none", tokenizer="bytes"),
    optimizer=OptimizerConfig(learning_rate=3e-3),
    **{"vocab_size": 257, "seq_len": 32, "d_model": 64, "dropout": 0.1},
    n_layers=lesson.pick(2, 1),
)
corpus = load_corpus(config)
for _, state, _ in steps(config, corpus):
    params = state.params
windows_BxL1 = test_batches(corpus, config)[0]
keys = jax.random.split(jax.random.key(1), lesson.pick(64, 16))


def losses_by_key(sites):
    """The loss of the batch with each key, dropout at these sites."""
    model = dataclasses.replace(config.model, dropout_sites=sites)
    of_sites, L = dataclasses.replace(config, model=model), config.model.seq_len

    def loss(key):
        in_training = {"n_last": L, "deterministic": False, "dropout_key": key}
        return position_losses(params, windows_BxL1, of_sites, **in_training).mean()

    return np.asarray(jax.jit(lambda keys: jax.lax.map(loss, keys))(keys))


groups = {site: (site,) for site in DROPOUT_SITES} | {"all four": DROPOUT_SITES}
losses = {name: losses_by_key(sites) for name, sites in groups.items()}

# %% [markdown]
"""
`model.eval()` is `deterministic=True`: the same weights in the PyTorch reference give the same
logits. (Its head is tied to the embedding and has no weight of its own, hence `strict=False`.) And
a forward pass that is to drop, but has no key, ends in an error.
"""

# %%
tokens_BxL = windows_BxL1[:, :-1]
model, how = Model5(config.model), {"n_last": config.model.seq_len}  # logits of all positions
evaluate = jax.jit(lambda p, tokens_BxL: model.apply(p, tokens_BxL, **how, deterministic=True))
ours_BxLxV = evaluate({"params": params}, tokens_BxL)
loss_off = float(nll(ours_BxLxV, windows_BxL1[:, 1:]).mean())
twin = Model5InTorch(config.model).eval()
named = to_layout(params, config.model, "torch_ref")
twin.load_state_dict({name: torch.tensor(a) for name, a in named.items()}, strict=False)
model_apart = furthest(ours_BxLxV, twin(torch.tensor(tokens_BxL)).detach())
try:
    model.apply({"params": params}, tokens_BxL, **how, deterministic=False)
    without_key = "a result"
except flax.errors.InvalidRngError as error:
    without_key = type(error).__name__

# %%
figure, ax = plt.subplots(figsize=(8, 4), layout="constrained")
ax.boxplot(list(losses.values()), tick_labels=list(losses), whis=(0, 100))
ax.axhline(loss_off, color="C0", label="dropout off")
ax.set(ylabel="loss of one batch [nats]", xlabel=f"where dropout 0.1 is on; {len(keys)} keys each")
ax.legend()
lesson.save(figure, "sites")

# %% [markdown]
"""
## What holds

The course's rows hold. The last ones add: a training loss with dropout and a test loss without it
are different measurements, so their difference alone says nothing of overfitting. Which site costs
most is not the same in every run.
"""

# %%
lesson.check(
    "p = 0.2 on ones: 0 or 1.25", "1 → 1.25", f"in both the values {values}", values == [0.0, 1.25]
)
lesson.check(
    "The mean is kept",
    "kept",
    f"of {N:,} ones 1 + {off_by[0]:.1f} standard errors in JAX, 1 + {off_by[1]:.1f} in PyTorch",
    max(map(abs, off_by)) < 4,
)
lesson.check(
    "The class follows eval(), the function does not, unless told",
    "so",
    "in eval() these drop: " + ", ".join(name for name, drops in drops_in_eval.items() if drops),
    [drops_in_eval[name] for name in list(drops_in_eval)[:3]] == [False, True, False],
)
lesson.check(
    "scaled_dot_product_attention does not switch its dropout off",
    "so (018)",
    f"drops in eval(): {drops_in_eval['attention']}; with its rate set to 0 by the module: "
    f"{drops_in_eval['attention, rate by mode']}",
    drops_in_eval["attention"] and not drops_in_eval["attention, rate by mode"],
)
lesson.check(
    "JAX: same key, same mask; no key, an error",
    "–",
    f"repeated: {', '.join(name for name, same in is_repeated.items() if same)}; not: "
    f"{', '.join(name for name, same in is_repeated.items() if not same)}; no key: {without_key}",
    list(is_repeated.values()) == [True, False, True] and without_key != "a result",
)
lesson.check(
    "PyTorch's mask in JAX gives PyTorch's numbers; eval() is deterministic=True",
    "–",
    f"furthest apart {mask_apart:.0e} in float64; logits of Model 5 {model_apart:.0e} in float32",
    mask_apart < 1e-12 and model_apart < 1e-4,
)
lesson.check(
    "The loss depends on the key, at each of the four sites",
    "–",
    "std over keys " + ", ".join(f"{losses[name].std(ddof=1):.1e} {name}" for name in groups),
    all(losses[name].std() > 0 for name in groups),
)
above = {name: (loss - loss_off).mean() for name, loss in losses.items()}
error = {name: loss.std(ddof=1) / np.sqrt(len(keys)) for name, loss in losses.items()}
lesson.check(
    "Dropout on, the same weights are worse",
    "–",
    f"{loss_off:.3f} nats with dropout off; with it higher by "
    + ", ".join(f"{above[name]:.4f} ± {error[name]:.4f} ({name})" for name in groups),
    above["all four"] > 3 * error["all four"],
    in_fast=False,
)
lesson.end()
