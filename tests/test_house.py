"""The layer law: a file imports only from files above it; and what may import what."""

import ast
import subprocess
import sys

import pytest

import jax_model5
from tests.tiny import ROOT

SPINE, AROUND = (
    block.split() for block in jax_model5.__doc__.split("\n\n") if block.startswith("    ")
)
FRAMEWORK_FREE = SPINE[: SPINE.index("batches") + 1]
PACKAGES = ("jax_model5", "torch_ref", "portproof")
LONGEST_FILE, LONGEST_FUNCTION = 420, 45  # lines


def imported(source: str) -> set[str]:
    """Every module name in the import statements of a file, also inside functions."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "a relative import hides from the law"
            names.add(node.module)
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def breaches(package: str, module: str, source: str, file: str = "") -> list[str]:
    """What a file of the house imports and may not; `file` is its name in a package's module."""
    names = imported(source)
    own = {name.split(".")[1] for name in names if name.startswith("jax_model5.")}
    own &= {*SPINE, *AROUND}
    wrong = []
    if package == "jax_model5":
        above = SPINE[: SPINE.index(module)] if module in SPINE else SPINE
        wrong += sorted(own - set(above) - {module})
        wrong += sorted(name for name in names if name.split(".")[0] in ("torch", "torch_ref"))
        if module not in ("model", "kernels") and file != "flax_peer":  # whose subject Flax is
            wrong += sorted(name for name in names if name.startswith("flax.linen"))
    if package == "torch_ref":
        wrong += sorted(own - set(FRAMEWORK_FREE))
        wrong += sorted(name for name in names if name.split(".")[0] in ("jax", "flax", "optax"))
    if package == "portproof":
        project = ("jax_model5", "torch_ref", "parity_tests", "tests", "lessons", "examples")
        wrong += sorted(name for name in names if name.split(".")[0] in project)
    return wrong


def files():
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            yield package, path.relative_to(ROOT / package).parts[0].removesuffix(".py"), path


@pytest.mark.parametrize(("package", "module", "path"), list(files()), ids=lambda x: str(x)[-30:])
def test_a_file_imports_only_from_above(package, module, path):
    assert breaches(package, module, path.read_text(), path.stem) == []
    assert package == "portproof" or module in ("__init__", *SPINE, *AROUND, "loss")


@pytest.mark.parametrize(
    ("package", "module", "source", "wrong"),
    [
        ("jax_model5", "corpus", "from jax_model5 import model", ["model"]),
        ("jax_model5", "record", "from jax_model5.generate import x", ["generate"]),
        ("jax_model5", "step", "def f():\n    from jax_model5.train import main", ["train"]),
        ("jax_model5", "bench", "import jax_model5.compare", ["compare"]),
        ("jax_model5", "step", "import torch.nn", ["torch.nn"]),
        ("jax_model5", "train", "import flax.linen as nn", ["flax.linen"]),
        ("jax_model5", "bench", "import flax.linen as nn", ["flax.linen"]),
        ("torch_ref", "loss", "from jax_model5 import losses", ["losses"]),
        ("torch_ref", "step", "import optax", ["optax"]),
        (
            "portproof",
            "leaves",
            "from jax_model5.trees import split",
            ["jax_model5.trees", "jax_model5.trees.split"],
        ),
    ],
)
def test_the_law_sees_a_breach(package, module, source, wrong):
    assert breaches(package, module, source) == wrong


def test_what_the_reference_shares_loads_no_framework(text_file, tmp_path):
    """Also not while they read columns through `datasets`, which imports torch when it can."""
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"text": "some words"}\n' * 3000)
    script = f"""
import sys
from jax_model5 import batches, config, corpus
path = {str(rows)!r}
run = config.parse(["--data.source", path, "--data.cache_dir", {str(tmp_path)!r}], "test")
batches.train_batch(corpus.load_corpus(run), run, 0)
assert not {{"jax", "flax", "torch"}} & set(sys.modules), sorted(sys.modules)
"""
    subprocess.run([sys.executable, "-c", script], check=True, cwd=ROOT)


def test_every_file_says_in_one_sentence_what_it_is():
    for folder in (*PACKAGES, "parity_tests", "tests", "examples"):
        for path in (ROOT / folder).glob("*.py"):
            doc = ast.get_docstring(ast.parse(path.read_text()))
            assert doc, path
            assert doc.split("\n\n")[0].endswith("."), path


def too_long(source: str, limit: int) -> list[str]:
    """The functions of more than `limit` lines."""
    functions = [n for n in ast.walk(ast.parse(source)) if isinstance(n, ast.FunctionDef)]
    return [f.name for f in functions if f.end_lineno - f.lineno + 1 > limit]


def test_every_file_and_function_fits():
    scripts = [("docs", "", path) for path in (ROOT / "docs").rglob("*.py")]
    for package, _, path in [*files(), *scripts]:
        source = path.read_text()
        assert too_long(source, LONGEST_FUNCTION) == [], path
        has_no_limit = package in ("torch_ref", "docs")
        assert has_no_limit or len(source.splitlines()) <= LONGEST_FILE, path


def test_a_long_function_is_seen():
    source = "def f():\n" + "    x = 1\n" * 3
    assert too_long(source, 3) == ["f"]
    assert too_long(source, 4) == []


def test_portproof_and_its_examples_stay_small():
    def lines(path):
        return len(path.read_text().splitlines())

    assert sum(lines(path) for path in (ROOT / "portproof").glob("*.py")) <= 1200
    assert max(lines(path) for path in (ROOT / "examples").glob("*.py")) <= 80
