"""Every pair of docs/from_pytorch.md runs, and is equal, or differs where the page says so."""

import re

import flax.linen
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch

from tests.tiny import ROOT

PAGE = (ROOT / "docs/from_pytorch.md").read_text()
BLOCK = r"```python\n(.+?)```\n"
PAIRS = re.findall(rf"^##+ ([^\n]+)\n[^#]*?{BLOCK}\n{BLOCK}", PAGE, re.S | re.M)
DIFFER = PAGE.index("## What differs")
MODULES = {"flax": flax, "jax": jax, "jnp": jnp, "np": np, "optax": optax, "torch": torch}


@pytest.fixture
def _float64():
    torch.set_default_dtype(torch.float64)
    with jax.enable_x64(True):
        yield
    torch.set_default_dtype(torch.float32)


def run(code: str, name: str) -> np.ndarray:
    names = dict(MODULES)
    exec(code, names)
    value = names[name]
    return np.asarray(value.detach() if isinstance(value, torch.Tensor) else value, float)


def test_the_page_has_its_pairs():
    assert 2 * len(PAIRS) == PAGE.count("```python") >= 36


@pytest.mark.usefixtures("_float64")
@pytest.mark.parametrize(("title", "theirs", "ours"), PAIRS, ids=[pair[0] for pair in PAIRS])
def test_a_pair_is_as_the_page_says(title, theirs, ours):
    differs = PAGE.index(theirs) > DIFFER
    left, right = run(theirs, "theirs"), run(ours, "ours")
    assert left.shape == right.shape
    assert np.allclose(left, right, rtol=1e-12, atol=1e-12) is not differs, (left, right)
