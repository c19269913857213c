"""Runs the ladder on both dtypes, and plants each fault to see its rung and the report catch it."""

import pytest

from parity_tests import faults, ladder, report

CASES = [case for dtype in ladder.DTYPES for case in ladder.cases(dtype)]


@pytest.mark.parametrize(
    ("rung", "case", "config"), CASES, ids=[f"{r}, {c}, {x.model.dtype}" for r, c, x in CASES]
)
def test_rung(rung, case, config, measurements):
    results = ladder.measure(rung, case, config)
    measurements.extend(results)
    failures = [str(result) for result in results if not result.passed]
    assert not failures, "\n".join(failures)


@pytest.mark.parametrize("fault", faults.FAULTS, ids=lambda fault: fault.name)
def test_fault_is_caught(fault, caught):
    """Rung 9: each fault fails the rung that should catch it, and the report names its place."""
    config = fault.marked(report.default_config("float64"))
    smallest = fault.marked(ladder.smallest(fault.rung))
    with fault.plant():
        results = ladder.measure(fault.rung, "smallest case", smallest)
        difference = report.first_difference(config)
    failures = [result for result in results if not result.passed]
    assert failures, f"rung {fault.rung} did not notice: {fault.name}"
    assert fault.where in failures[0].where, failures[0]
    assert difference is not None, f"the report did not notice: {fault.name}"
    assert difference.operation == fault.operation, difference
    caught.append((fault, failures[0], difference))
