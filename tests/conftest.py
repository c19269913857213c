"""What the tests share: one compile cache, one small text, one tiny run."""

import dataclasses
import os
import shutil

import jax
import pytest

from jax_model5 import train
from parity_tests import COMPILE_FAST
from tests.tiny import TEXT, tiny

# For the processes that the tests start as well. The parity ladder alone (pytest parity_tests)
# compiles as training does.
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {COMPILE_FAST}"


def pytest_configure(config):
    # Also for the processes that the tests start: each program is compiled once.
    cache = str(config.cache.mkdir("xla"))
    os.environ["JAX_COMPILATION_CACHE_DIR"] = cache
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.1"
    jax.config.update("jax_compilation_cache_dir", cache)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)


@pytest.fixture(scope="module", autouse=True)
def _programs_of_one_module():
    """Drops a module's compiled programs: thousands of them use up the process's memory maps."""
    yield
    jax.clear_caches()


@pytest.fixture(scope="session")
def text_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(TEXT, encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def finished(tmp_path_factory, text_file):
    """A finished run of 12 steps with checkpoints 8 and 12, never changed."""
    config = tiny(tmp_path_factory.mktemp("finished"), text_file)
    assert train.train(config) == "finished"
    return config


@pytest.fixture
def config(finished, tmp_path):
    """A copy of the finished run, to damage."""
    shutil.copytree(finished.workdir, tmp_path / "run")
    return dataclasses.replace(finished, workdir=str(tmp_path / "run"))
