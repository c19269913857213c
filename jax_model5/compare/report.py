"""The comparison as one self-contained HTML page, and its plots as PNGs."""

import base64
import html
import itertools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from jax_model5 import disk, record, tokenizer
from jax_model5.compare.summary import noise_places
from jax_model5.config import TEST_METRICS
from jax_model5.generate import text_of

_HEAD = (
    '<!doctype html><meta charset="utf-8"><title>Runs compared</title><style>'
    "body{font:15px sans-serif;margin:2em auto;max-width:75em}td,th{padding:.2em .8em;"
    "text-align:right;border-bottom:1px solid #ddd}td:first-child,th:first-child{text-align:left}"
    "pre{white-space:pre-wrap;background:#f6f6f6;padding:.6em}img{max-width:100%}</style>"
)
_AXES = ("steps", "targets", "tokens", "flops", "seconds")
_SHOWN_SAMPLES = 2

# Words, figure of `summary`, and format of each row.
LOSSES = [
    ("test NLL, final token [nats]", "final_token_nll", ".3f"),
    ("test NLL, all tokens [nats]", "all_token_nll", ".3f"),
]
GAP = [
    ("test minus training NLL, final token [nats]", "gap/final_token", ".3f"),
    ("test minus training NLL, all tokens [nats]", "gap/all_tokens", ".3f"),
]
SPEED = [
    ("steps to the common final-token NLL", "steps_to_final_token_nll", ",.0f"),
    ("steps to the common all-token NLL", "steps_to_all_token_nll", ",.0f"),
]
STABILITY = [
    ("std of the training loss over 50 steps [nats]", "train_std", ".3f"),
    (
        "largest rise between two tests, final token [nats]",
        "largest_rise_of_final_token_nll",
        ".3f",
    ),
    ("largest rise between two tests, all tokens [nats]", "largest_rise_of_all_token_nll", ".3f"),
]
GENERATION = [
    ("tokens that begin with a space, by the corpus's share", "text/space_ratio", ".2f"),
    ("word length, distance from the corpus's", "text/word_length_distance", ".3f"),
    ("words never seen in the corpus", "text/unseen_word_share", ".3f"),
    ("distinct bigrams", "text/distinct_2", ".3f"),
    ("longest repeat [tokens]", "text/longest_repeat", ".1f"),
]
COST = [
    ("FLOPs to the common final-token NLL", "flops_to_final_token_nll", ".3g"),
    ("FLOPs to the common all-token NLL", "flops_to_all_token_nll", ".3g"),
]
DOCUMENTS = [
    ("NLL of a document, std between documents", "documents/document_nll_std", ".3f"),
    ("share of the variance between documents", "documents/between_share", ".3f"),
]
TEXT = [
    ("documents", "documents", ",.0f"),
    ("tokens", "tokens", ",.0f"),
    ("unique tokens", "unique_tokens", ",.0f"),
    ("tokens of a document, lower quartile", "document_tokens_q25", ",.0f"),
    ("tokens of a document, median", "document_tokens_median", ",.0f"),
    ("tokens of a document, upper quartile", "document_tokens_q75", ",.0f"),
    ("test NLL under unigrams [nats]", "unigram_nll", ".3f"),
    ("test NLL under bigrams [nats]", "bigram_nll", ".3f"),
    ("test NLL under trigrams [nats]", "trigram_nll", ".3f"),
    ("distinct test tokens seen in training, share", "type_seen", ".3f"),
    ("test tokens seen in training, share", "unigram_seen", ".3f"),
    ("test bigrams seen in training, share", "bigram_seen", ".3f"),
    ("test trigrams seen in training, share", "trigram_seen", ".3f"),
    ("divergence of its pieces from the whole [nats]", "divergence", ".3f"),
    ("the same of the shuffled text, which is chance [nats]", "divergence_shuffled", ".3f"),
]


def write(result: dict[str, Any], seconds: dict[str, Sequence[float]], out: Path) -> None:
    """index.html and its PNGs; `seconds` of each step of each run, by the run's label."""
    figures = {"curves": curves(result, seconds), "spread": spread(result)}
    if any(run["noise"] for seeds in result["runs"].values() for run in seeds):
        figures["noise"] = noise(result)
    images = []
    for name, figure in figures.items():
        path = out / f"{name}.png"
        figure.savefig(path, dpi=90)
        code = base64.b64encode(path.read_bytes()).decode()
        images.append(f'<img alt="{name}" src="data:image/png;base64,{code}">')
    names = ", ".join(result["runs"])
    machine = ", ".join(f"{key} {html.escape(str(v))}" for key, v in result["machine"].items())
    parts = [
        f"{_HEAD}<h1>{html.escape(names)}</h1>",
        f"<pre>{html.escape(result['command'])}\ncommit {result['commit']}; {machine}</pre>",
        *images,
        *tables(result, seconds),
        *_samples(result),
    ]
    disk.replace_text(out / "index.html", "\n".join(parts))


def first_rows(result: dict[str, Any]) -> str:
    """The losses at the end, a line a config."""
    return "\n".join(
        f"{name}: "
        + ", ".join(f"{words} {value_of(figures[key], spec)}" for words, key, spec in LOSSES)
        for name, figures in result["summary"].items()
    )


# ---- tables -------------------------------------------------------------------------------------


def tables(result: dict[str, Any], seconds: dict[str, Sequence[float]]) -> list[str]:
    """The course's four rows with numbers, then noise, the judges, documents and the text."""
    summary = result["summary"]
    names = list(summary)
    levels = ", ".join(f"{m.replace('_', ' ')} {v:.3f}" for m, v in result["levels"].items())
    each = [_step_cost(result, seconds, name) for name in names]
    cost = [[words, *(row[i] for row in each)] for i, words in enumerate(_STEP_COSTS)]
    shown = [
        _table("At the end of the budget", names, _rows(summary, LOSSES + GAP)),
        _table(f"Learning speed (common: {levels})", names, _rows(summary, SPEED)),
        _table("Stability", names, _rows(summary, STABILITY)),
        _table("Fit for generation", names, _rows(summary, GENERATION + _judges(names))),
        _table("Compute cost", names, cost + _rows(summary, COST)),
    ]
    noise_rows = _rows(summary, _noise_rows(summary[names[0]]))
    if noise_rows:
        shown.append(
            _table("Gradient noise of the mean loss on the last positions", names, noise_rows)
        )
    shown.append(_table("Documents of the test part", names, _rows(summary, DOCUMENTS)))
    corpora = result["corpora"]
    head = [f"{name}: {Path(corpora[name]['source']).name}" for name in names]
    return [*shown, _table("The text", head, text_rows(list(corpora.values())))]


_NOISE = {"trace": "tr Σ", "squared_norm": "|G|²", "scale": "B = tr Σ / |G|² [sequences]"}
_STEP_COSTS = ("steps", "targets a step", "FLOPs a step", "seconds a step (median)")


def _step_cost(
    result: dict[str, Any], seconds: dict[str, Sequence[float]], name: str
) -> tuple[str, ...]:
    costs = result["cost_of_step"][name]
    times = [t for run in result["runs"][name] for t in seconds[_label(result, name, run)]]
    steps = result["steps"][name]
    return (
        f"{steps:,}",
        f"{costs['targets']:,}",
        f"{costs['flops']:.3g}",
        f"{float(np.median(times)):.3g}",
    )


def _label(result: dict[str, Any], name: str, run: dict[str, Any]) -> str:
    """As `plan.Run.label`."""
    return f"{name}-seed{run['seed']}-{result['steps'][name]}"


def _judges(names: Sequence[str]) -> list[tuple[str, str, str]]:
    return [(f"NLL of its samples under {n} [nats]", f"judged_by/{n}", ".3f") for n in names]


def _noise_rows(figures: dict[str, Any]) -> list[tuple[str, str, str]]:
    return [
        (f"{words}, last {n} positions, {moment} of the run", f"noise/{moment}/{n}/{kind}", ".3g")
        for kind, words in _NOISE.items()
        for moment, n in noise_places(figures)
    ]


def _rows(summary: dict[str, Any], figures: Sequence[tuple[str, str, str]]) -> list[list[str]]:
    """A row of each figure: its words, then mean ± spread over the seeds of each config."""
    return [
        [words, *(value_of(summary[name][key], spec) for name in summary)]
        for words, key, spec in figures
    ]


def text_rows(corpora: Sequence[dict[str, Any]]) -> list[list[str]]:
    """A row of each figure of the texts; a dash where a text is too short to have it."""
    return [
        [words, *(value_of({"mean": text[key], "std": math.nan}, spec) for text in corpora)]
        for words, key, spec in TEXT
    ]


def value_of(value: dict[str, float], spec: str) -> str:
    """ "5.123 ± 0.004", without the spread of a single seed; a dash where there is no value."""
    if not math.isfinite(value["mean"]):
        return "-"
    spread = "" if not math.isfinite(value["std"]) else f" ± {value['std']:{spec}}"
    return f"{value['mean']:{spec}}{spread}"


def _table(title: str, head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [["", *head], *rows]
    cells = [
        "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in line)
        for tag, line in zip(itertools.chain(["th"], itertools.repeat("td")), lines, strict=False)
    ]
    body = "".join(f"<tr>{line}</tr>" for line in cells)
    return f"<h2>{html.escape(title)}</h2><table>{body}</table>"


def _samples(result: dict[str, Any]) -> list[str]:
    parts = ["<h2>Samples: the same prompts, seed and temperature</h2>"]
    for name, seeds in result["runs"].items():
        encoding = tokenizer.load(result["configs"][name]["data"]["tokenizer"])
        for row in seeds[0]["text"]["samples"][:_SHOWN_SAMPLES]:
            text = html.escape(text_of(row, encoding))
            parts.append(f"<h3>{html.escape(name)}</h3><pre>{text}</pre>")
    return parts


# ---- plots --------------------------------------------------------------------------------------


def curves(result: dict[str, Any], seconds: dict[str, Sequence[float]]) -> Figure:
    """Both test losses against steps, targets, tokens, FLOPs and seconds."""
    figure = Figure(figsize=(16, 6.5), layout="constrained")
    axes = figure.subplots(len(TEST_METRICS), len(_AXES), sharey="row", squeeze=False)
    for (row, metric), (column, axis) in itertools.product(
        enumerate(TEST_METRICS), enumerate(_AXES)
    ):
        ax = axes[row][column]
        for color, (name, seeds) in enumerate(result["runs"].items()):
            xs = [_x(result, seconds, name, run, axis) for run in seeds]
            losses = np.array([run[metric] for run in seeds])
            x, mean = np.mean(xs, axis=0), losses.mean(axis=0)
            ax.plot(x, mean, color=f"C{color}", marker=".", label=name)
            if len(seeds) > 1:
                std = losses.std(axis=0, ddof=1)
                ax.fill_between(x, mean - std, mean + std, color=f"C{color}", alpha=0.25)
        ax.set_xlabel(axis if axis != "flops" else "FLOPs")
        if axis in ("targets", "flops", "seconds"):
            ax.set_xscale("log")
        ax.grid(alpha=0.3)
    for row, metric in enumerate(TEST_METRICS):
        axes[row][0].set_ylabel(f"test {metric.replace('_', ' ')} [nats]")
    axes[0][0].legend()
    return figure


def _x(
    result: dict[str, Any],
    seconds: dict[str, Sequence[float]],
    name: str,
    run: dict[str, Any],
    axis: str,
) -> np.ndarray:
    steps = np.array(run["step"])
    if axis == "seconds":
        return np.cumsum([0.0, *seconds[_label(result, name, run)]])[steps]
    return steps * result["cost_of_step"][name][axis]


def spread(result: dict[str, Any]) -> Figure:
    """Training loss of the first seed, and its standard deviation over 50 steps of each."""
    figure = Figure(figsize=(12, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for color, (name, seeds) in enumerate(result["runs"].items()):
        left.plot(seeds[0]["train_loss"], color=f"C{color}", linewidth=0.7, label=name)
        for run in seeds:
            loss = np.array(run["train_loss"])
            right.plot(record.rolling_std(loss), color=f"C{color}", linewidth=0.9)
    left.set_ylabel("training loss [nats]")
    right.set_ylabel(f"its std over {record.ROLLING_STEPS} steps")
    for ax in (left, right):
        ax.set_xlabel("optimizer step")
        ax.grid(alpha=0.3)
    left.legend()
    return figure


def noise(result: dict[str, Any]) -> Figure:
    """tr(Sigma), ‖G‖² and B against the positions that get a loss, at the end of each run.

    A dot is a seed; what noise took to 0 or below has no place on the logarithmic axis.
    """
    figure = Figure(figsize=(12, 3.8), layout="constrained")
    for ax, (kind, words) in zip(figure.subplots(1, 3), _NOISE.items(), strict=True):
        for color, (name, seeds) in enumerate(result["runs"].items()):
            ns = [int(n) for n in seeds[0]["noise"]["end"]]
            values = np.array([[run["noise"]["end"][str(n)][kind] for n in ns] for run in seeds])
            means = [result["summary"][name][f"noise/end/{n}/{kind}"]["mean"] for n in ns]
            ax.plot(
                ns,
                [m if m > 0 else math.nan for m in means],
                "o-",
                color=f"C{color}",
                label=f"trained: {name}",
            )
            ax.plot(ns, values.T, ".", color=f"C{color}", alpha=0.5)
        ax.set_xscale("log", base=2)
        ax.set_yscale("log")
        ax.set_xlabel("last positions with a loss")
        ax.set_title(words)
        ax.grid(alpha=0.3)
        ax.legend(fontsize=8)
    return figure
