"""Model 5 as an `nn.Module`; read it beside jax_model5/model.py."""

import math

import torch
import torch.nn.functional as F
from torch import nn

from jax_model5.config import ModelConfig


class CausalAttention(nn.Module):
    """softmax(q k^T / sqrt(K)) v with dropout on the weights, for q, k, v [B, H, L, K]."""

    def __init__(self, rate: float):
        super().__init__()
        self.rate = rate

    def forward(
        self, q_BxHxLxK: torch.Tensor, k_BxHxLxK: torch.Tensor, v_BxHxLxK: torch.Tensor
    ) -> torch.Tensor:
        # Unlike nn.Dropout the function drops in eval mode, too.
        rate = self.rate if self.training else 0.0
        return F.scaled_dot_product_attention(
            q_BxHxLxK, k_BxHxLxK, v_BxHxLxK, is_causal=True, dropout_p=rate
        )


class Attention(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        self.n_heads = config.n_heads
        self.qkv = nn.Linear(config.d_model, 3 * config.d_model)
        self.attend = CausalAttention(config.dropout_at("attention"))
        self.proj = nn.Linear(config.d_model, config.d_model)

    def forward(self, x_BxLxD: torch.Tensor) -> torch.Tensor:
        B, L, D = x_BxLxD.shape
        q, k, v = (
            part_BxLxD.view(B, L, self.n_heads, -1).transpose(1, 2)
            for part_BxLxD in self.qkv(x_BxLxD).chunk(3, dim=-1)
        )
        y_BxHxLxK = self.attend(q, k, v)
        return self.proj(y_BxHxLxK.transpose(1, 2).reshape(B, L, D))


class Block(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        D = config.d_model
        self.ln_1 = nn.LayerNorm(D)
        self.attn = Attention(config)
        self.attn_drop = nn.Dropout(config.dropout_at("attention_output"))
        self.ln_2 = nn.LayerNorm(D)
        self.fc = nn.Linear(D, 4 * D)
        self.gelu = nn.GELU(approximate="tanh" if config.gelu == "tanh" else "none")
        self.out = nn.Linear(4 * D, D)
        self.mlp_drop = nn.Dropout(config.dropout_at("mlp"))

    def forward(self, x_BxLxD: torch.Tensor) -> torch.Tensor:
        x_BxLxD = x_BxLxD + self.attn_drop(self.attn(self.ln_1(x_BxLxD)))
        return x_BxLxD + self.mlp_drop(self.out(self.gelu(self.fc(self.ln_2(x_BxLxD)))))


class Model5(nn.Module):
    """tokens [B, L] -> raw logits [B, L, V] of every position."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.wte = nn.Embedding(config.vocab_size, config.d_model)
        self.wpe = nn.Embedding(config.seq_len, config.d_model)
        self.drop = nn.Dropout(config.dropout_at("embedding"))
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layers))
        self.ln_f = nn.LayerNorm(config.d_model)
        self.head = nn.Linear(config.d_model, config.vocab_size, bias=False)
        if config.init != "torch":  # PyTorch's own: there the head takes over what wte drew
            self.apply(self._init_weights)
            init_linear(self.wte.weight, None, config)  # it and the head start from one table
        if config.tied_head:
            self.head.weight = self.wte.weight  # one tensor, used twice
        else:
            self.head.weight.data.copy_(self.wte.weight)  # equal at the start only

    def forward(self, tokens_BxL: torch.Tensor) -> torch.Tensor:
        x_BxLxD = self.drop(self.embed(tokens_BxL))
        for block in self.blocks:
            x_BxLxD = block(x_BxLxD)
        return self.logits(self.ln_f(x_BxLxD))

    def embed(self, tokens_BxL: torch.Tensor) -> torch.Tensor:
        positions_L = torch.arange(tokens_BxL.shape[1], device=tokens_BxL.device)
        return self.wte(tokens_BxL) + self.wpe(positions_L)

    def logits(self, x_BxLxD: torch.Tensor) -> torch.Tensor:
        logits_BxLxV = self.head(x_BxLxD)
        if self.config.scale_logits:
            logits_BxLxV = logits_BxLxV / math.sqrt(self.config.d_model)
        return logits_BxLxV

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            init_linear(module.weight, module.bias, self.config)
        elif isinstance(module, nn.Embedding):
            init_embedding(module.weight, self.config)


def init_linear(weight: torch.Tensor, bias: torch.Tensor | None, config: ModelConfig) -> None:
    """In place, by `config.init`; the course's rule is N(0, 0.02), bias 0 (lesson 012)."""
    name, _, std = config.init.partition(":")
    if name == "xavier":
        nn.init.xavier_normal_(weight)
    elif name == "kaiming":
        nn.init.kaiming_normal_(weight)
    else:
        nn.init.normal_(weight, std=float(std or 0.02))
    if bias is not None:
        nn.init.zeros_(bias)


def init_embedding(weight: torch.Tensor, config: ModelConfig) -> None:
    """In place; the course's rule is Xavier normal (lesson 013)."""
    if config.init in ("course", "xavier"):
        nn.init.xavier_normal_(weight)
    else:
        init_linear(weight, None, config)
