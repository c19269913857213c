# %% [markdown]
"""
# Optimizers on one parameter: SGD, Adam, AdamW, and a gradient that is never zeroed

**Question.** What does each optimizer make of the same gradient, and of weight decay?

**The course** (03, 04) moves w from 0 to π by SGD, and from 2 to 5 by SGD, Adam and AdamW, first
all at learning rate 0.05, then SGD at 0.04 and Adam at 0.1. Then it leaves out `zero_grad`: SGD
oscillates.

**Expect** SGD to arrive first: its step is in proportion to the distance, while Adam's is about the
learning rate whatever the gradient is, so that 50 steps of 0.05 do not cover a distance of 3.
Weight decay parts Adam from AdamW: as a term of the gradient (L2) it moves the minimum for good,
and it passes through the adaptive denominators, so that it is strong where gradients are small and
weak where they are large. A gradient that is never zeroed is momentum without friction.

Ten seconds on two CPU cores; no GPU needed.

How to read the names, such as `x_BxLxD`: `docs/lessons.md`. PyTorch's words in JAX:
`docs/from_pytorch.md`.
"""

# %%
import math

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
import torch
from lesson import Lesson, furthest

from jax_model5.config import OptimizerConfig
from jax_model5.optimizer import optimizer

lesson = Lesson("04", "Optimizers on one parameter, and a gradient that is never zeroed")

# %% [markdown]
"""
## The same descent in both

In PyTorch the gradient is a field of the parameter, and `backward` *adds* to it; `zero_grad` makes
it the gradient of this step alone. In JAX a gradient is the value of a function and remembers
nothing: a program that forgets to zero it cannot be written by accident. Where `zeroed` is false
the sum is kept by hand, as one more part of the state.

All of it in float64, where two correct programs agree to the last digits.
"""


# %%
def descend(update, loss, start, steps, zeroed=True):
    """w before each step and after the last, in JAX; `update` is optax's, the loss (w, step)."""

    def step(state, index):
        w, moments, total = state
        gradient = jax.grad(loss)(w, index)
        total = gradient if zeroed else total + gradient
        updates, moments = update.update(total, moments, w)
        return (optax.apply_updates(w, updates), moments, total), w

    with jax.enable_x64():
        w = jnp.array(start, float)
        state = w, update.init(w), jnp.zeros_like(w)
        return np.asarray(jax.lax.scan(step, state, jnp.arange(steps + 1))[1])


def descend_in_torch(make_update, loss, start, steps, zeroed=True):
    """The same in PyTorch."""
    w = torch.nn.Parameter(torch.tensor(start, dtype=torch.float64))
    update = make_update([w])
    curve = []
    for index in range(steps + 1):
        curve.append(w.detach().numpy().copy())  # a copy: the step writes over this memory
        if zeroed:
            update.zero_grad()
        loss(w, index).backward()
        update.step()
    return np.array(curve)


def both(updates, loss, start, steps, zeroed=True):
    """The curve of JAX; how far PyTorch's is from it at most is added to `gaps`."""
    ours, theirs = updates
    curve = descend(ours, loss, start, steps, zeroed)
    gaps.append(furthest(curve, descend_in_torch(theirs, loss, start, steps, zeroed)))
    return curve


def updates_of(name, rate, decay=0.0):
    """An optimizer of optax, and how PyTorch makes it."""
    b1 = 0.0 if name == "sgd" else 0.9
    config = OptimizerConfig(name, learning_rate=rate, weight_decay=decay, b1=b1)
    in_torch = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam, "adamw": torch.optim.AdamW}
    return optimizer(config, 1), lambda weights: in_torch[name](weights, rate, weight_decay=decay)


gaps = []

# %% [markdown]
"""
## Three optimizers, one parameter

PyTorch's defaults: no decay in SGD and Adam, 0.01 in AdamW.
"""

# %%
to_pi = both(updates_of("sgd", 0.01), lambda w, step: (w - math.pi) ** 2, 0.0, 150)


def to_5(w, step):
    return (w - 5) ** 2


SETTINGS = [("sgd", 0.05), ("adam", 0.05), ("adamw", 0.05), ("sgd", 0.04), ("adam", 0.1)]
curves = {
    (name, rate): both(updates_of(name, rate, 0.01 if name == "adamw" else 0.0), to_5, 2.0, 50)
    for name, rate in SETTINGS
}

figure, ax = plt.subplots(figsize=(8, 4), layout="constrained")
for (name, rate), curve in curves.items():
    ax.plot(curve, "-" if rate == 0.05 else "--", label=f"{name}, learning rate {rate}")
ax.axhline(5, color="0.7", linewidth=0.8)
ax.set(xlabel="steps", ylabel="w")
ax.legend()
lesson.save(figure, "one_parameter")

# %% [markdown]
"""
## Where decoupled decay and L2 part

`torch.optim.Adam(weight_decay=0.01)` adds 0.01 w to the gradient: it descends on another loss,
(w − 5)² + 0.005 w², whose minimum is 5 / 1.005 = 4.9751, and there it stays. AdamW takes
rate × 0.01 × w off the weight outside the adaptive step. Where that balances, the gradient is 0.05
of its own root mean square, and that mean forgets: AdamW goes on towards 5.

The second half takes the descent away. The gradient is s, −s, s, −s, ...: nothing but noise, of
size s, so that decay alone moves w, here from 1 at rate 0.01 with decay 0.1. In AdamW each step
multiplies w by 0.999, for any s. In Adam the decay is divided by s, as all of the gradient is.
"""

# %%
LONG = lesson.pick(4000, 1000)
minima = {name: both(updates_of(name, 0.05, 0.01), to_5, 2.0, LONG) for name in ("adam", "adamw")}

SIZES = (0.1, 1.0, 10.0)


def noise(w_S, step):
    """Its gradient is s or −s, at every other step, of one weight for each size s."""
    return sum(s * w_S[i] for i, s in enumerate(SIZES)) * (1 - 2 * (step % 2))


drifts = {
    name: both(updates_of(name, 0.01, 0.1), noise, [1.0] * len(SIZES), 1000)
    for name in ("adam", "adamw")
}

figure, (left, right) = plt.subplots(1, 2, figsize=(8, 4), layout="constrained")
for name, curve in minima.items():
    left.plot(curve, label=name)
left.axhline(5 / 1.005, color="k", linestyle=":", linewidth=0.8, label="5 / 1.005")
left.set(xlabel="steps", ylabel="w", ylim=(4.94, 5.01), title="(w − 5)², decay 0.01")
left.legend()
for size, curve in zip(SIZES, drifts["adam"].T, strict=True):
    right.plot(curve, label=f"adam, s = {size:g}")
right.plot(drifts["adamw"][:, 1], "k--", label="adamw, any s")
right.set(xlabel="steps", ylabel="w", ylim=(-0.05, 1.6), title="gradients ± s, decay 0.1")
right.legend(loc="upper right")
lesson.save(figure, "decay")

# %% [markdown]
"""
## Never zeroed

The sum of all gradients so far is momentum of decay 1: a ball on a spring without friction. With
x = w − 5 the update is x[t+1] − 2 x[t] + x[t−1] = −2 · rate · x[t]; its solutions keep their size
for ever and turn by arccos(1 − rate) a step: at 0.05 one round in 19.8 steps. Zeroed, momentum 0.9
is the same spring with friction. Adam scales the sum, and does not settle either.
"""

# %%
unzeroed = {
    name: both(updates_of(name, 0.05), to_5, 2.0, LONG, zeroed=False) for name in ("sgd", "adam")
}
heavy = optax.sgd(0.05, momentum=1.0), lambda w: torch.optim.SGD(w, 0.05, momentum=1.0)
momentum_1 = both(heavy, to_5, 2.0, LONG)

figure, ax = plt.subplots(figsize=(8, 4), layout="constrained")
for name, curve in unzeroed.items():
    ax.plot(curve[:200], label=f"{name}, never zeroed")
ax.plot(curves["sgd", 0.05], "k--", label="sgd, zeroed")
ax.axhline(5, color="0.7", linewidth=0.8)
ax.set(xlabel="steps", ylabel="w", ylim=(1.5, 9.5))
ax.legend(loc="upper center", ncols=3)
lesson.save(figure, "never_zeroed")

# %% [markdown]
"""
## What holds
"""


# %%
def period(curve):
    """Steps from one upward crossing of 5 to the next, in the mean."""
    return np.diff(np.flatnonzero((curve[:-1] < 5) & (curve[1:] >= 5))).mean()


lesson.check(
    "SGD comes to π",
    "from 0, rate 0.01, 150 steps",
    f"{to_pi[-1]:.4f} = π (1 − 0.98^150): {math.pi - to_pi[-1]:.3f} are missing",
    abs(to_pi[-1] - math.pi) < 0.05 * math.pi,
)
ends = {setting: float(curve[-1]) for setting, curve in curves.items()}
lesson.check(
    "SGD, Adam and AdamW on (w − 5)²",
    "compared, 50 steps",
    ", ".join(f"{name} at {rate} {end:.3f}" for (name, rate), end in ends.items())
    + ": at one rate only SGD arrives; Adam at 0.1 has passed 5",
    abs(ends["sgd", 0.05] - 5) < 0.02
    and max(ends["adam", 0.05], ends["adamw", 0.05]) < 4.2
    and ends["sgd", 0.04] < 5 < ends["adam", 0.1],
)
lesson.check(
    "L2 moves the minimum for good",
    "–",
    f"after {LONG:,} steps Adam + L2 {minima['adam'][-1]:.4f}, AdamW {minima['adamw'][-1]:.4f}",
    abs(minima["adam"][-1] - 5 / 1.005) < 1e-4 and minima["adamw"][-1] > 5 / 1.005 + 0.003,
)
l2, decoupled = drifts["adam"][-1], drifts["adamw"][-1]
lesson.check(
    "L2 passes through the denominators",
    "–",
    f"s = 0.1, 1, 10: of 1 Adam leaves {' '.join(f'{w:.2f}' for w in l2)}, "
    f"AdamW {' '.join(f'{w:.2f}' for w in decoupled)}",
    l2[0] < 0.1 < 0.8 < l2[2] and np.ptp(decoupled) < 1e-6,
)
in_theory, turns = 2 * math.pi / math.acos(1 - 0.05), period(unzeroed["sgd"])
swings = {name: [abs(w[:200] - 5).max(), abs(w[-200:] - 5).max()] for name, w in unzeroed.items()}
lesson.check(
    "never zeroed, SGD oscillates",
    "oscillates",
    "up to {:.2f} from 5 in the first 200 steps, {:.2f} in the last; ".format(*swings["sgd"])
    + f"a round takes {turns:.1f} steps (in theory {in_theory:.1f}); "
    + "Adam: {:.2f} and {:.2f}".format(*swings["adam"]),
    np.ptp(swings["sgd"]) < 0.05 and abs(turns - in_theory) < 0.1 and swings["adam"][1] > 1,
)
gap = furthest(momentum_1, unzeroed["sgd"])
lesson.check("that is momentum 1", "–", f"{LONG:,} steps: furthest apart {gap:.1e}", gap < 1e-12)
lesson.check(
    "JAX's curves are PyTorch's",
    "–",
    f"{len(gaps)} in float64, up to {LONG:,} steps: furthest apart {max(gaps):.1e}",
    max(gaps) < 1e-12,
)
lesson.end()
