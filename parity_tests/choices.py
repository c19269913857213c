"""Five more small configurations, so that any two of a user's choices meet in one of the six.

A fault that shows only where two choices meet (a head of its own, and its logits scaled) is not
hidden by a third one that is always made with them.
"""

import dataclasses
import itertools
from collections.abc import Iterator
from typing import Any

from jax_model5.config import TrainConfig

# What the first configuration (the report's own) does not choose; where several stand, in turn.
OTHERS: dict[str, list[dict[str, Any]]] = {
    "objective": [{"objective": "final_token"}, {"objective": "all_tokens"}],
    "accumulate": [{"accumulate": 1}, {"accumulate": 2}],
    "model.n_layers": [{"n_layers": 1}, {"n_layers": 6}, {"n_layers": 2}],
    "model.gelu": [{"gelu": "tanh"}],
    "model.tied_head": [{"tied_head": False}],
    "model.scale_logits": [{"scale_logits": False}],
    "model.remat": [{"remat": "none"}, {"remat": "full"}],
    "model.dropout": [
        {"dropout": 0.25, "dropout_sites": ("embedding", "attention")},
        {"dropout": 0.2, "dropout_sites": ("attention_output", "mlp")},
        {"dropout": 0.0},
    ],
    "optimizer.clip_norm": [{"clip_norm": 0.0}],
    "optimizer.freeze": [
        {"freeze": ("wpe", "last_block/attn/*")},
        {"freeze": ("wte", "*/bias")},
        {"freeze": ("last_block/ln_?/scale",)},
    ],
}
# In which of the five each stands: three of them, no two alike. Any two such sets meet, and each
# has one that the other lacks (Kleitman and Spencer 1973); where neither stands is the first.
ROWS = dict(zip(OTHERS, itertools.combinations(range(5), 3), strict=True))
SIZES = [(21, 3, 8), (10, 1, 11), (30, 3, 9), (28, 4, 8), (24, 3, 10)]  # D, H, L of each


def others(config: TrainConfig) -> Iterator[TrainConfig]:
    """The five, each of two steps after one of warm-up."""
    for row, sizes in enumerate(SIZES):
        fields: dict[str, Any] = {
            "model": dict(zip(("d_model", "n_heads", "seq_len"), sizes, strict=True)),
            "optimizer": {"warmup_steps": 1},
            # 6 is divisible by 1, 2 and 3 micro-batches; of seed 0 the last rounds by 3e-13.
            "": {"steps": 3, "batch_size": 6, "seed": 7},
        }
        for choice, rows in ROWS.items():
            if row in rows:
                made = OTHERS[choice][rows.index(row) % len(OTHERS[choice])]
                fields[choice.rpartition(".")[0]].update(made)
        model = dataclasses.replace(config.model, **fields["model"])
        update = dataclasses.replace(config.optimizer, **fields["optimizer"])
        yield dataclasses.replace(config, model=model, optimizer=update, **fields[""])


def words(config: TrainConfig, first: TrainConfig) -> str:
    """Its choices, of which `first` makes the other: "objective=final_token, gelu=tanh"."""
    parts = ((config, first), (config.model, first.model), (config.optimizer, first.optimizer))
    names = (name for others in OTHERS.values() for name in others[0])
    return ", ".join(
        f"{name}={getattr(ours, name)}"
        for name in names
        for ours, theirs in parts
        if hasattr(ours, name) and getattr(ours, name) != getattr(theirs, name)
    )
