"""A run goes on with other processes, devices and shards: its losses stay within rounding."""

import os
from pathlib import Path

import numpy as np
import pytest

from jax_model5 import record
from tests.test_processes import ends, launch
from tests.tiny import flags, run, tiny, with_model

# (processes, devices of each, mesh.fsdp, the step where it ends)
STAGES = [(2, 1, 1, 8), (1, 8, 4, 16), (4, 1, 2, 24), (1, 2, 2, 32), (1, 1, 1, 40)]


def losses(config) -> np.ndarray:
    records = record.read(Path(config.workdir) / "metrics.jsonl")
    return np.array([each["loss"] for each in records if each["kind"] == "train"])


def devices(n: int) -> dict[str, str]:
    return {"XLA_FLAGS": f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count={n}"}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [("float32", 3e-7), ("float64", 1e-13)],  # measured: 8.8e-8, 2.2e-16
)
def test_other_processes_devices_and_shards_go_on(tmp_path, text_file, dtype, tolerance):
    config = tiny(tmp_path, text_file, batch_size=8, checkpoint_every=4, steps=40)
    config = with_model(config, dtype=dtype)
    code, _, err = run(*flags(config), "--workdir", str(tmp_path / "alone"))
    assert code == 0, err
    for n_processes, n_devices, fsdp, end in STAGES:
        keys = [f"--mesh.fsdp={fsdp}", f"--steps={end}"]
        more = [keys] * n_processes
        processes = launch(config, range(n_processes), n_processes, *more, env=devices(n_devices))
        results = ends(processes)
        assert [code for code, _ in results] == [0] * n_processes, results
    alone = losses(tiny(tmp_path, text_file, workdir=str(tmp_path / "alone")))
    found = losses(config)
    assert len(found) == len(alone) == 40
    assert np.abs(found / alone - 1).max() <= tolerance
