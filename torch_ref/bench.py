"""PyTorch's side of the benchmark: the course's step, and the fastest one for the same work.

`python -m torch_ref.bench course|eager|compile [--config FILE]` speaks the protocol of
jax_model5/bench/measure.py: JSON when the first step is done, then for each line `step N`.
"""

import json
import math
import resource
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from jax_model5 import data
from jax_model5.config import TrainConfig, one_line_errors, parse
from torch_ref.loss import n_last
from torch_ref.model import Model5
from torch_ref.step import autocast, eval_step, make_optimizer, make_scheduler, train_step


class TunedModel5(Model5):
    """The same parameters; the last block and the head compute the last N positions only."""

    def forward(self, tokens_BxL: torch.Tensor, n_last: int | None = None) -> torch.Tensor:
        n_last = n_last or tokens_BxL.shape[1]
        x_BxLxD = self.drop(self.embed(tokens_BxL))
        for block in self.blocks[:-1]:
            x_BxLxD = block(x_BxLxD)
        return self.logits(self.ln_f(suffix_block(self.blocks[-1], x_BxLxD, n_last)))


def suffix_block(block: Any, x_BxLxD: torch.Tensor, n_last: int) -> torch.Tensor:
    """A block's output at the last N positions, x_BxNxD: keys and values of all, queries of N."""
    B, L, D = x_BxLxD.shape
    attn, h_BxLxD = block.attn, block.ln_1(x_BxLxD)
    weight_3DxD, bias_3D = attn.qkv.weight, attn.qkv.bias
    q_BxNxD = F.linear(h_BxLxD[:, -n_last:], weight_3DxD[:D], bias_3D[:D])
    k_BxLxD, v_BxLxD = F.linear(h_BxLxD, weight_3DxD[D:], bias_3D[D:]).chunk(2, dim=-1)
    q, k, v = (
        part.view(B, -1, attn.n_heads, D // attn.n_heads).transpose(1, 2)
        for part in (q_BxNxD, k_BxLxD, v_BxLxD)
    )
    is_whole = n_last == L
    mask_NxL = None
    if 1 < n_last < L:
        mask_NxL = torch.ones(n_last, L, dtype=torch.bool, device=x_BxLxD.device).tril(L - n_last)
    rate = attn.attend.rate if block.training else 0.0
    y_BxHxNxK = F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask_NxL, is_causal=is_whole, dropout_p=rate
    )
    y_BxNxD = attn.proj(y_BxHxNxK.transpose(1, 2).reshape(B, n_last, D))
    x_BxNxD = x_BxLxD[:, -n_last:] + block.attn_drop(y_BxNxD)
    return x_BxNxD + block.mlp_drop(block.out(block.gelu(block.fc(block.ln_2(x_BxNxD)))))


def tuned_step(model: TunedModel5, config: TrainConfig, is_compiled: bool) -> Callable:
    """windows [B, L + 1] -> loss: one step with fused AdamW, compiled by inductor or eager."""
    torch.set_float32_matmul_precision("high")  # as XLA on a GPU; a CPU has one precision
    optimizer = make_optimizer(model, config.optimizer)
    for group in optimizer.param_groups:
        group["fused"] = True
    scheduler = make_scheduler(optimizer, config.optimizer, config.steps)
    n = n_last(config)

    def mean_nll(windows_bxL1: torch.Tensor) -> torch.Tensor:
        logits_bxNxV = model(windows_bxL1[:, :-1], n)
        return F.cross_entropy(logits_bxNxV.flatten(0, 1), windows_bxL1[:, -n:].flatten().long())

    forward = torch.compile(mean_nll) if is_compiled else mean_nll

    def step(windows_BxL1: torch.Tensor) -> float:
        model.train()
        losses = []
        for micro_batch in range(config.accumulate):
            with autocast(windows_BxL1, config):
                loss = forward(windows_BxL1[micro_batch :: config.accumulate]) / config.accumulate
            loss.backward()
            losses.append(loss.detach())
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.optimizer.clip_norm or math.inf)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        scheduler.step()
        return float(sum(losses))

    return step


def course_step(model: Model5, config: TrainConfig) -> Callable:
    optimizer = make_optimizer(model, config.optimizer)
    scheduler = make_scheduler(optimizer, config.optimizer, config.steps)
    return lambda windows: train_step(model, optimizer, scheduler, windows, config)["loss"]


def main() -> None:
    with one_line_errors():
        variant, *args = sys.argv[1:]
        config = parse(args, "torch_ref.bench")
        corpus = data.load_corpus(config)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(config.seed)
    if variant == "course":
        model = Model5(config.model).to(device)
        run = course_step(model, config)
    else:
        model = tuned_model = TunedModel5(config.model).to(device)
        run = tuned_step(tuned_model, config, is_compiled=variant == "compile")
    step, loss = 0, math.nan

    def timed_step() -> float:
        nonlocal step, loss
        batch = data.train_batch(corpus, config, step)
        step += 1
        start = time.perf_counter()
        loss = run(torch.from_numpy(batch).to(device))
        return time.perf_counter() - start

    def timed_eval() -> float:
        batch = torch.from_numpy(data.test_batches(corpus, config)[0]).to(device)
        start = time.perf_counter()
        eval_step(model, batch, config)
        return time.perf_counter() - start

    timed_step()
    about = {"loss": loss, "versions": {"torch": torch.__version__}}
    serve(about, {"step": timed_step, "eval": timed_eval})


def serve(about: dict[str, Any], timed: dict[str, Callable[[], float]]) -> None:
    print(json.dumps(about), flush=True)
    for line in sys.stdin:
        kind, count = line.split()
        seconds = [timed[kind]() for _ in range(int(count))]
        print(json.dumps({"seconds": seconds, "peak_bytes": peak_bytes()}), flush=True)


def peak_bytes() -> int:
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    scale = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale


if __name__ == "__main__":
    main()
