"""The command line of the report, which imports neither framework."""

import argparse
from collections.abc import Sequence

from jax_model5.errors import ArgumentParser, UserError


def parse_args(args: Sequence[str]) -> argparse.Namespace:
    question = "Are both models the same, and if not, where do they part?"
    parser = ArgumentParser(prog="python -m parity_tests", description=question)
    devices = "where JAX runs (PyTorch stays on the CPU); default cpu"
    parser.add_argument("--device", choices=["cpu", "gpu", "tpu"], default="cpu", help=devices)
    parser.add_argument(
        "--inject", metavar="FAULT", help="plant a fault first; list: name them all"
    )
    parser.add_argument("--faults", action="store_true", help="plant each, say what is caught")
    parser.add_argument("--drift", type=int, metavar="N", help="also train both for N steps")
    parser.add_argument("--html", metavar="FILE", help="also write the report as one page")
    options = parser.parse_args(args)
    if options.drift is not None and options.drift < 1:
        raise UserError(f"drift={options.drift}: must be at least 1 step")
    return options
