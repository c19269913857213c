"""What a compiled step costs: memory, products, traffic, collectives, and the floor of its time."""

import collections
import dataclasses
from pathlib import Path
from typing import Any

from jax_model5.config import TrainConfig
from jax_model5.flops import PEAK_BFLOAT16, step_flops
from jax_model5.losses import n_last
from jax_model5.plan import hlo
from jax_model5.plan.chips import Chips
from jax_model5.step import abstract_state
from jax_model5.trees import n_bytes

# A product in float32 runs at this share of the bfloat16 peak, at JAX's default precision: as TF32
# on NVIDIA's chips, with its inputs rounded to bfloat16 on a TPU.
_FLOAT32_SHARE = {"cuda": 0.5, "tpu": 1.0}


def of_program(text: str, memory: dict[str, int], chips: Chips) -> dict[str, Any]:
    """What the program's text and XLA's count of memory say, of one chip."""
    program = hlo.Program(text)
    flops: dict[str, float] = collections.defaultdict(float)
    moved: dict[str, float] = collections.defaultdict(float)
    sent: dict[str, float] = collections.defaultdict(float)
    traffic, network_s = 0.0, 0.0
    for instruction, times in program.executed():
        traffic += times * program.traffic(instruction)
        kind = instruction.opcode.removesuffix("-start")
        if kind in hlo.COLLECTIVES:
            size = times * hlo.received(instruction, chips.n)
            moved[kind] += size
            sent[carried(instruction)] += size
            network_s += size / _rate(instruction, chips)
        for inner in program.inside(instruction):
            if hlo.is_product(inner):
                operands = program.operands(inner)
                dtype = operands[0].arrays[0].dtype if operands else inner.arrays[0].dtype
                flops[dtype] += times * program.flops(inner)
    return {
        "memory": memory | {"total": total(memory)},
        "flops_by_dtype": dict(flops),
        "traffic_bytes": traffic,
        "collective_bytes": dict(moved),
        "carried_bytes": dict(sent),
        "network_s": network_s,
    }


def total(memory: dict[str, int]) -> int:
    return memory["argument"] + memory["output"] - memory["alias"] + memory["temp"]


def carried(collective: hlo.Instruction) -> str:
    """Whether a collective carries weights, gradients, or sums of the metrics."""
    if collective.bytes < 1024:
        return "metrics"
    is_gather = collective.opcode.startswith("all-gather")
    return "weights" if is_gather else "gradients"


def _rate(collective: hlo.Instruction, chips: Chips) -> float:
    size = hlo.group_size(collective) or chips.n
    is_inside = size <= chips.chip.per_host or not chips.chip.between_hosts
    return chips.chip.network if is_inside else chips.chip.between_hosts


def floor(costs: dict[str, Any], config: TrainConfig, chips: Chips) -> dict[str, Any]:
    """No step is faster than the slowest of its arithmetic, its memory and its network.

    MFU at the floor is of the FLOPs that the step needs, nothing that is computed twice.
    """
    peak = PEAK_BFLOAT16[chips.chip.kind]
    slow = _FLOAT32_SHARE[chips.chip.platform]
    by_dtype = costs["flops_by_dtype"].items()
    compute = sum(n / (peak if dtype == "bf16" else slow * peak) for dtype, n in by_dtype)
    times = {
        "compute": compute,
        "memory": costs["traffic_bytes"] / chips.chip.bandwidth,
        "network": costs["network_s"],
    }
    step = max(times.values())
    tokens = config.batch_size * config.model.seq_len
    needed = sum(step_flops(config).values())
    return {
        **{f"{name}_s": seconds for name, seconds in times.items()},
        "ruled_by": max(times, key=times.__getitem__),
        "step_s": step,
        "mfu": needed / (step * chips.n * peak),
        "tokens_per_s": tokens / step,
        "targets_per_s": config.batch_size * n_last(config) / step,
        "hours": config.steps * step / 3600,
    }


def state_bytes(config: TrainConfig) -> dict[str, int]:
    """Of the whole state, on however many chips."""
    state = abstract_state(config)
    parameters, moments = n_bytes(state.params), n_bytes(state.opt_state)
    return {"parameters": parameters, "moments": moments, "gradients": parameters}


def plan(config: TrainConfig, chips: Chips, memory: dict[str, int], folder: Path) -> dict[str, Any]:
    text = (folder / "program.txt").read_text()
    costs = of_program(text, memory, chips)
    fits = costs["memory"]["total"] <= chips.chip.memory
    found = {"chips": chips.name, "n_chips": chips.n, "fits": fits, **costs}
    found |= {"state": state_bytes(config), "floor": floor(costs, config, chips)}
    return found | {"config": dataclasses.asdict(config)}


def by_hand(config: TrainConfig, chips: Chips) -> dict[str, Any]:
    """Without XLA's compiler: the state, and the step's FLOPs, in the config's dtype."""
    state, fsdp = state_bytes(config), config.mesh.fsdp
    dtype = "bf16" if config.model.dtype == "bfloat16" else "f32"
    costs: dict[str, Any] = {
        "flops_by_dtype": {dtype: sum(step_flops(config).values()) / chips.n},
        "traffic_bytes": 0.0,
        "network_s": 0.0,
    }
    found = {"chips": chips.name, "n_chips": chips.n, "state": state, **costs}
    found["memory"] = {"argument": (state["parameters"] + state["moments"]) // fsdp}
    return found | {"floor": floor(costs, config, chips), "config": dataclasses.asdict(config)}
