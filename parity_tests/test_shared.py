"""The report of two processes: the rows of one process, in order, and no process left behind."""

import itertools
import signal
import time
from pathlib import Path

import jax
import pytest

from parity_tests import faults, ladder, report, shared
from tests.tiny import start

CONFIGS = [report.default_config(dtype) for dtype in ladder.DTYPES]


@pytest.fixture
def _three_stages(monkeypatch):
    every = report.stages
    monkeypatch.setattr(report, "stages", lambda config: itertools.islice(every(config), 3))
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", jax.config.jax_compilation_cache_dir)


@pytest.mark.usefixtures("_three_stages")
def test_two_processes_give_the_rows_of_one_in_order():
    one = itertools.chain.from_iterable(map(report.rows, CONFIGS))
    two = list(shared.rows(CONFIGS, "cpu", None))
    assert [(row.dtype, row.stage, row.what) for row in two] == [
        (row.dtype, row.stage, row.what) for row in one
    ]
    assert all(row.passed for row in two)


@pytest.mark.usefixtures("_three_stages")
def test_the_process_beside_has_the_fault_too():
    """Here it is not planted: what differs is the other one's."""
    fault = next(fault for fault in faults.FAULTS if fault.name.startswith("fast variance"))
    rows = list(shared.rows(CONFIGS, "cpu", fault))
    assert rows[-1].stage == "ln_f at mean 300"
    assert not rows[-1].passed


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="finds the other process there")
def test_killed_it_leaves_no_process_behind():
    process = start(module="parity_tests")
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    while len(children.read_text().split()) < 2:  # multiprocessing's own, and the one beside
        assert process.poll() is None
        time.sleep(0.1)
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=60)  # the others hold these pipes until they end
