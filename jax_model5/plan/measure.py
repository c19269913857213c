"""Planned against measured on the device that is here: memory, products, the time of a step."""

import statistics
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jax_model5 import sharding
from jax_model5.config import TrainConfig
from jax_model5.errors import UserError
from jax_model5.flops import recomputed_flops, step_flops
from jax_model5.plan import costs, hlo
from jax_model5.programs import Programs

_STEPS = 5


def measure(config: TrainConfig) -> dict[str, Any]:
    """Of one device: planned and measured bytes and FLOPs, and the seconds of a step.

    Bytes: XLA's count of the step, against the most that were in use while steps ran: the device's
    own figure, on a CPU the process's memory. FLOPs: the formula of `flops.py`, against the
    products of the program that ran.
    """
    programs = Programs(config)
    step: Any = programs.train_step
    memory, n = step.memory_analysis(), programs.mesh.local_mesh.size
    kinds = ("argument", "output", "alias", "temp")
    planned = costs.total({kind: getattr(memory, f"{kind}_size_in_bytes") for kind in kinds})
    flops = costs.flops_by_dtype(hlo.Program(step.as_text()))
    needed, again = sum(step_flops(config).values()), 0.0
    if jax.default_backend() == "cpu":
        again = recomputed_flops(config, programs.mesh.size)
    found: dict[str, Any] = {"device": jax.devices()[0].device_kind}
    measured = sum(flops.values()) * programs.mesh.size
    found["flops"] = {"planned": needed + again, "measured": measured}
    _ = programs.init  # compiled
    most = _MostInUse()
    seconds = _seconds_of_steps(programs)
    found["memory"] = {"planned": planned * (n if most.is_of_host else 1), "measured": most.bytes()}
    return found | {"step_s": statistics.median(seconds[1:])}


def _seconds_of_steps(programs: Programs) -> list[float]:
    config, state, seconds = programs.config, programs.init(), []
    shape = config.batch_size, config.model.seq_len + 1
    rng = np.random.default_rng(0)
    tokens = rng.integers(config.model.vocab_size, size=shape, dtype=np.int32)
    batch = programs.to_devices(tokens)
    for _ in range(_STEPS):
        start = time.perf_counter()
        state, metrics = programs.train_step(state, programs.key, batch)
        jax.block_until_ready(metrics)
        seconds.append(time.perf_counter() - start)
    return seconds


class _MostInUse:
    """The most bytes that a device has in use, or this process on a CPU from now on."""

    def __init__(self) -> None:
        self._device = sharding.devices()[0]
        self.is_of_host = self._device.platform == "cpu"
        if not self.is_of_host and "peak_bytes_in_use" not in (self._device.memory_stats() or {}):
            raise UserError(f"measure: {self._device.device_kind} counts no memory")
        if self.is_of_host:
            try:
                Path("/proc/self/clear_refs").write_text("5")  # the peak is from now on
                self._before = self._of_process("VmRSS")
            except OSError as error:
                raise UserError(f"measure: this system counts no memory: {error}") from None

    def bytes(self) -> int:
        if self.is_of_host:
            return self._of_process("VmHWM") - self._before
        return (self._device.memory_stats() or {})["peak_bytes_in_use"]

    @staticmethod
    def _of_process(name: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        (kilobytes,) = (line.split()[1] for line in lines if line.startswith(f"{name}:"))
        return int(kilobytes) * 1024
