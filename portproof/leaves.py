"""The table of leaves: one model's parameters under the other's names, there and back."""

import collections
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from portproof.port import BadInput, nearest, numbers

Shapes = Mapping[str, tuple[int, ...]]


def flat(tree: Any) -> dict[str, Any]:
    """{"trunk/fc/kernel": leaf, ...} of any tree; NNX's `value` is no part of a name."""
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {_path(keys): leaf for keys, leaf in leaves}


def unflat(leaves: Mapping[str, Any], like: Any) -> Any:
    """The inverse of `flat`: a tree like that one."""
    return jax.tree_util.tree_map_with_path(lambda keys, _: leaves[_path(keys)], like)


def _path(keys: Any) -> str:
    return jax.tree_util.keystr(keys, simple=True, separator="/").removesuffix("/value")


class Part(NamedTuple):
    """A leaf of JAX, or one layer of it, in PyTorch's orientation."""

    path: str
    layer: int | None
    transposed: bool

    def of(self, leaves: Mapping[str, np.ndarray]) -> np.ndarray:
        """A view: what is written there is written into the leaf."""
        leaf = leaves[self.path][... if self.layer is None else (self.layer, ...)]
        return np.atleast_1d(leaf.swapaxes(-1, -2) if self.transposed else leaf)


@dataclasses.dataclass(frozen=True)
class Table:
    """Rows of tensors that are one when joined on PyTorch's axis 0."""

    rows: Sequence[tuple[Sequence[str], Sequence[Part]]]
    torch_shapes: Shapes
    jax_shapes: Shapes

    def to_torch(self, leaves: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """JAX's leaves under PyTorch's names."""
        named: dict[str, np.ndarray] = {}
        for names, parts in self.rows:
            whole = np.concatenate([part.of(leaves) for part in parts])
            ends = np.cumsum([self.torch_shapes[name][0] for name in names])
            named |= zip(names, np.split(whole, ends[:-1]), strict=True)
        return named

    def to_jax(self, named: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """The inverse."""
        dtype = next(iter(named.values())).dtype
        leaves = {path: np.empty(shape, dtype) for path, shape in self.jax_shapes.items()}
        for names, parts in self.rows:
            whole = np.concatenate([np.atleast_1d(named[name]) for name in names])
            views = [part.of(leaves) for part in parts]
            ends = np.cumsum([len(view) for view in views])
            for view, array in zip(views, np.split(whole, ends[:-1]), strict=True):
                view[...] = array
        return leaves

    def draw(self) -> dict[str, np.ndarray]:
        """Weights far from any init, so that biases and scales matter; float32 holds them."""
        draw = np.random.default_rng(0).normal
        shapes = self.jax_shapes.items()
        return {path: draw(0.1, 0.2, shape).astype(np.float32) for path, shape in shapes}


def table(rows: Sequence[tuple], torch_shapes: Shapes, jax_shapes: Shapes) -> Table:
    """The user's rows with every `{i}` spelled out.

    Raises:
      BadInput: leaves without a counterpart, all of them; or shapes that do not fit.
    """
    torch_shapes = {name: shape or (1,) for name, shape in torch_shapes.items()}
    pairs = [[[x] if isinstance(x, str) else x for x in row] for row in rows]
    taken = {name for theirs, _ in pairs for name in theirs}
    spelled = []
    for theirs, ours in pairs:
        layers: list[Any] = [None]
        if "{i}" in theirs[0]:
            layers = numbers(theirs[0], torch_shapes, taken) or ["{i}"]
        for i in layers:
            names = [name.replace("{i}", str(i)) for name in theirs]
            spelled.append((names, [_part(path, i) for path in ours]))
    problems = _lost("PyTorch's", [n for names, _ in spelled for n in names], torch_shapes)
    problems += _lost("JAX's", [p.path for _, parts in spelled for p in parts], jax_shapes)
    if problems:
        raise BadInput(f"leaves without a counterpart: {'; '.join(problems)}; mend the table")
    wrong = _unfit(spelled, torch_shapes, jax_shapes)
    if wrong:
        raise BadInput(f"shapes that do not fit: {'; '.join(wrong)}; mend the table or a model")
    return Table(spelled, torch_shapes, jax_shapes)


def _part(path: str, i: int | None) -> Part:
    name = path.removesuffix(".T")
    return Part(name.replace("{i}", str(i)), None if "{i}" in name else i, name != path)


def _lost(side: str, named: list[str], shapes: Shapes) -> list[str]:
    """What the table names and the model lacks, and what the table does not name."""
    rest = [name for name in shapes if name not in named]
    unknown = [n for n in dict.fromkeys(named) if n not in shapes]
    lines = [f"the table's {side} {nearest(name, rest or shapes)}" for name in unknown]
    return lines + [f"{side} {nearest(name, unknown or named)}" for name in rest]


def _unfit(rows: list, torch_shapes: Shapes, jax_shapes: Shapes) -> list[str]:
    stacks = collections.defaultdict(set)
    for part in (part for _, parts in rows for part in parts if part.layer is not None):
        stacks[part.path].add(part.layer)
    wrong = [
        f"JAX's {path} {list(jax_shapes[path])} is a stack of PyTorch's {sorted(layers)}"
        for path, layers in stacks.items()
        if layers != set(range((*jax_shapes[path], 0)[0]))
    ]
    zeros = {path: np.broadcast_to(np.float32(0), shape) for path, shape in jax_shapes.items()}
    for names, parts in rows if not wrong else ():
        theirs = [(name, torch_shapes[name]) for name in names]
        ours = [(part.path + ".T" * part.transposed, part.of(zeros).shape) for part in parts]
        rests = {shape[1:] for _, shape in theirs + ours}
        lengths = {sum(shape[0] for _, shape in side) for side in (theirs, ours)}
        if len(rests) > 1 or len(lengths) > 1:
            left, right = (", ".join(f"{n} {list(s)}" for n, s in side) for side in (theirs, ours))
            wrong.append(f"PyTorch's {left} and JAX's {right}")
    return wrong
