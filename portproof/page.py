"""The report as one self-contained page: the model operation by operation, and each rung's rows."""

import html
import math

from portproof.report import Report, Row

STYLE = """body{font:15px sans-serif;margin:2em auto;padding:0 1em;max-width:75em;color:#222}
table{display:block;overflow-x:auto;border-collapse:collapse;font-size:13px}.verdict{font-size:18px}
td,th{padding:1px 10px;text-align:left}svg{display:block}pre{white-space:pre-wrap}
.differs{background:#fdd}.first{outline:3px solid #000}.follows{opacity:.3}"""
PLOT, LOW, HIGH = 420, -18, 2  # pixels, and the powers of ten that they show


def page(report: Report) -> str:
    parts = [
        f'<!doctype html><meta charset="utf-8"><title>Port</title><style>{STYLE}</style>',
        f'<h1>PyTorch and JAX</h1><p class="verdict">{html.escape(report.verdict)}</p>',
        _operations(report),
        *(_details(rung, dtype, rows, report) for (rung, dtype), rows in report.groups().items()),
        f"<details><summary>as printed</summary><pre>{html.escape(str(report))}</pre></details>",
    ]
    return "\n".join(parts)


def _operations(report: Report) -> str:
    """A line for each operation: a cell for each pass, and its errors on a log scale."""
    passes = {
        f"{rung}, {dtype}": {row.place: row for row in [*rows, report.first] if row in rows}
        for (rung, dtype), rows in report.groups().items()
        if rung.endswith(("forward", "backward"))
    }
    scale = f"error, 1e{LOW} to 1e{HIGH}: blue float64, orange float32, hollow backward"
    lines = ["".join(f"<th>{name}" for name in ("operation", *passes, scale))]
    for place in dict.fromkeys(place for rows in passes.values() for place in rows):
        rows = [found.get(place) for found in passes.values()]
        cells = "".join(_cell(row, report.first) for row in rows)
        marks = "".join(_mark(row) for row in rows if row)
        plot = f'<svg width="{PLOT}" height="16">{marks}</svg>'
        lines.append(f"<td>{html.escape(place)}{cells}<td>{plot}")
    return f"<table><tr>{'<tr>'.join(lines)}</table>" if passes else ""


def _cell(row: Row | None, first: Row | None) -> str:
    """Green by how far it is below the tolerance, red above it; what follows the first is faint."""
    if row is None:
        return "<td>"
    depth = 1 + math.log10(min(max(row.excess, 1e-6), 1.0)) / 6
    color = f"hsl(130,45%,{80 - 25 * depth:.0f}%)" if row.passed else "#d22"
    kind = "first" if row is first else "" if row.passed else "follows"
    style = f'class="{kind}" style="background:{color}" title="{html.escape(str(row))}"'
    return f"<td {style}>{'✗ first' * (row is first)}"


def _mark(row: Row) -> str:
    """A dot at the error, and a line at the tolerance; what is not finite is at the right end."""
    color = "#06c" if row.dtype == "float64" else "#c60"
    fill = "none" if row.rung.endswith("backward") else color
    return (
        f'<path d="M{_x(row.tolerance):.0f} 0v16" stroke="{color}" opacity=".3"/>'
        f'<circle cx="{_x(row.error):.0f}" cy="8" r="4" stroke="{color}" fill="{fill}"/>'
    )


def _x(error: float) -> float:
    power = math.log10(max(error, 10.0**LOW)) if math.isfinite(error) else HIGH
    return 5 + (PLOT - 10) * (min(power, HIGH) - LOW) / (HIGH - LOW)


def _details(rung: str, dtype: str, rows: list[Row], report: Report) -> str:
    differ = sum(not row.passed for row in rows)
    state = f"{differ} of {len(rows)} differ" if differ else f"{len(rows)} equal"
    body = "".join(
        f'<tr class="{"" if row.passed else "differs"}"><td>{html.escape(row.place)}<td>'
        f"{row.error:.1e}<td>{row.tolerance:.1e}<td>{html.escape(row.note)}"
        for row in rows
    )
    is_open = " open" * (report.first in rows)
    return (
        f"<details{is_open}><summary>{html.escape(rung)}, {dtype}: {state}</summary>"
        f"<table><tr><th>place<th>error<th>tolerance<th>{body}</table></details>"
    )
