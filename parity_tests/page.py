"""The report as one self-contained HTML page: portproof's, with the plots of drift."""

import base64
import html
import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import portproof
from portproof.page import page

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def write(
    path: Path, found: portproof.Report, texts: Sequence[str], figures: "Sequence[Figure]"
) -> None:
    """The model operation by operation, then the texts, then the plots."""
    parts = [page(found)]
    parts += [f"<pre>{html.escape(text)}</pre>" for text in texts]
    parts += [f'<img alt="drift" src="data:image/png;base64,{_png(f)}">' for f in figures]
    path.write_text("\n".join(parts), encoding="utf-8")


def _png(figure: "Figure") -> str:
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=100)
    return base64.b64encode(file.getvalue()).decode()
