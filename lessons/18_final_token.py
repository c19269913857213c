# %% [markdown]
"""
# Dropout, and the loss on the final token alone

**Question.** What does a model learn when only the last position of each sequence has a loss?

**The course** (017, 018) gives Model 5 dropout at four sites and the loss −log P(x_T | x_<T) of the
final token. It sees a higher loss, larger swings and slower learning, and names 256 times less
signal as the cause; its table says that the compute cost is low.

**Expect** all of that in the small, with one correction: at equal steps the loss is higher and
swings more, but a step costs a fraction. At what text, budget and size which of the two wins is
measured in docs/experiments/final_token.md; this lesson shows the pieces.

Eight minutes on two CPU cores, nearly all of them the all-token runs; a GPU was not tried.

How to read the names, such as `x_BxLxD`: `docs/lessons.md`. PyTorch's words in JAX:
`docs/from_pytorch.md`.
"""

# %%
import dataclasses

import jax
import matplotlib.pyplot as plt
import numpy as np
import torch
from lesson import Lesson, furthest, spread

from jax_model5.batches import test_batches, train_batch
from jax_model5.config import DROPOUT_SITES
from jax_model5.corpus import load_corpus
from jax_model5.flops import step_flops
from jax_model5.losses import position_losses
from jax_model5.programs import Programs, steps
from jax_model5.step import init_state
from jax_model5.trees import to_layout
from torch_ref.loss import loss
from torch_ref.model import Model5 as TorchModel5

lesson = Lesson("18", "Dropout, and the loss on the final token alone")
N_STEPS, SEEDS = lesson.pick(100, 20), lesson.pick(range(3), range(1))

# %% [markdown]
"""
## The loss

PyTorch computes the logits of every position and keeps the last. The library is told before that
one position has a loss (`n_last=1`), so that the last block and the head compute that one only: the
same number for less work. In float64, dropout off.
"""

# %%
tiny = lesson.model5(1, vocab_size=257, seq_len=16, d_model=24, n_heads=3, dtype="float64")
windows_BxL1 = np.random.default_rng(0).integers(0, 257, (4, 17), np.int32)
with jax.enable_x64():
    params = init_state(jax.random.key(0), config=tiny).params
    loss_Bx1 = position_losses(params, windows_BxL1, tiny, n_last=1, deterministic=True)
    ours = float(loss_Bx1.mean())

twin = TorchModel5(tiny.model).double().eval()
weights = to_layout(params, tiny.model, "torch_ref")
weights = {name: torch.from_numpy(np.array(weight)) for name, weight in weights.items()}
twin.load_state_dict({**weights, "head.weight": weights["wte.weight"]})
tokens_BxL1 = torch.from_numpy(windows_BxL1)
with torch.no_grad():
    theirs = loss(twin(tokens_BxL1[:, :-1]), tokens_BxL1[:, 1:], n_last=1).item()

# %% [markdown]
"""
## Two objectives, the same batches

Each is tested on both: the loss of the final token, and of all tokens.
"""


# %%
def train(objective, seed):
    """(test losses at the end, training losses) of one run with dropout at the four sites."""
    config = lesson.model5(N_STEPS, seed=seed, objective=objective, dropout=0.1)
    fast = dataclasses.replace(config.optimizer, learning_rate=3e-3)
    config = dataclasses.replace(config, optimizer=fast, eval_batches=8)
    corpus, programs, losses = load_corpus(config), Programs(config), []
    for _, state, metrics in steps(config, corpus, programs=programs):  # noqa: B007
        losses.append(metrics["loss"])
    tests = [programs.to_devices(batch) for batch in test_batches(corpus, config)]
    return programs.test(state.params, tests), np.array(losses), config, state.params


runs = {o: [train(o, seed) for seed in SEEDS] for o in ("all_tokens", "final_token")}
nll = {o: [run[0]["final_token_nll"] for run in some] for o, some in runs.items()}
swing = {o: [float(np.std(np.diff(run[1]))) for run in some] for o, some in runs.items()}
cost = {o: sum(step_flops(some[0][2]).values()) for o, some in runs.items()}

figure, ax = plt.subplots(figsize=(8, 4), layout="constrained")
for objective, some in runs.items():
    ax.plot(some[0][1], label=f"{objective.replace('_', ' ')}, training loss", linewidth=0.9)
ax.set(xlabel="step", ylabel="loss [nats]")
ax.legend()
lesson.save(figure, "two_objectives")

# %% [markdown]
"""
## Training mode and evaluation mode

The same weights and batch: dropout at each of the four sites, and none (`deterministic=True`).
"""


# %%
def losses_of(sites):
    """The all-token loss of one training batch with each key; no sites: evaluation mode."""
    _, _, config, params = runs["all_tokens"][0]
    model = dataclasses.replace(config.model, dropout_sites=sites or DROPOUT_SITES)
    config = dataclasses.replace(config, model=model)
    batch_BxL1 = train_batch(load_corpus(config), config, 0)

    def loss(key):
        how = {"n_last": config.model.seq_len, "deterministic": not sites, "dropout_key": key}
        return position_losses(params, batch_BxL1, config, **how).mean()

    return np.asarray(jax.jit(lambda keys: jax.lax.map(loss, keys))(keys))


keys = jax.random.split(jax.random.key(1), 8)
off, everywhere = losses_of(()), losses_of(DROPOUT_SITES)
on = {site: losses_of((site,)).mean() - off[0] for site in lesson.pick(DROPOUT_SITES, ())}

# %% [markdown]
"""
## What holds
"""

# %%
lesson.check(
    "the loss is −log P of the final token",
    "so",
    f"PyTorch's slice of all logits and ours of one position: {furthest(ours, theirs):.1e} apart",
    furthest(ours, theirs) < 1e-12,
)
lesson.check(
    "the loss is higher",
    "higher",
    f"test NLL of the final token after {N_STEPS} steps {spread(nll['final_token'])}, "
    f"of all-token training {spread(nll['all_tokens'])}",
    min(nll["final_token"]) > max(nll["all_tokens"]),
    in_fast=False,
)
lesson.check(
    "it swings more",
    "larger swings",
    f"std of the change from step to step {spread(swing['final_token'], 3)} against "
    f"{spread(swing['all_tokens'], 3)} nats",
    min(swing["final_token"]) > max(swing["all_tokens"]),
)
lesson.check(
    "its compute cost is low",
    "low",
    f"{cost['all_tokens'] / cost['final_token']:.1f} times fewer FLOPs a step",
    cost["final_token"] < cost["all_tokens"] / 2,
)
lesson.check(
    "evaluation mode draws nothing",
    "–",
    f"{len(set(off))} value of {len(off)} keys; in training mode {len(set(everywhere))}",
    len(set(off)) == 1 and len(set(everywhere)) == len(everywhere),
)
lesson.check(
    "dropout at the four sites raises the training loss",
    "–",
    f"by {np.mean(everywhere) - off[0]:.3f} nats; alone "
    + ", ".join(f"{site.replace('_', ' ')} {value:.3f}" for site, value in on.items()),
    np.mean(everywhere) > off[0],
    in_fast=False,
)
lesson.end()
