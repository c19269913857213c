"""Every operation of both models side by side, the first that differs, and the likely cause."""

import contextlib
import dataclasses
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

import portproof
from jax_model5.config import TrainConfig
from parity_tests import bridge, choices, ladder, memory, spec, taps

# Beside each: the worst error measured on a CPU, which it exceeds at most fourfold.
FLOAT32_TOLERANCES = {
    "output": 1.5e-6,  # 5.7e-7
    "gradient": 1.2e-5,  # 3.1e-6
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
    stack: tuple[str, ...] = ()  # where a model stopped: its functions, the innermost last
    stage: str = ""

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
    """The last 5 positions of 9, so that the suffix block has a mask of its own; a trunk of 3."""
    clipped = dataclasses.replace(
        ladder.ADAMW, clip_norm=0.02, schedule="cosine", warmup_steps=2, b2=0.95
    )
    # Of 2 rows each: the micro-batches of a step.
    config = ladder.case(dtype, "last_k", 6, steps=5, accumulate=3, dropout=0.1, optimizer=clipped)
    config = _with_model(config, n_layers=4, vocab_size=23, seq_len=9)
    if dtype == "float64":
        return config
    # In float32 q's gradient cancels: of twelve seeds on two layers 3.1e-6 to 1.4e-5 are rounding.
    return _with_model(dataclasses.replace(config, seed=11), n_layers=2)


def _with_model(config: TrainConfig, **fields: Any) -> TrainConfig:
    return dataclasses.replace(config, model=dataclasses.replace(config.model, **fields))


def first_difference(config: TrainConfig) -> Row | None:
    return next((row for row in rows(config) if not row.passed), None)


def rows(config: TrainConfig, first: Sequence[str] = ()) -> Iterator[Row]:
    """Everything, in the order in which a mistake shows: what comes first is to blame.

    `first`: stages to begin with.
    """
    every = list(stages(config))
    every.sort(key=lambda named: first.index(named[0]) if named[0] in first else len(first))
    for name, stage in every:
        is_last = False
        for row in named(name, stage, config):
            is_last |= is_end(row)
            yield row
        if is_last:
            return


def named(name: str, stage: Iterator[Row], config: TrainConfig) -> Iterator[Row]:
    """A stage's rows under its name; the last one says where a model stopped."""
    try:
        for row in stage:
            yield dataclasses.replace(row, stage=name)
    except Exception as error:
        yield dataclasses.replace(_stop(error, name, config), stage=name)


def is_end(row: Row) -> bool:
    """One side stops, or its weights do not fit the other: nothing else can be compared."""
    return not row.passed and (row.what == "stops" or row.stage == "parameters")


def stages(config: TrainConfig) -> Iterator[tuple[str, Iterator[Row]]]:
    """(name, rows) of what is compared, in order; a rung of the ladder by what it judges."""
    off = _with_model(config, dropout=0.0)
    one_block = _with_model(off, n_layers=1)

    def rung(name: str, of_the_ladder: str, config: TrainConfig = off) -> tuple:
        return name, _rung(of_the_ladder, config, name)

    yield rung("parameters", "1 weights")
    yield "operations", _operations(off)
    yield rung("ln_f at mean 300", "2 layer norm, mean 300")
    yield rung("large scores", "2 large scores")
    yield rung("loss", "4 losses by position", one_block)
    yield rung("gradients", "5 gradients")
    if config.model.dropout:
        yield "operations, dropout on", _operations(config)
    for update in ladder.OPTIMIZERS.values():
        of_update = dataclasses.replace(one_block, optimizer=update)
        yield rung("optimizer", "6 updates", of_update)
    yield rung("step", "7 trajectory, dropout", config)
    yield rung("train and eval mode", "8 train/eval", config)
    if config.model.dtype != "float64":
        return
    yield rung("suffix path and KV cache", "3 logits")
    yield rung("optimizer", "6 schedules")
    for n, other in enumerate(choices.others(config), 2):
        yield f"configuration {n}", _steps_of(other, choices.words(other, config))
        if n < 4:  # untied, unscaled, tanh and one micro-batch; a trunk in a loop
            yield rung("train and eval mode", "8 train/eval", other)
    for part in memory.parts():
        yield "memory", _memory(part)
    yield rung("bfloat16", "8 bfloat16", config)
    yield rung("four devices", "8 four devices", config)
    if config.model.dropout:
        yield rung("dropout by chance", "9 dropout, by chance", config)
    yield rung("initial weights", "9 initial weights, by chance", config)


# ---- a model that stops -------------------------------------------------------------------------

_SOURCES = {"jax_model5": "JAX", "torch_ref": "PyTorch"}


def _stop(error: Exception, stage: str, config: TrainConfig) -> Row:
    """The functions of either model from which an error came, the innermost to blame.

    Where it came from neither, the stage that could not go on with what they returned.
    """
    frames = [
        (_SOURCES[path.parent.name], path, line, frame.f_code.co_qualname.replace(".<locals>", ""))
        for frame, line in traceback.walk_tb(error.__traceback__)
        for path in [Path(frame.f_code.co_filename)]
        if path.parent.name in _SOURCES
    ]
    stack = tuple(f"{path.stem}.{name}" for _, path, _, name in frames)
    words = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    if isinstance(error, portproof.BadInput):  # a mask that does not fit: either side may be wrong
        words = str(error)
    elif frames:
        calls = [f"{path.parent.name}/{path.name}:{line}" for _, path, line, _ in frames[::-1]]
        words = f"{frames[-1][0]} stops there ({', from '.join(calls)}): {words}"
    place = stack[-1] if stack else stage
    fields = config.model.dtype, config.model.dropout, np.inf, np.inf, 0.0
    return Row(place, "stops", *fields, words, stack)


def _rung(rung: str, config: TrainConfig, operation: str) -> Iterator[Row]:
    """A rung of the ladder; a gradient's operation is the one that owns the parameter."""
    measured = ladder.measure(rung, "", config)
    of_all = _of_all_leaves(measured) if operation == "gradients" else operation
    for m in measured:
        owner = of_all or _owner(m.where, config)
        fields = m.dtype, config.model.dropout, m.max_abs, m.error, m.tolerance
        yield Row(owner, f"{rung.partition(' ')[2]}: {m.where}", *fields)


def _of_all_leaves(measured: Sequence[ladder.Measurement]) -> str:
    """What no operation explains, for all have passed: every leaf is wrong, or by one factor."""
    errors = [m.error for m in measured if not m.where.endswith(", keys")]
    if not all(error > measured[0].tolerance for error in errors) or np.inf in errors:
        return ""
    return "step" if np.allclose(errors, errors[0], rtol=1e-6, atol=0) else "loss"


def _steps_of(config: TrainConfig, words: str) -> Iterator[Row]:
    """Of another configuration; where they differ its operations come first, to name the one."""
    rows = list(_rung("7 trajectory, dropout", config, "step"))
    if not all(row.passed for row in rows):
        on = [*_operations(config)] if config.model.dropout else []
        rows = [*_operations(_with_model(config, dropout=0.0)), *on, *rows]
    for row in rows:
        cause = "" if row.passed else "; ".join(filter(None, (row.cause, f"with {words}")))
        yield dataclasses.replace(row, cause=cause)


def _memory(part: Callable[[], list[memory.Figure]]) -> Iterator[Row]:
    for operation, what, found, expected in part():
        error = 0.0 if found == expected else np.inf
        cause = f"{found} instead of {expected}; it is JAX that departs" if error else ""
        # Traced in float32 with dropout; no number is computed.
        yield Row(operation, f"memory: {what}", "float32", 0.1, error, error, 0.0, cause)


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
            # A cause that cannot be told is left out.
            with contextlib.suppress(ValueError, TypeError, KeyError, IndexError):
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
    mask, site = _SITES.get(operation, ("", ""))
    if site and pair.config.model.dropout_at(site) and mask not in inputs.keep:
        return "in JAX, dropout is left out"
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


# The dropout that an operation ends with: its mask, and its site in the config.
_SITES = {
    "embedding dropout": ("drop", "embedding"),
    "attention weights": ("attn/drop", "attention"),
    "attention residual": ("attn_drop", "attention_output"),
    "MLP residual": ("mlp_drop", "mlp"),
}


def _is(value: Any, found: Any, tolerance: float) -> bool:
    return ladder.relative(*_last(found, value)) <= tolerance


def _kind_of_error(value: Any, right: Any) -> str:
    """Only what explains the whole error to rounding."""
    value, right = _last(value, right)
    if value.shape != right.shape:
        return ": it has another shape"
    if not np.isfinite(value).all():
        return ": it is not finite"
    factor = float(np.vdot(value, right) / np.vdot(right, right))
    if value.size > 1 and _is(factor * right, value, 1e-10):
        return f" by a factor of {factor:.6g}"
    for dtype in (jnp.bfloat16, np.float16, np.float32):
        if np.dtype(dtype).itemsize < value.dtype.itemsize and _is(value.astype(dtype), value, 0):
            return f": its values are those of {np.dtype(dtype).name}"
    return ""


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

_PASSES = {  # stage: what a row of outputs and one of gradients stand under
    "operations": ("2 taps forward", "4 taps backward"),
    "operations, dropout on": ("7 dropout, forward", "7 dropout, backward"),
}


def as_report(rows: Sequence[Row]) -> portproof.Report:
    """The same for the terminal and the page."""
    return portproof.Report([_plain(row) for row in rows])


def _plain(row: Row) -> portproof.report.Row:
    name, _, kind = row.what.rpartition(", ")
    place, after, stage = row.what, "", row.stage
    if kind in ("output", "gradient"):
        forward, backward = _PASSES.get(stage, (f"{stage}, forward", f"{stage}, backward"))
        place, stage = name, forward if kind == "output" else backward
        after = row.operation.removesuffix(", backward") if kind == "gradient" else ""
    elif not row.passed:
        place = f"{row.operation} ({row.what})"
    fields = stage, row.dtype, place, row.error, row.tolerance
    return portproof.report.Row(*fields, after=after, note=row.cause)


def covered(rows: Sequence[Row]) -> str:
    """What was compared, in one line, and what was not."""
    stages = list(dict.fromkeys(row.stage for row in rows))
    return (
        f"{len(rows)} figures compared: {', '.join(stages)}; not compared here: a GPU's own "
        "kernels, PyTorch's bfloat16, data, checkpoints (tests/)"
    )
