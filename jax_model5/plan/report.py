"""Plans as a table, and as a picture of what each step's time goes to."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import rich.console
import rich.table

matplotlib.use("Agg")
from matplotlib import pyplot

PARTS = ("compute", "memory", "network")


def table(plans: Sequence[dict[str, Any]], price: float | None) -> rich.table.Table:
    """One row for each choice of chips."""
    head = ["chips", "memory a chip", "fits", "FLOPs a chip", "to and from memory", "network"]
    head += ["floor of a step", "ruled by", "MFU there", "tokens/s", "targets/s", "hours"]
    result = rich.table.Table(*head, *(["cost"] if price is not None else []), box=None)
    for plan in plans:
        floor, memory = plan["floor"], plan["memory"]
        network = sum(plan.get("collective_bytes", {}).values())
        is_whole = "total" in memory
        cells = [
            plan["chips"],
            f"{memory['total'] / 1e9:.2f} GB"
            if is_whole
            else f"> {memory['argument'] / 1e9:.2f} GB",
            {True: "yes", False: "no"}.get(plan.get("fits", ""), "?"),
            f"{sum(plan['flops_by_dtype'].values()) / 1e12:.3g} T",
            f"{plan['traffic_bytes'] / 1e9:.3g} GB" if is_whole else "?",
            f"{network / 1e9:.3g} GB" if is_whole else "?",
            f"{floor['step_s'] * 1e3:.3g} ms",
            floor["ruled_by"],
            f"{floor['mfu']:.0%}",
            f"{floor['tokens_per_s']:,.0f}",
            f"{floor['targets_per_s']:,.0f}",
            f"{floor['hours']:.3g}",
        ]
        cost = [f"{floor['hours'] * plan['n_chips'] * price:,.2f}"] if price is not None else []
        result.add_row(*cells, *cost)
    return result


def show(plans: Sequence[dict[str, Any]], price: float | None) -> None:
    rich.console.Console(width=170).print(table(plans, price))
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
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
