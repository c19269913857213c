"""The command line of a port: the report on the terminal, as a page, and as an exit code."""

import argparse
import sys
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import NoReturn

from portproof.ladder import prove
from portproof.page import page
from portproof.port import BadInput, Port


class Parser(argparse.ArgumentParser):  # its errors are one line, as all bad input is
    def error(self, message: str) -> NoReturn:
        raise BadInput(message)


def main(
    make: Callable[[], Port], faults: Mapping[str, Callable[[], AbstractContextManager]] = {}
) -> None:
    """Proves the port and ends the program: 0 equal, 1 different, 2 bad input."""
    try:
        options = _options(faults)
        if options.html and not Path(options.html).parent.is_dir():  # not after minutes
            raise BadInput(f"--html {options.html}: no such folder; make it")
        with faults[options.fault]() if options.fault else nullcontext():
            report = prove(make(), options.steps, float32=not options.dtype)
        print(report)
        if options.html:
            Path(options.html).write_text(page(report), encoding="utf-8")
    except (BadInput, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    raise SystemExit(0 if report.passed else 1)


def _options(faults: Mapping) -> argparse.Namespace:
    parser = Parser(allow_abbrev=False)
    parser.add_argument("--fault", choices=faults, help="plant it first")
    parser.add_argument("--html", metavar="FILE", help="write the report as a page")
    parser.add_argument("--steps", type=int, default=5, help="updates (default: 5)")
    parser.add_argument("--dtype", choices=("float64",), help="float64 only")
    options = parser.parse_args()
    if options.steps < 1:
        parser.error(f"argument --steps: {options.steps} is no update; take 1 or more")
    return options
