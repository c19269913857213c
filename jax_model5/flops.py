"""Analytic FLOPs of one training step per objective, and the peak rates of known chips.

Counted are the matrix products that the step needs, two FLOPs a multiply-add, the backward pass
as twice the forward. Not counted: elementwise work, and what is computed again to save memory.
"""

from typing import NamedTuple

from jax_model5.config import TrainConfig
from jax_model5.losses import ROWS, n_last
from jax_model5.model import UNROLLED

# Dense bfloat16 peak of one JAX device [FLOP/s] by its whole `device_kind`, without sparsity.
# NVIDIA: the data sheet of each product. TPU: "System architecture" of each version in Google
# Cloud's TPU documentation; v2 and v3 show a chip as two devices, each half.
PEAK_BFLOAT16 = {
    "NVIDIA B200": 2250e12,
    "NVIDIA H200": 989.4e12,
    "NVIDIA H100 80GB HBM3": 989.4e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA A100-SXM4-40GB": 312e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA A100-PCIE-40GB": 312e12,
    "NVIDIA A100 80GB PCIe": 312e12,
    "NVIDIA L40S": 362e12,
    "NVIDIA L4": 121e12,
    "NVIDIA A10G": 70e12,
    "NVIDIA GeForce RTX 4090": 165.2e12,
    "NVIDIA GeForce RTX 3090": 71e12,
    "TPU v2": 22.5e12,
    "TPU v3": 61.5e12,
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5": 459e12,
    "TPU v6 lite": 918e12,
}


class Chip(NamedTuple):
    """Published figures of a chip, per chip: bytes, and bytes a second."""

    kind: str  # JAX's `device_kind`, the key of `PEAK_BFLOAT16`
    platform: str
    memory: float
    bandwidth: float  # of its memory
    network: float  # into it from the chips of its host or pod
    per_host: int  # how many that network joins
    between_hosts: float  # into it from beyond them; 0: nothing is beyond


# TPUs: "System architecture" of each version in Google Cloud's TPU documentation, the interchip
# interconnect's Gbit/s over 8. NVIDIA: the data sheets of H100 SXM and A100 80GB SXM, NVLink in one
# direction, and of the DGX systems: one network card of 400 and 200 Gbit/s a GPU.
CHIPS = {
    "v4": Chip("TPU v4", "tpu", 32e9, 1228e9, 300e9, 4096, 0),
    "v5e": Chip("TPU v5 lite", "tpu", 16e9, 819e9, 200e9, 256, 0),
    "v5p": Chip("TPU v5", "tpu", 95e9, 2765e9, 600e9, 8960, 0),
    "v6e": Chip("TPU v6 lite", "tpu", 32e9, 1640e9, 448e9, 256, 0),
    "h100": Chip("NVIDIA H100 80GB HBM3", "cuda", 80e9, 3350e9, 450e9, 8, 50e9),
    "a100": Chip("NVIDIA A100-SXM4-80GB", "cuda", 80e9, 2039e9, 300e9, 8, 25e9),
}


def peak_bfloat16(device_kind: str) -> float | None:
    """The published peak [FLOP/s], or None for a chip that the table does not know."""
    return PEAK_BFLOAT16.get(device_kind)


def attended_pairs(n_queries: int, n_keys: int) -> int:
    """Query-key pairs that are computed: the first half of the queries skips the last keys."""
    if n_queries == 1:
        return n_keys
    first = n_queries // 2
    second = n_queries - first
    return first * (n_keys - second) + second * n_keys


def step_flops(config: TrainConfig) -> dict[str, float]:
    """FLOPs of one training step by part; their sum is the whole step."""
    c, N = config.model, n_last(config)
    B, L, D, V = config.batch_size, c.seq_len, c.d_model, c.vocab_size
    trunk = c.n_layers - 1
    # Weights that a position meets: qkv 3 D^2, proj D^2, fc and out 4 D^2 each.
    multiply_adds = {
        "full blocks": trunk * B * L * 12 * D**2,
        "suffix block": B * (L * 2 * D**2 + N * 10 * D**2),
        "attention": 2 * B * D * (trunk * attended_pairs(L, L) + attended_pairs(N, L)),
        "head": B * N * D * V,
    }
    return {part: 3.0 * 2 * count for part, count in multiply_adds.items()}


def recomputed_flops(config: TrainConfig, n_devices: int = 1) -> float:
    """FLOPs of what XLA's program for a CPU computes again: by `model.remat`, and chunks of logits.

    In a trunk that is unrolled, XLA keeps everything unless remat is full.
    """
    c, parts = config.model, step_flops(config)
    trunk, rows = c.n_layers - 1, config.batch_size // config.accumulate // n_devices
    again = parts["head"] / 3 if n_last(config) > max(1, ROWS // rows) else 0.0
    attention = 2.0 * config.batch_size * c.d_model * attended_pairs(c.seq_len, c.seq_len) * trunk
    if c.remat == "full":  # of a block's 12 D^2 the last product, 4 D^2, is not needed again
        return again + parts["full blocks"] / 3 * 8 / 12 + 2 * attention
    return again + (attention if c.remat == "dots" and trunk > UNROLLED else 0.0)
