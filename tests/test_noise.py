"""Gradient noise: unbiased, with honest errors, and equal to brute force on a tiny Model 5."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

from jax_model5 import model, step
from jax_model5.compare import noise
from jax_model5.config import TrainConfig
from jax_model5.errors import UserError
from tests.tiny import MODEL, with_model, with_optimizer

QUANTITIES = ("trace", "squared_norm", "scale")


def quadratic(rng, mean_P, std_P, n_batches, batch_size):
    """Gradients theta - x of |theta - x|²/2, x ~ N(theta - mean, std²), averaged in batches."""
    shape = (n_batches, batch_size, len(mean_P))
    return (mean_P + std_P * rng.standard_normal(shape)).mean(1)


def estimated(gradients_MxP, batch_size):
    squares_M = (gradients_MxP**2).sum(1)
    return noise.estimate(squares_M, gradients_MxP @ gradients_MxP.mean(0), batch_size)


# ---- unbiased -----------------------------------------------------------------------------------

RIGHT = noise.unbiased
# (|g|² of small batches, of the big one, their sizes) -> (tr Sigma, |G|²), one of them wrong.
FAULTS = {
    "|G|² divided by B_big": lambda s, b, m, M: (RIGHT(s, b, m, M)[0], (M * b - m * s) / M),
    "the big batch's norm as |G|²": lambda s, b, m, M: (RIGHT(s, b, m, M)[0], b),
    "the small batches' norm as |G|²": lambda s, b, m, M: (RIGHT(s, b, m, M)[0], s),
    "tr Sigma without its 1/B terms": lambda s, b, m, M: (s - b, RIGHT(s, b, m, M)[1]),
    "tr Sigma as if B_big were infinite": lambda s, b, m, M: ((s - b) * m, RIGHT(s, b, m, M)[1]),
}


def is_close_to_the_truth() -> bool:
    """One estimate at 4000 parameters: within 5 % in all three numbers."""
    rng, P = np.random.default_rng(0), 4000
    std_P = rng.uniform(0.5, 1.5, P)
    mean_P = rng.standard_normal(P) / 2
    ours = estimated(quadratic(rng, mean_P, std_P, n_batches=8, batch_size=4), batch_size=4)
    truth = (std_P**2).sum(), (mean_P**2).sum()
    expected = dict(zip(QUANTITIES, (*truth, truth[0] / truth[1]), strict=True))
    return all(
        ours.as_dict()[name] == pytest.approx(value, rel=0.05) for name, value in expected.items()
    )


def is_unbiased() -> bool:
    """Mean of 4000 poor estimates: within 3.5 of its own standard errors."""
    rng = np.random.default_rng(1)
    mean_P, std_P = np.array([0.5, -0.3, 0.2]), np.array([1.0, 2.0, 0.5])
    ours = [
        estimated(quadratic(rng, mean_P, std_P, n_batches=4, batch_size=2), batch_size=2)
        for _ in range(4000)
    ]
    for name, truth in (("trace", (std_P**2).sum()), ("squared_norm", (mean_P**2).sum())):
        values = np.array([getattr(one, name).value for one in ours])
        if abs(values.mean() - truth) > 3.5 * values.std() / len(values) ** 0.5:
            return False
    return True


CHECKS = [is_close_to_the_truth, is_unbiased]


@pytest.mark.parametrize("check", CHECKS)
def test_a_quadratic_loss_has_the_noise_of_its_closed_form(check):
    assert check()


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize("fault", FAULTS)
def test_the_checks_see_a_biased_formula(check, fault, monkeypatch):
    monkeypatch.setattr(noise, "unbiased", FAULTS[fault])
    assert not check()


# ---- honest errors ------------------------------------------------------------------------------


def error_over_spread(mean_P, make=lambda gradients: estimated(gradients, 2)) -> dict[str, float]:
    """Mean standard error over the estimates' own standard deviation, over 2000 repetitions."""
    rng, std_P = np.random.default_rng(2), np.linspace(0.5, 1.5, len(mean_P))
    ours = [make(quadratic(rng, mean_P, std_P, 24, 2)) for _ in range(2000)]
    return {
        name: np.mean([getattr(one, name).error for one in ours])
        / np.std([getattr(one, name).value for one in ours])
        for name in QUANTITIES
    }


def test_the_standard_errors_are_the_spread_of_the_estimates():
    for name, ratio in error_over_spread(np.full(10, 1.0)).items():
        assert 0.8 < ratio < 1.2, name


def test_the_check_sees_an_error_that_takes_the_replicates_for_a_sample(monkeypatch):
    naive = property(lambda self: self.without_M.std() / len(self.without_M) ** 0.5)
    monkeypatch.setattr(noise.Estimate, "error", naive)
    for name, ratio in error_over_spread(np.full(10, 1.0)).items():
        assert not 0.8 < ratio < 1.2, name


def test_where_all_is_noise_the_error_of_the_norm_is_too_large_and_never_too_small():
    """At G = 0 the jackknife's variance is 2 (M - 1) / (M - 2) times the true one."""
    ratios = error_over_spread(np.zeros(10))
    assert 0.8 < ratios["trace"] < 1.2
    assert 1.2 < ratios["squared_norm"] < 1.6


def two_on_the_same_windows(rng):
    gradients_MxP = quadratic(rng, np.full(10, 1.0), np.ones(10), 24, 2)
    others_MxP = 0.5 * gradients_MxP + quadratic(rng, np.zeros(10), np.full(10, 0.05), 24, 2)
    return estimated(gradients_MxP, 2).trace, estimated(others_MxP, 2).trace


def test_a_ratio_of_two_objectives_knows_that_they_saw_the_same_windows():
    rng = np.random.default_rng(3)
    pairs = [two_on_the_same_windows(rng) for _ in range(2000)]
    ratios = [a / b for a, b in pairs]
    spread = np.std([ratio.value for ratio in ratios])
    assert np.mean([ratio.error for ratio in ratios]) == pytest.approx(spread, rel=0.2)
    unpaired = [
        r.value * np.hypot(a.error / a.value, b.error / b.value)
        for r, (a, b) in zip(ratios, pairs, strict=True)
    ]
    assert np.mean(unpaired) > 2 * spread


# ---- Model 5 ------------------------------------------------------------------------------------

CONFIG = TrainConfig(model=dataclasses.replace(MODEL, dtype="float64"))
N_BATCHES, BATCH = 4, 3
KEY = jax.random.key(5)


@pytest.fixture(autouse=True)
def _float64():
    with jax.enable_x64(True):
        yield


def windows(rows: int = N_BATCHES * BATCH, config: TrainConfig = CONFIG) -> np.ndarray:
    c = config.model
    return np.random.default_rng(9).integers(0, c.vocab_size, (rows, c.seq_len + 1), np.int32)


@functools.cache
def params(config: TrainConfig = CONFIG) -> dict:
    return jax.jit(functools.partial(step.init_state, config=config))(jax.random.key(0)).params


def measured(config: TrainConfig = CONFIG, batch_size: int = BATCH) -> dict:
    return noise.measure(params(), windows(), config, batch_size=batch_size).as_dict()


def brute_force(gradients_MxP: np.ndarray, batch_size: int) -> dict[str, float]:
    """From the definitions: sample variance, products of different gradients, M new estimates."""

    def numbers(gradients_MxP):
        M, products_MxM = len(gradients_MxP), gradients_MxP @ gradients_MxP.T
        trace = batch_size * gradients_MxP.var(axis=0, ddof=1).sum()
        squared_norm = (products_MxM.sum() - np.trace(products_MxM)) / (M * (M - 1))
        return np.array([trace, squared_norm, trace / squared_norm])

    M = len(gradients_MxP)
    without_Mx3 = np.array([numbers(np.delete(gradients_MxP, i, axis=0)) for i in range(M)])
    errors = np.sqrt((M - 1) / M * ((without_Mx3 - without_Mx3.mean(0)) ** 2).sum(0))
    named = {"n_batches": M, "batch_size": batch_size}
    for name, value, error in zip(QUANTITIES, numbers(gradients_MxP), errors, strict=True):
        named |= {name: value, f"{name}_error": error}
    return named


@functools.cache
def sequence_gradient():
    """(window, n) -> [P]: one sequence's gradient, loss on its last n full logits, dropout off."""

    def loss(params, window_L1, n):
        apply = model.Model5(CONFIG.model).apply
        L = MODEL.seq_len
        logits = apply({"params": params}, window_L1[None, :-1], n_last=L, deterministic=True)
        log_probs_LxV = jax.nn.log_softmax(logits[0])
        log_probs_L = log_probs_LxV[jnp.arange(L), window_L1[1:]]
        return -jnp.where(jnp.arange(L) >= L - n, log_probs_L, 0).sum() / n

    return jax.jit(lambda *args: ravel_pytree(jax.grad(loss)(params(), *args))[0])


def sequence_gradients(n: int) -> np.ndarray:
    return np.array([sequence_gradient()(window_L1, n) for window_L1 in windows()])


def small_batches(gradients_RxP: np.ndarray) -> np.ndarray:
    return gradients_RxP.reshape(N_BATCHES, BATCH, -1).mean(1)


@pytest.mark.parametrize(
    ("objective", "n"), [("final_token", 1), ("last_k", 5), ("all_tokens", MODEL.seq_len)]
)
def test_model_5_has_the_noise_of_its_sequences_gradients(objective, n):
    ours = measured(dataclasses.replace(CONFIG, objective=objective, last_k=5))
    expected = brute_force(small_batches(sequence_gradients(n)), BATCH)
    assert ours == pytest.approx(expected, rel=1e-10)
    other = brute_force(small_batches(sequence_gradients(n + 1 if n < 16 else 15)), BATCH)
    assert ours["trace"] != pytest.approx(other["trace"], rel=1e-3)


@pytest.mark.slow
def test_batches_of_one_sequence_have_the_same_noise_per_sequence():
    ours = measured(batch_size=1)
    expected = brute_force(sequence_gradients(1), 1)
    assert ours == pytest.approx(expected, rel=1e-10)
    assert ours["trace"] == pytest.approx(measured()["trace"], rel=0.3)  # not 3 times larger


@pytest.mark.slow
def test_last_k_reaches_from_the_final_token_to_all_tokens():
    of = {
        (objective, k): measured(dataclasses.replace(CONFIG, objective=objective, last_k=k))
        for objective, k in (
            ("final_token", 1),
            ("all_tokens", 1),
            *(("last_k", k) for k in (1, 2, MODEL.seq_len)),
        )
    }
    assert of["last_k", 1] == of["final_token", 1]
    assert of["last_k", MODEL.seq_len] == of["all_tokens", 1]
    assert of["final_token", 1]["trace"] > of["last_k", 2]["trace"] > of["all_tokens", 1]["trace"]


@pytest.mark.slow
def test_frozen_parameters_have_no_noise():
    ours = measured(with_optimizer(CONFIG, freeze=["wte"]))
    assert ours["trace"] < 0.9 * measured()["trace"]


def test_float32_is_the_float64_noise_to_rounding():
    config = with_model(CONFIG, dtype="float32")
    weights = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), params())
    ours = noise.measure(weights, windows(), config, batch_size=BATCH)
    assert ours.as_dict() == pytest.approx(measured(), rel=6e-6)  # measured 1.4e-6


def most_gradients_at_once(monkeypatch, keep) -> int:
    """Gradients alive beside the weights, at most, while 12 are measured."""

    def alive() -> int:
        return sum(array.shape == params()["wte"].shape for array in jax.live_arrays())

    counts, inner, before = [], noise._inner, alive()

    def watched(a, b):
        counts.append(alive() - before)
        keep(a)
        return inner(a, b)

    monkeypatch.setattr(noise, "_inner", watched)
    measured(batch_size=1)
    return max(counts)


def test_few_gradients_exist_at_once(monkeypatch):
    kept = []
    assert most_gradients_at_once(monkeypatch, lambda _: None) <= 3
    monkeypatch.undo()
    assert most_gradients_at_once(monkeypatch, kept.append) >= 12


@pytest.mark.parametrize("batch_size", [0, 5, 6])
def test_windows_that_make_no_three_whole_batches_are_refused(batch_size):
    with pytest.raises(UserError, match=f"batch_size={batch_size}: must divide 12 windows"):
        measured(batch_size=batch_size)
