"""The devices: JAX set up for a run, the mesh, and where parameters and batches live on it."""

import logging
import os
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jax_model5.config import TrainConfig, UserError


def set_up_jax(config: TrainConfig) -> None:
    """Precision, compile cache and processes of a run, before any array is made."""
    # A failed read or save is raised; what its callbacks and tasks report is the same news again.
    sys.unraisablehook = lambda _: None
    for source in ("absl", "asyncio"):
        logging.getLogger(source).setLevel(logging.CRITICAL)
    jax.config.update("jax_enable_x64", config.model.dtype == "float64")
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        cache = Path(config.data.cache_dir).expanduser() / "xla"
        jax.config.update("jax_compilation_cache_dir", str(cache))
    join_processes()


def make_mesh(config: TrainConfig) -> Mesh:
    """A mesh with axes data x fsdp.

    Raises:
      UserError: the axes do not fit the devices, or the batch does not split over them.
    """
    try:
        n_devices = jax.device_count()
    except RuntimeError as error:
        raise UserError(f"no device: {error}; check JAX_PLATFORMS") from None
    fsdp = config.mesh.fsdp
    data = config.mesh.data or max(n_devices // fsdp, 1)
    if data * fsdp > n_devices:
        raise UserError(
            f"mesh.fsdp={fsdp}: a mesh of {data} x {fsdp} devices, but there are {n_devices}; "
            "use smaller mesh.data and mesh.fsdp"
        )
    micro_batch = config.batch_size // config.accumulate
    if micro_batch % (data * fsdp):
        raise UserError(
            f"batch_size={config.batch_size}: micro-batches of {micro_batch} sequences do not "
            f"split over {data * fsdp} devices; use a multiple of {data * fsdp * config.accumulate}"
        )
    axis_types = (AxisType.Auto, AxisType.Auto)
    devices = jax.devices()[: data * fsdp]
    return jax.make_mesh((data, fsdp), ("data", "fsdp"), axis_types, devices=devices)


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Rows are split over all devices."""
    return NamedSharding(mesh, PartitionSpec(("data", "fsdp")))


def state_sharding(mesh: Mesh, abstract_state: Any) -> Any:
    """Each array's largest axis that fsdp divides is split over fsdp (Rajbhandari et al. 2020)."""
    fsdp = mesh.shape["fsdp"]

    def place(leaf: jax.ShapeDtypeStruct) -> NamedSharding:
        axes = [axis for axis, size in enumerate(leaf.shape) if size % fsdp == 0]
        spec: list[str | None] = [None] * len(leaf.shape)
        if fsdp > 1 and axes:
            spec[max(axes, key=lambda axis: leaf.shape[axis])] = "fsdp"
        return NamedSharding(mesh, PartitionSpec(*spec))

    return jax.tree.map(place, abstract_state)


def to_devices(mesh: Mesh, batch: np.ndarray) -> jax.Array:
    """The global batch -> one global array; each process hands over its own devices' rows."""
    return jax.make_array_from_callback(batch.shape, batch_sharding(mesh), batch.__getitem__)


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
