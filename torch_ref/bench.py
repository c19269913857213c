"""PyTorch's side of the benchmark: the course's step, and the fastest one for the same work.

`python -m torch_ref.bench course|eager|compile|transformers [--config FILE]` speaks the protocol of
jax_model5/bench/measure.py: JSON when the first step is done, then for each line `step N`.
transformers is Hugging Face's GPT-2, which only writes texts.
"""

import importlib.metadata
import json
import math
import resource
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from jax_model5.batches import test_batches, train_batch
from jax_model5.config import TrainConfig, parse
from jax_model5.corpus import Corpus, load_corpus
from jax_model5.errors import UserError, one_line_errors, require
from torch_ref.generate import generate
from torch_ref.loss import loss, n_last
from torch_ref.model import Model5
from torch_ref.step import (
    autocast,
    eval_step,
    make_optimizer,
    make_scheduler,
    require_plain,
    train_step,
)

PROMPT_TOKENS, NEW_TOKENS = 16, 200  # as in jax_model5/bench/cases.py


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

    def step(windows_BxL1: torch.Tensor) -> torch.Tensor:
        model.train()
        losses = []
        for micro_batch in range(config.accumulate):
            with autocast(windows_BxL1, config):
                part = forward(windows_BxL1[micro_batch :: config.accumulate]) / config.accumulate
            part.backward()
            losses.append(part.detach())
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.optimizer.clip_norm or math.inf)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        scheduler.step()
        return torch.stack(losses).sum()  # no number: the GPU need not wait for the host

    return step


def transformers_text(config: TrainConfig, prompt_1xT: torch.Tensor) -> Callable[[], float]:
    """Times NEW_TOKENS drawn tokens of GPT-2 with its KV cache."""
    import transformers

    c = config.model
    gpt2 = transformers.GPT2Config(
        vocab_size=c.vocab_size,
        n_positions=c.seq_len,
        n_embd=c.d_model,
        n_layer=c.n_layers,
        n_head=c.n_heads,
        activation_function={"erf": "gelu", "tanh": "gelu_pytorch_tanh"}[c.gelu],
        tie_word_embeddings=c.tied_head,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
    )
    model: Any = transformers.GPT2LMHeadModel(gpt2)
    model = model.to(prompt_1xT.device, getattr(torch, c.dtype)).eval()
    how = {"do_sample": True, "top_k": 0, "max_new_tokens": NEW_TOKENS}
    mask_1xT = torch.ones_like(prompt_1xT)
    return lambda: timed(lambda: model.generate(prompt_1xT, attention_mask=mask_1xT, **how))


def course_step(model: Model5, config: TrainConfig) -> Callable:
    optimizer = make_optimizer(model, config.optimizer)
    scheduler = make_scheduler(optimizer, config.optimizer, config.steps)
    return lambda windows: train_step(model, optimizer, scheduler, windows, config)["loss"]


def trained(variant: str, config: TrainConfig, device: torch.device) -> tuple[Model5, Callable]:
    """The model, and its step: windows [B, L + 1] -> loss."""
    dtype = torch.float64 if config.model.dtype == "float64" else torch.float32
    if variant == "course":
        model = Model5(config.model).to(device, dtype)
        return model, course_step(model, config)
    tuned = TunedModel5(config.model).to(device, dtype)
    return tuned, tuned_step(tuned, config, is_compiled=variant == "compile")


def main() -> None:
    with one_line_errors():
        variant, *args = sys.argv[1:] or [""]
        if variant not in ("course", "eager", "compile", "transformers"):
            words = "course, eager, compile or transformers"
            raise UserError(f"{variant!r}: the first argument is {words}")
        config = parse(args, "torch_ref.bench")
        require_plain(config)
        corpus = load_corpus(config)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(config.seed)
    prompt_1xT = torch.from_numpy(corpus.tokens_T[None, :PROMPT_TOKENS].astype("int64")).to(device)
    if variant == "transformers":
        serve_transformers(config, prompt_1xT)
    else:
        serve_trained(variant, config, corpus, prompt_1xT)


def serve_transformers(config: TrainConfig, prompt_1xT: torch.Tensor) -> None:
    L, n = config.model.seq_len, PROMPT_TOKENS + NEW_TOKENS
    with one_line_errors():
        fix = f"GPT-2 of transformers writes {n} tokens into one window"
        require(n <= L, "model.seq_len", L, fix)
    versions = {name: importlib.metadata.version(name) for name in ("torch", "transformers")}
    text = transformers_text(config, prompt_1xT)
    serve({"versions": versions}, None, {"generate": text}, None)


def serve_trained(
    variant: str, config: TrainConfig, corpus: Corpus, prompt_1xT: torch.Tensor
) -> None:
    device = prompt_1xT.device
    model, train = trained(variant, config, device)
    step = 0

    def run_steps(count: int) -> float:
        nonlocal step
        batches = [train_batch(corpus, config, step + i) for i in range(count)]
        step += count
        train_all = lambda: [train(torch.from_numpy(b).to(device)) for b in batches]  # noqa: E731
        return timed(train_all) / count

    test_batch = torch.from_numpy(test_batches(corpus, config)[0]).to(device)
    run_steps(1)
    about = {
        "threads": torch.get_num_threads(),
        "precision": torch.get_float32_matmul_precision(),
        "versions": {"torch": torch.__version__},
    }

    def write_text() -> torch.Tensor:
        with autocast(prompt_1xT, config):
            return generate(model, prompt_1xT, NEW_TOKENS)

    runs = {
        "eval": lambda: timed(lambda: eval_step(model, test_batch, config)),
        "generate": lambda: timed(write_text),
    }
    first_batch = torch.from_numpy(train_batch(corpus, config, 0)).to(device)
    serve(about, run_steps, runs, lambda path: initial_loss(model, first_batch, config, path))


def serve(
    about: dict[str, Any],
    run_steps: Callable[[int], float] | None,
    runs: dict[str, Callable[[], float]],
    initial_loss: Callable[[str], float] | None,
) -> None:
    """As jax_model5/bench/measure.py's: the first run of each kind is a warm-up."""
    print(json.dumps(about), flush=True)
    warm: set[str] = set()
    for line in sys.stdin:
        kind, argument = line.rstrip("\n").split(" ", 1)
        if kind == "loss" and initial_loss:
            print(json.dumps({"loss": initial_loss(argument)}), flush=True)
            continue
        if kind == "step" and run_steps:
            seconds = [run_steps(int(argument))]
            print(json.dumps({"seconds": seconds, "peak_bytes": peak_bytes()}), flush=True)
            continue
        if kind not in warm:
            runs[kind]()
            warm.add(kind)
        seconds = [runs[kind]() for _ in range(int(argument))]
        print(json.dumps({"seconds": seconds, "peak_bytes": peak_bytes()}), flush=True)


def timed(run: Callable[[], Any]) -> float:
    start = time.perf_counter()
    run()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


@torch.no_grad()
def initial_loss(
    model: Model5, windows_BxL1: torch.Tensor, config: TrainConfig, path: str
) -> float:
    """Loss of a batch, dropout off, at the weights that JAX wrote to `path`."""
    weights = {name: torch.from_numpy(array) for name, array in np.load(path).items()}
    model.load_state_dict({"head.weight": weights["wte.weight"], **weights})
    model.eval()
    n = n_last(config)
    with autocast(windows_BxL1, config):
        tokens_BxL = windows_BxL1[:, :-1]
        is_tuned = isinstance(model, TunedModel5)
        logits_BxNxV = model(tokens_BxL, n) if is_tuned else model(tokens_BxL)
    return loss(logits_BxNxV.to(model.wte.weight.dtype), windows_BxL1[:, 1:], n).item()


def peak_bytes() -> int:
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    scale = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale


if __name__ == "__main__":
    main()
