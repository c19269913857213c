"""Causal attention as kernels of a GPU, dropout inside: no score and no mask is in its memory.

FlashAttention-2 (Dao 2023) in Pallas. Each program of a kernel has one head of one sequence and a
block of its positions; block 0 are the first `_BLOCK` of them.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from jax_model5 import sharding
from jax_model5.kernels import threefry_first_word, threshold

_BLOCK = 64  # positions


def fits(n_positions: int, head_width: int, dtype: Any) -> bool:
    """Whether the kernels compute windows of this length, heads of this width and this dtype."""
    is_whole = n_positions % (2 * _BLOCK) == 0 and head_width in (32, 64, 128)
    return is_whole and jnp.dtype(dtype) == jnp.bfloat16


def pairs_of_blocks(n_positions: int) -> int:
    """Query-key pairs that the kernels compute of a window: whole blocks up to the diagonal."""
    n_blocks = n_positions // _BLOCK
    return n_blocks * (n_blocks + 1) // 2 * _BLOCK**2


def causal_attention(
    qkv_BxLx3D: jax.Array,
    bias_3D: jax.Array,
    keys_2x2: jax.Array,
    *,
    n_heads: int,
    rate: float,
) -> jax.Array:
    """y_BxLxD of queries, keys and values side by side, as `kernels.causal_attention` gives it.

    Their bias is added here. `keys_2x2` holds the threefry keys of the masks of both halves of the
    queries; with rate 0 nothing is dropped.
    """
    first_row = sharding.first_row(len(qkv_BxLx3D))
    return _attention(qkv_BxLx3D, bias_3D, keys_2x2, first_row[None], n_heads, rate)


# ---- the two kernels and their gradient rule ----------------------------------------------------


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _attention(*arguments: Any) -> jax.Array:
    return _forward(*arguments)[0]


def _forward(
    qkv_BxLx3D: jax.Array,
    bias_3D: jax.Array,
    keys_2x2: jax.Array,
    first_row_1: jax.Array,
    n_heads: int,
    rate: float,
) -> tuple[jax.Array, tuple]:
    B, L, D = *qkv_BxLx3D.shape[:2], len(bias_3D) // 3
    inputs = keys_2x2, first_row_1, bias_3D.astype(qkv_BxLx3D.dtype), qkv_BxLx3D
    y_BxLxD, log_sums_BxHxL = _call(
        functools.partial(_forward_kernel, shape=_Shape(n_heads, D // n_heads, L, rate)),
        grid=(B, n_heads, L // _BLOCK),
        out_shape=(
            jax.ShapeDtypeStruct((B, L, D), qkv_BxLx3D.dtype),
            jax.ShapeDtypeStruct((B, n_heads, L), jnp.float32),
        ),
    )(*inputs)
    y_BxLxD = checkpoint_name(y_BxLxD, "attention")
    log_sums_BxHxL = checkpoint_name(log_sums_BxHxL, "attention")
    return y_BxLxD, (inputs, bias_3D, y_BxLxD, log_sums_BxHxL)


def _backward(n_heads: int, rate: float, residuals: tuple, g_BxLxD: jax.Array) -> tuple:
    inputs, bias_3D, y_BxLxD, log_sums_BxHxL = residuals
    B, L, D = y_BxLxD.shape
    products_BxLxD = y_BxLxD.astype(jnp.float32) * g_BxLxD
    products_BxHxL = products_BxLxD.reshape(B, L, n_heads, -1).sum(-1).swapaxes(1, 2)
    gradient_BxLx3D, _ = _call(
        functools.partial(_backward_kernel, shape=_Shape(n_heads, D // n_heads, L, rate)),
        grid=(B, n_heads),
        out_shape=(
            jax.ShapeDtypeStruct((B, L, 3 * D), y_BxLxD.dtype),
            jax.ShapeDtypeStruct((B, L, D), jnp.float32),
        ),
    )(*inputs, g_BxLxD, log_sums_BxHxL, products_BxHxL)
    gradient_3D = gradient_BxLx3D.sum((0, 1), dtype=bias_3D.dtype)
    return gradient_BxLx3D, gradient_3D, None, None


_attention.defvjp(_forward, _backward)


def _call(kernel: Any, **arguments: Any) -> Any:
    parameters = plgpu.CompilerParams(num_warps=4, num_stages=2)
    is_interpreted = not sharding.is_gpu()  # in tests
    return pl.pallas_call(kernel, **arguments, compiler_params=parameters, interpret=is_interpreted)


# ---- inside a kernel ----------------------------------------------------------------------------


class _Shape(NamedTuple):
    n_heads: int
    width: int  # K
    n_positions: int  # L
    rate: float


class _Head:
    """The head of a sequence that a program has: where its blocks are, its scores and masks."""

    def __init__(self, shape: _Shape, keys_ref: Any, first_row_ref: Any, bias_ref: Any):
        self.n_heads, self.width, self.L, self.rate = shape
        self.scale = 1 / math.sqrt(self.width)
        self._row, self._head = pl.program_id(0), pl.program_id(1)
        self._keys_ref, self._row_in_batch = keys_ref, first_row_ref[0] + self._row
        self._bias_ref = bias_ref

    def at(self, block: Any, part: int = 0) -> tuple:
        """Index of a block [_BLOCK, K] in [B, L, 3D] (parts q, k, v) or [B, L, D]."""
        column = (part * self.n_heads + self._head) * self.width
        return self._row, pl.ds(block * _BLOCK, _BLOCK), pl.ds(column, self.width)

    def load(self, qkv_ref: Any, block: Any, part: int = 0) -> jax.Array:
        """Queries, keys or values of a block with their bias."""
        row, rows, columns = self.at(block, part)
        return qkv_ref[row, rows, columns] + self._bias_ref[columns][None]

    def row_at(self, block: Any) -> tuple:
        """Index of a block [_BLOCK] in [B, H, L]."""
        return self._row, self._head, pl.ds(block * _BLOCK, _BLOCK)

    def scores(self, q_NxK: jax.Array, k_LxK: jax.Array, i: Any, j: Any) -> jax.Array:
        """Of query block i and key block j, in units of log 2."""
        scores_NxL = plgpu.dot(q_NxK, k_LxK.T) * (self.scale * math.log2(math.e))
        return jnp.where(_positions(j, 1) <= _positions(i, 0), scores_NxL, -jnp.inf)

    def keep(self, i: Any, j: Any) -> Any:
        """`kernels.keep_mask` of each half, times 1 / (1 - rate)."""
        if self.rate == 0:
            return 1.0
        in_half = self.L // 2  # queries of a half; the first half's keys
        half = (i >= in_half // _BLOCK).astype(jnp.int32)
        n = self._head * in_half + _positions(i, 0) - half * in_half
        counter = n * ((half + 1) * in_half) + _positions(j, 1)
        row = jnp.full_like(counter, self._row_in_batch)
        key = self._keys_ref[half, 0], self._keys_ref[half, 1]
        bits = threefry_first_word(key, row.astype(jnp.uint32), counter.astype(jnp.uint32))
        keep_NxL = jnp.where(bits >= threshold(self.rate), 1.0, 0.0).astype(jnp.bfloat16)
        # Times 1: a product's result has a layout that Triton does not try to change. It would
        # else compute the bits once for each layout that their uses have, for minutes.
        one_LxL = (_positions(0, 0) == _positions(0, 1)).astype(jnp.bfloat16)
        return plgpu.dot(keep_NxL, one_LxL) / (1 - self.rate)


def _positions(block: Any, axis: int) -> jax.Array:
    return block * _BLOCK + jax.lax.broadcasted_iota(jnp.int32, (_BLOCK, _BLOCK), axis)


def _forward_kernel(
    keys_ref: Any,
    first_row_ref: Any,
    bias_ref: Any,
    qkv_ref: Any,
    y_ref: Any,
    log_sums_ref: Any,
    *,
    shape: _Shape,
) -> None:
    head, i = _Head(shape, keys_ref, first_row_ref, bias_ref), pl.program_id(2)
    q_NxK = head.load(qkv_ref, i)

    def add(j: Any, carry: tuple) -> tuple:
        y_NxK, top_N, sum_N = carry
        scores_NxL = head.scores(q_NxK, head.load(qkv_ref, j, 1), i, j)
        new_top_N = jnp.maximum(top_N, scores_NxL.max(1))
        shrink_N = jnp.exp2(top_N - new_top_N)
        weights_NxL = jnp.exp2(scores_NxL - new_top_N[:, None])
        sum_N = sum_N * shrink_N + weights_NxL.sum(1)
        weights_NxL = (weights_NxL * head.keep(i, j)).astype(q_NxK.dtype)
        part_NxK = plgpu.dot(weights_NxL, head.load(qkv_ref, j, 2))
        return y_NxK * shrink_N[:, None] + part_NxK, new_top_N, sum_N

    zeros_N = jnp.zeros(_BLOCK, jnp.float32)
    start = jnp.zeros((_BLOCK, head.width), jnp.float32), zeros_N - jnp.inf, zeros_N
    y_NxK, top_N, sum_N = jax.lax.fori_loop(0, i + 1, add, start)
    y_ref[head.at(i)] = (y_NxK / sum_N[:, None]).astype(y_ref.dtype)
    log_sums_ref[head.row_at(i)] = top_N + jnp.log2(sum_N)


def _backward_kernel(
    keys_ref: Any,
    first_row_ref: Any,
    bias_ref: Any,
    qkv_ref: Any,
    g_ref: Any,
    log_sums_ref: Any,
    products_ref: Any,
    gradient_ref: Any,
    dq_ref: Any,
    *,
    shape: _Shape,
) -> None:
    """All blocks of a head: each pair of them is computed once. dq_ref [B, L, D] adds up."""
    head, dtype = _Head(shape, keys_ref, first_row_ref, bias_ref), qkv_ref.dtype

    def add_pair(i: Any, carry: tuple, j: Any) -> tuple:
        dk_LxK, dv_LxK = carry
        q_NxK, g_NxK = head.load(qkv_ref, i), g_ref[head.at(i)]
        k_LxK, v_LxK = head.load(qkv_ref, j, 1), head.load(qkv_ref, j, 2)
        scores_NxL = head.scores(q_NxK, k_LxK, i, j)
        weights_NxL = jnp.exp2(scores_NxL - log_sums_ref[head.row_at(i)][:, None])
        keep_NxL = head.keep(i, j)
        g_NxL = plgpu.dot(g_NxK, v_LxK.T) * keep_NxL - products_ref[head.row_at(i)][:, None]
        g_NxL = (weights_NxL * g_NxL).astype(dtype)
        dq_NxK = jnp.where(j == 0, 0, dq_ref[head.at(i)]) + plgpu.dot(g_NxL, k_LxK)
        dq_ref[head.at(i)] = dq_NxK
        dk_LxK += plgpu.dot(g_NxL.T, q_NxK)
        weights_NxL = (weights_NxL * keep_NxL).astype(dtype)
        return dk_LxK, dv_LxK + plgpu.dot(weights_NxL.T, g_NxK)

    def of_keys(j: Any, _: None) -> None:
        zeros_LxK = jnp.zeros((_BLOCK, head.width), jnp.float32)
        add = functools.partial(add_pair, j=j)
        n_blocks = head.L // _BLOCK
        dk_LxK, dv_LxK = jax.lax.fori_loop(j, n_blocks, add, (zeros_LxK, zeros_LxK))
        gradient_ref[head.at(j, 1)] = (dk_LxK * head.scale).astype(dtype)
        gradient_ref[head.at(j, 2)] = dv_LxK.astype(dtype)
        # The last keys that queries see are their own block's.
        gradient_ref[head.at(j)] = (dq_ref[head.at(j)] * head.scale).astype(dtype)

    jax.lax.fori_loop(0, head.L // _BLOCK, of_keys, None)
