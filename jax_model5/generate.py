"""Sampling text from a trained model with a KV cache; `python -m jax_model5.generate`."""

import argparse
import codecs
import dataclasses
import functools
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tiktoken

from jax_model5 import tokenizer
from jax_model5.config import ModelConfig, TrainConfig, config_of_run
from jax_model5.errors import (
    ArgumentParser,
    UserError,
    disk_errors,
    one_line_errors,
    require,
    require_at_least_1,
)
from jax_model5.kernels import random_bits
from jax_model5.model import Block, LayerNorm, Model5, Slots
from jax_model5.startup import set_up_jax
from jax_model5.step import SAMPLE, abstract_state
from jax_model5.trees import blocks_of, in_place, layers_in_place, merge, split

AT_ONCE = 8  # tokens that one call of a compiled loop writes; they appear together


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How the next token is drawn from its logits z: p_i ~ exp(z_i / temperature)."""

    temperature: float = 1.0
    top_k: int = 0
    """Only the k likeliest tokens; 0: all of them [tokens]."""
    top_p: float = 1.0
    """Only the likeliest tokens that reach this probability together (Holtzman et al. 2020)."""
    greedy: bool = False
    """The likeliest token, nothing drawn."""

    def __post_init__(self) -> None:
        if not 0 < self.temperature < float("inf"):
            raise UserError(
                f"temperature={self.temperature:g}: must be above 0 and finite; --greedy takes the "
                "likeliest token"
            )
        if not 0 < self.top_p <= 1:
            raise UserError(f"top_p={self.top_p:g}: must be above 0 and at most 1")
        if self.top_k < 0:
            raise UserError(f"top_k={self.top_k}: must be 0 (all tokens) or more")


# ---- a few more tokens: the KV cache ------------------------------------------------------------


def unstack(params: dict, config: ModelConfig) -> dict:
    """The parameters as a token reads them: `blocks` one by one, matrices in the model's dtype.

    A block cut from the stack is a copy, as is a matrix in another dtype: both once, not for every
    token. The `head` is there also where it is wte.
    """
    kernels, others = split(params, ["*/kernel"], "params")
    matrices = {**kernels, "head": params.get("head", params["wte"])}
    rest = merge(others, jax.tree.map(lambda matrix: matrix.astype(config.dtype), matrices))
    blocks = blocks_of(rest.pop("trunk", {}), rest.pop("last_block"))
    return {**rest, "blocks": blocks}


def of_text(config: ModelConfig) -> ModelConfig:
    """The config that a text is written with: a CPU writes bfloat16's in float32.

    That is six times as fast (docs/performance.md).
    """
    is_slow = config.dtype == "bfloat16" and jax.default_backend() == "cpu"
    return dataclasses.replace(config, dtype="float32") if is_slow else config


def prepared(params: dict, config: ModelConfig) -> tuple[dict, ModelConfig]:
    """What `unstack` makes of the parameters, and the config to go on with.

    On one CPU nothing is copied. JAX copies a state that is donated meanwhile.
    """
    config = of_text(config)
    devices = params["wte"].devices() if isinstance(params["wte"], jax.Array) else ()
    if [device.platform for device in devices] == ["cpu"]:
        trunk = jax.tree.map(layers_in_place, params.get("trunk", {}))
        params = {**jax.tree.map(in_place, params), "trunk": trunk}
        return unstack(params, config), config
    return jax.jit(unstack, static_argnames="config")(params, config=config), config


def empty_cache(config: ModelConfig, n_rows: int, n_slots: int) -> list[dict]:
    """Of each block, zeros for the keys and values [B * H, S, K] of S tokens a row."""
    H = config.n_heads
    zeros_XxSxK = jnp.zeros((n_rows * H, n_slots, config.d_model // H), config.dtype)
    return [{"attn": {"k": zeros_XxSxK, "v": zeros_XxSxK}} for _ in range(config.n_layers)]


def extend(
    unstacked: dict,
    cache: list,
    tokens_BxT: jax.Array,
    slot: jax.Array | int,
    pad_B: jax.Array,
    n_last: int,
    config: ModelConfig,
) -> tuple[jax.Array, list]:
    """The cache with T more tokens of each row from `slot` on, and the last N's features x_BxNxD.

    All rows end in the same slot: one shorter than the longest leaves its first `pad_B` unused. The
    numbers are those of one forward pass over all tokens. The cache must have slot + T slots: JAX
    moves a write beyond its end back.
    """
    T, S = tokens_BxT.shape[1], cache[0]["attn"]["k"].shape[1]
    slot_T, slot_S = slot + jnp.arange(T), jnp.arange(S)
    is_past_TxS, is_itself_TxS = slot_S <= slot_T[:, None], slot_S == slot_T[:, None]
    # What is unused sees itself: the softmax of nothing is no number.
    is_seen_BxTxS = is_past_TxS & (slot_S >= pad_B[:, None, None]) | is_itself_TxS
    slots = Slots(jnp.asarray(slot), is_seen_BxTxS.repeat(config.n_heads, axis=0))
    position_BxT = (slot_T - pad_B[:, None]).clip(0)
    x_BxTxD = (unstacked["wte"][tokens_BxT] + unstacked["wpe"][position_BxT]).astype(config.dtype)
    block: Callable[..., Any] = functools.partial(Block(config).apply, mutable=["cache"])
    x_BxNxD, longer, n_of_blocks = x_BxTxD, [], [*[T] * (len(cache) - 1), n_last]
    for params, kept, n in zip(unstacked["blocks"], cache, n_of_blocks, strict=True):
        variables = {"params": params, "cache": kept}
        x_BxNxD, changed = block(variables, x_BxNxD, n, deterministic=True, slots=slots)
        longer.append(changed["cache"])
    ln_f: Callable[..., Any] = LayerNorm(config).apply
    return ln_f({"params": unstacked["ln_f"]}, x_BxNxD), longer


# ---- one token ----------------------------------------------------------------------------------


def allowed_logits(logits_BxV: jax.Array, sampling: Sampling) -> jax.Array:
    """Logits / temperature, and -inf for the tokens that top_k and top_p exclude, in this order."""
    logits_BxV = logits_BxV / sampling.temperature
    if 0 < sampling.top_k < logits_BxV.shape[1]:
        least_Bx1 = jax.lax.top_k(logits_BxV, sampling.top_k)[0][:, -1:]
        logits_BxV = jnp.where(logits_BxV < least_Bx1, -jnp.inf, logits_BxV)
    if sampling.top_p < 1:
        sorted_BxV = jnp.sort(logits_BxV, descending=True)
        p_BxV = jax.nn.softmax(sorted_BxV)
        before_BxV = jnp.cumsum(p_BxV, axis=1) - p_BxV  # the likeliest token always stays
        kept_BxV = jnp.where(before_BxV < sampling.top_p, sorted_BxV, jnp.inf)
        logits_BxV = jnp.where(logits_BxV < kept_BxV.min(1, keepdims=True), -jnp.inf, logits_BxV)
    return logits_BxV


def draw(key: jax.Array, logits_BxV: jax.Array, sampling: Sampling) -> jax.Array:
    """One token of each row, tokens_B. A row's draw does not depend on the other rows."""
    if sampling.greedy:
        return logits_BxV.argmax(axis=1).astype(jnp.int32)
    # Gumbel's trick: the largest of z_i - log(e_i), each e_i ~ Exp(1), is token i with probability
    # p_i. Padded, and by top_k: XLA on a CPU would draw the noise in argmax's loop, one by one.
    padding = (0, 0), (0, -logits_BxV.shape[1] % 64)
    z_BxW = jnp.pad(allowed_logits(logits_BxV, sampling), padding, constant_values=-jnp.inf)
    uniform_BxW = (random_bits(key, z_BxW.shape).astype(jnp.float32) + 0.5) * 2.0**-32
    e_BxW = -jnp.log1p(-uniform_BxW.clip(max=1 - 2**-24))
    return jax.lax.top_k(z_BxW - jnp.log(e_BxW), 1)[1][:, 0]


@functools.partial(jax.jit, static_argnames=("n_slots", "config", "sampling"))
def prefill(
    unstacked: dict,
    key: jax.Array,
    tokens_BxT: jax.Array,
    pad_B: jax.Array,
    *,
    n_slots: int,
    config: ModelConfig,
    sampling: Sampling,
) -> tuple[jax.Array, list]:
    """The token after each row, whose first `pad_B` are padding, and the KV cache, in one pass."""
    cache = empty_cache(config, len(tokens_BxT), n_slots)
    x_Bx1xD, cache = extend(unstacked, cache, tokens_BxT, 0, pad_B, 1, config)
    return draw(key, logits(unstacked, x_Bx1xD, config), sampling), cache


@functools.partial(jax.jit, static_argnames=("config", "sampling"), donate_argnames="cache")
def decode(
    unstacked: dict,
    cache: list,
    key: jax.Array,
    token_B: jax.Array,
    slot: jax.Array,
    pad_B: jax.Array,
    first: jax.Array,
    n: jax.Array,
    *,
    config: ModelConfig,
    sampling: Sampling,
) -> tuple[jax.Array, list]:
    """The n tokens that follow `token_B`, whose slot is free yet, and the longer cache.

    The first n columns of tokens_BxC, C = AT_ONCE. They are the tokens `first`, `first + 1`, ... of
    the text: their draws' keys are folded by that.
    """

    def one(i: jax.Array, carry: tuple) -> tuple:
        cache, token_B, tokens_BxC = carry
        x_Bx1xD, cache = extend(unstacked, cache, token_B[:, None], slot + i, pad_B, 1, config)
        step_key = jax.random.fold_in(key, first + i)
        token_B = draw(step_key, logits(unstacked, x_Bx1xD, config), sampling)
        return cache, token_B, tokens_BxC.at[:, i].set(token_B)

    tokens_BxC = jnp.zeros((len(token_B), AT_ONCE), jnp.int32)
    cache, _, tokens_BxC = jax.lax.fori_loop(0, n, one, (cache, token_B, tokens_BxC))
    return tokens_BxC, cache


def logits(unstacked: dict, x_Bx1xD: jax.Array, config: ModelConfig) -> jax.Array:
    """logits_BxV of features."""
    tables = {name: unstacked[name] for name in ("wte", "wpe", "head")}
    model = Model5(dataclasses.replace(config, tied_head=False))
    apply: Callable[..., Any] = functools.partial(model.apply, method="logits")
    return apply({"params": tables}, x_Bx1xD)[:, 0]


# ---- many tokens --------------------------------------------------------------------------------


def generate(
    params: dict,
    prompts: Sequence[Sequence[int]],
    key: jax.Array,
    *,
    config: ModelConfig,
    sampling: Sampling,
    n_tokens: int,
    end: int = -1,
) -> Iterator[np.ndarray]:
    """Yields tokens_B, the next token of each prompt, at most n_tokens times.

    Prompts may differ in length. A row that has drawn `end` goes on with it; when all have, it
    stops. A row longer than the window goes on from its last L tokens. Their positions change with
    every token then, so that no cached key stays true: the window is run forward again, and every
    token comes from the last position, the one that the final-token objective trains.
    """
    rows, cache, index = [list(prompt) for prompt in prompts], None, 0
    is_done_B = np.zeros(len(rows), bool)
    key = jax.random.fold_in(key, SAMPLE)
    unstacked, config = prepared(params, config)
    how = {"config": config, "sampling": sampling}
    while index < n_tokens:
        longest = max(map(len, rows))
        if cache is None or longest > config.seq_len:
            n, (tokens_BxT, pad_B) = 1, _windows(rows, config.seq_len)
            slot, n_more = tokens_BxT.shape[1], min(n_tokens - index - 1, config.seq_len - longest)
            n_slots = -(-(slot + max(n_more, 0)) // 32) * 32  # few sizes: few programs to compile
            step_key = jax.random.fold_in(key, index)
            token_B, cache = prefill(unstacked, step_key, tokens_BxT, pad_B, n_slots=n_slots, **how)
            tokens_BxC = token_B[:, None]
        else:
            n = min(AT_ONCE, n_tokens - index, config.seq_len + 1 - longest)
            last_B = np.array([row[-1] for row in rows], np.int32)
            tokens_BxC, cache = decode(unstacked, cache, key, last_B, slot, pad_B, index, n, **how)
            slot += n
        for token_B in np.asarray(tokens_BxC)[:, :n].T:
            new_B = np.where(is_done_B, end, token_B)
            for row, token in zip(rows, new_B, strict=True):
                row.append(token)
            yield new_B
            is_done_B = new_B == end
            if is_done_B.all():
                return
        index += n


def _windows(rows: Sequence[Sequence[int]], L: int) -> tuple[np.ndarray, np.ndarray]:
    """The last tokens of each row, L at most, padded on the left, and by how many.

    To a multiple of 16, and of an eighth of the next power of two: each width is a program to
    compile.
    """
    longest = min(max(map(len, rows)), L)
    step = max(16, 2 ** (longest.bit_length() - 3))
    width = min(L, -(-longest // step) * step)
    tokens_BxT = np.zeros((len(rows), width), np.int32)
    pad_B = np.array([width - min(len(row), L) for row in rows], np.int32)
    for tokens_T, row, pad in zip(tokens_BxT, rows, pad_B, strict=True):
        tokens_T[pad:] = row[pad - width :]
    return tokens_BxT, pad_B


def text_of(tokens: Sequence[int] | np.ndarray, encoding: tiktoken.Encoding) -> str:
    """The text of the tokens that the encoding knows: a model's V may be larger."""
    return encoding.decode([int(token) for token in tokens if token < encoding.n_vocab])


# ---- the command --------------------------------------------------------------------------------


def parse_args(args: Sequence[str]) -> argparse.Namespace:
    parser = ArgumentParser(prog="python -m jax_model5.generate", description=__doc__)
    parser.add_argument("--workdir", required=True, help="folder of a run or of imported weights")
    prompt = (
        "text to continue; repeat it for a batch; none: a text of its own, from its first token"
    )
    parser.add_argument("--prompt", action="append", default=[], help=prompt)
    file = "file that holds the text to continue, - is standard input; repeat it for a batch"
    parser.add_argument("--prompt_file", action="append", default=[], help=file)
    parser.add_argument("--n_tokens", type=int, default=200, help="new tokens at most; default 200")
    parser.add_argument("--temperature", type=float, default=1.0, help="default 1")
    parser.add_argument("--top_k", type=int, default=0, help="the k likeliest only; default all")
    nucleus = "the likeliest that reach this probability together; default 1"
    parser.add_argument("--top_p", type=float, default=1.0, help=nucleus)
    parser.add_argument("--greedy", action="store_true", help="always the likeliest token")
    parser.add_argument("--seed", type=int, default=0, help="default 0")
    options = parser.parse_args(args)
    require_at_least_1(options, "n_tokens")
    require(0 <= options.seed < 2**32, "seed", options.seed, "must be in [0, 2**32)")
    return options


def main() -> None:
    from jax_model5.checkpoint import read_params  # Orbax: half a second, for this command only

    with one_line_errors():
        options = parse_args(sys.argv[1:])
        sampling = Sampling(options.temperature, options.top_k, options.top_p, options.greedy)
        config = config_of_run(options.workdir, "jax_model5.generate")
        encoding = tokenizer.load(config.data.tokenizer)
        texts = [*options.prompt, *map(read_prompt, options.prompt_file)] or [""]
        prompts = [encode_prompt(text, encoding, config) for text in texts]
        set_up_jax(config)
        params = jax.device_put(read_params(options.workdir, abstract_state(config).params))
        tokens = generate(
            params,
            prompts,
            jax.random.key(options.seed, impl=config.prng),
            config=config.model,
            sampling=sampling,
            n_tokens=options.n_tokens,
            end=encoding.eot_token,
        )
        sys.stdout.reconfigure(errors="replace")  # type: ignore[union-attr]  # it is any text
        times = [time.perf_counter()]
        if len(prompts) == 1:
            write_one(stamped(tokens, times), texts[0], encoding)
        else:
            write_all(stamped(tokens, times), texts, encoding)
        print(speed(times, len(prompts)), file=sys.stderr)


def read_prompt(name: str) -> str:
    """The text of a file, or of standard input, without the end of its last line."""
    with disk_errors("prompt_file", name, "name another file"):
        is_input = name == "-"
        require(not is_input or sys.stdin is not None, "prompt_file", name, "there is no input")
        content = sys.stdin.buffer.read() if is_input else Path(name).expanduser().read_bytes()
    try:
        return content.decode().removesuffix("\n").removesuffix("\r")
    except UnicodeDecodeError as error:
        raise UserError(f"prompt_file={name!r}: byte {error.start} is not UTF-8") from None


def encode_prompt(text: str, encoding: tiktoken.Encoding, config: TrainConfig) -> list[int]:
    """The prompt's tokens; an empty one is the end of the text before."""
    (tokens,) = tokenizer.encode(encoding, [text])
    tokens = tokens or [encoding.eot_token]
    L, V = config.model.seq_len, config.model.vocab_size
    if len(tokens) > L:
        raise UserError(
            f"prompt={text[:20]!r}...: {len(tokens)} tokens, but the window holds "
            f"model.seq_len={L}; shorten it"
        )
    if max(tokens) >= V:
        raise UserError(
            f"prompt={text[:20]!r}: token {max(tokens)} is beyond model.vocab_size={V}: the run's "
            f"tokenizer is not {config.data.tokenizer}"
        )
    return tokens


def write_one(tokens: Iterator[np.ndarray], prompt: str, encoding: tiktoken.Encoding) -> None:
    """The prompt's text on the terminal, and the tokens as they come, `AT_ONCE` at a time."""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")  # a character may take many tokens
    print(prompt, end="", flush=True)
    for token_B in tokens:
        if token_B[0] < encoding.eot_token:
            part = encoding.decode_single_token_bytes(int(token_B[0]))
            print(decoder.decode(part), end="", flush=True)
    print(decoder.decode(b"", final=True))


def write_all(
    tokens: Iterator[np.ndarray], prompts: Sequence[str], encoding: tiktoken.Encoding
) -> None:
    """The texts one after the other, when all are done."""
    for index, (prompt, row) in enumerate(zip(prompts, np.array(list(tokens)).T, strict=True)):
        text = text_of(row[row != encoding.eot_token], encoding)
        print(f"--- prompt {index + 1}\n{prompt}{text}")


def stamped(tokens: Iterator[np.ndarray], times: list[float]) -> Iterator[np.ndarray]:
    """The same tokens; the time of each is added to `times`."""
    for token_B in tokens:
        times.append(time.perf_counter())
        yield token_B


def speed(times: Sequence[float], n_prompts: int) -> str:
    """What the start and the time of each token tell."""
    start, first, *_, last = *times, times[-1]
    n_more = (len(times) - 2) * n_prompts
    more = f", then {n_more / (last - first):,.1f} tokens/s" if n_more else ""
    return f"first token after {first - start:.1f} s{more}"


if __name__ == "__main__":
    main()
