"""The training step lowers for NVIDIA GPUs and TPUs on a machine that has neither."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import pytest

from jax_model5 import step
from jax_model5.config import TrainConfig
from tests.tiny import MODEL

PLATFORMS = ("cuda", "tpu")


def lowered(config: TrainConfig, platform: str) -> str:
    key = jax.random.key(0, impl=config.prng)
    state = jax.eval_shape(functools.partial(step.init_state, config=config), key)
    windows = jax.ShapeDtypeStruct((config.batch_size, config.model.seq_len + 1), "int32")
    train_step = jax.jit(functools.partial(step.train_step, config=config))
    return jax.export.export(train_step, platforms=[platform])(state, key, windows).mlir_module()


@pytest.mark.slow
@pytest.mark.parametrize("platform", PLATFORMS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "fields",
    [{}, {"objective": "all_tokens", "accumulate": 2}, {"prng": "rbg"}],
    ids=["final_token", "all_tokens", "rbg"],
)
def test_the_training_step_lowers(platform, dtype, fields):
    model = dataclasses.replace(MODEL, dtype=dtype, n_layers=7)
    module = lowered(TrainConfig(model=model, batch_size=4, **fields), platform)
    assert "stablehlo.dot_general" in module
    assert dtype == "float32" or "xbf16>" in module


@pytest.mark.parametrize("platform", PLATFORMS)
def test_a_cpu_only_operation_is_seen(platform, monkeypatch):
    def cpu_only(logits, targets):
        return jax.scipy.linalg.schur(logits[0, 0, :4, None] * jnp.ones(4))[0].sum()

    ones = jnp.ones((1, 1, 4))
    monkeypatch.setattr(step, "position_losses", lambda *_, **__: cpu_only(ones, None))
    with pytest.raises(NotImplementedError, match="schur"):
        lowered(TrainConfig(model=MODEL, batch_size=4), platform)
