"""The verdict: every comparison, in order, and the first that differs."""

import dataclasses
from typing import Any

import numpy as np

FLOAT64_TOLERANCE = 1e-12
FACTOR, FLOOR = 8.0, 2.0**-22  # of float32's law, `own_rounding`


def relative(found: Any, expected: Any) -> float:
    """||found - expected|| / ||expected|| in float64; inf where the shapes differ."""
    found, expected = np.asarray(found, np.float64), np.asarray(expected, np.float64)
    if found.shape != expected.shape:
        return np.inf
    both = (found == expected) & (np.abs(expected) > 1e29)  # a mask's -inf, or as good as that
    found, expected = np.where(both, 0, found), np.where(both, 0, expected)
    return float(np.linalg.norm(found - expected) / (np.linalg.norm(expected) or 1.0))


def own_rounding(own: np.ndarray) -> list[tuple[float, float]]:
    """An (error, tolerance) for each place of a rung, from both sides' distances from float64.

    In float64 the sides are equal. To prove is that neither rounds more than the other: at most
    FACTOR times its largest of the rung (at one place chance rules), or FLOOR, a few bits.
    """
    largest = np.where(np.isfinite(own), own, 0).max(axis=0)  # what is not finite allows nothing
    allowed = FACTOR * np.maximum(largest[::-1], FLOOR)
    worse = (own / allowed).argmax(axis=1)  # NaN is the largest
    return [(float(errors[i]), float(allowed[i])) for errors, i in zip(own, worse, strict=True)]


@dataclasses.dataclass(frozen=True)
class Row:
    """One comparison; `after` is the place before it, or what makes the gradient."""

    rung: str
    dtype: str
    place: str
    error: float
    tolerance: float
    after: str = ""
    note: str = ""

    @property
    def passed(self) -> bool:
        return self.error <= self.tolerance  # NaN fails

    @property
    def excess(self) -> float:
        """The error in tolerances; what is no number is infinite."""
        return float(np.nan_to_num(self.error / (self.tolerance or 1.0), nan=np.inf))

    def __str__(self) -> str:
        where = f"; equal up to {self.after}" if self.after else ""
        if self.culprit != self.place:
            where = f": the gradient of {self.place}"
        note = f" ({self.note})" if self.note else ""
        return (
            f"{self.culprit} [{self.rung}, {self.dtype}]: error {self.error:.1e}, tolerance "
            f"{self.tolerance:.1e}{note}{where}"
        )

    @property
    def culprit(self) -> str:
        """What is to blame if this is first; a gradient is made by the operation after it."""
        return f"{self.after}, backward" if self.rung.endswith("backward") else self.place


@dataclasses.dataclass
class Report:
    """All rows; `stopped` is the message of a model that raised."""

    rows: list[Row]
    stopped: str = ""

    @property
    def first(self) -> Row | None:
        return next((row for row in self.rows if not row.passed), None)

    @property
    def passed(self) -> bool:
        return not self.stopped and self.first is None

    @property
    def verdict(self) -> str:
        first = f"first difference: {self.first}" if self.first else ""
        stop = f"stopped in {self.stopped}" if self.stopped else ""
        return "; ".join(filter(None, (first, stop))) or "equal at every place"

    def __str__(self) -> str:
        return "\n".join([self.table(), self.verdict, *self.following()])

    def table(self) -> str:
        """A line for each rung and dtype: the worst of its places."""
        width = max([21, *(len(row.rung) + 2 for row in self.rows)])
        lines = [f"{'rung':{width}}{'dtype':9}{'places':>7}{'differ':>7}  worst error at"]
        for (rung, dtype), rows in self.groups().items():
            worst = max(rows, key=lambda row: row.excess)
            differ = sum(not row.passed for row in rows)
            lines.append(
                f"{rung:{width}}{dtype:9}{len(rows):7}{differ or '':>7}  {worst.error:.1e} of "
                f"{worst.tolerance:.1e}, {worst.place}"
            )
        for (_, dtype), rows in self.groups().items():
            if losses := [f"{r.error:.0e}" for r in rows if r.place.startswith("loss of state")]:
                lines.append(f"drift of the loss, {dtype}: {' '.join(losses)}")
        return "\n".join(lines)

    def following(self) -> list[str]:
        """What differs after the first, in one line; none where nothing does."""
        rows = [row for row in self.rows if not row.passed and row is not self.first]
        places = list(dict.fromkeys(row.place for row in rows))
        named = ", ".join(places[:4] + [f"... and {len(places) - 4} places"] * (len(places) > 4))
        return [f"what follows: {len(rows)} more, {named}"] if rows else []

    def groups(self) -> dict[tuple[str, str], list[Row]]:
        groups: dict[tuple[str, str], list[Row]] = {}
        for row in self.rows:
            groups.setdefault((row.rung, row.dtype), []).append(row)
        return groups
