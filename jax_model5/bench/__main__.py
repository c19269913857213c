"""How fast this machine trains Model 5; `python -m jax_model5.bench --case small --peer tuned`."""

import argparse
import dataclasses
import itertools
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

from jax_model5 import record
from jax_model5.bench import cases, measure, report
from jax_model5.bench.generation import TEXT_PEERS, measure_generation
from jax_model5.bench.peers import course, ended, flax, ours, transformers, tuned
from jax_model5.bench.rounds import (
    Program,
    fraction,
    in_turn,
    ratio,
    require_equal_losses,
    require_one_device,
    summary,
)
from jax_model5.config import TrainConfig
from jax_model5.corpus import load_corpus
from jax_model5.errors import (
    ArgumentParser,
    UserError,
    one_line_errors,
    require,
    require_at_least_1,
    require_installed,
)
from jax_model5.flops import peak_bfloat16, step_flops
from jax_model5.losses import n_last
from jax_model5.startup import note

STEP_PEERS = ("course", "tuned", "flax", "transformers")
_NEEDS = {
    "course": ["torch"],
    "tuned": ["torch"],
    "flax": [],
    "transformers": ["torch", "transformers"],
    "compiled_transformers": ["torch", "transformers"],
    "ctranslate2": ["ctranslate2"],
}
_EVALS, _MATMULS = 3, 10


def _parser() -> argparse.ArgumentParser:
    parser = ArgumentParser(prog="python -m jax_model5.bench", description=__doc__)
    parser.add_argument(
        "--case", default="small", help="small, model5, or a config file; default small"
    )
    knob = "in place of the case's own"
    parser.add_argument("--objective", choices=["final_token", "all_tokens"], help=knob)
    parser.add_argument("--gelu", choices=["erf", "tanh"], help=knob)
    parser.add_argument("--remat", choices=["none", "dots", "full"], help=knob)
    parser.add_argument("--batch", type=int, help=f"sequences of a step, {knob}; or texts, else 1")
    parser.add_argument("--accumulate", type=int, help=f"micro-batches a step, {knob}")
    dtypes = "repeat it to measure each; default: the case's own"
    parser.add_argument("--dtype", action="append", choices=["float32", "bfloat16"], help=dtypes)
    peers = "time another too: PyTorch as the course writes it, the fastest we know, plain Flax"
    peers += ", GPT-2 of transformers, and for texts CTranslate2; repeat it for more"
    names = [*dict.fromkeys((*STEP_PEERS, *TEXT_PEERS))]
    parser.add_argument("--peer", action="append", default=[], choices=names, help=peers)
    text = "time the writing of a text of 200 tokens instead"
    parser.add_argument("--generate", action="store_true", help=text)
    parser.add_argument("--prompt", type=int, default=16, help="tokens before a text; default 16")
    parser.add_argument("--sweep", choices=list(cases.SWEEPS), help="cost against this, no peers")
    rounds = "times that each program has its turn; default 5"
    parser.add_argument("--rounds", type=int, default=5, help=rounds)
    steps = "steps in a row that one turn times; default 3"
    parser.add_argument("--steps", type=int, default=3, help=steps)
    folder = "folder of the JSON and PNG; default runs/bench"
    parser.add_argument("--out", default="runs/bench", help=folder)
    return parser


def parse_args(args: Sequence[str]) -> argparse.Namespace:
    options = _parser().parse_args(args)
    given = [name for name in ("batch", "accumulate") if getattr(options, name) is not None]
    require_at_least_1(options, "rounds", "steps", "prompt", *given)
    for name in ("accumulate", "batch") if options.sweep == "batch" else ():
        value = getattr(options, name)
        require(value is None, name, value, "the batch is swept without it")
    if options.peer and options.sweep:
        raise UserError(f"sweep={options.sweep!r}: a sweep has no peers; leave out --peer")
    if options.generate and options.sweep:
        raise UserError("generate: leave out --sweep")
    what, allowed = ("a text", [*TEXT_PEERS]) if options.generate else ("a step", [*STEP_PEERS])
    for peer in options.peer:
        require(peer in allowed, "peer", peer, f"{what} has the peers {', '.join(allowed)}")
        for package in _NEEDS[peer]:
            require_installed(package, "peer", peer)
    return options


def main() -> None:
    # Several programs share the device: none of them may take all its memory at its start.
    os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"
    with one_line_errors():
        options = parse_args(sys.argv[1:])
        config = configure(options, platform_of_jax())
        out = record.out_folder(options.out)
        corpus = load_corpus(config)  # tokenized before any clock runs
        if options.generate:
            require_prompts(options, config, len(corpus.tokens_T))
        record.commit()  # as it is now, whatever is edited while it runs
        with tempfile.TemporaryDirectory() as scratch:
            measure_it = sweep if options.sweep else write_text if options.generate else compare
            result = measure_it(options, config, Path(scratch))
        name = file_name(options, config)
        record.write_json(out / f"{name}.json", result)
        if options.sweep:
            report.plot_sweep(result, out / f"{name}.png")
        elif options.generate:
            report.print_generation(result)
            report.plot_programs(result, out / f"{name}.png", "seconds")
        else:
            report.print_table(result)
            report.plot_programs(result, out / f"{name}.png", "step")
        print(f"written: {out / name}.json and .png")


def platform_of_jax() -> str:
    """cpu, gpu or tpu; asked in a process that ends, because a TPU serves one process at a time."""
    script = (
        "import jax; from jax_model5.startup import leave_absent_chips_alone as leave; leave(); "
        "print(jax.default_backend())"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    if done.returncode:
        raise UserError(f"no device: {done.stderr.strip().splitlines()[-1]}; check JAX_PLATFORMS")
    return done.stdout.split()[-1]


def configure(options: argparse.Namespace, platform_name: str) -> TrainConfig:
    config = cases.case(options.case, platform_name)
    dtypes = options.dtype or [config.model.dtype]
    if len(dtypes) > 1 and (options.sweep or options.generate or platform_name == "tpu"):
        raise UserError(
            f"dtype={dtypes[1]!r}: a sweep, a text and a TPU take one --dtype at a time"
        )
    fields = {name: getattr(options, name) for name in ("objective", "accumulate")}
    fields["batch_size"] = None if options.generate else options.batch
    config = dataclasses.replace(config, **{k: v for k, v in fields.items() if v is not None})
    knobs = {"dtype": dtypes[0], "gelu": options.gelu, "remat": options.remat}
    return cases.with_model(config, **{k: v for k, v in knobs.items() if v is not None})


def file_name(options: argparse.Namespace, config: TrainConfig) -> str:
    """Case and objective, and every knob of the model that was turned."""
    knobs = [Path(options.case).stem, config.objective, *(options.dtype or [])]
    knobs += [f"gelu_{options.gelu}"] if options.gelu else []
    knobs += [f"remat_{options.remat}"] if options.remat else []
    knobs += [f"batch_{options.batch}"] if options.batch else []
    knobs += [f"accumulate_{options.accumulate}"] if options.accumulate else []
    knobs += [f"sweep_{options.sweep}"] if options.sweep else []
    knobs += [f"generate_{options.prompt}"] if options.generate else []
    return "_".join(knobs)


def compare(options: argparse.Namespace, config: TrainConfig, scratch: Path) -> dict[str, Any]:
    """Our program in each dtype, and the peers, round by round."""
    dtypes = options.dtype or [config.model.dtype]
    programs: list[Program] = []
    cold: dict[str, dict[str, float]] = {}
    weights = {dtype: str(scratch / f"{dtype}.npz") for dtype in dtypes}
    with ended(programs):
        for dtype in dtypes:
            programs.append(ours(config, dtype, scratch))
            cold[programs[-1].name] = cold_start(programs[-1], weights[dtype])
            programs[-1] = ours(config, dtype, scratch)
            note(f"{programs[-1].name}: warm start, {programs[-1].first_step_s:.1f} s")
        if options.peer:
            require_one_device(programs[0])
        if "course" in options.peer:
            programs.append(course(config, dtypes[0], scratch))
            note(f"{programs[-1].name}: first step done")
        for name, start in (("flax", flax), ("transformers", transformers)):
            for dtype in dtypes if name in options.peer else ():
                programs.append(start(config, dtype, scratch))
                note(f"{programs[-1].name}: first step done")
        if "tuned" in options.peer:
            programs += [tuned(config, dtype, options.steps, scratch) for dtype in dtypes]
        requests = {p.name: {"step": options.steps} for p in programs}
        for name in cold:
            requests[name]["matmul"] = _MATMULS
        times = in_turn(programs, options.rounds, requests)
        rows = [measured(p, times[p.name], config) | cold.get(p.name, {}) for p in programs]
        for dtype in dtypes:
            losses = {name: c["initial_loss"] for name, c in cold.items() if name.endswith(dtype)}
            for program in programs[len(dtypes) :]:
                if program.name.endswith(dtype):
                    losses[program.name] = program.ask("loss", weights[dtype])["loss"]
            require_equal_losses(losses, dtype)
            if len(losses) > 1:
                shown = ", ".join(f"{loss:.6f} {name}" for name, loss in losses.items())
                note(f"losses of the first batch at the same weights: {shown}")
        circumstances = about(options, config, programs)
    return circumstances | {"programs": rows, "ratios": ratios(rows)}


def cold_start(program: Program, weights: str) -> dict[str, float]:
    """What a start without compile cache tells; writes the initial weights, ends the program."""
    note(f"{program.name}: cold start, first step done after {program.first_step_s:.1f} s")
    loss = program.ask("loss", weights)["loss"]
    program.end()
    return {
        "first_step_cold_s": program.first_step_s,
        "compile_cold_s": program.about["compile_s"],
        "initial_loss": loss,
    }


def measured(program: Program, times: dict[str, Any], config: TrainConfig) -> dict[str, Any]:
    """One program's row: times, rates, memory."""
    step = summary(flat(times["step"]))
    row: dict[str, Any] = {
        "name": program.name,
        "rounds": times["step"],
        "step": step,
        "eval": summary(program.ask("eval", _EVALS)["seconds"]),
        "first_step_s": program.first_step_s,
        "peak_bytes": times["peak_bytes"],
        "tokens_per_s": config.batch_size * config.model.seq_len / step["median"],
        "targets_per_s": config.batch_size * n_last(config) / step["median"],
        **{name: value for name, value in program.about.items() if name != "versions"},
    }
    return row | rates(program, times, config) if "matmul" in times else row


def flat(rounds: Sequence[Sequence[float]]) -> list[float]:
    return list(itertools.chain.from_iterable(rounds))


def rates(program: Program, times: dict[str, Any], config: TrainConfig) -> dict[str, Any]:
    """Achieved FLOP/s of our program: of the products' fastest round, and of the chip's peak."""
    flops, n_devices = step_flops(config), program.about["n_devices"]
    achieved = sum(flops.values()) / statistics.median(flat(times["step"]))
    product_s = min(statistics.median(seconds) for seconds in times["matmul"])
    matmul = n_devices * measure.matmul_flops(config, n_devices) / product_s
    row = {
        "flops": flops,
        "flops_per_s": achieved,
        "matmul_flops_per_s": matmul,
        "of_matmul": fraction(achieved, matmul, "the matrix products"),
    }
    peak = peak_bfloat16(program.about["device"])
    if peak and program.name.endswith("bfloat16"):
        row["mfu"] = fraction(achieved, n_devices * peak, program.about["device"])
    return row


def ratios(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Ours against each peer in the same dtype, and our fastest against the fastest tuned one."""
    mine = [row for row in rows if row["name"].startswith("jax")]
    peers = [row for row in rows if not row["name"].startswith("jax")]
    pairs = [(a, b) for b in peers for a in mine if a["name"].split()[-1] == b["name"].split()[-1]]
    tuned_rows = [row for row in peers if "tuned" in row["name"]]
    if len(mine) > 1 and tuned_rows:
        best = [min(group, key=lambda row: row["step"]["median"]) for group in (mine, tuned_rows)]
        if tuple(best) not in pairs:
            pairs.append((best[0], best[1]))
    return [
        {
            "ours": a["name"],
            "theirs": b["name"],
            **ratio(a["rounds"], b["rounds"]),
            "memory": a["peak_bytes"] / b["peak_bytes"],
        }
        for a, b in pairs
    ]


def sweep(options: argparse.Namespace, config: TrainConfig, scratch: Path) -> dict[str, Any]:
    """Our step at each point, and what its FLOPs predict at that point's matrix-product rate."""
    points = []
    requests = {"step": options.steps, "matmul": _MATMULS}
    for value, point in cases.sweep_points(config, options.sweep):
        program = ours(point, config.model.dtype, scratch)
        with ended([program]):
            times = in_turn([program], options.rounds, {program.name: requests})[program.name]
            circumstances = about(options, config, [program])
            row = rates(program, times, point)
        step = summary(flat(times["step"]))
        predicted = sum(row["flops"].values()) / row["matmul_flops_per_s"]
        note(f"{options.sweep} {value}: {step['median']:.4g} s, predicted {predicted:.4g} s")
        memory = {name: program.about[name] for name in ("program_bytes", "compile_s")}
        point_row = {"value": value, "step": step, "predicted_s": predicted}
        points.append(point_row | row | memory | {"peak_bytes": times["peak_bytes"]})
    return circumstances | {"sweep": options.sweep, "points": points}


def require_prompts(options: argparse.Namespace, config: TrainConfig, n_tokens: int) -> None:
    """Raises UserError where the window, or the corpus, is too short for them."""
    L, prompt, texts = config.model.seq_len, options.prompt, options.batch or 1
    require(prompt < L, "prompt", prompt, f"the window is model.seq_len={L}")
    fix = f"{texts} prompts of {prompt} tokens are more than the corpus, {n_tokens}; lower one"
    require(texts * prompt <= n_tokens, "batch", texts, fix)


def write_text(options: argparse.Namespace, config: TrainConfig, scratch: Path) -> dict[str, Any]:
    """Our generation against its peers."""
    texts = options.batch or 1
    programs, result = measure_generation(
        config, texts, options.prompt, options.peer, options.rounds, scratch
    )
    return about(options, config, programs) | result


def about(
    options: argparse.Namespace, config: TrainConfig, programs: Sequence[Program]
) -> dict[str, Any]:
    """What a reader needs to judge and repeat the measurement. The first program is ours."""
    program = programs[0]
    found = record.circumstances("-m jax_model5.bench", program.about["device"])
    found["machine"] |= {name: program.about[name] for name in ("platform", "n_devices")}
    for other in programs:
        found["machine"] |= other.about.get("versions", {})
    return found | {
        "case": options.case,
        "config": dataclasses.asdict(config),
        "precision": jax.config.jax_default_matmul_precision  # type: ignore[attr-defined]
        or "default",
        "attention": "causal in two halves, masked softmax in float32",
        "prng": config.prng,
        "environment": {
            name: os.environ[name] for name in ("XLA_FLAGS", "GLIBC_TUNABLES") if name in os.environ
        },
    }


if __name__ == "__main__":
    main()
