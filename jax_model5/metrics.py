"""Host side only: the JSONL log, the progress line, the curves, and where they were measured."""

import json
import math
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import rich.console
import rich.progress

from jax_model5.config import UserError

ROLLING_STEPS = 50
"""Over which the standard deviation of the training loss is taken [steps]."""


class MetricsLog:
    """Appends records to `metrics.jsonl`; opening it drops every record after `step`."""

    def __init__(self, path: Path, step: int):
        kept = [record for record in read(path) if record["step"] <= step]
        replace_text(path, "".join(json.dumps(record) + "\n" for record in kept))
        self._file = open(path, "a", encoding="utf-8")  # noqa: SIM115

    def write(self, kind: str, step: int, **values: float) -> None:
        """One line, flushed. Floats are written so that they read back exactly."""
        self._file.write(json.dumps({"kind": kind, "step": step, **values}) + "\n")
        self._file.flush()

    def sync(self) -> None:
        """Returns when every record is on disk, also if the machine stops."""
        os.fsync(self._file.fileno())


def read(path: Path) -> list[dict[str, Any]]:
    """The records of a log; a last line that a kill cut short is left out."""
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").split("\n")
    return [json.loads(line) for line in lines[:-1]]


def replace_text(path: Path, text: str) -> None:
    """Writes a file whole or not at all."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)


def make_folder(name: str) -> Path:
    """The folder of a command's `--out`. Raises UserError where it cannot be made."""
    out = Path(name).expanduser()
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"out={name!r}: {error.strerror}; name another folder") from None
    return out


class ProgressLine:
    """One line: step, train loss, test loss, tokens/s, targets/s, time left.

    Live on a terminal; elsewhere it is printed at each evaluation.
    """

    def __init__(self, steps: int, step: int, quiet: bool):
        self._steps = steps
        self._test_loss = math.nan
        self._line = "{test}"
        console = rich.console.Console(stderr=True, highlight=False, quiet=quiet)
        self._live = rich.progress.Progress(
            rich.progress.BarColumn(bar_width=20),
            rich.progress.TextColumn("{task.description}"),
            console=console,
            disable=not console.is_terminal,
            transient=True,
        )
        self._task = self._live.add_task("", total=steps, completed=step)

    def __enter__(self) -> "ProgressLine":
        self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._live.stop()

    def train(self, step: int, record: dict[str, float], seconds_per_step: float) -> None:
        left = int((self._steps - step) * seconds_per_step)
        self._line = (
            f"step {step}/{self._steps}  train {record['loss']:.4f}  test {{test:.4f}}  "
            f"{record['tokens_per_second']:,.0f} tokens/s  "
            f"{record['targets_per_second']:,.0f} targets/s  "
            f"{left // 60}:{left % 60:02d} left"
        )
        line = self._line.format(test=self._test_loss)
        self._live.update(self._task, completed=step, description=line)

    def evaluation(self, test_loss: float) -> None:
        self._test_loss = test_loss
        self._live.console.print(self._line.format(test=test_loss), soft_wrap=True)


def plot(records: list[dict[str, Any]], vocab_size: int, test_metric: str, path: Path) -> None:
    """Train and test loss, the train loss's rolling standard deviation, and the ln V line."""
    from matplotlib.figure import Figure  # a second to import, and only the end of a run needs it

    train = [(r["step"], r["loss"]) for r in records if r["kind"] == "train"]
    test = [(r["step"], r[test_metric]) for r in records if r["kind"] == "eval"]
    figure = Figure(figsize=(9, 5), layout="constrained")
    losses, spread = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    steps, loss = np.array(train).T
    losses.plot(steps, loss, color="C0", alpha=0.45, linewidth=0.9, label="train")
    if test:
        losses.plot(*np.array(test).T, color="C1", marker="o", markersize=3, label="test")
    uniform = math.log(vocab_size)
    losses.axhline(uniform, color="0.5", linestyle=":", label=f"ln V = {uniform:.2f}")
    losses.set_ylabel(f"{test_metric.replace('_', ' ')} [nats]")
    losses.legend(loc="upper right")
    spread.plot(steps, rolling_std(loss), color="C2")
    spread.set_ylabel(f"std of {ROLLING_STEPS} steps")
    spread.set_xlabel("optimizer step")
    figure.savefig(path, dpi=100)


def rolling_std(values: np.ndarray, n: int = ROLLING_STEPS) -> np.ndarray:
    """Standard deviation of the last n values, NaN until there are as many."""
    if len(values) < n:
        return np.full(len(values), math.nan)
    windows = np.lib.stride_tricks.sliding_window_view(values, n)
    return np.concatenate([np.full(n - 1, math.nan), windows.std(axis=1)])


# ---- what a reader needs to judge a measurement -------------------------------------------------


def commit() -> str | None:
    """The commit of this source tree, or None outside git."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except OSError:
        return None
    return done.stdout.strip() or None


def processor() -> str:
    """The processor's name."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()
