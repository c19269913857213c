"""Runs the ladder on both dtypes, and plants each fault to see its rung and the report catch it."""

import pytest

from parity_tests import faults, ladder, report

# With every test run float64's outer shapes, one variant, and what has no shape of its own.
SLOW = [name for name in (*ladder.SHAPES, *ladder.VARIANTS) if name != "3 layers, tanh, untied"]
QUICK = SLOW[0], list(ladder.SHAPES)[-1]


def cases():
    for dtype in ladder.DTYPES:
        for rung, case, config in ladder.cases(dtype):
            is_slow = case.startswith(tuple(SLOW)) and not (
                dtype == "float64" and case.startswith(QUICK)
            )
            marks = [pytest.mark.slow] if is_slow else []
            yield pytest.param(rung, case, config, id=f"{rung}, {case}, {dtype}", marks=marks)


@pytest.mark.parametrize(("rung", "case", "config"), list(cases()))
def test_rung(rung, case, config, measurements):
    results = ladder.measure(rung, case, config)
    measurements.extend(results)
    failures = [str(result) for result in results if not result.passed]
    assert not failures, "\n".join(failures)


ALWAYS = {  # one of each kind; the others are slow
    "missing bias",
    "tanh for erf in JAX",
    "mask of a suffix starts at 0",
    "no gradient through v",
    "label smoothing",
    "survivors not rescaled",
    "no-op optimizer",
    "gradients never zeroed",
    "dropout left on in eval",
}


def planted():
    assert {fault.name for fault in faults.FAULTS} >= ALWAYS
    for fault in faults.FAULTS:
        marks = [] if fault.name in ALWAYS else [pytest.mark.slow]
        yield pytest.param(fault, id=fault.name, marks=marks)


@pytest.mark.parametrize("fault", list(planted()))
def test_fault_is_caught(fault, caught):
    """Each fault fails the rung that should catch it, and the report names its place."""
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
