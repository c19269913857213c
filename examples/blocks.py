"""What model5.py and gpt2.py share: Model 5 in JAX, and the tables of its blocks."""

import dataclasses

import numpy as np

from jax_model5 import model, step
from jax_model5.config import TrainConfig

INPUTS = {"attn/proj": "attention", "ln_2": "residual", "out": "gelu"}
CHANGED: dict = {}
"""Fields of the configuration that a fault changes on the JAX side."""


def apply(config, params, tokens_BxL, key, deterministic):
    config = dataclasses.replace(config, dtype=params["wte"].dtype.name, **CHANGED)
    n_last, rngs = tokens_BxL.shape[1], {"dropout": key}
    return model.Model5(config).apply(
        {"params": params}, tokens_BxL, n_last=n_last, deterministic=deterministic, rngs=rngs
    )


def shapes(config):
    return step.abstract_state(TrainConfig(model=config)).params


def merge_heads(x_BxHxLxK):
    B, H, L, K = x_BxHxLxK.shape
    return x_BxHxLxK.swapaxes(1, 2).reshape(B, L, H * K)


def join_halves(masks):
    """Model 5 drops of each half of the queries by itself; what a query cannot see is kept."""
    L = max(mask.shape[-1] for mask in masks)
    wide = [(0, 0), (0, 0), (0, 0)]
    masks = [np.pad(m, [*wide, (0, L - m.shape[-1])], constant_values=1) for m in masks]
    return np.concatenate(masks, axis=2)


def tables(n_layers, block, modules, sites, qkv, T=""):
    """Leaves, taps and masks of the blocks: a scanned trunk, and the last one by itself."""
    leaves, taps, masks = [], [], []
    last = n_layers - 1
    for i, ours in [("{i}", "trunk/")] * (last > 0) + [(last, "last_block/")]:
        theirs, name = f"{block}.{i}.", f"block {i}: "
        for module, path in modules.items():
            weight = "scale" if module.startswith("ln") else f"kernel{T}"
            leaves.append((f"{theirs}{path}.weight", f"{ours}{module}/{weight}"))
            leaves.append((f"{theirs}{path}.bias", f"{ours}{module}/bias"))
            if module in INPUTS:
                taps.append((name + INPUTS[module], f"{theirs}{path}:in0", f"{ours}{module}:in0"))
            if module != "attn/qkv":
                taps.append((name + module, theirs + path, ours + module))
        for n, part in enumerate("qkv"):
            place = f"{theirs}{qkv}:in{n}", f"{ours}attn/qkv:out{n}"
            taps.append((name + part, *place, merge_heads))
        for site, path in sites.items():
            join = [join_halves] * (site == "attn/drop")
            masks.append((theirs + path, ours + site, *join))
    return leaves, taps, masks
