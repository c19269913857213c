"""Products, dropout masks and causal attention in the form that XLA runs fast.

Each is equal to its plain form, which its docstring states (tests/test_kernels.py).
"""

import functools
import itertools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from jax_model5 import sharding

Drop = Callable[[jax.Array], jax.Array]


def at_least_float32(dtype: Any) -> Any:
    """The dtype of parameters, softmax and loss when the model computes in `dtype`."""
    return jnp.promote_types(dtype, jnp.float32)


# ---- products -----------------------------------------------------------------------------------


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def product(axes: str, a: jax.Array, b: jax.Array) -> jax.Array:
    """`jnp.einsum(axes, a, b)` of one dtype, each axis in two of the three; backward, two more.

    Of bfloat16 each is added up in float32 and rounded once. JAX's own backward pass transposes,
    and XLA on a CPU then writes the transposed array to memory.
    """
    return _product(axes, a, b)


def _product(axes: str, a: jax.Array, b: jax.Array) -> jax.Array:
    wide = at_least_float32(a.dtype) if sharding.is_cpu() and _is_float32_fast() else a.dtype
    return jnp.einsum(axes, a, b, preferred_element_type=wide).astype(a.dtype)


def _product_forward(axes: str, a: jax.Array, b: jax.Array) -> tuple[jax.Array, tuple]:
    return _product(axes, a, b), (a, b)


def _product_backward(axes: str, residuals: tuple, g: jax.Array) -> tuple[jax.Array, jax.Array]:
    a, b = residuals
    of_a, of_b, of_g = axes.replace("->", ",").split(",")
    return _product(f"{of_g},{of_b}->{of_a}", g, b), _product(f"{of_a},{of_g}->{of_b}", a, g)


product.defvjp(_product_forward, _product_backward)


@functools.cache
def _is_float32_fast() -> bool:
    """Whether XLA's bfloat16 products are faster on this CPU with a float32 result, cast after it.

    Twice as fast on an AMD with AVX-512's bfloat16 instructions, by a user's report; two thirds as
    fast on an Intel with them (docs/performance.md). Both forms round once.
    """
    try:
        cpu = Path("/proc/cpuinfo").read_text()
    except OSError:
        return False
    return "AuthenticAMD" in cpu and "avx512_bf16" in cpu


def matmul(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """`x @ kernel`, [..., I] by [I, O]."""
    # One leading axis: with two, XLA transposes x for the kernel's gradient.
    y_MxO = product("mi,io->mo", x.reshape(-1, x.shape[-1]), kernel)
    return y_MxO.reshape(*x.shape[:-1], -1)


@jax.custom_vjp
def matmul_transposed(x_BxNxD: jax.Array, table_VxD: jax.Array) -> jax.Array:
    """`x @ table.T`, x_BxNxV, accumulated and kept in at least float32.

    Its gradient is rounded to x's dtype before the two products of the backward pass, as PyTorch's
    is under autocast: else bfloat16's largest products are float32's.
    """
    return _matmul_transposed_forward(x_BxNxD, table_VxD)[0]


def _matmul_transposed_forward(x: jax.Array, table_VxD: jax.Array) -> tuple[jax.Array, tuple]:
    B, N, D = x.shape
    # One leading axis, for the sake of the table's gradient: see `matmul`.
    x_MxD = x.reshape(-1, D)
    padded_WxD = _padded(table_VxD.astype(x.dtype), 0)
    wide = at_least_float32(x.dtype)
    logits_MxW = jnp.einsum("md,vd->mv", x_MxD, padded_WxD, preferred_element_type=wide)
    logits_MxV = logits_MxW[:, : len(table_VxD)]
    return logits_MxV.reshape(B, N, -1), (x_MxD, table_VxD)


def _matmul_transposed_backward(residuals: tuple, g: jax.Array) -> tuple[jax.Array, jax.Array]:
    x_MxD, table_VxD = residuals
    g_MxW = _padded(g.reshape(-1, g.shape[-1]).astype(x_MxD.dtype), 1)
    padded_WxD = _padded(table_VxD.astype(x_MxD.dtype), 0)
    gx_MxD = _product("mv,vd->md", g_MxW, padded_WxD)
    g_WxD = jnp.einsum("mv,md->vd", g_MxW, x_MxD, preferred_element_type=table_VxD.dtype)
    return gx_MxD.reshape(*g.shape[:-1], -1), g_WxD[: len(table_VxD)]


def _padded(x: jax.Array, axis: int) -> jax.Array:
    """With zeros to a multiple of 64 tokens on a GPU: its fast products want even addresses."""
    if not sharding.is_gpu():
        return x
    return jnp.pad(x, [(0, -x.shape[i] % 64 if i == axis else 0) for i in range(x.ndim)])


matmul_transposed.defvjp(_matmul_transposed_forward, _matmul_transposed_backward)


def gelu(x: jax.Array, *, approximate: bool) -> jax.Array:
    """`jax.nn.gelu`, the exact one by erf as in PyTorch: by erfc it costs twice as much."""
    if approximate:
        return jax.nn.gelu(x)
    wide = x.astype(at_least_float32(x.dtype))
    return (0.5 * wide * (1 + jax.lax.erf(wide * math.sqrt(0.5)))).astype(x.dtype)


# ---- dropout masks ------------------------------------------------------------------------------


def keep_mask(key: jax.Array, rate: float, shape: tuple[int, ...]) -> jax.Array:
    """`random_bits >= int(rate * 2**32)`: True with probability 1 - rate, to 2**-32."""
    return random_bits(key, shape) >= threshold(rate)


def random_bits(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """`jax.random.bits(key, shape)`, 32 of them; of a threefry key they are `threefry2x32`'s.

    A function of the key and each index in the batch, whichever device has the row.
    """
    first_row = sharding.first_row(shape[0])
    if jax.random.key_impl(key) == "threefry2x32":
        return threefry2x32(jax.random.key_data(key), first_row, shape)
    of_batch = jax.random.bits(key, (sharding.n_devices() * shape[0], *shape[1:]), jnp.uint32)
    return jax.lax.dynamic_slice_in_dim(of_batch, first_row, shape[0])


def threshold(rate: float) -> jax.Array:
    """The least 32 bits that keep an element."""
    return jnp.uint32(int(rate * 2**32))


@functools.partial(jax.jit, static_argnums=2)  # traced and lowered once for all of its uses
def threefry2x32(key_2: jax.Array, first_row: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """First word of Threefry-2x32-20 on the counter (row in the batch, index on the other axes).

    The plain form is `jax.extend.random.threefry_2x32` on those counters (Salmon et al. 2011,
    "Parallel random numbers: as easy as 1, 2, 3"). One expression without memory of its own: XLA
    fuses it into the use of the mask, so that a mask is cheaper to compute again than to store.
    `jax.random.bits` makes several passes over memory on a CPU.
    """
    iotas = [jax.lax.broadcasted_iota(jnp.uint32, shape, axis) for axis in range(len(shape))]
    rest = jnp.zeros_like(iotas[0])
    for size, iota in zip(shape[1:], iotas[1:], strict=True):
        rest = rest * jnp.uint32(size) + iota
    row = iotas[0] + first_row.astype(jnp.uint32)
    return threefry_first_word((key_2[0], key_2[1]), row, rest)


def threefry_first_word(key: tuple[jax.Array, jax.Array], x: jax.Array, y: jax.Array) -> jax.Array:
    """Of Threefry-2x32-20 on each counter (x, y)."""
    keys = (*key, key[0] ^ key[1] ^ jnp.uint32(0x1BD11BDA))
    x, y = x + keys[0], y + keys[1]
    for i in range(5):
        for rotation in ((13, 15, 26, 6), (17, 29, 16, 24))[i % 2]:
            x = x + y
            y = x ^ (y << rotation | y >> (32 - rotation))
        x = x + keys[(i + 1) % 3]
        y = y + keys[(i + 2) % 3] + (i + 1)
    return x


# ---- attention ----------------------------------------------------------------------------------


def causal_attention(
    q_BxHxNxK: jax.Array, k_BxHxLxK: jax.Array, v_BxHxLxK: jax.Array, drop: Drop
) -> jax.Array:
    """`attend` on all N queries at once, y_BxHxNxK, in two halves.

    The first half of the queries never sees the keys after it. `drop` is called once a half.
    """
    N, L = q_BxHxNxK.shape[2], k_BxHxLxK.shape[2]
    ends = sorted({0, N // 2, N})  # of a single query there is one half
    parts = [
        attend(q_BxHxNxK[:, :, i:j], k_BxHxLxK[:, :, :end], v_BxHxLxK[:, :, :end], drop)
        for i, j in itertools.pairwise(ends)
        for end in [L - N + j]
    ]
    return jnp.concatenate(parts, axis=2)


def attend(
    q_BxHxNxK: jax.Array, k_BxHxLxK: jax.Array, v_BxHxLxK: jax.Array, drop: Drop
) -> jax.Array:
    """Causal attention whose N queries are the last of the L positions."""
    N, L = q_BxHxNxK.shape[2], k_BxHxLxK.shape[2]
    is_past_NxL = jnp.arange(L) <= jnp.arange(L - N, L)[:, None]
    return masked_attention(q_BxHxNxK, k_BxHxLxK, v_BxHxLxK, is_past_NxL, drop)


def masked_attention(
    q_XxNxK: jax.Array, k_XxLxK: jax.Array, v_XxLxK: jax.Array, is_past: jax.Array, drop: Drop
) -> jax.Array:
    """softmax(q k^T / sqrt(K)) v over the keys that `is_past` [(X,) N, L] lets a query see.

    X, the heads of all rows, is one axis or two.
    """
    x = "bh"[: q_XxNxK.ndim - 2]
    scores_XxNxL = product(f"{x}nk,{x}lk->{x}nl", q_XxNxK, k_XxLxK)
    scores_XxNxL = scores_XxNxL / math.sqrt(q_XxNxK.shape[-1])
    scores_XxNxL = jnp.where(is_past, scores_XxNxL, -jnp.inf)
    weights_XxNxL = jax.nn.softmax(scores_XxNxL.astype(at_least_float32(scores_XxNxL.dtype)))
    weights_XxNxL = drop(weights_XxNxL.astype(v_XxLxK.dtype))
    return product(f"{x}nl,{x}lk->{x}nk", weights_XxNxL, v_XxLxK)
