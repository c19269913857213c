"""Renders the tables of README.md and docs/ from docstrings and the committed JSON.

    python docs/render.py

A table stands between `<!-- rendered: NAME ARGUMENTS -->` and `<!-- end -->`; `TABLES` has the
names. tests/test_docs.py fails where a page and its sources differ.
"""

import ast
import json
import re
import statistics
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
REGION = re.compile(r"(<!-- rendered: ([^\n]+?) -->\n).*?(<!-- end -->)", re.S)


def pages() -> Iterator[Path]:
    yield ROOT / "README.md"
    yield from sorted((ROOT / "docs").rglob("*.md"))


def rendered(text: str) -> str:
    """The page with every table made anew."""

    def table(match: re.Match) -> str:
        name, *arguments = match[2].split()
        return f"{match[1]}\n{TABLES[name](*arguments)}\n\n{match[3]}"

    return REGION.sub(table, text)


def main() -> None:
    for path in pages():
        text = path.read_text(encoding="utf-8")
        if (new := rendered(text)) != text:
            path.write_text(new, encoding="utf-8")
            print(f"rendered: {path.relative_to(ROOT)}")


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def read(path: str) -> Any:
    return json.loads((ROOT / "docs" / path).read_text(encoding="utf-8"))


# ---- the map of the files -----------------------------------------------------------------------


def sentence(path: Path) -> str:
    """The first sentence of a file's docstring."""
    doc = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    return " ".join(doc.split("\n\n")[0].split()).removeprefix("# ").rstrip(".")


def reading_order() -> tuple[list[str], list[str]]:
    """The files of the spine and those around it, as jax_model5/__init__.py names them."""
    doc = ast.get_docstring(ast.parse((ROOT / "jax_model5/__init__.py").read_text())) or ""
    blocks = [block for block in doc.split("\n\n") if block.startswith("    ")]
    spine, around = (block.split() for block in blocks)
    return spine, around


def files_of(folder: str, names: Sequence[str]) -> Iterator[Path]:
    for name in names:
        path = ROOT / folder / name
        yield from sorted(path.glob("*.py")) if path.is_dir() else [path.with_suffix(".py")]


def file_map(folder: str) -> str:
    """A row for each file: jax_model5 in its reading order, the other folders by name."""
    if folder == "jax_model5":
        paths = [path for part in reading_order() for path in files_of(folder, part)]
    else:
        paths = sorted((ROOT / folder).rglob("*.py"))
    skipped = ("__init__.py", "conftest.py")
    rows = [
        [f"`{path.relative_to(ROOT)}`", sentence(path)]
        for path in paths
        if path.name not in skipped
    ]
    return markdown(["file", "what it is"], rows)


# ---- benchmarks ---------------------------------------------------------------------------------


def fastest(result: Any, pattern: str) -> Any:
    """The program of the least median whose name fits."""
    fits = [p for p in result["programs"] if re.search(pattern, p["name"])]
    return min(fits, key=lambda p: p.get("step", p.get("seconds"))["median"])


def ratio_of(name: str, ours: str, theirs: str) -> Any:
    """Of the fastest programs that fit; None where the run has no such peer."""
    result = read(f"benchmarks/{name}.json")
    if not any(re.search(theirs, p["name"]) for p in result["programs"]):
        return None
    pair = fastest(result, ours)["name"], fastest(result, theirs)["name"]
    return next((r for r in result["ratios"] if (r["ours"], r["theirs"]) == pair), None)


def ratio_cell(ratio: Any, least: float = 1.0) -> str:
    """Median and range; bold where all of it is at least this."""
    if ratio is None:
        return "–"
    shown = f"**{ratio['median']:.2f}**" if ratio["min"] >= least else f"{ratio['median']:.2f}"
    return f"{shown} ({ratio['min']:.2f}–{ratio['max']:.2f})"


# Words, and the run.
RESULTS = [
    ("`model5` (12 layers, width 768, batch 4 × 256), final token", "model5_final_token"),
    ("`small` (4 layers, width 128, batch 16 × 256), final token", "small_final_token"),
]
PEERS = [
    ("tuned PyTorch in its faster dtype", "tuned"),
    ("tuned PyTorch, float32", "tuned .*float32"),
    ("the course's PyTorch", "course float32"),
]
MACHINES = {"": "Intel Xeon", "_amd": "AMD EPYC, an earlier tree"}


def results() -> str:
    """How many times faster our step is, the strongest peer first."""
    rows = [
        [work, words]
        + [
            ratio_cell(ratio_of(f"{case}_float32_bfloat16{machine}", "jax float32", peer))
            for machine in MACHINES
        ]
        for words, peer in PEERS
        for work, case in RESULTS
    ]
    return markdown(["one optimizer step", "against", *MACHINES.values()], rows)


# Work, against what, the goal; the run, our program, theirs.
GOALS = [
    ("`model5`, final token", "tuned, each in its best dtype", 1.5, "model5_final", "jax", "tuned"),
    ("`model5`, final token, float32", "tuned", 2.0, "model5_final", "jax f", "tuned .* f"),
    ("`model5`, final token, bfloat16", "tuned", 1.0, "model5_final", "jax b", "tuned .* b"),
    ("`model5`, final token, float32", "course", 3.0, "model5_final", "jax f", "course"),
    ("`small`, final token", "tuned, each in its best dtype", 1.5, "small_final", "jax", "tuned"),
    ("`small`, final token, float32", "course", 10.0, "small_final", "jax f", "course"),
    ("`model5`, all tokens, float32", "plain Flax", 2.0, "model5_all", "jax", "flax"),
    ("`model5`, all tokens, float32", "transformers", 1.5, "model5_all", "jax", "transformers"),
    ("`model5`, all tokens, float32", "tuned", 1.5, "model5_all", "jax", "tuned"),
]
RUNS = {
    "model5_final": "model5_final_token_float32_bfloat16",
    "small_final": "small_final_token_float32_bfloat16",
    "model5_all": "model5_all_tokens_float32",
}


def reached() -> str:
    """The goals, and the medians (ranges) of the rounds' ratios; bold where reached."""
    rows = []
    for work, against, goal, run, ours, theirs in GOALS:
        cell = ratio_cell(ratio_of(RUNS[run], ours, theirs), goal)
        rows.append([work, against, f"{goal:g}×", cell])
    for peer, most in (("course", 0.6), ("tuned .*float32", 0.75)):
        memory = ratio_of(RUNS["model5_final"], "jax f", peer)["memory"]
        shown = f"**{memory:.2f}**" if memory <= most else f"{memory:.2f}"
        against = peer.partition(" ")[0]
        rows.append(["peak memory, `model5`, final token", against, f"{most:g}", shown])
    text = "model5_final_token_generate_16"
    for against, peer in (("its cache", "torch transformers"), ("a compiled pass", "compiled")):
        cell = ratio_cell(ratio_of(text, "jax", peer), 1.5)
        rows.append(["`model5`, one text", f"transformers with {against}", "1.5×", cell])
    bound = read(f"benchmarks/{text}.json")["programs"][0]["of_bound"]
    rows.append(["`model5`, one text", "reading the weights", "70%", f"{bound:.0%}"])
    share = fastest(read(f"benchmarks/{RUNS['model5_final']}.json"), "jax b")["of_matmul"]
    shown = f"**{share:.0%}**" if share >= 0.6 else f"{share:.0%}"
    rows.append(["`model5`, bfloat16", "products of the same run", "60%", shown])
    return markdown(["work", "against", "goal", "measured"], rows)


def pythons() -> str:
    """Our step on either Python, with the jax that it has: two runs of one hour, not in turn."""
    rows = []
    for case in ("model5_final", "small_final"):
        here, there = (read(f"benchmarks/{RUNS[case]}{end}.json") for end in ("", "_py313"))
        for p in there["programs"]:
            both = [fastest(run, p["name"])["step"] for run in (here, there)]
            cells = [f"{s['median']:.3g} s [{s['q1']:.3g}, {s['q3']:.3g}]" for s in both]
            rows.append([f"`{case.partition('_')[0]}`, {p['name'].split()[-1]}", *cells])
    heads = [f"Python {r['machine']['python']}, jax {r['machine']['jax']}" for r in (here, there)]
    return markdown(["final token", *heads], rows)


def texts(*names: str) -> str:
    """Every program's time for a batch of texts, its rate, and its share of the bound."""
    head = ["texts", "prompt", "program", "a batch [quartiles]", "tokens/s", "of the bound"]
    rows = []
    for name in names:
        result = read(f"benchmarks/{name}.json")
        for p in result["programs"]:
            s, ratio = p["seconds"], ratio_of(name, "jax", p["name"])
            time = f"{s['median']:.3g} s [{s['q1']:.3g}, {s['q3']:.3g}]"
            bound = f"{p['of_bound']:.0%}" if "of_bound" in p else "–"
            cells = [str(result["texts"]), str(result["prompt_tokens"]), p["name"], time]
            rows.append([*cells, f"{p['tokens_per_s']:.1f}", bound, ratio_cell(ratio)])
    return markdown([*head, "we are times faster"], rows)


def programs(name: str) -> str:
    """Times, rates and memory of each program of a run."""
    head = ["program", "step [quartiles]", "eval", "first step, cold / warm"]
    head += ["tokens/s", "targets/s", "peak memory", "of matmul"]
    rows = []
    for p in read(f"benchmarks/{name}.json")["programs"]:
        step, cold = p["step"], p.get("first_step_cold_s")
        start = f"{cold:.1f} / {p['first_step_s']:.1f} s" if cold else f"{p['first_step_s']:.1f} s"
        share = f"{p['of_matmul']:.0%}" if "of_matmul" in p else "–"
        rows.append(
            [
                p["name"],
                f"{step['median']:.3g} s [{step['q1']:.3g}, {step['q3']:.3g}]",
                f"{p['eval']['median']:.2g} s",
                start,
                f"{p['tokens_per_s']:,.0f}",
                f"{p['targets_per_s']:,.0f}",
                f"{p['peak_bytes'] / 2**30:.2f} GiB",
                share,
            ]
        )
    return markdown(head, rows)


def h100() -> str:
    """How many times faster our step is on an H100, and how much of the peer's memory it takes."""
    rows = []
    for name in ("h100_final_token_before", "h100_final_token", "h100_all_tokens"):
        run = read(f"benchmarks/{name}.json")
        for ratio in run["ratios"]:
            speed = f"{ratio['median']:.2f} ({ratio['min']:.2f}–{ratio['max']:.2f})"
            cells = [f"`{name}.json`", ratio["theirs"], speed, f"{ratio['memory']:.2f}"]
            rows.append([*cells, run["commit"]])
    return markdown(["run", "against", "times faster", "of its memory", "commit"], rows)


def plans(name: str) -> str:
    """What each choice of chips costs, and the commit that was compiled."""
    run, parts = read(f"scale/{name}.json"), ("compute", "memory", "network")
    head = ["chips", "batch", "parameters + moments", "temporaries", "of", "products of one"]
    head += ["its traffic", "network into one", *parts, "floor", "MFU there", "tokens/s", "commit"]
    rows = []
    for plan in run["plans"]:
        floor, network, state = plan["floor"], sum(plan["collective_bytes"].values()), plan["state"]
        rows.append(
            [
                f"`{plan['chips']}`",
                str(plan["config"]["batch_size"]),
                f"{(state['parameters'] + state['moments']) / 1e9:.2f} GB",
                f"{plan['memory']['temp'] / 1e9:.2f} GB",
                f"{plan['memory_of_chip'] / 1e9:.0f} GB",
                f"{sum(plan['flops_by_dtype'].values()) / 1e12:.3g} TFLOP",
                f"{plan['traffic_bytes'] / 1e9:.3g} GB",
                f"{network / 1e9:.3g} GB",
                *(f"{floor[f'{part}_s'] * 1e3:.3g} ms" for part in parts),
                f"**{floor['step_s'] * 1e3:.3g} ms**",
                f"{floor['mfu']:.0%}",
                f"{floor['tokens_per_s']:,.0f}",
                run["commit"],
            ]
        )
    return markdown(head, rows)


def measured() -> str:
    """Planned against measured where a device is."""
    rows = []
    for path in sorted((ROOT / "docs/scale").glob("measured_*.json")):
        run = read(f"scale/{path.name}")
        memory, flops = run["memory"], run["flops"]
        rows.append(
            [
                f"`{run['command'].partition('plan ')[2].partition(' --out')[0]}`",
                f"{memory['planned'] / 1e9:.3f} GB",
                f"{memory['measured'] / 1e9:.3f} GB",
                f"{memory['measured'] / memory['planned']:.2f}",
                f"{flops['measured'] / flops['planned']:.3f}",
                run["machine"]["processor"],
                run["commit"],
            ]
        )
    head = ["keys", "memory planned", "measured", "ratio", "ratio of FLOPs", "machine", "commit"]
    return markdown(head, rows)


KNOBS = {
    "`remat: dots` (the default)": "model5_final_token",
    "`remat: none`": "model5_final_token_remat_none",
    "`remat: full`": "model5_final_token_remat_full",
    "`accumulate: 4`": "model5_final_token_accumulate_4",
}


def knobs() -> str:
    """Memory and time of our step, one knob changed at a time."""
    rows = []
    for words, name in KNOBS.items():
        (p,) = read(f"benchmarks/{name}.json")["programs"]
        sizes = [f"{p[key] / 2**30:.2f} GiB" for key in ("program_bytes", "peak_bytes")]
        step = f"{p['step']['median']:.2f} s"
        rows.append([words, sizes[0], step, sizes[1]])
    head = ["knobs", "the program's own figure", "step", "peak resident"]
    return markdown(head, rows)


def sweep(name: str) -> str:
    """Measured and predicted seconds of each point."""
    result = read(f"benchmarks/{name}.json")
    head = [result["sweep"], "measured step", "predicted", "measured / predicted", "peak memory"]
    rows = []
    for point in result["points"]:
        measured, predicted = point["step"]["median"], point["predicted_s"]
        times = [f"{measured:.3g} s", f"{predicted:.3g} s", f"{measured / predicted:.1f}"]
        rows.append([str(point["value"]), *times, f"{point['peak_bytes'] / 2**30:.2f} GiB"])
    return markdown(head, rows)


# ---- parity -------------------------------------------------------------------------------------


def rungs() -> str:
    rows = [
        [r["rung"], r["dtype"], f"{r['error']:.1e}", f"{r['tolerance']:.1e}", r["where"]]
        for r in read("parity.json")["rungs"]
    ]
    return markdown(["rung", "dtype", "worst error", "tolerance", "where"], rows)


def faults() -> str:
    rows = [
        [f["fault"], f["side"], f["operation"], f["cause"]] for f in read("parity.json")["faults"]
    ]
    return markdown(["fault", "planted in", "operation named", "cause named"], rows)


def mutants() -> str:
    """By file and by operator: how many of the mutants that were run are caught, and located."""
    found = read("mutants.json")
    parts = {"all that were run": found} | found["by file"] | found["by operator"]
    rows = [
        [name, str(n["all"]), *(f"{n[k]} ({n[k] / n['all']:.1%})" for k in ("caught", "located"))]
        for name, n in parts.items()
    ]
    return markdown(["mutants", "run", "caught", "located"], rows)


def survivors() -> str:
    """Each mutant that nothing saw, and why."""
    rows = []
    for m in read("mutants.json")["survivors"]:
        old, new = (
            " ".join(line[1:].strip() for line in m["diff"].splitlines() if line[0] == sign)
            for sign in "-+"
        )
        change = f"`{_short(old)}` → `{_short(new)}`".replace("|", "\\|")
        rows.append([m["place"], m["operator"], change, m["why"] or "open in that run"])
    return markdown(["place", "operator", "the line, and what became of it", "why"], rows)


def _short(code: str, n: int = 90) -> str:
    return code if len(code) <= n else f"{code[:n]} ..."


# ---- experiments --------------------------------------------------------------------------------


def mean_and_spread(values: Sequence[float], spec: str) -> str:
    return f"{statistics.fmean(values):{spec}} ± {statistics.stdev(values):{spec}}"


def tying() -> str:
    """Losses and tables after training, of each tying and objective."""
    head = ["objective", "head", "parameters that AdamW updates", "test NLL, final token"]
    head += ["test NLL, all tokens", "distance of the two tables"]
    rows = []
    for row in read("experiments/tying.json")["rows"]:
        numbers = [f"{row['parameters']:,}"]
        for key in ("final_token_nll", "all_token_nll", "distance"):
            numbers.append(mean_and_spread(row[key], ".3f"))
        rows.append([row["objective"].replace("_", " "), row["tying"], *numbers])
    return markdown(head, rows)


COMPARED = [
    ("test NLL, final token [nats]", "final_token_nll", ".3f"),
    ("test NLL, all tokens [nats]", "all_token_nll", ".3f"),
    ("standard deviation of the training loss [nats]", "train_std", ".3f"),
    ("steps to the all-token NLL that every run reaches", "steps_to_all_token_nll", ".0f"),
    ("FLOPs to it", "flops_to_all_token_nll", ".2g"),
]


def compared(*names: str) -> str:
    """Figures of the configs of one comparison, or of several beside each other."""
    results_ = {name: read(f"experiments/{name}.json") for name in names}
    columns = [(name, config) for name, result in results_.items() for config in result["summary"]]
    gelu = {name: _gelu(result) for name, result in results_.items()}
    head = ["", *(f"{config.replace('_', ' ')}, {gelu[name]}" for name, config in columns)]
    rows = []
    for words, key, spec in COMPARED:
        cells = []
        for name, config in columns:
            value = results_[name]["summary"][config][key]
            cells.append(f"{value['mean']:{spec}} ± {value['std']:{spec}}")
        rows.append([words, *cells])
    return markdown(head, rows)


# Words, and the run: the quick set, and for comparison the two of the claims.
TEXTS = {
    "Python's own reference": "final_vs_all_quick",
    "*Gulliver's Travels*": "final_vs_all_quick_book",
    "its first 180 kB": "final_vs_all_quick_short",
    "program code (`asyncio`)": "final_vs_all_quick_code",
    "FineWeb, wider model": "final_vs_all_fineweb",
    "*Gulliver's Travels*, wider model": "final_vs_all_book",
}


def budgets() -> str:
    """By text and budget: how much higher final-token training ends, on the final token."""
    at = (60, 100, 200, 400)
    rows = []
    for words, name in TEXTS.items():
        result = read(f"experiments/{name}.json")
        runs, tokens = result["runs"], result["corpora"]["all_tokens"]["tokens"]
        tested = runs["all_tokens"][0]["step"]
        cells = []
        for step in at:
            if step not in tested:
                cells.append("–")
                continue
            i = tested.index(step)
            pairs = zip(runs["final_token"], runs["all_tokens"], strict=True)
            gaps = [f["final_token_nll"][i] - a["final_token_nll"][i] for f, a in pairs]
            cells.append(f"{statistics.fmean(gaps):+.2f} ± {statistics.stdev(gaps):.2f}")
        reached = [result["summary"][o]["steps_to_final_token_nll"] for o in runs]
        longer = reached[1]["mean"] / reached[0]["mean"]
        rows.append([words, f"{tokens:,}", *cells, f"{longer:.1f}"])
    head = ["text", "tokens", *(f"after {step} steps" for step in at), "times the steps"]
    return markdown(head, rows)


def _gelu(result: dict[str, Any]) -> str:
    return "/".join(sorted({config["model"]["gelu"] for config in result["configs"].values()}))


def kills() -> str:
    """Each campaign: how many kills in which phase, and how many runs ended with the same bits."""
    rows = []
    for path in sorted((ROOT / "docs/reliability").glob("kills_*.json")):
        found = json.loads(path.read_text(encoding="utf-8"))
        phases = ", ".join(f"{k} {v}" for k, v in sorted(found["phases"].items()))
        codes = ", ".join(f"{k}: {v}" for k, v in sorted(found["exit_codes"].items()))
        runs = f"{found['equal']} of {found['runs']}"
        rows.append(
            [str(found["processes"]), str(found["kills"]), phases, codes, runs, found["commit"]]
        )
    head = ["processes", "SIGKILLs", "while", "exit codes", "runs with the same bits", "commit"]
    return markdown(head, rows)


def memory() -> str:
    rows = [
        [
            f"{row['megabytes']:,} MB `{row['kind']}`",
            f"{row['peak_megabytes']} MB",
            f"{row['tokens']:,}",
            f"{row['seconds']:,} s",
        ]
        for row in read("reliability/memory.json")["rows"]
    ]
    return markdown(["file", "peak memory of the process", "tokens", "time"], rows)


def harness() -> str:
    rows = [
        [
            repr(row["continuation"]),
            f"{row['ours'][0]:.6f}",
            f"{row['harness'][0]:.6f}",
            f"{row['relative_error']:.0e}",
        ]
        for row in read("harness/harness.json")["requests"]
    ]
    return markdown(["continuation", "ours [nats]", "the harness's", "relative error"], rows)


# ---- lessons ------------------------------------------------------------------------------------


def verdicts() -> str:
    """The course's figure and ours, of every lesson's full run."""
    rows = []
    for path in sorted((ROOT / "docs/lessons").glob("*.json")):
        run = read(f"lessons/{path.name}")
        for i, row in enumerate(run["rows"]):
            first = f"[{run['lesson']}]({_lesson_file(run)})" if i == 0 else ""
            verdict = "holds" if row["holds"] else "**does not hold**"
            cells = [first, row["claim"], row["course"], row["ours"], verdict]
            rows.append([cell.replace("|", "\\|") for cell in cells])
    return markdown(["lesson", "the claim", "the course", "ours", ""], rows)


def lesson_runs() -> str:
    """How long each lesson's full run took, and on what."""
    rows = []
    for path in sorted((ROOT / "docs/lessons").glob("*.json")):
        run = read(f"lessons/{path.name}")
        title, processor = run["title"].replace("|", "\\|"), run["machine"]["processor"]
        seconds, command = f"{run['seconds']:.0f} s", f"`{run['command']}`"
        rows.append([f"[{title}]({_lesson_file(run)})", command, seconds, processor, run["commit"]])
    return markdown(["lesson", "command", "time", "machine", "commit"], rows)


def _lesson_file(run: dict[str, Any]) -> str:
    """Its path from docs/."""
    (path,) = (ROOT / "lessons").glob(f"{run['lesson']}_*.py")
    return f"../lessons/{path.name}"


TABLES: dict[str, Callable[..., str]] = {
    "map": file_map,
    "results": results,
    "programs": programs,
    "h100": h100,
    "plans": plans,
    "measured": measured,
    "reached": reached,
    "pythons": pythons,
    "texts": texts,
    "knobs": knobs,
    "sweep": sweep,
    "rungs": rungs,
    "faults": faults,
    "mutants": mutants,
    "survivors": survivors,
    "tying": tying,
    "compared": compared,
    "budgets": budgets,
    "verdicts": verdicts,
    "lesson_runs": lesson_runs,
    "kills": kills,
    "memory": memory,
    "harness": harness,
}

if __name__ == "__main__":
    main()
