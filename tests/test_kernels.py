"""Each kernel is its plain form: the same numbers and gradients, the same bits of a mask."""

import functools
import math

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest

from jax_model5 import kernels, sharding
from tests.tiny import slow


@pytest.fixture
def float64():
    with jax.enable_x64(True):
        yield


def normal(seed: int, *shape: int) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape)


def worst_error(ours, plain, *arguments) -> float:
    """Of the result and of every gradient, relative to the plain form's."""
    shape = jax.eval_shape(plain, *arguments).shape
    weights = normal(99, *shape)  # so that no gradient is a plain sum

    def of(form):
        def scalar(*arguments):
            return (form(*arguments) * weights).sum()

        gradients = jax.grad(scalar, argnums=tuple(range(len(arguments))))(*arguments)
        return [form(*arguments), *gradients]

    pairs = zip(of(ours), of(plain), strict=True)
    return max(float(jnp.linalg.norm(a - b) / jnp.linalg.norm(b)) for a, b in pairs)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("leading", [(5,), (3, 5), (2, 3, 5)])
def test_matmul_is_a_product(leading):
    x, kernel = normal(0, *leading, 4), normal(1, 4, 6)
    assert worst_error(kernels.matmul, lambda x, kernel: x @ kernel, x, kernel) < 1e-14
    assert worst_error(lambda x, k: kernels.matmul(x, 2 * k), lambda x, k: x @ k, x, kernel) > 0.1


@pytest.mark.usefixtures("float64")
def test_matmul_transposed_is_a_product():
    x_BxNxD, table_VxD = normal(0, 3, 5, 4), normal(1, 7, 4)
    plain = lambda x, table: x @ table.T  # noqa: E731
    assert worst_error(kernels.matmul_transposed, plain, x_BxNxD, table_VxD) < 1e-14
    with pytest.MonkeyPatch.context() as for_a_gpu:  # whose products have 64 tokens or a multiple
        for_a_gpu.setattr(sharding, "is_gpu", lambda: True)
        assert worst_error(kernels.matmul_transposed, plain, x_BxNxD, table_VxD) < 1e-14


PRODUCTS = {
    "mi,io->mo": ((7, 64), (64, 5)),
    "bhnk,bhlk->bhnl": ((2, 3, 5, 16), (2, 3, 7, 16)),
    "bhnl,bhlk->bhnk": ((2, 3, 5, 7), (2, 3, 7, 16)),
}


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("axes", PRODUCTS)
def test_a_product_is_einsum(axes):
    a, b = (normal(i, *shape) for i, shape in enumerate(PRODUCTS[axes]))
    plain = functools.partial(jnp.einsum, axes)
    assert worst_error(functools.partial(kernels.product, axes), plain, a, b) < 1e-14
    assert worst_error(lambda a, b: kernels.product(axes, a, 2 * b), plain, a, b) > 0.1


def last_places(found: jax.Array, exact: jax.Array) -> float:
    """The largest error in units of bfloat16's last place, but for float32's own rounding."""
    assert found.dtype == jnp.bfloat16
    error = np.abs(np.asarray(found, float) - exact) - 1e-6 * np.abs(exact).max()
    return (error / 2.0 ** (np.floor(np.log2(np.abs(exact))) - 7)).max()


@pytest.mark.parametrize("is_fast", [True, False])
@pytest.mark.parametrize("axes", PRODUCTS)
def test_a_product_of_bfloat16_is_rounded_once(axes, is_fast, monkeypatch):
    """Forward and backward, in both of its forms."""
    monkeypatch.setattr(kernels, "_is_float32_fast", lambda: is_fast)
    a, b = (normal(i, *shape).astype(jnp.bfloat16) for i, shape in enumerate(PRODUCTS[axes]))
    found, pull = jax.vjp(functools.partial(kernels.product, axes), a, b)
    g = normal(2, *found.shape).astype(jnp.bfloat16)
    wide = [np.asarray(x, float) for x in (a, b, g)]
    of_a, of_b, of_g = axes.replace("->", ",").split(",")
    exact_a = np.einsum(f"{of_g},{of_b}->{of_a}", wide[2], wide[1])
    exact_b = np.einsum(f"{of_a},{of_g}->{of_b}", wide[0], wide[2])
    exact = np.einsum(axes, *wide[:2])
    for ours, right in zip((found, *pull(g)), (exact, exact_a, exact_b), strict=True):
        assert last_places(ours, right) <= 0.5
    twice = (found + 1) - 1
    assert last_places(twice, exact) > 0.5, "a second rounding was not seen"


@pytest.mark.parametrize(
    ("cpuinfo", "is_fast"),
    [
        ("vendor_id\t: AuthenticAMD\nflags\t: avx512f avx512_bf16\n", True),
        ("vendor_id\t: AuthenticAMD\nflags\t: avx2 avx512f\n", False),
        ("vendor_id\t: GenuineIntel\nflags\t: avx512f avx512_bf16\n", False),
        (None, False),  # no such file
    ],
)
def test_the_form_of_a_product_is_the_cpus(cpuinfo, is_fast, tmp_path, monkeypatch):
    path = tmp_path / "cpuinfo"
    if cpuinfo:
        path.write_text(cpuinfo)
    monkeypatch.setattr(kernels, "Path", lambda name: path)
    assert kernels._is_float32_fast.__wrapped__() == is_fast


def test_logits_of_bfloat16_features_are_kept_in_float32():
    """Accumulated there too: a cast after a bfloat16 product would keep 8 bits only."""
    x_BxNxD, table_VxD = normal(0, 3, 5, 64).astype(jnp.bfloat16), normal(1, 7, 64)
    logits = kernels.matmul_transposed(x_BxNxD, table_VxD)
    exact = np.asarray(x_BxNxD, np.float64) @ np.asarray(table_VxD.astype(jnp.bfloat16), float).T
    assert logits.dtype == jnp.float32
    assert np.abs(logits - exact).max() < 1e-5
    assert np.abs(logits.astype(jnp.bfloat16).astype(float) - exact).max() > 1e-3


def whole(q, k, v):
    """All queries against all keys, in one piece."""
    N, L, K = q.shape[2], *k.shape[2:]
    is_past = np.arange(L) <= np.arange(L - N, L)[:, None]
    scores = jnp.where(is_past, q @ k.swapaxes(2, 3) / math.sqrt(K), -jnp.inf)
    return jax.nn.softmax(scores) @ v


def halves(q, k, v):
    return kernels.causal_attention(q, k, v, lambda weights: weights)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("n_queries", [1, 2, slow(5), 11])
def test_attention_in_halves_is_attention(n_queries, monkeypatch):
    q, k, v = normal(0, 2, 3, n_queries, 4), normal(1, 2, 3, 11, 4), normal(2, 2, 3, 11, 4)
    assert worst_error(halves, whole, q, k, v) < 1e-14
    right = kernels.masked_attention
    monkeypatch.setattr(
        kernels,
        "masked_attention",
        lambda q, k, v, is_past, drop: right(q, k, v, jnp.ones_like(is_past), drop),
    )
    if n_queries > 2:  # of two, each half is one query with the keys that it may see
        assert worst_error(halves, whole, q, k, v) > 0.01, "a missing mask was not seen"


def test_softmax_is_in_float32_also_for_bfloat16():
    q, k, v = (normal(i, 1, 1, 64, 16) for i in range(3))
    exact = halves(q, k, v)
    low = halves(*(x.astype(jnp.bfloat16) for x in (q, k, v)))
    assert low.dtype == jnp.bfloat16
    weights = []
    kernels.attend(*(x.astype(jnp.bfloat16) for x in (q, k, v)), lambda w: weights.append(w) or w)
    sums = np.asarray(weights[0], np.float32).sum(-1)
    assert np.abs(sums - 1).max() < 4e-3  # each weight rounded once, measured 2e-3
    assert np.abs(np.asarray(low, np.float32) - exact).max() < 0.05


# ---- masks --------------------------------------------------------------------------------------


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("shape", [(400, 500), (400, 501)])
def test_the_mask_keeps_the_right_share_evenly(rate, shape):
    keep = np.asarray(kernels.keep_mask(jax.random.key(0), rate, shape))
    assert keep.shape == shape
    sigma = math.sqrt(rate * (1 - rate) / keep.size)
    assert abs(keep.mean() - (1 - rate)) < 4 * sigma
    for axis in (0, 1):  # no row or column stands out, and neighbours are independent
        lines = keep.mean(axis)
        assert np.abs(lines - (1 - rate)).max() < 5.5 * math.sqrt(rate * (1 - rate) / shape[axis])
    a, b = keep[:, :-1].ravel() - keep.mean(), keep[:, 1:].ravel() - keep.mean()
    assert abs((a * b).mean()) < 5 * rate * (1 - rate) / math.sqrt(keep.size)


def test_threefry_is_jax_s_own():
    """Bit for bit, on counters (row, index in the row)."""
    key, shape = jax.random.fold_in(jax.random.key(7), 1), (3, 4, 5)  # no word is 0
    rows, rest = jnp.repeat(jnp.arange(3, dtype="uint32"), 20), jnp.tile(jnp.arange(20), 3)
    counters = jnp.concatenate([rows, rest.astype(jnp.uint32)])
    first_words = jax.extend.random.threefry_2x32(jax.random.key_data(key), counters)[:60]
    ours = kernels.threefry2x32(jax.random.key_data(key), jnp.int32(0), shape)
    assert np.array_equal(np.asarray(ours).ravel(), np.asarray(first_words))
    assert np.array_equal(kernels.keep_mask(key, 0.5, shape), np.asarray(ours) >= 2**31)


@pytest.mark.parametrize("prng", ["rbg", "unsafe_rbg"])
def test_the_mask_of_another_prng_is_its_bits(prng):
    key, shape = jax.random.key(0, impl=prng), (300, 400)
    keep = kernels.keep_mask(key, 0.1, shape)
    assert np.array_equal(keep, jax.random.bits(key, shape) >= int(0.1 * 2**32))
    assert keep.mean() == pytest.approx(0.9, abs=5e-3)
