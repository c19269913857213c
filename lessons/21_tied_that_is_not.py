# %% [markdown]
"""
# "Tied" that is not: how a port finds a bug in its original

**Question.** A port gives other numbers than its original. Which of the two is wrong?

**The course** (08 to 019) ties Model 5's head to its token embedding, as GPT-2 does, by making the
head a new `nn.Parameter` from `wte.weight`; it counts 163 M parameters, or 124 M with the table
counted once.

**Expect** the same loss at the first step and another at the second. The search for the first
number that differs ends at one leaf, and the cause is not in the port: the course's model has two
parameters on one piece of memory, which AdamW steps twice, and two tables once a GPU has them.
No course tells this story; it is how this project met it.

A minute on two busy CPU cores; no GPU needed: a change of dtype copies the weights as a move does.

How to read the names, such as `x_BxLxD`: `docs/lessons.md`. PyTorch's words in JAX:
`docs/from_pytorch.md`.
"""

# %%
import jax
import matplotlib.pyplot as plt
import numpy as np
import torch
from lesson import Lesson, furthest
from torch import nn

from jax_model5.batches import train_batch
from jax_model5.config import DataConfig
from jax_model5.corpus import load_corpus
from jax_model5.programs import Programs, steps
from jax_model5.startup import set_up_jax
from jax_model5.trees import from_layout, to_layout
from torch_ref.loss import loss, n_last
from torch_ref.model import Model5 as TorchModel5

lesson = Lesson("21", '"Tied" that is not: how a port finds a bug in its original')
N_STEPS = lesson.pick(40, 6)
size = {"vocab_size": 257, "seq_len": 16, "d_model": 24, "n_heads": 3, "n_layers": 3}
of_bytes = DataConfig(source=lesson.source, tokenizer="bytes")
size |= {"dtype": "float64", "data": of_bytes}
config = lesson.model5(N_STEPS, **size)
set_up_jax(config)
corpus = load_corpus(config)

# %% [markdown]
"""
## The original, and three ways to say "the head is the embedding"

`torch_ref` assigns the embedding's own parameter to the head: one parameter, used twice. The course
wraps its tensor in a new one. The two print the same, and `head.weight.data_ptr()` is the same.
"""


# %%
class TheCourses(TorchModel5):
    """The head is a parameter of its own, on the embedding's memory."""

    def __init__(self, config):
        super().__init__(config)
        self.head.weight = nn.Parameter(self.wte.weight)


def new_model(kind):
    """All three from the same random weights, in float64."""
    # What is made in float32 and then turned into float64 is moved, as if to a GPU.
    torch.set_default_dtype(torch.float32 if kind == "moved" else torch.float64)
    torch.manual_seed(0)
    model = (TorchModel5 if kind == "tied" else TheCourses)(config.model).double()
    if kind != "tied":
        model.load_state_dict(start)
    torch.set_default_dtype(torch.float32)
    return model


def train(model, n_steps=N_STEPS):
    """The loss of each step, by AdamW over whatever `parameters()` lists."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    losses = []
    for step in range(n_steps):
        windows_BxL1 = torch.from_numpy(train_batch(corpus, config, step))
        optimizer.zero_grad()
        nll = loss(model(windows_BxL1[:, :-1]), windows_BxL1[:, 1:], n_last(config))
        nll.backward()
        optimizer.step()
        losses.append(nll.item())
    return np.array(losses)


start = {name: weight.clone() for name, weight in new_model("tied").state_dict().items()}
models = {kind: new_model(kind) for kind in ("tied", "course", "moved")}
n_listed = {kind: sum(p.numel() for p in model.parameters()) for kind, model in models.items()}
is_shared = {
    kind: m.wte.weight.data_ptr() == m.head.weight.data_ptr() for kind, m in models.items()
}
torch_losses = {kind: train(model) for kind, model in models.items()}

# %% [markdown]
"""
## The port

One table of leaves carries the weights over; then the library trains, tied and untied.
"""


# %%
def train_in_jax(tied_head):
    run = lesson.model5(N_STEPS, **size, tied_head=tied_head)
    params = from_layout(lambda name: start[name].numpy(), run.model, "torch_ref")
    programs = Programs(run)
    start_state = programs.init().replace(params=jax.device_put(params))
    losses = []
    for step, state, metrics in steps(run, corpus, state=start_state, programs=programs):
        losses.append(float(metrics["loss"]))
        if step == 1:
            after_one = to_layout(jax.device_get(state.params), run.model, "torch_ref")
    return np.array(losses), after_one


jax_tied, jax_after_one = train_in_jax(tied_head=True)
jax_untied, _ = train_in_jax(tied_head=False)

# %% [markdown]
"""
## The first number that differs

The first loss is the same, so the forward pass is right. The second is not, so a gradient or the
update is wrong. After one update every leaf is compared: all agree to rounding but one.
"""

# %%
once = new_model("course")
train(once, 1)
apart = {
    name: furthest(weight, once.state_dict()[name].numpy())
    for name, weight in jax_after_one.items()
}
wrong = [name for name, distance in apart.items() if distance > 1e-9]

figure, (left, right) = plt.subplots(1, 2, figsize=(10, 5), layout="constrained")
for name, losses in (("the course's", torch_losses["course"]), ("moved", torch_losses["moved"])):
    left.semilogy(np.abs(losses - jax_tied) + 1e-17, label=f"{name} − our tied head")
left.semilogy(np.abs(torch_losses["moved"] - jax_untied) + 1e-17, label="moved − our untied head")
left.semilogy(np.abs(torch_losses["tied"] - jax_tied) + 1e-17, label="PyTorch tied − our tied head")
left.set(xlabel="step", ylabel="difference of the losses [nats]")
left.legend()
right.barh(list(apart), np.maximum(list(apart.values()), 1e-17))
right.set_xscale("log")
right.set_xlabel("largest difference after one update")
right.tick_params(axis="y", labelsize=6)
lesson.save(figure, "the_first_difference")

# %% [markdown]
"""
## The cause, proved

If the explanation is right, it gives the original's numbers: each half of the gradient (through the
embedding, through the head) has its own AdamW, and the two step one array, one after the other.
"""


# %%
def stepped_twice():
    """The table after one step of the course's model, from the explanation alone."""
    model = new_model("moved")  # two tables that start equal: a gradient for each use
    windows_BxL1 = torch.from_numpy(train_batch(corpus, config, 0))
    loss(model(windows_BxL1[:, :-1]), windows_BxL1[:, 1:], n_last(config)).backward()
    table = start["wte.weight"].clone()
    for half in (model.wte.weight.grad, model.head.weight.grad):
        weight = nn.Parameter(table)
        weight.grad = half
        torch.optim.AdamW([weight], lr=1e-3).step()
        table = weight.detach()
    return table.numpy()


explained = furthest(stepped_twice(), once.wte.weight.detach().numpy())

# %% [markdown]
"""
## What holds
"""

# %%
wte, head = models["moved"].wte.weight.detach(), models["moved"].head.weight.detach()
first, second = np.abs(torch_losses["course"] - jax_tied)[:2]
lesson.check(
    "the head is the embedding (on a CPU)",
    "tied",
    f"one memory: {is_shared['course']}; but AdamW lists {n_listed['course']:,} parameters, "
    f"and {n_listed['tied']:,} where it is tied",
    n_listed["course"] == n_listed["tied"],
)
lesson.check(
    "the head is the embedding (after `.to(...)`)",
    "tied",
    f"one memory: {is_shared['moved']}; after {N_STEPS} steps the tables are "
    f"{float((head - wte).norm() / wte.norm()):.2f} of their norm apart",
    is_shared["moved"],
)
lesson.check(
    "the port equals a truly tied model",
    "–",
    f"losses of {N_STEPS} steps within {furthest(torch_losses['tied'], jax_tied):.1e}",
    furthest(torch_losses["tied"], jax_tied) < 1e-12,
)
lesson.check(
    "it trains as a tied model does (on a CPU)",
    "yes",
    f"first loss {first:.0e} apart, second {second:.0e}; leaves that differ: {', '.join(wrong)}",
    furthest(torch_losses["course"], jax_tied) < 1e-12,
)
lesson.check(
    "the cause is two updates of one memory",
    "–",
    f"they give the course's table within {explained:.1e}",
    explained < 1e-12,
)
lesson.check(
    "it trains as a tied model does (on a GPU)",
    "yes",
    f"its losses are our untied model's within {furthest(torch_losses['moved'], jax_untied):.1e}",
    furthest(torch_losses["moved"], jax_tied) < 1e-12,
)
lesson.end()
