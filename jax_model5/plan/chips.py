"""The chips that a run can be planned for: `v5e:4x4`, `h100:8`, and how XLA is told of them."""

import contextlib
import difflib
import importlib.metadata
import math
import re
from typing import Any, NamedTuple

from jax_model5.errors import UserError
from jax_model5.flops import CHIPS, Chip

# XLA's GpuTargetConfigProto: what its compiler wants to know of a GPU that is not there. The
# figures stand in openxla/xla, xla/backends/gpu/target_config/specs/.
_GPU = """
gpu_device_info {{
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048
  shared_memory_per_block: 49152 shared_memory_per_core: {shared}
  shared_memory_per_block_optin: {optin} core_count: {cores} fpus_per_core: {fpus}
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: {bandwidth} l2_cache_size: {l2} clock_rate_ghz: {clock}
  device_memory_size: {memory} cuda_compute_capability {{ major: {major} }}
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
}}
platform_name: "CUDA" dnn_version_info {{ major: 9 minor: 12 patch: 0 }}
device_description_str: "{kind}"
"""
_H100 = {"shared": 233472, "optin": 232448, "cores": 132, "fpus": 128, "l2": 50 << 20, "major": 9}
_A100 = {"shared": 167936, "optin": 166912, "cores": 108, "fpus": 64, "l2": 40 << 20, "major": 8}
_TARGETS = {
    "h100": _H100 | {"clock": 1.98, "memory": 84942979072},
    "a100": _A100 | {"clock": 1.41, "memory": 84974239744},
}
_SHAPES = {
    1: "1 2 4 8 16 32 64 128 256",
    2: "1x1 2x2 2x4 4x4 4x8 8x8 8x16 16x16",
    3: "1x1x1 2x2x1 2x2x2 2x2x4 2x4x4 4x4x4 4x4x8 4x8x8",
}
_COMPILERS = {
    "tpu": (["libtpu"], "pip install -e '.[plan-tpu]'"),
    "cuda": (["jax-cuda12-pjrt", "jax-cuda13-pjrt"], "pip install -e '.[plan-gpu]'"),
}


class Chips(NamedTuple):
    """Some chips of one kind."""

    name: str  # as given
    family: str
    shape: str  # 4x4, or how many GPUs
    chip: Chip

    @property
    def n(self) -> int:
        return math.prod(int(size) for size in self.shape.split("x"))


def parse_chips(text: str) -> Chips:
    """`FAMILY:SHAPE`. Raises UserError, with the nearest names, where there are no such chips."""
    family, _, shape = text.partition(":")
    if family not in CHIPS:
        nearest = difflib.get_close_matches(family, CHIPS, n=1, cutoff=0)[0]
        raise UserError(
            f"chips={text!r}: no figures of {family!r}; did you mean {nearest!r}? "
            f"They are {', '.join(CHIPS)}"
        )
    if not re.fullmatch("x".join([r"[1-9]\d*"] * _n_axes(family)), shape):
        example = {1: "8", 2: "4x4", 3: "2x2x1"}[_n_axes(family)]
        raise UserError(f"chips={text!r}: write it as {family}:{example}")
    return Chips(text, family, shape, CHIPS[family])


def _n_axes(family: str) -> int:
    if CHIPS[family].platform == "cuda":
        return 1
    return 3 if family in ("v4", "v5p") else 2


def same_family(chips: Chips) -> list[Chips]:
    """Chips of this kind in the shapes that can be rented, from one chip to 256."""
    shapes = _SHAPES[_n_axes(chips.family)].split()
    return [parse_chips(f"{chips.family}:{shape}") for shape in shapes]


def compiler_is_here(chips: Chips) -> str | None:
    """None, or the command that installs XLA's compiler for these chips."""
    packages, command = _COMPILERS[chips.chip.platform]
    for package in packages:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            importlib.metadata.version(package)
            return None
    return command


def devices(chips: Chips) -> Any:
    """JAX's descriptions of these chips. Raises UserError where XLA knows no such topology."""
    from jax.experimental import topologies

    chip = chips.chip
    if chip.platform == "tpu":
        arguments: dict[str, Any] = {"topology_name": chips.name}
        if chips.n < 4:  # less than the host of the smallest topology
            arguments["chips_per_host_bounds"] = [1, 1, 1]
    else:
        hosts = max(1, chips.n // chip.per_host)
        figures = _TARGETS[chips.family] | {"bandwidth": int(chip.bandwidth), "kind": chip.kind}
        shape = f"{hosts}x1x{chips.n // hosts}"
        target = _GPU.format(**figures)
        arguments = {"topology_name": chips.family, "topology": shape, "target_config": target}
    try:
        return topologies.get_topology_desc(platform=chip.platform, **arguments).devices
    except Exception as error:  # XLA's own, of many kinds
        reason = str(error).split("\n")[0][:200]
        nearest = sorted(same_family(chips), key=lambda other: abs(other.n - chips.n))[:2]
        names = " or ".join(other.name for other in nearest)
        raise UserError(
            f"chips={chips.name!r}: XLA does not know this topology ({reason}); try {names}"
        ) from None
