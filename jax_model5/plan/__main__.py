"""What a run costs on chips that are not here; `python -m jax_model5.plan --chips v5e:4x4`."""

import argparse
import dataclasses
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jax_model5 import record
from jax_model5.config import TrainConfig, parse
from jax_model5.errors import ArgumentParser, UserError, one_line_errors
from jax_model5.plan import costs, report
from jax_model5.plan.chips import Chips, compiler_is_here, parse_chips
from jax_model5.plan.compiled import compile_for
from jax_model5.startup import leave_absent_chips_alone, note


def parse_args(args: Sequence[str]) -> tuple[argparse.Namespace, TrainConfig]:
    """Our options, and the run's config from all others."""
    parser = ArgumentParser(prog="python -m jax_model5.plan", description=__doc__)
    chips = "v5e:4x4, v5p:2x2x1, h100:8, ...; repeat it to compare; all other keys are the run's"
    parser.add_argument("--chips", action="append", required=True, help=chips)
    parser.add_argument("--price", type=float, help="of one chip for an hour, in any money")
    folder = "folder of plan.json and plan.png; default runs/plan"
    parser.add_argument("--out", default="runs/plan", help=folder)
    options, rest = parser.parse_known_args(args)
    options.chips = [parse_chips(text) for text in options.chips]
    if options.price is not None and options.price < 0:
        raise UserError(f"price={options.price}: must not be negative")
    return options, parse(rest, "jax_model5.plan")


def main() -> int:
    """0: each of them fits; 1: one does not; 2: bad input."""
    with one_line_errors():
        options, config = parse_args(sys.argv[1:])
        leave_absent_chips_alone()
        plans = [plan_for(chips, config) for chips in options.chips]
        out = record.out_folder(options.out)
        found = record.circumstances("-m jax_model5.plan", "none: compiled only")
        record.write_json(out / "plan.json", found | {"plans": plans})
        report.plot(plans, out / "plan.png")
        report.show(plans, options.price)
        print("A floor is what no step can be faster than; a real one is slower.")
        print(f"written: {out / 'plan'}.json and .png")
    return int(any(plan.get("fits") is False for plan in plans))


def plan_for(chips: Chips, config: TrainConfig) -> dict[str, Any]:
    config = split_over(chips, config)
    if command := compiler_is_here(chips):
        note(f"{chips.name}: no compiler for it here, so FLOPs and state only; {command}")
        return costs.by_hand(config, chips)
    note(f"{chips.name}: compiling the training step")
    with tempfile.TemporaryDirectory() as scratch:
        memory = compile_for(chips, config, Path(scratch))
        return costs.plan(config, chips, memory, Path(scratch))


def split_over(chips: Chips, config: TrainConfig) -> TrainConfig:
    """The config with the next batch that splits over the mesh, and a line where it is another."""
    n = config.mesh.data * config.mesh.fsdp or chips.n
    unit = n * config.accumulate
    batch_size = -(-config.batch_size // unit) * unit
    if batch_size == config.batch_size:
        return config
    given = f"batch_size={config.batch_size} does not split over {n} chips"
    note(f"{chips.name}: {given}; planned with {batch_size}")
    return dataclasses.replace(config, batch_size=batch_size)


if __name__ == "__main__":
    sys.exit(main())
