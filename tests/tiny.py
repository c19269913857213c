"""A run that takes seconds: its text, its config, and its command line."""

import dataclasses
import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from jax_model5.config import DataConfig, ModelConfig, OptimizerConfig, TrainConfig, flatten

ROOT = Path(__file__).parents[1]


def slow(*values):
    """A case of a parametrized test that runs with the slow ones."""
    return pytest.param(*values, marks=pytest.mark.slow)


TEXT = "".join(
    f"{n} times {n} is {n * n}, and that was line {n} of the text.\n" for n in range(400)
)
MODEL = ModelConfig(vocab_size=257, seq_len=16, d_model=16, n_heads=2, n_layers=3)


def tiny(folder: Path, source: Path, **fields) -> TrainConfig:
    data = DataConfig(
        source=str(source), tokenizer="bytes", cache_dir=str(folder / "cache"), test_fraction=0.2
    )
    defaults = {
        "model": MODEL,
        "data": data,
        "optimizer": OptimizerConfig(learning_rate=1e-3),
        "steps": 12,
        "batch_size": 4,
        "eval_every": 5,
        "eval_batches": 2,
        "checkpoint_every": 4,
        "workdir": str(folder / "run"),
    }
    return TrainConfig(**defaults | fields)


def with_model(config: TrainConfig, **fields) -> TrainConfig:
    return dataclasses.replace(config, model=dataclasses.replace(config.model, **fields))


def with_optimizer(config: TrainConfig, **fields) -> TrainConfig:
    return dataclasses.replace(config, optimizer=dataclasses.replace(config.optimizer, **fields))


def flags(config: TrainConfig) -> list[str]:
    """The config as a command line."""
    texts = {
        key: " ".join(value) if isinstance(value, tuple) else value
        for key, value in flatten(config).items()
    }
    return [f"--{key}={text}" for key, text in texts.items()]


HEED_SIGNALS = [
    *(sys.executable, "-c"),
    "import os, signal, sys; signal.signal(signal.SIGHUP, signal.SIG_DFL); "
    "signal.signal(signal.SIGINT, signal.SIG_DFL); os.execv(sys.argv[1], sys.argv[1:])",
]
"""Before a command: it heeds what the tests themselves may ignore, under nohup or behind &."""


def start(
    *args: str, module: str = "jax_model5.train", prefix: Sequence[str] = (), **popen
) -> subprocess.Popen:
    """The real command line, in a process of its own."""
    return subprocess.Popen(
        [*prefix, sys.executable, "-m", module, *map(str, args)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **popen,
    )


def run(*args: str, module: str = "jax_model5.train", **popen) -> tuple[int, str, str]:
    """Exit code, standard output and standard error of the real command line."""
    process = start(*args, module=module, **popen)
    out, err = process.communicate(timeout=300)
    return process.returncode, out, err


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def eight_devices() -> dict[str, str]:
    flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=8"
    return os.environ | {"XLA_FLAGS": flags}
