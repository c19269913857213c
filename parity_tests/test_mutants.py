"""The mutants: what each operator makes of a line, and how one is planted, caught, and located."""

import functools
import sys

import pytest

from parity_tests import explained, mutants, places, score
from tests.tiny import ROOT

FILE = "torch_ref/model.py"
every_mutant = functools.cache(lambda: list(score.all_mutants()))


@pytest.mark.parametrize(
    ("source", "operator", "made"),
    [
        ("x = a * b + c", "operator", ["x = (a * b - c)", "x = (a / b) + c"]),
        ("x = a @ b", "operator", ["x = (b @ a)"]),
        ("if a < 2: f()", "comparison", ["if (a <= 2): f()", "if (a >= 2): f()"]),
        ("x = 3", "constant", ["x = 4", "x = 2"]),
        ("x = f(-1)", "constant", ["x = f(-2)", "x = f(-0)"]),
        ("f(a, b, axis=1)", "argument dropped or swapped", ["(f(a, b))", "(f(b, a, axis=1))"]),
        ("x = jnp.exp(a)", "call left out", ["x = (a)"]),
        ("x = a.mean(0)", "call left out", ["x = (a)"]),
        ("x = a if b else c", "branch forced", ["x = a if True else c", "x = a if False else c"]),
        ("x = a[1:]", "slice by one", ["x = a[(1) + 1:]", "x = a[:]"]),
        ("x = a", "rounded to float32", ["x = low_precision(a)"]),
        ("x = a", "gradient stopped", ["x = no_gradient(a)"]),
    ],
)
def test_what_an_operator_makes(source, operator, made):
    found = [m.source for m in mutants.mutants("file", source) if m.operator == operator]
    assert set(made) <= set(found), found


def test_statements_are_deleted_and_exchanged():
    source = 'def f():\n    """Prose."""\n    x = 1\n    g(x)\n'
    found = {m.operator: m for m in mutants.mutants("file", source)}
    assert found["statements exchanged"].source == source.replace(
        "x = 1\n    g(x)", "g(x)\n    x = 1"
    )
    assert "pass" in found["statement deleted"].source
    assert found["statement deleted"].scope == "f"


def test_assignments_that_do_not_need_each_other_are_not_exchanged():
    source = "def f(self):\n    self.a, b = g()\n    self.c = b\n    d = e\n"
    (found,) = (m for m in mutants.mutants("f", source) if m.operator == "statements exchanged")
    assert found.source.splitlines()[1:3] == ["    self.c = b", "    self.a, b = g()"]


@pytest.mark.parametrize(
    ("first", "is_exchanged"), [("a = b", False), ("a = x", True), ("a = b()", True)]
)
def test_an_assignment_and_a_call_are_exchanged_where_they_may_meet(first, is_exchanged):
    found = mutants.mutants("f", f"def f(x, b):\n    {first}\n    x.step()\n")
    assert any(m.operator == "statements exchanged" for m in found) == is_exchanged


def test_equal_arguments_are_not_swapped():
    found = [m.source for m in mutants.mutants("f", "f(a.b, a.b)\n")]
    assert "f(a.b)" in str(found)
    assert not any(source.count("a.b") == 2 for source in found)


def test_arguments_of_a_symmetric_function_are_not_swapped():
    made = [m.source for m in mutants.mutants("f", "x.swapaxes(1, 2)\nx.transpose(0, 2, 1)\n")]
    assert not any("swapaxes(2, 1)" in source for source in made)
    assert any("transpose(2, 0, 1)" in source for source in made)


def test_every_mutant_is_python_and_has_a_place():
    for mutant in every_mutant():
        compile(mutant.source, mutant.file, "exec")
        if mutant.scope:
            stem = mutant.file.partition("/")[2].removesuffix(".py")
            assert places.operations_of(f"{stem}.{mutant.scope}", mutant.code), mutant


@pytest.mark.parametrize("pattern", [*explained.NOT_RUN, *explained.EXPLAINED], ids=str)
def test_each_explanation_explains_something(pattern):
    assert any(score.explanation(mutant, [pattern]) for mutant in every_mutant())


@pytest.mark.parametrize(
    ("scope", "what"),
    [
        ("Model5.features", "swapped: *split_rngs = "),  # another argument than unroll
        ("Block.__call__", "operator: + -> "),  # inside sharding.row_major(...)
        ("Block.__call__", "statement deleted: return sharding . row_major"),
    ],
)
def test_an_explanation_excuses_nothing_beside_it(scope, what):
    pattern = (f"jax_model5/model.py:{scope}", what, "one of them")
    found = [mutant for mutant in every_mutant() if score.explanation(mutant, [pattern])]
    assert found
    every = [*explained.NOT_RUN, *explained.EXPLAINED]
    assert [m.diff for m in found if score.explanation(m, every)] == []


CHANGES = [  # file, a line, what becomes of it
    (FILE, "rate = self.rate if self.training else 0.0", "rate = self.rate if False else 0.0"),
    ("torch_ref/step.py", "optimizer.zero_grad()", "pass"),
    ("jax_model5/losses.py", "rest = N % C", "rest = (N // C)"),
]


def chosen(file, before, after):
    every = (m for m in every_mutant() if m.file == file and m.code.strip().startswith(before))
    return next(m for m in every if m.diff.partition("\n+")[2].strip().startswith(after))


@pytest.mark.slow
def test_mutants_are_caught_and_located_and_leave_nothing_behind():
    """In one process, one after the other; the last has no fault in it."""
    harmless = mutants.Mutant(FILE, "", 1, "none", (ROOT / FILE).read_text(), "-")
    verdicts = list(score.verdicts([*(chosen(*change) for change in CHANGES), harmless], 1))
    assert [verdict.caught for verdict in verdicts] == [True] * len(CHANGES) + [False]
    assert [v.words for v in verdicts[:-1] if not v.located] == []


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--sample", "0"], "sample=0: must be at least 1"),
        (["--workers", "0"], "workers=0: must be at least 1"),
        (["--sample", "1", "--json", "/none/found.json"], "json='/none/found.json': "),
        (["--only", "flash.py"], "only='flash.py': no mutant of such a place"),
    ],
)
def test_bad_input_is_one_line(monkeypatch, capsys, args, words):
    monkeypatch.setattr(sys, "argv", ["score", *args])
    with pytest.raises(SystemExit) as stop:
        score.main()
    assert stop.value.code == 2
    err = capsys.readouterr().err
    assert words in err
    assert err.count("\n") == 1


def test_what_is_no_place_of_a_fault_is_not_near_it():
    assert places.is_near("block 1: gelu", ["fc"])
    assert places.is_near("model.Block.forward", ["MLP residual"])
    assert not places.is_near("block 1: gelu", ["ln_1"])
    assert not places.is_near("optimizer", ["logits"])
