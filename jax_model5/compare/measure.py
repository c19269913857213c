"""A finished run -> its figures: curves, gradient noise, sampled text, documents."""

import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tiktoken

from jax_model5 import record
from jax_model5.batches import test_batches, train_batch
from jax_model5.checkpoint import read_params
from jax_model5.compare import heterogeneity, noise, text
from jax_model5.compare.plan import Run
from jax_model5.config import TEST_METRICS, TrainConfig
from jax_model5.corpus import Corpus
from jax_model5.generate import Sampling, generate
from jax_model5.losses import position_losses
from jax_model5.step import abstract_state

SAMPLES, SAMPLE_TOKENS = 8, 64
_NOISE_BATCH = 8
NOISE_WINDOWS = 3 * _NOISE_BATCH
_FRESH_SEED = 2**31  # draws training windows in an order that no run trained in
_ROWS = 16  # windows of one forward pass


def curves(run: Run) -> dict[str, Any]:
    """The run's test losses by step, its training losses, and how much these swing."""
    records = record.read(Path(run.config.workdir, "metrics.jsonl"))
    evals = [r for r in records if r["kind"] == "eval"]
    losses = [r["loss"] for r in records if r["kind"] == "train"]
    rolling = record.rolling_std(np.array(losses), min(record.ROLLING_STEPS, len(losses)))
    return {
        "step": [r["step"] for r in evals],
        **{metric: [r[metric] for r in evals] for metric in TEST_METRICS},
        "train_loss": losses,
        "train_std": float(np.nanmean(rolling[len(rolling) // 2 :])),
    }


def seconds(run: Run) -> list[float]:
    """Seconds of each training step, as the run itself logged them."""
    records = record.read(Path(run.config.workdir, "metrics.jsonl"))
    tokens = run.config.batch_size * run.config.model.seq_len
    return [tokens / r["tokens_per_second"] for r in records if r["kind"] == "train"]


@functools.lru_cache(maxsize=2)
def params_of(config: TrainConfig, step: int) -> dict:
    """The parameters that a run saved at that step."""
    return jax.device_put(read_params(config.workdir, abstract_state(config).params, step=step))


def final_params(config: TrainConfig) -> dict:
    return params_of(config, config.steps)


def _same_program(config: TrainConfig) -> TrainConfig:
    """The config without what a compiled program does not depend on: one for all seeds."""
    return dataclasses.replace(config, seed=0, workdir="any")


# ---- gradient noise -----------------------------------------------------------------------------


def gradient_noise(
    run: Run, corpus: Corpus, n_windows: int, ns: Sequence[int]
) -> dict[str, dict[str, Any]]:
    """{"middle" or "end": {N: noise of the mean NLL on the last N positions}}."""
    drawn = dataclasses.replace(
        run.config,
        seed=_FRESH_SEED,
        batch_size=n_windows,
        accumulate=1,
        data=dataclasses.replace(run.config.data, sampling="random"),
    )
    windows_RxL1 = train_batch(corpus, drawn, 0)
    found: dict[str, dict[str, Any]] = {}
    for moment, step in {"middle": run.config.checkpoint_every, "end": run.config.steps}.items():
        params = params_of(run.config, step)
        found[moment] = {}
        for n in ns:
            objective = dataclasses.replace(run.config, objective="last_k", last_k=n)
            found[moment][str(n)] = noise.measure(
                params,
                windows_RxL1,
                _same_program(objective),
                batch_size=_NOISE_BATCH,
            ).as_dict()
    return found


# ---- losses -------------------------------------------------------------------------------------


def gap(run: Run, corpus: Corpus) -> dict[str, float]:
    """Test minus training NLL at the end [nats], both with dropout off, on windows equally many."""
    test = test_batches(corpus, run.config).reshape(-1, run.config.model.seq_len + 1)
    drawn = dataclasses.replace(run.config, seed=_FRESH_SEED, batch_size=len(test), accumulate=1)
    train = train_batch(corpus, drawn, 0)
    L = run.config.model.seq_len
    test_RxL, train_RxL = (nll_of_windows(run.config, part, L) for part in (test, train))
    return {
        "final_token": float(test_RxL[:, -1].mean() - train_RxL[:, -1].mean()),
        "all_tokens": float(test_RxL.mean() - train_RxL.mean()),
    }


# ---- text ---------------------------------------------------------------------------------------


def prompts(run: Run, corpus: Corpus) -> np.ndarray:
    """Full test windows [SAMPLES, L]: every token comes from the last position, also at once."""
    windows_NxL1 = test_batches(corpus, run.config).reshape(-1, run.config.model.seq_len + 1)
    places = np.linspace(0, len(windows_NxL1) - 1, SAMPLES).astype(int)
    return windows_NxL1[places, 1:]


def sample(run: Run, corpus: Corpus) -> np.ndarray:
    """SAMPLE_TOKENS tokens after each prompt, at temperature 1, the same seed for every run."""
    tokens = generate(
        final_params(run.config),
        prompts(run, corpus).tolist(),
        jax.random.key(0),
        config=run.config.model,
        sampling=Sampling(),
        n_tokens=SAMPLE_TOKENS,
    )
    return np.array(list(tokens)).T


def samples_and_quality(run: Run, corpus: Corpus, encoding: tiktoken.Encoding) -> dict[str, Any]:
    rows = sample(run, corpus)
    return {"samples": rows.tolist(), **text.quality(rows.tolist(), corpus, encoding)}


def nll_of_samples(judge: Run, samples: Sequence[Sequence[int]], prompts_SxL: np.ndarray) -> float:
    """Mean NLL [nats/token] of sampled tokens under another run's model, each at its last position.

    That is the one position that all objectives train.
    """
    L = judge.config.model.seq_len
    rows_SxT = np.concatenate([prompts_SxL, np.array(samples)], axis=1)
    windows = np.lib.stride_tricks.sliding_window_view(rows_SxT, L + 1, axis=1)
    return float(nll_of_windows(judge.config, windows.reshape(-1, L + 1), 1).mean())


def nll_of_windows(config: TrainConfig, windows_RxL1: np.ndarray, n: int) -> np.ndarray:
    """NLL_RxN of the last N targets of each window under the run's last state, dropout off."""
    parts = np.split(windows_RxL1, range(_ROWS, len(windows_RxL1), _ROWS))
    parts[-1] = np.resize(parts[-1], (_ROWS, parts[-1].shape[1]))  # one shape to compile
    params, program = final_params(config), _same_program(config)
    nlls = [np.asarray(_nll(params, part.astype(np.int32), program, n)) for part in parts]
    return np.concatenate(nlls)[: len(windows_RxL1)]


@functools.partial(jax.jit, static_argnums=(2, 3))
def _nll(params: dict, windows_RxL1: jax.Array, config: TrainConfig, n: int) -> jax.Array:
    return position_losses(params, windows_RxL1, config, n_last=n, deterministic=True)


# ---- documents ----------------------------------------------------------------------------------


def documents(run: Run, corpus: Corpus, end_of_text: int) -> dict[str, float]:
    """How the NLL of the test part differs between its documents, under the run's last state."""
    L = run.config.model.seq_len
    test_T = np.asarray(corpus.tokens_T[corpus.n_train :], np.int64)
    starts = np.arange(0, len(test_T) - L, L)
    windows_RxL1 = test_T[starts[:, None] + np.arange(L + 1)]
    nll_T = nll_of_windows(run.config, windows_RxL1, L).astype(np.float64).ravel()
    return heterogeneity.document_spread(nll_T, windows_RxL1[:, 1:].ravel(), end_of_text)
