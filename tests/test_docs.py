"""The pages say what is there: rendered tables, the README's size and commands, a script."""

import importlib.util
import json
import os
import re
import subprocess
import sys

import pytest

from tests.tiny import ROOT

README = (ROOT / "README.md").read_text()


@pytest.fixture(scope="module")
def render():
    spec = importlib.util.spec_from_file_location("render", ROOT / "docs/render.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_rendered_table_is_its_source(render):
    regions = 0
    for page in render.pages():
        text = page.read_text()
        regions += len(render.REGION.findall(text))
        assert render.rendered(text) == text, f"{page}: run python docs/render.py"
    assert regions >= 10


def test_a_table_that_differs_is_seen(render, monkeypatch):
    """A changed cell of the page, and a changed figure of the source."""
    page = (ROOT / "docs/parity.md").read_text()
    tolerance = re.search(r"\d\.\de-\d\d", page.split("rendered: rungs")[1])[0]
    assert render.rendered(page.replace(tolerance, "9.9e+09")) == page
    read, found = render.read, render.read("parity.json")
    found["rungs"][0]["tolerance"] = 7.0
    monkeypatch.setattr(render, "read", lambda path: found if path == "parity.json" else read(path))
    assert render.rendered(page) != page


def test_the_map_names_every_file(render):
    text = (ROOT / "docs/map.md").read_text()
    mapped = set(re.findall(r"^\| `([\w/.]+)` \|", text, re.M))
    files = {
        str(path.relative_to(ROOT))
        for folder in (
            "jax_model5",
            "torch_ref",
            "portproof",
            "examples",
            "lessons",
            "parity_tests",
            "tests",
            "docs",
        )
        for path in (ROOT / folder).rglob("*.py")
        if path.name not in ("__init__.py", "conftest.py")
    }
    assert files == mapped


def test_the_readme_is_for_five_minutes():
    assert len(README.split()) <= 1200
    prose = re.sub(r"```.*?```", "", README, flags=re.S)
    assert not re.search(r"\b(?=[a-f]*\d)(?=\d*[a-f])[0-9a-f]{7,}\b", prose), "a commit hash"


def test_no_link_is_broken(render):
    for page in render.pages():
        text = re.sub(r"```.*?```", "", page.read_text(), flags=re.S)
        for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", text):
            assert target.startswith("http") or (page.parent / target).exists(), (page, target)


def test_ci_runs_the_readmes_own_test_command():
    command = README.split("<!-- test command -->")[1].split("```")[1]
    assert command.startswith("sh\npython3 -m venv .venv && ")
    assert "<!-- test command -->" in (ROOT / ".ci/run").read_text()


@pytest.mark.slow
def test_the_script_of_the_docs_runs(tmp_path):
    """At most 15 lines: a loss of one's own, and something of the state every 10 steps."""
    text = (ROOT / "docs/from_python.md").read_text()
    script = text.split("<!-- script -->")[1].split("```python\n")[1].split("```")[0]
    assert len([line for line in script.splitlines() if line]) <= 15
    environment = os.environ | {"MPLBACKEND": "Agg", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", script]
    subprocess.run(command, check=True, cwd=tmp_path, env=environment)
    assert [path.name for path in tmp_path.iterdir()] == ["spread.png"]


@pytest.mark.parametrize("path", sorted((ROOT / "docs").rglob("*.json")), ids=lambda p: p.name)
def test_every_figure_knows_its_command_machine_and_commit(path):
    result = json.loads(path.read_text())
    assert {"command", "commit", "machine"} <= result.keys()
