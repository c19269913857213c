"""The report of two processes: the rows of one process, in order, and no process left behind."""

import functools
import itertools
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from unittest import mock

import pytest

from parity_tests import beside, faults, ladder, report, shared
from tests.tiny import ROOT, start

CONFIGS = [report.default_config(dtype) for dtype in ladder.DTYPES]


@pytest.fixture
def _three_stages(monkeypatch):
    every = report.stages
    monkeypatch.setattr(report, "stages", lambda config: itertools.islice(every(config), 3))


@pytest.mark.usefixtures("_three_stages")
def test_two_processes_give_the_rows_of_one_in_order():
    one = itertools.chain.from_iterable(map(report.rows, CONFIGS))
    two = list(shared.rows(CONFIGS, "cpu", None))
    assert [(row.dtype, row.stage, row.what) for row in two] == [
        (row.dtype, row.stage, row.what) for row in one
    ]
    assert all(row.passed for row in two)


@pytest.mark.parametrize(
    ("name", "stage"),
    [
        ("fast variance (Flax's default)", "ln_f at mean 300"),
        ("biases not decayed", "optimizer"),  # a generator: it ends when nobody holds it
    ],
)
def test_the_process_beside_has_the_fault_too(name, stage):
    every = [each for each, _ in report.stages(CONFIGS[1])]
    fault = next(fault for fault in faults.FAULTS if fault.name == name)
    with beside.pool(shared._prepare, "cpu", fault.name) as process:
        rows = process.submit(shared._stage, (CONFIGS[1], every.index(stage))).result()
    assert rows[-1].stage == stage
    assert not all(row.passed for row in rows)


def test_the_process_beside_has_four_devices():
    every = [each for each, _ in report.stages(CONFIGS[0])]
    with beside.pool(shared._prepare, "cpu", None) as process:
        rows = process.submit(shared._stage, (CONFIGS[0], every.index("four devices"))).result()
    assert len(rows) > 30


@pytest.mark.usefixtures("_three_stages")
def test_where_no_process_starts_beside_this_one_measures_all(monkeypatch):
    ended = mock.Mock(side_effect=EOFError)  # the server was killed while it imported
    monkeypatch.setattr(beside.forkserver, "connect_to_new_process", ended)
    rows = list(shared.rows(CONFIGS[1:], "cpu", None))
    assert ended.called
    assert len({row.stage for row in rows}) == 3
    assert all(row.passed for row in rows)


@pytest.mark.usefixtures("_three_stages")
def test_what_a_killed_process_leaves_is_measured_here(monkeypatch):
    found = shared._found

    def killed_and_found(*args):
        for child in multiprocessing.active_children():
            child.kill()
        return found(*args)

    monkeypatch.setattr(shared, "_found", killed_and_found)
    rows = list(shared.rows(CONFIGS[1:], "cpu", None))
    assert list(dict.fromkeys(row.stage for row in rows)) == [
        "parameters",
        "operations",
        "ln_f at mean 300",
    ]


def children(pid):
    return Path(f"/proc/{pid}/task/{pid}/children").read_text().split()


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="finds the other process there")
@pytest.mark.parametrize(
    ("sent", "codes", "imports"),
    [
        (signal.SIGKILL, {-9}, False),
        (signal.SIGINT, {130}, False),
        (signal.SIGINT, {-2, 130}, True),
    ],
)
def test_killed_or_interrupted_it_leaves_no_process_behind(sent, codes, imports):
    process = start(module="parity_tests", start_new_session=True)
    # Multiprocessing's own and the server that imports; then the one beside is the server's child.
    while len(found := children(process.pid)) < 2 or not (imports or any(map(children, found))):
        assert process.poll() is None
        time.sleep(0.1)
    time.sleep(imports)
    kill = os.killpg if sent == signal.SIGINT else os.kill  # a terminal sends Ctrl-C to all
    kill(process.pid, sent)
    _, err = process.communicate(timeout=60)  # the others hold these pipes until they end
    assert process.returncode in codes
    assert err.count("KeyboardInterrupt") <= imports, err  # this process's own, not another's
    assert imports or sent == signal.SIGKILL or err.count("\n") == 1, err


def test_what_runs_before_the_imports_needs_neither_framework():
    script = "import sys, parity_tests.beside, parity_tests.options; print({*sys.modules})"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert "'parity_tests.options'" in done.stdout
    assert "'torch'" not in done.stdout
    assert "'jax'" not in done.stdout


def test_a_ctrl_c_while_the_other_process_starts_is_not_lost(monkeypatch):
    ctrl_c = functools.partial(os.kill, os.getpid(), signal.SIGINT)
    monkeypatch.setattr(beside.forkserver, "ensure_running", ctrl_c)
    with pytest.raises(KeyboardInterrupt):
        beside.start()
