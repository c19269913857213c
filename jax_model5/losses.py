"""Which trailing positions have a loss, and the loss on their logits."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jax_model5.config import TrainConfig
from jax_model5.kernels import at_least_float32
from jax_model5.model import Model5
from jax_model5.sharding import rows_of_a_device

Loss = Callable[[jax.Array, jax.Array], jax.Array]
"""(logits_BxCxV, targets_BxC) -> loss_BxC, of any number C of positions."""

_ROWS = 1024  # rows of logits [V] on a device at once, about: 206 MB in float32 at V = 50257


def n_last(config: TrainConfig) -> int:
    """N, the trailing positions that have a loss: 1 for final_token (course lesson 018)."""
    positions = {"final_token": 1, "all_tokens": config.model.seq_len, "last_k": config.last_k}
    return positions[config.objective]


def nll(logits_BxCxV: jax.Array, targets_BxC: jax.Array) -> jax.Array:
    """-log_softmax(logits)[target] of each position, in nats, never below float32.

    Every logit equal means every token equally likely, so the NLL is ln V:

    >>> print(nll(jnp.zeros((1, 1, 50257)), jnp.array([[7]])).round(2))
    [[10.82]]
    """
    logits_BxCxV = logits_BxCxV.astype(at_least_float32(logits_BxCxV.dtype))
    return optax.softmax_cross_entropy_with_integer_labels(logits_BxCxV, targets_BxC)


def position_losses(
    params: dict,
    windows_BxL1: jax.Array,
    config: TrainConfig,
    *,
    n_last: int,
    deterministic: bool,
    loss: Loss = nll,
    dropout_key: jax.Array | None = None,
) -> jax.Array:
    """The loss_BxN on the last N targets of windows [B, L + 1]."""
    model_apply: Callable[..., Any] = Model5(config.model).apply
    apply = functools.partial(model_apply, {"params": params})
    tokens_BxL, targets_BxN = windows_BxL1[:, :-1], windows_BxL1[:, -n_last:]
    rngs = {} if dropout_key is None else {"dropout": dropout_key}
    x_BxNxD = apply(
        tokens_BxL, n_last=n_last, deterministic=deterministic, rngs=rngs, method="features"
    )

    def loss_of_features(x_BxCxD: jax.Array, targets_BxC: jax.Array) -> jax.Array:
        return loss(apply(x_BxCxD, method="logits"), targets_BxC)

    return _in_chunks(loss_of_features, x_BxNxD, targets_BxN)


def _in_chunks(
    loss_of_features: Callable[..., jax.Array], x_BxNxD: jax.Array, targets_BxN: jax.Array
) -> jax.Array:
    """Maps over chunks of positions, so that B x N x V logits never exist all at once."""
    B, N, D = x_BxNxD.shape
    C = max(1, _ROWS // rows_of_a_device(B))
    if N <= C:
        return loss_of_features(x_BxNxD, targets_BxN)
    # Rematerialized: the backward pass computes each chunk's logits again instead of storing them.
    loss_of_features = jax.checkpoint(loss_of_features)
    rest = N % C
    x_MxBxCxD = x_BxNxD[:, rest:].reshape(B, -1, C, D).swapaxes(0, 1)
    targets_MxBxC = targets_BxN[:, rest:].reshape(B, -1, C).swapaxes(0, 1)
    loss_MxBxC = jax.lax.map(lambda chunk: loss_of_features(*chunk), (x_MxBxCxD, targets_MxBxC))
    loss_BxR = loss_MxBxC.swapaxes(0, 1).reshape(B, -1)
    if rest == 0:
        return loss_BxR
    first_BxR = loss_of_features(x_BxNxD[:, :rest], targets_BxN[:, :rest])
    return jnp.concatenate([first_BxR, loss_BxR], axis=1)
