"""The table of leaves: one model's parameters under the other's names, there and back."""

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
        leaf = leaves[self.path] if self.layer is None else leaves[self.path][self.layer]
        return leaf.swapaxes(-1, -2) if self.transposed else leaf


@dataclasses.dataclass(frozen=True)
class Table:
    """Rows of tensors that are one when joined on PyTorch's axis 0."""

    rows: tuple[tuple[tuple[str, ...], tuple[Part, ...]], ...]
    torch_shapes: Shapes
    jax_shapes: Shapes

    def to_torch(self, leaves: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """JAX's leaves under PyTorch's names."""
        named: dict[str, np.ndarray] = {}
        for names, parts in self.rows:
            whole = np.concatenate([np.atleast_1d(part.of(leaves)) for part in parts])
            ends = np.cumsum([self.torch_shapes[name][0] for name in names])
            named |= zip(names, np.split(whole, ends[:-1]), strict=True)
        return named

    def to_jax(self, named: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """The inverse."""
        dtype = next(iter(named.values())).dtype
        leaves = {path: np.full(shape, np.nan, dtype) for path, shape in self.jax_shapes.items()}
        for names, parts in self.rows:
            whole = np.concatenate([named[name] for name in names])
            views = [part.of(leaves) for part in parts]
            ends = np.cumsum([len(view) for view in views])
            for view, array in zip(views, np.split(whole, ends[:-1]), strict=True):
                view[...] = array
        return leaves

    def draw(self, seed: int = 0) -> dict[str, np.ndarray]:
        """Weights far from any init, so that biases and scales matter; float32 holds them."""
        random = np.random.default_rng(seed)
        return {
            path: random.normal(0.1, 0.2, shape).astype(np.float32)
            for path, shape in self.jax_shapes.items()
        }


def table(rows: Sequence[tuple], torch_shapes: Shapes, jax_shapes: Shapes) -> Table:
    """The user's rows with every `{i}` spelled out.

    Raises:
      BadInput: leaves without a counterpart, all of them; or shapes that do not fit.
    """
    pairs = [(_listed(theirs), _listed(ours)) for theirs, ours in rows]
    taken = {name for theirs, _ in pairs for name in theirs if "{i}" not in name}
    spelled, problems = [], []
    for theirs, ours in pairs:
        layers: list[int | None] = [None]
        if "{i}" in theirs[0]:
            layers = [*numbers(theirs[0], torch_shapes, taken)]
            if not layers:
                problems.append(f"PyTorch's {nearest(theirs[0], torch_shapes)}")
        spelled += [_spelled(theirs, ours, i) for i in layers]
    problems += _lost("PyTorch's", [n for names, _ in spelled for n in names], torch_shapes)
    problems += _lost("JAX's", [p.path for _, parts in spelled for p in parts], jax_shapes)
    if problems:
        raise BadInput(f"leaves without a counterpart: {'; '.join(problems)}; mend the table")
    _require_shapes(spelled, torch_shapes, jax_shapes)
    return Table(tuple(spelled), torch_shapes, jax_shapes)


def _listed(names: str | Sequence[str]) -> tuple[str, ...]:
    return (names,) if isinstance(names, str) else tuple(names)


def _spelled(theirs: tuple, ours: tuple, i: int | None) -> tuple:
    names = [path.removesuffix(".T").replace("{i}", str(i)) for path in ours]
    parts = [
        Part(name, None if "{i}" in path else i, path.endswith(".T"))
        for name, path in zip(names, ours, strict=True)
    ]
    return tuple(name.replace("{i}", str(i)) for name in theirs), tuple(parts)


def _lost(side: str, named: list[str], shapes: Shapes) -> list[str]:
    """What the table names and the model lacks, and what the table does not name."""
    rest = [name for name in shapes if name not in named]
    unknown = [n for n in dict.fromkeys(named) if n not in shapes]
    lines = [f"the table's {side} {nearest(name, rest or shapes)}" for name in unknown]
    return lines + [f"{side} {nearest(name, unknown or named)}" for name in rest]


def _require_shapes(spelled: list, torch_shapes: Shapes, jax_shapes: Shapes) -> None:
    wrong: list[str] = []
    layers: dict[str, set] = {}
    for part in (part for _, parts in spelled for part in parts if part.layer is not None):
        layers.setdefault(part.path, set()).add(part.layer)
    for path, indices in layers.items():
        if indices != set(range((*jax_shapes[path], 0)[0])):
            shape = list(jax_shapes[path])
            wrong.append(f"JAX's {path} {shape} is a stack of PyTorch's {sorted(indices)}")
    zeros = {path: np.broadcast_to(np.float32(0), shape) for path, shape in jax_shapes.items()}
    for names, parts in spelled if not wrong else ():
        theirs = {name: torch_shapes[name] for name in names}
        ours = {p.path + ".T" * p.transposed: p.of(zeros).shape for p in parts}
        if _joined(theirs) != _joined(ours):
            left, right = (
                ", ".join(f"{name} {list(shape)}" for name, shape in side.items())
                for side in (theirs, ours)
            )
            wrong.append(f"PyTorch's {left} and JAX's {right}")
    if wrong:
        raise BadInput(f"shapes that do not fit: {'; '.join(wrong)}; mend the table or a model")


def _joined(shapes: Shapes) -> tuple:
    """The shape of tensors side by side on axis 0."""
    rests = {tuple(shape[1:]) for shape in shapes.values()}
    return sum(shape[0] for shape in shapes.values()), rests
