"""Figures of many runs -> means and spreads, how far losses jump, what it takes to reach one."""

import itertools
import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jax_model5.config import TEST_METRICS
from jax_model5.trees import leaves_of


def over_seeds(values: Sequence[float]) -> dict[str, float]:
    """Mean and sample standard deviation; nan where a seed has no value.

    >>> over_seeds([1.0, 2.0, 3.0])
    {'mean': 2.0, 'std': 1.0}
    """
    spread = float(np.std(values, ddof=1)) if len(values) > 1 else math.nan
    return {"mean": statistics.fmean(values), "std": spread}


def steps_to_reach(level: float, steps: Sequence[int], losses: Sequence[float]) -> float:
    """The step at which the loss first is at `level`, between two evaluations by a straight line.

    nan where it never is, and the first evaluation's step where it is from there on.

    >>> steps_to_reach(5.0, [10, 20, 30], [7.0, 6.0, 4.0])
    25.0
    """
    for index, loss in enumerate(losses):
        if loss <= level:
            if index == 0:
                return float(steps[0])
            before, first = losses[index - 1], steps[index - 1]
            return first + (steps[index] - first) * (before - level) / (before - loss)
    return math.nan


def largest_rise(losses: Sequence[float]) -> float:
    """How far the loss climbed from one evaluation to the next, at most; 0 where it never did.

    >>> largest_rise([7.0, 6.0, 6.5, 5.0, 5.25])
    0.5
    """
    return max([0.0, *(after - before for before, after in itertools.pairwise(losses))])


def levels(runs: Mapping[str, Sequence[Mapping[str, Any]]]) -> dict[str, float]:
    """For each metric the highest loss that a run ends with: every run gets there."""
    return {
        metric: max(run[metric][-1] for seeds in runs.values() for run in seeds)
        for metric in TEST_METRICS
    }


def summarize(
    runs: Mapping[str, Sequence[Mapping[str, Any]]], costs: Mapping[str, Mapping[str, float]]
) -> dict[str, dict[str, Any]]:
    """{config: {figure: {"mean", "std"}}} from {config: [each seed's figures]}."""
    goals = levels(runs)
    summary = {}
    for name, seeds in runs.items():
        figures = [_figures(run, goals, costs[name]) for run in seeds]
        summary[name] = {key: over_seeds([f[key] for f in figures]) for key in figures[0]}
        for moment, n in noise_places(summary[name]):
            # A mean of ratios would follow the seed whose |G|² happens to be near 0.
            trace, squared_norm = (
                np.float64(summary[name][f"noise/{moment}/{n}/{key}"]["mean"])
                for key in ("trace", "squared_norm")
            )
            with np.errstate(divide="ignore", invalid="ignore"):
                scale = {"mean": float(trace / squared_norm), "std": math.nan}
            summary[name][f"noise/{moment}/{n}/scale"] = scale
    return summary


def noise_places(figures: Mapping[str, Any]) -> list[tuple[str, str]]:
    """(moment of the run, last N positions) of every gradient noise among the figures.

    >>> noise_places({"noise/end/16/trace": 1.0, "judged_by/trace": 2.0})
    [('end', '16')]
    """
    paths = [path.split("/") for path in figures if path.startswith("noise/")]
    return [(moment, n) for _, moment, n, key in paths if key == "trace"]


def _figures(
    run: Mapping[str, Any], goals: Mapping[str, float], costs: Mapping[str, float]
) -> dict[str, float]:
    """One run's numbers, flat; nested ones as "noise/1/trace"."""
    flat = {metric: run[metric][-1] for metric in TEST_METRICS}
    flat |= {f"largest_rise_of_{metric}": largest_rise(run[metric]) for metric in TEST_METRICS}
    for metric, level in goals.items():
        steps = steps_to_reach(level, run["step"], run[metric])
        flat[f"steps_to_{metric}"] = steps
        flat[f"flops_to_{metric}"] = steps * costs["flops"]
    flat["train_std"] = run["train_std"]
    groups = ("noise", "gap", "text", "documents", "judged_by")
    leaves = leaves_of({group: run[group] for group in groups})
    return flat | {path: leaf for path, leaf in leaves.items() if isinstance(leaf, int | float)}
