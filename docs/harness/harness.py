"""Log-likelihoods of an exported model by lm-evaluation-harness, against this project's own.

    python docs/harness/harness.py ours RUN ours.json      (this project's environment)
    python -m jax_model5.huggingface export RUN --out EXPORTED
    python docs/harness/harness.py theirs EXPORTED ours.json docs/harness/harness.json   (lm_eval's)

The harness is no dependency: `pip install lm_eval torch==2.13.0` into an environment of its own. A
request is a context and a continuation; its figures are the sum of the continuation's
log-probabilities, and whether each of its tokens is the likeliest. A context that is longer than
the window is cut on the left.
"""

import argparse
import json
import os
import platform
import shlex
import subprocess
import sys
from pathlib import Path

BOOK = (
    "My father had a small estate in Nottinghamshire: I was the third of five sons. He sent me to "
    "Emanuel College in Cambridge at fourteen years old, where I resided three years, and applied "
    "myself close to my studies; but the charge of maintaining me, although I had a very scanty "
    "allowance, being too great for a narrow fortune, I was bound apprentice to Mr. James Bates."
)  # Swift, Gulliver's Travels (1726)
REQUESTS = [
    ("The assert statement", " is a convenient way to insert debugging assertions"),
    ("I went on holiday to Liliput and", " was bound apprentice"),
    ("naïve 日本 text", "\n\twith marks, 12345 and 🙂."),
    (BOOK, " He sent me to sea."),
    (" ".join([BOOK] * 6), " He sent me to sea."),
    ("", "A text from the beginning"),
]


def ours(run: Path) -> list[list]:
    """(log-likelihood, is greedy) of each request."""
    import jax
    import jax.numpy as jnp

    from jax_model5 import tokenizer
    from jax_model5.checkpoint import read_params
    from jax_model5.config import config_of_run
    from jax_model5.model import Model5
    from jax_model5.step import abstract_state

    config = config_of_run(str(run), "harness")
    encoding, L = tokenizer.load("gpt2"), config.model.seq_len
    params = read_params(str(run), abstract_state(config).params)
    figures = []
    for context, continuation in REQUESTS:
        before = encoding.encode_ordinary(context) or [encoding.eot_token]
        after = encoding.encode_ordinary(continuation)
        window = (before + after)[-(L + 1) :]
        tokens_1xL = jnp.array([window[:-1]])
        apply = Model5(config.model).apply
        logits = apply({"params": params}, tokens_1xL, n_last=len(after), deterministic=True)
        log_p_NxV = jax.nn.log_softmax(logits[0].astype(jnp.float32))
        figure = sum(float(log_p_NxV[at, token]) for at, token in enumerate(after))
        figures.append([figure, log_p_NxV.argmax(1).tolist() == after])
    return figures


def theirs(exported: Path) -> list[list]:
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    model = HFLM(pretrained=str(exported), device="cpu", dtype="float32", batch_size=1)
    kind = "loglikelihood"
    instances = [Instance(kind, {}, request, index) for index, request in enumerate(REQUESTS)]
    return [list(figure) for figure in model.loglikelihood(instances)]


def compare(exported: Path, found: list[list]) -> dict:
    import importlib.metadata

    rows = []
    for request, mine, harness in zip(REQUESTS, found, theirs(exported), strict=True):
        error = abs(mine[0] - harness[0]) / abs(harness[0])
        names = ("context", "continuation", "ours", "harness", "relative_error")
        rows.append(
            dict(zip(names, (*(t[-60:] for t in request), mine, harness, error), strict=True))
        )
    packages = ("lm_eval", "transformers", "torch")
    machine = {"device": "cpu", "processor": platform.processor(), "cores": os.cpu_count()}
    machine |= {name: importlib.metadata.version(name) for name in packages}
    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    commit = subprocess.run(git, capture_output=True, text=True).stdout.strip()
    command = shlex.join(["python", *sys.argv])
    worst = max(row["relative_error"] for row in rows)
    agree = all(row["ours"][1] == row["harness"][1] for row in rows)
    where = {"command": command, "commit": commit, "machine": machine}
    return {**where, "worst_relative_error": worst, "greedy_agrees": agree, "requests": rows}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("who", choices=("ours", "theirs"))
    parser.add_argument("folder", type=Path)
    parser.add_argument("files", type=Path, nargs="+")
    options = parser.parse_args()
    if options.who == "ours":
        options.files[0].write_text(json.dumps(ours(options.folder)))
        return 0
    result = compare(options.folder, json.loads(options.files[0].read_text()))
    options.files[1].write_text(json.dumps(result, indent=1) + "\n")
    print(f"worst relative error {result['worst_relative_error']:.1e}")
    return 0 if result["worst_relative_error"] < 1e-5 and result["greedy_agrees"] else 1


if __name__ == "__main__":
    sys.exit(main())
