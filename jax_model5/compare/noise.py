"""Gradient noise of one state of a run: how far the gradients of its batches scatter, unbiased.

McCandlish et al. 2018, "An Empirical Model of Large-Batch Training". Course lesson 018 calls the
loss on the final token alone a "signal reduction" of about 256: the `Estimate` of one objective
divided by that of the other, on the same windows, is that factor as measured.
"""

import dataclasses
import functools
import math
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np

from jax_model5.config import TrainConfig
from jax_model5.errors import UserError
from jax_model5.losses import n_last, position_losses
from jax_model5.optimizer import split_frozen
from jax_model5.trees import merge

# ---- statistics ---------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, eq=False)
class Estimate:
    """A number from M batches, and the same number from all of them but one, M times."""

    value: float
    without_M: np.ndarray = dataclasses.field(repr=False)

    @property
    def error(self) -> float:
        """Standard error by the jackknife, in the value's unit; biased upward if at all.

        Of `squared_norm` it is up to sqrt(2) too large where noise is all there is to see
        (Efron & Stein 1981, "The Jackknife Estimate of Variance"). On average, that is: where a
        few windows hold most of the trace, one sample can miss them, in the value and the error.
        """
        return math.sqrt((len(self.without_M) - 1) * self.without_M.var())

    def __truediv__(self, other: "Estimate") -> "Estimate":
        """The ratio of two numbers from the same M batches; its error knows their correlation.

        The ratio of two unbiased numbers is not unbiased: it is too large by about the square of
        the divisor's relative error. Of use only where the divisor is many errors away from 0.
        """
        with np.errstate(divide="ignore", invalid="ignore"):
            value = float(np.float64(self.value) / np.float64(other.value))
            return Estimate(value, self.without_M / other.without_M)


@dataclasses.dataclass(frozen=True, eq=False)
class Noise:
    """What M gradients of `batch_size` sequences each tell about the gradient of one sequence."""

    trace: Estimate
    """tr(Sigma), trace of the covariance of one sequence's gradient [gradient units²]."""
    squared_norm: Estimate
    """‖G‖², squared norm of the true gradient; can be negative where small [gradient units²]."""
    n_batches: int
    """M [batches]."""
    batch_size: int
    """b, sequences in each of them [sequences]."""

    @property
    def scale(self) -> Estimate:
        """B = tr(Sigma) / ‖G‖², the simple noise scale [sequences]."""
        return self.trace / self.squared_norm

    def as_dict(self) -> dict[str, float]:
        """Every number and its standard error, flat, for a table or JSON."""
        numbers: dict[str, float] = {"n_batches": self.n_batches, "batch_size": self.batch_size}
        for name in ("trace", "squared_norm", "scale"):
            estimate: Estimate = getattr(self, name)
            numbers |= {name: estimate.value, f"{name}_error": estimate.error}
        return numbers


def estimate(squares_M: np.ndarray, dots_M: np.ndarray, batch_size: int) -> Noise:
    """Noise from ‖g_i‖² and g_i · mean(g) of M >= 3 i.i.d. gradients of `batch_size` sequences.

    Three gradients of one parameter, 1, 3 and 5: their mean is 3, their variance 4.

    >>> noise = estimate(np.array([1.0, 9.0, 25.0]), np.array([3.0, 9.0, 15.0]), batch_size=1)
    >>> print(f"{noise.trace.value:.2f} {noise.squared_norm.value:.2f}")
    4.00 7.67
    """
    M = len(squares_M)
    square, square_of_mean = squares_M.mean(), dots_M.mean()  # Σ g_i · mean(g) is M |mean(g)|²
    squares_without_M = (M * square - squares_M) / (M - 1)
    of_means_without_M = (M**2 * square_of_mean - 2 * M * dots_M + squares_M) / (M - 1) ** 2
    whole = unbiased(square, square_of_mean, batch_size, M * batch_size)
    without = unbiased(squares_without_M, of_means_without_M, batch_size, (M - 1) * batch_size)
    trace, squared_norm = (
        Estimate(float(value), without_M) for value, without_M in zip(whole, without, strict=True)
    )
    return Noise(trace, squared_norm, M, batch_size)


def unbiased(
    small_square: np.ndarray, big_square: np.ndarray, small: int, big: int
) -> tuple[np.ndarray, np.ndarray]:
    """tr(Sigma) and ‖G‖² from squared norms of gradients of `small` and of `big` sequences.

    E‖g_B‖² = ‖G‖² + tr(Sigma) / B, solved for both at two sizes B (Appendix A.1 of the paper).
    """
    trace = (small_square - big_square) / (1 / small - 1 / big)
    squared_norm = (big * big_square - small * small_square) / (big - small)
    return trace, squared_norm


# ---- gradients ----------------------------------------------------------------------------------


def measure(
    params: dict, windows_RxL1: np.ndarray, config: TrainConfig, *, batch_size: int
) -> Noise:
    """Noise of the gradient of the config's objective, from R windows in batches of batch_size.

    The windows must be i.i.d., as `train_batch` draws them under data.sampling=random. Dropout is
    off, so that all scatter comes from the data, as in the paper.

    Two passes, because the gradients themselves (each as large as the parameters) are not kept.

    Raises:
      UserError: the windows are no whole number of batches, or fewer than 3 of them.
    """
    R = len(windows_RxL1)
    if batch_size < 1 or R % batch_size or R // batch_size < 3:
        raise UserError(f"batch_size={batch_size}: must divide {R} windows into 3 batches or more")
    batches_MxBxL1 = windows_RxL1.reshape(-1, batch_size, windows_RxL1.shape[1])

    def gradients() -> Iterator[dict]:
        for windows_BxL1 in batches_MxBxL1:
            # Waits, because calls that run ahead would each hold a gradient.
            yield jax.block_until_ready(_gradient(params, windows_BxL1, config=config))

    total = functools.reduce(_add, gradients())
    M = len(batches_MxBxL1)
    products = [(_inner(g, g), _inner(g, total) / M) for g in gradients()]
    squares_M, dots_M = np.array(products).T
    return estimate(squares_M, dots_M, batch_size)


@functools.partial(jax.jit, static_argnames="config")
def _gradient(params: dict, windows_BxL1: jax.Array, *, config: TrainConfig) -> dict:
    """Gradient of the batch's mean NLL, of the parameters that are not frozen."""
    moving, frozen = split_frozen(params, config.optimizer)

    def loss(moving: dict) -> jax.Array:
        params, n = merge(moving, frozen), n_last(config)
        return position_losses(params, windows_BxL1, config, n_last=n, deterministic=True).mean()

    return jax.grad(loss)(moving)


@functools.partial(jax.jit, donate_argnums=0)
def _add(total: dict, gradient: dict) -> dict:
    return jax.tree.map(jnp.add, total, gradient)


def _inner(a: dict, b: dict) -> float:
    """Inner product of two trees: rows in the leaves' own precision, their sum in float64.

    In float32, at the full width of Model 5, off by 2e-9 ‖a‖ ‖b‖ (measured on a CPU).
    """
    rows = jax.device_get(_inner_rows(a, b))
    return math.fsum(leaf.sum(dtype=np.float64) for leaf in jax.tree.leaves(rows))


@jax.jit
def _inner_rows(a: dict, b: dict) -> dict:
    # No matrix product: a GPU would round its factors to TF32.
    return jax.tree.map(lambda x, y: (x * y).sum(-1), a, b)
