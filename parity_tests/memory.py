"""What a training step keeps between its passes, read from the program that JAX traces."""

import collections
import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import jax
import jax.extend
import jax.numpy as jnp

from jax_model5 import losses, sharding, step
from jax_model5.config import ModelConfig, TrainConfig

B, L, D, H, V = 3, 8, 24, 4, 61  # K is 6
Figure = tuple[str, str, Any, Any]
"""(operation, what, found, expected)."""
Traced = dict[str, list[dict[str, Any]]]
"""Of each primitive's equations what counts here."""


def parts() -> list[Callable[[], list[Figure]]]:
    """Of a block, by `remat`; of the loss, in chunks or not; of the norms. No array is made."""
    return [
        functools.partial(_with_jit, part)
        for part in (_of_the_loss, _of_blocks, _of_a_gpu, _of_the_norms, _of_a_mesh)
    ]


def _with_jit(part: Callable[[], Iterator[Figure]]) -> list[Figure]:
    """Without it, as some mutants are run, a scan is a Python loop."""
    with jax.disable_jit(False):
        return [*part()]


def _of_blocks() -> Iterator[Figure]:
    """A trunk of up to 4 layers is unrolled; the masks are always computed again."""
    block = {"MLP residual": (B, L, D)}
    named = {
        "attention residual": (B, L, D),
        "q, k, v": (B, L, 3 * D),
        "attention": (B, H, L, D // H),
        "fc": (B, L, 4 * D),
    }
    for depth, remat, unroll, kept in (
        (5, "dots", 1, block | named),
        (4, "dots", 4, block | named),
        (4, "full", 1, block),
    ):
        config = _config(depth + 1, remat=remat, dtype="bfloat16")
        traced = _traced(step.loss_and_gradients, config)
        none = {"unroll": None, "kept": [], "dtypes": set()}
        forward = next((loop for loop in traced["scan"] if loop["length"] == depth), none)
        of = f"of {depth} blocks, remat {remat}"
        yield "MLP residual", f"unrolled {of}", forward["unroll"], unroll
        found = collections.Counter(forward["kept"])
        expected = collections.Counter((depth, *shape) for shape in kept.values())
        for operation, shape in named.items():
            key = (depth, *shape)
            yield operation, f"arrays of its shape kept {of}", found.pop(key, 0), expected[key]
        yield "MLP residual", f"other arrays kept {of}", found.total(), 0
        yield "embedding", f"dtypes kept {of}", forward["dtypes"], {"bfloat16"}
        if depth == 5:
            yield from _of_a_device(traced, "CPU", {(True, False), (False, False)}, width=V)


def _of_a_gpu() -> Iterator[Figure]:
    """Any trunk is unrolled, all but the parameters barred, the table padded."""
    with _on(is_gpu=True):
        traced = _traced(step.loss_and_gradients, _config(6))
    unrolled = [loop["unroll"] for loop in traced["scan"] if loop["length"] == 5]
    yield "MLP residual", "unrolled on a GPU", set(unrolled), {5}
    yield from _of_a_device(traced, "GPU", {(True, False), (False, True)}, width=64)


def _of_a_device(
    traced: Traced, device: str, barred: set[tuple[bool, bool]], width: int
) -> Iterator[Figure]:
    found = set().union(*(one["parameter, barred"] for one in traced["remat2"]))
    yield "MLP residual", f"barriers in what a {device} computes again", found, barred
    widths = {size for one in traced["dot_general"] for size in one["sizes"]} & {V, 64}
    yield "logits", f"rows of the table in the products of a {device}", widths, {width}
    barriers = len(traced["optimization_barrier"])
    yield "step", f"other barriers in the passes of a {device}", barriers, 0


def _of_the_norms() -> Iterator[Figure]:
    """XLA on a CPU is not to share their squares with the update."""
    given = mock.patch.object(step, "loss_and_gradients", lambda state, *_, **__: (0, state.params))
    for device, barriers in (("CPU", 2), ("GPU", 0)):
        with _on(device == "GPU"), given:
            traced = _traced(step.train_step, _config(6))
        found = len(traced["optimization_barrier"])
        yield "step", f"barriers before the norms on a {device}", found, barriers


def _of_a_mesh() -> Iterator[Figure]:
    """Each device computes its own rows: XLA's partitioner has nothing to decide."""
    auto = (jax.sharding.AxisType.Auto,) * 2
    mesh = jax.sharding.AbstractMesh((2, 2), ("data", "fsdp"), axis_types=auto)
    for operation, function in (("step", step.loss_and_gradients), ("evaluation", _test)):
        with jax.sharding.use_abstract_mesh(mesh):
            traced = _traced(function, _config(1, n_rows=4, dtype="bfloat16"))
        yield operation, "programs for each device of four", len(traced["shard_map"]), 1
        added = {one["dtype"] for name in ("psum", "reduce_scatter") for one in traced[name]}
        yield operation, "dtypes of what four devices add up", added, {"float32"}


def _test(state: Any, _: Any, windows_BxL1: jax.Array, *, config: TrainConfig) -> Any:
    return step.eval_step(state.params, windows_BxL1, config=config)


def _of_the_loss() -> Iterator[Figure]:
    """1024 rows of logits at once, 4096 on a GPU, or a position's; log sums and losses stay."""
    for n_rows, n, is_gpu, chunks in (
        (5, 1200, False, [(5, 5, 204)] * 2),
        (5, 1200, True, [(1, 5, 819)] * 2),
        (17, 1200, True, [(5, 17, 240)] * 2),
        (2, 512, False, []),
        (2, 2048, True, []),
        (1030, 6, False, [(6, 1030, 1)] * 2),
    ):
        with _on(is_gpu):
            traced = _traced(_loss_of_features, _config(1, n_rows, n), _tables(n))
        found = traced["scan"][0]["kept"] if traced["scan"] else []
        of = f"of {n} positions of {n_rows} rows{' on a GPU' * is_gpu}"
        yield "loss", f"kept {of}", found, chunks
        yield "loss", f"computed again {of}", len(traced["remat2"]) > 0, len(chunks) > 0


def _tables(length: int) -> dict[str, jax.ShapeDtypeStruct]:
    shapes = {"wte": (V, D), "wpe": (length, D)}
    return {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in shapes.items()}


def _loss_of_features(tables: Any, _: Any, windows_BxL1: jax.Array, *, config: TrainConfig) -> Any:
    """`position_losses` of a model without blocks, and its gradient."""

    def mean(wte_VxD: jax.Array) -> jax.Array:
        given = {**tables, "wte": wte_VxD}
        n, how = config.model.seq_len, {"config": config, "deterministic": True}
        return losses.position_losses(given, windows_BxL1, n_last=n, **how).mean()

    def features(model: Any, tokens_BxL: jax.Array, **_: Any) -> jax.Array:
        return model.wte_VxD[tokens_BxL]

    with mock.patch.object(losses.Model5, "features", features):
        return jax.grad(mean)(tables["wte"])


@contextlib.contextmanager
def _on(is_gpu: bool) -> Iterator[None]:
    """As if the program were to run there."""
    gpu, cpu = {"return_value": is_gpu}, {"return_value": not is_gpu}
    with (
        mock.patch.object(sharding, "is_gpu", **gpu),
        mock.patch.object(losses, "is_gpu", **gpu),
        mock.patch.object(sharding, "is_cpu", **cpu),
    ):
        yield


def _config(n_layers: int, n_rows: int = B, length: int = L, **fields: Any) -> TrainConfig:
    sizes = {"d_model": D, "n_heads": H, "vocab_size": V, "seq_len": length, "n_layers": n_layers}
    objective: Any = "all_tokens" if n_layers == 1 else "final_token"
    model = ModelConfig(dropout=0.1, **sizes, **fields)
    return TrainConfig(model=model, objective=objective, batch_size=n_rows)


def _traced(function: Any, config: TrainConfig, state: Any = None) -> Traced:
    windows = jax.ShapeDtypeStruct((config.batch_size, config.model.seq_len + 1), jnp.int32)
    key = jax.eval_shape(lambda: jax.random.key(0))
    program = jax.make_jaxpr(lambda *arguments: function(*arguments, config=config))
    found: Traced = collections.defaultdict(list)
    if state is None:  # one for all: remat has no leaf
        plain = dataclasses.replace(config.model, remat="none")
        state = step.abstract_state(dataclasses.replace(config, model=plain))
    for equation in equations(program(state, key, windows).jaxpr):
        found[equation.primitive.name].append(_facts(equation))
    return found


def _facts(equation: Any) -> dict[str, Any]:
    params = equation.params
    match equation.primitive.name:
        case "scan":
            shapes = [var.aval.shape for var in equation.outvars]
            stacked = [shape for shape in shapes if shape[:1] == (params["length"],)]
            dtypes = {str(var.aval.dtype) for var in equation.outvars}
            how = {name: params[name] for name in ("length", "unroll")}
            return how | {"kept": stacked, "dtypes": dtypes}
        case "remat2":
            barred = params["prevent_cse"]
            barred = barred if isinstance(barred, tuple) else [barred] * len(equation.invars)
            is_parameter = [var.aval.ndim in (1, 2) for var in equation.invars]
            return {"parameter, barred": set(zip(is_parameter, barred, strict=True))}
        case "psum" | "reduce_scatter":
            return {"dtype": " ".join(sorted({str(var.aval.dtype) for var in equation.invars}))}
        case "dot_general":
            return {"sizes": [size for var in equation.invars for size in var.aval.shape]}
    return {}


def equations(jaxpr: Any) -> Iterator[Any]:
    """Of a traced program, and of those that it calls."""
    for equation in jaxpr.eqns:
        yield equation
        for inner in jax.extend.core.jaxprs_in_params(equation.params):
            yield from equations(inner)
