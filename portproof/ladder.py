"""The ladder: leaves, taps forward, loss, taps backward, gradients, updates, dropout, the modes."""

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from portproof.jax_side import JaxSide
from portproof.leaves import flat, table
from portproof.port import BadInput, Pass, Port, Stopped, nearest, numbers
from portproof.report import FLOAT64_TOLERANCE, Report, Row, own_rounding, relative
from portproof.torch_side import Share, TorchSide

PLAIN = ("2 taps forward", "3 loss", "4 taps backward", "5 gradients")
DROPOUT = tuple(f"7 dropout, {part}" for part in ("forward", "loss", "backward", "gradients"))
LANDINGS = ("1 leaves", PLAIN[-1], "6 updates", DROPOUT[-1])
DEVIATIONS = 5.0
"""How many standard deviations a share of dropped elements may be from the rate."""


class Tap(NamedTuple):
    """A row of the table, spelled out; `call` counts where JAX's side is stacked."""

    name: str
    torch: str
    jax: str
    call: int
    function: Callable | None


class Comparison(NamedTuple):
    """One thing of JAX, of PyTorch, and of float64; `after` was compared before it."""

    rung: str
    place: str
    sides: list[np.ndarray]
    after: str = ""


def spelled(rows: Sequence[tuple], modules: Sequence[str]) -> list[Tap]:
    """The rows with every `{i}` spelled out."""
    literal, found = {row[1] for row in rows}, []
    for name, theirs, ours, *function in rows:
        layers: list[Any] = [""]
        if "{i}" in theirs:
            module = theirs.partition(":")[0].partition(">")[0]
            fitting = numbers(module, modules, set())
            layers = [i for i in fitting if theirs.replace("{i}", str(i)) not in literal] or [""]
        for call, i in enumerate(layers):
            name_i, theirs_i, ours_i = (
                text.replace("{i}", str(i)) for text in (name, theirs, ours)
            )
            call = 0 if "{i}" in ours else call
            found.append(Tap(name_i, theirs_i, ours_i, call, function[0] if function else None))
    return found


class Pair:
    """Both sides in one dtype on the same weights; `exact` is the pair in float64."""

    def __init__(self, port: Port, dtype: str, exact: "Pair | None" = None):
        self.dtype, self.exact = dtype, exact or self
        self.torch = TorchSide(port, dtype)
        shapes = {path: tuple(leaf.shape) for path, leaf in flat(port.params).items()}
        theirs = {name: tuple(p.shape) for name, p in self.torch.parameters.items()}
        self.table = table(port.leaves, theirs, shapes)
        modules = [path for path, _ in self.torch.model.named_modules()]
        self.taps = spelled([*port.taps, ("logits", "logits", "logits")], modules)
        self.masks = spelled([("", *row) for row in port.masks], modules)
        wanted, masked = (frozenset(tap.jax for tap in t) for t in (self.taps, self.masks))
        self.jax = JaxSide(port, dtype, self.table.draw(), wanted, masked)
        self.load(self.jax.leaves)

    def load(self, leaves: dict[str, np.ndarray]) -> None:
        self.jax.leaves = leaves
        self.torch.load(self.table.to_torch(leaves))

    def climb(self, steps: int) -> Iterator[Row | Comparison]:
        """Every comparison, in the order in which a mistake shows."""
        back = self.table.to_jax(self.torch.named())
        for path, leaf in self.jax.leaves.items():
            yield Row("1 leaves", self.dtype, path, relative(back[path], leaf), 0.0)
        self.require_deterministic()
        yield from self.operations(PLAIN)
        yield from self.updates(steps)
        drops = self.torch.run(train=True).shares
        self.require_masks(drops.keys())
        if drops:
            yield from self.operations(DROPOUT)
            yield from self.shares(drops)
        yield from self.modes(bool(drops))

    # ---- one pass -------------------------------------------------------------------------------

    def operations(self, rungs: Sequence[str]) -> Iterator[Comparison]:
        """Outputs as the forward pass reaches them, then gradients as the backward pass does."""
        train = rungs is DROPOUT
        ours, recorder = self.jax.run(train)
        _require_fired("JAX", "taps", self.jax.wanted, ours.values, self.jax.seen)
        if train:
            _require_fired("JAX", "masks", self.jax.masked, recorder.masks, self.jax.seen)
        self.recorded = recorder.masks
        masks = self.jax_masks() if train else None
        wanted = {tap.torch: tap.name for tap in self.taps}
        listener = self.torch.run(wanted, masks, train)
        _require_fired("PyTorch", "taps", wanted, listener.found.values, listener.seen)
        # JAX draws other masks in float64, so PyTorch is run there once more on these.
        exact = self.exact.torch.run(wanted, masks, train).found
        order = [wanted[place] for place in listener.found.values]
        sides = [self._named(ours, "jax")]
        sides += [self._named(found, "torch") for found in (listener.found, exact)]
        for before, name in zip(["", *order], order, strict=False):
            yield Comparison(rungs[0], name, [side.values[name][0] for side in sides], before)
        yield Comparison(rungs[1], "loss", [side.loss for side in sides], order[-1])
        for before, name in itertools.pairwise(["loss", *reversed(order)]):
            yield Comparison(rungs[2], name, [side.gradients[name][0] for side in sides], before)
        noise = [_noise(side.leaves) for side in sides]
        if self.dtype == "float64":
            self.noise = {path: noise[0][path] | noise[1][path] for path in ours.leaves}
        for path in ours.leaves:
            leaves = zip(noise, (side.leaves for side in sides), strict=True)
            yield Comparison(rungs[3], path, [np.where(n[path], 0, g[path]) for n, g in leaves])

    def _named(self, found: Pass, side: str) -> Pass:
        """By the names of the table, one array each, PyTorch's laid out as JAX's."""
        leaves = found.leaves if side == "jax" else self.table.to_jax(found.leaves)
        named = Pass(loss=found.loss, leaves=leaves)
        for tap in self.taps:
            place, call = (tap.jax, tap.call) if side == "jax" else (tap.torch, 0)
            n = len(found.values[place])
            if call >= n:
                raise BadInput(
                    f"JAX's tap {place} fires {n} times, and {tap.name} is call {call}, counted "
                    "from 0; mend the table of taps"
                )
            for kind in ("values", "gradients"):
                array = getattr(found, kind)[place][call]
                to = tap.function if side == "torch" else None
                getattr(named, kind)[tap.name] = [to(array) if to else array]
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
            more, fewer = (
                ", ".join(sorted(s)) or "no place" for s in (drops - named, named - drops)
            )
            raise BadInput(
                f"PyTorch drops at {more} beyond the table of masks, which names {fewer} beyond "
                "PyTorch; mend the table or a rate"
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
            kept = np.concatenate([mask.ravel() for mask in masks])
            own = Share(int((kept == 0).sum()), kept.size, drawn[site].rate)
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

    def updates(self, steps: int) -> Iterator[Comparison]:
        """The distance that each leaf moved, after one update and after all of them.

        Elements whose gradient is rounding are left out: Adam divides it by its epsilon.
        """
        start, step = self.jax.leaves, self.jax.updates()
        modules = {side: side.updates() for side in (self.torch, self.exact.torch)}
        for k in range(steps + 1):
            ours, found = self.jax.run(train=False)[0], [side.run().found for side in modules]
            leaves = [self.jax.leaves, *(self.table.to_jax(side.named()) for side in modules)]
            for path in start if k in (1, steps) else ():
                moved = [leaf[path].astype(np.float64) - start[path] for leaf in leaves]
                moved = [np.where(self.exact.noise[path], 0, array) for array in moved]
                yield Comparison("6 updates", f"{path}, moved by {k}", moved)
            losses = [ours.loss, *(side.loss for side in found)]
            yield Comparison("6 updates", f"loss of state {k}", losses)
            if k < steps:
                step(ours.leaves)
                for update in modules.values():
                    update()
        self.load(start)
        self.exact.torch.load(self.table.to_torch(start))


def _noise(gradients: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Where float64's gradient is 0 but for rounding: softmax ignores a bias of keys, say."""
    least = 1e-13 * max(np.abs(leaf).max() for leaf in gradients.values())
    return {path: (leaf != 0) & (np.abs(leaf) < least) for path, leaf in gradients.items()}


def _require_fired(
    side: str, what: str, names: Iterable[str], found: Any, seen: Iterable[str]
) -> None:
    missing = [name for name in names if name not in found]
    if missing:
        near = "; ".join(nearest(name, seen) for name in missing)
        raise BadInput(f"{side}'s {what} that never fire: {near}; mend the table of {what}")


# ---- the whole ladder ---------------------------------------------------------------------------


def prove(port: Port, steps: int = 5, float32: bool = True) -> Report:
    """Climbs the ladder to the landing after the first difference, in float64 and then in float32.

    Raises:
      BadInput: the port cannot be measured as it is given.
    """
    threads, report, pair = torch.get_num_threads(), Report([]), None
    torch.set_num_threads(1)  # of small models the threads only wait for each other
    try:
        for dtype in ("float64", "float32")[: 1 + float32]:
            pair = Pair(port, dtype, pair)
            for rung, found in itertools.groupby(pair.climb(steps), lambda found: found.rung):
                report.rows += _rows(list(found), dtype)
                if rung in LANDINGS and not report.passed:
                    return report  # what is left would tell the same again
    except Stopped as stopped:
        report.stopped = str(stopped)
    finally:
        torch.set_num_threads(threads)
    return report


def _rows(rung: list, dtype: str) -> list[Row]:
    if isinstance(rung[0], Row):
        return rung
    own = [[relative(side, found.sides[-1]) for side in found.sides[:2]] for found in rung]
    errors, tolerances = own_rounding(*np.array(own).T)
    rows = []
    for found, (a, b), error, tolerance in zip(rung, own, errors, tolerances, strict=True):
        note = f"JAX rounds {a:.1e}, PyTorch {b:.1e}"
        if dtype == "float64":
            error, tolerance, note = relative(*found.sides[:2]), FLOAT64_TOLERANCE, ""
        ours, theirs = (list(side.shape) for side in found.sides[:2])
        if ours != theirs:
            note = f"JAX {ours}, PyTorch {theirs}"
        law = float(error), float(tolerance)
        rows.append(Row(found.rung, dtype, found.place, *law, found.after, note))
    return rows
