"""The README says what is there."""

import re

from tests.tiny import ROOT

README = (ROOT / "README.md").read_text()


def test_the_map_names_every_file():
    mapped = set(re.findall(r"^\| `([\w/.]+)` \|", README, re.M))
    assert all((ROOT / path).exists() for path in mapped)
    files = {
        str(path.relative_to(ROOT))
        for folder in ("jax_model5", "torch_ref", "parity_tests")
        for path in (ROOT / folder).rglob("*.py")
        if path.name not in ("__init__.py", "conftest.py")
    }
    assert files <= mapped


def test_ci_runs_the_readmes_own_test_command():
    command = README.split("<!-- test command -->")[1].split("```")[1]
    assert command.startswith("sh\npython3 -m venv .venv && ")
    assert "<!-- test command -->" in (ROOT / ".ci/run").read_text()
