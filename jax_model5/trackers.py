"""TensorBoard and Weights & Biases: a tracker shows what the log holds, and each new record."""

import importlib.util
import os
import secrets
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jax_model5.config import TrainConfig, flatten
from jax_model5.errors import UserError, require
from jax_model5.record import Sink

_PACKAGES = {"tensorboard": "tensorboardX", "wandb": "wandb"}


def require_tracker(config: TrainConfig) -> None:
    """Raises UserError where the tracker's package is not installed. Imports nothing."""
    package = _PACKAGES.get(config.tracker)
    is_there = package is None or importlib.util.find_spec(package) is not None
    require(is_there, "tracker", config.tracker, "not installed; pip install -e '.[track]'")


def open_tracker(
    config: TrainConfig, folder: Path, records: Sequence[dict[str, Any]]
) -> list[Sink]:
    """The tracker of `config.tracker`, if any, that has the log's records and no other.

    Raises:
      UserError: it cannot be opened.
    """
    if config.tracker == "none":
        return []
    tracker: Sink = (WandB if config.tracker == "wandb" else TensorBoard)(config, folder)
    for record in records:
        tracker.write(**record)
    return [tracker]


class TensorBoard:
    """Event files in `tensorboard/`, written anew from the log: no reader sees a point twice."""

    def __init__(self, _: TrainConfig, folder: Path):
        import tensorboardX

        shutil.rmtree(folder / "tensorboard", ignore_errors=True)
        self._writer = tensorboardX.SummaryWriter(str(folder / "tensorboard"))

    def write(self, kind: str, step: int, **values: float) -> None:
        for name, value in values.items():
            self._writer.add_scalar(f"{kind}/{name}", value, step)
        if kind == "eval":
            self._writer.flush()


class WandB:
    """One run of Weights & Biases, in `wandb/`, however often it is started again.

    What its server has is not sent again; offline the files are written anew from the log.
    WANDB_MODE, WANDB_PROJECT and its other variables hold.
    """

    def __init__(self, config: TrainConfig, folder: Path):
        import wandb

        path = folder / "wandb" / "run_id"
        run_id = path.read_text() if path.exists() else secrets.token_hex(4)
        before = list(path.parent.glob("offline-run-*"))
        os.environ.setdefault("WANDB_PROJECT", "jax_model5")
        settings = wandb.Settings(silent=True, console="off")
        try:
            self._run = wandb.init(
                dir=folder,
                id=run_id,
                name=folder.name,
                resume="allow",
                config=flatten(config),
                settings=settings,
            )
        except (wandb.Error, ValueError) as error:
            reason = " ".join(str(error).split())
            raise UserError(f"tracker='wandb': {reason}; or set WANDB_MODE=offline") from None
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(run_id)
        for unsent in before:
            shutil.rmtree(unsent)

    def write(self, kind: str, step: int, **values: float) -> None:
        if step >= self._run.starting_step:
            self._run.log({f"{kind}/{name}": value for name, value in values.items()}, step=step)
