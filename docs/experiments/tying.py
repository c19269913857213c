"""What a tied head is worth: one table; one with two optimizer states; two tables. In PyTorch.

    python docs/experiments/tying.py

The course writes its head as a new parameter made from the embedding's. On a CPU that is one memory
with two optimizer states; `.to("cuda")` copies it into two tables. docs/fidelity.md has the story.
"""

import argparse
import dataclasses
import statistics
from pathlib import Path

import torch
from torch import nn

from jax_model5 import record, startup
from jax_model5.batches import test_batches, train_batch
from jax_model5.config import TrainConfig, parse
from jax_model5.corpus import Corpus, load_corpus
from torch_ref.model import Model5
from torch_ref.step import make_optimizer, make_scheduler, train_step
from torch_ref.train import evaluate

HERE = Path(__file__).parent
BASE = HERE.parents[1] / "configs/compare/final_vs_all_quick.yaml"
TYINGS = ("tied", "one memory, two optimizer states", "untied")


class SharedMemory(Model5):
    """The course's head on a CPU: `nn.Parameter(wte.weight)`, a second parameter on one memory."""

    def __init__(self, config: TrainConfig):
        super().__init__(config.model)
        self.head.weight = nn.Parameter(self.wte.weight)


def new_model(tying: str, config: TrainConfig) -> Model5:
    """The same initial weights whatever the tying."""
    torch.manual_seed(config.seed)
    if tying == TYINGS[1]:
        return SharedMemory(config)
    tied = tying == TYINGS[0]
    return Model5(dataclasses.replace(config.model, tied_head=tied))


def train(tying: str, config: TrainConfig, corpus: Corpus) -> dict[str, float]:
    """Test losses after the run, and how far apart the two tables are, relative to their size."""
    model = new_model(tying, config)
    optimizer = make_optimizer(model, config.optimizer)
    scheduler = make_scheduler(optimizer, config.optimizer, config.steps)
    for step in range(config.steps):
        windows = torch.from_numpy(train_batch(corpus, config, step))
        train_step(model, optimizer, scheduler, windows, config)
    tests = torch.from_numpy(test_batches(corpus, config))
    wte, head = model.wte.weight.detach(), model.head.weight.detach()
    return {
        **evaluate(model, tests, config),
        "distance": float((head - wte).norm() / wte.norm()),
        "parameters": sum(p.numel() for group in optimizer.param_groups for p in group["params"]),
    }


def measure(base: TrainConfig, n_seeds: int) -> list[dict]:
    """A row for each objective and tying; its figures are one for each seed."""
    corpus, rows = load_corpus(base), []
    for objective in ("final_token", "all_tokens"):
        for tying in TYINGS:
            configs = [
                dataclasses.replace(base, objective=objective, seed=seed) for seed in range(n_seeds)
            ]
            runs = [train(tying, config, corpus) for config in configs]
            figures = {name: [run[name] for run in runs] for name in runs[0]}
            parameters = int(figures.pop("parameters")[0])
            rows.append(
                {"objective": objective, "tying": tying, "parameters": parameters} | figures
            )
            startup.note(f"{objective}, {tying}: {statistics.fmean(figures['all_token_nll']):.3f}")
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--out", default=str(HERE / "tying.json"))
    options = parser.parse_args()
    record.commit()  # as it is now, whatever is edited while it runs
    keys = "--data.tokenizer bytes --model.vocab_size 257 --optimizer.learning_rate 1e-3"
    args = ["--config", str(BASE), "--steps", str(options.steps), *keys.split()]
    config = parse(args, "docs/experiments/tying.py")
    rows = measure(config, options.seeds)
    result = record.circumstances("docs/experiments/tying.py", "cpu")
    result["machine"]["torch"] = torch.__version__
    result |= {"config": dataclasses.asdict(config), "rows": rows}
    record.write_json(Path(options.out), result)


if __name__ == "__main__":
    main()
