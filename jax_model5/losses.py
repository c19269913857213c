"""Which trailing positions have a loss, and the loss on their logits."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name, checkpoint_policies

from jax_model5.config import TrainConfig
from jax_model5.kernels import at_least_float32
from jax_model5.model import Model5, applied
from jax_model5.sharding import is_gpu

Loss = Callable[[jax.Array, jax.Array], jax.Array]
"""(logits_BxCxV, targets_BxC) -> loss_BxC, of any number of rows and positions: a device's own."""

ROWS = 1024  # rows of logits [V] on a device at once, about: 206 MB in float32 at V = 50257
_ROWS_OF_A_GPU = 4096  # more fill it, and the head's gradient is added up less often


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
    return _nll(logits_BxCxV.astype(at_least_float32(logits_BxCxV.dtype)), targets_BxC)


@jax.custom_vjp
def _nll(logits_BxCxV: jax.Array, targets_BxC: jax.Array) -> jax.Array:
    """Its backward pass has the sum of each row from the forward pass, rematerialized or not."""
    return _nll_forward(logits_BxCxV, targets_BxC)[0]


def _nll_forward(logits_BxCxV: jax.Array, targets_BxC: jax.Array) -> tuple[jax.Array, tuple]:
    log_sums_BxC = checkpoint_name(jax.nn.logsumexp(logits_BxCxV, axis=-1), "log sums")
    chosen_BxC = jnp.take_along_axis(logits_BxCxV, targets_BxC[..., None], axis=-1)[..., 0]
    return log_sums_BxC - chosen_BxC, (logits_BxCxV, targets_BxC, log_sums_BxC)


def _nll_backward(residuals: tuple, g_BxC: jax.Array) -> tuple[jax.Array, None]:
    logits_BxCxV, targets_BxC, log_sums_BxC = residuals
    p_BxCxV = jnp.exp(logits_BxCxV - log_sums_BxC[..., None])
    is_target_BxCxV = jnp.arange(logits_BxCxV.shape[-1]) == targets_BxC[..., None]
    return g_BxC[..., None] * (p_BxCxV - is_target_BxCxV), None


_nll.defvjp(_nll_forward, _nll_backward)


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
    tokens_BxL, targets_BxN = windows_BxL1[:, :-1], windows_BxL1[:, -n_last:]
    rngs = {} if dropout_key is None else {"dropout": dropout_key}

    def of_model(model: Model5) -> jax.Array:
        x_BxNxD = model.features(tokens_BxL, n_last=n_last, deterministic=deterministic)
        return _in_chunks(lambda x, y: loss(model.logits(x), y), x_BxNxD, targets_BxN)

    return applied(of_model, config.model, params, rngs)


def _in_chunks(
    loss_of_features: Callable[..., jax.Array], x_BxNxD: jax.Array, targets_BxN: jax.Array
) -> jax.Array:
    """Maps over chunks of positions, so that B x N x V logits never exist all at once."""
    B, N, D = x_BxNxD.shape
    C = max(1, (_ROWS_OF_A_GPU if is_gpu() else ROWS) // B)
    if N <= C:
        return loss_of_features(x_BxNxD, targets_BxN)
    # Rematerialized: the backward pass computes each chunk's logits again instead of storing them.
    keep_sums = checkpoint_policies.save_only_these_names("log sums")
    loss_of_features = jax.checkpoint(loss_of_features, policy=keep_sums)
    rest = N % C
    x_MxBxCxD = x_BxNxD[:, rest:].reshape(B, -1, C, D).swapaxes(0, 1)
    targets_MxBxC = targets_BxN[:, rest:].reshape(B, -1, C).swapaxes(0, 1)
    loss_MxBxC = jax.lax.map(lambda chunk: loss_of_features(*chunk), (x_MxBxCxD, targets_MxBxC))
    loss_BxR = loss_MxBxC.swapaxes(0, 1).reshape(B, -1)
    if rest == 0:
        return loss_BxR
    first_BxR = loss_of_features(x_BxNxD[:, :rest], targets_BxN[:, :rest])
    return jnp.concatenate([first_BxR, loss_BxR], axis=1)
