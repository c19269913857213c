"""Figures of many runs -> means and spreads, how far losses jump, what it takes to reach one."""

import itertools
import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

METRICS = ("final_token_nll", "all_token_nll")


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
        for metric in METRICS
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
        for key in [key for key in figures[0] if key.endswith("/scale")]:
            # A mean of ratios would follow the seed whose |G|² happens to be near 0.
            trace, squared_norm = (
                summary[name][key.replace("/scale", other)]["mean"]
                for other in ("/trace", "/squared_norm")
            )
            summary[name][key] = {"mean": trace / squared_norm, "std": math.nan}
    return summary


def _figures(
    run: Mapping[str, Any], goals: Mapping[str, float], costs: Mapping[str, float]
) -> dict[str, float]:
    """One run's numbers, flat; nested ones as "noise/1/trace"."""
    flat = {metric: run[metric][-1] for metric in METRICS}
    flat |= {f"largest_rise_of_{metric}": largest_rise(run[metric]) for metric in METRICS}
    for metric, level in goals.items():
        steps = steps_to_reach(level, run["step"], run[metric])
        flat[f"steps_to_{metric}"] = steps
        flat[f"flops_to_{metric}"] = steps * costs["flops"]
    flat["train_std"] = run["train_std"]
    flat |= _leaves(
        {group: run[group] for group in ("noise", "gap", "text", "documents", "judged_by")}
    )
    return flat


def _leaves(tree: Mapping[str, Any], prefix: str = "") -> dict[str, float]:
    found: dict[str, float] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            found |= _leaves(value, f"{prefix}{key}/")
        elif isinstance(value, int | float):
            found[f"{prefix}{key}"] = value
    return found


def without_nan(tree: Any) -> Any:
    """The same tree with None for nan, which JSON does not know."""
    if isinstance(tree, dict):
        return {key: without_nan(value) for key, value in tree.items()}
    if isinstance(tree, list):
        return [without_nan(value) for value in tree]
    return None if isinstance(tree, float) and math.isnan(tree) else tree
