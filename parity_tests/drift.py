"""Bug or rounding? Both frameworks train from one start, and float64 shows what rounding does."""

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np

from jax_model5 import step
from jax_model5.config import TrainConfig
from parity_tests import ladder

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SIDES = ("JAX", "PyTorch")
_DISTANCES = {
    "JAX and PyTorch, float32": ("JAX float32", "PyTorch float32"),
    "JAX and PyTorch, float64": ("JAX float64", "PyTorch float64"),
    "JAX, float32 and float64": ("JAX float32", "JAX float64"),
    "PyTorch, float32 and float64": ("PyTorch float32", "PyTorch float64"),
}

# Of chance: JAX's own rounding was 0.9 to 2.6 times PyTorch's in runs of 200 and 40 steps, and the
# distance in float64 0.8 of what float32's rounding foretells.
_MARGIN = 4.0
_UPDATE = dataclasses.replace(ladder.ADAMW, clip_norm=0.5)
_FINER = 2.0**-29  # float64's rounding over float32's
_LAST_BITS = 8 * 2.0**-52  # of a loss near 4 nats, from one operation or two


@dataclasses.dataclass(frozen=True)
class Drift:
    """Distances after each step, of the losses [nats] and of all parameters (relative)."""

    dropout: float
    loss: dict[str, np.ndarray]
    parameters: dict[str, np.ndarray]

    @property
    def is_rounding(self) -> bool:
        """In float64 the frameworks agree as rounding foretells; in float32 both round alike.

        How far they part in float32 tells nothing: a mistake there widens its own band.
        """
        ours, theirs = (np.max(self.parameters[f"{side}, float32 and float64"]) for side in SIDES)
        return max(ours, theirs) <= _MARGIN * min(ours, theirs) and all(
            np.max(distances["JAX and PyTorch, float64"])
            <= max(_MARGIN * _FINER * np.max(band(distances)), floor)
            for distances, floor in ((self.loss, 2 * _LAST_BITS), (self.parameters, 0.0))
        )

    def __str__(self) -> str:
        last = {name: values[-1] for name, values in self.parameters.items()}
        verdict = "rounding" if self.is_rounding else "A BUG"
        return (
            f"drift over {len(band(self.loss))} steps, dropout {self.dropout:g}: the parameters of "
            f"JAX and PyTorch are {last['JAX and PyTorch, float32']:.1e} apart in float32 and "
            f"{last['JAX and PyTorch, float64']:.1e} in float64; rounding alone moves JAX by "
            f"{last['JAX, float32 and float64']:.1e} and PyTorch by "
            f"{last['PyTorch, float32 and float64']:.1e}: {verdict}"
        )


def band(distances: dict[str, np.ndarray]) -> np.ndarray:
    """What rounding alone can do: the sum of both sides' distances from float64."""
    return distances["JAX, float32 and float64"] + distances["PyTorch, float32 and float64"]


def measure(config: TrainConfig, n_steps: int, dropout: float) -> Drift:
    """N steps of both frameworks, in float32 and in float64 from the same weights and batches.

    Of two layers, on whole batches, to be quick.
    """
    model = dataclasses.replace(config.model, dropout=dropout, n_layers=2)
    config = dataclasses.replace(
        config, model=model, steps=n_steps, batch_size=3, accumulate=1, optimizer=_UPDATE
    )
    runs = {dtype: ladder.train_both(_pair(config, dtype)) for dtype in ladder.DTYPES}
    losses: dict[str, list[float]] = {name: [] for name in _DISTANCES}
    parameters: dict[str, list[float]] = {name: [] for name in _DISTANCES}
    for _ in range(n_steps):
        now = {}
        for dtype, run in runs.items():
            with ladder.exactly(dtype):
                ours, theirs = next(run)
            now |= {f"JAX {dtype}": _flat(ours), f"PyTorch {dtype}": _flat(theirs)}
        for name, (a, b) in _DISTANCES.items():
            losses[name].append(abs(now[a][0] - now[b][0]))
            parameters[name].append(ladder.relative(now[a][1], now[b][1]))
    as_arrays = [{k: np.array(v) for k, v in part.items()} for part in (losses, parameters)]
    return Drift(config.model.dropout, *as_arrays)


def _flat(side: ladder.Trained) -> tuple[float, np.ndarray]:
    """The loss, and all parameters as one vector."""
    leaves = ladder.without_keys_bias(side.params)
    vector = np.concatenate([leaves[name].ravel() for name in sorted(leaves)])
    return float(side.metrics["loss"]), vector


def _pair(config: TrainConfig, dtype: str) -> ladder.Pair:
    """Both models at the course's init, which both dtypes share."""
    exact, own = (
        dataclasses.replace(config, model=dataclasses.replace(config.model, dtype=d))
        for d in ("float64", dtype)
    )
    with ladder.exactly("float64"):
        params = step.init_state(jax.random.key(config.seed), config=exact).params
    with ladder.exactly(dtype):
        params = jax.tree.map(lambda leaf: jnp.asarray(np.asarray(leaf), dtype), params)
        return ladder.Pair(own, params=params)


def plot(drifts: Sequence[Drift]) -> "Figure":
    """Distances after each step, and the band that rounding alone explains."""
    from matplotlib.figure import Figure  # a second to import, of a report that takes thirty

    figure = Figure(figsize=(10, 6), layout="constrained")
    axes = figure.subplots(2, len(drifts), sharex=True, sharey="row", squeeze=False)
    for column, drift in enumerate(drifts):
        axes[0, column].set_title(f"dropout {drift.dropout:g}")
        for row, (what, distances) in enumerate(
            (("loss distance [nats]", drift.loss), ("parameter distance", drift.parameters))
        ):
            axis, steps = axes[row, column], np.arange(1, len(band(distances)) + 1)
            axis.fill_between(
                steps, band(distances), 1e-18, color="0.85", label="rounding of float32"
            )
            for name, color in (("float32", "C0"), ("float64", "C1")):
                axis.plot(steps, distances[f"JAX and PyTorch, {name}"], color, label=f"{name}")
            axis.set_yscale("log")
            axis.set_ylabel(what if column == 0 else "")
            axis.set_xlabel("optimizer step" if row else "")
    axes[0, 0].legend(title="JAX and PyTorch")
    return figure
