"""The report as one self-contained page: the model operation by operation, and each rung's rows."""

import html
import math
from collections.abc import Iterable

from portproof.report import Report, Row

STYLE = """body{font:15px sans-serif;margin:2em auto;max-width:75em;color:#222}
svg{font:12px sans-serif;max-width:100%}table{border-collapse:collapse;font-size:13px}
td,th{padding:1px 10px;text-align:left}.differs{background:#fdd}summary{cursor:pointer}
.verdict{font-size:18px;font-weight:bold}pre{white-space:pre-wrap}"""
KINDS = {
    "2 taps forward": "forward",
    "4 taps backward": "backward",
    "7 dropout, forward": "dropout, forward",
    "7 dropout, backward": "dropout, backward",
}
LABEL, CELL, STEP, PLOT = 240, 34, 18, 420  # widths and heights in pixels
LOW, HIGH = -18, 2  # powers of ten that the plot shows


def page(report: Report) -> str:
    verdict = html.escape(report.verdict)
    parts = [
        f'<!doctype html><meta charset="utf-8"><title>Port</title><style>{STYLE}</style>',
        f'<h1>PyTorch and JAX</h1><p class="verdict">{verdict}</p>',
        _operations(report),
        *(_details(rung, dtype, rows, report) for (rung, dtype), rows in report.groups().items()),
        f"<details><summary>as printed</summary><pre>{html.escape(str(report))}</pre></details>",
    ]
    return "\n".join(part for part in parts if part)


def _operations(report: Report) -> str:
    """A line for each operation: a cell for each pass, and its errors on a log scale."""
    columns: dict[tuple[str, str], dict[str, Row]] = {}
    for row in report.rows:
        if row.rung in KINDS:
            columns.setdefault((row.rung, row.dtype), {})[row.place] = row
    if not columns:
        return ""
    places = list(max(columns.values(), key=lambda rows: len(rows)))
    left, top = LABEL + CELL * len(columns) + 20, 165
    marks = [_text(LABEL - 8, top + STEP * i + 13, p, "end") for i, p in enumerate(places)]
    for n, ((rung, dtype), rows) in enumerate(columns.items()):
        x = LABEL + CELL * n
        marks.append(_text(x + 20, top - 8, f"{KINDS[rung]}, {dtype}", turned=True))
        found = [(top + STEP * i, rows[p]) for i, p in enumerate(places) if p in rows]
        marks += [_cell(x, y, row, report) for y, row in found]
        color = "#06c" if dtype == "float64" else "#c60"
        line = [(left + _scale(row.error), y + 9) for y, row in found]
        dash = ' stroke-dasharray="4 3"' if "backward" in rung else ""
        marks.append(_line(line, color, dash))
    marks += _axis(left, top, STEP * len(places))
    legend = "error on a log scale: blue float64, orange float32, backward dashed"
    marks.append(_text(left, top - 34, legend))
    return _svg(left + PLOT + 20, top + STEP * len(places) + 10, marks)


def _cell(x: float, y: float, row: Row, report: Report) -> str:
    """Green by how far it is below the tolerance, red above it; what follows the first is faint."""
    first = row is report.first
    below = min(1.0, max(0.0, math.log10(max(row.error / (row.tolerance or 1), 1e-6)) / 6 + 1))
    color = f"hsl(130,45%,{80 - 25 * below:.0f}%)" if row.passed else "#d22"
    faint = "" if row.passed or first else ' opacity="0.3"'
    border = ' stroke="#000" stroke-width="3"' if first else ""
    return (
        f'<rect x="{x + 2}" y="{y + 2}" width="{CELL - 4}" height="{STEP - 4}" fill="{color}"'
        f"{faint}{border}><title>{html.escape(str(row))}</title></rect>"
        + (_text(x + 12, y + 14, "✗") if first else "")
    )


def _details(rung: str, dtype: str, rows: list[Row], report: Report) -> str:
    differ = sum(not row.passed for row in rows)
    state = f"{differ} of {len(rows)} differ" if differ else f"{len(rows)} equal"
    body = "".join(
        f'<tr class="{"" if row.passed else "differs"}"><td>{html.escape(row.place)}<td>'
        f"{row.error:.1e}<td>{row.tolerance:.1e}<td>{html.escape(row.note)}"
        for row in rows
    )
    is_open = " open" if report.first in rows else ""
    head = "<tr><th>place<th>error<th>tolerance<th>"
    return (
        f"<details{is_open}><summary>{rung}, {dtype}: {state}</summary>"
        f"<table>{head}{body}</table></details>"
    )


# ---- SVG ----------------------------------------------------------------------------------------


def _scale(error: float) -> float:
    """Pixels from the left of the plot; what is not finite is at its right end."""
    power = math.log10(max(error, 10.0**LOW)) if math.isfinite(error) else HIGH
    return PLOT * (min(power, HIGH) - LOW) / (HIGH - LOW)


def _axis(left: float, top: float, height: float) -> list[str]:
    marks = []
    for power in range(LOW, HIGH + 1, 4):
        x = left + _scale(10.0**power)
        marks.append(f'<path d="M{x:.0f} {top}v{height}" stroke="#ccc"/>')
        marks.append(_text(x, top - 6, f"1e{power}", "middle"))
    tolerance = left + _scale(1e-12)
    return [*marks, f'<path d="M{tolerance:.0f} {top}v{height}" stroke="#06c"/>']


def _line(points: Iterable[tuple[float, float]], color: str, more: str) -> str:
    text = " ".join(f"{x:.0f},{y:.0f}" for x, y in points)
    return f'<polyline points="{text}" fill="none" stroke="{color}"{more}/>'


def _text(x: float, y: float, text: str, anchor: str = "start", turned: bool = False) -> str:
    turn = f' transform="rotate(-60 {x:.0f} {y:.0f})"' if turned else ""
    return f'<text x="{x:.0f}" y="{y:.0f}" text-anchor="{anchor}"{turn}>{html.escape(text)}</text>'


def _svg(width: float, height: float, marks: list[str]) -> str:
    size = f'width="{width:.0f}" height="{height:.0f}" viewBox="0 0 {width:.0f} {height:.0f}"'
    return f'<svg xmlns="http://www.w3.org/2000/svg" {size}>{"".join(marks)}</svg>'
