"""PyTorch's TransformerEncoder in Flax Linen: norms after the residuals, ReLU, rows with padding.

B batch, L positions, D width, H heads of width K, F feed-forward, C classes.
"""

from functools import partial

import flax.linen as nn
import jax.numpy as jnp

import portproof

V, D, H, K, F, N, C, RATE = 53, 20, 4, 5, 33, 2, 6, 0.2
EPSILON, HIDDEN = 1e-5, -jnp.inf


class Layer(nn.Module):
    @nn.compact
    def __call__(self, x_BxLxD, padding_BxL, drop):
        norm = partial(nn.LayerNorm, epsilon=EPSILON)
        qkv_BxLx3xHxK = nn.Dense(3 * D, name="qkv")(x_BxLxD).reshape(*x_BxLxD.shape[:2], 3, H, K)
        q_BxHxLxK, k_BxHxLxK, v_BxHxLxK = qkv_BxLx3xHxK.transpose(2, 0, 3, 1, 4)
        scores_BxHxLxL = portproof.tap("q", q_BxHxLxK) @ k_BxHxLxK.mT / K**0.5
        scores_BxHxLxL = jnp.where(padding_BxL[:, None, None], HIDDEN, scores_BxHxLxL)
        y_BxHxLxK = drop(name="self_attn")(nn.softmax(scores_BxHxLxL)) @ v_BxHxLxK
        y_BxLxD = nn.Dense(D, name="out")(y_BxHxLxK.swapaxes(1, 2).reshape(x_BxLxD.shape))
        x_BxLxD = norm(name="norm1")(x_BxLxD + drop(name="dropout1")(y_BxLxD))
        h_BxLxF = drop(name="dropout")(nn.relu(nn.Dense(F, name="linear1")(x_BxLxD)))
        y_BxLxD = nn.Dense(D, name="linear2")(h_BxLxF)
        return norm(name="norm2")(x_BxLxD + drop(name="dropout2")(y_BxLxD))


class Classifier(nn.Module):
    """Of a sequence, at its first position."""

    @nn.compact
    def __call__(self, batch, deterministic=True):
        drop = partial(nn.Dropout, RATE, deterministic=deterministic)
        x_BxLxD = nn.Embed(V, D, name="embed")(batch["tokens"])
        for i in range(N):
            x_BxLxD = Layer(name=f"layer_{i}")(x_BxLxD, batch["padding"], drop)
        return nn.Dense(C, name="head")(x_BxLxD[:, 0])
