"""Runs the ladder on both dtypes, and plants each fault to see its rung and the report catch it."""

import pytest

from parity_tests import faults, ladder, report

QUICK = "3 layers, tanh, untied"  # of the variants the one that is run with every test


def cases():
    for dtype in ladder.DTYPES:
        for rung, case, config in ladder.cases(dtype):
            is_slow = case.endswith("tied") and not case.endswith(QUICK)
            marks = [pytest.mark.slow] if is_slow else []
            yield pytest.param(rung, case, config, id=f"{rung}, {case}, {dtype}", marks=marks)


@pytest.mark.parametrize(("rung", "case", "config"), list(cases()))
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
