"""The command line of a port: the report on the terminal, as a page, and as an exit code."""

import argparse
import sys
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext

from portproof.ladder import prove
from portproof.port import BadInput, Port

EQUAL, DIFFERS, BAD = 0, 1, 2


def main(
    make: Callable[[], Port], faults: Mapping[str, Callable[[], AbstractContextManager]] = {}
) -> None:
    """Proves the port that `make` makes, under one of the faults if asked; ends the program."""
    parser = argparse.ArgumentParser(allow_abbrev=False)
    if faults:
        parser.add_argument("--fault", choices=faults, help="plant it first")
    parser.add_argument("--html", metavar="FILE", help="write the report as a page")
    parser.add_argument("--steps", type=int, default=5, help="updates (default: 5)")
    parser.add_argument("--dtype", choices=("float64",), help="float64 only")
    options = parser.parse_args()
    planted = getattr(options, "fault", None)
    try:
        with faults[planted]() if planted else nullcontext():
            report = prove(make(), options.steps, float32=not options.dtype)
        print(report)
        if options.html:
            report.html(options.html)
    except BadInput as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(BAD) from None
    raise SystemExit(EQUAL if report.passed else DIFFERS)
