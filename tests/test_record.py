"""The log that reads back exactly, the rolling spread, and whose commit it is."""

import json
import math
import shutil
import subprocess
import sys

import numpy as np
import pytest

from jax_model5 import record
from jax_model5.config import TrainConfig
from tests.tiny import ROOT


def test_floats_read_back_exactly(tmp_path):
    values = [float(np.float32(x)) for x in (0.1, 1e-30, 10.820713, math.pi)]
    log = record.MetricsLog(tmp_path / "metrics.jsonl", 0)
    for step, value in enumerate(values, 1):
        log.write("train", step, loss=value)
    log.sync()
    assert [r["loss"] for r in record.read(tmp_path / "metrics.jsonl")] == values


def test_resuming_drops_what_came_after_and_a_line_cut_short(tmp_path):
    path = tmp_path / "metrics.jsonl"
    lines = [json.dumps({"kind": "train", "step": k, "loss": k / 3}) for k in range(1, 6)]
    path.write_text("\n".join(lines) + '\n{"kind": "train", "st')
    record.MetricsLog(path, 3).write("train", 4, loss=0.5)
    assert path.read_text().splitlines() == [
        *lines[:3],
        '{"kind": "train", "step": 4, "loss": 0.5}',
    ]


def test_rolling_std_is_of_the_last_50_steps():
    values = np.random.default_rng(0).normal(size=120)
    rolling = record.rolling_std(values, 50)
    assert np.isnan(rolling[:49]).all()
    assert rolling[49] == values[:50].std()
    assert rolling[119] == values[70:].std()
    assert np.isnan(record.rolling_std(values[:10], 50)).all()


def test_a_plot_of_a_single_step_is_drawn(tmp_path):
    record.plot(
        [{"kind": "train", "step": 1, "loss": 3.0}], 257, "final_token_nll", tmp_path / "loss.png"
    )
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_a_value_that_is_not_finite_is_written_nowhere(tmp_path):
    log = record.MetricsLog(tmp_path / "metrics.jsonl", None)
    recorder = record.Recorder(TrainConfig(), [log])
    recorder.add(1, {"loss": np.float32(2.0), "of_your_own": np.float32(3.0)})
    recorder.add(2, {"loss": np.float32(2.0), "of_your_own": np.float32("nan")})
    with pytest.raises(record.Diverged, match="step 2: of_your_own=nan"):
        recorder.flush()
    (line,) = record.read(tmp_path / "metrics.jsonl")
    assert (line["loss"], line["of_your_own"]) == (2.0, 3.0)


@pytest.mark.parametrize("place", ["copied into it", "installed below it"])
def test_the_commit_of_another_project_is_not_ours(place, tmp_path):
    """A run in a virtual environment inside somebody's own repository."""

    def git(*arguments):
        identity = ["-c", "user.name=a", "-c", "user.email=a@b.c"]
        subprocess.run(["git", "-C", str(tmp_path), *identity, *arguments], check=True)

    git("init", "-q")
    git("commit", "-q", "--allow-empty", "-m", "theirs")
    root = tmp_path if place == "copied into it" else tmp_path / ".venv/lib/site-packages"
    shutil.copytree(ROOT / "jax_model5", root / "jax_model5")
    script = "from jax_model5 import record; print(record.commit())"
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True)
    assert done.stdout == "None\n"
    git("add", "-f", ".")
    git("commit", "-q", "-m", "ours")
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True)
    assert (done.stdout == "None\n") == (place == "installed below it"), "a real commit is told"
