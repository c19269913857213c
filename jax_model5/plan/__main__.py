"""What a run costs on chips that are not here; `python -m jax_model5.plan --chips v5e:4x4`."""

import argparse
import dataclasses
import sys
from collections.abc import Callable, Sequence

from jax_model5 import record
from jax_model5.config import TrainConfig, parse
from jax_model5.errors import ArgumentParser, UserError, one_line_errors, require
from jax_model5.plan import costs, report, search
from jax_model5.plan.chips import Chips, compiler_is_here, parse_chips
from jax_model5.plan.compiled import DoesNotFit, compile_for
from jax_model5.plan.measure import measure
from jax_model5.startup import leave_absent_chips_alone, note, set_up_jax


def parse_args(args: Sequence[str]) -> tuple[argparse.Namespace, TrainConfig]:
    """Our options, and the run's config from all others."""
    parser = ArgumentParser(prog="python -m jax_model5.plan", description=__doc__)
    chips = "v5e:4x4, v5p:2x2x1, h100:8, ...; repeat it to compare; all other keys are the run's"
    parser.add_argument("--chips", action="append", default=[], help=chips)
    parser.add_argument("--price", type=float, help="of one chip for an hour, in any money")
    ways = parser.add_mutually_exclusive_group()
    others = "meshes x remat x accumulate x batch that fit, by what a token costs"
    ways.add_argument("--search", action="store_true", help=others)
    ways.add_argument("--sweep", choices=["chips"], help="one chip of the kind, and more, up to")
    here = "planned against measured on the device that is here; no --chips"
    parser.add_argument("--measure", action="store_true", help=here)
    folder = "folder of plan.json and plan.png; default runs/plan"
    parser.add_argument("--out", default="runs/plan", help=folder)
    options, rest = parser.parse_known_args(args)
    options.chips = [parse_chips(text) for text in options.chips]
    if bool(options.chips) == options.measure:
        raise UserError("chips: name some, such as --chips v5e:2x2, or give --measure alone")
    if (options.search or options.sweep) and len(options.chips) != 1:
        raise UserError("chips: --search and --sweep want one --chips")
    if options.search and (command := compiler_is_here(options.chips[0])):
        raise UserError(f"search: no compiler for {options.chips[0].name} here; {command}")
    if options.price is not None and options.price < 0:
        raise UserError(f"price={options.price}: must not be negative")
    return options, parse(rest, "jax_model5.plan")


def main() -> int:
    """0: each of them fits; 1: one does not, or nothing does; 2: bad input."""
    with one_line_errors():
        options, config = parse_args(sys.argv[1:])
        if options.measure:
            return _measure(options, config)
        leave_absent_chips_alone()
        plans, plot = _plans(options, config)
        out = record.out_folder(options.out)
        found = record.circumstances("-m jax_model5.plan", "none: compiled only")
        record.write_json(out / "plan.json", found | {"plans": plans})
        plot(plans, out / "plan.png")
        report.show(plans, options.price)
        if options.sweep:
            report.show_sweep(plans)
        if not options.search and not options.sweep:
            _suggest(options.chips, config, plans)
        print("A floor is what no step can be faster than; a real one is slower.")
        print(f"written: {out / 'plan'}.json and .png")
        fit = [plan.get("fits") is not False for plan in plans]
    return int(not options.sweep and not (fit and all(fit)))


def _plans(options: argparse.Namespace, config: TrainConfig) -> tuple[list[search.Plan], Callable]:
    """What is asked for, and how it is drawn."""
    if options.search:
        return search.search(options.chips[0], config, plan_for), report.plot_frontier
    if options.sweep:
        return search.sweep(options.chips[0], config, plan_for), report.plot_sweep
    return [plan_for(chips, config) for chips in options.chips], report.plot


def _suggest(all_chips: Sequence[Chips], config: TrainConfig, plans: Sequence[search.Plan]) -> None:
    """A line on each that does not fit."""
    for chips, found in zip(all_chips, plans, strict=True):
        if found.get("fits") is False:
            needs = f"{found['memory']['total'] / 1e9:.1f} GB of {chips.chip.memory / 1e9:.0f}"
            change = search.nearest_that_fits(chips, split_over(chips, config), plan_for)
            words = "and no mesh, remat or accumulation does"
            if change:
                keys, other = change
                words = f"with {keys} it needs {other['memory']['total'] / 1e9:.1f} GB and fits"
            print(f"{chips.name}: needs {needs}; {words}")


def _measure(options: argparse.Namespace, config: TrainConfig) -> int:
    set_up_jax(config)
    found = measure(config)
    out = record.out_folder(options.out)
    about = record.circumstances("-m jax_model5.plan", found["device"])
    record.write_json(out / "measured.json", about | found)
    report.show_measured(found)
    print(f"written: {out / 'measured.json'}")
    return 0


def plan_for(chips: Chips, config: TrainConfig) -> search.Plan:
    """What XLA's compiler says of the step on these chips, or, where it is not here, the formulas.

    Raises:
      UserError: the mesh does not fit the chips, or XLA knows none such.
    """
    config = split_over(chips, config)
    if command := compiler_is_here(chips):
        note(f"{chips.name}: no compiler for it here, so FLOPs and state only; {command}")
        return costs.by_hand(config, chips)
    note(f"{chips.name}: compiling the training step{report.settings(config)}")
    try:
        memory, text = compile_for(chips, config)
    except DoesNotFit as error:
        return costs.by_hand(config, chips, error.temporaries)
    return costs.plan(config, chips, memory, text)


def split_over(chips: Chips, config: TrainConfig) -> TrainConfig:
    """The config with the next batch that splits over the mesh, and a line where it is another.

    Raises:
      UserError: the mesh has more devices than there are chips.
    """
    needed = max(config.mesh.data, 1) * config.mesh.fsdp
    fix = f"a mesh of {needed} devices, but {chips.name} has {chips.n}; use a smaller one"
    require(needed <= chips.n, "mesh.fsdp", config.mesh.fsdp, fix)
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
