"""The table of leaves: one model's parameters under the other's names, there and back."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from portproof.port import BadInput, nearest, numbers

Shapes = Mapping[str, tuple[int, ...]]
SIDES = ("PyTorch's", "JAX's")


def flat(tree: Any) -> dict[str, Any]:
    """{"trunk/fc/kernel": leaf, ...} of any tree; NNX's `value` is no part of a name."""
    return {_path(keys): leaf for keys, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def unflat(leaves: Mapping[str, Any], like: Any) -> Any:
    """The inverse of `flat`: a tree like that one."""
    return jax.tree_util.tree_map_with_path(lambda keys, _: leaves[_path(keys)], like)


def _path(keys: Any) -> str:
    return jax.tree_util.keystr(keys, simple=True, separator="/").removesuffix("/value")


class Part(NamedTuple):
    """A leaf, or one layer of a stacked one, in PyTorch's orientation."""

    path: str
    layer: int | None
    transposed: bool

    def of(self, leaves: Mapping[str, np.ndarray]) -> np.ndarray:
        """A view: what is written there is written into the leaf."""
        leaf = leaves[self.path][... if self.layer is None else (self.layer, ...)]
        return np.atleast_1d(leaf.swapaxes(-1, -2) if self.transposed and leaf.ndim > 1 else leaf)


class Table(NamedTuple):
    """Rows of PyTorch's and of JAX's parts, which are one tensor when joined on axis 0."""

    rows: Sequence[tuple[list[Part], list[Part]]]
    shapes: tuple[Shapes, Shapes]

    def to_torch(self, leaves: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """JAX's leaves under PyTorch's names."""
        return self._moved(leaves, 1, 0)

    def to_jax(self, named: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """The inverse."""
        return self._moved(named, 0, 1)

    def _moved(self, leaves: Mapping[str, np.ndarray], old: int, new: int) -> dict:
        dtype = next(iter(leaves.values())).dtype
        moved = {path: np.full(shape, np.nan, dtype) for path, shape in self.shapes[new].items()}
        for row in self.rows:
            whole = np.concatenate([part.of(leaves) for part in row[old]])
            views = [part.of(moved) for part in row[new]]
            ends = np.cumsum([len(view) for view in views])
            for view, array in zip(views, np.split(whole, ends[:-1]), strict=True):
                view[...] = array
        return moved


def table(rows: Sequence[tuple], torch_shapes: Shapes, jax_shapes: Shapes) -> Table:
    """The user's rows with every `{i}` spelled out; BadInput names all that do not fit."""
    pairs = [[[x] if isinstance(x, str) else x for x in row] for row in rows]
    taken = {name for theirs, _ in pairs for name in theirs}
    spelled = [
        ([_part(name, i) for name in theirs], [_part(path, i) for path in ours])
        for theirs, ours in pairs
        for i in numbers(theirs[0], torch_shapes, taken)
    ]
    shapes = torch_shapes, jax_shapes
    lost = [line for n in range(2) for line in _lost(n, spelled, shapes[n])]
    if lost:
        raise BadInput(f"leaves without a counterpart: {'; '.join(lost)}; mend the table")
    zeros = [{path: np.zeros(shape) for path, shape in side.items()} for side in shapes]
    wrong = [_shown(row, shapes) for row in spelled if not _fits(row, zeros)]
    built = Table(spelled, shapes)
    if not wrong:  # what no row fills is left NaN
        ours = built.to_jax(zeros[0]).items()
        wrong = [
            f"JAX's {path} has layers that PyTorch lacks" for path, x in ours if np.isnan(x).any()
        ]
    if wrong:
        raise BadInput(f"shapes that do not fit: {'; '.join(wrong)}; mend the table or a model")
    return built


def _part(path: str, i: int | str) -> Part:
    name = path.removesuffix(".T")
    layer = None if "{i}" in name or isinstance(i, str) else i
    return Part(name.replace("{i}", str(i)), layer, name != path)


def _lost(n: int, rows: list, shapes: Shapes) -> list[str]:
    """What the table names and the model lacks, and what the table does not name."""
    named = list(dict.fromkeys(part.path for row in rows for part in row[n]))
    rest = [name for name in shapes if name not in named]
    unknown = [name for name in named if name not in shapes]
    lines = [f"the table's {SIDES[n]} {nearest(name, rest or shapes)}" for name in unknown]
    return lines + [f"{SIDES[n]} {nearest(name, unknown or named)}" for name in rest]


def _fits(row: tuple, leaves: Sequence[Mapping]) -> bool:
    """Whether both sides join to one shape."""
    try:
        theirs, ours = (np.concatenate([p.of(leaves[n]) for p in row[n]]) for n in range(2))
    except (IndexError, ValueError):  # a stack that lacks the layer, or parts that do not join
        return False
    return theirs.shape == ours.shape


def _shown(row: tuple, shapes: Sequence[Shapes]) -> str:
    sides = [", ".join(f"{p.path} {list(shapes[n][p.path])}" for p in row[n]) for n in range(2)]
    return f"PyTorch's {sides[0]} and JAX's {sides[1]}"
