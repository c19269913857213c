"""The course's loop on the config and the batches of jax_model5; `python -m torch_ref.train`."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from jax_model5 import data
from jax_model5.config import TrainConfig, UserError, one_line_errors, parse
from torch_ref.model import Model5
from torch_ref.step import (
    eval_step,
    make_optimizer,
    make_scheduler,
    require_plain,
    train_step,
)


def main() -> int:
    with one_line_errors():
        config = parse(sys.argv[1:], "torch_ref.train")
        require_plain(config)
        corpus = data.load_corpus(config)
        try:
            workdir = Path(config.workdir).expanduser()
            workdir.mkdir(parents=True, exist_ok=True)
            log = open(workdir / "torch_metrics.jsonl", "w", buffering=1)  # noqa: SIM115
        except OSError as error:
            raise UserError(f"workdir={config.workdir!r}: {error.strerror}") from None
        print(data.describe(corpus))
        with log:
            for record in train(config, corpus):
                log.write(json.dumps(record) + "\n")
                if record["kind"] == "eval":
                    print(record, flush=True)
    return 0


def train(config: TrainConfig, corpus: data.Corpus) -> Iterator[dict[str, Any]]:
    """Trains from step 0 and yields the records of jax_model5's metrics.jsonl, speeds aside."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(config.seed)
    model = Model5(config.model).to(device)
    if config.model.dtype == "float64":
        model.double()
    optimizer = make_optimizer(model, config.optimizer)
    scheduler = make_scheduler(optimizer, config.optimizer, config.steps)
    test_batches = torch.from_numpy(data.test_batches(corpus, config)).to(device)
    for step in range(config.steps):
        windows_BxL1 = torch.from_numpy(data.train_batch(corpus, config, step)).to(device)
        metrics = train_step(model, optimizer, scheduler, windows_BxL1, config)
        yield {"kind": "train", "step": step + 1, **metrics}
        if (step + 1) % config.eval_every == 0 or step + 1 == config.steps:
            results = [eval_step(model, batch, config) for batch in test_batches]
            means = {name: sum(r[name] for r in results) / len(results) for name in results[0]}
            yield {"kind": "eval", "step": step + 1, **means}


if __name__ == "__main__":
    sys.exit(main())
