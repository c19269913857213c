"""The benchmark's result as a table on the terminal, as JSON, and as one PNG."""

from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from rich import box
from rich.console import Console
from rich.table import Table

_TABLE_WIDTH = 130
COLUMNS = (
    *("step s", "quartiles", "eval s", "cold s", "compile s", "warm s", "tokens/s", "targets/s"),
    *("peak GiB", "of matmul", "MFU"),
)
LEGEND = (
    "cold, warm: from the start of the process to the end of its first step, compile cache empty "
    "or filled (compile: its part of cold)\n"
    "of matmul: FLOP/s over those of this machine's own matrix products; MFU: over the chip's "
    "published bfloat16 peak, where known"
)


def print_table(result: dict[str, Any]) -> None:
    """One line a program; then the ratios."""
    config = result["config"]
    shape = f"batch {config['batch_size']} x {config['model']['seq_len']}"
    case, device = Path(result["case"]).name, result["machine"]["device"]
    title = f"{case}, {config['objective']}, {shape}, {device}"
    table = Table(title=title, box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    table.add_column("program", no_wrap=True)
    for column in COLUMNS:
        table.add_column(column, justify="right", no_wrap=True)
    for program in result["programs"]:
        table.add_row(program["name"], *_cells(program))
    console = Console()
    console.width = max(console.width, _TABLE_WIDTH)
    console.print(table)
    console.print(LEGEND, highlight=False)
    for line in ratio_lines(result):
        console.print(line, highlight=False)


def print_generation(result: dict[str, Any]) -> None:
    """One line a program; then the bound and the ratios."""
    for row in result["programs"]:
        seconds, n = row["seconds"], f"{result['texts']} x {result['generated_tokens']}"
        print(
            f"{row['name']}: {n} tokens in {seconds['median']:.3g} s "
            f"({seconds['q1']:.3g}-{seconds['q3']:.3g}), {row['tokens_per_s']:,.1f} tokens/s"
        )
    first, bound_s = result["programs"][0], result["bound_s"]
    print(
        f"all weights and the cache read in {1e3 * bound_s:.3g} ms, at most "
        f"{result['texts'] / bound_s:,.1f} tokens/s: {first['name']} writes "
        f"{first['of_bound']:.0%} of them"
    )
    for line in ratio_lines(result):
        print(line)


def _cells(program: dict[str, Any]) -> list[str]:
    step = program["step"]
    return [
        f"{step['median']:.3g}",
        f"{step['q1']:.3g}-{step['q3']:.3g}",
        f"{program['eval']['median']:.3g}",
        _or_dash(program.get("first_step_cold_s"), ".1f"),
        _or_dash(program.get("compile_cold_s"), ".1f"),
        f"{program['first_step_s']:.1f}",
        f"{program['tokens_per_s']:,.0f}",
        f"{program['targets_per_s']:,.0f}",
        f"{program['peak_bytes'] / 2**30:.2f}",
        _or_dash(program.get("of_matmul"), ".0%"),
        _or_dash(program.get("mfu"), ".0%"),
    ]


def _or_dash(value: float | None, spec: str) -> str:
    return "-" if value is None else format(value, spec)


def ratio_lines(result: dict[str, Any]) -> list[str]:
    """Plain text: how many times faster we are than each peer, and how much memory we take."""
    lines = []
    for r in result["ratios"]:
        rounds = ", ".join(f"{value:.2f}" for value in r["rounds"])
        lines.append(
            f"{r['ours']} against {r['theirs']}: {r['median']:.2f} times faster "
            f"(rounds: {rounds})" + (f", {r['memory']:.2f} of its memory" if "memory" in r else "")
        )
    return lines


def plot_programs(result: dict[str, Any], path: Path, unit: str) -> None:
    """Each program's seconds a step, or a text; quartiles as the error bar."""
    programs = result["programs"][::-1]
    what = "step"
    if unit != "step":
        what = f"batch of texts of {result['generated_tokens']} tokens"
    times = [p[unit] for p in programs]
    medians = [t["median"] for t in times]
    errors = [[t["median"] - t["q1"] for t in times], [t["q3"] - t["median"] for t in times]]
    figure = Figure(figsize=(7, 0.8 + 0.45 * len(programs)), layout="constrained")
    ax = figure.subplots()
    colors = ["C0" if p["name"].startswith("jax") else "C1" for p in programs]
    ax.barh([p["name"] for p in programs], medians, xerr=errors, color=colors, capsize=3)
    for index, value in enumerate(medians):
        ax.annotate(f" {value:.3g} s", (value, index), (6, 6), textcoords="offset points")
    ax.set_xlim(0, 1.2 * max(t["q3"] for t in times))
    ax.set_xlabel(f"seconds a {what} (bar: median, whisker: quartiles)")
    config = result["config"]
    shape = f"batch {config['batch_size']} x {config['model']['seq_len']}"
    if unit != "step":
        shape = f"{result['texts']} texts, prompt {result['prompt_tokens']}"
    case, device = Path(result["case"]).name, result["machine"]["device"]
    ax.set_title(f"{case}, {config['objective']}, {shape}: {device}")
    figure.savefig(path, dpi=110)


def plot_sweep(result: dict[str, Any], path: Path) -> None:
    """Measured seconds a step, and those predicted from FLOPs at the matrix-product rate."""
    points = result["points"]
    values = [p["value"] for p in points]
    figure = Figure(figsize=(6, 4), layout="constrained")
    ax = figure.subplots()
    ax.loglog(values, [p["step"]["median"] for p in points], "o-", label="measured")
    predicted = [p["predicted_s"] for p in points]
    ax.loglog(values, predicted, "s--", label="predicted: FLOPs / matrix-product rate")
    ax.set_xticks(values, [str(v) for v in values])
    ax.minorticks_off()
    ax.set_xlabel(result["sweep"])
    ax.set_ylabel("seconds a training step")
    ax.set_title(f"{Path(result['case']).name}: {result['machine']['device']}")
    ax.grid(alpha=0.3)
    ax.legend()
    figure.savefig(path, dpi=110)
