"""The ladder: leaves, taps forward, loss, taps backward, gradients, updates, dropout, the modes."""

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
import torch

from portproof.jax_side import JaxSide
from portproof.leaves import flat, table
from portproof.port import BadInput, Pass, Port, Stopped, nearest, numbers
from portproof.report import FLOAT64_TOLERANCE, Report, Row, own_rounding, relative
from portproof.torch_side import Share, TorchSide

LANDINGS = ("1 leaves", "5 gradients", "6 updates", "7 dropout, gradients")
DEVIATIONS = 5.0
"""How many standard deviations a share of dropped elements may be from the rate."""


@dataclasses.dataclass(frozen=True)
class Tap:
    """A row of the table, spelled out; `call` counts where JAX's side is stacked."""

    name: str
    torch: str
    jax: str
    call: int
    function: Callable | None


def spelled(rows: Sequence[tuple], paths: Iterable[str]) -> list[Tap]:
    """The rows of taps or masks with every `{i}` spelled out; masks have no name of their own."""

    def module(place: str) -> str:
        return place.partition(":")[0].partition(">")[0]

    paths = list(paths)
    places = {row[1] for row in rows}
    found = []
    for name, theirs, ours, *function in rows:
        layers: Sequence[int] = [0]
        if "{i}" in theirs:
            i_of = lambda i: theirs.replace("{i}", str(i)) not in places  # noqa: E731, B023
            layers = [i for i in numbers(module(theirs), paths, set()) if i_of(i)] or [0]
        for i in layers:
            call = 0 if "{i}" in ours else layers.index(i)
            texts = [text.replace("{i}", str(i)) for text in (name, theirs, ours)]
            found.append(Tap(*texts, call, *(function or [None])))
    return found


@dataclasses.dataclass(frozen=True)
class Comparison:
    """The same thing of both sides; `after` is the place that was compared before it."""

    rung: str
    place: str
    ours: np.ndarray
    theirs: np.ndarray
    after: str = ""


class Pair:
    """Both sides in one dtype on the same weights."""

    def __init__(self, port: Port, dtype: str):
        self.dtype = dtype
        self.torch = TorchSide(port, dtype)
        shapes = {path: tuple(leaf.shape) for path, leaf in flat(port.params).items()}
        theirs = {name: tuple(p.shape) for name, p in self.torch.parameters.items()}
        self.table = table(port.leaves, theirs, shapes)
        modules = [path for path, _ in self.torch.model.named_modules()]
        self.taps = spelled(port.taps, modules)
        self.masks = spelled([("", *row) for row in port.masks], modules)
        wanted, masked = (frozenset(tap.jax for tap in t) for t in (self.taps, self.masks))
        self.jax = JaxSide(port, dtype, self.table.draw(), wanted, masked)
        self.torch.load(self.table.to_torch(self.jax.leaves))

    def climb(self, steps: int, noise: dict[str, np.ndarray]) -> Iterator[Row | Comparison]:
        """Every comparison, in the order in which a mistake shows."""
        back = self.table.to_jax(self.torch.named())
        for path, leaf in self.jax.leaves.items():
            yield Row("1 leaves", self.dtype, path, relative(back[path], leaf), 0.0)
        self.require_deterministic()
        rungs = ("2 taps forward", "3 loss", "4 taps backward", "5 gradients")
        yield from self.operations(rungs, train=False)
        yield from self.updates(steps, noise)
        drops = self.torch.run(train=True).shares
        self.require_masks(drops)
        if drops:
            parts = ("forward", "loss", "backward", "gradients")
            yield from self.operations([f"7 dropout, {part}" for part in parts], train=True)
            yield from self.shares(drops)
        yield from self.modes(bool(drops))

    # ---- one pass -------------------------------------------------------------------------------

    def operations(self, rungs: Sequence[str], train: bool) -> Iterator[Comparison]:
        """Outputs as the forward pass reaches them, then gradients as the backward pass does."""
        ours, recorder = self.jax.run(train)
        _require_fired("JAX", "taps", self.jax.wanted, ours.values, recorder.seen)
        if train:
            _require_fired("JAX", "masks", self.jax.masked, recorder.masks, recorder.seen)
        self.recorded = recorder.masks
        wanted = {tap.torch: tap.name for tap in self.taps} | {"logits": "logits"}
        masks = self.jax_masks() if train else None
        listener = self.torch.run(wanted, masks, train)
        theirs = listener.found
        _require_fired("PyTorch", "taps", wanted, theirs.values, listener.seen)
        order = [wanted[place] for place in theirs.values]
        mine, other = self._named(ours, "jax"), self._named(theirs, "torch")
        before = ""
        for name in order:
            yield Comparison(rungs[0], name, mine.values[name], other.values[name], before)
            before = name
        yield Comparison(rungs[1], "loss", ours.loss, theirs.loss, before)
        before = "loss"
        for name in reversed(order):
            yield Comparison(rungs[2], name, mine.gradients[name], other.gradients[name], before)
            before = name
        leaves = self.table.to_jax(theirs.leaves)
        for path, leaf in ours.leaves.items():
            yield Comparison(rungs[3], path, leaf, leaves[path])

    def _named(self, found: Pass, side: str) -> Pass:
        """By the names of the table, one array each, PyTorch's laid out as JAX's."""
        named = Pass()
        for kind in ("values", "gradients"):
            arrays, into = getattr(found, kind), getattr(named, kind)
            into["logits"] = arrays["logits"][0]
            for tap in self.taps:
                calls = arrays[getattr(tap, side)]
                if side == "torch":
                    into[tap.name] = tap.function(calls[0]) if tap.function else calls[0]
                elif tap.call >= len(calls):
                    raise BadInput(
                        f"JAX's tap {tap.jax} fires {len(calls)} times, and {tap.name} is call "
                        f"{tap.call}; mend the table of taps"
                    )
                else:
                    into[tap.name] = calls[tap.call]
        return named

    # ---- dropout, train and eval mode -----------------------------------------------------------

    def jax_masks(self) -> dict[str, list[np.ndarray]]:
        """JAX's masks by PyTorch's sites: of a JAX site's calls, as many as each layer has."""
        masks = {}
        for mask in self.masks:
            calls = self.recorded[mask.jax]
            n = len(calls) // sum(other.jax == mask.jax for other in self.masks)
            own = calls[mask.call * n : (mask.call + 1) * n]
            masks[mask.torch] = [mask.function(own)] if mask.function else own
        return masks

    def require_masks(self, drops: Iterable[str]) -> None:
        named, drops = {mask.torch for mask in self.masks}, set(drops)
        if named != drops:
            raise BadInput(
                f"PyTorch drops at {_list(drops - named)} beyond the table of masks, which names "
                f"{_list(named - drops)} beyond PyTorch; mend the table or a rate"
            )

    def require_deterministic(self) -> None:
        """In eval mode nothing may be drawn, and in float64 nothing rounded to less."""
        if self.dtype == "float64":
            self.jax.require_wide()
        if self.jax.loss(0, train=False) != self.jax.loss(1, train=False):
            raise BadInput(
                "JAX's result changes with the key when deterministic; pass `deterministic` on to "
                "every dropout"
            )
        if self.torch.run().found.loss != self.torch.run().found.loss:
            raise BadInput(
                "PyTorch's two runs in eval mode differ; let the model draw only where "
                "`self.training` holds"
            )

    def shares(self, drawn: dict[str, Share]) -> Iterator[Row]:
        """Each side drops as often as the rate says, PyTorch by its own draw."""
        for site, masks in self.jax_masks().items():
            own = Share(drawn[site].rate)
            for keep in masks:
                own.count(np.ones_like(keep), keep == 0)
            for side, share in (("JAX", own), ("PyTorch", drawn[site])):
                note = f"{share.dropped} of {share.n} at rate {share.rate:g}, in deviations"
                place, error = f"{side} at {site}", share.deviations()
                yield Row("7 dropout, shares", self.dtype, place, error, DEVIATIONS, note=note)

    def modes(self, drops: bool) -> Iterator[Row]:
        """Eval mode was seen to be deterministic; train mode is not, where there is dropout."""
        ours = self.jax.loss(0, train=True) != self.jax.loss(1, train=True)
        theirs = self.torch.run(train=True).found.loss != self.torch.run(train=True).found.loss
        for side, varies in (("JAX", ours), ("PyTorch", theirs)):
            place = f"{side} in train mode {'varies' if drops else 'does not vary'}"
            error = 0.0 if bool(varies) == drops else np.inf
            yield Row("8 train and eval", self.dtype, place, error, 0.0)

    # ---- updates --------------------------------------------------------------------------------

    def updates(self, steps: int, noise: dict[str, np.ndarray]) -> Iterator[Comparison]:
        """The distance that each leaf moved, after one update and after all of them.

        `noise` is filled in float64 and used in both dtypes: where an element's true gradient is 0
        (a bias of keys, which softmax ignores), what is measured is rounding, and Adam divides it
        by its epsilon.
        """
        start, update, optimizer = self.jax.leaves, self.jax.updates(), self.torch.optimizer()
        for k in range(steps + 1):
            ours, theirs = self.jax.run(train=False)[0], self.torch.run().found
            leaves = self.table.to_jax(self.torch.named())
            if k == 0 and not noise:
                noise |= _noise(ours.leaves)
            for path in start if k in (1, steps) else ():
                moved = [
                    np.where(noise[path], 0, side[path].astype(np.float64) - start[path])
                    for side in (self.jax.leaves, leaves)
                ]
                yield Comparison("6 updates", f"{path}, moved by {k}", *moved)
            yield Comparison("6 updates", f"loss of state {k}", ours.loss, theirs.loss)
            if k < steps:
                update.step(ours.leaves)
                self.torch.step(optimizer)
        self.jax.leaves = start
        self.torch.load(self.table.to_torch(start))


def _noise(gradients: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    largest = max(np.abs(leaf).max() for leaf in gradients.values())
    return {
        path: (leaf != 0) & (np.abs(leaf) < 1e-12 * largest) for path, leaf in gradients.items()
    }


def _require_fired(
    side: str, what: str, names: Iterable[str], found: Any, seen: Iterable[str]
) -> None:
    missing = [name for name in names if name not in found]
    if missing:
        near = "; ".join(nearest(name, seen) for name in missing)
        raise BadInput(f"{side}'s {what} that never fire: {near}; mend the table of {what}")


def _list(names: Iterable[str]) -> str:
    return ", ".join(sorted(names)) or "no place"


# ---- the whole ladder ---------------------------------------------------------------------------


def prove(port: Port, steps: int = 5, dtypes: Sequence[str] = ("float64", "float32")) -> Report:
    """Climbs the ladder to the landing after the first difference, in float64 and then in float32.

    Raises:
      BadInput: the port cannot be measured as it is given.
    """
    jax.clear_caches()  # a program that was traced before holds no taps
    torch.set_num_threads(1)  # of small models the threads only wait for each other
    report = Report([], steps)
    exact: dict[tuple, Comparison] = {}
    noise: dict[str, np.ndarray] = {}
    try:
        for dtype in dtypes if steps else ():
            climb = Pair(port, dtype).climb(steps, noise)
            for rung, found in itertools.groupby(climb, lambda found: found.rung):
                report.rows += _rows(list(found), dtype, exact)
                if rung in LANDINGS and not report.passed:
                    break  # what is left would tell the same again
            if not report.passed:
                break
    except Stopped as stopped:
        report.stopped = str(stopped)
    return report


def _rows(rung: list, dtype: str, exact: dict[tuple, Comparison]) -> list[Row]:
    if isinstance(rung[0], Row):
        return rung
    if dtype == "float64":
        exact |= {(found.rung, found.place): found for found in rung}
        return [
            _row(found, dtype, relative(found.ours, found.theirs), FLOAT64_TOLERANCE)
            for found in rung
        ]
    wide = [exact[found.rung, found.place] for found in rung]
    ours = np.array([relative(a.ours, b.ours) for a, b in zip(rung, wide, strict=True)])
    theirs = np.array([relative(a.theirs, b.theirs) for a, b in zip(rung, wide, strict=True)])
    laws = zip(rung, *own_rounding(ours, theirs), ours, theirs, strict=True)
    return [
        _row(found, dtype, error, tolerance, f"JAX rounds {a:.1e}, PyTorch {b:.1e}")
        for found, error, tolerance, a, b in laws
    ]


def _row(found: Comparison, dtype: str, error: float, tolerance: float, note: str = "") -> Row:
    ours, theirs = found.ours.shape, found.theirs.shape
    if ours != theirs:
        note = f"JAX {list(ours)}, PyTorch {list(theirs)}"
    return Row(found.rung, dtype, found.place, float(error), float(tolerance), found.after, note)
