"""What every lesson shares: its options, its table of verdicts, and the files that it writes."""

import dataclasses
import os
import sys
import time
from collections.abc import Sequence
from typing import Any

import jax
import matplotlib
import numpy as np
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from jax_model5 import startup
from jax_model5.config import DataConfig, ModelConfig, OptimizerConfig, TrainConfig
from jax_model5.errors import BAD_INPUT, ArgumentParser, UserError, write_line
from jax_model5.record import circumstances, out_folder, write_json

IN_NOTEBOOK = "ipykernel" in sys.modules
if not IN_NOTEBOOK:
    matplotlib.use("Agg")


class Lesson:
    """One lesson: `lesson.check(...)` for each figure of the course, then `lesson.end()`.

    As a script it takes --fast (the size for tests), --data.source (a book of your own) and --out;
    in a notebook it runs at full size.
    """

    def __init__(self, number: str, title: str):
        sys.excepthook = _one_line
        self.number, self.title = number, title
        parser = ArgumentParser(prog=f"python {sys.argv[0]}", description=title)
        parser.add_argument("--fast", action="store_true", help="a size for tests, in seconds")
        parser.add_argument("--data.source", dest="source", default="pydocs", help="a text file")
        parser.add_argument("--out", default=f"runs/lessons/{number}", help="folder of its results")
        options = parser.parse_args([] if IN_NOTEBOOK else sys.argv[1:])
        self.fast, self.source, self.out = options.fast, options.source, out_folder(options.out)
        self._rows: list[dict[str, Any]] = []
        self._start = time.perf_counter()
        startup.set_up_jax(TrainConfig())

    def pick(self, full: Any, fast: Any) -> Any:
        """The size of this run."""
        return fast if self.fast else full

    def model5(self, steps: int, *, seed: int = 0, **fields: Any) -> TrainConfig:
        """The course's Model 5 and its training, at a width that two cores train in minutes.

        All tokens, no dropout, AdamW at 1e-3, batch 16, no end-of-text token; `fields` of
        TrainConfig and of ModelConfig replace these.
        """
        size = self.pick(
            {"seq_len": 64, "d_model": 128, "n_heads": 4, "n_layers": 4},
            {"seq_len": 16, "d_model": 32, "n_heads": 4, "n_layers": 2},
        )
        of_model = {f.name for f in dataclasses.fields(ModelConfig)}
        model = {"dropout": 0.0, **size, **{k: v for k, v in fields.items() if k in of_model}}
        of_run = {
            "objective": "all_tokens",
            "data": DataConfig(source=self.source, separator="none"),
            "optimizer": OptimizerConfig(learning_rate=1e-3),
            **{k: v for k, v in fields.items() if k not in of_model},
        }
        return TrainConfig(steps=steps, seed=seed, model=ModelConfig(**model), **of_run)

    def check(
        self, claim: str, course: str, ours: str, holds: bool, *, in_fast: bool = True
    ) -> None:
        """A row of the table. `in_fast`: whether it is judged at the size for tests too."""
        verdict = bool(holds) if in_fast or not self.fast else None
        self._rows.append({"claim": claim, "course": course, "ours": ours, "holds": verdict})

    def save(self, figure: Figure, name: str) -> None:
        """Writes NAME.png; a notebook shows the figure itself."""
        figure.savefig(self.out / f"{name}.png", dpi=80)

    def end(self) -> None:
        """Prints the table of verdicts and writes results.json."""
        table = Table("the claim", "the course", "ours", "holds", title=self.title)
        for row in self._rows:
            table.add_row(row["claim"], row["course"], row["ours"], VERDICTS[row["holds"]])
        Console(width=120 if IN_NOTEBOOK else None).print(table)
        result = {
            "lesson": self.number,
            "title": self.title,
            "fast": self.fast,
            "seconds": round(time.perf_counter() - self._start, 1),
            **circumstances(sys.argv[0], jax.devices()[0].device_kind),
            "rows": self._rows,
        }
        write_json(self.out / "results.json", result)
        print(f"written: {self.out}")


VERDICTS = {True: "yes", False: "no", None: "not judged at this size"}


def spread(values: Sequence[float], digits: int = 2) -> str:
    """Mean ± standard deviation over the seeds, or the one value."""
    mean = f"{np.mean(values):.{digits}f}"
    return f"{mean} ± {np.std(values, ddof=1):.{digits}f}" if len(values) > 1 else mean


def furthest(a: Any, b: Any) -> float:
    """The largest difference of two arrays, or trees of them."""
    differences = jax.tree.map(lambda x, y: np.abs(np.asarray(x) - np.asarray(y)).max(), a, b)
    return float(max(jax.tree.leaves(differences)))


def _one_line(kind: type[BaseException], error: BaseException, trace: Any) -> None:
    """Bad input ends a lesson as it ends a command."""
    if not issubclass(kind, UserError):
        sys.__excepthook__(kind, error, trace)
        return
    sys.stdout.flush()
    write_line(" ".join(f"error: {error}".split()))
    os._exit(BAD_INPUT)
