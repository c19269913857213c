"""Weights, gradients and dropout masks from one framework to the other, by one table."""

import functools
from collections.abc import Iterator, Mapping
from typing import Any

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import torch

from jax_model5.config import ModelConfig

# name in a JAX block, name in a PyTorch block, transposed
BLOCK_LEAVES = [
    ("ln_1/scale", "ln_1.weight", False),
    ("ln_1/bias", "ln_1.bias", False),
    ("attn/qkv/kernel", "attn.qkv.weight", True),
    ("attn/qkv/bias", "attn.qkv.bias", False),
    ("attn/proj/kernel", "attn.proj.weight", True),
    ("attn/proj/bias", "attn.proj.bias", False),
    ("ln_2/scale", "ln_2.weight", False),
    ("ln_2/bias", "ln_2.bias", False),
    ("fc/kernel", "fc.weight", True),
    ("fc/bias", "fc.bias", False),
    ("out/kernel", "out.weight", True),
    ("out/bias", "out.bias", False),
]
ROOT_LEAVES = [
    ("wte", "wte.weight", False),
    ("wpe", "wpe.weight", False),
    ("ln_f/scale", "ln_f.weight", False),
    ("ln_f/bias", "ln_f.bias", False),
]
BLOCK_MASKS = [
    ("attn/drop", "attn.attend"),
    ("attn_drop", "attn_drop"),
    ("mlp_drop", "mlp_drop"),
]


class Mismatch(Exception):
    """A leaf of one model has no counterpart in the other; the message names it."""


def flat(tree: Any) -> dict[str, np.ndarray]:
    """{"trunk/fc/kernel": array, ...}"""
    leaves = flax.traverse_util.flatten_dict(tree, sep="/")
    return {name: np.asarray(leaf) for name, leaf in leaves.items()}


def _table(n_layers: int) -> Iterator[tuple[str, int | None, str, bool]]:
    """JAX leaf, index on its layer axis, PyTorch name, transposed."""
    for ours, theirs, transposed in ROOT_LEAVES:
        yield ours, None, theirs, transposed
    for layer in range(n_layers):
        stack, index = ("last_block", None) if layer == n_layers - 1 else ("trunk", layer)
        for ours, theirs, transposed in BLOCK_LEAVES:
            yield f"{stack}/{ours}", index, f"blocks.{layer}.{theirs}", transposed


def to_torch(tree: Any, n_layers: int) -> dict[str, torch.Tensor]:
    """Parameters (or their gradients) of JAX under PyTorch's names.

    Raises:
      Mismatch: a leaf that the table does not know, or lacks.
    """
    leaves = flat(tree)
    unknown = leaves.keys() ^ {ours for ours, *_ in _table(n_layers)}
    if unknown:
        raise Mismatch(f"leaves without a counterpart: {sorted(unknown)}")
    named = {}
    for ours, index, theirs, transposed in _table(n_layers):
        array = leaves[ours] if index is None else leaves[ours][index]
        named[theirs] = torch.from_numpy(np.array(array.T if transposed else array, order="C"))
    return named


def from_torch(named: Mapping[str, torch.Tensor | None], n_layers: int) -> dict:
    """The inverse of `to_torch`: a nested tree of JAX arrays.

    Raises:
      Mismatch: a tensor that the table does not know, or lacks.
    """
    unknown = named.keys() ^ {theirs for _, _, theirs, _ in _table(n_layers)}
    if unknown:
        raise Mismatch(f"tensors without a counterpart: {sorted(unknown)}")
    layers: dict[str, list[np.ndarray]] = {}
    for ours, _, theirs, transposed in _table(n_layers):
        tensor = named[theirs]
        if tensor is None:
            raise Mismatch(f"{theirs} has no value")
        array = tensor.detach().numpy()
        layers.setdefault(ours, []).append(array.T if transposed else array)
    leaves = {
        name: jnp.asarray(np.stack(arrays) if name.startswith("trunk/") else arrays[0])
        for name, arrays in layers.items()
    }
    return flax.traverse_util.unflatten_dict(leaves, sep="/")


def counterparts(model: torch.nn.Module, n_layers: int) -> dict[str, torch.nn.Parameter]:
    """The module's parameters that have a counterpart in JAX, by PyTorch's names.

    Raises:
      Mismatch: the module lacks one.
    """
    parameters = dict(model.named_parameters())
    names = [theirs for _, _, theirs, _ in _table(n_layers)]
    missing = [name for name in names if parameters.get(name) is None]
    if missing:
        raise Mismatch(f"the PyTorch model lacks {missing}")
    return {name: parameters[name] for name in names}


def load(model: torch.nn.Module, params: Any, n_layers: int) -> None:
    """Copies JAX's parameters into the module. Raises Mismatch where it lacks one."""
    named = to_torch(params, n_layers)
    with torch.no_grad():
        for name, parameter in counterparts(model, n_layers).items():
            parameter.copy_(named[name])


def replay_masks(model: torch.nn.Module, masks: Any, config: ModelConfig) -> None:
    """Hands the masks that JAX recorded to the module's dropout sites.

    On the suffix path JAX's last block has masks of the last N positions only; the positions
    before them cannot reach the loss, so they keep everything.
    """
    sites = dict(model.named_modules())
    for layer in range(config.n_layers):
        names = {"drop": "drop"} | {o: f"blocks.{layer}.{theirs}" for o, theirs in BLOCK_MASKS}
        for ours, mask in masks_of_block(masks, layer, config.n_layers).items():
            sites[names[ours]].mask = torch.from_numpy(_pad_positions(mask, config))


def masks_of_block(masks: Any, layer: int, n_layers: int) -> dict[str, np.ndarray]:
    """The masks of the sites that drop: the embedding's "drop", and a block's `BLOCK_MASKS`."""
    recorded = {name.removesuffix("/keep"): mask for name, mask in flat(masks).items()}
    own = {"drop": recorded["drop"]} if "drop" in recorded else {}
    is_last = layer == n_layers - 1
    stack = "last_block" if is_last else "trunk"
    for site, _ in BLOCK_MASKS if layer < n_layers else []:
        if f"{stack}/{site}" in recorded:
            mask = recorded[f"{stack}/{site}"]
            own[site] = mask if is_last else mask[layer]
    return own


def _pad_positions(mask: np.ndarray, config: ModelConfig) -> np.ndarray:
    padding = [(0, 0)] * mask.ndim
    padding[-2] = (config.seq_len - mask.shape[-2], 0)
    return np.pad(mask, padding, constant_values=True)


def record_masks(variables: Any) -> Any:
    """The `masks` collection as one array a site."""
    join = functools.partial(join_halves, padding=True)
    return jax.tree.map(join, variables["masks"], is_leaf=lambda leaf: isinstance(leaf, tuple))


def join_halves(sown: tuple[jax.Array, ...], padding: float) -> jax.Array:
    """Attention sows one array for each half of its queries; `padding` where no query sees."""
    width = max(mask.shape[-1] for mask in sown)
    padded = [
        jnp.pad(
            mask,
            [(0, 0)] * (mask.ndim - 1) + [(0, width - mask.shape[-1])],
            constant_values=padding,
        )
        for mask in sown
    ]
    return jnp.concatenate(padded, axis=-2)
