"""Runs the ladder on both dtypes, and plants each fault to see the ladder catch it."""

import pytest

from parity_tests import faults, ladder

CASES = [case for dtype in ladder.DTYPES for case in ladder.cases(dtype)]


@pytest.mark.parametrize(
    ("rung", "case", "config"), CASES, ids=[f"{r}, {c}, {x.model.dtype}" for r, c, x in CASES]
)
def test_rung(rung, case, config, measurements):
    results = ladder.measure(rung, case, config)
    measurements.extend(results)
    failures = [str(result) for result in results if not result.passed]
    assert not failures, "\n".join(failures)


def test_the_ladder_holds_without_a_fault():
    assert ladder.climb() is None


@pytest.mark.parametrize("fault", faults.FAULTS, ids=lambda fault: fault.name)
def test_fault_is_caught(fault, caught):
    """Rung 9: each fault fails the rung that should catch it, and the message names the place."""
    with fault.plant():
        failure = ladder.climb()
    assert failure is not None, f"nothing noticed: {fault.name}"
    assert failure.rung == fault.rung, failure
    assert fault.where in failure.where, failure
    caught.append((fault, failure))
