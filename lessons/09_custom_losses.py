# %% [markdown]
"""
# Losses of your own: L1 swings around its target, L2 settles on it

**Question.** What does the form of a loss do to the end of training?

**The course** (09) moves one parameter w from 2 towards 3 by SGD at learning rate 0.05, 50 steps,
once on |w − 3| and once on (w − 3)². It sees L1 oscillate around the target and L2 settle.

**Expect** the same here, and the reason: the gradient of |w − 3| is 1 or −1 however near w is, so
a step of 0.05 jumps over the target for ever. But in exact arithmetic 20 steps of 0.05 from 2 end
at 3; rounding leaves w just short of it, so that the next one goes past. With a step of 1/16, which
a float holds exactly, w lands on the kink, and the two frameworks part: the derivative of |x| at 0
is 0 in PyTorch and 1 in JAX.

Five seconds on two CPU cores; no GPU needed.

PyTorch's words in JAX: `docs/from_pytorch.md`.
"""

# %%
from itertools import pairwise

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
import torch
from lesson import Lesson, furthest

lesson = Lesson("09", "Losses of your own: L1 swings around its target, L2 settles on it")
START, TARGET, STEPS = 2.0, 3.0, 50

# %% [markdown]
"""
## The same descent twice

PyTorch keeps the parameter and its gradient in one object, and `zero_grad` must come before each
`backward`. JAX has a function of w, `jax.grad` makes another one of it, and the state (w, the
optimizer's own) goes in and comes out. The loop is a `scan`: `step` takes (state, input), returns
(next state, what to record), and `scan` returns (last state, all records). There is no input here,
hence `_` and `length`. What is compiled is one step, not 50, and needs no `jit` around it.
"""


# %%
def descend(loss, learning_rate, steps=STEPS):
    """w before each step, in JAX."""
    optimizer = optax.sgd(learning_rate)

    def step(state, _):
        w, memory = state  # the optimizer's: plain SGD has none
        updates, memory = optimizer.update(jax.grad(loss)(w), memory)
        return (optax.apply_updates(w, updates), memory), w

    w = jnp.float32(START)
    return jax.lax.scan(step, (w, optimizer.init(w)), length=steps)[1]


def descend_in_torch(loss, learning_rate, steps=STEPS):
    """w before each step, in PyTorch."""
    w = torch.nn.Parameter(torch.tensor(START))
    optimizer = torch.optim.SGD([w], lr=learning_rate)
    curve = []
    for _ in range(steps):
        curve.append(w.item())
        optimizer.zero_grad()
        loss(w).backward()
        optimizer.step()
    return np.array(curve)


LOSSES = {"L1": lambda w: abs(w - TARGET), "L2": lambda w: (w - TARGET) ** 2}
curves = {name: descend(loss, 0.05) for name, loss in LOSSES.items()}
twins = {name: descend_in_torch(loss, 0.05) for name, loss in LOSSES.items()}
on_the_kink = descend(LOSSES["L1"], 1 / 16)
kink_in_torch = descend_in_torch(LOSSES["L1"], 1 / 16)

# %%
figure, ax = plt.subplots(figsize=(8, 4), layout="constrained")
for name, curve in curves.items():
    ax.plot(curve, label=f"{name}, learning rate 0.05")
    ax.plot(twins[name], "k:", linewidth=1, label="PyTorch" if name == "L2" else None)
ax.plot(on_the_kink, label="L1, learning rate 1/16")
ax.plot(kink_in_torch, label="the same in PyTorch")
ax.axhline(TARGET, color="0.7", linewidth=0.8)
ax.set(xlabel="step", ylabel="w")
ax.legend()
lesson.save(figure, "descent")

# %% [markdown]
"""
## What holds
"""


# %%
def crossings(curve):
    """How often w changes sides of its target in the last 20 steps."""
    sides = np.sign(np.asarray(curve[-20:]) - TARGET)
    return sum(a != b for a, b in pairwise(sides))


def distance(curve):
    """How far from its target w is at the end, at most, over the last two steps."""
    return float(np.abs(np.asarray(curve[-2:]) - TARGET).max())


L1, L2 = curves["L1"], curves["L2"]
lesson.check(
    "L1 oscillates around the target",
    "oscillates",
    f"{crossings(L1)} changes of side in 20 steps, up to {distance(L1):.3f} away",
    crossings(L1) == 19,
)
lesson.check(
    "L2 settles",
    "settles",
    f"{crossings(L2)} changes of side; {distance(L2):.4f} away after {STEPS} steps",
    crossings(L2) == 0 and distance(L2) < 0.01,
)
lesson.check(
    "L1 never settles",
    "oscillates",
    f"a step of 1/16 lands on the target: in PyTorch w stays, {distance(kink_in_torch):.3f} away; "
    f"in JAX it steps back, {distance(on_the_kink):.3f} away, and returns, for ever",
    distance(kink_in_torch) > 0 and distance(on_the_kink) > 0,
)
lesson.check(
    "JAX's curves are PyTorch's",
    "–",
    f"furthest apart {furthest(curves, twins):.1e} at rate 0.05, where w never lands on 3",
    furthest(curves, twins) < 1e-6,
)
lesson.end()
