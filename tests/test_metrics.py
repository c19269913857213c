"""The log that reads back exactly, and the rolling spread."""

import json
import math

import numpy as np

from jax_model5 import metrics


def test_floats_read_back_exactly(tmp_path):
    values = [float(np.float32(x)) for x in (0.1, 1e-30, 10.820713, math.pi)]
    log = metrics.MetricsLog(tmp_path / "metrics.jsonl", 0)
    for step, value in enumerate(values, 1):
        log.write("train", step, loss=value)
    log.sync()
    assert [r["loss"] for r in metrics.read(tmp_path / "metrics.jsonl")] == values


def test_resuming_drops_what_came_after_and_a_line_cut_short(tmp_path):
    path = tmp_path / "metrics.jsonl"
    lines = [json.dumps({"kind": "train", "step": k, "loss": k / 3}) for k in range(1, 6)]
    path.write_text("\n".join(lines) + '\n{"kind": "train", "st')
    metrics.MetricsLog(path, 3).write("train", 4, loss=0.5)
    assert path.read_text().splitlines() == [
        *lines[:3],
        '{"kind": "train", "step": 4, "loss": 0.5}',
    ]


def test_rolling_std_is_of_the_last_50_steps():
    values = np.random.default_rng(0).normal(size=120)
    rolling = metrics.rolling_std(values, 50)
    assert np.isnan(rolling[:49]).all()
    assert rolling[49] == values[:50].std()
    assert rolling[119] == values[70:].std()
    assert np.isnan(metrics.rolling_std(values[:10], 50)).all()


def test_a_plot_of_a_single_step_is_drawn(tmp_path):
    metrics.plot(
        [{"kind": "train", "step": 1, "loss": 3.0}], 257, "final_token_nll", tmp_path / "loss.png"
    )
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
