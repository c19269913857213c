"""Seconds to write a text, with our KV cache, the course's loop and transformers."""

import itertools
import statistics
from pathlib import Path
from typing import Any

from jax_model5.bench.cases import NEW_TOKENS
from jax_model5.bench.peers import course, ended, ours, transformers
from jax_model5.bench.rounds import in_turn, ratio, require_one_device, summary
from jax_model5.config import TrainConfig

TEXT_PEERS = {"course": course, "transformers": transformers}
_READS = 5


def measure_generation(
    config: TrainConfig, peers: list[str], rounds: int, scratch: Path
) -> tuple[list[Any], dict[str, Any]]:
    """The programs that ran (ours first), their times, ratios, and our share of the bound.

    The bound is a token in the time that reading all weights takes.
    """
    dtype = config.model.dtype
    programs = [ours(config, dtype, scratch)]
    with ended(programs):
        for peer in dict.fromkeys(peers):
            require_one_device(programs[0])
            programs.append(TEXT_PEERS[peer](config, dtype, scratch))
        requests = {p.name: {"generate": 1} for p in programs}
        requests[programs[0].name]["read"] = _READS
        times = in_turn(programs, rounds, requests)
    rows = [_row(name, times[name]["generate"]) for name in times]
    first = rows[0]
    read_s = statistics.median(itertools.chain.from_iterable(times[first["name"]]["read"]))
    first["text_dtype"] = programs[0].about["text_dtype"]
    first["of_bound"] = first["tokens_per_s"] * read_s
    return programs, {
        "generated_tokens": NEW_TOKENS,
        "read_weights_s": read_s,
        "programs": rows,
        "ratios": [
            {"ours": first["name"], "theirs": row["name"], **ratio(first["rounds"], row["rounds"])}
            for row in rows[1:]
        ],
    }


def _row(name: str, rounds: list[list[float]]) -> dict[str, Any]:
    seconds = summary([one for each in rounds for one in each])
    rate = NEW_TOKENS / seconds["median"]
    return {"name": name, "rounds": rounds, "seconds": seconds, "tokens_per_s": rate}
