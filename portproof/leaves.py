"""The table of leaves: one model's parameters under the other's names, there and back."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from portproof.port import BadInput, nearest, numbers

Shapes = Mapping[str, tuple[int, ...]]
SIDES = ("PyTorch's", "JAX's")


def flat(tree: Any) -> dict[str, Any]:
    """{"trunk/fc/kernel": leaf, ...} of any tree; NNX's attribute `value` is no part of a name."""
    return {_path(keys): leaf for keys, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def unflat(leaves: Mapping[str, Any], like: Any) -> Any:
    """The inverse of `flat`: a tree like that one."""
    return jax.tree_util.tree_map_with_path(lambda keys, _: leaves[_path(keys)], like)


def _path(keys: Any) -> str:
    keys = keys[:-1] if keys[-1:] == (jax.tree_util.GetAttrKey("value"),) else keys
    return jax.tree_util.keystr(keys, simple=True, separator="/")


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

    rows: Sequence[tuple[list[Part], ...]]
    shapes: tuple[Shapes, Shapes]

    def moved(self, leaves: Mapping[str, np.ndarray], new: int) -> dict[str, np.ndarray]:
        """JAX's leaves under PyTorch's names (new is 0), or the inverse (1)."""
        dtype = next(iter(leaves.values())).dtype
        moved = {path: np.full(shape, np.nan, dtype) for path, shape in self.shapes[new].items()}
        for row in self.rows:
            whole = np.concatenate([part.of(leaves) for part in row[1 - new]])
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
        tuple([_part(path, i, n) for path in side] for side in row)
        for row in pairs
        for n, i in enumerate(numbers(row[0][0], torch_shapes, taken))
    ]
    shapes = torch_shapes, jax_shapes
    lost = [line for n in range(2) for line in _lost(n, spelled, shapes[n])]
    if lost:
        raise BadInput(f"leaves without a counterpart: {'; '.join(lost)}; mend the table")
    zeros = [{path: np.zeros(shape) for path, shape in side.items()} for side in shapes]
    wrong = [line for row in spelled for line in _misfit(row, zeros)]
    built = Table(spelled, shapes)
    if not wrong:  # what no row fills is left NaN
        lacking = [path for path, x in built.moved(zeros[0], 1).items() if np.isnan(x).any()]
        wrong = [f"JAX's {path} has layers that PyTorch lacks" for path in lacking]
    if wrong:
        raise BadInput(f"shapes that do not fit: {'; '.join(wrong)}; mend the table or a model")
    return built


def _part(path: str, i: int | str, n: int) -> Part:
    name = path.removesuffix(".T")
    layer = None if "{i}" in name or isinstance(i, str) else n
    return Part(name.replace("{i}", str(i)), layer, name != path)


def _lost(n: int, rows: list, shapes: Shapes) -> list[str]:
    """What the table names and the model lacks, and what the table does not name."""
    named = list(dict.fromkeys(part.path for row in rows for part in row[n]))
    rest = [name for name in shapes if name not in named]
    unknown = [name for name in named if name not in shapes]
    lines = [f"the table's {SIDES[n]} {nearest(name, rest or shapes)}" for name in unknown]
    return lines + [f"{SIDES[n]} {nearest(name, unknown or named)}" for name in rest]


def _misfit(row: tuple, leaves: Sequence[Mapping]) -> list[str]:
    """Both sides of a row, if they do not join to one shape."""
    try:
        theirs, ours = (np.concatenate([p.of(leaves[n]) for p in row[n]]) for n in range(2))
        fits = theirs.shape == ours.shape
    except (IndexError, ValueError):  # a stack that lacks the layer, or parts that do not join
        fits = False
    t, j = (", ".join(f"{p.path} {[*leaves[n][p.path].shape]}" for p in row[n]) for n in range(2))
    return [] if fits else [f"PyTorch's {t} and JAX's {j}"]
