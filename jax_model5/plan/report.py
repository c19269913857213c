"""Plans as a table, and as a picture of what each step's time goes to."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import rich.console
import rich.table

from jax_model5.config import TrainConfig
from jax_model5.plan.search import frontier

matplotlib.use("Agg")
from matplotlib import pyplot

PARTS = ("compute", "memory", "network")


def settings(config: TrainConfig) -> str:
    """What a plan may have changed, in a few words."""
    mesh, remat = config.mesh, config.model.remat
    words = f" (batch {config.batch_size}, fsdp {mesh.fsdp}, remat {remat}"
    return f"{words}, accumulate {config.accumulate})"


def table(plans: Sequence[dict[str, Any]], price: float | None) -> rich.table.Table:
    """One row for each choice of chips and keys; memory is that of one chip."""
    head = ["chips", "batch", "fsdp", "remat", "acc.", "parameters", "moments", "temporaries"]
    head += ["of", "fits", "traffic", "network", "floor of a step", "ruled by", "MFU there"]
    head += ["tokens/s", "targets/s", "hours", "chip-hours per 1e9 tokens"]
    result = rich.table.Table(*head, *(["cost"] if price is not None else []), box=None)
    for plan in plans:
        floor, config, is_whole = plan["floor"], plan["config"], "total" in plan["memory"]
        cells = [plan["chips"], str(config["batch_size"]), str(config["mesh"]["fsdp"])]
        cells += [config["model"]["remat"], str(config["accumulate"])]
        cells += [_gb(plan["state"][part]) for part in ("parameters", "moments")]
        cells += [_gb(plan["memory"]["temp"]) if is_whole else "?", _gb(plan["memory_of_chip"])]
        cells += [{True: "yes", False: "NO"}.get(plan.get("fits", ""), "?")]
        network = sum(plan.get("collective_bytes", {}).values())
        cells += [_gb(plan["traffic_bytes"]), _gb(network)] if is_whole else ["?", "?"]
        cells += [f"{floor['step_s'] * 1e3:.3g} ms", floor["ruled_by"], f"{floor['mfu']:.0%}"]
        cells += [f"{floor['tokens_per_s']:,.0f}", f"{floor['targets_per_s']:,.0f}"]
        cells += [f"{floor['hours']:.3g}", f"{floor['chip_hours_per_billion_tokens']:.3g}"]
        cost = [f"{floor['hours'] * plan['n_chips'] * price:,.2f}"] if price is not None else []
        result.add_row(*cells, *cost)
    return result


def _gb(n_bytes: float) -> str:
    return f"{n_bytes / 1e9:.3g} GB"


def show(plans: Sequence[dict[str, Any]], price: float | None) -> None:
    rich.console.Console(width=200).print(table(plans, price))
    for plan in plans:
        if slow := {d: n for d, n in plan["flops_by_dtype"].items() if d not in ("bf16", "f16")}:
            flops = ", ".join(f"{n / 1e12:.3g} T in {dtype}" for dtype, n in slow.items())
            print(f"{plan['chips']}: products that are not in bfloat16: {flops}")


def plot(plans: Sequence[dict[str, Any]], path: Path) -> None:
    """Bars: arithmetic, memory and network of each; the longest is the floor."""
    figure, axes = pyplot.subplots(figsize=(8, 4.5))
    for index, part in enumerate(PARTS):
        at = [i + (index - 1) * 0.25 for i in range(len(plans))]
        axes.bar(at, [plan["floor"][f"{part}_s"] * 1e3 for plan in plans], 0.25, label=part)
    axes.set_xticks(range(len(plans)), [plan["chips"] for plan in plans])
    axes.set_ylabel("floor of a step [ms]")
    axes.legend()
    _save(figure, path)


def plot_sweep(plans: Sequence[dict[str, Any]], path: Path) -> None:
    """The parts of a step's floor, and efficiency, over the number of chips."""
    figure, (times, shares) = pyplot.subplots(1, 2, figsize=(10, 4.5))
    chips = [plan["n_chips"] for plan in plans]
    for part in PARTS:
        ms = [p["floor"][f"{part}_s"] * 1e3 or math.nan for p in plans]  # no 0 on a log scale
        times.plot(chips, ms, marker="o", label=part)
    shares.plot(
        chips, efficiency(plans), marker="o", label="a chip's tokens/s, of the first to fit"
    )
    shares.plot(chips, network_share(plans), marker="o", label="network's time, of the floor")
    times.set_yscale("log")
    times.set_ylabel("floor of a step [ms]")
    shares.set_ylabel("share")
    for axes in (times, shares):
        axes.set_xscale("log", base=2)
        axes.set_xlabel("chips")
        axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1))
    _save(figure, path)


def efficiency(plans: Sequence[dict[str, Any]]) -> list[float]:
    """Tokens a second of a chip at the floor, of those of the first plan's that fits."""
    rates = [plan["floor"]["tokens_per_s"] / plan["n_chips"] for plan in plans]
    first = next((r for r, p in zip(rates, plans, strict=True) if p.get("fits", True)), rates[0])
    return [rate / first for rate in rates]


def network_share(plans: Sequence[dict[str, Any]]) -> list[float]:
    """The network's time, of the floor; 1 where it rules."""
    return [plan["floor"]["network_s"] / plan["floor"]["step_s"] for plan in plans]


def show_sweep(plans: Sequence[dict[str, Any]]) -> None:
    """How well the run uses more chips."""
    rows = zip(plans, efficiency(plans), network_share(plans), strict=True)
    for plan, efficient, network in rows:
        print(f"{plan['chips']}: efficiency {efficient:.0%}, network {network:.0%} of the floor")


def plot_frontier(plans: Sequence[dict[str, Any]], path: Path) -> None:
    """Memory against cost of each choice that fits, and those that no other beats in both."""
    figure, axes = pyplot.subplots(figsize=(8, 4.5))

    def of(plan: dict[str, Any]) -> tuple[float, float]:
        return plan["memory"]["total"] / 1e9, plan["floor"]["chip_hours_per_billion_tokens"]

    if plans:
        axes.plot(*zip(*map(of, plans), strict=True), "o", alpha=0.5)
        axes.step(*zip(*map(of, frontier(plans)), strict=True), where="post")
    axes.set_xlabel("memory of a chip [GB]")
    axes.set_ylabel("chip-hours a billion tokens, at the floor")
    _save(figure, path)


def _save(figure: Any, path: Path) -> None:
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def show_measured(found: dict[str, Any]) -> None:
    """Planned against measured."""
    result = rich.table.Table(
        found["device"], "planned", "measured", "measured / planned", box=None
    )
    for name, unit, scale in (("memory", "GB", 1e9), ("flops", "GFLOP", 1e9)):
        planned, measured = (found[name][kind] for kind in ("planned", "measured"))
        cells = [f"{value / scale:.4g} {unit}" for value in (planned, measured)]
        result.add_row(name, *cells, f"{measured / planned:.3f}")
    result.add_row("step", "", f"{found['step_s']:.4g} s", "")
    rich.console.Console(width=100).print(result)
