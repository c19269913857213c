"""The programs that are compared: ours, the course's PyTorch, and the strongest PyTorch."""

import contextlib
import statistics
import subprocess
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


def of_python(python: str, config: TrainConfig, dtype: str, scratch: Path) -> Program:
    """Our program under another Python, with the JAX that it has."""
    path = _config_file(with_model(config, dtype=dtype), scratch)
    command = [python, "-m", "jax_model5.bench.measure", "--config", path]
    cache = {"JAX_COMPILATION_CACHE_DIR": str(scratch / f"xla_python_{dtype}")}
    return Program(f"{versions_of(python)}, {dtype}", command, cache)


def versions_of(python: str) -> str:
    """Of a Python and its JAX.

    Raises:
      UserError: it does not run, or lacks jax_model5.
    """
    words = "print('Python', sys.version.split()[0] + ', jax', jax.__version__)"
    try:
        command = [python, "-c", f"import jax, jax_model5, sys; {words}"]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        said = getattr(error, "stderr", "").strip().splitlines()[-1:] or [str(error)]
        fix = "name one in which jax_model5 is installed"
        raise UserError(f"python={python!r}: {said[0]}; {fix}") from None
    return done.stdout.strip()


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
    """GPT-2 of Hugging Face's package, which only writes texts."""
    return _torch("transformers", config, dtype, scratch)


def _torch(variant: str, config: TrainConfig, dtype: str, scratch: Path) -> Program:
    path = _config_file(with_model(config, dtype=dtype), scratch)
    command = [sys.executable, "-m", "torch_ref.bench", variant, "--config", path]
    label = f"tuned {variant}" if variant in ("eager", "compile") else variant
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
