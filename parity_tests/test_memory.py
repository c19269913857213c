"""What a step keeps between its passes is as stated, and each way to keep more is seen."""

import functools
from unittest import mock

import jax
import pytest

from jax_model5 import kernels, losses, model, sharding
from parity_tests import memory


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def gathered_low(shard, axis, dtype):
    """Its gradients are added up as they come."""
    return jax.lax.all_gather(shard.astype(dtype), "fsdp", axis=axis, tiled=True)


gathered_low.defvjp(
    lambda shard, axis, dtype: (gathered_low(shard, axis, dtype), shard[:0]),
    lambda axis, dtype, rows, g: (
        jax.lax.psum_scatter(g, "fsdp", scatter_dimension=axis, tiled=True).astype(rows.dtype),
    ),
)


def of_four_at_most(run, *, unroll, scan=model.nn.scan, **how):
    return scan(run, unroll=min(unroll, 4), **how)


FAULTS = {
    "no remat": ("attention residual", model.nn, "remat", lambda run, **_: run),
    "the projection is computed again": (
        "q, k, v",
        model,
        "_SAVED",
        {**model._SAVED, "dots": None},
    ),
    "a shallower trunk in a loop": ("MLP residual", model, "UNROLLED", 3),
    "a deeper trunk unrolled": ("MLP residual", model, "UNROLLED", 5),
    "attention without a name": ("attention", model, "checkpoint_name", lambda x, name: x),
    "a table that is not padded": ("logits", kernels, "_padded", lambda x, axis: x),
    "more logits at once": ("loss", losses, "ROWS", 1025),
    "logits kept": ("loss", losses.jax, "checkpoint", lambda function, policy: function),
    "log sums computed again": ("loss", losses, "checkpoint_name", lambda x, name: x),
    "norms that share the update's squares": (
        "step",
        memory.jax.lax,
        "optimization_barrier",
        lambda tree: tree,
    ),
    "a barrier in the passes": (
        "step",
        model,
        "gelu",
        lambda x, approximate: jax.lax.optimization_barrier(jax.nn.gelu(x, approximate)),
    ),
    "a trunk in parts on a GPU": ("MLP residual", model.nn, "scan", of_four_at_most),
    "sums over devices in bfloat16": ("step", sharding, "_gathered", gathered_low),
}


def differing():
    figures = [figure for part in memory.parts() for figure in part()]
    return [operation for operation, _, found, expected in figures if found != expected]


def test_a_step_keeps_what_is_stated():
    assert differing() == []


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS)
def test_what_keeps_more_or_less_is_seen(fault):
    operation, *place, other = FAULTS[fault]
    with mock.patch.object(*place, other):
        assert operation in differing()
