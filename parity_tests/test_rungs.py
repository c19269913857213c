"""Faults that one rung is there for: each is planted, and fails that rung at its place."""

import contextlib
import dataclasses
import subprocess
import sys
from unittest import mock

import jax
import jax.numpy as jnp
import pytest
import torch
import torch.nn.functional as F

import torch_ref.model
import torch_ref.step
from jax_model5 import kernels, layer_norm, losses, model, step
from parity_tests import ladder, report
from tests.tiny import ROOT

_attention, _dropout, _in_chunks = F.scaled_dot_product_attention, F.dropout, losses._in_chunks
_threefry, _random_bits = kernels.threefry2x32, kernels.random_bits
_keep_mask, _nn_normal = model.keep_mask, torch.nn.init.normal_
_causal = model.causal_attention
_masked, _make_scheduler = model.masked_attention, torch_ref.step.make_scheduler
DROPOUT, INITS = "9 dropout, by chance", "9 initial weights, by chance"
STEP, MODES, LOW = "7 trajectory, dropout", "8 train/eval", "8 bfloat16"


def never_drops(*args, dropout_p, **fields):
    return _attention(*args, **fields)


def drops_more(x, rate, training, inplace):
    return _dropout(x, rate + 0.01, training) * (1 - rate - 0.01) / (1 - rate)


def sees_all(q, k, v, is_past, drop):
    return _masked(q, k, v, jnp.ones_like(is_past), drop)


def uniform(config):
    """Of the same mean and deviation as the course's normal."""
    bound = 0.02 * 3**0.5
    return lambda key, shape, dtype: jax.random.uniform(key, shape, dtype, -bound, bound)


def without_steps(*args):
    scheduler = _make_scheduler(*args)
    scheduler.step = lambda: None
    return scheduler


def last_first(*args):
    return _in_chunks(*args)[:, ::-1]


def two_swapped(q, k, v, drop):
    y_BxHxNxK = _causal(q, k, v, drop)
    return y_BxHxNxK[:, :, ::-1] if y_BxHxNxK.shape[2] == 2 else y_BxHxNxK


def first_rows_of_rbg(key, shape):
    """Whichever rows of the batch the device has."""
    if jax.random.key_impl(key) == "rbg":
        return jax.random.bits(key, shape, jnp.uint32)
    return _random_bits(key, shape)


# rung, what it names, target, name, value
FAULTS = [
    (DROPOUT, "PyTorch, blocks.0.attn.attend: share",
     F, "scaled_dot_product_attention", never_drops),
    (DROPOUT, "PyTorch, drop: share", F, "dropout", drops_more),
    (DROPOUT, "JAX, block 0, drop: share", model, "keep_mask",
     lambda key, rate, shape: _keep_mask(key, rate + 0.03, shape)),
    (DROPOUT, "a mask of its own", model.Dropout, "key", lambda self: jax.random.key(7)),
    (DROPOUT, "the bits of JAX's own Threefry", kernels, "threefry2x32",
     lambda *arguments: _threefry(*arguments) ^ 1 << 31),
    (DROPOUT, "the bits of JAX's own rbg", kernels, "random_bits", first_rows_of_rbg),
    (INITS, "JAX, init course: last_block/attn/qkv/kernel: kurtosis", model, "kernel_init",
     uniform),
    (INITS, "PyTorch, init course: last_block/attn/qkv/kernel: standard", torch.nn.init, "normal_",
     lambda weight, mean=0.0, std=1.0: _nn_normal(weight, mean, 1.1 * std)),
    ("4 losses by position", "losses of the last 5", losses, "_in_chunks", last_first),
    ("4 losses by position", "losses of the last 2", model, "causal_attention", two_swapped),
    ("3 logits", "KV cache", model, "masked_attention", sees_all),
    (LOW, "softmax in bfloat16", kernels, "at_least_float32", lambda dtype: dtype),
    (LOW, "product mi,io->mo in bfloat16", kernels, "_product",
     lambda axes, a, b: jnp.einsum(axes, a, b) + 1 - 1),
    (LOW, "layer norm in bfloat16", layer_norm, "at_least_float32", lambda dtype: dtype),
    (LOW, "loss in bfloat16", losses, "at_least_float32", lambda dtype: dtype),
    (LOW, "PyTorch under bfloat16", torch_ref.step, "autocast",
     lambda *_: contextlib.nullcontext()),
    (MODES, "the dropout key", step, "dropout_key",
     lambda key, step, micro_batch: jax.random.fold_in(key, step)),
    (STEP, "learning_rate of step", torch_ref.step, "make_scheduler", without_steps),
    (STEP, "wte", torch.nn.utils, "clip_grad_norm_",
     lambda weights, most: torch.nn.utils.get_total_norm(p.grad for p in weights)),
]  # fmt: skip


def failures(rung, config):
    return [str(m) for m in ladder.measure(rung, "", config) if not m.passed]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("rung", "what", "target", "name", "value"), FAULTS, ids=[f"{f[1]}, {f[3]}" for f in FAULTS]
)
def test_a_fault_fails_the_rung_that_is_there_for_it(rung, what, target, name, value):
    config = report.default_config("float64")
    with mock.patch.object(target, name, value):
        # No other measurement's config, so that JAX traces it anew.
        found = failures(rung, dataclasses.replace(config, workdir=f"{what} {name}"))
    assert any(what in failure for failure in found), found


def test_rows_in_another_order_are_invisible_to_a_mean():
    config = dataclasses.replace(ladder.case("float64", "last_k"), workdir="order")
    with mock.patch.object(losses, "_in_chunks", last_first):
        assert failures("4 loss", config) == []
        assert failures("4 losses by position", config) != []


ON_DEVICES = """
import jax
jax.config.update("jax_num_cpu_devices", 4)
from jax_model5 import sharding
from parity_tests import ladder, report
sharding.{name} = lambda values, *specs: values
rows = ladder.measure("8 four devices", "", report.default_config("float64"))
assert len(rows) > 30
print([row.where for row in rows if not row.passed])
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "where"), [("mean_gradients", "grad_norm of step 1"), ("mean", "tested: all_token")]
)
def test_what_does_not_meet_is_seen_on_four_devices(name, where):
    script = ON_DEVICES.format(name=name)
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert where in done.stdout, done.stderr[-2000:]
