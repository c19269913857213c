"""Seconds to write a text, with our KV cache and with the course's loop."""

from pathlib import Path
from typing import Any

from jax_model5.bench.cases import NEW_TOKENS
from jax_model5.bench.peers import course, ended, ours
from jax_model5.bench.rounds import in_turn, ratio, require_one_device, summary
from jax_model5.config import TrainConfig


def measure_generation(
    config: TrainConfig, peers: list[str], rounds: int, scratch: Path
) -> tuple[list[Any], dict[str, Any]]:
    """The programs that ran (ours first), and their times and ratio."""
    dtype = config.model.dtype
    programs = [ours(config, dtype, scratch)]
    with ended(programs):
        if "course" in peers:
            require_one_device(programs[0])
            programs.append(course(config, dtype, scratch))
        requests = {p.name: {"generate": 1} for p in programs}
        times = {name: t["generate"] for name, t in in_turn(programs, rounds, requests).items()}
    rows = []
    for name, seconds in times.items():
        middle = summary([one for each in seconds for one in each])
        rate = NEW_TOKENS / middle["median"]
        rows.append({"name": name, "rounds": seconds, "seconds": middle, "tokens_per_s": rate})
    first = rows[0]
    return programs, {
        "generated_tokens": NEW_TOKENS,
        "programs": rows,
        "ratios": [
            {"ours": first["name"], "theirs": row["name"], **ratio(first["rounds"], row["rounds"])}
            for row in rows[1:]
        ],
    }
