"""PyTorch's side of the benchmark: the course's step, and the fastest one for the same work.

`python -m torch_ref.bench VARIANT [--config FILE]` speaks the protocol of
jax_model5/bench/measure.py: JSON when the first step is done, then for each line `step N`.
The variants: course, eager, compile; transformers, Hugging Face's GPT-2 in the place of our model;
compiled_transformers, the same where texts are written by a compiled program.
"""

import copy
import functools
import importlib.metadata
import json
import math
import re
import resource
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from jax_model5.batches import test_batches, train_batch
from jax_model5.config import ModelConfig, TrainConfig, parse
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

NEW_TOKENS = 200  # as in jax_model5/bench/cases.py


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


# Our names -> those of transformers, whose linear layers hold the transposed matrix.
_NAMES = {
    r"^head\.": "lm_head.",
    r"^(wte|wpe|ln_f)\.": r"transformer.\1.",
    r"^blocks\.": "transformer.h.",
    r"\.attn\.qkv\.": ".attn.c_attn.",
    r"\.attn\.proj\.": ".attn.c_proj.",
    r"\.fc\.": ".mlp.c_fc.",
    r"\.out\.": ".mlp.c_proj.",
}


class TransformersModel5(torch.nn.Module):
    """tokens_BxL -> logits_BxNxV of the last N positions, by transformers' own means."""

    def __init__(self, config: ModelConfig):
        import transformers  # seconds to import, and only its peer needs it

        super().__init__()
        self.config, rate = config, config.dropout_at("mlp")
        is_one = config.dropout_at("attention_output") == rate
        fix = "GPT-2 of transformers has one rate after attention and MLP; name both or neither"
        require(is_one, "model.dropout_sites", config.dropout_sites, fix)
        shape = transformers.GPT2Config(
            vocab_size=config.vocab_size,
            n_positions=config.seq_len,
            n_embd=config.d_model,
            n_layer=config.n_layers,
            n_head=config.n_heads,
            activation_function={"erf": "gelu", "tanh": "gelu_pytorch_tanh"}[config.gelu],
            tie_word_embeddings=config.tied_head,
            embd_pdrop=config.dropout_at("embedding"),
            attn_pdrop=config.dropout_at("attention"),
            resid_pdrop=rate,
            bos_token_id=None,
            eos_token_id=None,
            pad_token_id=0,
        )
        self.gpt2: Any = transformers.GPT2LMHeadModel(shape)
        self.versions = {"transformers": importlib.metadata.version("transformers")}

    def forward(self, tokens_BxL: torch.Tensor, n_last: int = 0) -> torch.Tensor:
        """N = 0: all positions."""
        logits = self.gpt2(tokens_BxL, logits_to_keep=n_last, use_cache=False).logits
        return logits / math.sqrt(self.config.d_model) if self.config.scale_logits else logits

    def load_state_dict(self, weights: Mapping[str, torch.Tensor]) -> Any:  # type: ignore[override]
        """Of our model, under our names."""
        theirs = {}
        for name, weight in weights.items():
            is_linear = weight.ndim == 2 and name.startswith("blocks.")
            for ours, other in _NAMES.items():
                name = re.sub(ours, other, name)
            theirs[name] = weight.T if is_linear else weight
        return self.gpt2.load_state_dict(theirs)

    def writer(self, is_compiled: bool) -> Any:
        """A copy for texts, in the model's dtype."""
        gpt2 = copy.deepcopy(self.gpt2).to(getattr(torch, self.config.dtype)).eval()
        if is_compiled:
            from transformers import CompileConfig

            how = gpt2.generation_config
            how.cache_implementation = "static"  # one shape for all tokens
            how.compile_config = CompileConfig()
            how.compile_config._compile_all_devices = True  # else on a GPU only
        return gpt2


def write_by_transformers(gpt2: Any, prompt_BxT: torch.Tensor, n_tokens: int) -> torch.Tensor:
    """Texts with its KV cache."""
    how = {"do_sample": True, "top_k": 0, "max_new_tokens": n_tokens}
    return gpt2.generate(prompt_BxT, attention_mask=torch.ones_like(prompt_BxT), **how)


def tuned_step(model: torch.nn.Module, config: TrainConfig, is_compiled: bool) -> Callable:
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


def course_step(model: Model5, config: TrainConfig) -> Callable:
    optimizer = make_optimizer(model, config.optimizer)
    scheduler = make_scheduler(optimizer, config.optimizer, config.steps)
    return lambda windows: train_step(model, optimizer, scheduler, windows, config)["loss"]


_TRANSFORMERS = ("transformers", "compiled_transformers")  # they differ in how texts are written
_VARIANTS = ("course", "eager", "compile", *_TRANSFORMERS)


def trained(variant: str, config: TrainConfig, device: torch.device) -> tuple[Any, Callable]:
    """The model, and its step: windows [B, L + 1] -> loss."""
    dtype = torch.float64 if config.model.dtype == "float64" else torch.float32
    if variant == "course":
        model = Model5(config.model).to(device, dtype)
        return model, course_step(model, config)
    kind = TransformersModel5 if variant in _TRANSFORMERS else TunedModel5
    tuned = kind(config.model).to(device, dtype)
    return tuned, tuned_step(tuned, config, is_compiled=variant == "compile")


def text_writer(
    variant: str, model: Any, corpus: Corpus, config: TrainConfig, device: torch.device
) -> Callable[[int, int], float]:
    """Times B texts at once after P tokens each."""
    writers: list[Any] = []  # transformers' model in the dtype of texts

    def write(B: int, prompt: int) -> float:
        n = min(NEW_TOKENS, config.model.seq_len - prompt)
        tokens = corpus.tokens_T[: B * prompt].astype("int64").reshape(B, prompt)
        prompt_BxT = torch.from_numpy(tokens).to(device)
        if variant in _TRANSFORMERS:
            writers[:] = writers or [model.writer(is_compiled=variant == "compiled_transformers")]
            return timed(lambda: write_by_transformers(writers[0], prompt_BxT, n))
        with autocast(prompt_BxT, config):
            return timed(lambda: generate(model, prompt_BxT, n))

    return write


def main() -> None:
    with one_line_errors():
        variant, *args = sys.argv[1:] or [""]
        if variant not in _VARIANTS:
            raise UserError(f"{variant!r}: the first argument is one of {', '.join(_VARIANTS)}")
        config = parse(args, "torch_ref.bench")
        require_plain(config)
        corpus = load_corpus(config)
    torch.manual_seed(config.seed)
    serve_trained(variant, config, corpus)


def serve_trained(variant: str, config: TrainConfig, corpus: Corpus) -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with one_line_errors():
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
        "versions": {"torch": torch.__version__, **getattr(model, "versions", {})},
    }
    runs: dict[str, Callable[..., float]] = {
        "eval": lambda: timed(lambda: eval_step(model, test_batch, config)),
        "generate": text_writer(variant, model, corpus, config, device),
    }
    first_batch = torch.from_numpy(train_batch(corpus, config, 0)).to(device)
    serve(about, run_steps, runs, lambda path: initial_loss(model, first_batch, config, path))


def serve(
    about: dict[str, Any],
    run_steps: Callable[[int], float],
    runs: dict[str, Callable[..., float]],
    initial_loss: Callable[[str], float],
) -> None:
    """As jax_model5/bench/measure.py's: the first run of each kind is a warm-up."""
    print(json.dumps(about), flush=True)
    warm: set[str] = set()
    for line in sys.stdin:
        kind, argument = line.rstrip("\n").split(" ", 1)
        if kind == "loss":
            print(json.dumps({"loss": initial_loss(argument)}), flush=True)
            continue
        if kind == "step":
            seconds = [run_steps(int(argument))]
            print(json.dumps({"seconds": seconds, "peak_bytes": peak_bytes()}), flush=True)
            continue
        is_text, numbers = kind == "generate", [*map(int, argument.split("x"))]
        run = functools.partial(runs[kind], *numbers) if is_text else runs[kind]
        if kind not in warm:
            run()
            warm.add(kind)
        seconds = [run() for _ in range(1 if is_text else numbers[0])]
        print(json.dumps({"seconds": seconds, "peak_bytes": peak_bytes()}), flush=True)


def timed(run: Callable[[], Any]) -> float:
    start = time.perf_counter()
    run()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


@torch.no_grad()
def initial_loss(
    model: torch.nn.Module, windows_BxL1: torch.Tensor, config: TrainConfig, path: str
) -> float:
    """Loss of a batch, dropout off, at the weights that JAX wrote to `path`."""
    weights = {name: torch.from_numpy(array) for name, array in np.load(path).items()}
    model.load_state_dict({"head.weight": weights["wte.weight"], **weights})
    model.eval()
    n = n_last(config)
    with autocast(windows_BxL1, config):
        tokens_BxL = windows_BxL1[:, :-1]
        is_course = type(model) is Model5
        logits_BxNxV = model(tokens_BxL) if is_course else model(tokens_BxL, n)
    dtype = next(model.parameters()).dtype
    return loss(logits_BxNxV.to(dtype), windows_BxL1[:, 1:], n).item()


def peak_bytes() -> int:
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    scale = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale


if __name__ == "__main__":
    main()
