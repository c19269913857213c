"""Programs in processes of their own, timed in turn, and the statistics of their times."""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from typing import Any

from jax_model5.config import UserError

_LOSS_TOLERANCE = 0.05  # nats; fresh weights give ln V within 0.01, whatever their seed


class Program:
    """A child process that answers `step N`, `eval N`, ... with the seconds of N runs.

    Raises UserError, with the child's last words, where it ends before it answers.
    """

    def __init__(self, name: str, command: Sequence[str], environment: Mapping[str, str]):
        self.name = name
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115  # closed by `end`
        start = time.perf_counter()
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            env={**os.environ, **environment},
        )
        self.about = self._answer()
        self.first_step_s = time.perf_counter() - start

    def ask(self, kind: str, count: int) -> dict[str, Any]:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(f"{kind} {count}\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # the answer tells why
        return self._answer()

    def end(self) -> None:
        if self._process.poll() is None:
            self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout, self._errors):
            stream.close()  # type: ignore[union-attr]

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith("{"):  # anything else is the library's talk
                return json.loads(line)
        code = self._process.wait()
        self._errors.seek(0)
        words = self._errors.read().strip().splitlines() or ["no words"]
        self.end()
        raise UserError(f"{self.name} ended with exit code {code}: {words[-1]}")


def in_turn(programs: Sequence[Program], rounds: int, steps: int) -> dict[str, dict[str, Any]]:
    """A B A B ...: `steps` steps of each program in each round, by the program's name.

    Every result holds `rounds`, a list of lists of seconds, and `peak_bytes`.
    """
    results: dict[str, dict[str, Any]] = {p.name: {"rounds": []} for p in programs}
    for index in range(rounds):
        for program in programs:
            answer = program.ask("step", steps)
            results[program.name]["rounds"].append(answer["seconds"])
            results[program.name]["peak_bytes"] = answer["peak_bytes"]
            middle = statistics.median(answer["seconds"])
            say(f"round {index + 1}/{rounds}  {program.name}: {middle:.4g} s a step")
    return results


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def summary(seconds: Sequence[float]) -> dict[str, float]:
    """Median and quartiles [s] of at least one time."""
    if len(seconds) == 1:
        return {"median": seconds[0], "q1": seconds[0], "q3": seconds[0], "n": 1}
    q1, median, q3 = statistics.quantiles(seconds, n=4, method="inclusive")
    return {"median": median, "q1": q1, "q3": q3, "n": len(seconds)}


def ratio(ours: Sequence[Sequence[float]], theirs: Sequence[Sequence[float]]) -> dict[str, Any]:
    """How many times faster we are: the medians' ratio of each round, then over the rounds."""
    pairs = zip(ours, theirs, strict=True)
    each = [statistics.median(b) / statistics.median(a) for a, b in pairs]
    return {"rounds": each, "median": statistics.median(each), "min": min(each), "max": max(each)}


def fraction(achieved: float, peak: float, of: str) -> float:
    """achieved / peak. Raises UserError above 1: then one of the two was not measured well."""
    if achieved > peak:
        raise UserError(
            f"{achieved:.3g} FLOP/s is more than the {peak:.3g} of {of}: a measurement error; "
            "leave the machine alone and measure again"
        )
    return achieved / peak


def require_equal_losses(losses: Mapping[str, float]) -> None:
    """Raises UserError where the first losses show that the programs do not do the same work."""
    (first, expected), *others = losses.items()
    for name, loss in others:
        if not abs(loss - expected) <= _LOSS_TOLERANCE:
            raise UserError(
                f"the losses of step 0 differ: {expected:.4f} in {first}, {loss:.4f} in {name}: "
                "these programs do not do the same work"
            )
