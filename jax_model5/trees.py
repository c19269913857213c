"""Parameters by their paths: select, split, merge, and the one table of leaves of other layouts."""

import fnmatch
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from jax_model5.config import ModelConfig
from jax_model5.errors import UserError


def leaves_of(tree: dict) -> dict[str, Any]:
    """{"trunk/fc/kernel": leaf, ...}; `tree_of` undoes it."""
    return flatten_dict(tree, sep="/")


def tree_of(leaves: dict[str, Any]) -> dict:
    """The inverse of `leaves_of`."""
    return unflatten_dict(leaves, sep="/")


def n_elements(tree: Any) -> int:
    """The number of parameters in a tree."""
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


def n_bytes(tree: Any) -> int:
    """The bytes of a tree of arrays or of their shapes."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def split(params: dict, patterns: Sequence[str], field: str) -> tuple[dict, dict]:
    """The leaves whose path matches one of the patterns, and the others; `merge` undoes it.

    Raises:
      UserError: a pattern matches no leaf; `field` is the key that it was given by.

    >>> split({"wte": 1, "ln_f": {"scale": 2, "bias": 3}}, ["wte", "*/bias"], "optimizer.freeze")
    ({'wte': 1, 'ln_f': {'bias': 3}}, {'ln_f': {'scale': 2}})
    """
    leaves = leaves_of(params)
    matched: dict[str, Any] = {}
    for pattern in patterns:
        found = {path: leaves[path] for path in fnmatch.filter(leaves, pattern)}
        if not found:
            text = f"{pattern!r} is no parameter; they are {', '.join(leaves)}"
            raise UserError(f"{field}={' '.join(patterns)!r}: {text}")
        matched |= found
    others = {path: leaf for path, leaf in leaves.items() if path not in matched}
    return tree_of(matched), tree_of(others)


def merge(params: dict, others: dict) -> dict:
    """One tree of the leaves of two; those of `others` win."""
    return tree_of(leaves_of(params) | leaves_of(others))


def blocks_of(trunk: dict, last: dict) -> list[dict]:
    """The parameters of each block of the trunk, a stack or lists of layers, and the last one's."""
    depth = len(trunk["ln_1"]["scale"]) if trunk else 0
    cut = [
        jax.tree.map(lambda leaf, i=i: leaf[i], trunk, is_leaf=lambda leaf: isinstance(leaf, list))
        for i in range(depth)
    ]
    return [*cut, last]


def in_place(leaf: jax.Array) -> jax.Array:
    """Another handle on what is on one CPU: to donate the leaf does not delete it."""
    (device,) = leaf.devices()
    return jax.device_put(np.asarray(leaf), device, may_alias=True)


def layers_in_place(leaf: jax.Array) -> list[jax.Array]:
    """The same of each layer of a stacked leaf; one that is not aligned is copied."""
    (device,) = leaf.devices()
    return [jax.device_put(layer, device, may_alias=True) for layer in np.asarray(leaf)]


# ---- the same weights in other layouts ----------------------------------------------------------

# Our leaf of a block, its shape, GPT-2's tensor of h.0, h.1, ... and torch_ref's of blocks.0, ...
# GPT-2's Conv1D keeps its kernel [in, out] as Flax does; torch.nn.Linear, in torch_ref, [out, in].
BLOCK_LEAVES = [
    ("ln_1/scale", "D", "ln_1.weight", "ln_1.weight"),
    ("ln_1/bias", "D", "ln_1.bias", "ln_1.bias"),
    ("attn/qkv/kernel", "D 3D", "attn.c_attn.weight", "attn.qkv.weight"),
    ("attn/qkv/bias", "3D", "attn.c_attn.bias", "attn.qkv.bias"),
    ("attn/proj/kernel", "D D", "attn.c_proj.weight", "attn.proj.weight"),
    ("attn/proj/bias", "D", "attn.c_proj.bias", "attn.proj.bias"),
    ("ln_2/scale", "D", "ln_2.weight", "ln_2.weight"),
    ("ln_2/bias", "D", "ln_2.bias", "ln_2.bias"),
    ("fc/kernel", "D 4D", "mlp.c_fc.weight", "fc.weight"),
    ("fc/bias", "4D", "mlp.c_fc.bias", "fc.bias"),
    ("out/kernel", "4D D", "mlp.c_proj.weight", "out.weight"),
    ("out/bias", "D", "mlp.c_proj.bias", "out.bias"),
]
ROOT_LEAVES = [
    ("wte", "V D", "wte.weight", "wte.weight"),
    ("wpe", "L D", "wpe.weight", "wpe.weight"),
    ("ln_f/scale", "D", "ln_f.weight", "ln_f.weight"),
    ("ln_f/bias", "D", "ln_f.bias", "ln_f.bias"),
    ("head", "V D", "lm_head.weight", "head.weight"),  # only where it is not tied to wte
]
Layout = Literal["gpt2", "torch_ref"]


class Place(NamedTuple):
    """One tensor on both sides."""

    path: str
    layer: int | None  # index on our leaf's first axis
    name: str
    shape: tuple[int, ...]  # here; there, where `transposed`, the other way round
    transposed: bool


def table(config: ModelConfig, layout: Layout) -> Iterator[Place]:
    """Every tensor of the layout, and the leaf, or the layer of a leaf, that it is here."""
    D, last = config.d_model, config.n_layers - 1
    sizes = {"V": config.vocab_size, "L": config.seq_len, "D": D, "3D": 3 * D, "4D": 4 * D}

    def place(row: tuple, stack: str = "", layer: int | None = None, block: str = "") -> Place:
        path, letters, *names = row
        name = block + names[layout == "torch_ref"]
        shape = tuple(sizes[letter] for letter in letters.split())
        is_linear = path.endswith("kernel")
        return Place(stack + path, layer, name, shape, is_linear and layout == "torch_ref")

    for row in ROOT_LEAVES:
        if row[0] != "head" or not config.tied_head:
            yield place(row)
    for i in range(config.n_layers):
        stack, layer = ("last_block/", None) if i == last else ("trunk/", i)
        for row in BLOCK_LEAVES:
            yield place(row, stack, layer, f"{'h' if layout == 'gpt2' else 'blocks'}.{i}.")


def to_layout(params: dict, config: ModelConfig, layout: Layout) -> dict[str, np.ndarray]:
    """Parameters (or their gradients) under the layout's names, without a copy."""
    leaves = {path: np.asarray(leaf) for path, leaf in leaves_of(params).items()}
    named = {}
    for path, layer, name, _, transposed in table(config, layout):
        array = leaves[path] if layer is None else leaves[path][layer]
        named[name] = array.T if transposed else array
    return named


def from_layout(read: Callable[[str], np.ndarray], config: ModelConfig, layout: Layout) -> dict:
    """The inverse of `to_layout`: our tree; `read` gives the tensor of a name, one at a time.

    Raises ValueError where a tensor has another shape.
    """
    dtype, depth = jnp.promote_types(config.dtype, jnp.float32), config.n_layers - 1
    leaves: dict[str, np.ndarray] = {}
    for path, layer, name, shape, transposed in table(config, layout):
        if path not in leaves:
            leaves[path] = np.empty(shape if layer is None else (depth, *shape), dtype)
        array = read(name).T if transposed else read(name)
        if array.shape != shape:
            raise ValueError(f"{name} is {list(array.shape)} and should be {list(shape)}")
        leaves[path][... if layer is None else layer] = array
    return tree_of(leaves)
