"""The ladder: leaves, taps, loss, gradients, updates, all of it in train mode, the modes."""

import itertools
import math
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch

from portproof.jax_side import JaxSide
from portproof.leaves import flat, table
from portproof.port import BadInput, Pass, Port, Stopped, nearest, numbers, stops
from portproof.report import FLOAT64_TOLERANCE, Report, Row, own_rounding, relative
from portproof.torch_side import TorchSide

PLAIN = ("2 taps forward", "3 loss", "4 taps backward", "5 gradients")
TRAIN = tuple(f"7 train mode, {part}" for part in ("forward", "loss", "backward", "gradients"))
DEVIATIONS = 5.0  # that a share of dropped elements may be from the rate


class Tap(NamedTuple):
    """A row of the table, spelled out; where JAX's side is stacked this is one of its layers."""

    name: str
    torch: str
    jax: str
    call: int
    layers: int
    function: Callable


class Comparison(NamedTuple):
    """One thing of JAX, of PyTorch, and of float64; `after` is as in a Row."""

    rung: str
    place: str
    sides: Sequence[np.ndarray]
    after: str = ""


def spelled(rows: Sequence[tuple], modules: Sequence[str]) -> Iterator[Tap]:
    """The rows with every `{i}` spelled out."""
    literal = {row[1] for row in rows}
    for name, theirs, ours, *function in rows:
        layers = numbers(re.split("[:>]", theirs)[0], modules)
        layers = [i for i in layers if theirs.replace("{i}", str(i)) not in literal]
        for call, i in enumerate(layers or ["{i}"]):
            names = [t.replace("{i}", str(i)) for t in (name, theirs, ours)]
            stack = [0, 1] if "{i}" in ours else [call, len(layers) or 1]
            yield Tap._make([*names, *stack, *(function or [lambda array: array])])


class Pair:
    """Both sides in one dtype on the same weights; `exact` is the pair in float64."""

    def __init__(self, port: Port, dtype: str, exact: "Pair | None" = None):
        self.dtype, self.exact, self.noise = dtype, exact or self, dict[bool, dict]()
        for rows, n in ((port.leaves, 2), (port.taps, 3), (port.masks, 2)):
            for row in rows:
                if not n <= len(row) <= n + (rows is not port.leaves):
                    raise BadInput(f"{row}: a row of {n} fields; mend the table")
        self.torch = TorchSide(port, dtype)
        self.torches = list(dict.fromkeys([self.torch, self.exact.torch]))
        shapes = {path: np.shape(leaf) for path, leaf in flat(port.params).items()}
        theirs = {name: tuple(p.shape) for name, p in self.torch.parameters.items()}
        self.table = table(port.leaves, theirs, shapes)
        modules = [path for path, _ in self.torch.model.named_modules()]
        self.taps = [*spelled([*port.taps, ("logits", "(logits)", "(logits)")], modules)]
        masks = [("", site, f"{ours}:mask", *join) for site, ours, *join in port.masks]
        self.masks = [*spelled(masks, modules)]
        self.jax = JaxSide(port, dtype, frozenset(tap.jax for tap in self.taps + self.masks))
        # Far from any init, so that every leaf matters, and around 0, where a ReLU does.
        draw = np.random.default_rng(0).normal
        drawn = {path: np.asarray(draw(0.0, 0.2, shape)) for path, shape in shapes.items()}
        self.load({path: x.astype(np.float32).astype(dtype) for path, x in drawn.items()})

    def load(self, leaves: dict[str, np.ndarray]) -> None:
        self.jax.leaves = leaves
        for side in self.torches:
            side.load(self.table.moved(leaves, 0))

    def climb(self, steps: int) -> Iterator[list]:
        """Every comparison, in the order in which a mistake shows; a list to each landing."""
        back, leaves = self.table.moved(self.torch.named(), 1), self.jax.leaves
        errors = {path: relative(back[path], leaf) for path, leaf in leaves.items()}
        yield [Row("1 leaves", self.dtype, path, error, 0.0) for path, error in errors.items()]
        if self.exact is self:
            self.jax.require_wide()
        for side, varies in self.draws(train=False).items():
            if varies:
                raise BadInput(f"{side}'s two runs in eval mode differ; let it draw in train mode")
        yield [*self.operations(PLAIN, self.jax.run(train=False))]
        yield [*self.updates(steps)]
        drawn, ours = self.torch.run(train=True).drawn, self.jax.run(train=True)
        masks = self.jax_masks(ours, drawn)
        differ = self.draws(True, masks)
        if differ["PyTorch"]:
            raise BadInput("PyTorch draws in train mode by other than F.dropout; drop by that")
        if masks or not differ["JAX"]:  # without dropout train mode may be another, too
            yield [*self.operations(TRAIN, ours, masks)]
        yield [*self.shares(masks, drawn), *self.modes(bool(drawn))]

    def operations(self, rungs: Sequence, ours: Pass, masks: Mapping = {}) -> Iterator[Comparison]:
        """Outputs as the forward pass reaches them, then gradients as the backward pass does."""
        places, train = [tap.torch for tap in self.taps], rungs is TRAIN
        # JAX draws other masks in float64, so PyTorch is run there once more on these.
        passes = [ours, *(side.run(places, masks, train) for side in self.torches)]
        _require_fired("JAX", "taps", [tap[2:5] for tap in self.taps], ours)
        _require_fired("PyTorch", "taps", [(p, 0, 1) for p in places], passes[1])

        if not np.isfinite([found.loss for found in passes]).any():
            raise BadInput(
                "no loss is finite with weights of N(0, 0.2); use exp of what must be > 0"
            )

        def at(tap: Tap, kind: str) -> list[np.ndarray]:
            """All calls that both sides make of this layer."""
            mine, *theirs = (getattr(found, kind) for found in passes)
            with stops("the table", tap.name):
                ours_of, n = _of_layer(mine[tap.jax], tap), len(theirs[0][tap.torch])
                calls = [[*map(tap.function, found[tap.torch][: len(ours_of)])] for found in theirs]
                calls.insert(0, ours_of[:n])
                return [np.concatenate([*map(np.ravel, c)]) if len(c) > 1 else c[0] for c in calls]

        reached = list(passes[1].values)
        taps = sorted(self.taps, key=lambda tap: reached.index(tap.torch))
        for before, tap in zip(["", *(tap.name for tap in taps)], taps, strict=False):
            yield Comparison(rungs[0], tap.name, at(tap, "values"), before)
        yield Comparison(rungs[1], "loss", [found.loss for found in passes], taps[-1].name)
        for tap in reversed(taps):
            yield Comparison(rungs[2], tap.name, at(tap, "gradients"), f"what uses {tap.name}")
        leaves = self.by_path(ours.leaves, [found.leaves for found in passes[1:]])
        if self.exact is self:
            self.noise[train] = _noise(leaves)
        for path, sides in leaves.items():
            yield Comparison(rungs[3], path, [*np.where(self.exact.noise[train][path], 0, sides)])

    def by_path(self, ours: Mapping, theirs: Iterable[Mapping]) -> dict[str, list[np.ndarray]]:
        """What every side has for each leaf of JAX, laid out as JAX's."""
        sides = [ours, *(self.table.moved(named, 1) for named in theirs)]
        return {path: [side[path] for side in sides] for path in ours}

    def jax_masks(self, ours: Pass, drawn: Collection[str]) -> dict[str, list[np.ndarray]]:
        """JAX's masks by PyTorch's sites: of a JAX site's calls, as many as each layer has."""
        _require_fired("JAX", "masks", [tap[2:5] for tap in self.masks], ours)
        masks: dict[str, list[np.ndarray]] = {}
        for mask in self.masks:
            with stops("the table", f"masks of {mask.torch}"):
                own = mask.function(_of_layer(ours.values[mask.jax], mask))
                masks.setdefault(mask.torch, []).extend(own if isinstance(own, list) else [own])
        if set(masks) != set(drawn):
            sites, named = (", ".join(sorted(sites)) or "no place" for sites in (drawn, masks))
            raise BadInput(f"PyTorch drops at {sites}, masks are of {named}; mend table or rate")
        return masks

    def shares(self, masks: Mapping[str, list], drawn: Mapping) -> Iterator[Row]:
        """Each side drops as often as the rate says, PyTorch by its own draw; no two alike."""
        calls = [(s, *call) for s in drawn for call in zip(masks[s], drawn[s], strict=False)]
        for site, ours, (theirs, rate) in calls:
            for side, kept in (("JAX", ours), ("PyTorch", theirs)):
                n, dropped = kept.size, int((kept == 0).sum())
                error = abs(dropped - rate * n) / math.sqrt(rate * (1 - rate) * n or 1)
                note = f"{dropped} of {n} at rate {rate:g}, in deviations"
                place = f"{side} at {site}"
                yield Row("7 dropout, shares", self.dtype, place, error, DEVIATIONS, note=note)
        again = self.jax_masks(self.jax.run(train=True, seed=1), drawn) if masks else {}
        every = [(s, m) for found in (masks, again) for s in found for m in found[s]]
        many = [(s, m) for s, m in every if 20 < (m == 0).sum() < m.size - 20]  # no chance
        axes = [(s, m, d) for s, m in many for d, size in enumerate(m.shape) if size > 1]
        slices = [((s, m), (f"along axis {d}", 0 * m + m.take([0], d))) for s, m, d in axes]
        for (site, a), (other, b) in [*itertools.combinations(many, 2), *slices]:
            if np.array_equal(a, b):
                place, why = f"JAX at {site}", f"the same mask as {other}"
                yield Row("7 dropout, shares", self.dtype, place, np.inf, 0.0, note=why)

    def modes(self, drops: bool) -> Iterator[Row]:
        """Train mode varies where PyTorch drops."""
        for side, varies in self.draws(train=True).items():
            place = f"{side} in train mode {'varies' if varies else 'does not vary'}"
            error = 0.0 if varies == drops else np.inf
            yield Row("8 train and eval", self.dtype, place, error, 0.0)

    def draws(self, train: bool, masks: Mapping = {}) -> dict[str, bool]:
        """Whether two runs of a side differ, JAX's by two keys."""
        ours = [self.jax.run(train, seed).loss for seed in range(2)]
        theirs = [self.torch.run((), masks, train).loss for _ in range(2)]
        both = {"JAX": ours, "PyTorch": theirs}
        return {side: not np.array_equal(a, b, equal_nan=True) for side, (a, b) in both.items()}

    def updates(self, steps: int) -> Iterator[Comparison]:
        """How far each leaf moved; not where the gradient is rounding, which Adam would enlarge."""
        start, step = self.jax.leaves, self.jax.updates()
        torch_steps = [side.updates() for side in self.torches]
        for k in range(steps + 1):
            passes = [self.jax.run(train=False), *(side.run() for side in self.torches)]
            leaves = self.by_path(self.jax.leaves, [side.named() for side in self.torches])
            for path, sides in leaves.items() if k in (1, steps) else ():
                moved = np.array(sides, np.float64) - start[path]
                moved = np.where(self.exact.noise[False][path], 0, moved)
                yield Comparison("6 updates", f"{path}, moved by {k}", [*moved])
            yield Comparison("6 updates", f"loss of state {k}", [found.loss for found in passes])
            if k < steps:
                step(passes[0].leaves)
                for torch_step in torch_steps:
                    torch_step()
        self.load(start)


def _of_layer(calls: list, tap: Tap) -> list:
    """Those of a layer; where each layer has several they are made one layer after the other."""
    n = len(calls) // tap.layers
    return calls[tap.call * n : (tap.call + 1) * n]


def _noise(gradients: Mapping[str, list[np.ndarray]]) -> dict[str, np.ndarray]:
    """Where all sides' are 0 but for rounding: softmax ignores a bias of keys, say."""
    largest = {path: np.abs(sides).max(axis=0) for path, sides in gradients.items()}
    least = 1e-13 * max(leaf.max() for leaf in largest.values())
    return {path: (leaf > 0) & (leaf < least) for path, leaf in largest.items()}


def _require_fired(side: str, what: str, calls: Iterable[tuple], found: Pass) -> None:
    missing = dict.fromkeys(
        f"{name}, called {n} times for {layers} layers" if n else nearest(name, found.seen)
        for name, call, layers in calls
        for n in [len(found.values.get(name, ()))]
        if n <= call or n % layers  # or not as often in each layer
    )
    if missing:
        raise BadInput(f"{side}'s {what} that fire never, or unevenly: {'; '.join(missing)}")


def prove(port: Port, steps: int = 5, float32: bool = True) -> Report:
    """Climbs to the landing after the first difference, in float64 and then in float32."""
    threads, report, pair = torch.get_num_threads(), Report([]), None
    torch.set_num_threads(1)  # of small models the threads only wait for each other
    try:
        for dtype in ("float64", "float32")[: 1 + float32]:
            pair = Pair(port, dtype, pair)
            for landing in pair.climb(steps):
                for _, found in itertools.groupby(landing, lambda found: found.rung):
                    report.rows += _rows(list(found), dtype)
                if not report.passed:
                    return report  # what is left would tell the same again
    except Stopped as stopped:
        report.stopped = str(stopped)
    finally:
        torch.set_num_threads(threads)
    return report


def _rows(rung: list, dtype: str) -> Iterator[Row]:
    if isinstance(rung[0], Row):
        yield from rung
        return
    own = [[relative(side, found.sides[-1]) for side in found.sides[:2]] for found in rung]
    for found, (a, b), law in zip(rung, own, own_rounding(np.array(own)), strict=True):
        ours, theirs = found.sides[:2]
        note = f"JAX rounds {a:.1e}, PyTorch {b:.1e}"
        if dtype == "float64":
            law, note = (relative(ours, theirs), FLOAT64_TOLERANCE), ""
        if ours.shape != theirs.shape:
            note = f"JAX {list(ours.shape)}, PyTorch {list(theirs.shape)}"
        yield Row(found.rung, dtype, found.place, *law, found.after, note)
