"""The model: causality, the suffix path, dtypes, init, tying and dropout."""

import dataclasses
import functools
import math

import flax
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_model5 import losses, model, step, trees
from jax_model5.config import ModelConfig, TrainConfig
from tests.tiny import MODEL, slow

CONFIG = TrainConfig(model=MODEL, batch_size=3)
L, V, D = MODEL.seq_len, MODEL.vocab_size, MODEL.d_model


@functools.cache
def new_params(config: TrainConfig = CONFIG, seed: int = 0):
    init = jax.jit(functools.partial(step.init_state, config=config))
    return init(jax.random.key(seed)).params


def tokens(batch_size: int = 3) -> jax.Array:
    return jax.random.randint(jax.random.key(9), (batch_size, L), 0, V)


def windows() -> jax.Array:
    return jax.random.randint(jax.random.key(9), (3, L + 1), 0, V)


def eager(params, tokens_BxL, config=MODEL, n_last=L, deterministic=True, **rest):
    return model.Model5(config).apply(
        {"params": params}, tokens_BxL, n_last=n_last, deterministic=deterministic, **rest
    )


apply = jax.jit(eager, static_argnames=("config", "n_last", "deterministic", "mutable", "method"))


def test_no_position_sees_the_future():
    """d logits at i / d embedding at j > i is exactly 0, and not 0 for j <= i."""
    params = new_params()
    tokens_1xL = jnp.arange(L)[None]  # each token once: wte's row t is position t's embedding

    def logit_sums_L(wte_LxD):
        embedding = params | {"wte": jnp.concatenate([wte_LxD, params["wte"][L:]])}
        x_1xLxD = apply(embedding, tokens_1xL, method="features")
        return (x_1xLxD @ params["wte"].T).sum(-1)[0]  # the head's own use of wte is constant

    influence_LxL = jnp.abs(jax.jit(jax.jacrev(logit_sums_L))(params["wte"][:L])).sum(-1)
    future = np.triu(np.ones((L, L), bool), 1)
    assert (np.asarray(influence_LxL)[future] == 0).all()
    assert (np.asarray(influence_LxL)[~future] > 0).all()


@pytest.mark.parametrize(
    ("n_last", "n_layers"), [(1, 3), (3, 1), (L, 3), slow(1, 1), slow(3, 3), slow(L, 1)]
)
def test_the_suffix_path_is_the_full_path_sliced(n_last, n_layers):
    """Logits, loss and every gradient, in float64."""
    with jax.enable_x64(True):
        fields = {"vocab_size": V, "seq_len": L, "d_model": D, "n_heads": 2}
        c = ModelConfig(**fields, n_layers=n_layers, dtype="float64", dropout=0.0)
        params = new_params(TrainConfig(model=c))
        targets = windows()[:, -n_last:]

        def loss(params, n_computed):
            logits = apply(params, windows()[:, :-1], c, n_last=n_computed)
            return losses.nll(logits[:, -n_last:], targets).mean()

        grad = jax.jit(jax.value_and_grad(loss), static_argnums=1)
        suffix, full = grad(params, n_last), grad(params, L)
        for ours, whole in zip(jax.tree.leaves(suffix), jax.tree.leaves(full), strict=True):
            scale = np.abs(whole).max() + 1e-30
            assert np.abs(ours - whole).max() / scale < 1e-12


def test_the_chunked_loss_is_the_loss_of_all_logits(monkeypatch):
    params = new_params()
    config = TrainConfig(model=MODEL)
    monkeypatch.setattr(losses, "ROWS", 12)  # 4 positions of 3 sequences

    def chunked(params):
        return losses.position_losses(
            params, windows(), config, n_last=L, deterministic=True
        ).mean()

    def whole(params):
        return losses.nll(apply(params, windows()[:, :-1]), windows()[:, 1:]).mean()

    assert f"[12,{V}]" in str(jax.make_jaxpr(chunked)(params))  # logits of 12 rows a time
    assert f"[{3 * L},{V}]" not in str(jax.make_jaxpr(chunked)(params))
    ours, expected = (jax.jit(jax.value_and_grad(loss))(params) for loss in (chunked, whole))
    assert ours[0] == pytest.approx(float(expected[0]), rel=1e-6)
    for a, b in zip(jax.tree.leaves(ours[1]), jax.tree.leaves(expected[1]), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-7)


def test_jit_changes_nothing_beyond_rounding():
    params = new_params()
    np.testing.assert_allclose(eager(params, tokens()), apply(params, tokens()), atol=1e-6)


def test_bfloat16_is_close_and_keeps_float32_where_it_counts():
    c = TrainConfig(model=ModelConfig(**vars(MODEL) | {"dtype": "bfloat16"}), batch_size=3)
    params = new_params(c)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("float32")}
    ours = apply(params, tokens(), c.model)
    assert ours.dtype == jnp.float32
    expected = apply(params, tokens())
    error = np.linalg.norm(ours - expected) / np.linalg.norm(expected)
    assert 1e-5 < error < 1.5e-2  # measured 0.5e-2: rounded, but not otherwise different
    state = jax.jit(functools.partial(step.init_state, config=c))(jax.random.key(0))
    state, metrics = jax.jit(functools.partial(step.train_step, config=c))(
        state, jax.random.key(0), windows()
    )
    assert metrics["loss"].dtype == jnp.float32
    assert all(leaf.dtype != jnp.bfloat16 for leaf in jax.tree.leaves(state))


def test_the_head_is_the_embedding_before_and_after_a_step():
    """One leaf, used twice: after a step it still serves both ends."""
    state = jax.jit(functools.partial(step.init_state, config=CONFIG))(jax.random.key(0))
    assert [
        k for k, v in flax.traverse_util.flatten_dict(state.params).items() if V in v.shape
    ] == [("wte",)]
    state, _ = jax.jit(functools.partial(step.train_step, config=CONFIG))(
        state, jax.random.key(0), windows()
    )
    x = jax.random.normal(jax.random.key(1), (1, 2, D))
    logits = model.Model5(MODEL).apply({"params": state.params}, x, method="logits")
    np.testing.assert_allclose(logits, x @ state.params["wte"].T / math.sqrt(D), atol=1e-6)
    assert not np.allclose(state.params["wte"], new_params()["wte"], atol=1e-5)


def test_an_untied_head_starts_as_the_embedding_and_parts_from_it():
    """Course lesson 018 as its code runs on a GPU: two tables, equal at the start."""
    config = dataclasses.replace(CONFIG, model=dataclasses.replace(MODEL, tied_head=False))
    state = jax.jit(functools.partial(step.init_state, config=config))(jax.random.key(0))
    np.testing.assert_array_equal(state.params["head"], state.params["wte"])
    np.testing.assert_array_equal(state.params["wte"], new_params()["wte"])
    tied, untied = apply(new_params(), tokens()), apply(state.params, tokens(), config.model)
    np.testing.assert_array_equal(tied, untied)
    state, _ = jax.jit(functools.partial(step.train_step, config=config))(
        state, jax.random.key(0), windows()
    )
    assert not np.allclose(state.params["head"], state.params["wte"], atol=1e-5)
    x = jax.random.normal(jax.random.key(1), (1, 2, D))
    logits = model.Model5(config.model).apply({"params": state.params}, x, method="logits")
    np.testing.assert_allclose(logits, x @ state.params["head"].T / math.sqrt(D), atol=1e-6)


@pytest.mark.parametrize(("tied", "n"), [(True, 123_849_984), (False, 162_447_360)])
def test_the_full_size_has_the_courses_parameters(tied, n):
    """Counted once, 124 M; the course's sum of both tables, 163 M."""
    full = ModelConfig(d_model=768, n_heads=12, n_layers=12, tied_head=tied)
    assert trees.n_elements(step.abstract_state(TrainConfig(model=full)).params) == n


# ---- init ---------------------------------------------------------------------------------------


def full_width(init: str) -> dict:
    c = ModelConfig(d_model=768, n_heads=12, n_layers=2, init=init)
    params = jax.jit(functools.partial(step.init_state, config=TrainConfig(model=c)))(
        jax.random.key(0)
    ).params
    return flax.traverse_util.flatten_dict(params, sep="/")


def test_the_courses_init():
    """std 0.02 for linear layers and the tied wte, sqrt(2 / (256 + 768)) for wpe, biases 0."""
    for name, leaf in full_width("course").items():
        if name.endswith("bias"):
            assert not leaf.any(), name
        elif name.endswith("scale"):
            assert (leaf == 1).all(), name
        else:
            expected = 0.0442 if name == "wpe" else 0.02
            assert leaf.std() == pytest.approx(expected, rel=0.01), name
            assert abs(leaf.mean()) < 5 * expected / math.sqrt(leaf.size), name
            assert abs(leaf).max() > 3.5 * expected, name  # not truncated, as JAX's xavier is


@pytest.mark.parametrize(
    ("init", "kernel", "wte", "wpe"),
    [
        slow("xavier", math.sqrt(2 / (768 + 3072)), math.sqrt(2 / (50257 + 768)), 0.0442),
        slow("kaiming", math.sqrt(2 / 768), math.sqrt(2 / 768), math.sqrt(2 / 768)),
        ("torch", 1 / math.sqrt(3 * 768), 1.0, 1.0),
        slow("normal:0.07", 0.07, 0.07, 0.07),
    ],
)
def test_inits_by_name(init, kernel, wte, wpe):
    leaves = full_width(init)
    assert leaves["trunk/fc/kernel"].std() == pytest.approx(kernel, rel=0.01)
    assert leaves["last_block/fc/kernel"].std() == pytest.approx(kernel, rel=0.01)
    assert leaves["wte"].std() == pytest.approx(wte, rel=0.01)
    assert leaves["wpe"].std() == pytest.approx(wpe, rel=0.01)
    bias_std = 1 / math.sqrt(3 * 768) if init == "torch" else 0.0
    assert leaves["trunk/fc/bias"].std() == pytest.approx(bias_std, rel=0.05)


def test_layers_start_different():
    kernel = new_params()["trunk"]["fc"]["kernel"]
    assert kernel.shape[0] == MODEL.n_layers - 1
    assert not np.allclose(kernel[0], kernel[1])


def test_the_initial_loss_is_ln_v():
    c = TrainConfig(model=ModelConfig(n_layers=2, dropout=0.0))
    params = new_params(c)
    shape = (2, c.model.seq_len + 1)
    random = jax.random.randint(jax.random.key(1), shape, 0, c.model.vocab_size)
    nll = functools.partial(losses.position_losses, config=c, n_last=1, deterministic=True)
    assert jax.jit(nll)(params, random).mean() == pytest.approx(math.log(50257), abs=0.05)


# ---- dropout ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("site", "place"),
    [
        ("embedding", "drop"),
        ("attention", "attn/drop"),
        ("attention_output", "attn_drop"),
        ("mlp", "mlp_drop"),
    ],
)
def test_a_site_alone_drops_alone(site, place):
    """The course's four places (lesson 017)."""
    alone = dataclasses.replace(MODEL, dropout_sites=[site])
    rngs = {"dropout": jax.random.key(0)}
    _, recorded = eager(
        new_params(), tokens(), alone, deterministic=False, rngs=rngs, mutable=["masks"]
    )
    names = flax.traverse_util.flatten_dict(recorded["masks"], sep="/")
    stacks = ["trunk/", "last_block/"] if site != "embedding" else [""]
    assert set(names) == {f"{stack}{place}/keep" for stack in stacks}


def test_dropout_preserves_the_mean():
    ones = jnp.ones((500, 500))
    out = model.Dropout(0.2).apply(
        {}, ones, deterministic=False, rngs={"dropout": jax.random.key(0)}
    )
    assert set(np.unique(out).tolist()) == {0.0, 1.25}  # course lesson 014
    assert out.mean() == pytest.approx(1.0, abs=4 * math.sqrt(0.25 / out.size))


def test_the_same_seed_and_step_give_the_same_mask():
    key, params = jax.random.key(0), new_params()

    def out(seed_key, step_index, micro_batch=0):
        rngs = {"dropout": step.dropout_key(seed_key, step_index, micro_batch)}
        return np.asarray(apply(params, tokens(), deterministic=False, rngs=rngs))

    assert np.array_equal(out(key, 3), out(jax.random.key(0), 3))
    for other in (out(key, 4), out(jax.random.key(1), 3), out(key, 3, 1)):
        assert not np.allclose(out(key, 3), other)


def masks():
    _, variables = apply(
        new_params(),
        tokens(),
        deterministic=False,
        rngs={"dropout": jax.random.key(0)},
        mutable="masks",
    )
    return flax.traverse_util.flatten_dict(variables["masks"], sep="/")


def test_every_site_draws_its_own_mask():
    """Four kinds of site, each layer, head, row and position its own bits."""
    sites = masks()
    blocks = [
        f"{b}/{s}/keep"
        for b in ("trunk", "last_block")
        for s in ("attn/drop", "attn_drop", "mlp_drop")
    ]
    assert sorted(sites) == sorted(["drop/keep", *blocks])
    # Each half of the queries has a mask over the keys that it can see.
    halves = [np.asarray(half) for half in sites["trunk/attn/drop/keep"]]
    assert [half.shape for half in halves] == [(2, 3, 2, L // 2, L // 2), (2, 3, 2, L // 2, L)]
    for half in (halves[0], halves[1][..., : L // 2], halves[1][..., L // 2 :]):
        rows = half.reshape(-1, L // 2 * L // 2)
        assert len({row.tobytes() for row in rows}) == len(rows)
    assert not np.array_equal(halves[0], halves[1][..., : L // 2])
    wide = np.concatenate([sites[f"trunk/{name}/keep"][0] for name in ("attn_drop", "mlp_drop")])
    rows = wide.reshape(-1, D * L)
    assert len({row.tobytes() for row in rows}) == len(rows)


def test_a_missing_dropout_key_raises():
    with pytest.raises(flax.errors.InvalidRngError):
        eager(new_params(), tokens(), deterministic=False)


def test_a_missing_deterministic_raises():
    with pytest.raises(TypeError, match="deterministic"):
        model.Model5(MODEL).apply({"params": new_params()}, tokens(), n_last=1)
    with pytest.raises(TypeError, match="deterministic"):
        model.Dropout(0.1).apply({}, jnp.ones(3))
