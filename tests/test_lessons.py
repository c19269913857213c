"""Each lesson runs at its size for tests, and its verdicts are those that stand in docs/lessons."""

import ast
import json
import subprocess
import sys

import pytest

from tests.tiny import ROOT

LESSONS = sorted((ROOT / "lessons").glob("[0-9]*.py"))
LONGEST = 150  # lines of code


def run(lesson, *options):
    command = [sys.executable, str(lesson), "--fast", *options]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


def committed(lesson) -> dict:
    return json.loads((ROOT / f"docs/lessons/{lesson.name[:2]}.json").read_text())


@pytest.mark.slow
@pytest.mark.parametrize("lesson", LESSONS, ids=lambda path: path.stem)
def test_a_lesson_runs_and_its_verdicts_are_recomputed(lesson, tmp_path):
    done = run(lesson, "--out", str(tmp_path))
    assert done.returncode == 0, done.stderr[-2000:]
    found, full = json.loads((tmp_path / "results.json").read_text()), committed(lesson)
    assert found["lesson"] == full["lesson"] == lesson.name[:2]
    assert found["fast"]
    assert not full["fast"]
    verdicts = {row["claim"]: row["holds"] for row in full["rows"]}
    judged = {row["claim"]: row["holds"] for row in found["rows"] if row["holds"] is not None}
    assert judged.items() <= verdicts.items()
    assert None not in verdicts.values()


@pytest.mark.slow
def test_bad_input_ends_a_lesson_with_one_line():
    done = run(ROOT / "lessons/16_fineweb.py", "--data.source", "nowhere.txt")
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith("error: data.source='nowhere.txt'")


def lines_of_code(source: str) -> int:
    """Those that are no prose: no comment, and no string that stands alone."""
    prose: set[int] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            prose |= set(range(node.lineno, node.end_lineno + 1))
    lines = enumerate(source.splitlines(), 1)
    return sum(1 for i, line in lines if i not in prose and line.strip() and line.strip()[0] != "#")


@pytest.mark.parametrize("lesson", LESSONS, ids=lambda path: path.stem)
def test_a_lesson_begins_with_its_question_and_is_short(lesson):
    source = lesson.read_text()
    assert lines_of_code(source) <= LONGEST
    title, *cells = ast.get_docstring(ast.parse(source)).split("\n\n")
    assert title.startswith("# ")
    beginnings = [cell.split(" ")[0] for cell in cells]
    assert beginnings[:3] == ["**Question.**", "**The", "**Expect**"]


def test_code_is_counted():
    code = '"""Prose."""\n\nx = 1\n\ndef f():\n    """More."""\n    # Why.\n    return 1\n'
    assert lines_of_code(code) == 3
