"""The report on the clean tree, its page, its verdict on drift, and bad input."""

import dataclasses
import itertools
import os
import sys

import jax
import pytest
import torch

import torch_ref.model
import torch_ref.step
from jax_model5 import kernels
from parity_tests import __main__ as main
from parity_tests import drift, faults, ladder, report, taps
from tests.tiny import run


def named(name):
    return next(fault for fault in faults.FAULTS if fault.name == name)


@pytest.mark.parametrize("dtype", ladder.DTYPES)
def test_no_two_sizes_of_the_reports_model_are_equal(dtype):
    """Or an axis read for another shows in no number: positions were once as many as K."""
    config = report.default_config(dtype)
    c, D = config.model, config.model.d_model
    sizes = [config.batch_size, c.seq_len, config.last_k, c.vocab_size, c.n_heads]
    sizes += [D, D // c.n_heads, 3 * D, 4 * D]
    assert len(set(sizes)) == len(sizes)


@pytest.mark.parametrize("fields", [*ladder.SHAPES.values(), *ladder.VARIANTS.values()], ids=str)
def test_in_no_case_are_positions_as_many_as_another_size(fields):
    c = ladder.case("float64", **fields).model
    D = c.d_model
    assert c.seq_len not in (c.n_heads, D // c.n_heads, D, 3 * D, 4 * D, c.vocab_size)


@pytest.mark.slow
def test_no_operation_differs():
    code, out, err = run(module="parity_tests")
    assert (code, err) == (0, ""), out
    lines = out.splitlines()
    assert lines[-1] == "no operation differs beyond its tolerance"
    assert "four devices" in lines[-2]
    n_layers = report.default_config("float64").model.n_layers
    (forward,) = [
        line for line in lines if line.startswith("7 dropout, forward") and "float64" in line
    ]
    assert f" {len(taps.names(n_layers))} " in forward


@pytest.mark.slow
@pytest.mark.parametrize("fields", [{}, {"gelu": "tanh", "tied_head": False}], ids=str)
def test_no_operation_differs_without_dropout(fields):
    """One layer, the last token only: nothing that the default shapes need; each GELU and head.

    Of seed 0 some gradients of q's bias are 4e-10 of 1e-7, and Adam divides their rounding by them:
    an update's error is 2.5e-12 on an Intel. Of seed 5 it is 5e-14.
    """
    config = dataclasses.replace(ladder.case("float64", n_layers=1, **fields), seed=5)
    rows = list(report.rows(config))
    assert [str(row) for row in rows if not row.passed] == []


def test_a_missing_parameter_is_one_line(monkeypatch, capsys):
    code, out, _ = command_line(monkeypatch, capsys, "--inject", "missing bias", "--drift", "2")
    assert code == 1
    assert "first difference: parameters" in out.splitlines()[-1]


def test_each_fault_is_a_fault_of_its_own():
    assert len(faults.FAULTS) >= 25
    assert len({fault.name for fault in faults.FAULTS}) == len(faults.FAULTS)
    assert {fault.side for fault in faults.FAULTS} == {"JAX", "PyTorch"}


@pytest.mark.parametrize(
    ("fault", "cause"),
    [
        ("tanh for erf", "in PyTorch, GELU's tanh form instead of erf"),
        ("tanh for erf in JAX", "in JAX, GELU's tanh form instead of erf"),
        ("erf for tanh", "in PyTorch, GELU's erf form instead of tanh"),
        ("wrong epsilon (Flax's default)", "in JAX, epsilon is 1e-6 instead of 1e-5"),
        ("unscaled attention", "in PyTorch, scores are not scaled by 1/sqrt(K)"),
        ("off-by-one mask", "in PyTorch, the mask shows the next token"),
        ("logits in bfloat16", "PyTorch that departs from its definition: its values are those of"),
        ("survivors divided by the rate", "it is JAX that departs from its definition by a factor"),
    ],
)
def test_the_cause_is_named(fault, cause):
    fault = named(fault)
    with fault.plant():
        row = report.first_difference(fault.marked(report.default_config("float64")))
    assert cause in row.cause


def command_line(monkeypatch, capsys, *args):
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", jax.config.jax_compilation_cache_dir)
    monkeypatch.setattr(sys, "argv", ["parity_tests", *args])
    monkeypatch.setenv("XLA_FLAGS", os.environ.get("XLA_FLAGS", ""))  # it sets its own
    try:
        code = main.main()
    except SystemExit as stop:
        code = stop.code
    return code, *capsys.readouterr()


def test_a_fault_reads_as_one_line_and_a_page(monkeypatch, capsys, tmp_path):
    every = report.stages
    monkeypatch.setattr(report, "stages", lambda config: itertools.islice(every(config), 3))
    page = tmp_path / "report.html"
    args = ["--inject", "tanh for erf", "--drift", "3", "--html", str(page)]
    code, out, _ = command_line(monkeypatch, capsys, *args)
    assert code == 1
    assert "first difference: block 0: gelu" in out.splitlines()[-2]
    assert "what follows: " in out
    text = page.read_text()
    assert text.count("data:image/png;base64,") == 1
    assert "block 0: gelu" in text


def test_a_parameter_of_another_shape_is_a_verdict(monkeypatch):
    class Wide(torch_ref.model.Block):
        def __init__(self, config):
            super().__init__(config)
            self.out = torch.nn.Linear(config.d_model, 4 * config.d_model)

    monkeypatch.setattr(torch_ref.model, "Block", Wide)
    row = report.first_difference(report.default_config("float64"))
    assert row.operation == "parameters"
    assert "blocks.0.out.weight is [88, 22] and should be [22, 88]" in row.what


@pytest.mark.parametrize(
    ("part", "name"), [("sigmoid", "sigmoid GELU"), ("TANH for erf", "tanh for erf")]
)
def test_a_fault_is_found_by_part_and_case(part, name):
    assert main.fault_named(part).name == name


def stopped(*args, **fields):
    raise ZeroDivisionError("planted")


@pytest.mark.parametrize(
    ("target", "name", "place"),
    [
        (torch_ref.model.Block, "forward", "model.Model5.forward"),
        (kernels, "masked_attention", "kernels.attend"),
    ],
)
def test_a_model_that_stops_is_a_verdict_that_names_the_place(monkeypatch, target, name, place):
    monkeypatch.setattr(target, name, stopped)
    config = dataclasses.replace(report.default_config("float64"), workdir=place)
    row = report.first_difference(config)
    assert (row.operation, row.what) == (place, "stops")
    assert "stops there (" in row.cause
    assert row.cause.endswith("ZeroDivisionError: planted")


def test_what_no_comparison_can_read_is_of_its_stage(monkeypatch):
    monkeypatch.setattr(torch_ref.step, "eval_step", lambda *_: None)
    row = report.first_difference(ladder.case("float64", n_layers=1, dropout=0.1))
    assert (row.operation, row.what) == ("train and eval mode", "stops")
    assert row.cause.startswith("TypeError: ")


def test_drift_of_a_model_that_stops_is_no_traceback(monkeypatch, capsys):
    monkeypatch.setattr(torch_ref.model.Block, "forward", stopped)
    code, out, err = command_line(monkeypatch, capsys, "--drift", "2")
    assert (code, err) == (1, "")
    assert "stops there" in out.splitlines()[-1]


def test_a_module_under_another_name_is_a_verdict(monkeypatch):
    class Renamed(torch_ref.model.Model5):
        def __init__(self, config):
            super().__init__(config)
            self.final_norm = self.ln_f
            del self.ln_f

    monkeypatch.setattr(torch_ref.model, "Model5", Renamed)
    assert report.first_difference(report.default_config("float64")).operation == "parameters"


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--inject", "erf for tin"], "inject='erf for tin': no such fault; did you mean 'erf for"),
        (["--inject", "tanh for"], "which of 'tanh for erf', 'tanh for erf in JAX'?"),
        (["--drift", "0"], "drift=0: must be at least 1"),
        (["--drift", "x"], "invalid int value"),
        (["--html", "/none/report.html"], "html='/none/report.html'"),
    ],
)
def test_bad_input_is_one_line(monkeypatch, capsys, args, words):
    code, out, err = command_line(monkeypatch, capsys, *args)
    assert (code, out) == (2, "")
    assert words in err
    assert err.count("\n") == 1


def test_no_such_device_is_one_line():
    code, out, err = run("--device", "gpu", module="parity_tests")
    assert (code, out) == (2, "")
    assert err.startswith("error: device='gpu': ")
    assert err.count("\n") == 1


@pytest.mark.slow
@pytest.mark.parametrize("rate", [0.0, 0.1])
def test_drift_without_a_fault_is_rounding(rate):
    assert drift.measure(report.default_config("float64"), 10, rate).is_rounding


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["wrong epsilon (Flax's default)", "epsilon inside the root"])
def test_drift_with_a_fault_is_a_bug(fault):
    fault = named(fault)
    with fault.plant():
        config = fault.marked(report.default_config("float64"))
        assert not drift.measure(config, 10, 0.1).is_rounding


@pytest.mark.slow
def test_drift_of_one_side_in_float32_is_a_bug(monkeypatch):
    """What TF32 does: float64 agrees, and only one side's own rounding is too large."""
    right = torch.nn.Linear.forward

    def in_bfloat16(self, x):
        return right(self, x.bfloat16().to(x.dtype) if x.dtype == torch.float32 else x)

    monkeypatch.setattr(torch.nn.Linear, "forward", in_bfloat16)
    assert not drift.measure(report.default_config("float64"), 10, 0.1).is_rounding
