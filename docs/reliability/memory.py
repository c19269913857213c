"""Memory and time of tokenizing against the size of a file of random words.

python docs/reliability/memory.py --out docs/reliability/memory.json
"""

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from jax_model5.config import DataConfig, TrainConfig
from jax_model5.corpus import load_corpus

MEGABYTES, KINDS = (10, 100, 1000), (".txt", ".jsonl")


def write(path: Path, megabytes: int) -> None:
    """English-like lengths of words that no vocabulary knows; a row of JSON is 2 kB."""
    dice = random.Random(0)
    words = ["".join(dice.choices("etaoinshrdlu", k=dice.randrange(2, 9))) for _ in range(10_000)]
    with open(path, "w") as file:
        while file.tell() < megabytes * 1_000_000:
            text = " ".join(dice.choices(words, k=400))
            file.write(
                json.dumps({"text": text}) + "\n" if path.suffix == ".jsonl" else text + "\n"
            )


def peak_megabytes() -> int:
    """Of this process since it was started; `ru_maxrss` would count its parent's too."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) // 1024


def measure(path: Path) -> dict:
    """Peak memory of this process before and after, and what the corpus holds."""
    before = peak_megabytes()
    start = time.monotonic()
    data = DataConfig(source=str(path), cache_dir=str(path.parent / "cache"))
    manifest = load_corpus(TrainConfig(data=data)).manifest
    seconds = time.monotonic() - start
    return {
        "kind": path.suffix,
        "megabytes": round(path.stat().st_size / 1e6),
        "peak_megabytes": peak_megabytes(),
        "before_megabytes": before,
        "tokens": manifest["tokens"],
        "seconds": round(seconds, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--measure", type=Path, help="one file, in a process of its own")
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(measure(options.measure)))
        return
    from jax_model5 import record

    rows = []
    for megabytes in MEGABYTES:
        for kind in KINDS:
            with tempfile.TemporaryDirectory() as folder:
                path = Path(folder, f"words{kind}")
                write(path, megabytes)
                command = [sys.executable, __file__, "--measure", str(path)]
                done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
                rows.append(json.loads(done.stdout))
                print(rows[-1], flush=True)
            where = record.circumstances("docs/reliability/memory.py", "cpu")
            record.write_json(options.out, {**where, "rows": rows})


if __name__ == "__main__":
    main()
