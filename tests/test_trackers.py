"""Trackers show what the log holds, each point once, however often the run is started again."""

import contextlib
import json
import os
import re
import struct
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from tensorboardX.proto.event_pb2 import Event
from wandb.proto.wandb_internal_pb2 import Record

from jax_model5 import record, trackers, train
from jax_model5.config import TrainConfig
from jax_model5.errors import UserError
from jax_model5.flops import step_flops
from tests.tiny import flags, run, start, tiny


def tensorboard_points(workdir: Path) -> list[tuple[str, int, float]]:
    """(name, step, value) of every event file, as TensorFlow frames them."""
    points = []
    for path in sorted(workdir.glob("tensorboard/*")):
        data = path.read_bytes()
        while data:
            (n,) = struct.unpack("<Q", data[:8])
            event = Event.FromString(data[12 : 12 + n])
            points += [(v.tag, event.step, v.simple_value) for v in event.summary.value]
            data = data[12 + n + 4 :]
    return points


def wandb_records(path: Path) -> Iterator[Record]:
    """Of a file in LevelDB's log format: blocks of 32 KiB, parts of records with 7 bytes before."""
    data, at, whole = path.read_bytes(), 7, b""
    while at + 7 <= len(data):
        left = 32768 - at % 32768
        if left < 7:
            at += left
            continue
        _, n, kind = struct.unpack("<IHB", data[at : at + 7])
        whole += data[at + 7 : at + 7 + n]
        at += 7 + n
        if kind in (1, 4):  # whole, or its last part
            yield Record.FromString(whole)
            whole = b""


def wandb_points(workdir: Path) -> list[tuple[str, int, float]]:
    points = []
    for path in sorted(workdir.glob("wandb/offline-run-*/*.wandb")):
        for each in wandb_records(path):
            if each.WhichOneof("record_type") == "history":
                values = {i.key or i.nested_key[0]: i.value_json for i in each.history.item}
                names = [name for name in values if not name.startswith("_")]
                step = each.history.step.num
                points += [(name, step, json.loads(values[name])) for name in names]
    return points


def log_points(workdir: Path) -> list[tuple[str, int, float]]:
    return [
        (f"{r['kind']}/{name}", r["step"], value)
        for r in record.read(workdir / "metrics.jsonl")
        for name, value in r.items()
        if name not in ("kind", "step")
    ]


READERS = {"tensorboard": tensorboard_points, "wandb": wandb_points}


@pytest.mark.slow
@pytest.mark.parametrize("tracker", READERS)
def test_a_run_that_was_killed_and_went_on_has_each_point_once(
    tmp_path, text_file, monkeypatch, tracker
):
    monkeypatch.setenv("WANDB_MODE", "offline")
    config = tiny(tmp_path, text_file, steps=100_000, checkpoint_every=10, tracker=tracker)
    workdir = Path(config.workdir)
    process = start(*flags(config))
    while process.poll() is None and not (workdir / "checkpoints" / "20").is_dir():
        time.sleep(0.01)
    process.kill()
    _, err = process.communicate()
    latest = max(int(path.name) for path in workdir.glob("checkpoints/*") if path.name.isdigit())
    code, _, err = run(*flags(config), "--steps", str(latest + 5))
    assert code == 0, err
    expected, found = log_points(workdir), READERS[tracker](workdir)
    assert len(expected) > 100
    assert len(found) == len(expected)
    values = {(name, step): value for name, step, value in found}
    assert values == pytest.approx({(n, s): v for n, s, v in expected}, rel=1e-6)


@pytest.mark.parametrize("tracker", READERS)
def test_a_tracker_that_is_not_installed_is_one_line_and_writes_nothing(
    tmp_path, text_file, monkeypatch, tracker
):
    monkeypatch.setattr(trackers.importlib.util, "find_spec", lambda name: None)
    config = tiny(tmp_path, text_file, tracker=tracker)
    fix = re.escape("not installed; pip install -e '.[track]'")
    with pytest.raises(UserError, match=f"tracker='{tracker}': {fix}"):
        train.train(config)
    assert not Path(config.workdir).exists()


def test_wandb_without_a_login_is_one_line(tmp_path, text_file):
    config = tiny(tmp_path, text_file, tracker="wandb")
    env = {name: value for name, value in os.environ.items() if not name.startswith("WANDB")}
    code, _, err = run(*flags(config), env=env | {"HOME": str(tmp_path)}, stdin=subprocess.DEVNULL)
    assert code == 2
    last = err.splitlines()[-1]
    assert last.startswith("error: tracker='wandb': "), err
    assert "set WANDB_MODE=offline" in last
    assert not Path(config.workdir, "metrics.jsonl").exists()


def test_what_the_server_of_wandb_has_is_not_sent_again(tmp_path, monkeypatch):
    sent = []

    class Run:
        starting_step = 3

        def log(self, values, step):
            sent.append((step, values))

    monkeypatch.setattr("wandb.init", lambda **_: Run())
    records = [{"kind": "train", "step": step, "loss": 1.0} for step in range(1, 6)]
    trackers.open_tracker(TrainConfig(tracker="wandb"), tmp_path, records)
    assert sent == [(step, {"train/loss": 1.0}) for step in (3, 4, 5)]


# ---- a profile ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("steps", "start", "wanted"),
    [("3:5", 0, [3, 4]), ("1:2", 0, [1]), ("3:6", 3, [4, 5]), ("3:6", 7, []), ("11:12", 0, [])],
)
def test_the_steps_asked_for_are_traced(tmp_path, monkeypatch, steps, start, wanted):
    is_on, seen = [], []

    @contextlib.contextmanager
    def trace(folder):
        assert folder == str(tmp_path / "profile")
        is_on.append(True)
        yield
        is_on.clear()

    monkeypatch.setattr("jax.profiler.trace", trace)

    def stepping():
        for step in range(start + 1, 11):
            seen.extend([step] * bool(is_on))
            yield step, None, {}

    profiled = TrainConfig(profile_steps=steps).profiled
    found = [step for step, *_ in record.traced(stepping(), profiled, start, tmp_path)]
    assert found == list(range(start + 1, 11))
    assert seen == wanted


def test_a_run_leaves_a_trace_that_xprof_reads(tmp_path, text_file):
    config = tiny(tmp_path, text_file, steps=6, profile_steps="3:5")
    assert train.train(config) == "finished"
    (trace,) = Path(config.workdir).glob("profile/plugins/profile/*/*.xplane.pb")
    assert b"jit_train_step" in trace.read_bytes()


@pytest.mark.parametrize("steps", ["10", "5:5", "0:3", "6:2", "a:b", "3:4:5", "161:163"])
def test_steps_that_are_none_are_refused(steps):
    with pytest.raises(UserError, match=r"profile_steps='.*': write it as FIRST:END"):
        TrainConfig(profile_steps=steps)


# ---- the progress line --------------------------------------------------------------------------


def test_mfu_stands_where_the_chip_is_known(capfd):
    config = TrainConfig()
    flops = sum(step_flops(config).values())
    rates = {"tokens_per_second": 4096.0, "targets_per_second": 16.0}  # a step a second
    for peak in (flops / 0.5, None):
        line = record.ProgressLine(config, 0, peak)
        line.write("train", 1, loss=1.0, **rates)
        line.write("eval", 1, final_token_nll=2.0, all_token_nll=2.0)
    known, unknown = capfd.readouterr().err.splitlines()
    assert known.endswith("16 targets/s  MFU 50.0%  2:39 left")
    assert unknown.endswith("16 targets/s  2:39 left")
