"""Seconds to write a batch of texts: our KV cache, the course's loop, transformers, an engine."""

import itertools
import statistics
from pathlib import Path
from typing import Any

import jax.numpy as jnp

from jax_model5.bench.cases import new_tokens
from jax_model5.bench.peers import (
    compiled_transformers,
    course,
    ctranslate2,
    ended,
    ours,
    transformers,
)
from jax_model5.bench.rounds import in_turn, ratio, require_one_device, summary
from jax_model5.config import TrainConfig

TEXT_PEERS = {
    "course": course,
    "transformers": transformers,
    "compiled_transformers": compiled_transformers,
    "ctranslate2": ctranslate2,
}
_READS = 5


def measure_generation(
    config: TrainConfig, texts: int, prompt: int, peers: list[str], rounds: int, scratch: Path
) -> tuple[list[Any], dict[str, Any]]:
    """The programs that ran (ours first), their times, ratios, and our share of the bound.

    The bound is a token of each text in the time that reading all weights takes, and the cache of
    a text half written at the same rate.
    """
    dtype = config.model.dtype
    programs = [ours(config, dtype, scratch)]
    with ended(programs):
        for peer in dict.fromkeys(peers):
            require_one_device(programs[0])
            programs.append(TEXT_PEERS[peer](config, dtype, scratch))
        requests: dict[str, dict[str, object]] = {
            p.name: {"generate": f"{texts}x{prompt}"} for p in programs
        }
        requests[programs[0].name]["read"] = _READS
        times = in_turn(programs, rounds, requests)
    n = new_tokens(config, prompt)
    rows = [_row(name, times[name]["generate"], texts * n) for name in times]
    first = rows[0]
    read_s = statistics.median(itertools.chain.from_iterable(times[first["name"]]["read"]))
    about = programs[0].about
    first["text_dtype"] = about["text_dtype"]
    cached = texts * (prompt + n / 2) * _cache_bytes(config, about["text_dtype"])
    bound_s = read_s * (1 + cached / about["text_bytes"])
    first["of_bound"] = first["tokens_per_s"] / texts * bound_s
    return programs, {
        "texts": texts,
        "prompt_tokens": prompt,
        "generated_tokens": n,
        "read_weights_s": read_s,
        "bound_s": bound_s,
        "programs": rows,
        "ratios": [
            {"ours": first["name"], "theirs": row["name"], **ratio(first["rounds"], row["rounds"])}
            for row in rows[1:]
        ],
    }


def _row(name: str, rounds: list[list[float]], n_tokens: int) -> dict[str, Any]:
    seconds = summary([one for each in rounds for one in each])
    rate = n_tokens / seconds["median"]
    return {"name": name, "rounds": rounds, "seconds": seconds, "tokens_per_s": rate}


def _cache_bytes(config: TrainConfig, dtype: str) -> int:
    """Of a position's keys and values."""
    return 2 * config.model.n_layers * config.model.d_model * jnp.dtype(dtype).itemsize
