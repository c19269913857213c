"""The device mesh, and where parameters and batches live on it."""

import os
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jax_model5.config import TrainConfig
from jax_model5.errors import UserError


def make_mesh(config: TrainConfig) -> Mesh:
    """A mesh with axes data x fsdp.

    Raises:
      UserError: the axes do not fit the devices, or the batch does not split over them.
    """
    n_devices = len(devices())
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
    chosen = jax.devices()[: data * fsdp]
    left_out = {device.process_index for device in jax.devices()}
    left_out -= {device.process_index for device in chosen}
    if left_out:
        raise UserError(
            f"mesh.data={data}: a mesh of {data} x {fsdp} devices leaves out processes "
            f"{sorted(left_out)}; use all devices, or start fewer processes"
        )
    return jax.make_mesh((data, fsdp), ("data", "fsdp"), axis_types, devices=chosen)


def devices() -> list[jax.Device]:
    """All devices of all processes. Raises UserError where JAX finds none."""
    try:
        return jax.devices()
    except RuntimeError as error:
        raise UserError(f"no device: {error}; check JAX_PLATFORMS") from None


def device_memory() -> int | None:
    """Bytes of one device, where it tells; on a CPU its share of the machine's."""
    device = jax.local_devices()[0]
    if device.platform == "cpu":
        pages = os.sysconf("SC_PHYS_PAGES") // jax.local_device_count()
        return pages * os.sysconf("SC_PAGE_SIZE")
    return (device.memory_stats() or {}).get("bytes_limit")


def rows_of_a_device(n_rows: int) -> int:
    """Of a batch's rows those that one device computes, in a program traced under `jax.set_mesh`.

    All of them where no mesh is set.
    """
    mesh = jax.sharding.get_abstract_mesh()
    return n_rows if mesh.empty else max(1, n_rows // mesh.size)


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


def shards(mesh: Mesh, abstract_tree: Any) -> Any:
    """What one device holds of a tree of shapes, as shapes."""
    return jax.tree.map(
        lambda leaf, place: jax.ShapeDtypeStruct(place.shard_shape(leaf.shape), leaf.dtype),
        abstract_tree,
        state_sharding(mesh, abstract_tree),
    )


def to_devices(mesh: Mesh, batch: np.ndarray) -> jax.Array:
    """The global batch -> one global array; each process hands over its own devices' rows."""
    return jax.make_array_from_callback(batch.shape, batch_sharding(mesh), batch.__getitem__)
