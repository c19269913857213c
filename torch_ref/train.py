"""The course's loop on the config and the batches of jax_model5; `python -m torch_ref.train`."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jax_model5.batches import test_batches, train_batch
from jax_model5.config import TrainConfig, parse
from jax_model5.corpus import Corpus, describe, load_corpus
from jax_model5.errors import disk_errors, one_line_errors, require_installed

if __name__ == "__main__":  # before what imports it
    with one_line_errors():
        require_installed("torch", "command", "python -m torch_ref.train")

import torch

from torch_ref.model import Model5
from torch_ref.step import (
    eval_step,
    make_optimizer,
    make_scheduler,
    param_norm,
    require_plain,
    train_step,
)


def main() -> int:
    with one_line_errors():
        config = parse(sys.argv[1:], "torch_ref.train")
        require_plain(config)
        corpus = load_corpus(config)
        with disk_errors("workdir", config.workdir, "name a folder that can be written"):
            workdir = Path(config.workdir).expanduser()
            workdir.mkdir(parents=True, exist_ok=True)
            log = open(workdir / "torch_metrics.jsonl", "w", buffering=1)  # noqa: SIM115
        print(describe(corpus))
        with log:
            for record in train(config, corpus):
                log.write(json.dumps(record) + "\n")
                if record["kind"] == "eval":
                    print(record, flush=True)
    return 0


def train(config: TrainConfig, corpus: Corpus) -> Iterator[dict[str, Any]]:
    """Trains from step 0 and yields the records of jax_model5's metrics.jsonl, speeds aside."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(config.seed)
    model = Model5(config.model).to(device)
    if config.model.dtype == "float64":
        model.double()
    optimizer = make_optimizer(model, config.optimizer)
    scheduler = make_scheduler(optimizer, config.optimizer, config.steps)
    tests = torch.from_numpy(test_batches(corpus, config)).to(device)
    yield {"kind": "eval", "step": 0, **evaluate(model, tests, config)}
    for step in range(1, config.steps + 1):
        windows_BxL1 = torch.from_numpy(train_batch(corpus, config, step - 1)).to(device)
        metrics = train_step(model, optimizer, scheduler, windows_BxL1, config)
        yield {"kind": "train", "step": step, **metrics, "param_norm": param_norm(model)}
        if step % config.eval_every == 0 or step == config.steps:
            yield {"kind": "eval", "step": step, **evaluate(model, tests, config)}


def evaluate(model: Model5, tests: torch.Tensor, config: TrainConfig) -> dict[str, float]:
    """Mean test NLL [nats] over the fixed batches, by name."""
    results = [eval_step(model, batch, config) for batch in tests]
    return {name: sum(r[name] for r in results) / len(results) for name in results[0]}


if __name__ == "__main__":
    sys.exit(main())
