"""Configs, seeds and one budget -> the runs to make, all tested on the same windows."""

import dataclasses
import hashlib
import json
import math
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import jax

from jax_model5 import disk, record
from jax_model5.config import TrainConfig, flatten, parse, to_yaml
from jax_model5.corpus import load_corpus
from jax_model5.errors import UserError
from jax_model5.flops import step_flops
from jax_model5.losses import n_last
from jax_model5.programs import steps
from jax_model5.startup import set_up_jax

BUDGETS = ("steps", "targets", "tokens", "flops", "seconds")
EVALUATIONS = 20
"""Test losses in a run, after that of step 0."""
_EQUAL_FIELDS = ("model.vocab_size", "model.seq_len", "data.tokenizer")
_TIMED_STEPS = 5
_KEEP_ALL = 10**6  # checkpoints: the middle one is measured, also after a stop saved another


@dataclasses.dataclass(frozen=True)
class Run:
    """One config with one seed, trained to the budget in a folder of its own."""

    name: str
    config: TrainConfig

    @property
    def label(self) -> str:
        return f"{self.name}-seed{self.config.seed}-{self.config.steps}"


def read_configs(paths: Sequence[str], overrides: Sequence[str]) -> dict[str, TrainConfig]:
    """The configs by the stem of their file.

    Raises:
      UserError: a file that cannot be read, two of one name, configs that cannot be compared.
    """
    configs: dict[str, TrainConfig] = {}
    for path in paths:
        name = Path(path).stem
        if name in configs:
            raise UserError(f"{path!r}: two configs are called {name}; rename one")
        configs[name] = parse(["--config", path, *overrides], "jax_model5.compare")
    _require_comparable(configs)
    return configs


def _require_comparable(configs: dict[str, TrainConfig]) -> None:
    first, *others = configs
    for field in _EQUAL_FIELDS:
        values = {name: flatten(config)[field] for name, config in configs.items()}
        for name in others:
            if values[name] != values[first]:
                raise UserError(
                    f"{field}={values[name]!r} in {name} and {values[first]!r} in {first}: their "
                    "losses cannot be compared; make them equal"
                )


def parse_budget(text: str | None) -> tuple[str, float] | None:
    """ "targets=1e6" -> ("targets", 1e6); None: every config's own steps."""
    if text is None:
        return None
    kind, _, amount = text.partition("=")
    try:
        value = float(amount)
    except ValueError:
        value = math.nan
    if kind not in BUDGETS or not 0 < value < math.inf:
        raise UserError(
            f"budget={text!r}: write KIND=N, N above 0 and KIND of {', '.join(BUDGETS)}"
        )
    return kind, value


def cost_of_step(config: TrainConfig) -> dict[str, float]:
    """What one step costs, in every kind of budget but seconds."""
    tokens = config.batch_size * config.model.seq_len
    targets = config.batch_size * n_last(config)
    flops = sum(step_flops(config).values())
    return {"steps": 1, "targets": targets, "tokens": tokens, "flops": flops}


def make_runs(
    configs: dict[str, TrainConfig],
    n_seeds: int,
    budget: tuple[str, float] | None,
    out: Path,
) -> list[Run]:
    """Every config with every seed; the seeds are 0, 1, ...

    Raises:
      UserError: the budget buys no step of a config, or its batches do not make the test windows.
    """
    n_windows = max(config.eval_batches * config.batch_size for config in configs.values())
    runs = []
    for seed in range(n_seeds):
        for name, config in configs.items():
            if n_windows % config.batch_size:
                raise UserError(
                    f"batch_size={config.batch_size} in {name}: does not divide the {n_windows} "
                    "test windows that all share; change batch_size or eval_batches"
                )
            run = dataclasses.replace(config, seed=seed, steps=_steps(name, config, budget, out))
            runs.append(_test_and_save(Run(name, run), n_windows, out))
    return runs


def _test_and_save(run: Run, n_windows: int, out: Path) -> Run:
    """The run that is tested on all windows and saved in its middle and at its end."""
    config = dataclasses.replace(
        run.config,
        eval_every=math.ceil(run.config.steps / EVALUATIONS),
        eval_batches=n_windows // run.config.batch_size,
        checkpoint_every=math.ceil(run.config.steps / 2),
        keep=_KEEP_ALL,
        workdir=str(out / "runs" / run.label),
    )
    return Run(run.name, config)


def _steps(name: str, config: TrainConfig, budget: tuple[str, float] | None, out: Path) -> int:
    if budget is None:
        return config.steps
    kind, amount = budget
    costs = cost_of_step(config)
    each = costs[kind] if kind in costs else _seconds_per_step(name, config, out)
    if amount < each:
        raise UserError(
            f"budget={kind}={amount:g}: buys no step of {name}, which costs {each:.4g}; raise it"
        )
    return int(amount / each * (1 + 1e-12))  # 3 / 0.1 is 30 steps


def _seconds_per_step(name: str, config: TrainConfig, out: Path) -> float:
    """Measured once and remembered, so that a second start makes the same runs."""
    path = record.out_folder(str(out)) / "seconds_per_step.json"
    known = json.loads(path.read_text()) if path.exists() else {}
    key = f"{name} {hashlib.sha256(to_yaml(config).encode()).hexdigest()[:16]}"
    if key not in known:
        known[key] = time_steps(config)
        disk.replace_text(path, json.dumps(known, indent=1) + "\n")
    return known[key]


def time_steps(config: TrainConfig, clock: Callable[[], float] = time.perf_counter) -> float:
    """Median seconds of a few steps after the first."""
    set_up_jax(config)
    stepping = steps(
        dataclasses.replace(config, steps=max(config.steps, 1 + _TIMED_STEPS)), load_corpus(config)
    )
    jax.block_until_ready(next(stepping))  # compiles
    seconds = []
    for _ in range(_TIMED_STEPS):
        start = clock()
        jax.block_until_ready(next(stepping))
        seconds.append(clock() - start)
    return statistics.median(seconds)
