"""The site: these pages, the lessons with the outputs of their full runs, and the docstrings.

python -m sphinx -W docs docs/_build
"""

import json
import re
from pathlib import Path

import jupytext
from sphinx.application import Sphinx

DOCS = Path(__file__).parent
LESSONS = DOCS.parent / "lessons"

project = "jax_model5"
extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
]
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = "jax_model5"
html_show_copyright = False
default_role = "code"  # docstrings are written as Markdown has it
myst_heading_anchors = 4
autodoc_member_order = "bysource"


def lesson_page(path: Path) -> str:
    """A lesson as Markdown: its text and code, the committed figures, and the verdicts."""
    number = path.name[:2]
    parts = []
    for cell in jupytext.read(path, fmt="py:percent").cells:
        if cell.cell_type == "markdown":
            parts.append(cell.source)
            continue
        parts.append(f"```python\n{cell.source}\n```")
        for name in re.findall(r'lesson\.save\(\w+, "(\w+)"\)', cell.source):
            parts.append(f"![{name.replace('_', ' ')}]({number}_{name}.png)")
    run = json.loads((DOCS / f"lessons/{number}.json").read_text(encoding="utf-8"))
    head = "| the claim | the course | ours | holds |\n| --- | --- | --- | --- |"
    rows = [
        [row[key].replace("|", "\\|") for key in ("claim", "course", "ours")]
        + ["yes" if row["holds"] else "**no**"]
        for row in run["rows"]
    ]
    table = "\n".join([head, *(f"| {' | '.join(cells)} |" for cells in rows)])
    about = f"`{run['command']}`: {run['seconds']:.0f} s on {run['machine']['processor']}."
    return "\n\n".join([*parts, table, about]) + "\n"


def write_lessons(_: Sphinx) -> None:
    for path in sorted(LESSONS.glob("[0-9]*.py")):
        page = lesson_page(path)
        target = DOCS / f"lessons/{path.stem}.md"
        if not target.exists() or target.read_text(encoding="utf-8") != page:
            target.write_text(page, encoding="utf-8")


def link_pages(_: Sphinx, name: str, content: list[str]) -> None:
    """The start page is the README; a link to a lesson or a module leads to its page here."""
    text = content[0]
    if name == "index":
        readme = (DOCS.parent / "README.md").read_text(encoding="utf-8")
        text = readme.replace("](docs/", "](") + text
    text = re.sub(r"\]\((?:\.\./)*lessons/(\d\d_\w+)\.py\)", r"](/lessons/\1.md)", text)
    modules = r"\]\((?:\.\./)*((?:jax_model5|torch_ref)/(?:\w+/)*[a-z]\w*)\.py\)"
    content[0] = re.sub(modules, lambda m: f"](/api/{m[1].replace('/', '.')}.rst)", text)


def setup(app: Sphinx) -> None:
    app.connect("builder-inited", write_lessons)
    app.connect("source-read", link_pages)
