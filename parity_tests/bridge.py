"""Weights, gradients and dropout masks from one framework to the other, by the table of leaves."""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
import torch

from jax_model5.config import ModelConfig
from jax_model5.trees import from_layout, leaves_of, table, to_layout

BLOCK_MASKS = [
    ("attn/drop", "attn.attend"),
    ("attn_drop", "attn_drop"),
    ("mlp_drop", "mlp_drop"),
]


class Mismatch(Exception):
    """A leaf of one model has no counterpart in the other; the message names it."""


def flat(tree: Any) -> dict[str, np.ndarray]:
    """{"trunk/fc/kernel": array, ...}"""
    return {path: np.asarray(leaf) for path, leaf in leaves_of(tree).items()}


def to_torch(tree: Any, config: ModelConfig) -> dict[str, torch.Tensor]:
    """Parameters (or their gradients) of JAX under PyTorch's names.

    Raises:
      Mismatch: a leaf that the table does not know, or lacks.
    """
    unknown = leaves_of(tree).keys() ^ {place.path for place in table(config, "torch_ref")}
    if unknown:
        raise Mismatch(f"leaves without a counterpart: {sorted(unknown)}")
    named = to_layout(tree, config, "torch_ref")
    return {name: torch.from_numpy(np.array(array, order="C")) for name, array in named.items()}


def from_torch(named: Mapping[str, torch.Tensor], config: ModelConfig) -> dict:
    """The inverse of `to_torch`: a nested tree.

    Raises:
      Mismatch: a tensor that the table does not know, or lacks, or of another shape.
    """
    unknown = named.keys() ^ {place.name for place in table(config, "torch_ref")}
    if unknown:
        raise Mismatch(f"tensors without a counterpart: {sorted(unknown)}")

    def read(name: str) -> np.ndarray:
        return named[name].detach().numpy()

    try:
        return from_layout(read, config, "torch_ref")
    except ValueError as error:
        raise Mismatch(str(error)) from None


def counterparts(model: torch.nn.Module, config: ModelConfig) -> dict[str, torch.nn.Parameter]:
    """The module's parameters that have a counterpart in JAX, by PyTorch's names.

    Raises:
      Mismatch: the module lacks one.
    """
    parameters = dict(model.named_parameters())
    names = [place.name for place in table(config, "torch_ref")]
    missing = [name for name in names if parameters.get(name) is None]
    if missing:
        raise Mismatch(f"the PyTorch model lacks {missing}")
    return {name: parameters[name] for name in names}


def load(model: torch.nn.Module, params: Any, config: ModelConfig) -> None:
    """Copies JAX's parameters into the module. Raises Mismatch where one is gone, or misshapen."""
    named, found = to_torch(params, config), counterparts(model, config)
    for name, parameter in found.items():
        shapes = list(parameter.shape), list(named[name].shape)
        if shapes[0] != shapes[1]:
            raise Mismatch(f"the PyTorch model's {name} is {shapes[0]} and should be {shapes[1]}")
    with torch.no_grad():
        for name, parameter in found.items():
            parameter.copy_(named[name])


def masks_by_site(masks: Any, config: ModelConfig) -> dict[str, np.ndarray]:
    """The masks that JAX recorded, by the paths of PyTorch's modules.

    On the suffix path JAX's last block has masks of the last N positions only; the positions
    before them cannot reach the loss, so they keep everything.
    """
    found = {}
    for layer in range(config.n_layers):
        paths = {"drop": "drop"} | {o: f"blocks.{layer}.{theirs}" for o, theirs in BLOCK_MASKS}
        for ours, mask in masks_of_block(masks, layer, config.n_layers).items():
            found[paths[ours]] = _pad_positions(mask, config)
    return found


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


def record_masks(sown: Any) -> Any:
    """What the `masks` collection holds as one array a site."""
    join = functools.partial(join_halves, padding=True)
    return jax.tree.map(join, sown, is_leaf=lambda leaf: isinstance(leaf, tuple))


def join_halves(sown: tuple[jax.Array, ...], padding: float) -> np.ndarray:
    """Attention sows one array for each half of its queries; `padding` where no query sees."""
    width = max(half.shape[-1] for half in sown)
    padded = [
        np.pad(
            half,
            [(0, 0)] * (half.ndim - 1) + [(0, width - half.shape[-1])],
            constant_values=padding,
        )
        for half in map(np.asarray, sown)
    ]
    return np.concatenate(padded, axis=-2)
