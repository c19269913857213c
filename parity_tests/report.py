"""Every operation of both models side by side, the first that differs, and the likely cause."""

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from jax_model5.config import TrainConfig
from parity_tests import bridge, ladder, spec, taps

# Beside each: the worst error measured on a CPU, which it exceeds at most fourfold.
FLOAT32_TOLERANCES = {
    "output": 1.5e-6,  # 4.0e-7
    "gradient": 1.2e-5,  # 3.5e-6
}
# The operations that own the parameters.
_OWNERS = {"wpe": "embedding", "head": "logits", "attn/qkv": "q, k, v"}
_STACKS = ("trunk", "last_block")


@dataclasses.dataclass(frozen=True)
class Row:
    """One comparison. `operation` is where a difference comes from; `what` was compared."""

    operation: str
    what: str
    dtype: str
    dropout: float
    max_abs: float
    error: float
    tolerance: float
    cause: str = ""

    @property
    def passed(self) -> bool:
        return self.error <= self.tolerance  # NaN fails

    def __str__(self) -> str:
        return (
            f"first operation that differs: {self.operation} ({self.what}, {self.dtype}, dropout "
            f"{self.dropout:g}): error {self.error:.1e}, tolerance {self.tolerance:.1e}"
            + (f"; {self.cause}" if self.cause else "")
        )


def default_config(dtype: str) -> TrainConfig:
    """The last 3 positions of 8, so that the suffix block has a mask of its own."""
    clipped = dataclasses.replace(ladder.ADAMW, clip_norm=0.5)
    return ladder.case(dtype, "last_k", steps=5, dropout=0.1, optimizer=clipped, n_layers=2)


def first_difference(config: TrainConfig) -> Row | None:
    return next((row for row in rows(config) if not row.passed), None)


def rows(config: TrainConfig) -> Iterator[Row]:
    """Everything, in the order in which a mistake shows: what comes first is to blame."""
    off = dataclasses.replace(config, model=dataclasses.replace(config.model, dropout=0.0))
    parameters = list(_rung("1 weights", off, "parameters"))
    yield from parameters
    if not all(row.passed for row in parameters):
        return  # the weights of one side do not fit the other: nothing else can be compared
    yield from _operations(off)
    yield from _rung("2 layer norm, mean 300", off, "ln_f at mean 300")
    yield from _rung("4 loss", off, "loss")
    yield from _rung("5 gradients", off, "")
    if config.model.dropout:
        yield from _operations(config)
    yield from _rung("6 updates", off, "optimizer")
    yield from _rung("7 trajectory", dataclasses.replace(off, batch_size=4, accumulate=2), "step")
    yield from _rung("8 train/eval", config, "train and eval mode")


def _rung(rung: str, config: TrainConfig, operation: str) -> Iterator[Row]:
    """A rung of the ladder; without an operation, that which owns the parameter."""
    for m in ladder.measure(rung, "", config):
        owner = operation or _owner(m.where, config)
        fields = m.dtype, config.model.dropout, m.max_abs, m.error, m.tolerance
        yield Row(owner, f"{rung.partition(' ')[2]}: {m.where}", *fields)


def _owner(leaf: str, config: TrainConfig) -> str:
    """trunk/attn/qkv/kernel -> trunk: q, k, v"""
    if leaf == "wte":
        return "embedding and logits" if config.model.tied_head else "embedding"
    stack, _, path = leaf.rpartition("/")[0].partition("/")
    if not path:
        return _OWNERS.get(leaf, stack or leaf)
    return f"{stack}: {_OWNERS.get(path, path.rpartition('/')[2])}"


# ---- operations ---------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Side:
    """What one model computes: each operation's output, and its gradient."""

    outputs: taps.Values
    gradients: taps.Values


def _operations(config: TrainConfig) -> Iterator[Row]:
    """Outputs as the forward pass reaches them, then gradients as the backward pass does."""
    with ladder.exactly(config.model.dtype):
        outputs, gradients, masks = taps.of_jax(config)
        pair = ladder.Pair(config)
        ours, theirs = Side(outputs, gradients), Side(*taps.of_torch(pair, masks))
    order = taps.names(config.model.n_layers)
    if not config.model.dropout:
        order.remove("embedding dropout")
    differs = False
    for name in order:
        both = _aligned(name, ours.outputs.get(name), theirs.outputs.get(name), is_gradient=False)
        row = _row(name, f"{name}, output", config, *both)
        if not row.passed and not differs:  # what follows has wrong inputs
            row = dataclasses.replace(row, cause=_cause(pair, masks, ours, theirs, row))
            differs = True
        yield row
    for name in reversed(order[:-1]):  # all but the loss
        both = _aligned(
            name, ours.gradients.get(name), theirs.gradients.get(name), is_gradient=True
        )
        culprit = f"{taps.consumer(name, order)}, backward"
        yield _row(culprit, f"{name}, gradient", config, *both)


def _row(operation: str, what: str, config: TrainConfig, ours: Any, theirs: Any) -> Row:
    dtype = config.model.dtype
    kind = what.rpartition(", ")[2]
    tolerance = ladder.FLOAT64_TOLERANCE if dtype == "float64" else FLOAT32_TOLERANCES[kind]
    errors = ladder.max_abs(ours, theirs), ladder.relative(ours, theirs)
    return Row(operation, what, dtype, config.model.dropout, *errors, tolerance)


def _aligned(name: str, ours: Any, theirs: Any, is_gradient: bool) -> tuple[Any, Any]:
    """Our suffix block computes the last N positions only: PyTorch's others are cut off.

    No gradient may have come from them, so ours are 0 there.
    """
    if ours is None or theirs is None:  # a module that is gone, or has another name
        return np.nan, 0.0
    if not is_gradient:
        return _last(ours, theirs)
    missing = theirs.shape[-2] - ours.shape[-2]
    if name.endswith("attention weights"):
        ours = np.tril(ours, missing)  # what the mask hides reaches nothing
    return np.pad(ours, [(0, 0)] * (ours.ndim - 2) + [(missing, 0), (0, 0)]), theirs


def _last(a: Any, b: Any) -> tuple[Any, Any]:
    """Both at the last positions that the shorter one has."""
    n = min(a.shape[-2], b.shape[-2])
    return a[..., -n:, :], b[..., -n:, :]


# ---- the likely cause ---------------------------------------------------------------------------


def _cause(pair: ladder.Pair, masks: Any, ours: Side, theirs: Side, row: Row) -> str:
    """Which side departs from the operation's definition, and the mistake that it makes."""
    block, _, operation = row.operation.rpartition(": ")
    found = {"JAX": ours.outputs, "PyTorch": theirs.outputs}
    missing = [side for side, outputs in found.items() if row.operation not in outputs]
    if missing:
        return f"{missing[0]} does not compute it, or under another name"
    inputs = _inputs(pair, masks, ours, block)
    right = spec.SPEC[operation][""](inputs)
    values = {side: outputs[row.operation] for side, outputs in found.items()}
    wrong = [side for side, value in values.items() if not _is(right, value, row.tolerance)]
    if len(wrong) != 1:
        return "both sides depart from its definition" if wrong else "rounding adds up"
    value = values[wrong[0]]
    for mistake, compute in spec.SPEC[operation].items():
        with contextlib.suppress(ValueError):  # a mistake that cannot be made at these shapes
            if mistake and _is(compute(inputs), value, row.tolerance):
                return f"in {wrong[0]}, {mistake}"
    return f"it is {wrong[0]} that departs from its definition{_kind_of_error(value, right)}"


def _is(value: Any, found: Any, tolerance: float) -> bool:
    return ladder.relative(*_last(found, value)) <= tolerance


def _kind_of_error(value: Any, right: Any) -> str:
    if value.shape[-1] != right.shape[-1]:
        return ": it has another shape"
    if not np.isfinite(value).all():
        return ": it is not finite"
    value, right = _last(value, right)
    factor = float(np.vdot(value, right) / np.vdot(right, right))
    if _is(factor * right, value, 1e-10):
        return f" by a factor of {factor:.6g}"
    error = ladder.relative(value, right)
    named = [dtype for low, high, dtype in _ROUNDING if low < error < high]
    return f": the error is that of {named[0]}" if named else ""


# Relative errors of an operation that rounds to another dtype.
_ROUNDING = ((1e-9, 1e-6, "float32"), (2e-5, 1e-3, "TF32 or float16"), (1e-3, 1e-2, "bfloat16"))


def _inputs(pair: ladder.Pair, masks: Any, ours: Side, block: str) -> spec.Inputs:
    """What the operations of a block (of the root: "") may use."""
    n_layers = pair.n_layers
    layer = int(block.removeprefix("block ")) if block else n_layers
    prefix = f"{block}: " if block else ""
    before = f"block {layer - 1}: MLP residual"
    start = "embedding dropout" if pair.config.model.dropout else "embedding"
    root = {name: leaf for name, leaf in pair.params.items() if name not in _STACKS}

    def exact(leaves: Mapping[str, Any]) -> dict[str, np.ndarray]:
        return {name: np.asarray(leaf, np.float64) for name, leaf in leaves.items()}

    return spec.Inputs(
        config=pair.config.model,
        tokens_BxL=pair.windows[:, :-1],
        targets_BxL=pair.windows[:, 1:],
        values=exact({name.removeprefix(prefix): v for name, v in ours.outputs.items()}),
        block=exact(bridge.flat(pair.block_params(layer))) if block else {},
        root=exact(bridge.flat(root)),
        keep=bridge.masks_of_block(masks, layer, n_layers) if pair.config.model.dropout else {},
        x_BxLxD=ours.outputs.get(before, ours.outputs[start]).astype(np.float64),
    )


# ---- for people ---------------------------------------------------------------------------------


def as_text(rows: Sequence[Row]) -> str:
    """A line for each comparison: relative and largest absolute error, in each dtype."""
    dtypes = list(dict.fromkeys(row.dtype for row in rows))
    lines: dict[tuple[float, str], dict[str, Row]] = {}
    for row in rows:
        lines.setdefault((row.dropout, row.what), {})[row.dtype] = row
    width = max(len(what) for _, what in lines)
    head = "".join(f"{dtype:>10}{'max':>10}" for dtype in dtypes)
    text = [f"{'dropout, what is compared':{width + 5}}{head}"]
    for (dropout, what), by_dtype in lines.items():
        errors = "".join(f"{row.error:10.1e}{row.max_abs:10.1e}" for row in by_dtype.values())
        verdict = "" if all(row.passed for row in by_dtype.values()) else "  DIFFERS"
        text.append(f"{dropout:<5g}{what:{width}}{errors}{verdict}")
    return "\n".join(text)
