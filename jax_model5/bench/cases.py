"""What is measured: cases by name, and the points of a sweep."""

import dataclasses
from pathlib import Path

from jax_model5.config import ModelConfig, TrainConfig, parse
from jax_model5.errors import require

SMALL = TrainConfig()
NEW_TOKENS = 200  # of a text, or as many as the window holds
SWEEPS = {
    "batch": (1, 2, 4, 8, 16, 32),
    "seq": (32, 64, 128, 256, 512),
    "last_k": (1, 4, 16, 64, 256),
    "layers": (2, 4, 6, 8, 12),
}


def model5(platform: str) -> TrainConfig:
    """GPT-2 small, batch 4 on a CPU and 64 on an accelerator."""
    model = ModelConfig(d_model=768, n_heads=12, n_layers=12)
    return TrainConfig(model=model, batch_size=4 if platform == "cpu" else 64)


def case(name: str, platform: str) -> TrainConfig:
    """small: 4 layers, width 128, batch 16 x 256; model5: the full size; or a config file.

    Raises:
      UserError: no such case, or a config file that cannot be used.
    """
    if name == "small":
        return SMALL
    if name == "model5":
        return model5(platform)
    is_file = Path(name).expanduser().is_file()
    require(is_file, "case", name, "use small, model5, or the path of a config file")
    return parse(["--config", name], "jax_model5.bench")


def new_tokens(config: TrainConfig, prompt: int) -> int:
    """How many are written after a prompt of so many."""
    return min(NEW_TOKENS, config.model.seq_len - prompt)


def with_model(config: TrainConfig, **fields: object) -> TrainConfig:
    return dataclasses.replace(config, model=dataclasses.replace(config.model, **fields))  # type: ignore[arg-type]


def sweep_points(config: TrainConfig, sweep: str) -> list[tuple[int, TrainConfig]]:
    """(value, config) of each point; a model that is too short for a `last_k` leaves it out."""
    points = []
    for value in SWEEPS[sweep]:
        if sweep == "batch":
            point = dataclasses.replace(config, batch_size=value, accumulate=1)
        elif sweep == "seq":
            k = min(config.last_k, value)
            point = dataclasses.replace(with_model(config, seq_len=value), last_k=k)
        elif sweep == "layers":
            point = with_model(config, n_layers=value)
        elif value <= config.model.seq_len:
            point = dataclasses.replace(config, objective="last_k", last_k=value)
        else:
            continue
        points.append((value, point))
    return points
