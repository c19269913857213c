# %% [markdown]
"""
# What makes a step fast: batch sizes, precision, accumulation, remat, devices

**Question.** Is a batch of 64 faster than one of 62, and what do the other means of speed bring?

**The course** (020) says that powers of two are faster (64 beats 62, 128 beats 120), and lists low
precision, gradient accumulation, several devices and weight sharing, among others.

**Expect** no gain from a power of two that stands out of the noise. What a matrix product sees is
not the batch but batch × length rows, and a length of 64 or 256 makes any batch a multiple of every
tile. Accumulation and remat cut memory several times. On a CPU accumulation is also faster, perhaps
because 16 sequences stay in its caches; bfloat16 is slower where no unit computes it.

A time on a shared machine means little alone. So all programs run in turn, in rounds, in an order
drawn anew in each, and one of them is there twice: how far it is from itself is the noise.

Three minutes on two quiet CPU cores; not measured on a GPU.

How to read the names, such as `x_BxLxD`: `docs/lessons.md`. PyTorch's words in JAX:
`docs/from_pytorch.md`.
"""

# %%
import dataclasses
import functools
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import matplotlib.pyplot as plt
import numpy as np
import torch
from lesson import Lesson

import jax_model5
import torch_ref.model
import torch_ref.step
from jax_model5.bench.measure import program_bytes, timed
from jax_model5.bench.rounds import ratio, summary
from jax_model5.config import ModelConfig, TrainConfig
from jax_model5.flops import step_flops
from jax_model5.programs import Programs, steps
from jax_model5.step import abstract_state
from jax_model5.trees import n_elements, to_layout

jax.config.update("jax_num_cpu_devices", 2)  # a CPU is as many devices as it is told to be
lesson = Lesson("20", "What makes a step fast")

# %% [markdown]
"""
## The programs

A small vocabulary, so that the blocks are what is timed, as in Model 5 on the final token. In JAX
each configuration is a program of its own, compiled for its shapes, here two at a time. In PyTorch
one model takes any batch; `zero_grad`, `backward` and `step` stand in `train_step`.
"""

# %%
config_of = functools.partial(lesson.model5, 10**9, vocab_size=257, n_layers=lesson.pick(4, 1))
PAIRS = lesson.pick([(64, 62), (128, 120)], [(64, 62)])
MEANS = {"accumulate 4": {"accumulate": 4}}
if not lesson.fast:
    MEANS |= {"remat full": {"remat": "full"}, "bfloat16": {"dtype": "bfloat16"}, "2 devices": {}}
of_jax = {str(b): config_of(batch_size=b) for pair in PAIRS for b in pair}
of_torch = {f"PyTorch {name}": config for name, config in of_jax.items()}
of_torch["PyTorch 64 again"] = of_jax["64"]
of_jax |= {name: config_of(batch_size=64, **fields) for name, fields in MEANS.items()}


def tokens(config):
    shape = config.batch_size, config.model.seq_len + 1
    return np.random.default_rng(0).integers(0, config.model.vocab_size, shape, np.int32)


def in_jax(programs, start):
    """A function that makes a step, from a copy of the state `start`."""
    places = programs.abstract_state
    state = jax.tree.map(lambda x, to: jax.device_put(np.array(x), to.sharding), start, places)
    windows_BxL1 = tokens(programs.config)
    stepping = steps(
        programs.config, None, batches=lambda step: windows_BxL1, state=state, programs=programs
    )
    return lambda: next(stepping)[2]


def in_torch(config, params):
    """The same in PyTorch, from the same weights."""
    model = torch_ref.model.Model5(config.model)
    named = to_layout(params, config.model, "torch_ref")  # without the head, which is wte
    model.load_state_dict({k: torch.tensor(v) for k, v in named.items()}, strict=False)
    optimizer = torch_ref.step.make_optimizer(model, config.optimizer)
    scheduler = torch_ref.step.make_scheduler(optimizer, config.optimizer, config.steps)
    step, windows_BxL1 = torch_ref.step.train_step, torch.tensor(tokens(config))
    return functools.partial(step, model, optimizer, scheduler, windows_BxL1, config)


programs = {
    name: Programs(config, devices=jax.devices()[: 2 if name == "2 devices" else 1])
    for name, config in of_jax.items()
}
with ThreadPoolExecutor(2) as pool:
    init = pool.submit(lambda: programs["64"].init())
    list(pool.map(lambda each: each.train_step, programs.values()))
    start = jax.device_get(init.result())
step_of = {name: in_jax(each, start) for name, each in programs.items()}
step_of["64 again"] = in_jax(programs["64"], start)
step_of |= {name: in_torch(config, start.params) for name, config in of_torch.items()}
first = {name: {k: float(v) for k, v in step().items()} for name, step in step_of.items()}

# %% [markdown]
"""
## The rounds

JAX returns before a step is done; `timed` waits for what it gave. PyTorch is done on a CPU when it
returns; on a GPU it would need `torch.cuda.synchronize()`.
"""

# %%
configs = of_jax | of_torch | {"64 again": of_jax["64"]}
seconds = {name: [] for name in step_of}  # of a sequence, by rounds
orders = np.random.default_rng(0)
for _ in range(lesson.pick(15, 2)):
    for name in orders.permutation(list(step_of)):
        seconds[name].append([timed(step_of[name]) / configs[name].batch_size])


def faster(a, b="64"):
    """How many times as fast a sequence is in a as in b: quartiles over the rounds, and words."""
    found = summary(ratio(seconds[a], seconds[b])["rounds"])
    words = f"{found['median']:.3f} times as fast [{found['q1']:.3f}, {found['q3']:.3f}]"
    return found, words


def stands_out(found, noise):
    """Faster in three rounds of four, and by more than a program is than itself."""
    return found["q1"] > max(1, noise["q3"])


noise, _ = faster("64 again")
figure, ax = plt.subplots(figsize=(8, 4), layout="constrained")
names = [name for name in step_of if name not in ("64", "64 again", "PyTorch 64")]
for y, name in enumerate(names):
    found, _ = faster(name, "PyTorch 64" if "PyTorch" in name else "64")
    ax.plot([found["q1"], found["q3"]], [y, y], "k", linewidth=1)
    ax.plot(found["median"], y, "C1o" if "PyTorch" in name else "C0o")
ax.axvspan(noise["q1"], noise["q3"], color="0.9", label="64 against itself")
ax.axvline(1, color="0.6", linewidth=0.8)
ax.set_yticks(range(len(names)), names)
ax.set(xlabel="times as fast, a sequence, as a batch of 64; median and quartiles of the rounds")
ax.invert_yaxis()
ax.legend()
lesson.save(figure, "speed")

# %% [markdown]
"""
## Powers of two

A GPU computes a product in tiles of, say, 64 rows and wastes what is left of the last one. In Model
5 only the head and the last block's one position have as few rows as the batch, all else has 256
times as many. It counts where nothing multiplies a dimension: our head pads the vocabulary of
50,257 to 50,304 on a GPU.
"""

# %%
for a, b in PAIRS:
    for where in ("", "PyTorch "):
        found, words = faster(f"{where}{a}", f"{where}{b}")
        itself, noise_words = faster(f"{where}64 again", f"{where}64")
        claim = f"{where or 'JAX '}{a} beats {b}, a sequence"
        words = f"{words}; 64 than itself {noise_words}"
        lesson.check(claim, "faster", words, stands_out(found, itself), in_fast=False)
GPT2 = ModelConfig(d_model=768, n_heads=12, n_layers=12)
flops = step_flops(TrainConfig(batch_size=64, model=GPT2))
few_rows = flops["head"] + flops["suffix block"] * 10 / (256 * 2 + 10)  # 10 D² of 12 D²
waste = (64 / 62 - 1) * few_rows / sum(flops.values())
lesson.check(
    "62 wastes 1 % or more in tiles of 64 rows (Model 5)",
    "slower",
    f"{waste:.3%} of the FLOPs, counted",
    waste >= 0.01,
)

# %% [markdown]
"""
## The other means

The plan is the floor of a step that XLA's compiler for an H100 wrote (`docs/scale.md`): one that
moves as much memory as it must. Eight chips share the batch, not the weights and their moments.
"""

# %%
device = jax.default_backend()
for name in MEANS:
    found, words = faster(name)
    holds = stands_out(found, noise)
    lesson.check(f"{name}: faster on {device}", "a means", words, holds, in_fast=False)
    loss, norm = (abs(first[name][k] / first["64"][k] - 1) for k in ("loss", "grad_norm"))
    limit = 1e-2 if name == "bfloat16" else 1e-5
    words = f"relative differences {loss:.0e}, {norm:.0e}"
    lesson.check(f"{name}: the loss and gradient stay", "–", words, max(loss, norm) < limit)
    if name in ("accumulate 4", "remat full"):
        less = program_bytes(programs["64"].train_step) / program_bytes(programs[name].train_step)
        lesson.check(f"{name}: less memory", "–", f"{less:.1f} times less", less > 1)

path = Path(jax_model5.__file__).parents[1] / "docs/scale/model5_bfloat16.json"
plans = {plan["chips"]: plan["floor"]["step_s"] for plan in json.loads(path.read_text())["plans"]}
times = plans["h100:1"] / plans["h100:8"]
lesson.check(
    "8 H100 are nearly 8 times as fast as one (Model 5, planned)",
    "faster",
    f"{times:.1f} times, for a batch of 64 in all",
    times > 0.8 * 8,
)
tied, untied = (
    n_elements(abstract_state(TrainConfig(model=model)).params)
    for model in (GPT2, dataclasses.replace(GPT2, tied_head=False))
)
lesson.check(
    "weight sharing saves parameters, and no FLOPs",
    "a means",
    f"{tied / 1e6:.0f} of {untied / 1e6:.0f} million",
    tied < untied,
)
loss, norm = (abs(first["PyTorch 64"][k] / first["64"][k] - 1) for k in ("loss", "grad_norm"))
lesson.check(
    "PyTorch's step is JAX's",
    "–",
    f"relative differences {loss:.0e}, {norm:.0e}",
    max(loss, norm) < 1e-5,
)
lesson.end()
