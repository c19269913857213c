"""A GPU's kernels are their plain forms: their numbers, gradients and dropout masks."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_model5 import flash, kernels, layer_norm, sharding

B, L, H, K = 2, 256, 3, 32
KEYS = jax.random.split(jax.random.key(5))
KEYS_2x2 = jax.random.key_data(KEYS)


@pytest.fixture(autouse=True)
def mesh():
    """Of the first device: on a GPU the kernels are compiled for it, elsewhere interpreted."""
    axis_types = (jax.sharding.AxisType.Auto,) * 2
    devices = jax.devices()[:1]
    with jax.set_mesh(jax.make_mesh((1, 1), ("data", "fsdp"), axis_types, devices=devices)):
        yield


def inputs(dtype=jnp.float32) -> list[jax.Array]:
    """The projections, their bias, and the gradient of y."""
    shapes = [(B, L, 3 * H * K), (3 * H * K,), (B, L, H * K)]
    keys = jax.random.split(jax.random.key(1), 3)
    return [jax.random.normal(k, shape, dtype) for k, shape in zip(keys, shapes, strict=True)]


def plain(qkv_BxLx3D: jax.Array, bias_3D: jax.Array, rate: float, keys=KEYS) -> jax.Array:
    """With the masks that a module draws: one key for each half of the queries."""
    keys, parts = iter(keys), jnp.split(qkv_BxLx3D + bias_3D, 3, axis=-1)
    q, k, v = (part.reshape(B, L, H, K).swapaxes(1, 2) for part in parts)

    def drop(weights):
        keep = kernels.keep_mask(next(keys), rate, weights.shape)
        return jnp.where(keep, weights / (1 - rate), 0)

    y_BxHxLxK = kernels.causal_attention(q, k, v, drop if rate else lambda weights: weights)
    return y_BxHxLxK.swapaxes(1, 2).reshape(B, L, H * K)


def fused(qkv_BxLx3D: jax.Array, bias_3D: jax.Array, rate: float) -> jax.Array:
    return flash.causal_attention(qkv_BxLx3D, bias_3D, KEYS_2x2, n_heads=H, rate=rate)


def errors(ours, theirs, qkv_BxLx3D, bias_3D, g_BxLxD) -> list[float]:
    """Of y, and of the gradients of queries, keys, values and of the bias."""
    parts = []
    for form in (ours, theirs):
        y_BxLxD, back = jax.vjp(form, qkv_BxLx3D, bias_3D)
        g_BxLx3D, g_3D = back(g_BxLxD.astype(y_BxLxD.dtype))
        parts.append([y_BxLxD, *jnp.split(g_BxLx3D, 3, axis=-1), g_3D])
    return [
        float(jnp.linalg.norm((a - b).ravel()) / jnp.linalg.norm(b.ravel()))
        for a, b in zip(*parts, strict=True)
    ]


@pytest.mark.parametrize("rate", [0.0, 0.1, 0.5])
def test_the_kernels_are_the_plain_attention(rate):
    found = errors(lambda *x: fused(*x, rate), lambda *x: plain(*x, rate), *inputs())
    assert max(found) < 2e-6  # measured 9e-7
    other = errors(lambda *x: fused(*x, rate), lambda *x: plain(*x, rate, KEYS[::-1]), *inputs())
    assert (min(other) > 0.1) == (rate > 0), "masks of other keys were not seen"


def test_a_row_has_its_masks_on_whichever_device(monkeypatch):
    qkv, bias, _ = inputs()
    whole = fused(qkv, bias, 0.1)
    monkeypatch.setattr(sharding, "first_row", lambda n_rows: jnp.int32(1))
    assert np.allclose(fused(qkv[1:], bias, 0.1), whole[1:], rtol=1e-5, atol=1e-6)
    monkeypatch.undo()
    assert not np.allclose(fused(qkv[1:], bias, 0.1), whole[1:], rtol=1e-2, atol=1e-2)


def test_in_bfloat16_it_rounds_as_the_plain_attention_does():
    """Of the bias of keys the gradient is 0 in exact arithmetic, so the bias is left out."""

    def exact(*x):
        return plain(*(part.astype(jnp.float32) for part in x), 0.1)

    def error_of(form):
        wide = lambda *x: form(*x, 0.1).astype(jnp.float32)  # noqa: E731
        return errors(wide, exact, *inputs(jnp.bfloat16))[:-1]

    for ours, theirs in zip(error_of(fused), error_of(plain), strict=True):
        assert ours < 1.3 * theirs  # measured 0.6 to 1.2 times
        assert theirs < 0.02


# ---- layer norm ---------------------------------------------------------------------------------


def test_the_gradients_of_layer_norm_are_the_plain_ones(monkeypatch):
    keys = jax.random.split(jax.random.key(2), 3)
    x_MxD, scale_D, g_MxD = (
        jax.random.normal(k, shape)
        for k, shape in zip(keys, [(24, 768), (768,), (24, 768)], strict=True)
    )
    theirs = jax.vjp(
        lambda *x: layer_norm.layer_norm(*x, jnp.zeros(768), 1e-5), 3 * x_MxD + 1, scale_D
    )[1](g_MxD)
    *ours, of_bias = layer_norm.gradients_of_a_gpu(3 * x_MxD + 1, scale_D, g_MxD, 1e-5)
    for a, b in zip([*ours, of_bias], [*theirs, g_MxD.sum(0)], strict=True):
        assert float(jnp.linalg.norm(a - b) / jnp.linalg.norm(b)) < 1e-6  # measured 1.1e-7
    wrong, *_ = layer_norm.gradients_of_a_gpu(3 * x_MxD + 1, scale_D, g_MxD, 1e-3)
    assert float(jnp.linalg.norm(wrong - theirs[0]) / jnp.linalg.norm(theirs[0])) > 1e-5
