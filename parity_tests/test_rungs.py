"""Faults that one rung is there for: each is planted, and fails that rung at its place."""

import contextlib
import dataclasses
import functools
import math
import subprocess
import sys
from unittest import mock

import jax
import jax.numpy as jnp
import optax
import pytest
import torch
import torch.nn.functional as F

import torch_ref.model
import torch_ref.step
from jax_model5 import generate, kernels, layer_norm, losses, model, optimizer, step, trees
from jax_model5.config import TEST_METRICS, ModelConfig
from parity_tests import ladder, report
from tests.tiny import ROOT

_attention, _dropout, _in_chunks = F.scaled_dot_product_attention, F.dropout, losses._in_chunks
_threefry, _random_bits = kernels.threefry2x32, kernels.random_bits
_keep_mask, _nn_normal = model.keep_mask, torch.nn.init.normal_
_causal = model.causal_attention
_masked, _make_scheduler = model.masked_attention, torch_ref.step.make_scheduler
_scan, Block = model.nn.scan, torch_ref.model.Block
_init_block, _run_block = Block.__init__, Block.forward
_optimizer, _schedule, _adamw = optimizer.optimizer, optimizer._schedule, optax.adamw
_clip, _adam, _sgd = torch.nn.utils.clip_grad_norm_, optax.adam, optax.sgd
_nll, _layer_norm, _logits = losses.nll, layer_norm.layer_norm, model.Model5.logits
_init_linear, _init_model = torch_ref.model.init_linear, torch_ref.model.Model5.__init__
_wte_init, _wpe_init = model.wte_init, model.wpe_init
_value_and_grad, _dropout_key, _unstack = jax.value_and_grad, step.dropout_key, generate.unstack
DROPOUT, INITS = "9 dropout, by chance", "9 initial weights, by chance"
STEP, MODES, LOW = "7 trajectory, dropout", "8 train/eval", "8 bfloat16"
LARGE = "2 large scores"


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


def alike_where_scanned(*args, split_rngs, unroll, **fields):
    """Every layer of a loop draws the same."""
    split_rngs = dict.fromkeys(split_rngs, unroll > 1)
    return _scan(*args, split_rngs=split_rngs, unroll=unroll, **fields)


def same_for_all_heads(key, rate, shape):
    shape_of_one = (shape[0], 1, *shape[2:]) if len(shape) == 4 else shape
    return jnp.broadcast_to(_keep_mask(key, rate, shape_of_one), shape)


def constant_at_once(config, steps):
    if config.schedule == "constant":
        return optax.constant_schedule(config.learning_rate)
    return _schedule(config, steps)


def two_sites_swapped(self, config):
    _init_block(self, config)
    self.attn.attend.rate, self.attn_drop.p = self.attn_drop.p, self.attn.attend.rate


def seeded(self, x_BxLxD):
    torch.manual_seed(0)
    return _run_block(self, x_BxLxD)


def in_bfloat16(tree):
    return jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16).astype(leaf.dtype), tree)


def low_gradients(function):
    def run(*args):
        value, gradients = _value_and_grad(function)(*args)
        return value, in_bfloat16(gradients)

    return run


def low_update(*args):
    right = _optimizer(*args)
    return right._replace(update=lambda g, *state: right.update(in_bfloat16(g), *state))


@jax.custom_vjp
def overflows_backward(z, targets):
    return _nll(z, targets)


overflows_backward.defvjp(
    lambda z, targets: (_nll(z, targets), (z, targets)),
    lambda kept, g: (
        g[..., None] * (jnp.exp(kept[0]) / jnp.exp(kept[0]).sum(-1, keepdims=True)
                        - jax.nn.one_hot(kept[1], kept[0].shape[-1])), None),
)  # fmt: skip


def in_one_pass(x, scale, bias, epsilon):
    mean = x.mean(-1, keepdims=True)
    deviation = jnp.sqrt((x * x).mean(-1, keepdims=True) - mean**2 + epsilon)
    return (x - mean) / deviation * scale + bias


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def one_pass_backward(x, scale, bias, epsilon):
    return _layer_norm(x, scale, bias, epsilon)


one_pass_backward.defvjp(
    lambda *of: (_layer_norm(*of), of[:3]),
    lambda epsilon, of, g: jax.vjp(functools.partial(in_one_pass, epsilon=epsilon), *of)[1](g),
)


def low_logits(self, x):
    return _logits(self, x).astype(self.config.dtype)


def not_of_a_tied_table(weight, bias, config):
    if weight.shape[0] != config.vocab_size or not config.tied_head:
        _init_linear(weight, bias, config)


def wpes_where_tied(config):
    if config.tied_head and config.init == "course":
        return _wpe_init(config)
    return _wte_init(config)


def head_of_its_own(self, config):
    """PyTorch's own init: the head does not begin as the table."""
    _init_model(self, config)
    if config.init == "torch" and not config.tied_head:
        torch.nn.init.normal_(self.head.weight)


def from_the_end(self, tokens_BxL):
    positions_L = torch.arange(self.config.seq_len)[-tokens_BxL.shape[1] :]
    return self.wte(tokens_BxL) + self.wpe(positions_L)


LN_SWAPPED = {"ln_1.weight": "ln_2.weight", "ln_2.weight": "ln_1.weight"}

# rung, what it names, target, name, value
FAULTS = [
    (DROPOUT, "PyTorch, blocks.0.attn.attend: share",
     F, "scaled_dot_product_attention", never_drops),
    (DROPOUT, "PyTorch, drop: share", F, "dropout", drops_more),
    (DROPOUT, "JAX, block 0, drop: share", model, "keep_mask",
     lambda key, rate, shape: _keep_mask(key, rate + 0.03, shape)),
    (DROPOUT, "a mask of its own", model.Dropout, "key", lambda self: jax.random.key(7)),
    (DROPOUT, "attn/drop: a mask of its own", model.Dropout, "key",
     lambda self: self.scope.rngs["dropout"].as_jax_rng()),
    (DROPOUT, "block 1, mlp_drop: a mask of its own", model.nn, "scan", alike_where_scanned),
    (DROPOUT, "attn/drop: axis 1 varies", model, "keep_mask", same_for_all_heads),
    (DROPOUT, "PyTorch, blocks.0.attn_drop: nothing is dropped", Block, "__init__",
     two_sites_swapped),
    (DROPOUT, "PyTorch, blocks.1.mlp_drop, pass", Block, "forward", seeded),
    (DROPOUT, "rate * 2**32 is kept", kernels, "keep_mask",
     lambda key, rate, shape: kernels.random_bits(key, shape) > kernels.threshold(rate)),
    (DROPOUT, "the bits of JAX's own Threefry", kernels, "threefry2x32",
     lambda *arguments: _threefry(*arguments) ^ 1 << 31),
    (DROPOUT, "the bits of JAX's own rbg", kernels, "random_bits", first_rows_of_rbg),
    (INITS, "JAX, init course: last_block/attn/qkv/kernel: kurtosis", model, "kernel_init",
     uniform),
    (INITS, "fc/kernel: layers differ", model.nn, "scan", alike_where_scanned),
    (INITS, "keys differ", jax.random, "fold_in", lambda key, data: jax.random.key(0)),
    (INITS, "PyTorch, init course: wte: standard", torch_ref.model, "init_linear",
     not_of_a_tied_table),
    (INITS, "JAX, init course: wte: standard", model, "wte_init", wpes_where_tied),
    (INITS, "PyTorch, init torch: head begins as wte", torch_ref.model.Model5, "__init__",
     head_of_its_own),
    (INITS, "JAX, init course: wpe: kurtosis", model, "wpe_init",
     lambda config: model.nn.initializers.xavier_normal()),
    (DROPOUT, "share that is dropped", ModelConfig, "dropout_at",
     lambda self, site: self.dropout / 2),
    (INITS, "PyTorch, init course: last_block/attn/qkv/kernel: standard", torch.nn.init, "normal_",
     lambda weight, mean=0.0, std=1.0: _nn_normal(weight, mean, 1.1 * std)),
    ("4 losses by position", "losses of the last 5", losses, "_in_chunks", last_first),
    ("4 losses by position", "losses of the last 2", model, "causal_attention", two_swapped),
    ("1 weights", "ln_2.weight, of trunk/ln_1/scale", trees, "BLOCK_LEAVES",
     [(*row[:3], LN_SWAPPED.get(row[3], row[3])) for row in trees.BLOCK_LEAVES]),
    (LARGE, "losses", losses, "nll", lambda z, targets: jnp.log(jnp.exp(z).sum(-1))
     - jnp.take_along_axis(z, targets[..., None], -1)[..., 0]),
    (LARGE, "attention", jax.nn, "softmax",
     lambda z: jnp.exp(z) / jnp.exp(z).sum(-1, keepdims=True)),
    (LARGE, "losses, backward", losses, "nll", overflows_backward),
    ("2 layer norm, mean 300", "ln_f, backward", model, "layer_norm", one_pass_backward),
    ("3 logits", "logits, of fewer tokens", torch_ref.model.Model5, "embed", from_the_end),
    ("6 schedules", "constant after 2", optimizer, "_schedule", constant_at_once),
    ("3 logits", "the head of a text is head", generate, "unstack",
     lambda params, c: _unstack({**params, "head": params["wte"]}, c)),
    ("3 logits", "KV cache", model, "masked_attention", sees_all),
    (LOW, "softmax in bfloat16", kernels, "at_least_float32", lambda dtype: dtype),
    (LOW, "product mi,io->mo in bfloat16", kernels, "_product",
     lambda axes, a, b: jnp.einsum(axes, a, b) + 1 - 1),
    (LOW, "layer norm in bfloat16", layer_norm, "at_least_float32", lambda dtype: dtype),
    (LOW, "loss in bfloat16", losses, "at_least_float32", lambda dtype: dtype),
    (LOW, "gradients of micro-batches", jax, "value_and_grad", low_gradients),
    (LOW, "gradients reach the optimizer", step, "optimizer", low_update),
    (LOW, "logits in float32", kernels, "matmul_transposed",
     lambda x, table: (x @ table.T.astype(x.dtype)).astype(jnp.float32)),
    (LOW, "layer norm of float32's scale", model, "at_least_float32", lambda dtype: dtype),
    (LOW, "gradient of wte's rows", model, "at_least_float32", lambda dtype: dtype),
    (LOW, "logits of the model", model.Model5, "logits", low_logits),
    (LOW, "PyTorch under bfloat16", torch_ref.step, "autocast",
     lambda *_: contextlib.nullcontext()),
    (MODES, "the dropout key", step, "dropout_key",
     lambda key, step, micro_batch: jax.random.fold_in(key, step)),
    (MODES, "the dropout key", step, "dropout_key",
     lambda key, step, micro_batch: _dropout_key(key, step % 256, micro_batch)),
    (MODES, "eval mode: final_token_nll", step, "TEST_METRICS", TEST_METRICS[::-1]),
    (MODES, "eval mode: all_token_nll", torch_ref.step, "TEST_METRICS", TEST_METRICS[::-1]),
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


def momentum_of_rates(learning_rate, momentum):
    """As some write SGD: the rate of each step stays in the sum."""
    if momentum is None:
        return _sgd(learning_rate)
    return optax.chain(optax.scale_by_learning_rate(learning_rate), optax.trace(momentum))


def without_warm_up_constant(config, steps):
    constant = dataclasses.replace(config, schedule="constant")
    return _schedule(config if config.warmup_steps else constant, steps)


def decay_before_the_clip(config, steps):
    plain = dataclasses.replace(config, clip_norm=0.0, weight_decay=0.0)
    decay, clip = optax.add_decayed_weights(config.weight_decay), optimizer._clip(config.clip_norm)
    return optax.chain(decay, clip, _optimizer(plain, steps))


def always_decays(*args, weight_decay, **fields):
    return _adamw(*args, weight_decay=weight_decay or 0.01, **fields)


def always_clips(weights, max_norm):
    return _clip(weights, 1.0 if max_norm == math.inf else max_norm)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("update", "target", "name", "value"),
    [
        ("sgd, cosine at once, clipped", optimizer, "_schedule", without_warm_up_constant),
        (
            "adam, other moments, linear at once, clipped",
            optimizer,
            "_schedule",
            without_warm_up_constant,
        ),
        ("sgd, cosine at once, clipped", optimizer, "optimizer", decay_before_the_clip),
        (
            "adam, other moments, linear at once, clipped",
            optimizer,
            "optimizer",
            decay_before_the_clip,
        ),
        ("adamw without decay or momentum", optax, "adamw", always_decays),
        ("adamw", torch.nn.utils, "clip_grad_norm_", always_clips),
        (
            "adam, other moments, linear at once, clipped",
            optax,
            "adam",
            lambda rate, **_: _adam(rate),
        ),
        ("sgd, momentum, linear after one step, a limit above", optax, "sgd", momentum_of_rates),
    ],
)
def test_a_fault_of_an_update_fails_the_optimizer_that_is_there_for_it(update, target, name, value):
    config = dataclasses.replace(report.default_config("float64"), workdir=f"{update} {value}")
    config = dataclasses.replace(config, optimizer=ladder.OPTIMIZERS[update])
    with mock.patch.object(target, name, value):
        assert failures("6 updates", config) != []


def test_rows_in_another_order_are_invisible_to_a_mean():
    config = dataclasses.replace(ladder.case("float64", "last_k"), workdir="order")
    with mock.patch.object(losses, "_in_chunks", last_first):
        assert failures("4 loss", config) == []
        assert failures("4 losses by position", config) != []


ON_DEVICES = """
import jax
jax.config.update("jax_num_cpu_devices", 4)
from jax_model5 import programs, sharding
from parity_tests import ladder, report
{name} = {value}
rows = ladder.measure("8 four devices", "", report.default_config("float64"))
assert len(rows) > 30
print([row.where for row in rows if not row.passed])
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "value", "where"),
    [
        ("sharding.mean_gradients", "lambda tree, specs: tree", "grad_norm of step 1"),
        ("sharding.mean", "lambda tree: tree", "tested: all_token"),
        (
            "sharding.first_row",
            "lambda n: jax.lax.axis_index(('data', 'fsdp')) if sharding.n_devices() > 1 else 0",
            "loss of step 1",
        ),
        ("programs.len", "lambda results: 1", "tested: all_token"),
    ],
)
def test_what_does_not_meet_is_seen_on_four_devices(name, value, where):
    script = ON_DEVICES.format(name=name, value=value)
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert where in done.stdout, done.stderr[-2000:]
