"""A classifier in Flax Linen, and the same of PyTorch's own nn.TransformerEncoder.

python examples/encoder.py [--fault NAME] [--html FILE]
"""

from unittest import mock

import encoder_linen
import jax
import numpy as np
import optax
import torch
from encoder_linen import RATE, C, D, F, H, N, V

import portproof

TOKENS, LABELS = portproof.tokens(3, 7, vocab=V), portproof.tokens(3, vocab=C)
PADDING = np.arange(7) >= np.array([[7], [4], [5]])
BATCH = {"tokens": TOKENS, "padding": PADDING, "labels": LABELS}
JAX_MODEL, THEIRS, OURS = encoder_linen.Classifier(), "encoder.layers.{i}.", "layer_{i}/"


class Classifier(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.head = torch.nn.Embedding(V, D), torch.nn.Linear(D, C)
        layer = torch.nn.TransformerEncoderLayer(D, H, F, RATE, batch_first=True)
        self.encoder = torch.nn.TransformerEncoder(layer, N, enable_nested_tensor=False)

    def forward(self, batch):
        x_BxLxD = self.embed(batch["tokens"])
        return self.head(self.encoder(x_BxLxD, src_key_padding_mask=batch["padding"])[:, 0])


def apply(params, batch, key, deterministic):
    return JAX_MODEL.apply({"params": params}, batch, deterministic, rngs={"dropout": key})


def leaves(theirs, ours, weight="kernel.T"):
    return [(f"{theirs}weight", f"{ours}/{weight}"), (f"{theirs}bias", f"{ours}/bias")]


def port():
    return portproof.Port(
        torch_model=Classifier,
        jax_model=apply,
        params=jax.eval_shape(JAX_MODEL.init, jax.random.key(0), BATCH)["params"],
        leaves=[
            ("embed.weight", "embed/embedding"),
            *leaves(THEIRS + "self_attn.in_proj_", OURS + "qkv"),
            *leaves(THEIRS + "self_attn.out_proj.", OURS + "out"),
            *(row for n in "12" for row in leaves(f"{THEIRS}linear{n}.", f"{OURS}linear{n}")),
            *(row for n in "12" for row in leaves(f"{THEIRS}norm{n}.", f"{OURS}norm{n}", "scale")),
            *leaves("head.", "head"),
        ],
        taps=[
            ("layer {i}: q", THEIRS + "self_attn>scaled_dot_product_attention:in0", "q"),
            ("layer {i}: attention", THEIRS + "self_attn:out0", OURS + "out"),
            ("layer {i}: norm 1", THEIRS + "norm1", OURS + "norm1"),
            ("layer {i}: ReLU", THEIRS + "linear2:in0", OURS + "linear2:in0"),
            ("layer {i}: output", "encoder.layers.{i}", "layer_{i}"),
        ],
        masks=[(THEIRS + s, OURS + s) for s in ("self_attn", "dropout1", "dropout", "dropout2")],
        batch=BATCH,
        losses=(
            lambda x, b: optax.softmax_cross_entropy_with_integer_labels(x, b["labels"]).mean(),
            lambda x, b: torch.nn.functional.cross_entropy(x, b["labels"]),
        ),
        optimizers=(optax.sgd(0.1, 0.9), lambda m: torch.optim.SGD(m.parameters(), 0.1, 0.9)),
    )


FAULTS = {
    "epsilon": lambda: mock.patch.object(encoder_linen, "EPSILON", 1e-6),
    "padding": lambda: mock.patch.object(encoder_linen, "HIDDEN", 0.0),
    "rate": lambda: mock.patch.object(encoder_linen, "RATE", RATE / 2),
}

if __name__ == "__main__":
    portproof.main(port, FAULTS)
