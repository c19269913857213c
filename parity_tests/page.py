"""The report as one self-contained HTML page."""

import base64
import html
import io
from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure

_HEAD = (
    '<!doctype html><meta charset="utf-8"><title>Parity of JAX and PyTorch</title>'
    "<style>body{font:15px sans-serif;margin:2em auto;max-width:70em}pre{font-size:13px;"
    "overflow-x:auto}.differs{background:#fdd}img{max-width:100%}</style>"
    "<h1>Parity of JAX and PyTorch</h1>"
)


def write(path: Path, texts: Sequence[str], figures: Sequence[Figure]) -> None:
    """The verdict, which is the last of the texts, then the others, then the plots."""
    *others, verdict = texts or ["being measured"]
    parts = [_HEAD, f"<p><b>{html.escape(verdict)}</b></p>"]
    parts += [f"<pre>{_marked(text)}</pre>" for text in others]
    parts += [f'<img alt="drift" src="data:image/png;base64,{_png(f)}">' for f in figures]
    path.write_text("\n".join(parts), encoding="utf-8")


def _marked(text: str) -> str:
    lines = [html.escape(line) for line in text.splitlines()]
    return "\n".join(
        f'<span class="differs">{line}</span>' if line.endswith("DIFFERS") else line
        for line in lines
    )


def _png(figure: Figure) -> str:
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=100)
    return base64.b64encode(file.getvalue()).decode()
