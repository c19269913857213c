"""The report's stages, shared by this process and one beside it: most of their time is tracing."""

import concurrent.futures
import gc
import itertools
import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator, Sequence

import jax

from jax_model5.config import DataConfig, TrainConfig
from jax_model5.errors import UserError
from jax_model5.startup import keep_programs
from parity_tests import COMPILE_FAST, faults, report


def rows(
    configs: Sequence[TrainConfig], device: str, fault: faults.Fault | None
) -> Iterator[report.Row]:
    """Those of every stage, in order: this process takes the first, the other one the last.

    They end where they meet. A device other than the CPU is one process's alone.
    """
    tasks = [(config, i) for config in configs for i, _ in enumerate(report.stages(config))]
    pool = _process(device, fault)
    try:
        last = [pool.submit(_stage, *task) for task in tasks[::-1]] if device == "cpu" else []
        ended = None
        for task, other in itertools.zip_longest(tasks, last[::-1]):
            if task[0] == ended:
                continue
            found = _stage(*task) if other is None or other.cancel() else other.result()
            yield from found
            ended = task[0] if any(map(report.is_end, found)) else ended
    finally:
        pool.shutdown(cancel_futures=True)


def _stage(config: TrainConfig, index: int) -> list[report.Row]:
    name, stage = list(report.stages(config))[index]
    return list(report.named(name, stage, config))


def _process(device: str, fault: faults.Fault | None) -> concurrent.futures.ProcessPoolExecutor:
    name = fault.name if fault else None
    spawn = multiprocessing.get_context("spawn")  # JAX's threads do not survive a fork
    return concurrent.futures.ProcessPoolExecutor(1, spawn, _prepare, (device, name))


def _prepare(device: str, fault: str | None) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the other process ends this one
    threading.Thread(target=_end_with_parent, daemon=True).start()
    use_device(device)
    for planted in faults.FAULTS:
        if planted.name == fault:
            planted.plant().__enter__()


def _end_with_parent() -> None:
    multiprocessing.parent_process().join()  # killed, it tells nobody
    os._exit(1)


def use_device(name: str) -> None:
    """JAX on this device, its compiled programs kept for the next time as training's are."""
    flags = os.environ.get("XLA_FLAGS", "")
    if name == "cpu" and COMPILE_FAST not in flags:
        os.environ["XLA_FLAGS"] = f"{COMPILE_FAST} {flags}"
    jax.config.update("jax_platforms", "cuda" if name == "gpu" else name)
    keep_programs(DataConfig().cache_dir)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)  # a thousand small ones
    gc.disable()  # walking JAX's graphs is an eighth of the time, and the process is short
    try:
        jax.devices()
    except (RuntimeError, AssertionError):  # the second where no plugin of it is installed
        raise UserError(f"device={name!r}: JAX finds none here; use --device cpu") from None
