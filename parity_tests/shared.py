"""The report's stages, shared by this process and one beside it: most of their time is tracing."""

import contextlib
import gc
import itertools
import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import BrokenExecutor, Future, ProcessPoolExecutor

import jax

from jax_model5.config import DataConfig, TrainConfig
from jax_model5.errors import UserError
from jax_model5.startup import keep_programs
from parity_tests import COMPILE_FAST, beside, faults, report

Task = tuple[TrainConfig, int]  # and the number of its stage
_PLANTED = contextlib.ExitStack()  # in the process beside, as long as it lives


def rows(
    configs: Sequence[TrainConfig], device: str, fault: faults.Fault | None
) -> Iterator[report.Row]:
    """Those of every stage, in order: this process takes the first, the other one the last.

    They end where they meet. A device other than the CPU is one process's alone.
    """
    tasks = [(config, i) for config in configs for i, _ in enumerate(report.stages(config))]
    name = fault.name if fault else None
    pool = beside.pool(_prepare, device, name) if device == "cpu" else None
    gc.disable()  # walking JAX's graphs is an eighth of the time
    try:
        last = _submitted(pool, tasks[::-1]) if pool else []
        ended = None
        for task, other in itertools.zip_longest(tasks, last[::-1]):
            if task[0] == ended:
                continue
            found = _found(task, other)
            yield from found
            ended = task[0] if any(map(report.is_end, found)) else ended
    finally:
        gc.freeze()  # nor is it walked now: the command ends, or goes on with other objects
        gc.enable()
        for child in multiprocessing.active_children():
            child.kill()
        if pool:
            pool.shutdown(cancel_futures=True)


def _submitted(pool: ProcessPoolExecutor, tasks: Sequence[Task]) -> list[Future]:
    try:
        return [pool.submit(_stage, task) for task in tasks]
    except (OSError, EOFError, BrokenExecutor):  # no process beside: this one does all
        return []


def _found(task: Task, other: Future | None) -> list[report.Row]:
    if other is None or other.cancel():
        return _stage(task)
    try:
        return other.result()
    except BrokenExecutor:  # killed, for want of memory say
        return _stage(task)


def _stage(task: Task) -> list[report.Row]:
    config, index = task
    name, stage = list(report.stages(config))[index]
    return list(report.named(name, stage, config))


def _prepare(device: str, fault: str | None) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends it
    threading.Thread(target=_end_with_parent, daemon=True).start()
    jax.config.update("jax_num_cpu_devices", 4)  # for the rung of four devices
    use_device(device)
    gc.disable()
    for known in faults.FAULTS:
        if known.name == fault:
            _PLANTED.enter_context(known.plant())


def _end_with_parent() -> None:
    multiprocessing.parent_process().join()  # type: ignore[union-attr]  # killed, it tells nobody
    os._exit(1)


def use_device(name: str) -> None:
    """JAX on this device, its compiled programs kept for the next time as training's are."""
    flags = os.environ.get("XLA_FLAGS", "")
    if name == "cpu" and COMPILE_FAST not in flags:
        os.environ["XLA_FLAGS"] = f"{COMPILE_FAST} {flags}"
    jax.config.update("jax_platforms", "cuda" if name == "gpu" else name)
    keep_programs(DataConfig().cache_dir)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)  # a thousand small ones
    try:
        jax.devices()
    except (RuntimeError, AssertionError):  # the second where no plugin of it is installed
        raise UserError(f"device={name!r}: JAX finds none here; use --device cpu") from None
