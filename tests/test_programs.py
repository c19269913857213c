"""The steps as a generator: the numbers of a run, any loss, any batches, nothing written."""

import dataclasses
import itertools
import json
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_model5 import losses, train
from jax_model5.batches import train_batch
from jax_model5.corpus import load_corpus
from jax_model5.errors import UserError
from jax_model5.programs import Programs, steps
from jax_model5.run_folder import RunFolder
from tests.tiny import MODEL, ROOT, slow, tiny, with_model, with_optimizer


@pytest.fixture
def config(tmp_path, text_file):
    return tiny(tmp_path, text_file, steps=6)


def losses_of(stepping) -> list[float]:
    return [float(metrics["loss"]) for _, _, metrics in stepping]


def logged(config, kind: str = "train") -> list[dict]:
    lines = Path(config.workdir, "metrics.jsonl").read_text().splitlines()
    return [record for record in map(json.loads, lines) if record["kind"] == kind]


def test_the_steps_are_those_of_a_run_and_write_nothing(config, tmp_path):
    corpus = load_corpus(config)
    before = sorted(tmp_path.rglob("*"))
    numbers, found = [], []
    for step, state, metrics in steps(config, corpus):
        assert int(state.step) == step
        numbers.append(step)
        found.append({name: float(value) for name, value in metrics.items()})
    assert numbers == list(range(1, 7))
    assert sorted(tmp_path.rglob("*")) == before
    assert train.train(config) == "finished"
    speeds = ("kind", "step", "tokens_per_second", "targets_per_second")
    assert found == [{k: v for k, v in r.items() if k not in speeds} for r in logged(config)]


def test_a_state_goes_on_where_it_was(config):
    corpus = load_corpus(config)
    whole, programs = losses_of(steps(config, corpus)), Programs(config)
    first = list(itertools.islice(steps(config, corpus, programs=programs), 2))
    _, state, _ = first[-1]
    rest = losses_of(steps(config, corpus, state=state, programs=programs))
    assert losses_of(first) + rest == whole


def test_the_metrics_of_the_step_before_are_ready(config):
    before = None
    for _, _, metrics in steps(config, load_corpus(config)):
        assert before is None or before["loss"].is_ready()
        before = metrics


def test_batches_of_your_own(config):
    """Random tokens (course lesson 010) need no corpus."""
    shape = config.batch_size, MODEL.seq_len + 1

    def random_tokens(step: int) -> np.ndarray:
        return np.random.default_rng(step).integers(0, 257, shape, np.int32)

    own = losses_of(steps(config, None, batches=random_tokens))
    corpus = load_corpus(config)
    programs = Programs(config)
    plain = losses_of(steps(config, corpus, programs=programs))
    assert own != plain
    batches = lambda step: train_batch(corpus, config, step)  # noqa: E731
    assert losses_of(steps(config, corpus, batches=batches, programs=programs)) == plain


# ---- the loss -----------------------------------------------------------------------------------


def kl_to_uniform(logits_BxCxV, targets_BxC):
    """KL(uniform over all tokens ‖ model): it needs no target (course lesson 010)."""
    V = logits_BxCxV.shape[-1]
    return -jax.nn.log_softmax(logits_BxCxV).mean(-1) - jnp.log(V) + 0.0 * targets_BxC


@pytest.mark.parametrize("objective", [slow("final_token"), "last_k", slow("all_tokens")])
def test_another_loss_is_trained(config, objective):
    config = dataclasses.replace(config, objective=objective, last_k=3)
    config = with_optimizer(config, learning_rate=1e-2)
    corpus = load_corpus(config)
    found = losses_of(steps(config, corpus, kl_to_uniform))
    assert 0 < found[-1] < found[0] / 2, "it does not fall"
    first = losses_of(itertools.islice(steps(config, corpus), 1))
    assert abs(first[0] - found[0]) > 1, "the loss was not used"


def test_evaluation_keeps_the_nll(config):
    ours, theirs = Programs(config), Programs(config, kl_to_uniform)
    params = ours.init().params
    tests = [ours.to_devices(train_batch(load_corpus(config), config, 0))]
    assert ours.test(params, tests) == theirs.test(params, tests)


def test_a_loss_gets_the_right_logits_in_chunks_too(config, monkeypatch):
    """Element by element, so that rows in another order are seen; chunks with a remainder."""
    params = Programs(config).init().params
    windows = train_batch(load_corpus(config), config, 0)

    def first_logit(logits_BxCxV, targets_BxC):
        return jnp.take_along_axis(logits_BxCxV, targets_BxC[..., None], -1)[..., 0]

    def all_losses():
        n = MODEL.seq_len
        return losses.position_losses(
            params, windows, config, n_last=n, deterministic=True, loss=first_logit
        )

    whole = all_losses()
    monkeypatch.setattr(losses, "ROWS", 3 * config.batch_size)  # 16 = 5 * 3 + 1 positions
    np.testing.assert_allclose(all_losses(), whole, rtol=1e-5)
    assert np.abs(whole - whole[:, ::-1]).max() > 1e-3, "too alike to tell"


# ---- what is around them ------------------------------------------------------------------------


def test_a_tracker_gets_every_record_of_the_log(config):
    class Tracker:
        records: list = []  # noqa: RUF012

        def write(self, kind, step, **values):
            self.records.append({"kind": kind, "step": step, **values})

    assert train.train(config, trackers=[Tracker()]) is train.Outcome.FINISHED
    assert Tracker.records == [
        json.loads(line) for line in Path(config.workdir, "metrics.jsonl").read_text().splitlines()
    ]
    assert [r["step"] for r in Tracker.records if r["kind"] == "eval"] == [0, 5, 6]


def test_a_run_that_diverged_says_so(config):
    config = with_optimizer(config, name="sgd", learning_rate=1e30)
    assert train.train(config) is train.Outcome.DIVERGED


def test_another_blocking_error_is_not_another_run(config):
    with pytest.raises(BlockingIOError), RunFolder(config).lock():
        raise BlockingIOError("of something else")


def test_what_does_not_belong_together_is_refused(config):
    programs, longer = Programs(config), dataclasses.replace(config, steps=9)
    for call in (
        lambda: steps(config, None),
        lambda: steps(longer, load_corpus(config), programs=programs),
        lambda: steps(config, load_corpus(config), kl_to_uniform, programs=programs),
    ):
        with pytest.raises(ValueError, match=r"corpus: give one|another config or loss"):
            next(call())


def test_float64_needs_jax_set_up(config):
    with pytest.raises(UserError, match=r"model\.dtype='float64'"):
        Programs(with_model(config, dtype="float64"))


def test_the_library_changes_no_logger_and_no_hook(tmp_path):
    """In a notebook, also while it reads columns and trains."""
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"text": "some words"}\n' * 300)
    script = f"""
import logging, os, pkgutil, sys, warnings
import datasets, jax, jax_model5  # imported before: what they do themselves is theirs

def settings():
    loggers = {{n: l.level for n, l in logging.Logger.manager.loggerDict.items()
               if isinstance(l, logging.Logger)}}
    hooks = sys.excepthook, sys.unraisablehook, sys.displayhook, logging.root.level
    return hooks, loggers, datasets.are_progress_bars_disabled(), dict(os.environ)

import absl.logging, asyncio, orbax.checkpoint, matplotlib.figure
before = settings()
for name in pkgutil.walk_packages(jax_model5.__path__, "jax_model5."):
    if not name.name.endswith("__main__"):
        __import__(name.name)
from jax_model5 import corpus, programs, startup
from jax_model5.config import parse
args = ["--data.source", {str(rows)!r}, "--data.cache_dir", {str(tmp_path / "cache")!r}]
args += "--data.tokenizer bytes --model.vocab_size 257 --model.d_model 8 --steps 2".split()
config = parse([*args, "--model.seq_len", "16"], "test")
startup.set_up_jax(config)
for _ in programs.steps(config, corpus.load_corpus(config)):
    pass
after = settings()
assert after[0] == before[0], "a hook changed"
assert {{n: after[1][n] for n in before[1]}} == before[1], "a logger changed"
assert after[2:] == before[2:], "a setting changed"
"""
    subprocess.run([sys.executable, "-c", script], check=True, cwd=ROOT)
