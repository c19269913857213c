"""Sampling text from a trained model by running the window forward again for each token."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jax_model5.config import ModelConfig
from jax_model5.model import Model5


@functools.partial(jax.jit, static_argnames=("config", "n_tokens"))
def continue_windows(
    params: dict,
    key: jax.Array,
    tokens_BxL: jax.Array,
    *,
    config: ModelConfig,
    n_tokens: int,
    temperature: float,
) -> jax.Array:
    """Samples n_tokens after each full window, from softmax(logits / temperature), by re-forward.

    The window slides, so that every token comes from the last position: the one position that the
    final-token objective trains. Returns the new tokens [B, n_tokens].
    """
    apply: Callable[..., Any] = Model5(config).apply

    def next_token(tokens_BxL: jax.Array, step_key: jax.Array) -> tuple[jax.Array, jax.Array]:
        logits_Bx1xV = apply({"params": params}, tokens_BxL, n_last=1, deterministic=True)
        token_B = jax.random.categorical(step_key, logits_Bx1xV[:, 0] / temperature)
        return jnp.concatenate([tokens_BxL[:, 1:], token_B[:, None]], axis=1), token_B

    _, tokens_nxB = jax.lax.scan(next_token, tokens_BxL, jax.random.split(key, n_tokens))
    return tokens_nxB.T
