"""What a compiled step costs: memory, products, traffic, collectives, and the floor of its time."""

import collections
import dataclasses
from typing import Any

import jax

from jax_model5 import sharding
from jax_model5.config import TrainConfig
from jax_model5.flash import pairs_of_blocks
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
    moved: dict[str, float] = collections.defaultdict(float)
    sent: dict[str, float] = collections.defaultdict(float)
    traffic, network_s = sum(n * program.traffic(i) for i, n in program.executed()), 0.0
    for collective, times in program.collectives():
        size = times * hlo.received(collective, chips.n)
        moved[collective.opcode.removesuffix("-start")] += size
        sent[carried(collective)] += size
        network_s += size / _rate(collective, chips)
    return {
        "memory": memory | {"total": total(memory)},
        "flops_by_dtype": flops_by_dtype(program),
        "traffic_bytes": traffic,
        "collective_bytes": dict(moved),
        "carried_bytes": dict(sent),
        "network_s": network_s,
    }


def flops_by_dtype(program: hlo.Program) -> dict[str, float]:
    """Of every product, as often as it runs, by the dtype of what it multiplies."""
    flops: dict[str, float] = collections.defaultdict(float)
    for instruction, times in program.executed():
        for inner in program.inside(instruction):
            if hlo.is_product(inner):
                operands = program.operands(inner)
                dtype = operands[0].arrays[0].dtype if operands else inner.arrays[0].dtype
                flops[dtype] += times * program.flops(inner)
            elif n := _attention_kernel_flops(program, inner):
                flops["bf16"] += times * n
    return dict(flops)


def _attention_kernel_flops(program: hlo.Program, instruction: hlo.Instruction) -> float:
    """Of the products inside flash.py's kernels: two forward, and five backward; 0 of all else."""
    if "triton" not in instruction.text or "_flash/" not in instruction.op_name:
        return 0.0
    operands = (array.dims for each in program.operands(instruction) for array in each.arrays)
    B, L, width = max(operands, key=len)
    n_products = 5 if "transpose(" in instruction.op_name else 2
    return n_products * 2.0 * B * pairs_of_blocks(L) * width / 3


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
    chip_seconds = step * chips.n / tokens
    needed = sum(step_flops(config).values())
    return {
        **{f"{name}_s": seconds for name, seconds in times.items()},
        "ruled_by": max(times, key=times.__getitem__),
        "step_s": step,
        "mfu": needed / (step * chips.n * peak),
        "tokens_per_s": tokens / step,
        "targets_per_s": config.batch_size * n_last(config) / step,
        "chip_hours_per_billion_tokens": chip_seconds * 1e9 / 3600,
        "hours": config.steps * step / 3600,
    }


def state_bytes(config: TrainConfig) -> dict[str, int]:
    """Of what one chip holds of the state, and of the gradients of its parameters."""
    state = abstract_state(config)
    parameters = _bytes_of_one(state.params, config.mesh.fsdp)
    moments = _bytes_of_one(state.opt_state, config.mesh.fsdp)
    return {"parameters": parameters, "moments": moments, "gradients": parameters}


def _bytes_of_one(tree: Any, fsdp: int) -> int:
    split = jax.tree.map(
        lambda leaf, spec: n_bytes(leaf) // (fsdp if "fsdp" in spec else 1),
        tree,
        sharding.specs(tree, fsdp),
    )
    return sum(jax.tree.leaves(split))


def plan(config: TrainConfig, chips: Chips, memory: dict[str, int], text: str) -> dict[str, Any]:
    """What the program's text and XLA's count of memory say of a step, with its floor."""
    costs = of_program(text, memory, chips)
    fits = costs["memory"]["total"] <= chips.chip.memory
    found = {"chips": chips.name, "n_chips": chips.n, "fits": fits, **costs}
    return found | _of_config(config, costs, chips)


def by_hand(config: TrainConfig, chips: Chips, too_large: int = 0) -> dict[str, Any]:
    """Without a program: the state, and the step's FLOPs, in the config's dtype.

    `too_large` are the bytes of temporaries for which XLA made none.
    """
    dtype = "bf16" if config.model.dtype == "bfloat16" else "f32"
    state = state_bytes(config)
    costs: dict[str, Any] = {
        "flops_by_dtype": {dtype: sum(step_flops(config).values()) / chips.n},
        "traffic_bytes": 0.0,
        "network_s": 0.0,
        "memory": {"argument": state["parameters"] + state["moments"]},
    }
    if too_large:
        whole = costs["memory"]["argument"] + too_large
        costs |= {"fits": False, "memory": costs["memory"] | {"temp": too_large, "total": whole}}
    return {"chips": chips.name, "n_chips": chips.n, **costs} | _of_config(config, costs, chips)


def _of_config(config: TrainConfig, costs: dict[str, Any], chips: Chips) -> dict[str, Any]:
    return {
        "state": state_bytes(config),
        "memory_of_chip": chips.chip.memory,
        "floor": floor(costs, config, chips),
        "config": dataclasses.asdict(config),
    }
