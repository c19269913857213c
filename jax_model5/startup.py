"""JAX set up for a command: precision, compile cache, processes; who speaks, and what runs."""

import contextlib
import importlib.metadata
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

import jax

from jax_model5.config import TrainConfig
from jax_model5.errors import UserError, give_up

_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")


def set_up_jax(config: TrainConfig) -> None:
    """Precision, compile cache and processes of a run, before any array is made."""
    jax.config.update("jax_enable_x64", config.model.dtype == "float64")
    keep_programs(config.data.cache_dir)
    join_processes()


def keep_programs(cache_dir: str) -> None:
    """Keeps compiled programs in the cache folder, unless JAX's own variable names another."""
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        folder = Path(cache_dir).expanduser() / "xla"
        jax.config.update("jax_compilation_cache_dir", str(folder))


def join_processes() -> None:
    """Joins the run's other processes: a TPU pod's, or those that three JAX_* variables name.

    JAX_COORDINATOR_ADDRESS (host:port of process 0), JAX_NUM_PROCESSES and JAX_PROCESS_ID.
    """
    variables = [f"JAX_{name}" for name in ("COORDINATOR_ADDRESS", "NUM_PROCESSES", "PROCESS_ID")]
    if jax.distributed.is_initialized():
        return
    if variables[0] in os.environ:
        try:
            address, count, index = (os.environ[name] for name in variables)
            jax.distributed.initialize(address, int(count), int(index))
        except (KeyError, ValueError, RuntimeError) as error:
            raise UserError(f"{', '.join(variables)}: set all three: {error}") from None
    elif "," in os.environ.get("TPU_WORKER_HOSTNAMES", ""):
        jax.distributed.initialize()


def is_first_process() -> bool:
    """Whether this process speaks and writes for all. Starts no device."""
    return not jax.distributed.is_initialized() or jax.process_index() == 0


def say(text: str, to: TextIO | None = None) -> None:
    """A line, on standard output unless given; of many processes only the first speaks.

    A run whose terminal is gone, or whose reader has enough, goes on.
    """
    stream = to or sys.stdout
    if is_first_process():
        try:
            print(text, file=stream, flush=True)
        except OSError:
            give_up(stream)


def note(text: str) -> None:
    """A line on how far a long command is, on standard error."""
    say(text, to=sys.stderr)


@contextlib.contextmanager
def memory_errors(config: TrainConfig) -> Iterator[None]:
    """Exhausted memory of a device as a `UserError`."""
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise UserError(
            f"batch_size={config.batch_size}: the devices' memory is too small; raise "
            f"accumulate={config.accumulate}, lower batch_size, or set model.remat=full"
        ) from None


def versions() -> dict[str, str]:
    """Of every package that decides the numbers."""
    return {name: importlib.metadata.version(name) for name in _PACKAGES}


def machine() -> dict[str, Any]:
    """What else does: on CPUs a sum is split by the cores that the process may use."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    found: dict[str, Any] = {"devices": jax.device_count(), "device": jax.devices()[0].device_kind}
    return found | ({"cores": cores} if jax.default_backend() == "cpu" else {})
