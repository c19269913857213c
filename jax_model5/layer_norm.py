"""Layer norm and its gradient, written out so that a GPU has it in one pass over memory."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from jax_model5 import sharding
from jax_model5.kernels import at_least_float32

_ROWS, _CHUNK = 8, 256  # rows of a program of the GPU's kernel, and columns at a time


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def layer_norm(x: jax.Array, scale_D: jax.Array, bias_D: jax.Array, epsilon: float) -> jax.Array:
    """(x - mean) / sqrt(variance + epsilon) * scale + bias over the last axis (Ba et al. 2016).

    In at least float32, with the variance in two passes: E[x^2] - mean^2 loses 1e-2 at large means.
    """
    centered, deviation = _normalized(x.astype(at_least_float32(x.dtype)), epsilon)
    return (centered / deviation * scale_D + bias_D).astype(x.dtype)


def _normalized(x: jax.Array, epsilon: float) -> tuple[jax.Array, jax.Array]:
    """x - mean, and sqrt(variance + epsilon)."""
    centered = x - x.mean(-1, keepdims=True)
    return centered, jnp.sqrt(jnp.square(centered).mean(-1, keepdims=True) + epsilon)


def _forward(x: jax.Array, scale_D: jax.Array, bias_D: jax.Array, epsilon: float) -> tuple:
    return layer_norm(x, scale_D, bias_D, epsilon), (x, scale_D)


def _backward(epsilon: float, residuals: tuple, g: jax.Array) -> tuple:
    x, scale_D = residuals
    D = x.shape[-1]
    fits = x.size // D % _ROWS == 0 and D % _CHUNK == 0 and x.dtype == jnp.bfloat16
    if sharding.is_gpu() and fits:
        g_MxD, *sums = gradients_of_a_gpu(x.reshape(-1, D), scale_D, g.reshape(-1, D), epsilon)
        return g_MxD.reshape(x.shape), *sums
    centered, deviation = _normalized(x.astype(at_least_float32(x.dtype)), epsilon)
    normal, g = centered / deviation, g.astype(centered.dtype)
    g_normal = g * scale_D
    along = (g_normal * normal).mean(-1, keepdims=True)
    g_x = (g_normal - g_normal.mean(-1, keepdims=True) - normal * along) / deviation
    rows = tuple(range(x.ndim - 1))
    return g_x.astype(x.dtype), (g * normal).sum(rows), g.sum(rows)


layer_norm.defvjp(_forward, _backward)


# ---- on a GPU -----------------------------------------------------------------------------------


def gradients_of_a_gpu(
    x_MxD: jax.Array, scale_D: jax.Array, g_MxD: jax.Array, epsilon: float
) -> list[jax.Array]:
    """The gradients of x, scale and bias. XLA takes three passes, two of them in float32."""
    M, D = x_MxD.shape
    sums = jax.ShapeDtypeStruct((M // _ROWS, D), jnp.float32)  # of each program's rows
    g_x_MxD, *parts = pl.pallas_call(
        functools.partial(_kernel, epsilon=epsilon),
        grid=(M // _ROWS,),
        out_shape=(jax.ShapeDtypeStruct((M, D), x_MxD.dtype), sums, sums),
        compiler_params=plgpu.CompilerParams(num_warps=1, num_stages=2),
        interpret=not sharding.is_gpu(),  # in tests
    )(x_MxD, scale_D, g_MxD)
    return [g_x_MxD, *(part.sum(0) for part in parts)]


def _kernel(
    x_ref: Any,
    scale_ref: Any,
    g_ref: Any,
    g_x_ref: Any,
    g_scale_ref: Any,
    g_bias_ref: Any,
    *,
    epsilon: float,
) -> None:
    """The rows of a program, each as chunks of columns."""
    program, D = pl.program_id(0), x_ref.shape[1]
    chunks = [pl.ds(start, _CHUNK) for start in range(0, D, _CHUNK)]

    def mean(parts: list[jax.Array]) -> jax.Array:
        return sum(part.sum() for part in parts) / D

    def add_row(index: Any, sums: tuple) -> tuple:
        row = program * _ROWS + index
        x = [x_ref[row, chunk].astype(jnp.float32) for chunk in chunks]
        g = [g_ref[row, chunk].astype(jnp.float32) for chunk in chunks]
        x_mean = mean(x)
        centered = [part - x_mean for part in x]
        deviation = jnp.sqrt(mean([part * part for part in centered]) + epsilon)
        normal = [part / deviation for part in centered]
        g_normal = [a * scale_ref[chunk] for a, chunk in zip(g, chunks, strict=True)]
        along = mean([a * b for a, b in zip(g_normal, normal, strict=True)])
        g_mean = mean(g_normal)
        for chunk, a, b in zip(chunks, g_normal, normal, strict=True):
            g_x_ref[row, chunk] = ((a - g_mean - b * along) / deviation).astype(g_x_ref.dtype)
        g_scale, g_bias = sums
        g_scale = tuple(s + a * b for s, a, b in zip(g_scale, g, normal, strict=True))
        return g_scale, tuple(s + a for s, a in zip(g_bias, g, strict=True))

    zeros = tuple(jnp.zeros(_CHUNK, jnp.float32) for _ in chunks)
    for ref, parts in zip(
        (g_scale_ref, g_bias_ref), jax.lax.fori_loop(0, _ROWS, add_row, (zeros, zeros)), strict=True
    ):
        for chunk, part in zip(chunks, parts, strict=True):
            ref[program, chunk] = part
