"""JAX set up for a command: precision, compile cache, processes; its words, and what runs it."""

import contextlib
import glob
import importlib.metadata
import os
import resource
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

import jax

from jax_model5 import DEVICE_FILES, processes
from jax_model5.config import TrainConfig
from jax_model5.errors import UserError, require, write_line

_LEAST_ADDRESS_SPACE = 3 << 30  # bytes
_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")


def set_up_jax(config: TrainConfig) -> None:
    """Precision, compile cache and processes of a run, before any array is made.

    Raises:
      UserError: the processes do not find each other, or the address space is too small.
    """
    _require_address_space()
    leave_absent_chips_alone()
    jax.config.update("jax_enable_x64", config.model.dtype == "float64")
    keep_programs(config.data.cache_dir)
    processes.join()


def _require_address_space() -> None:
    """Below the limit XLA and LLVM end in an abort of C++: the default model at 2 GB."""
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    enough = limit == resource.RLIM_INFINITY or limit >= _LEAST_ADDRESS_SPACE
    fix = f"the address space is too small for JAX; set it to {_LEAST_ADDRESS_SPACE >> 10} or more"
    require(enough, "ulimit -v", limit >> 10, fix)


def leave_absent_chips_alone() -> None:
    """Where no file of a device is there, JAX looks for none.

    With XLA's compilers for absent chips installed (`jax_model5.plan`) its look-up of a TPU waits,
    and both of them warn.
    """
    is_known = sys.platform == "linux" and "JAX_PLATFORMS" not in os.environ
    if is_known and not any(glob.glob(pattern) for pattern in DEVICE_FILES):
        jax.config.update("jax_platforms", "cpu")


def keep_programs(cache_dir: str) -> None:
    """Keeps compiled programs in the cache folder, unless JAX's own variable names another."""
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        folder = Path(cache_dir).expanduser() / "xla"
        jax.config.update("jax_compilation_cache_dir", str(folder))


def say(text: str, to: TextIO | None = None) -> None:
    """A line, on standard output unless given; of many processes only the first speaks.

    A run whose terminal is gone, or whose reader has enough, goes on.
    """
    if processes.is_first():
        write_line(text, to or sys.stdout)


def note(text: str) -> None:
    """A line on how far a long command is, on standard error."""
    say(text, to=sys.stderr)


@contextlib.contextmanager
def memory_errors(config: TrainConfig) -> Iterator[None]:
    """Exhausted memory of a device as a `UserError`."""
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if not any(words in str(error) for words in ("RESOURCE_EXHAUSTED", "Out of memory")):
            raise
        raise UserError(
            f"batch_size={config.batch_size}: the devices' memory is too small; raise "
            f"accumulate={config.accumulate}, lower batch_size, or set model.remat=full"
        ) from None


def versions() -> dict[str, str]:
    """Of every package that decides the numbers."""
    return {name: importlib.metadata.version(name) for name in _PACKAGES}


def n_cores() -> int:
    """Those that this process may use."""
    is_linux = hasattr(os, "sched_getaffinity")
    return len(os.sched_getaffinity(0)) if is_linux else os.cpu_count() or 1


def machine() -> dict[str, Any]:
    """What else does: on CPUs a sum is split by the cores that the process may use."""
    found: dict[str, Any] = {"devices": jax.device_count(), "device": jax.devices()[0].device_kind}
    return found | ({"cores": n_cores()} if jax.default_backend() == "cpu" else {})
