"""The programs that are compared: ours, the course's PyTorch, and the strongest PyTorch."""

import contextlib
import statistics
import sys
from collections.abc import Iterator
from pathlib import Path

from jax_model5.bench.cases import with_model
from jax_model5.bench.rounds import Program, in_turn
from jax_model5.config import TrainConfig, to_yaml
from jax_model5.errors import UserError
from jax_model5.startup import note


def ours(config: TrainConfig, dtype: str, scratch: Path) -> Program:
    """Our program, its compile cache in `scratch`."""
    path = _config_file(with_model(config, dtype=dtype), scratch)
    command = [sys.executable, "-m", "jax_model5.bench.measure", "--config", path]
    return Program(
        f"jax {dtype}", command, {"JAX_COMPILATION_CACHE_DIR": str(scratch / f"xla_{dtype}")}
    )


def course(config: TrainConfig, dtype: str, scratch: Path) -> Program:
    """PyTorch as the course writes it."""
    return _torch("course", config, dtype, scratch)


def flax(config: TrainConfig, dtype: str, scratch: Path) -> Program:
    """Flax as its users write it."""
    path = _config_file(with_model(config, dtype=dtype), scratch)
    command = [sys.executable, "-m", "jax_model5.bench.flax_peer", "--config", path]
    cache = {"JAX_COMPILATION_CACHE_DIR": str(scratch / f"xla_flax_{dtype}")}
    return Program(f"flax {dtype}", command, cache)


def transformers(config: TrainConfig, dtype: str, scratch: Path) -> Program:
    """GPT-2 of Hugging Face's package in the place of our model."""
    return _torch("transformers", config, dtype, scratch)


def compiled_transformers(config: TrainConfig, dtype: str, scratch: Path) -> Program:
    """The same, writing texts by a compiled forward pass and a cache of one shape."""
    return _torch("compiled_transformers", config, dtype, scratch)


def ctranslate2(config: TrainConfig, dtype: str, scratch: Path) -> Program:
    """An engine that only generates."""
    path = _config_file(with_model(config, dtype=dtype), scratch)
    command = [sys.executable, "-m", "jax_model5.bench.ctranslate2_peer", "--config", path]
    return Program(f"ctranslate2 {dtype}", command, {})


def _torch(variant: str, config: TrainConfig, dtype: str, scratch: Path) -> Program:
    path = _config_file(with_model(config, dtype=dtype), scratch)
    command = [sys.executable, "-m", "torch_ref.bench", variant, "--config", path]
    label = f"tuned {variant}" if variant in ("eager", "compile") else variant.replace("_", " ")
    return Program(f"torch {label} {dtype}", command, {})


def tuned(config: TrainConfig, dtype: str, steps: int, scratch: Path) -> Program:
    """The faster one of eager and compiled PyTorch, by the median of `steps` steps."""
    eager = _torch("eager", config, dtype, scratch)
    note(f"{eager.name}: first step done")
    try:
        compiled = _torch("compile", config, dtype, scratch)
    except UserError as error:
        note(f"torch.compile is out: {error}")
        return eager
    both = eager, compiled
    contest = in_turn(both, 1, {p.name: {"step": steps} for p in both})
    times = {p: statistics.median(contest[p.name]["step"][0]) for p in both}
    slower, faster = sorted(times, key=times.__getitem__, reverse=True)
    slower.end()
    return faster


def _config_file(config: TrainConfig, scratch: Path) -> str:
    path = scratch / f"{config.model.dtype}.yaml"
    path.write_text(to_yaml(config), encoding="utf-8")
    return str(path)


@contextlib.contextmanager
def ended(programs: list[Program]) -> Iterator[None]:
    try:
        yield
    finally:
        for program in programs:
            program.end()
