"""The lessons' Model 1 (lessons/06_model1.py), in Flax and in PyTorch: an embedding, GELU, a head.

python examples/model1.py [--fault NAME] [--html FILE]
"""

from unittest import mock

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
import torch

import portproof

V, D = 53, 11


class Model1(nn.Module):
    @nn.compact
    def __call__(self, tokens_BxL):
        x_BxLxD = nn.Embed(V, D, name="embed")(tokens_BxL)
        x_BxLxD = portproof.tap("gelu", nn.gelu(x_BxLxD, approximate=False))
        return nn.Dense(V, name="head")(x_BxLxD)


def apply(params, tokens_BxL, key, deterministic):
    return Model1().apply({"params": params}, tokens_BxL)


def port():
    return portproof.Port(
        torch_model=lambda: torch.nn.Sequential(
            torch.nn.Embedding(V, D), torch.nn.GELU(), torch.nn.Linear(D, V)
        ),
        jax_model=apply,
        params=jax.eval_shape(Model1().init, jax.random.key(0), jnp.zeros((1, 1), int))["params"],
        leaves=[
            ("0.weight", "embed/embedding"),
            ("2.weight", "head/kernel.T"),
            ("2.bias", "head/bias"),
        ],
        taps=[("embedding", "0", "embed"), ("gelu", "1", "gelu"), ("head", "2", "head")],
        batch=portproof.tokens(3, 9, vocab=V),
        optimizers=(
            optax.adamw(1e-3),
            lambda m: torch.optim.AdamW(m.parameters(), 1e-3, weight_decay=1e-4),
        ),
    )


gelu = nn.gelu
FAULTS = {
    "tanh": lambda: mock.patch.object(nn, "gelu", lambda x, approximate: gelu(x)),
    "no gradient": lambda: mock.patch.object(
        nn, "gelu", lambda x, approximate: gelu(jax.lax.stop_gradient(x), approximate=False)
    ),
    "decay": lambda: mock.patch.object(optax, "adamw", lambda lr: optax.adam(lr)),
}

if __name__ == "__main__":
    portproof.main(port, FAULTS)
