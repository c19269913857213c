"""SIGKILLs at random moments of runs of one and of two processes, against a run left alone.

    python docs/reliability/kills.py --processes 2 --kills 150 --out docs/reliability/kills_2.json

The model has the default's width and vocabulary. Processes wait 20 s for each other instead of 120,
so that a kill while they join costs less. A kill falls wherever a uniform time, counted from
the start of the process or from a phase that the log shows, puts it. After each the run is started
again; at its end every record of the log and every bit of the last checkpoint is compared.
"""

import argparse
import collections
import contextlib
import hashlib
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import jax

from jax_model5 import checkpoint, record

CONFIG = {
    **{"steps": 100, "batch_size": 2, "eval_every": 20, "eval_batches": 1, "checkpoint_every": 5},
    **{"model.n_layers": 2, "model.seq_len": 64},
}
TRAIN = """
import runpy
from jax_model5 import processes
processes.JOIN_SECONDS = 20
runpy.run_module("jax_model5.train", run_name="__main__")
"""
PHASES = {
    # phase: (what the log or the folder shows first, seconds after that at most)
    "starting": (lambda workdir, n: True, 6.0),
    "training": (lambda workdir, n: n_records(workdir) > n + 1, 2.0),
    "saving": (lambda workdir, n: is_saving(workdir), 0.05),
}


def n_records(workdir: Path) -> int:
    return len(record.read(workdir / "metrics.jsonl"))


def is_saving(workdir: Path) -> bool:
    with contextlib.suppress(OSError):
        return any("tmp" in path.name for path in (workdir / "checkpoints").iterdir())
    return False


def start(workdir: Path, cache: Path, n_processes: int) -> list[subprocess.Popen]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
    settings = CONFIG | {"workdir": workdir, "data.cache_dir": cache}
    flags = [f"--{key}={value}" for key, value in settings.items()]
    processes = []
    for index in range(n_processes):
        several = {
            "JAX_COORDINATOR_ADDRESS": address,
            "JAX_NUM_PROCESSES": str(n_processes),
            "JAX_PROCESS_ID": str(index),
        }
        command = [sys.executable, "-c", TRAIN, *flags]
        environment = os.environ | (several if n_processes > 1 else {})
        pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
        processes.append(subprocess.Popen(command, env=environment, **pipes))
    return processes


def result(workdir: Path) -> dict[str, str]:
    """The log up to its speeds, and the last checkpoint's bits, as digests."""
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    numbers = "\n".join(line.split(', "tokens_per_second"')[0] for line in lines)
    with checkpoint.open_saved(workdir / "checkpoints") as saved:
        leaves = checkpoint.read_whole(saved, saved.latest_step())
    bits = hashlib.sha256()
    for name, leaf in sorted(leaves.items()):
        bits.update(name.encode() + leaf.tobytes())
    return {"log": hashlib.sha256(numbers.encode()).hexdigest(), "state": bits.hexdigest()}


def kill_one(workdir: Path, cache: Path, n_processes: int, phase: str, dice) -> str:
    """Starts the run and kills one of its processes; what happened."""
    shows, seconds = PHASES[phase]
    before, processes = n_records(workdir), start(workdir, cache, n_processes)
    while not shows(workdir, before):
        if processes[0].poll() is not None:
            break
        time.sleep(0.002)
    time.sleep(dice.uniform(0, seconds))
    dice.choice(processes).send_signal(signal.SIGKILL)
    ends = [process.communicate(timeout=120) and process.returncode for process in processes]
    if ends == [0] * n_processes:
        return "finished before"
    return " ".join(map(str, sorted(ends)))


def campaign(folder: Path, n_processes: int, n_kills: int, dice) -> Iterator[dict]:
    """As many runs as it takes for so many kills, each compared at its end; the figures so far."""
    cache, expected = folder / "cache", None
    phases, ends = collections.Counter(), collections.Counter()
    n_runs = n_equal = 0
    while expected is None or sum(phases.values()) < n_kills:
        workdir = folder / f"{n_processes}-{n_runs}-{expected is not None}"
        while expected is not None and sum(phases.values()) < n_kills:
            phase = dice.choice(list(PHASES))
            end = kill_one(workdir, cache, n_processes, phase, dice)
            if end == "finished before":
                break
            phases[phase] += 1
            ends[end] += 1
        processes = start(workdir, cache, n_processes)
        errors = [process.communicate()[1] for process in processes]
        assert [process.returncode for process in processes] == [0] * n_processes, errors
        found = result(workdir)
        shutil.rmtree(workdir)
        if expected is None:
            expected = found  # of the run that nobody disturbed
            continue
        n_runs, n_equal = n_runs + 1, n_equal + (found == expected)
        figures = {"processes": n_processes, "kills": sum(phases.values()), "runs": n_runs}
        yield figures | {"equal": n_equal, "phases": dict(phases), "exit_codes": dict(ends)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--kills", type=int, default=150)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    where = record.circumstances("docs/reliability/kills.py", jax.devices()[0].device_kind)
    dice = random.Random(options.processes)
    with tempfile.TemporaryDirectory() as folder:
        for figures in campaign(Path(folder), options.processes, options.kills, dice):
            record.write_json(options.out, {**where, "config": CONFIG, **figures})
            print(json.dumps(figures), flush=True)


if __name__ == "__main__":
    main()
