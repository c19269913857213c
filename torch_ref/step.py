"""Optimizer, schedule, one training step and one evaluation, in PyTorch's own words."""

import contextlib
import math
from collections.abc import Callable

import torch

from jax_model5.config import TEST_METRICS, OptimizerConfig, TrainConfig
from jax_model5.errors import UserError
from torch_ref.loss import loss, n_last
from torch_ref.model import Model5


def require_plain(config: TrainConfig) -> None:
    """Raises UserError for what the reference does not have."""
    if config.init_from or config.optimizer.freeze:
        raise UserError("init_from, optimizer.freeze: the reference has neither; leave them out")


def make_optimizer(model: torch.nn.Module, config: OptimizerConfig) -> torch.optim.Optimizer:
    """AdamW, Adam or SGD over every parameter."""
    rate, decay, betas = config.learning_rate, config.weight_decay, (config.b1, config.b2)
    weights = model.parameters()
    if config.name == "sgd":
        return torch.optim.SGD(weights, rate, momentum=config.b1, weight_decay=decay)
    adam = torch.optim.AdamW if config.name == "adamw" else torch.optim.Adam
    return adam(weights, rate, betas, config.eps, weight_decay=decay)


def make_scheduler(
    optimizer: torch.optim.Optimizer, config: OptimizerConfig, steps: int
) -> torch.optim.lr_scheduler.LambdaLR:
    return torch.optim.lr_scheduler.LambdaLR(optimizer, schedule(config, steps))


def schedule(config: OptimizerConfig, steps: int) -> Callable[[int], float]:
    """Step -> factor of the learning rate."""
    warmup = config.warmup_steps

    def factor(step: int) -> float:
        if step < warmup:
            return step / warmup
        progress = min((step - warmup) / max(steps - warmup, 1), 1.0)
        if config.schedule == "cosine":
            return 0.5 * (1 + math.cos(math.pi * progress))
        return 1 - progress if config.schedule == "linear" else 1.0

    return factor


def train_step(
    model: Model5,
    optimizer: torch.optim.Optimizer,
    scheduler: torch.optim.lr_scheduler.LRScheduler,
    windows_BxL1: torch.Tensor,
    config: TrainConfig,
) -> dict[str, float]:
    """One optimizer step in train mode on windows [B, L + 1]; leaves the model in train mode."""
    model.train()
    optimizer.zero_grad()
    total = 0.0
    for micro_batch in range(config.accumulate):
        windows_bxL1 = windows_BxL1[micro_batch :: config.accumulate]
        with autocast(windows_BxL1, config):
            logits_bxLxV = model(windows_bxL1[:, :-1])
            mean_nll = loss(logits_bxLxV, windows_bxL1[:, 1:], n_last(config)) / config.accumulate
        mean_nll.backward()
        total += mean_nll.item()
    max_norm = config.optimizer.clip_norm or math.inf
    grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm)
    learning_rate = optimizer.param_groups[0]["lr"]
    optimizer.step()
    scheduler.step()
    return {"loss": total, "grad_norm": grad_norm.item(), "learning_rate": learning_rate}


@torch.no_grad()
def param_norm(model: Model5) -> float:
    """Norm of all parameters together, a tied table once."""
    return torch.nn.utils.get_total_norm(model.parameters()).item()


@torch.no_grad()
def eval_step(model: Model5, windows_BxL1: torch.Tensor, config: TrainConfig) -> dict[str, float]:
    """Final-token and all-token NLL [nats] of one test batch, in eval mode."""
    model.eval()
    with autocast(windows_BxL1, config):
        logits_BxLxV = model(windows_BxL1[:, :-1])
    targets_BxL = windows_BxL1[:, 1:]
    losses = [loss(logits_BxLxV, targets_BxL, n).item() for n in (1, config.model.seq_len)]
    return dict(zip(TEST_METRICS, losses, strict=True))


def autocast(windows: torch.Tensor, config: TrainConfig) -> contextlib.AbstractContextManager:
    """bfloat16 compute over float32 parameters, where the config asks for it."""
    is_bfloat16 = config.model.dtype == "bfloat16"
    return torch.autocast(windows.device.type, torch.bfloat16, enabled=is_bfloat16)
