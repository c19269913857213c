"""Collects every measurement of the session and prints them as one table at its end."""

import os
from pathlib import Path

import jax
import pytest
import torch

from jax_model5 import record

MEASUREMENTS = pytest.StashKey[list]()
CAUGHT = pytest.StashKey[list]()


def pytest_addoption(parser):
    parser.addoption("--parity-json", help="also write the measurements to this file")


def pytest_configure(config):
    # The faults of PyTorch's side compile nothing new, and a second session compiles nothing.
    cache = str(config.cache.mkdir("xla"))
    os.environ["JAX_COMPILATION_CACHE_DIR"] = cache  # of the processes beside
    jax.config.update("jax_compilation_cache_dir", cache)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
    config.stash[MEASUREMENTS] = []
    config.stash[CAUGHT] = []


@pytest.fixture(autouse=True)
def _few_programs():
    """Drops the compiled programs before they use up the process's memory maps, 65,530 on Linux."""
    yield
    maps = Path("/proc/self/maps")
    if not maps.exists() or maps.read_bytes().count(b"\n") > 30_000:
        jax.clear_caches()


@pytest.fixture
def measurements(request):
    return request.config.stash[MEASUREMENTS]


@pytest.fixture
def caught(request):
    return request.config.stash[CAUGHT]


def worst_of_each_rung(measurements) -> dict:
    worst = {}
    for m in measurements:
        key = m.rung, m.dtype
        if key not in worst or not m.error <= worst[key].error:
            worst[key] = m
    return dict(sorted(worst.items()))


def write_measurements(path: str, config) -> None:
    """What docs/parity.md shows."""
    rungs = [
        {
            "rung": rung,
            "dtype": dtype,
            "error": m.error,
            "tolerance": m.tolerance,
            "where": "" if m.error == 0 else f"{m.where} [{m.case}]",
        }
        for (rung, dtype), m in worst_of_each_rung(config.stash[MEASUREMENTS]).items()
    ]
    faults = [
        {"fault": f.name, "side": f.side, "operation": d.operation, "cause": d.cause}
        for f, _, d in config.stash[CAUGHT]
    ]
    found = record.circumstances("-m pytest", jax.devices()[0].device_kind)
    found["machine"]["torch"] = torch.__version__
    record.write_json(Path(path), found | {"rungs": rungs, "faults": faults})


def pytest_terminal_summary(terminalreporter, config):
    if path := config.getoption("--parity-json"):
        write_measurements(path, config)
    worst = worst_of_each_rung(config.stash[MEASUREMENTS])
    if worst:
        terminalreporter.section("parity: worst error of each rung")
        terminalreporter.write_line(
            f"{'rung':25}{'dtype':9}{'worst error':>12}{'tolerance':>12}  where"
        )
    for (rung, dtype), m in worst.items():
        where = "" if m.error == 0 else f"{m.where} [{m.case}]"
        terminalreporter.write_line(
            f"{rung:25}{dtype:9}{m.error:12.1e}{m.tolerance:12.1e}  {where}"
        )
    if config.stash[CAUGHT]:
        terminalreporter.section("parity: planted faults, each caught by its rung and located")
    for fault, failure, difference in config.stash[CAUGHT]:
        terminalreporter.write_line(f"{fault.name:34}{fault.side:9}{failure}")
        terminalreporter.write_line(f"{'':43}{difference}")
