# %% [markdown]
"""
# What pretraining costs: FLOPs, hours, energy and money, from Model 5 to GPT-4

**Question.** Which models take months, thousands of GPUs and millions of dollars to pretrain?

**The course** (01) says it of pretraining in general, with estimates for the scale of GPT-4. Its
own Model 5 trains for 1,234 steps of 64 × 256 tokens.

**Expect** it to hold of Llama 3.1 405B and of GPT-4, not of GPT-2 small (20 dollars) or Model 5
(some cents). GPT-3 misses one of the three: its 10,000 GPUs took two weeks. Counted matrix products
come within a few percent of what was published for the large models. At GPT-2 small's size they do
not: what was published is 6 FLOPs for each parameter and token, without attention, a fifth here.

Six seconds on two CPU cores at either size, for nothing is trained; no GPU needed.

How to read the names, such as `x_BxLxD`: `docs/lessons.md`. PyTorch's words in JAX:
`docs/from_pytorch.md`.
"""

# %%
from typing import NamedTuple

import matplotlib.pyplot as plt
import numpy as np
import torch
from lesson import Lesson
from torch.utils.flop_counter import FlopCounterMode

import torch_ref.loss
import torch_ref.model
from jax_model5.config import ModelConfig, TrainConfig
from jax_model5.flops import PEAK_BFLOAT16, step_flops

lesson = Lesson("01", "What pretraining costs: FLOPs, hours, energy and money")
A100, H100, V100 = "NVIDIA A100-SXM4-80GB", "NVIDIA H100 80GB HBM3", "V100"
# Of the data sheets: FLOP/s (the V100 SXM2's in float16), and W.
PEAK, WATTS = PEAK_BFLOAT16 | {V100: 125e12}, {A100: 400, H100: 700, V100: 300}
# An hour of a GPU [$]: what llm.c's author paid in 2024. The V100's is our guess, a low one.
PRICE = {A100: 14 / 8, H100: 28 / 8, V100: 1.0}

# %% [markdown]
"""
## What was trained, on what, for how long

- Model 5: 28.9 ms a step (final token), 42.8 ms (all tokens), one H100: this project's
  `docs/benchmarks`.
- GPT-2: OpenAI published neither hours nor FLOPs. llm.c's reproductions of the small one (124M) and
  of the large one (1558M) have theirs, and their prices, at the top of its `run_gpt2_*.sh`.
- GPT-3, 300e9 tokens: FLOPs of Brown et al. 2020, table D.1; 10,000 V100 for 14.8 days and
  1,287 MWh of Patterson et al. 2021. Half of its attention is sparse; it counts as full here.
- Llama 3.1 405B, 15.6e12 tokens: 3.8e25 FLOPs, 16,384 GPUs at most, MFU 38 to 43 % of Dubey et al.
  2024; 30.84 million GPU-hours of its model card. Its blocks are not GPT-2's (SwiGLU, grouped
  keys), but hold as many weights within 1 %: 12 D².
"""


# %%
class Run(NamedTuple):
    name: str
    config: TrainConfig
    tokens: float
    chip: str = H100
    n_chips: int = 1
    hours: float = 0.0

    @property
    def flops(self):
        tokens_of_a_step = self.config.batch_size * self.config.model.seq_len
        return sum(step_flops(self.config).values()) * self.tokens / tokens_of_a_step

    @property
    def gpu_hours(self):
        return self.n_chips * self.hours

    @property
    def mfu(self):
        return self.flops / (self.gpu_hours * 3600 * PEAK[self.chip])

    @property
    def megawatt_hours(self):
        return self.gpu_hours * WATTS[self.chip] / 1e6

    @property
    def dollars(self):
        return self.gpu_hours * PRICE[self.chip]


def gpt(layers, width, length, vocabulary=50257, objective="all_tokens"):
    heads = width // 64  # no matter for the FLOPs
    model = ModelConfig(vocabulary, length, width, heads, layers)
    return TrainConfig(objective=objective, batch_size=64, model=model)


course = 1234 * 64 * 256
final = gpt(12, 768, 256, objective="final_token")
model5 = Run("Model 5", final, course, hours=0.0289 * 1234 / 3600)
every = Run("Model 5, all tokens", gpt(12, 768, 256), course, hours=0.0428 * 1234 / 3600)
gpt2 = Run("GPT-2 124M", gpt(12, 768, 1024), 18_865 * 2**19, A100, 8, 94.3 / 60)
gpt2_large = Run("GPT-2 1558M", gpt(48, 1600, 1024), 32_000 * 2**20, H100, 8, 24)
gpt3 = Run("GPT-3 175B", gpt(96, 12288, 2048), 300e9, V100, 10_000, 14.8 * 24)
hours = 30.84e6 / 16_384
llama = Run("Llama 3.1 405B", gpt(126, 16384, 8192, 128256), 15.6e12, H100, 16_384, hours)
gpt3_small = Run("GPT-3 Small", gpt(12, 768, 2048), 300e9)
runs = [model5, every, gpt2, gpt2_large, gpt3, llama]
for run in runs:
    print(
        f"{run.name:19} {run.flops:.1e} FLOPs, {run.gpu_hours:.3g} GPU-hours, MFU {run.mfu:.0%}, "
        f"{run.hours / 24:.3g} days, {run.megawatt_hours:.2g} MWh, ${run.dollars:,.3g}"
    )

# %% [markdown]
"""
## The same count in PyTorch

`FlopCounterMode` sees every operator that runs. On the device `meta` a tensor has a shape and no
numbers, so that the full size costs nothing; JAX has `jax.eval_shape` for that. Attention's are the
products of batches (`bmm`), and there the twin computes all pairs: ours skips a quarter of them.
"""

# %%
with torch.device("meta"):
    twin = torch_ref.model.Model5(every.config.model)
    windows_BxL1 = torch.zeros(64, 257, dtype=torch.long)
with FlopCounterMode(display=False) as counter:
    logits_BxLxV = twin(windows_BxL1[:, :-1])
    torch_ref.loss.loss(logits_BxLxV, windows_BxL1[:, 1:], n_last=256).backward()
in_torch = {str(operator): n for operator, n in counter.get_flop_counts()["Global"].items()}
pairs_in_torch, weights_in_torch = in_torch.pop("aten.bmm"), sum(in_torch.values())
here = step_flops(every.config)
pairs, weights = here.pop("attention"), sum(here.values())

# %%
figure, (left, right) = plt.subplots(1, 2, figsize=(8, 4), layout="constrained")
flops = np.geomspace(1e15, 1e27)
left.plot(flops, flops / (PEAK[H100] * 3600), "0.6", label="one H100 at its peak")
PARTS = {"blocks": ("full blocks", "suffix block"), "attention": ("attention",), "head": ("head",)}
start = np.zeros(len(runs))
for name, parts in PARTS.items():
    counts = [step_flops(run.config) for run in runs]
    shares = np.array([sum(c[part] for part in parts) / sum(c.values()) for c in counts])
    right.barh([run.name for run in runs], shares, left=start, label=name)
    start += shares
for run in runs:
    left.plot(run.flops, run.gpu_hours, "o", label=run.name)
left.set(xscale="log", yscale="log", xlabel="FLOPs of the run", ylabel="GPU-hours of the run")
left.legend(fontsize=8)
right.invert_yaxis()
right.set(xlabel="share of the FLOPs")
right.legend(ncols=3, fontsize=8, loc="lower center", bbox_to_anchor=(0.5, 1))
lesson.save(figure, "costs")

# %% [markdown]
"""
## What holds

GPT-4 has no published figures; Epoch AI estimates 2.1e25 FLOPs. In three months, each GPU as fast
as Llama's were, that takes this many of them. Months, thousands and millions mean two or more. The
energy is the GPUs' rated power alone, without hosts and cooling.
"""

# %%
DAYS = 90
gpt4_gpus = 2.1e25 / (llama.mfu * PEAK[H100] * DAYS * 86400)
gpt4 = Run("a GPT-4, estimated", every.config, 0, H100, round(gpt4_gpus), DAYS * 24)
for run in (model5, gpt2, gpt3, llama, gpt4):
    lesson.check(
        f"{run.name}: months, thousands, millions",
        "all three",
        f"{run.hours / 24:.2g} days on {run.n_chips:,} GPUs, ${run.dollars:,.3g}",
        run.hours >= 60 * 24 and run.n_chips >= 2000 and run.dollars >= 2e6,
    )
PUBLISHED = {"GPT-3 175B": 3.14e23, "Llama 3.1 405B": 3.8e25, "GPT-3 Small": 2.25e20}
for run in (gpt3, llama, gpt3_small):
    more = run.flops / PUBLISHED[run.name] - 1
    lesson.check(
        f"{run.name}: the FLOPs that were published, within 10 %",
        f"{PUBLISHED[run.name]:.3g} (its paper)",
        f"{run.flops:.3g}, {more:+.1%}",
        abs(more) < 0.1,
    )
lesson.check(
    "those hours make an MFU within 5 points of theirs",
    "GPT-2 to 60 %, Llama 38 to 43 %",
    f"GPT-2 {gpt2.mfu:.0%}, Llama {llama.mfu:.0%} over all of its hours",
    abs(gpt2.mfu - 0.60) < 0.05 and abs(llama.mfu - 0.38) < 0.05,
)
lesson.check(
    "GPT-3: GPU-hours × watts are its energy within 20 %",
    "1,287 MWh (Patterson)",
    f"{gpt3.megawatt_hours:,.0f} MWh; Model 5: {model5.megawatt_hours * 1e6:.1f} Wh",
    abs(gpt3.megawatt_hours / 1287 - 1) < 0.2,
)
lesson.check(
    "the final token costs little, all tokens much",
    "low, high (lesson 018)",
    f"all tokens: {every.flops / model5.flops:.2f} times the FLOPs and "
    f"{every.hours / model5.hours:.2f} times the time, for 256 times the targets",
    every.hours > 2 * model5.hours,
)
lesson.check(
    "PyTorch counts the same products",
    "–",
    f"with weights {weights:.4g} and {weights_in_torch:.4g}; of the pairs "
    f"{pairs / pairs_in_torch:.0%}, as it should be",
    weights == weights_in_torch and pairs == 0.75 * pairs_in_torch,
)
lesson.end()
