"""Programs in processes of their own, timed in turn, and the statistics of their times."""

import contextlib
import json
import os
import re
import statistics
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from typing import Any

from jax_model5.errors import UserError
from jax_model5.startup import note

# Difference of two programs' losses at the same weights [nats]. Measured on a CPU: 2e-6 in float32
# and 4e-5 in bfloat16; on a GPU float32 may mean TF32.
LOSS_TOLERANCE = {"float64": 1e-9, "float32": 1e-4, "bfloat16": 1e-3}
# A Python traceback's last line, or our own one-line error; notes may follow it.
_LAST_WORDS = re.compile(r"^(error:|[\w.]+(Error|Exception|Interrupt)\b).*")


class Program:
    """A child process that answers `step N`, `eval N`, ... (see measure.py).

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

    def ask(self, kind: str, argument: object) -> dict[str, Any]:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(f"{kind} {argument}\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # the answer tells why
        return self._answer()

    def end(self) -> None:
        if self._process.poll() is None:
            self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout, self._errors):
            with contextlib.suppress(BrokenPipeError):  # what it was not able to read any more
                stream.close()  # type: ignore[union-attr]

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith("{"):  # anything else is the library's talk
                return json.loads(line)
        code = self._process.wait()
        self._errors.seek(0)
        lines = self._errors.read().strip().splitlines() or ["no words"]
        self.end()
        words = [line for line in lines if _LAST_WORDS.match(line)] or lines
        raise UserError(f"{self.name} ended with exit code {code}: {words[-1]}")


def in_turn(
    programs: Sequence[Program], rounds: int, requests: Mapping[str, Mapping[str, object]]
) -> dict[str, dict[str, Any]]:
    """A B A B ...: in each round each program answers its `requests`, {name: {kind: its argument}}.

    Returns by name, by kind, a list of each round's seconds; and `peak_bytes` after the steps.
    """
    results: dict[str, dict[str, Any]] = {p.name: {} for p in programs}
    for index in range(rounds):
        for program in programs:
            for kind, count in requests[program.name].items():
                answer = program.ask(kind, count)
                results[program.name].setdefault(kind, []).append(answer["seconds"])
                if kind == "step":
                    results[program.name]["peak_bytes"] = answer["peak_bytes"]
            first = next(iter(requests[program.name]))
            middle = statistics.median(results[program.name][first][-1])
            note(f"round {index + 1}/{rounds}  {program.name}: {middle:.4g} s a {first}")
    return results


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


def require_one_device(program: Program) -> None:
    """Raises UserError where our program uses more devices than a peer would."""
    if program.about["n_devices"] > 1:
        raise UserError("peer: a peer uses one device; show our program one as well")


def require_equal_losses(losses: Mapping[str, float], dtype: str) -> None:
    """Raises UserError where losses at the same weights show that the work is not the same."""
    (first, expected), *others = losses.items()
    for name, loss in others:
        if not abs(loss - expected) <= LOSS_TOLERANCE[dtype]:
            raise UserError(
                f"the losses at the same weights differ: {expected:.6f} in {first}, {loss:.6f} in "
                f"{name}: these programs do not do the same work"
            )
