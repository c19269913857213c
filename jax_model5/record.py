"""What a run writes, on the host: log, trackers, progress, curves, where it was measured."""

import contextlib
import functools
import itertools
import json
import math
import os
import platform
import shlex
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import jax
import numpy as np
import rich.console
import rich.progress

from jax_model5 import disk, processes, startup
from jax_model5.config import TEST_METRICS, TrainConfig
from jax_model5.errors import disk_errors, give_up
from jax_model5.flops import step_flops
from jax_model5.losses import n_last
from jax_model5.startup import note

ROLLING_STEPS = 50
"""Over which the standard deviation of the training loss is taken [steps]."""


_NUMBERS = {"train": ("loss",), "eval": TEST_METRICS}


class Diverged(Exception):
    """The loss or its gradient is not finite. The message is one line for the user."""


class Sink(Protocol):
    """Where a run's records go: the log, the progress line, any tracker."""

    def write(self, kind: str, step: int, **values: float) -> None:
        """A record of kind train or eval."""


class Recorder:
    """Hands each step's metrics to the sinks, one step late: no device waits for the host."""

    def __init__(self, config: TrainConfig, sinks: Sequence[Sink]):
        self._sinks = sinks
        self._tokens = config.batch_size * config.model.seq_len
        self._targets = config.batch_size * n_last(config)
        self._pending: tuple[int, Any] | None = None
        self.start_clock()

    def start_clock(self) -> None:
        self._last = time.perf_counter()

    def add(self, step: int, metrics: Any) -> None:
        self.flush()
        self._pending = step, metrics

    def flush(self) -> None:
        """Waits for the pending step and records it. Raises Diverged where it isn't finite."""
        if self._pending is None:
            return
        step, metrics = self._pending
        self._pending = None
        values = {name: float(value) for name, value in jax.device_get(metrics).items()}
        now = time.perf_counter()
        seconds, self._last = now - self._last, now
        values["tokens_per_second"] = max(0.1, round(self._tokens / seconds, 1))
        values["targets_per_second"] = max(0.1, round(self._targets / seconds, 1))
        self.write("train", step, **values)

    def write(self, kind: str, step: int, **values: float) -> None:
        """Raises Diverged where a value isn't finite, and then writes nothing."""
        for name, value in values.items():
            if not math.isfinite(value):
                raise Diverged(f"step {step}: {name}={value}")
        for sink in self._sinks:
            sink.write(kind, step, **values)

    def sync(self) -> None:
        """Returns when every record of the log is on disk, also if the machine stops."""
        for sink in self._sinks:
            if isinstance(sink, MetricsLog):
                sink.sync()


class MetricsLog:
    """Appends records to `metrics.jsonl`; opening it drops what is after `step`; None: all.

    Lines that cannot be read are set aside, and steps that are lost are named.
    """

    def __init__(self, path: Path, step: int | None):
        records, damaged = _parse(path)
        kept = [record for record in records if step is not None and record["step"] <= step]
        if step is not None:
            _note_damage(path, damaged, kept, step)
        disk.replace_text(path, "".join(json.dumps(record) + "\n" for record in kept))
        self._file = open(path, "a", encoding="utf-8")  # noqa: SIM115

    def write(self, kind: str, step: int, **values: float) -> None:
        """One line, flushed. Floats are written so that they read back exactly."""
        self._file.write(json.dumps({"kind": kind, "step": step, **values}) + "\n")
        self._file.flush()

    def sync(self) -> None:
        """Returns when every record is on disk, also if the machine stops."""
        os.fsync(self._file.fileno())


def read(path: Path) -> list[dict[str, Any]]:
    """The records of a log; what cannot be read is left out."""
    return _parse(path)[0]


def _parse(path: Path) -> tuple[list[dict[str, Any]], list[bytes]]:
    """The records of a log, and its damaged lines; a last line that a kill cut short is neither."""
    records, damaged = [], []
    for line in path.read_bytes().split(b"\n")[:-1] if path.exists() else []:
        try:
            record = json.loads(line.decode())
            numbers = [record[name] for name in _NUMBERS[record["kind"]]]
            if type(record["step"]) is not int or not all(map(math.isfinite, numbers)):
                raise ValueError
            records.append(record)
        except (ValueError, KeyError, TypeError, RecursionError):
            damaged.append(line)
    return records, damaged


def _note_damage(
    path: Path, damaged: list[bytes], records: list[dict[str, Any]], step: int
) -> None:
    """One line on what of a log up to `step` is gone; what is left of it is beside the log."""
    lost = set(range(1, step + 1)) - {r["step"] for r in records if r["kind"] == "train"}
    words = []
    if damaged:
        aside = path.with_name(f"damaged_{path.name}")
        with open(aside, "ab") as file:
            file.write(b"\n".join([*damaged, b""]))
        words.append(f"{len(damaged)} lines of it cannot be read and are in {aside.name}")
    if lost:
        words.append(f"it has lost the training losses of steps {_ranges(sorted(lost))}")
    if words:
        note(f"{path}: {'; '.join(words)}")


def _ranges(numbers: list[int]) -> str:
    """Ascending numbers as "1-4, 7"."""
    runs = itertools.groupby(enumerate(numbers), lambda pair: pair[1] - pair[0])
    ends = [(run[0][1], run[-1][1]) for run in (list(run) for _, run in runs)]
    return ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in ends)


class ProgressLine:
    """One line: step, train loss, test loss, tokens/s, targets/s, MFU, time left.

    Live on a terminal; elsewhere it is printed at each evaluation. `peak` is the published rate of
    all devices together [bfloat16 FLOP/s]; None: not known, and no MFU.
    """

    def __init__(self, config: TrainConfig, step: int, peak: float | None = None):
        self._config, self._test_loss, self._peak = config, math.nan, peak
        self._flops = sum(step_flops(config).values())
        self._line = f"step {step}/{config.steps}  test {{test:.4f}}"
        quiet = not processes.is_first()
        console = rich.console.Console(stderr=True, highlight=False, quiet=quiet)
        self._live = rich.progress.Progress(
            rich.progress.BarColumn(bar_width=20),
            rich.progress.TextColumn("{task.description}"),
            console=console,
            disable=not console.is_terminal,
            transient=True,
        )
        self._task = self._live.add_task("", total=config.steps, completed=step)

    def __enter__(self) -> "ProgressLine":
        self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        with _terminal_may_be_gone():
            self._live.stop()

    def write(self, kind: str, step: int, **values: float) -> None:
        with _terminal_may_be_gone():
            self._write(kind, step, **values)

    def _write(self, kind: str, step: int, **values: float) -> None:
        if kind == "eval":
            self._test_loss = values[self._config.test_metric]
            self._live.console.print(self._line.format(test=self._test_loss), soft_wrap=True)
            return
        c, rate = self._config, values["tokens_per_second"]
        seconds = c.batch_size * c.model.seq_len / rate
        left = int((c.steps - step) * seconds)
        mfu = f"MFU {self._flops / (seconds * self._peak):.1%}  " if self._peak else ""
        self._line = (
            f"step {step}/{c.steps}  train {values['loss']:.4f}  test {{test:.4f}}  "
            f"{rate:,.0f} tokens/s  {values['targets_per_second']:,.0f} targets/s  {mfu}"
            f"{left // 60}:{left % 60:02d} left"
        )
        line = self._line.format(test=self._test_loss)
        self._live.update(self._task, completed=step, description=line)


@contextlib.contextmanager
def _terminal_may_be_gone() -> Iterator[None]:
    """A run goes on without it."""
    try:
        yield
    except OSError:
        give_up(sys.stderr)


def traced(
    stepping: Iterable[tuple[int, Any, Any]], profiled: range, step: int, folder: Path
) -> Iterator[tuple[int, Any, Any]]:
    """The (step, state, metrics) behind `step`, as they come; of those profiled an XProf trace."""
    iterator, metrics = iter(stepping), None
    yield from itertools.islice(iterator, max(0, profiled.start - step - 1))
    if n := len(range(max(step + 1, profiled.start), profiled.stop)):
        with jax.profiler.trace(str(folder / "profile")):
            for step, state, metrics in itertools.islice(iterator, n):
                yield step, state, metrics
            jax.block_until_ready(metrics)
    yield from iterator


def plot(records: list[dict[str, Any]], vocab_size: int, test_metric: str, path: Path) -> None:
    """Train and test loss, the train loss's rolling standard deviation, and the ln V line."""
    from matplotlib.figure import Figure  # a second to import, and only the end of a run needs it

    train = [(r["step"], r["loss"]) for r in records if r["kind"] == "train"]
    test = [(r["step"], r[test_metric]) for r in records if r["kind"] == "eval"]
    figure = Figure(figsize=(9, 5), layout="constrained")
    losses, spread = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    steps, loss = np.array(train).reshape(-1, 2).T
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
    with disk.replaced(path) as file:
        figure.savefig(file, format="png", dpi=100)


def rolling_std(values: np.ndarray, n: int = ROLLING_STEPS) -> np.ndarray:
    """Standard deviation of the last n values, NaN until there are as many."""
    if len(values) < n:
        return np.full(len(values), math.nan)
    windows = np.lib.stride_tricks.sliding_window_view(values, n)
    return np.concatenate([np.full(n - 1, math.nan), windows.std(axis=1)])


# ---- a command's words, and what a reader needs to judge a measurement --------------------------


def write_json(path: Path, result: Any) -> None:
    """Whole or not at all; null for nan and infinity, which JSON does not know."""
    text = json.dumps(_only_finite(result), indent=1, allow_nan=False)
    disk.replace_text(path, text + "\n")


def _only_finite(tree: Any) -> Any:
    if isinstance(tree, dict):
        return {key: _only_finite(value) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return [_only_finite(value) for value in tree]
    return None if isinstance(tree, float) and not math.isfinite(tree) else tree


def out_folder(name: str) -> Path:
    """The folder of a command's `--out`, made where it lacks. Raises UserError where it cannot."""
    out = Path(name).expanduser()
    with disk_errors("out", name, "name another folder"):
        out.mkdir(parents=True, exist_ok=True)
    return out


def circumstances(program: str, device: str) -> dict[str, Any]:
    """The command as it can be pasted, the commit of the source tree, and the machine.

    `program` is what follows python: "-m jax_model5.bench".
    """
    machine = {
        "device": device,
        "processor": processor(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        **startup.versions(),
    }
    command = shlex.join(["python", *program.split(), *sys.argv[1:]])
    return {"command": command, "commit": commit(), "machine": machine}


@functools.cache
def commit() -> str | None:
    """The commit of this source tree; None outside git, and in a repository of something else."""
    here = Path(__file__).resolve()
    if _git("rev-parse", "--show-toplevel") != str(here.parents[1]):
        return None  # installed somewhere below another project
    if not _git("ls-files", here.name):
        return None  # copied into another project
    return _git("describe", "--always", "--dirty") or None


def _git(*arguments: str) -> str:
    command = ["git", "-C", str(Path(__file__).resolve().parent), *arguments]
    try:
        return subprocess.run(command, capture_output=True, text=True).stdout.strip()
    except OSError:
        return ""


def processor() -> str:
    """The processor's name."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()
