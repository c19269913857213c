"""A run that is killed, stopped, extended or diverges: nothing is lost, and the numbers stay."""

import math
import os
import pty
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from jax_model5 import record
from tests.tiny import HEED_SIGNALS, ROOT, flags, run, start, tiny, with_optimizer

KILLS = 10
STEPS = 400


def numbers(workdir: Path) -> list[str]:
    """The text of every record up to its speeds, byte for byte."""
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    return [line.split(', "tokens_per_second"')[0] for line in lines]


@pytest.fixture(scope="module")
def long_run(tmp_path_factory, text_file):
    """The command line of a run of 400 steps, and the numbers of one that nobody stopped."""
    folder = tmp_path_factory.mktemp("long")
    config = tiny(folder, text_file, steps=STEPS, checkpoint_every=11, eval_every=20)
    code, _, err = run(*flags(config))
    assert code == 0, err
    workdir = Path(config.workdir)
    assert len(numbers(workdir)) == STEPS + STEPS // 20 + 1
    return flags(config), numbers(workdir)


def wait_for(condition, process) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.001)


def is_saving(workdir: Path) -> bool:
    return any("tmp" in path.name for path in (workdir / "checkpoints").glob("*"))


@pytest.mark.slow
def test_ten_kills_at_random_moments_change_no_number(tmp_path, long_run):
    """SIGKILL while starting, stepping and saving; each time it is started again."""
    args, expected = long_run
    workdir = tmp_path / "killed"
    dice = random.Random(0)
    for kill in range(KILLS):
        process = start(*args, "--workdir", workdir)
        if kill in (0, 5):
            time.sleep(dice.uniform(0.2, 4.0))  # wherever that is: imports, compilation, steps
        else:
            target = len(record.read(workdir / "metrics.jsonl")) + dice.randrange(1, 40)
            wait_for(lambda t=target: len(record.read(workdir / "metrics.jsonl")) >= t, process)
        if kill % 3 == 1:
            wait_for(lambda: is_saving(workdir), process)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert process.returncode == -signal.SIGKILL, "it finished before it could be killed"
    code, out, err = run(*args, "--workdir", workdir)
    assert code == 0, err
    assert "resuming" in out
    assert numbers(workdir) == expected
    assert not is_saving(workdir)


WIDE = {"model.vocab_size": 50257, "model.d_model": 128, "model.n_heads": 4, "model.n_layers": 2}


@pytest.mark.slow
def test_a_kill_changes_no_number_at_the_default_width(tmp_path, text_file):
    """At width 16 no product is split over the cores; here they are, and a resume has to match."""
    config = tiny(tmp_path, text_file, steps=12, checkpoint_every=2)
    args = [*flags(config), *(f"--{key}={value}" for key, value in WIDE.items())]
    code, _, err = run(*args)
    assert code == 0, err
    workdir = tmp_path / "killed"
    for n in (3, 8):
        process = start(*args, "--workdir", workdir)
        wait_for(lambda n=n: len(record.read(workdir / "metrics.jsonl")) > n, process)
        process.send_signal(signal.SIGKILL)
        process.communicate()
    code, out, err = run(*args, "--workdir", workdir)
    assert code == 0, err
    assert "resuming" in out
    assert "machine" not in err
    assert numbers(workdir) == numbers(Path(config.workdir))


@pytest.mark.parametrize(
    "name",
    ["SIGTERM", *(pytest.param(name, marks=pytest.mark.slow) for name in ("SIGINT", "SIGHUP"))],
)
def test_a_signal_saves_and_says_how_to_go_on(tmp_path, long_run, name):
    args, expected = long_run
    args = [*args, "--steps=200"]
    expected = [line for line in expected if int(re.search(r'"step": (\d+)', line)[1]) <= 200]
    workdir = tmp_path / "stopped"
    process = start(*args, "--workdir", workdir, prefix=HEED_SIGNALS)
    wait_for(lambda: len(record.read(workdir / "metrics.jsonl")) > 30, process)
    process.send_signal(getattr(signal, name))
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    assert "Traceback" not in err
    step = int(re.search(rf"{name}: saved step (\d+)", out).group(1))
    assert (workdir / "checkpoints" / str(step)).is_dir()
    command = re.search(r"python -m jax_model5.train (.*)", out).group(1)
    code, out, err = run(*command.split())
    assert code == 0, err
    assert f"at step {step}" in out
    assert numbers(workdir) == expected


@pytest.mark.slow
def test_an_ignored_hang_up_stays_ignored(tmp_path, long_run):
    """`nohup`: the terminal closes, and the run goes on to its end."""
    args, _ = long_run
    ignoring = ["bash", "-c", 'trap "" HUP; exec "$@"', "--"]
    process = start(*args, "--workdir", tmp_path, "--steps=60", prefix=ignoring)
    wait_for(lambda: len(record.read(tmp_path / "metrics.jsonl")) > 5, process)
    process.send_signal(signal.SIGHUP)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert "finished at step 60" in out


@pytest.mark.slow
def test_a_run_whose_terminal_is_gone_goes_on(tmp_path, long_run):
    """Its output is a closed pipe, its errors a terminal that hung up while it trained."""
    args, expected = long_run
    terminal, its_end = pty.openpty()
    command = [sys.executable, "-m", "jax_model5.train", *args, "--workdir", tmp_path]
    process = subprocess.Popen(
        [*map(str, command), "--steps=200"], cwd=ROOT, stdout=subprocess.PIPE, stderr=its_end
    )
    os.close(its_end)
    wait_for(lambda: len(record.read(tmp_path / "metrics.jsonl")) > 30, process)
    process.stdout.close()
    os.close(terminal)
    assert process.wait(timeout=120) == 0
    assert numbers(tmp_path) == expected[:211]
    assert (tmp_path / "samples.txt").exists()


def test_a_finished_run_says_so_and_can_go_on_longer(tmp_path, text_file):
    config = tiny(tmp_path, text_file)
    assert run(*flags(config))[0] == 0
    workdir = Path(config.workdir)
    before = {p: p.stat().st_mtime_ns for p in workdir.rglob("*") if p.is_file()}
    code, out, _ = run(*flags(config))
    assert code == 0
    assert "finished at step 12" in out
    assert str(workdir) in out
    assert before == {p: p.stat().st_mtime_ns for p in workdir.rglob("*") if p.is_file()}
    longer = re.search(r"python -m jax_model5.train (.*)", out).group(1)
    code, out, err = run(*longer.split())
    assert code == 0, err
    records = record.read(workdir / "metrics.jsonl")
    assert [r["step"] for r in records if r["kind"] == "train"] == list(range(1, 25))
    assert (workdir / "samples.txt").read_text().startswith("# step 24\n")


def test_a_run_writes_only_what_the_design_names(tmp_path, text_file):
    config = tiny(tmp_path, text_file)
    code, out, _ = run(*flags(config))
    assert code == 0
    names = {path.name for path in Path(config.workdir).iterdir()}
    assert names == {"config.yaml", "metrics.jsonl", "loss.png", "samples.txt", "checkpoints"}
    assert {path.name for path in tmp_path.iterdir()} == {"cache", "run"}
    records = record.read(Path(config.workdir, "metrics.jsonl"))
    train = "kind step grad_norm learning_rate loss param_norm".split()
    train += ["tokens_per_second", "targets_per_second"]
    for r in records:
        expected = (
            train if r["kind"] == "train" else [*train[:2], "final_token_nll", "all_token_nll"]
        )
        assert list(r) == expected
    assert [r["step"] for r in records if r["kind"] == "eval"] == [0, 5, 10, 12]
    samples = Path(config.workdir, "samples.txt").read_text()
    assert "temperature 1.1: 'went on holiday to Liliput and' continues" in samples
    assert "temperature 0.7" in samples
    assert samples in out


@pytest.mark.slow
@pytest.mark.parametrize("learning_rate", [1e6, 1e38])
def test_a_loss_that_is_not_finite_stops_with_the_last_good_state(
    tmp_path, text_file, learning_rate
):
    config = tiny(tmp_path, text_file, steps=60, checkpoint_every=1, eval_every=1, keep=3)
    config = with_optimizer(config, name="sgd", learning_rate=learning_rate)
    code, _, err = run(*flags(config))
    assert code == 3
    line = err.strip().splitlines()[-1]
    stopped = int(re.search(r"step (\d+): \w+=-?(nan|inf): stopped", line).group(1))
    assert "Traceback" not in err
    records = record.read(Path(config.workdir, "metrics.jsonl"))
    assert all(math.isfinite(v) for r in records for v in r.values() if isinstance(v, float))
    if stopped == 1:
        assert "none was saved yet" in line
        return
    # The last good state is good: its own test loss was finite when it was saved.
    last_good = int(re.search(r"checkpoint (\d+) in", line).group(1))
    assert last_good < stopped
    assert [r for r in records if (r["kind"], r["step"]) == ("eval", last_good)]


@pytest.mark.slow
def test_a_second_run_in_the_same_workdir_is_refused(tmp_path, long_run):
    args, expected = long_run
    process = start(*args, "--workdir", tmp_path, "--steps=200")
    wait_for(lambda: len(record.read(tmp_path / "metrics.jsonl")) > 5, process)
    code, out, err = run(*args, "--workdir", tmp_path)
    assert (code, out) == (2, "")
    assert "another run is writing into it" in err
    assert process.wait(timeout=120) == 0
    assert numbers(tmp_path) == expected[:211]


def test_the_reference_trains_on_the_same_config_and_batches(tmp_path, text_file):
    config = tiny(tmp_path, text_file, steps=6)
    assert run(*flags(config), "--model.dropout=0")[0] == 0
    code, _, err = run(*flags(config), "--model.dropout=0", module="torch_ref.train")
    assert code == 0, err
    ours = record.read(Path(config.workdir, "metrics.jsonl"))
    theirs = record.read(Path(config.workdir, "torch_metrics.jsonl"))
    assert [(r["kind"], r["step"]) for r in ours] == [(r["kind"], r["step"]) for r in theirs]
    assert theirs[-1]["all_token_nll"] == pytest.approx(ours[-1]["all_token_nll"], rel=0.02)
