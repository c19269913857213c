# %% [markdown]
"""
# Weight inits: what the names mean in two frameworks, and how training widens the weights

**Question.** Which numbers do weights start with, and what becomes of their spread?

**The course** (012) fills a 50 x 50 linear layer by a normal of std 3, by Xavier normal and by
Kaiming uniform. In (013) it gives Model 5 its own rule: linear layers N(0, 0.02), embeddings Xavier
normal. The token table, which is also the head, ends at std 0.02, for the head's rule comes last;
the position table at 0.044. In training the QKV weights of every block widen, early blocks fastest.

**Expect** all of it, and a trap: JAX's `xavier_normal` and `kaiming_normal` are *truncated* at two
standard deviations, PyTorch's are not. The library draws its own from `variance_scaling(...,
"normal")`, which is not. The first widening is of every block alike, and AdamW's own: about a
learning rate a step, in whatever direction. Only then does the first block leave the others behind.

About 4 minutes on two CPU cores; not measured on a GPU.

How to read the names, such as `x_BxLxD`: `docs/lessons.md`. PyTorch's words in JAX:
`docs/from_pytorch.md`.
"""

# %%
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import torch
from jax.nn import initializers
from lesson import Lesson, furthest
from matplotlib.colors import LogNorm
from torch import nn

from jax_model5.config import ModelConfig
from jax_model5.corpus import load_corpus
from jax_model5.model import kernel_init, wpe_init, wte_init
from jax_model5.programs import steps
from jax_model5.trees import to_layout

lesson = Lesson("13", "Weight inits: what the names mean, and how training widens the weights")
SEEDS, BOTH = lesson.pick(range(3), range(1)), ("PyTorch", "JAX")

# %% [markdown]
"""
## One 50 x 50 layer

20 draws of each. std says how wide; the largest weight, in std, and the excess kurtosis (0 of a
normal distribution, −1.2 of a uniform one, −0.63 of a normal one cut at 2) say which shape. PyTorch
fills a tensor in place from one global generator; JAX makes an array from a key and a shape.
"""

# %%
in_jax = {
    "normal 3": initializers.normal(3.0),
    "Xavier normal": initializers.xavier_normal(),
    "Xavier normal, ours": kernel_init(ModelConfig(init="xavier")),
    "Kaiming uniform": initializers.kaiming_uniform(),
}
in_torch = {
    "normal 3": lambda weight: nn.init.normal_(weight, std=3.0),
    "Xavier normal": nn.init.xavier_normal_,
    "Kaiming uniform": nn.init.kaiming_uniform_,
}


def shape_of(w_RxIxO):
    """std, largest weight [std], excess kurtosis."""
    z = np.asarray(w_RxIxO, float) / (std := float(np.std(w_RxIxO)))
    return std, np.abs(z).max(), (z**4).mean() - 3


keys_R = jax.random.split(jax.random.key(0), 20)
torch.manual_seed(0)
drawn = {
    f"{name}, JAX": np.stack([init(key, (50, 50), jnp.float32) for key in keys_R])
    for name, init in in_jax.items()
} | {
    f"{name}, PyTorch": np.stack([init(torch.empty(50, 50)).numpy() for _ in keys_R])
    for name, init in in_torch.items()
}
shapes = {name: shape_of(w_RxIxO) for name, w_RxIxO in drawn.items()}

# %% [markdown]
"""
## The rule that comes last

One table is an embedding and the weight of a linear layer. In PyTorch `module.apply` visits it
twice, in the order in which the layers were made, and the second rule overwrites the first. JAX's
model has one leaf, and one rule to give it: the library says which.
"""


# %%
def fill(module):
    """The course's rules."""
    if isinstance(module, nn.Embedding):
        nn.init.xavier_normal_(module.weight)
    elif isinstance(module, nn.Linear):
        nn.init.normal_(module.weight, std=0.02)


def tied_std(*order):
    """Of one table that is embedding and head, filled in this order."""
    layers = {"wte": nn.Embedding(V, D), "head": nn.Linear(D, V, bias=False)}
    layers["head"].weight = layers["wte"].weight
    nn.ModuleDict({name: layers[name] for name in order}).apply(fill)
    return layers["wte"].weight.std().item()


V, L, D = lesson.pick(50257, 5000), 256, 768
tied = [tied_std("wte", "head"), tied_std("head", "wte")]
course = ModelConfig(d_model=D, seq_len=L)
std_wte = float(wte_init(course)(jax.random.key(0), (V, D), jnp.float32).std())
std_wpe = float(wpe_init(course)(jax.random.key(1), (L, D), jnp.float32).std())

# %% [markdown]
"""
## In training

Model 5 with the course's init, all tokens, AdamW at 0.001; the batch is 4 windows instead of 16,
for time. The course's text is Gulliver's Travels (Project Gutenberg 829); give it as --data.source.
Without it the text is Python's own documentation, in the same GPT-2 tokens.

The parameters of all blocks but the last lie in one leaf each, stacked on its first axis; the last
block has its own. The step reuses a state's memory, so what is kept of it is copied out.
"""


# %%
def qkv_of(params):
    """The QKV kernels of all blocks, [n_layers, D, 3D], on the host."""
    trunk, last = (params[name]["attn"]["qkv"]["kernel"] for name in ("trunk", "last_block"))
    return np.concatenate([np.asarray(trunk), np.asarray(last)[None]])


def widening(seed):
    """Of each block the std of its QKV weights, and of two blocks their histogram, by step."""
    config = lesson.model5(STEPS, seed=seed, n_layers=N_LAYERS, batch_size=4)
    stds_SxN, histograms, params = [], [], None
    for step, state, _ in steps(config, load_corpus(config)):
        params = state.params
        if step % EVERY == 0 or step == 1:
            qkv_NxDx3D = qkv_of(params)
            stds_SxN.append(qkv_NxDx3D.std((1, 2)))
            histograms.append([np.histogram(qkv_NxDx3D[n], 100, (-0.1, 0.1))[0] for n in SHOWN])
    named = to_layout(params, config.model, "torch_ref")
    weights = [torch.tensor(named[f"blocks.{n}.attn.qkv.weight"]) for n in range(N_LAYERS)]
    apart = furthest(stds_SxN[-1], np.array([weight.std(correction=0) for weight in weights]))
    return np.array(stds_SxN), np.array(histograms), apart


STEPS, EVERY, N_LAYERS = lesson.pick((250, 5, 6), (15, 5, 2))
SHOWN, BINS = (0, N_LAYERS // 2), np.linspace(-0.099, 0.099, 100)  # the first and a middle block
recorded = [1, *range(EVERY, STEPS + 1, EVERY)]
runs = [widening(seed) for seed in SEEDS]
rises_RxSxN = np.array([100 * (stds_SxN / stds_SxN[0] - 1) for stds_SxN, _, _ in runs], float)

# %%
figure, axes = plt.subplots(1, 3, figsize=(10, 3.4), layout="constrained")
for ax, name in zip(axes, in_torch, strict=True):
    bins = np.linspace(-4, 4, 81) * shapes[f"{name}, PyTorch"][0]
    for framework in BOTH:
        weights = drawn[f"{name}, {framework}"].ravel()
        ax.hist(weights, bins, histtype="step", density=True, label=framework)
    ax.set(xlabel=f"weights, {name}", ylabel="density")
axes[0].legend(loc="upper right")
lesson.save(figure, "inits")

# %%
figure, (*heats, curves) = plt.subplots(1, 3, figsize=(11, 4), layout="constrained")
for i, heat in enumerate(heats):
    histograms_Sx100 = np.maximum(runs[0][1][:, i], 1)  # of the first seed; log 0 has no color
    mesh = heat.pcolormesh(BINS, recorded, histograms_Sx100, norm=LogNorm())
    heat.set(xlabel=f"QKV weights of block {SHOWN[i]}", ylabel="step", xticks=(-0.1, 0, 0.1))
figure.colorbar(mesh, ax=heats, label="weights in a bin of 0.002")
curves.set_prop_cycle(color=plt.get_cmap("viridis")(np.arange(N_LAYERS) / N_LAYERS))
for stds_SxN, _, _ in runs:
    lines = curves.plot(recorded, stds_SxN)
curves.set(xlabel="step", ylabel="std of QKV weights, every seed")
names = [f"block {n}" for n in range(N_LAYERS)]
figure.legend(lines, names, loc="outside upper right", ncols=N_LAYERS)
lesson.save(figure, "widening")

# %% [markdown]
"""
## What holds

The order is of the first two blocks only. The others stop near 5 %, the later of them a little
ahead: in 250 steps the loss has moved them hardly further than AdamW's first steps did.
"""

# %%
rise_RxN, early_RxN = rises_RxSxN[:, -1], rises_RxSxN[:, recorded.index(10)]
firsts = [(rise_SxN > 5).any(1).argmax() for rise_SxN in rises_RxSxN]
first_blocks = [int(rises_RxSxN[run, s].argmax()) for run, s in enumerate(firsts)]
xavier = [(n, top, k) for n, (_, top, k) in shapes.items() if n.startswith("Xavier")]
stds = {"normal 3": 3, "Xavier normal": 0.02**0.5, "Kaiming uniform": 0.2}  # 50 in, 50 out
lesson.check(
    "50 x 50: std 3, Xavier sqrt(2 / 100), Kaiming sqrt(2 / 50)",
    "3, 0.141, 0.2",
    "; ".join(f"{name} {std:.3f}" for name, (std, _, _) in shapes.items()),
    all(abs(shapes[f"{n}, {f}"][0] / s - 1) < 0.03 for n, s in stds.items() for f in BOTH),
)
lesson.check(
    "JAX's Xavier normal is PyTorch's",
    "–",
    "; ".join(f"{n}: to {top:.1f} std, excess kurtosis {k:.2f}" for n, top, k in xavier),
    abs(shapes["Xavier normal, JAX"][2] - shapes["Xavier normal, PyTorch"][2]) < 0.1,
)
lesson.check(
    "std(wte) is 0.02, for the head's rule comes last; std(wpe) is sqrt(2 / (256 + 768))",
    "≈ 0.02 and ≈ 0.044",
    f"{std_wte:.4f} and {std_wpe:.4f}; wte in PyTorch {tied[0]:.4f}, and {tied[1]:.4f} with the "
    "head made first",
    furthest([std_wte, std_wpe, *tied], [0.02, 0.0442, 0.02, (2 / (V + D)) ** 0.5]) < 3e-4,
)
lesson.check(
    "The std of every block's QKV weights rises",
    "they widen",
    f"by {rise_RxN.mean(0).round(1).tolist()} % in blocks 0, 1, ... after {STEPS} steps; the "
    f"least {rise_RxN.min():.1f} %",
    rise_RxN.min() > 0,
)
lesson.check(
    "The first block rises first, and most",
    "early layers fastest",
    f"first to widen by 5 %, by seed: block {first_blocks}, at step "
    f"{[recorded[s] for s in firsts]}; most at the end: block {rise_RxN.argmax(1).tolist()}",
    not np.any(first_blocks) and not rise_RxN.argmax(1).any(),
    in_fast=False,
)
lesson.check(
    "The first ten steps widen every block alike",
    "–",
    f"by {early_RxN.min():.1f} to {early_RxN.max():.1f} %",
    early_RxN.max() < 2 * early_RxN.min(),
)
lesson.check(
    "PyTorch reads the same std from the same weights",
    "–",
    f"furthest apart {max(apart for *_, apart in runs):.0e}",
    max(apart for *_, apart in runs) < 1e-7,
)
lesson.end()
