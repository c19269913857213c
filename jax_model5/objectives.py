"""Which trailing positions need logits, and the negative log-likelihood on them."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jax_model5.config import TrainConfig
from jax_model5.model import Model5

_ROWS = 1024  # rows of logits [V] that exist at once, about: 206 MB in float32 at V = 50257


def n_last(config: TrainConfig) -> int:
    """N, the trailing positions that get a loss: 1 for final_token (course lesson 018)."""
    positions = {"final_token": 1, "all_tokens": config.model.seq_len, "last_k": config.last_k}
    return positions[config.objective]


def nll(logits_BxNxV: jax.Array, targets_BxN: jax.Array) -> jax.Array:
    """-log_softmax(logits)[target] of each position, in nats, never below float32.

    Every logit equal means every token equally likely, so the NLL is ln V:

    >>> print(nll(jnp.zeros((1, 1, 50257)), jnp.array([[7]])).round(2))
    [[10.82]]
    """
    logits_BxNxV = logits_BxNxV.astype(jnp.promote_types(logits_BxNxV.dtype, jnp.float32))
    target_BxN = jnp.take_along_axis(logits_BxNxV, targets_BxN[..., None], axis=-1)[..., 0]
    return jax.nn.logsumexp(logits_BxNxV, axis=-1) - target_BxN


def window_nll(
    params: dict,
    windows_BxL1: jax.Array,
    config: TrainConfig,
    *,
    n_last: int,
    deterministic: bool,
    dropout_key: jax.Array | None = None,
) -> jax.Array:
    """NLL_BxN of the last N targets of windows [B, L + 1]."""
    model_apply: Callable[..., Any] = Model5(config.model).apply
    apply = functools.partial(model_apply, {"params": params})
    tokens_BxL, targets_BxN = windows_BxL1[:, :-1], windows_BxL1[:, -n_last:]
    rngs = {} if dropout_key is None else {"dropout": dropout_key}
    x_BxNxD = apply(
        tokens_BxL, n_last=n_last, deterministic=deterministic, rngs=rngs, method="features"
    )

    def head_nll(x_BxCxD: jax.Array, targets_BxC: jax.Array) -> jax.Array:
        return nll(apply(x_BxCxD, method="head"), targets_BxC)

    return _in_chunks(head_nll, x_BxNxD, targets_BxN)


def _in_chunks(
    head_nll: Callable[..., jax.Array], x_BxNxD: jax.Array, targets_BxN: jax.Array
) -> jax.Array:
    """Maps over chunks of positions, so that B x N x V logits never exist all at once."""
    B, N, D = x_BxNxD.shape
    C = max(1, _ROWS // B)
    if N <= C:
        return head_nll(x_BxNxD, targets_BxN)
    # Rematerialized: the backward pass computes each chunk's logits again instead of storing them.
    head_nll = jax.checkpoint(head_nll)
    rest = N % C
    x_MxBxCxD = x_BxNxD[:, rest:].reshape(B, -1, C, D).swapaxes(0, 1)
    targets_MxBxC = targets_BxN[:, rest:].reshape(B, -1, C).swapaxes(0, 1)
    nll_MxBxC = jax.lax.map(lambda chunk: head_nll(*chunk), (x_MxBxCxD, targets_MxBxC))
    nll_BxR = nll_MxBxC.swapaxes(0, 1).reshape(B, -1)
    if rest == 0:
        return nll_BxR
    first_BxR = head_nll(x_BxNxD[:, :rest], targets_BxN[:, :rest])
    return jnp.concatenate([first_BxR, nll_BxR], axis=1)
