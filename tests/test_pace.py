"""A process that is slower than the others at the same work is named, once it is twice in a row."""

import numpy as np
import pytest

from jax_model5 import pace
from tests.test_processes import ends, launch
from tests.tiny import tiny

ONE_IS_SLOW = """
import os, runpy, sys
from jax_model5 import pace
pace.work_seconds = lambda n: 0.06 * (3 if os.environ["JAX_PROCESS_ID"] == '1' else 1)
runpy.run_module("jax_model5.train", run_name="__main__")
"""


def test_of_each_the_others_median_counts():
    slow = pace.slowness(np.array([1.0, 1.1, 3.0, 0.9]))
    assert slow == pytest.approx([1 / 1.1, 1.1, 3.0, 0.9 / 1.1])
    assert pace.slowness(np.array([1.0, 2.5])) == pytest.approx([0.4, 2.5])


@pytest.mark.parametrize(
    ("seconds", "lines"),
    [
        ([[1, 1, 3], [1, 1, 3]], ["process 2 (host2) takes 3.0 times as long as the others"]),
        ([[1, 1, 3], [1, 1, 1], [1, 3, 1]], []),  # now and then is noise
        ([[1, 1, 1.5], [1, 1, 1.5]], []),
    ],
)
def test_a_line_names_who_is_slow_twice_in_a_row(monkeypatch, seconds, lines):
    said, rows = [], iter(seconds)
    checked = pace.Pace()
    monkeypatch.setattr(pace.processes, "are_several", lambda: True)
    monkeypatch.setattr(pace.Pace, "_agree_on_the_work", lambda self: None)
    monkeypatch.setattr(pace, "work_seconds", lambda n: 0.0)
    monkeypatch.setattr(
        pace.multihost_utils, "process_allgather", lambda _: np.array(next(rows), float)
    )
    monkeypatch.setattr(pace, "note", said.append)
    checked._hosts = ["host0", "host1", "host2"]
    for _ in seconds:
        checked.check()
    assert said == lines


@pytest.mark.slow
def test_one_of_two_processes_is_slow(tmp_path, text_file):
    config = tiny(tmp_path, text_file, steps=10, eval_every=5)
    results = ends(launch(config, range(2), 2, code=ONE_IS_SLOW))
    assert [code for code, _ in results] == [0, 0], results
    assert "takes 3.0 times as long as the others" in results[0][1]
    assert "process 1 (" in results[0][1]
