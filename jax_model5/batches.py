"""(seed, step) -> the windows of a batch."""

import functools

import numpy as np

from jax_model5.config import TrainConfig
from jax_model5.corpus import Corpus


def train_batch(corpus: Corpus, config: TrainConfig, step: int) -> np.ndarray:
    """The global batch of `step`: windows [B, L + 1]; inputs `[:, :-1]`, targets `[:, 1:]`.

    A pure function of (seed, step), so resuming needs no iterator state.
    """
    return _windows(corpus, config, _SAMPLERS[config.data.sampling](corpus, config, step))


def test_batches(corpus: Corpus, config: TrainConfig) -> np.ndarray:
    """The fixed test windows [eval_batches, B, L + 1], evenly spaced, the same for every seed."""
    last = len(corpus.tokens_T) - (config.model.seq_len + 1)
    n_windows = config.eval_batches * config.batch_size
    starts = np.linspace(corpus.n_train, last, n_windows).astype(np.int64)
    return _windows(corpus, config, starts).reshape(config.eval_batches, config.batch_size, -1)


def _windows(corpus: Corpus, config: TrainConfig, starts_B: np.ndarray) -> np.ndarray:
    return corpus.tokens_T[starts_B[:, None] + np.arange(config.model.seq_len + 1)].astype(np.int32)


def _random_starts(corpus: Corpus, config: TrainConfig, step: int) -> np.ndarray:
    generator = np.random.Generator(np.random.Philox(key=[config.seed, step]))
    return generator.integers(0, corpus.n_train - config.model.seq_len, config.batch_size)


def _epoch_starts(corpus: Corpus, config: TrainConfig, step: int) -> np.ndarray:
    n_windows = (corpus.n_train - 1) // config.model.seq_len
    places_B = step * config.batch_size + np.arange(config.batch_size)
    epochs_B, offsets_B = np.divmod(places_B, n_windows)
    orders = {epoch: _epoch_order(config.seed, epoch, n_windows) for epoch in set(epochs_B)}
    windows = [orders[epoch][offset] for epoch, offset in zip(epochs_B, offsets_B, strict=True)]
    return np.array(windows) * config.model.seq_len


@functools.lru_cache(maxsize=2)
def _epoch_order(seed: int, epoch: int, n_windows: int) -> np.ndarray:
    return np.random.Generator(np.random.Philox(key=[seed, epoch])).permutation(n_windows)


_SAMPLERS = {"random": _random_starts, "epoch": _epoch_starts}
