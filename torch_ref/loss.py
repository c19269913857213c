"""Log-softmax, then NLLLoss, on the last N positions of all the logits (course lesson 018)."""

import torch
import torch.nn.functional as F
from torch import nn

from jax_model5.config import TrainConfig


def n_last(config: TrainConfig) -> int:
    """N, the trailing positions that get a loss."""
    positions = {"final_token": 1, "all_tokens": config.model.seq_len, "last_k": config.last_k}
    return positions[config.objective]


def loss(logits_BxLxV: torch.Tensor, targets_BxL: torch.Tensor, n_last: int) -> torch.Tensor:
    """Mean NLL [nats] of the last N targets."""
    log_probabilities_BxNxV = F.log_softmax(logits_BxLxV[:, -n_last:], dim=-1)
    targets_BxN = targets_BxL[:, -n_last:].long()
    return nn.NLLLoss()(log_probabilities_BxNxV.flatten(0, 1), targets_BxN.flatten())
