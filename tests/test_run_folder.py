"""A run is its folder: copied, moved, damaged, finished, on a disk that cannot be written."""

import contextlib
import dataclasses
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from jax_model5 import checkpoint, disk, record, train
from jax_model5.config import parse
from jax_model5.errors import UserError
from tests.tiny import HEED_SIGNALS, ROOT, flags, start, tiny

RESULTS = ("metrics.jsonl", "loss.png", "samples.txt")


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def numbers(config) -> list[str]:
    log = Path(config.workdir, "metrics.jsonl").read_text()
    return re.findall(r'"step": \d+|"(?:loss|final_token_nll)": [^,]+', log)


# ---- copied, moved ------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("place", ["a copy", "moved", "from inside"])
def test_a_config_in_a_runs_folder_means_that_folder(
    finished, config, tmp_path, monkeypatch, place
):
    original, path = contents(Path(finished.workdir)), Path(config.workdir, "config.yaml")
    if place == "moved":
        path = Path(shutil.move(config.workdir, tmp_path / "moved"), "config.yaml")
    if place == "from inside":
        monkeypatch.chdir(path.parent)
        path = Path(path.name)
    path.with_name("loss.png").unlink()
    longer = parse(["--config", str(path), "--steps", "20"], "test")
    assert Path(longer.workdir).samefile(path.parent)
    assert train.train(longer) == "finished"
    steps = [r["step"] for r in record.read(path.parent / "metrics.jsonl") if r["kind"] == "train"]
    assert steps == list(range(1, 21))
    assert contents(Path(finished.workdir)) == original


def test_a_workdir_that_is_given_wins(config, tmp_path):
    path = str(Path(config.workdir, "config.yaml"))
    assert parse(["--config", path, "--workdir", "elsewhere"], "test").workdir == "elsewhere"
    alone = tmp_path / "config.yaml"  # lies in no run's folder
    alone.write_text(Path(path).read_text())
    assert parse(["--config", str(alone)], "test").workdir != str(tmp_path)
    (tmp_path / "checkpoints").mkdir()  # of something else: no step is in it
    assert parse(["--config", str(alone)], "test").workdir != str(tmp_path)
    (tmp_path / "checkpoints/100").mkdir()
    assert parse(["--config", str(alone)], "test").workdir == str(tmp_path)


# ---- the log ------------------------------------------------------------------------------------


def damage(path: Path, kind: str) -> None:
    content = path.read_bytes()
    lines = content.splitlines(keepends=True)
    third = next(i for i, line in enumerate(lines) if b'"train", "step": 3,' in line)
    if kind == "garbage":
        lines[third] = b"\xff\xfe garbage\n"
        path.write_bytes(b"".join(lines))
    elif kind == "half a line":
        lines[third] = lines[third][:30] + b"\n"
        path.write_bytes(b"".join(lines))
    elif kind == "a changed name":
        lines[third] = lines[third].replace(b'"loss"', b'"mose"')
        path.write_bytes(b"".join(lines))
    elif kind == "a changed number":
        lines[third] = lines[third].replace(b'"loss": ', b'"loss": 1e999, "was": ')
        path.write_bytes(b"".join(lines))
    elif kind == "no record":
        lines[third] = b'[1]\n{"kind": 3, "step": 1}\n{"step": "x", "kind": "train"}\n'
        path.write_bytes(b"".join(lines))
    elif kind == "a line gone":
        path.write_bytes(b"".join(lines[:third] + lines[third + 1 :]))
    elif kind == "zeros after a power cut":
        start = len(b"".join(lines[:third]))
        path.write_bytes(content[:start] + bytes(len(content) - start))
    elif kind == "cut":
        path.write_bytes(b"".join(lines[:third]))
    else:
        path.unlink()


LOST = {
    # kind: (what is said to be lost, how many lines are set aside)
    "garbage": ("of steps 3", 1),
    "half a line": ("of steps 3", 1),
    "a changed name": ("of steps 3", 1),
    "a changed number": ("of steps 3", 1),
    "no record": ("of steps 3", 3),
    "a line gone": ("of steps 3", 0),
    "zeros after a power cut": ("of steps 3-12", 0),
    "cut": ("of steps 3-12", 0),
    "missing": ("of steps 1-12", 0),
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", LOST)
def test_a_damaged_log_goes_on_and_says_what_is_lost(config, capsys, kind):
    path = Path(config.workdir, "metrics.jsonl")
    damage(path, kind)
    assert train.train(dataclasses.replace(config, steps=14)) == "finished"
    lost, n_aside = LOST[kind]
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "metrics.jsonl" in line]
    assert line.endswith(f"it has lost the training losses {lost}")
    aside = path.with_name("damaged_metrics.jsonl")
    assert (len(aside.read_bytes().splitlines()) if aside.exists() else 0) == n_aside
    assert f"{n_aside} lines of it cannot be read" in line or n_aside == 0
    steps = [r["step"] for r in record.read(path) if r["kind"] == "train"]
    assert steps[-2:] == [13, 14]
    assert len(path.read_text().splitlines()) == len(record.read(path))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["garbage", "cut"])
def test_a_restart_before_the_damage_loses_nothing(config, finished, kind):
    """What is trained again is written again."""
    workdir = Path(config.workdir)
    damage(workdir / "metrics.jsonl", kind)
    shutil.rmtree(workdir / "checkpoints")
    assert train.train(config) == "finished"
    assert numbers(config) == numbers(finished)


# ---- finished -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", RESULTS)
def test_a_result_that_is_gone_is_written_again(config, capsys, name):
    workdir = Path(config.workdir)
    before = contents(workdir)
    (workdir / name).unlink()
    assert train.train(config) == "finished"
    out, err = capsys.readouterr()
    assert f"but has no {name}: writing again" in err
    assert "finished at step 12" in out
    after = contents(workdir)
    assert after.keys() == before.keys()
    if name == "metrics.jsonl":
        assert "lost the training losses of steps 1-12" in err
        assert after["loss.png"] == before["loss.png"]  # not drawn from an empty log
    del before["config.yaml"], after["config.yaml"]  # of the folder that was copied
    assert {**after, name: b""} == {**before, name: b""}
    assert name == "metrics.jsonl" or after[name][:9] == before[name][:9]
    assert train.train(config) == "finished"
    assert "writing again" not in capsys.readouterr().err


def test_a_finished_run_on_a_read_only_disk_says_finished(config, capsys, monkeypatch):
    before = {path: path.stat().st_mtime_ns for path in Path(config.workdir).rglob("*")}
    monkeypatch.setattr(os, "access", lambda *_: False)
    assert train.train(config) == "finished"
    assert "finished at step 12" in capsys.readouterr().out
    assert {p: p.stat().st_mtime_ns for p in Path(config.workdir).rglob("*")} == before
    with pytest.raises(UserError, match="cannot be written into"):
        train.train(dataclasses.replace(config, steps=20))


# ---- checkpoints --------------------------------------------------------------------------------


def test_no_flipped_bit_of_meta_is_believed(config):
    """A changed bit in it is damage, and neither another run's config nor another text."""
    meta = Path(config.workdir, "checkpoints/12/meta/metadata")
    content, dice = meta.read_bytes(), random.Random(0)
    with checkpoint.open_saved(Path(config.workdir, "checkpoints")) as saved:
        known = checkpoint.read_meta(saved, 12)
        del known["machine"], known["sha256_of_the_rest"]
        n_damaged = 0
        for _ in range(300):
            flipped = bytearray(content)
            flipped[dice.randrange(len(content))] ^= 1 << dice.randrange(8)
            meta.write_bytes(flipped)
            try:
                read = checkpoint.read_meta(saved, 12)
            except Exception:
                n_damaged += 1
            else:  # in the name of the seal, or in white space
                assert {name: read[name] for name in known} == known
    assert n_damaged > 280


def test_a_flipped_bit_of_meta_falls_back(config, capsys):
    meta = Path(config.workdir, "checkpoints/12/meta/metadata")
    content = meta.read_bytes()
    at = content.index(b'"seed":') + len(b'"seed": ')
    meta.write_bytes(content[:at] + b"1" + content[at + 1 :])
    assert json.loads(meta.read_bytes())["config"]["seed"] == 1
    assert train.train(config) == "finished"
    err = capsys.readouterr().err
    assert "checkpoint 12 is damaged (the bits of meta changed on disk)" in err
    assert "going on from checkpoint 8" in err


@pytest.mark.slow
@pytest.mark.parametrize("name", ["cores", "devices", "device"])
def test_another_machine_is_one_line(config, capsys, monkeypatch, name):
    machine = checkpoint.machine()
    assert set(machine) == {"cores", "devices", "device"}
    monkeypatch.setattr(checkpoint, "machine", lambda: machine | {name: 64})
    assert train.train(dataclasses.replace(config, steps=13)) == "finished"
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "machine" in line]
    assert f"{name} {machine[name]} -> 64" in line
    assert "the last bits may differ" in line
    assert train.train(dataclasses.replace(config, steps=14)) == "finished"
    assert "machine" not in capsys.readouterr().err


def test_the_cores_are_those_that_the_process_may_use(monkeypatch):
    code = "from jax_model5.startup import machine; print(machine()['cores'])"
    done = subprocess.run(
        ["taskset", "-c", "0", sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True
    )
    assert done.stdout == "1\n", done.stderr


def test_what_is_replaced_is_synced_and_its_folder_too(tmp_path, monkeypatch):
    """Before the new file takes the old one's place, and once it has."""
    synced = []

    def fsync(file: int) -> None:
        synced.append(os.path.basename(os.path.realpath(f"/dev/fd/{file}")))

    monkeypatch.setattr(disk.os, "fsync", fsync)
    path = tmp_path / "a.txt"
    disk.replace_text(path, "text")
    assert synced == [".a.txt.partial", tmp_path.name]
    with contextlib.suppress(RuntimeError), disk.replaced(path) as file:
        file.write(b"half")
        raise RuntimeError
    assert path.read_text() == "text"


# ---- signals before the first step --------------------------------------------------------------


@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP", "SIGINT"])
def test_a_signal_before_the_loop_is_one_line(tmp_path, name):
    """While it tokenizes; what it has tokenized is kept."""
    source = tmp_path / "a.txt"
    source.write_text("".join(f"{i} times {i} is {i * i}\n" for i in range(1_000_000)))
    process = start(*flags(tiny(tmp_path, source)), prefix=HEED_SIGNALS)
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob("cache/.a-*.building/tokens.bin")):
        assert time.monotonic() < deadline
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    process.send_signal(getattr(signal, name))
    out, err = process.communicate(timeout=60)
    (line,) = err.splitlines()
    assert line == (
        "interrupted" if name == "SIGINT" else f"{name}: stopped; what was saved is kept"
    )
    assert process.returncode == 128 + getattr(signal, name)
    assert out == ""
