"""The device mesh, and where parameters and batches live on it."""

import functools
import os
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import mesh_utils
from jax.experimental.layout import Layout, with_layout_constraint
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jax_model5.config import TrainConfig
from jax_model5.errors import UserError

_AXES = ("data", "fsdp")
ROWS, WHOLE = PartitionSpec(_AXES), PartitionSpec()


def make_mesh(config: TrainConfig, among: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh with axes data x fsdp of all devices, or of those given.

    fsdp, which moves all weights three times a step, stays inside a host or a slice where it fits.

    Raises:
      UserError: the axes do not fit the devices, or the batch does not split over them.
    """
    among = devices() if among is None else among
    fsdp = config.mesh.fsdp
    data = config.mesh.data or max(len(among) // fsdp, 1)
    if data * fsdp > len(among):
        raise UserError(
            f"mesh.fsdp={fsdp}: a mesh of {data} x {fsdp} devices, but there are {len(among)}; "
            "use smaller mesh.data and mesh.fsdp"
        )
    micro_batch = config.batch_size // config.accumulate
    if micro_batch % (data * fsdp):
        raise UserError(
            f"batch_size={config.batch_size}: micro-batches of {micro_batch} sequences do not "
            f"split over {data * fsdp} devices; use a multiple of {data * fsdp * config.accumulate}"
        )
    chosen = among[: data * fsdp]
    left_out = {device.process_index for device in among}
    left_out -= {device.process_index for device in chosen}
    if left_out:
        raise UserError(
            f"mesh.data={data}: a mesh of {data} x {fsdp} devices leaves out processes "
            f"{sorted(left_out)}; use all devices, or start fewer processes"
        )
    return Mesh(_arranged(data, fsdp, chosen), _AXES, axis_types=(AxisType.Auto, AxisType.Auto))


def _arranged(data: int, fsdp: int, devices: Sequence[jax.Device]) -> np.ndarray:
    """[data, fsdp]: neighbours in the network side by side, slices along data."""
    n_slices = len({getattr(device, "slice_index", 0) for device in devices})
    if n_slices > 1 and data % n_slices == 0:
        shapes = (data // n_slices, fsdp), (n_slices, 1)
        return mesh_utils.create_hybrid_device_mesh(*shapes, devices)
    return mesh_utils.create_device_mesh((data, fsdp), devices)


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


def is_gpu() -> bool:
    """Whether the mesh that is set is one of GPUs, which may be absent. Starts no device."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return device is not None and device.platform in ("gpu", "cuda", "rocm")


def is_cpu() -> bool:
    """Whether the mesh that is set is one of CPUs, or none is set. Starts no device."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return device is None or device.platform == "cpu"


def row_major(x: jax.Array) -> jax.Array:
    """`x` as it lies in memory; XLA would make the batch its fastest axis on a GPU.

    And transpose it in every layer.
    """
    return with_layout_constraint(x, Layout(tuple(range(x.ndim)))) if is_gpu() else x


# ---- inside a program that each device runs on its own rows -------------------------------------


def on_each_device(function: Callable, in_specs: Any, out_specs: Any) -> Callable:
    """`function` on each device of the mesh that is set, on its rows and its shards."""
    if jax.sharding.get_abstract_mesh().size <= 1:
        return function
    return jax.shard_map(function, in_specs=in_specs, out_specs=out_specs, check_vma=False)


def n_shards() -> int:
    """Among how many devices of the mesh that is set a matrix is split."""
    return dict(jax.sharding.get_abstract_mesh().shape).get("fsdp", 1)


def is_on_each_device() -> bool:
    """Whether what is traced sees a device's rows and shards only."""
    return bool(jax.sharding.get_abstract_mesh().manual_axes)


def first_row(n_rows: int) -> jax.Array:
    """Where in the batch this device's rows begin."""
    return jnp.int32(n_rows * jax.lax.axis_index(_AXES) if is_on_each_device() else 0)


def n_devices() -> int:
    """Among how many devices the batch is split."""
    return jax.sharding.get_abstract_mesh().size if is_on_each_device() else 1


def mean(x: Any) -> Any:
    """Of a tree of means over a device's rows, the means over all rows."""
    return jax.lax.pmean(x, _AXES) if is_on_each_device() else x


def mean_gradients(gradients: Any, specs: Any) -> Any:
    """As `mean`, of leaves that are shards of sums over fsdp already (see `gathered`), or whole."""
    if not is_on_each_device():
        return gradients

    def add(leaf: jax.Array, spec: PartitionSpec) -> jax.Array:
        axes = ("data",) if "fsdp" in spec else _AXES
        return jax.lax.psum(leaf, axes) / n_devices()

    return jax.tree.map(add, gradients, specs)


def gathered(shard: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    """The parameter of this shape, in this dtype, of which a device holds a shard."""
    axes = [axis for axis, size in enumerate(shape) if size != shard.shape[axis]]
    return _gathered(shard, axes[0], dtype) if axes else shard.astype(dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _gathered(shard: jax.Array, axis: int, dtype: Any) -> jax.Array:
    """It travels in `dtype`, its gradient in the shard's own: sums of many lose bits otherwise."""
    return jax.lax.all_gather(shard.astype(dtype), "fsdp", axis=axis, tiled=True)


def _gathered_forward(shard: jax.Array, axis: int, dtype: Any) -> tuple[jax.Array, jax.Array]:
    return _gathered(shard, axis, dtype), shard[:0]


def _gathered_backward(axis: int, dtype: Any, no_rows: jax.Array, g: jax.Array) -> tuple:
    g = g.astype(no_rows.dtype)
    return (jax.lax.psum_scatter(g, "fsdp", scatter_dimension=axis, tiled=True),)


_gathered.defvjp(_gathered_forward, _gathered_backward)


# ---- where arrays live --------------------------------------------------------------------------


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, WHOLE)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Rows are split over all devices."""
    return NamedSharding(mesh, ROWS)


def specs(tree: Any, fsdp: int) -> Any:
    """How each leaf is split over fsdp devices: a matrix on its largest axis that they divide.

    Vectors stay whole, and a stack of layers is not split on its first axis (Rajbhandari 2020).
    """

    def spec(path: tuple, leaf: Any) -> PartitionSpec:
        names = [getattr(key, "key", "") for key in path]
        is_vector = names[-1:] and names[-1] in ("bias", "scale")
        first = 1 if "trunk" in names else 0
        axes = [axis for axis in range(first, leaf.ndim) if leaf.shape[axis] % fsdp == 0]
        if fsdp == 1 or is_vector or not axes:
            return PartitionSpec()
        axis = max(axes, key=lambda axis: leaf.shape[axis])
        return PartitionSpec(*[None] * axis, "fsdp")

    return jax.tree_util.tree_map_with_path(spec, tree)


def state_sharding(mesh: Mesh, abstract_state: Any) -> Any:
    """`specs` on this mesh."""
    places = specs(abstract_state, mesh.shape["fsdp"])
    return jax.tree.map(lambda spec: NamedSharding(mesh, spec), places)


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
