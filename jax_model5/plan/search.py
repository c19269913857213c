"""Other ways to do the same run: what would fit, what costs least a token, how chips scale."""

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from jax_model5.config import TrainConfig
from jax_model5.plan.chips import Chips, same_family

Plan = dict[str, Any]
Planner = Callable[[Chips, TrainConfig], Plan]

REMATS = ("none", "dots", "full")
ACCUMULATES, BATCHES = (1, 4), (1, 4)


def search(chips: Chips, config: TrainConfig, plan: Planner) -> list[Plan]:
    """Meshes x remat x accumulate x batch, those that fit, by their chip-seconds a token.

    A batch that does not fit is not tried larger.
    """
    plans, too_large = [], set()
    for remat, fsdp, accumulate, times in _choices(chips):
        if (remat, fsdp, accumulate) in too_large:
            continue
        choice = _changed(config, remat=remat, fsdp=fsdp, accumulate=accumulate, times=times)
        plans.append(plan(chips, choice))
        if not plans[-1]["fits"]:
            too_large.add((remat, fsdp, accumulate))
    fitting = [found for found in plans if found["fits"]]
    return sorted(fitting, key=lambda found: found["floor"]["chip_hours_per_billion_tokens"])


def _choices(chips: Chips) -> Iterator[tuple[str, int, int, int]]:
    """The parameters whole, split inside a host, and split over all chips; small batches first."""
    shards = sorted({1, min(chips.n, chips.chip.per_host, 8), chips.n})
    shards = [n for n in shards if chips.n % n == 0]
    return itertools.product(REMATS, shards, ACCUMULATES, BATCHES)


def _changed(
    config: TrainConfig, *, remat: Any, fsdp: int, accumulate: int, times: int = 1
) -> TrainConfig:
    return dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, remat=remat),
        mesh=dataclasses.replace(config.mesh, data=0, fsdp=fsdp),
        accumulate=accumulate,
        batch_size=config.batch_size * times * accumulate,
    )


def frontier(plans: Sequence[Plan]) -> list[Plan]:
    """Those that no other beats both in memory and in cost, from the smallest memory on."""
    best: list[Plan] = []
    for plan in sorted(plans, key=lambda plan: plan["memory"]["total"]):
        cost = plan["floor"]["chip_hours_per_billion_tokens"]
        if not best or cost < best[-1]["floor"]["chip_hours_per_billion_tokens"]:
            best.append(plan)
    return best


def sweep(chips: Chips, config: TrainConfig, plan: Planner) -> list[Plan]:
    """The run on one chip of this kind, and on more, up to those."""
    fewer = [some for some in same_family(chips) if some.n < chips.n]
    return [plan(some, _at_most(some.n, config)) for some in [*fewer, chips]]


def _at_most(n_chips: int, config: TrainConfig) -> TrainConfig:
    """The config with a mesh of that many chips."""
    mesh = dataclasses.replace(config.mesh, data=0, fsdp=min(config.mesh.fsdp, n_chips))
    return dataclasses.replace(config, mesh=mesh)


def nearest_that_fits(chips: Chips, config: TrainConfig, plan: Planner) -> tuple[str, Plan] | None:
    """The first change of the run's keys with which it fits, from the one that costs least time."""
    c, rows = config, config.batch_size // chips.n
    more = [c.accumulate * 2**k for k in (1, 2, 3, 4) if rows % (c.accumulate * 2**k) == 0]
    keys: list[dict[str, Any]] = [{"accumulate": n} for n in more]
    keys = keys[:1] + [{"remat": "full"}] + keys[1:] + [{"remat": "full", **k} for k in keys[-1:]]
    if chips.n > c.mesh.fsdp:
        keys = [{"fsdp": chips.n}, *({"fsdp": chips.n, **key} for key in keys)]
    for key in keys:
        now = {"remat": c.model.remat, "fsdp": c.mesh.fsdp, "accumulate": c.accumulate} | key
        changed = dataclasses.replace(_changed(c, **now), batch_size=c.batch_size)
        if (found := plan(chips, changed))["fits"]:
            names = {"remat": "model.remat", "fsdp": "mesh.fsdp"}
            return " ".join(f"--{names.get(k, k)}={v}" for k, v in key.items()), found
    return None
