"""The FLOP formula against XLA's own count of the unrolled program; peaks of chips."""

import dataclasses
import functools

import jax
import pytest

from jax_model5 import flops, step
from jax_model5.bench.rounds import fraction
from jax_model5.config import ModelConfig, TrainConfig
from jax_model5.errors import UserError

# Wide enough that elementwise work, which the formula leaves out, stays below 2 %. The layers
# are few enough to be unrolled, and nothing is computed again: XLA counts a loop's body once.
MODEL = ModelConfig(
    vocab_size=5000, seq_len=32, d_model=768, n_heads=4, n_layers=3, dropout=0.0, remat="none"
)
BASE = TrainConfig(model=MODEL, batch_size=2)
CONFIGS = {
    "final_token": BASE,
    "last_k": dataclasses.replace(BASE, objective="last_k", last_k=7),
    "all_tokens": dataclasses.replace(BASE, objective="all_tokens"),
    "untied": dataclasses.replace(BASE, model=dataclasses.replace(MODEL, tied_head=False)),
    "tanh": dataclasses.replace(BASE, model=dataclasses.replace(MODEL, gelu="tanh")),
    "one layer": dataclasses.replace(BASE, model=dataclasses.replace(MODEL, n_layers=1)),
    "long": dataclasses.replace(BASE, model=dataclasses.replace(MODEL, seq_len=512)),
}


def counted(config: TrainConfig) -> float:
    """FLOPs of loss and gradients before XLA optimizes, as XLA counts them."""
    key = jax.random.key(0)
    state = jax.eval_shape(functools.partial(step.init_state, config=config), key)
    windows = jax.ShapeDtypeStruct((config.batch_size, config.model.seq_len + 1), "int32")
    run = jax.jit(functools.partial(step.loss_and_gradients, config=config))
    return run.lower(state, key, windows).cost_analysis()["flops"]


@pytest.mark.parametrize("name", CONFIGS)
def test_the_formula_is_xla_s_count(name):
    config = CONFIGS[name]
    assert sum(flops.step_flops(config).values()) == pytest.approx(counted(config), rel=0.02)


@pytest.mark.slow
@pytest.mark.parametrize("part", ["full blocks", "suffix block", "attention", "head"])
def test_the_count_sees_a_wrong_part(part):
    """A part that is left out is a difference of more than 2 % in one of the cases."""
    differences = []
    for config in CONFIGS.values():
        parts = flops.step_flops(config)
        parts[part] = 0.0
        differences.append(abs(sum(parts.values()) / counted(config) - 1))
    assert max(differences) > 0.04


def test_the_final_token_saves_what_the_course_computes():
    """At full size the head at 256 positions is a third of the course's step."""
    model5 = TrainConfig(model=ModelConfig(d_model=768, n_heads=12, n_layers=12), batch_size=4)
    final = flops.step_flops(model5)
    every = flops.step_flops(dataclasses.replace(model5, objective="all_tokens"))
    assert every["head"] == 256 * final["head"]
    assert every["full blocks"] == final["full blocks"]
    assert sum(every.values()) / sum(final.values()) == pytest.approx(1.55, abs=0.1)


@pytest.mark.parametrize(
    ("queries", "keys", "pairs"), [(1, 8, 8), (2, 8, 15), (8, 8, 48), (3, 3, 7)]
)
def test_attended_pairs(queries, keys, pairs):
    assert flops.attended_pairs(queries, keys) == pairs


@pytest.mark.parametrize(
    ("kind", "teraflops"),
    [
        ("NVIDIA H100 80GB HBM3", 989.4),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("TPU v5 lite", 197),
        ("TPU v5", 459),
        ("cpu", None),
        ("NVIDIA L40S", 362),
        ("NVIDIA L4", 121),
        ("NVIDIA H200 NVL", None),
        ("NVIDIA L40", None),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
    ],
)
def test_peak_by_device_kind(kind, teraflops):
    assert flops.peak_bfloat16(kind) == (teraflops and teraflops * 1e12)


def test_a_fraction_above_one_is_refused():
    assert fraction(3.0, 4.0, "the chip") == 0.75
    with pytest.raises(UserError, match="measurement error"):
        fraction(4.1, 4.0, "the chip")
