"""The sampler draws each token from the model's own distribution at the last position."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from jax_model5 import generate, model, step
from jax_model5.config import TrainConfig
from tests.tiny import MODEL

PARAMS = functools.cache(
    lambda: jax.tree.map(
        lambda leaf: leaf * 10,  # far from uniform
        step.init_state(jax.random.key(0), config=TrainConfig(model=MODEL)).params,
    )
)


def sample(tokens, n_tokens, temperature, seed=0):
    return generate.continue_windows(
        PARAMS(),
        jax.random.key(seed),
        tokens,
        config=MODEL,
        n_tokens=n_tokens,
        temperature=temperature,
    )


def test_a_temperature_near_0_is_greedy_re_forward():
    window = np.arange(2 * MODEL.seq_len).reshape(2, -1) % MODEL.vocab_size
    new = sample(jnp.asarray(window), 5, 1e-6)
    apply = jax.jit(functools.partial(model.Model5(MODEL).apply, n_last=1, deterministic=True))
    for k in range(5):
        logits = apply({"params": PARAMS()}, window)[:, 0]
        best = np.asarray(logits.argmax(-1))
        assert np.array_equal(new[:, k], best)
        window = np.concatenate([window[:, 1:], best[:, None]], axis=1)


def test_samples_follow_the_softmax_of_the_raw_logits():
    rows = 4000
    window = jnp.tile(jnp.arange(MODEL.seq_len)[None], (rows, 1))
    logits = model.Model5(MODEL).apply(
        {"params": PARAMS()}, window[:1], n_last=1, deterministic=True
    )[0, 0]
    for temperature in (0.7, 2.0):
        expected = np.asarray(jax.nn.softmax(logits / temperature))
        drawn = np.asarray(sample(window, 1, temperature))[:, 0]
        observed = np.bincount(drawn, minlength=MODEL.vocab_size) / rows
        assert np.abs(observed - expected).max() < 5 * np.sqrt(expected.max() / rows)
