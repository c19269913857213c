"""Configs trained to one budget and compared; `python -m jax_model5.compare A.yaml B.yaml`."""

import argparse
import contextlib
import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

from jax_model5 import disk, record, tokenizer
from jax_model5.compare import heterogeneity, measure, plan, report, summary
from jax_model5.compare.plan import Run
from jax_model5.config import TrainConfig, to_yaml
from jax_model5.corpus import Corpus, load_corpus
from jax_model5.errors import (
    ArgumentParser,
    UserError,
    disk_errors,
    one_line_errors,
    require,
    require_at_least_1,
)
from jax_model5.losses import n_last
from jax_model5.startup import note, set_up_jax
from jax_model5.train import Outcome, train


def parse_args(args: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """The options, and the --key value pairs for every config."""
    parser = ArgumentParser(
        prog="python -m jax_model5.compare",
        description=__doc__,
        epilog="Any other --key value is a key of the configs and holds for all of them.",
    )
    parser.add_argument("configs", nargs="+", metavar="CONFIG.yaml", help="what is compared")
    parser.add_argument("--seeds", type=int, default=3, help="runs of each config; default 3")
    budget = f"KIND=N, KIND of {', '.join(plan.BUDGETS)}; default: each config's own steps"
    parser.add_argument("--budget", help=budget)
    parser.add_argument("--out", required=True, help="folder of the runs and the page")
    windows = "windows for the gradient noise, 0: do not measure it; default 256"
    parser.add_argument("--noise_windows", type=int, default=256, help=windows)
    options, rest = parser.parse_known_args(args)
    require_at_least_1(options, "seeds")
    n, least = options.noise_windows, measure.NOISE_WINDOWS
    fits = n == 0 or (n >= least and n % 8 == 0)
    require(fits, "noise_windows", n, f"must be 0 or a multiple of 8, at least {least}")
    return options, rest


def main() -> None:
    with one_line_errors():
        options, overrides = parse_args(sys.argv[1:])
        record.commit()  # as it is now, whatever is edited while the runs go on
        budget = plan.parse_budget(options.budget)
        configs = plan.read_configs(options.configs, overrides)
        out = Path(options.out).expanduser()
        runs = plan.make_runs(configs, options.seeds, budget, out)
        corpora = {name: load_corpus(config) for name, config in configs.items()}
        record.out_folder(options.out)
        train_all(runs, out)
        figures = measure_all(runs, corpora, options.noise_windows, out)
        costs = {name: plan.cost_of_step(config) for name, config in configs.items()}
        result = {
            **record.circumstances("-m jax_model5.compare", jax.devices()[0].device_kind),
            "budget": options.budget,
            "configs": {name: dataclasses.asdict(config) for name, config in configs.items()},
            "steps": {run.name: run.config.steps for run in runs},
            "cost_of_step": costs,
            "corpora": statistics_of(configs, corpora),
            "runs": figures,
            "summary": summary.summarize(figures, costs),
            "levels": summary.levels(figures),
        }
        report.write(result, {run.label: measure.seconds(run) for run in runs}, out)
        record.write_json(out / "results.json", result)
        print(report.first_rows(result))
        print(f"written: {out}/index.html, its plots, and results.json")


def train_all(runs: Sequence[Run], out: Path) -> None:
    """Trains what is not finished, one run after the other.

    Raises:
      UserError: runs diverged; SystemExit where a signal stopped one, which is saved.
    """
    diverged = []
    for index, run in enumerate(runs, 1):
        note(f"run {index}/{len(runs)}: {run.label}, {run.config.steps} steps")
        set_up_jax(run.config)
        if jax.process_count() > 1:
            raise UserError("JAX_NUM_PROCESSES: a comparison is of one process; unset it")
        with (
            disk_errors("out", str(out), "make room or name another folder"),
            open(out / "train.log", "a") as log,
            contextlib.redirect_stdout(log),
        ):
            outcome = train(run.config)
        if outcome == Outcome.DIVERGED:
            diverged.append(run.label)
        elif outcome == Outcome.STOPPED:
            note("stopped and saved; the same command goes on")
            raise SystemExit(0)
    if diverged:
        raise UserError(
            f"optimizer.learning_rate: {', '.join(diverged)} diverged; lower it or leave that "
            f"config out. The other runs are kept in {out}"
        )


def measure_all(
    runs: Sequence[Run], corpora: dict[str, Corpus], n_windows: int, out: Path
) -> dict[str, list[dict[str, Any]]]:
    """{config: [each seed's figures]}; what was measured before is read again."""
    ns = sorted({1, runs[0].config.model.seq_len, *(n_last(run.config) for run in runs)})
    figures = {run.label: measure_run(run, corpora[run.name], n_windows, ns, out) for run in runs}
    for judge in runs:
        set_up_jax(judge.config)
        for run in runs:
            if run.config.seed == judge.config.seed:
                prompts = measure.prompts(run, corpora[run.name])
                nll = measure.nll_of_samples(judge, figures[run.label]["text"]["samples"], prompts)
                figures[run.label].setdefault("judged_by", {})[judge.name] = nll
    return {name: [figures[r.label] for r in runs if r.name == name] for name in corpora}


def measure_run(
    run: Run, corpus: Corpus, n_windows: int, ns: Sequence[int], out: Path
) -> dict[str, Any]:
    path = out / "figures" / f"{run.label}.json"
    asked = {"config": to_yaml(run.config), "noise_windows": n_windows, "ns": list(ns)}
    if path.exists():
        known = json.loads(path.read_text())
        if known.pop("asked") == asked:
            return known
    note(f"measuring {run.label}")
    set_up_jax(run.config)
    encoding = tokenizer.load(run.config.data.tokenizer)
    figures = {
        "seed": run.config.seed,
        **measure.curves(run),
        "noise": measure.gradient_noise(run, corpus, n_windows, ns) if n_windows else {},
        "gap": measure.gap(run, corpus),
        "text": measure.samples_and_quality(run, corpus, encoding),
        "documents": measure.documents(run, corpus, encoding.eot_token),
    }
    path.parent.mkdir(exist_ok=True)
    disk.replace_text(path, json.dumps({"asked": asked, **figures}))
    return json.loads(json.dumps(figures))  # the same types, measured now or before


def statistics_of(
    configs: dict[str, TrainConfig], corpora: dict[str, Corpus]
) -> dict[str, dict[str, Any]]:
    """The figures of each config's text, computed once for each text."""
    known: dict[tuple[str, int], dict[str, float]] = {}
    found = {}
    for name, text in corpora.items():
        key = text.fingerprint, text.n_train
        if key not in known:
            encoding = tokenizer.load(configs[name].data.tokenizer)
            known[key] = heterogeneity.statistics(text, encoding)
        found[name] = {"source": configs[name].data.source, **known[key]}
    return found


if __name__ == "__main__":
    main()
