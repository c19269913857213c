"""Llama in Flax NNX: RMSNorm, rotary positions, grouped queries, SwiGLU.

B batch, L positions, D width, H heads of width K, G heads of keys and values, F feed-forward.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

import portproof


class Config(NamedTuple):
    V: int
    D: int
    H: int
    G: int
    K: int
    F: int
    N: int  # layers
    rate: float = 0.1


def rotate(x_BxHxLxK):
    """Rotary positions (Su et al. 2021), a feature paired with that half a head away."""
    L, K = x_BxHxLxK.shape[-2:]
    angles_LxK2 = jnp.arange(L)[:, None] * 1e4 ** (-jnp.arange(0, K, 2, x_BxHxLxK.dtype) / K)
    cos, sin = jnp.cos(angles_LxK2), jnp.sin(angles_LxK2)
    a, b = jnp.split(x_BxHxLxK, 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)


def repeat(x_BxGxLxK, times):
    """Each head of keys or values for as many neighbouring heads of queries."""
    return jnp.repeat(x_BxGxLxK, times, axis=1)


def linear(n_in, n_out, rngs):
    return nnx.Linear(n_in, n_out, use_bias=False, rngs=rngs)


class Attention(nnx.Module):
    def __init__(self, c, rngs):
        self.c = c
        self.qkv = linear(c.D, (c.H + 2 * c.G) * c.K, rngs)
        self.drop = nnx.Dropout(c.rate)
        self.out = linear(c.H * c.K, c.D, rngs)

    def __call__(self, x_BxLxD, rngs):
        c, (B, L, _) = self.c, x_BxLxD.shape
        heads_BxSxLxK = self.qkv(x_BxLxD).reshape(B, L, -1, c.K).swapaxes(1, 2)  # S is H + 2 G
        q_BxHxLxK, k_BxGxLxK, v_BxGxLxK = jnp.split(heads_BxSxLxK, [c.H, c.H + c.G], axis=1)
        q_BxHxLxK = portproof.tap("rotated q", rotate(q_BxHxLxK))
        k_BxHxLxK = repeat(rotate(k_BxGxLxK), c.H // c.G)
        v_BxHxLxK = repeat(v_BxGxLxK, c.H // c.G)
        scores_BxHxLxL = q_BxHxLxK @ k_BxHxLxK.mT / c.K**0.5
        past_LxL = jnp.tril(jnp.ones((L, L), bool))
        weights_BxHxLxL = jax.nn.softmax(jnp.where(past_LxL, scores_BxHxLxL, -jnp.inf))
        weights_BxHxLxL = portproof.tap("weights", weights_BxHxLxL)
        dropped_BxHxLxL = self.drop(weights_BxHxLxL, deterministic=rngs is None, rngs=rngs)
        y_BxHxLxK = dropped_BxHxLxL @ v_BxHxLxK
        return self.out(y_BxHxLxK.swapaxes(1, 2).reshape(B, L, -1))


class Layer(nnx.Module):
    def __init__(self, c, rngs):
        self.norm_1 = nnx.RMSNorm(c.D, epsilon=1e-5, rngs=rngs)
        self.attn = Attention(c, rngs)
        self.norm_2 = nnx.RMSNorm(c.D, epsilon=1e-5, rngs=rngs)
        self.gate_up = linear(c.D, 2 * c.F, rngs)
        self.down = linear(c.F, c.D, rngs)

    def __call__(self, x_BxLxD, rngs):
        x_BxLxD = x_BxLxD + self.attn(self.norm_1(x_BxLxD), rngs)
        gate_BxLxF, up_BxLxF = jnp.split(self.gate_up(self.norm_2(x_BxLxD)), 2, axis=-1)
        return x_BxLxD + self.down(nnx.silu(gate_BxLxF) * up_BxLxF)


class Llama(nnx.Module):
    def __init__(self, c, rngs):
        # nnx.Embed rounds to the dtype that its table had when it was made.
        self.embed = nnx.Param(jax.random.normal(rngs.params(), (c.V, c.D)))
        self.layers = nnx.List([Layer(c, rngs) for _ in range(c.N)])
        self.norm = nnx.RMSNorm(c.D, epsilon=1e-5, rngs=rngs)
        self.head = linear(c.D, c.V, rngs)

    def __call__(self, tokens_BxL, rngs):
        x_BxLxD = portproof.tap("embedding", self.embed[tokens_BxL])
        for layer in self.layers:
            x_BxLxD = layer(x_BxLxD, rngs)
        return self.head(self.norm(x_BxLxD))
