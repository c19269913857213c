"""Llama in Flax NNX: RMSNorm, rotary positions, grouped queries, SwiGLU.

B batch, L positions, D width, H heads of width K, G heads of keys and values, F feed-forward.
"""

import jax
import jax.numpy as jnp
from flax import nnx

import portproof

V, D, H, G, K, F, N, RATE = 61, 24, 4, 2, 6, 40, 2, 0.1


def rotate(x_BxHxLxK):
    """Rotary positions (Su et al. 2021), a feature paired with that half a head away."""
    frequencies = 1e4 ** (-jnp.arange(0, K, 2, x_BxHxLxK.dtype) / K)
    angles = jnp.arange(x_BxHxLxK.shape[-2])[:, None] * frequencies
    a, b = jnp.split(x_BxHxLxK, 2, axis=-1)
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)


def repeat(x_BxGxLxK):
    """Each head of keys or values for as many neighbouring heads of queries."""
    return jnp.repeat(x_BxGxLxK, H // G, axis=1)


def linear(n_in, n_out, rngs):
    return nnx.Linear(n_in, n_out, use_bias=False, rngs=rngs)


def norm(rngs):
    return nnx.RMSNorm(D, epsilon=1e-5, rngs=rngs)


class Attention(nnx.Module):
    def __init__(self, rngs):
        self.qkv, self.out = linear(D, (H + 2 * G) * K, rngs), linear(H * K, D, rngs)
        self.drop = nnx.Dropout(RATE)

    def __call__(self, x_BxLxD, rngs):
        B, L, _ = x_BxLxD.shape
        heads_BxSxLxK = self.qkv(x_BxLxD).reshape(B, L, -1, K).swapaxes(1, 2)  # S is H + 2 G
        q_BxHxLxK, k_BxGxLxK, v_BxGxLxK = jnp.split(heads_BxSxLxK, [H, H + G], axis=1)
        q_BxHxLxK = portproof.tap("rotated q", rotate(q_BxHxLxK))
        scores_BxHxLxL = q_BxHxLxK @ repeat(rotate(k_BxGxLxK)).mT / K**0.5
        past_LxL = jnp.tril(jnp.ones((L, L), bool))
        weights_BxHxLxL = jax.nn.softmax(jnp.where(past_LxL, scores_BxHxLxL, -jnp.inf))
        weights_BxHxLxL = portproof.tap("weights", weights_BxHxLxL)
        dropped_BxHxLxL = self.drop(weights_BxHxLxL, deterministic=rngs is None, rngs=rngs)
        y_BxHxLxK = dropped_BxHxLxL @ repeat(v_BxGxLxK)
        return self.out(y_BxHxLxK.swapaxes(1, 2).reshape(B, L, -1))


class Layer(nnx.Module):
    def __init__(self, rngs):
        self.norm_1, self.attn, self.norm_2 = norm(rngs), Attention(rngs), norm(rngs)
        self.gate_up, self.down = linear(D, 2 * F, rngs), linear(F, D, rngs)

    def __call__(self, x_BxLxD, rngs):
        x_BxLxD = x_BxLxD + self.attn(self.norm_1(x_BxLxD), rngs)
        gate_BxLxF, up_BxLxF = jnp.split(self.gate_up(self.norm_2(x_BxLxD)), 2, axis=-1)
        return x_BxLxD + self.down(nnx.silu(gate_BxLxF) * up_BxLxF)


class Llama(nnx.Module):
    def __init__(self, rngs):
        # nnx.Embed rounds to the dtype that its table had when it was made.
        self.embed = nnx.Param(jax.random.normal(rngs.params(), (V, D)))
        self.layers = nnx.List([Layer(rngs) for _ in range(N)])
        self.norm, self.head = norm(rngs), linear(D, V, rngs)

    def __call__(self, tokens_BxL, rngs):
        x_BxLxD = portproof.tap("embedding", self.embed[tokens_BxL])
        for layer in self.layers:
            x_BxLxD = layer(x_BxLxD, rngs)
        return self.head(self.norm(x_BxLxD))
