"""Are both models the same, and if not, where do they part? `python -m parity_tests --help`."""

import argparse
import contextlib
import difflib
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from jax_model5.errors import UserError, one_line_errors, require_installed
from parity_tests import beside
from parity_tests.options import parse_args

if __name__ == "__main__":  # before what imports PyTorch and JAX
    with one_line_errors():
        require_installed("torch", "command", "python -m parity_tests")
        is_on_cpu = parse_args(sys.argv[1:]).device == "cpu"
    os.environ["JAX_NUM_CPU_DEVICES"] = "4"  # for the rung of four devices
    if is_on_cpu:
        beside.start()

import portproof
from jax_model5.config import TrainConfig
from parity_tests import drift, faults, ladder, page, report, shared


def main() -> int:
    """0: nothing differs; 1: something does; 2: bad input."""
    with one_line_errors():
        options = parse_args(sys.argv[1:])
        shared.use_device(options.device)
        configs = [report.default_config(dtype) for dtype in ladder.DTYPES]
        fault = fault_named(options.inject)
        configs = [fault.marked(config) for config in configs] if fault else configs
        if options.html:
            write_page(options.html, portproof.Report([], "being measured"), [], [])  # not too late
        with fault.plant() if fault else contextlib.nullcontext():
            return compare(options, configs, fault)


def compare(
    options: argparse.Namespace, configs: list[TrainConfig], fault: faults.Fault | None
) -> int:
    texts, figures = [], []

    def say(text: str) -> None:
        print(text, flush=True)
        texts.append(text)

    rows = list(shown(shared.rows(configs, options.device, fault)))
    found = report.as_report(rows)
    print(found.table(), *found.following(), sep="\n", flush=True)
    verdicts = [found.verdict] if found.first else []
    if options.drift and not any(map(report.is_end, rows)):
        drifts = [drift.measure(configs[0], options.drift, dropout) for dropout in (0.0, 0.1)]
        figures.append(drift.plot(drifts))
        for each in drifts:
            say(str(each))
        verdicts += [str(each) for each in drifts if not each.is_rounding]
    if options.faults:
        verdicts += list(score(say))
    say(report.covered(rows))
    say("; ".join(verdicts) or "no operation differs beyond its tolerance")
    if options.html:
        write_page(options.html, found, texts, figures)
        print(f"written: {options.html}")
    return 1 if verdicts else 0


def shown(rows: Iterator[report.Row]) -> Iterator[report.Row]:
    """On a terminal the last stage that has been measured."""
    for row in rows:
        if sys.stderr.isatty():
            print(
                f"\r\033[Kmeasured, {row.dtype}: {row.stage}", end="", file=sys.stderr, flush=True
            )
        yield row
    if sys.stderr.isatty():
        print("\r\033[K", end="", file=sys.stderr, flush=True)


def score(say: Callable[[str], None]) -> Iterator[str]:
    """Plants each fault; yields those not caught, or not located."""
    located = 0
    for fault in faults.FAULTS:
        with fault.plant():
            row = report.first_difference(fault.marked(report.default_config("float64")))
        found = f"{row.operation}: {row.cause or row.what}" if row else "NOT CAUGHT"
        say(f"{fault.name:36}{fault.side:9}{found}")
        if row and row.operation == fault.operation:
            located += 1
        else:
            yield f"{fault.name}: {found}, planted in {fault.operation}"
    say(f"{len(faults.FAULTS)} faults planted, {located} caught and located")


def write_page(
    name: str, found: portproof.Report, texts: Sequence[str], figures: Sequence[Any]
) -> None:
    try:
        page.write(Path(name).expanduser(), found, texts, figures)
    except (OSError, RuntimeError) as error:  # the second: no such user in ~user
        raise UserError(f"html={name!r}: {error}; name another file") from None


def fault_named(name: str | None) -> faults.Fault | None:
    if name is None:
        return None
    by_name = {fault.name: fault for fault in faults.FAULTS}
    if name == "list":
        print("\n".join(by_name))
        raise SystemExit(0)
    exact = [known for known in by_name if known.casefold() == name.casefold()]
    found = exact or [known for known in by_name if name.casefold() in known.casefold()]
    if len(found) != 1:
        among = found or difflib.get_close_matches(name, by_name, n=1, cutoff=0.0)
        which = f"which of {', '.join(map(repr, among))}?" if found else f"{among[0]!r}?"
        words = (
            "several faults have this in their name;" if found else "no such fault; did you mean"
        )
        raise UserError(f"inject={name!r}: {words} {which} --inject list names all")
    return by_name[found[0]]


if __name__ == "__main__":
    os._exit(main())  # to take down what was traced is most of a second
