"""How many of all small faults the proof finds, and where; `python -m parity_tests.score`.

Each mutant of the code that the proof covers is planted in a warm process, where the report's
stages run, in float64, until one differs. Kept tools for mutants (mutmut, cosmic-ray) start a test
command for each: ten seconds of imports, and they leave out no call, stop no gradient.
"""

import argparse
import builtins
import collections
import contextlib
import dataclasses
import fnmatch
import importlib
import math
import multiprocessing
import os
import random
import re
import sys
import time
from collections.abc import Iterator
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from jax_model5.config import DataConfig
from jax_model5.errors import ArgumentParser, UserError, disk_errors, one_line_errors
from jax_model5.record import circumstances, write_json
from jax_model5.startup import keep_programs
from parity_tests import COMPILE_FAST
from parity_tests.explained import EXPLAINED, NOT_RUN
from parity_tests.mutants import Mutant, mutants

ROOT = Path(__file__).parent.parent
FILES = [
    "jax_model5/kernels.py",
    "jax_model5/layer_norm.py",
    "jax_model5/model.py",
    "jax_model5/losses.py",
    "jax_model5/optimizer.py",
    "jax_model5/step.py",
    "torch_ref/model.py",
    "torch_ref/loss.py",
    "torch_ref/step.py",
]
# Who must be loaded again after a change of one of them, in this order.
_AFTER_JAX = [path.removesuffix(".py").replace("/", ".") for path in FILES[:6]]
_AFTER_JAX += ["jax_model5.programs", "jax_model5.generate"]
_AFTER_JAX += [f"parity_tests.{name}" for name in ("chance", "ladder", "taps", "memory", "report")]
_LONGEST = 600  # seconds of a mutant: more is a fault that never ends
_MUTANTS_OF_A_PROCESS = 100  # each leaves compiled programs behind


# ---- one mutant ---------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What became of one mutant."""

    mutant: Mutant
    caught: bool
    located: bool = False
    words: str = ""
    seconds: float = 0.0


class Values:
    """`low_precision` and `no_gradient`, which mutants call, and whether they met a tensor."""

    def __init__(self) -> None:
        self.called = self.met = False

    @property
    def are_none(self) -> bool:
        """What they were handed is no tensor."""
        return self.called and not self.met

    def low_precision(self, value: Any) -> Any:
        import torch

        def low(x: Any) -> Any:
            if isinstance(x, torch.Tensor) and x.dtype == torch.float64:
                self.met = True
                return x.float().double()
            if getattr(x, "dtype", None) == jnp.float64 and hasattr(x, "astype"):
                self.met = True
                return x.astype(jnp.float32).astype(jnp.float64)
            return x

        return self._each(low, value)

    def no_gradient(self, value: Any) -> Any:
        import torch

        def stop(x: Any) -> Any:
            if isinstance(x, torch.Tensor) and x.requires_grad:
                self.met = True
                return x.detach()
            if isinstance(x, jax.Array) and jnp.issubdtype(x.dtype, jnp.floating):
                self.met = True
                return jax.lax.stop_gradient(x)
            return x

        return self._each(stop, value)

    def _each(self, change: Any, value: Any) -> Any:
        self.called = True
        try:
            return jax.tree.map(change, value)
        except (TypeError, ValueError):  # a dictionary whose keys have no order, and the like
            return value


def judge(mutant: Mutant) -> Verdict | None:
    """None: what it would change is no tensor."""
    start, values = time.perf_counter(), Values()
    builtins.low_precision, builtins.no_gradient = (  # type: ignore[attr-defined]
        values.low_precision,
        values.no_gradient,
    )
    is_of_a_pass = mutant.file.startswith("jax_model5") and "step.py" not in mutant.file
    with _planted(mutant) as broken:
        found = broken or _first_difference(mutant, is_of_a_pass, values)
    seconds = round(time.perf_counter() - start, 1)
    if found is None:
        is_nothing = mutant.operator in ("rounded to float32", "gradient stopped")
        return None if is_nothing and not values.met else Verdict(mutant, False, seconds=seconds)
    row, words = found
    return Verdict(mutant, True, row is None or _is_located(row, mutant), words, seconds)


def _is_located(row: Any, mutant: Mutant) -> bool:
    """What differs first is of the changed line, or next to it; what stops does so in its function.

    Of a function that stopped its callers are named too: one of them may have given it the wrong.
    """
    from parity_tests.places import is_near, operations_of

    place = f"{Path(mutant.file).stem}.{mutant.scope}"
    is_called = mutant.scope and any(f"{name}.".startswith(f"{place}.") for name in row.stack)
    return bool(is_called) or is_near(row.operation, operations_of(place, mutant.code))


@contextlib.contextmanager
def _planted(mutant: Mutant) -> Iterator[tuple[None, str] | None]:
    """Yields what stops it from being loaded, if anything does."""
    name = mutant.file.removesuffix(".py").replace("/", ".")
    after = _AFTER_JAX[_AFTER_JAX.index(name) + 1 :] if name in _AFTER_JAX else []
    module, broken = importlib.import_module(name), None
    try:
        exec(compile(mutant.source, str(ROOT / mutant.file), "exec"), module.__dict__)
        for other in after:
            importlib.reload(sys.modules[other])
    except Exception as error:
        broken = None, f"does not load: {error}"
    try:
        yield broken
    finally:
        for other in [name, *after]:
            importlib.reload(sys.modules[other])


def _first_difference(mutant: Mutant, is_of_a_pass: bool, values: Values) -> tuple[Any, str] | None:
    """The row of the report, and its words.

    The first stages (and the one after them) run one operation after the other: most mutants are
    caught there, and nothing that changed is compiled. What survives is compiled, for it often is
    the clean program. A value that is no tensor in the stage that reaches it is none in the others.
    """
    from parity_tests import report

    config, place = report.default_config("float64"), f"{mutant.file}:{mutant.scope} {mutant.code}"
    first = next((stages for part, stages in _FIRST.items() if re.match(part, place)), ())
    rows = report.rows(config, first)
    is_compiled, stage, were_none = not is_of_a_pass, "", False
    while True:
        with jax.disable_jit(not is_compiled):
            row = next(rows, None)
        if row and not row.passed:
            return row, f"{row.operation}, {row.what}: error {row.error:.1e}; {row.cause}"
        if row is None or (row.stage != stage and were_none):
            return None
        stage, were_none = row.stage, values.are_none and row.stage not in _NOT_FLOAT64
        is_compiled |= row.stage not in (*first, "parameters", "operations")


_NOT_FLOAT64 = ("memory", "bfloat16")  # `low_precision` knows no tensor there
# Stages that see a place's faults soonest (file:scope, a blank, the line); the others come after.
_FIRST = {
    r"\S*:(init_(?!state)|\w+_init |Model5\._init)": ("initial weights",),
    r"\S*(optimizer|schedule)": ("optimizer", "step"),
    r"\S*eval_step": ("train and eval mode",),
    r"\S*step\.py:_norm": ("memory",),
    r"\S*step\.py": ("gradients", "step"),
    r"\S*(run_block|features|_in_chunks|_padded)": ("memory",),
    r"\S*(:Dropout|threefry|keep_mask|_bits|threshold)": (
        "operations, dropout on",
        "dropout by chance",
    ),
    r"\S*model\.py:(\S*_cached|Attention\S* .*(cache|slots))": ("suffix path and KV cache",),
    r"\S*kernels\.py:(at_least|\w*matmul|\w*product)": ("parameters", "operations", "bfloat16"),
}


# ---- many ---------------------------------------------------------------------------------------


def all_mutants() -> Iterator[Mutant]:
    for file in FILES:
        yield from mutants(file, (ROOT / file).read_text())


def explanation(mutant: Mutant, among: list[tuple[str, str, str]]) -> str | None:
    """The sentence of the first pattern that fits the place, and the change with its line."""
    place = f"{mutant.file}:{mutant.scope}"
    change = f"{mutant.operator}: {mutant.change}\n{mutant.code}"
    for where, what, sentence in among:
        if fnmatch.fnmatchcase(place, where) and fnmatch.fnmatchcase(change, f"*{what}*"):
            return sentence
    return None


def verdicts(chosen: list[Mutant], n_workers: int) -> Iterator[Verdict]:
    """In the order in which they come."""
    waiting = collections.deque(chosen)
    workers: dict[Connection, Worker] = {}
    while waiting or workers:
        while waiting and len(workers) < n_workers:
            worker = Worker()
            workers[worker.pipe] = worker
        ready = wait(list(workers), timeout=1)
        for pipe, worker in list(workers.items()):
            if pipe not in ready and not worker.is_late():
                continue
            verdict = worker.verdict() if pipe in ready else worker.never_ends()
            if verdict:
                yield verdict
            if waiting and worker.goes_on():
                worker.give(waiting.popleft())
            else:
                worker.end()
                del workers[pipe]


class Worker:
    """A warm process that judges one mutant after the other."""

    def __init__(self) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=_work, args=(theirs,), daemon=True)
        self.process.start()
        theirs.close()
        self.start, self.n_given, self.is_whole = time.monotonic(), 0, True

    def give(self, mutant: Mutant) -> None:
        self.mutant, self.start, self.n_given = mutant, time.monotonic(), self.n_given + 1
        self.pipe.send(mutant)

    def is_late(self) -> bool:
        return self.n_given > 0 and time.monotonic() - self.start > _LONGEST

    def verdict(self) -> Verdict | None:
        try:
            return self.pipe.recv()
        except EOFError:
            if self.n_given == 0:
                raise UserError(
                    "parity_tests: something differs without a mutant; run python -m parity_tests"
                ) from None
            self.is_whole = False
            return Verdict(self.mutant, True, False, "the process ends")

    def never_ends(self) -> Verdict:
        self.is_whole = False
        return Verdict(self.mutant, True, False, f"no end within {_LONGEST} s")

    def goes_on(self) -> bool:
        return self.is_whole and self.n_given < _MUTANTS_OF_A_PROCESS

    def end(self) -> None:
        self.process.kill()
        self.process.join()
        self.pipe.close()


def _work(pipe: Connection) -> None:
    jax.config.update("jax_num_cpu_devices", 4)
    os.environ["XLA_FLAGS"] = COMPILE_FAST
    import torch

    from parity_tests import report

    torch.set_num_threads(1)
    keep_programs(DataConfig().cache_dir)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    if report.first_difference(report.default_config("float64")):
        return  # nothing can be told: the parent says so
    jax.config.update("jax_persistent_cache_min_compile_time_secs", math.inf)  # no mutant's
    pipe.send(None)
    while True:
        pipe.send(judge(pipe.recv()))


# ---- the command --------------------------------------------------------------------------------


def main() -> int:
    """0: every mutant is caught or explained, but for those allowed; 1: not so; 2: bad input."""
    with one_line_errors():
        options = _options(sys.argv[1:])
        chosen, done = _chosen(options), []
        if options.json:  # not after hours
            with disk_errors("json", options.json, "name a file that can be written"):
                Path(options.json).open("a").close()
        found = summary(done)
        for verdict in verdicts(chosen, options.workers):
            done.append(verdict)
            _say(verdict, len(done), len(chosen))
            found = summary(done) | {"chosen": len(chosen)}
            if options.json:  # each time: a run of hours may be killed
                head = circumstances("-m parity_tests.score", "cpu")
                write_json(Path(options.json), head | found)
        unexplained = [survivor for survivor in found["survivors"] if not survivor["why"]]
        print(
            f"{found['all']} run: {found['caught']} caught, {found['located']} of them located; "
            f"{len(found['survivors'])} survive, {len(unexplained)} of them unexplained"
        )
        return 1 if len(unexplained) > options.allowed else 0


def _chosen(options: argparse.Namespace) -> list[Mutant]:
    """A sample of the mutants that run here, PyTorch's first."""
    every = [m for m in all_mutants() if not explanation(m, NOT_RUN)]
    if options.only:
        every = [m for m in every if options.only in f"{m.file}:{m.scope}"]
    if not every:
        raise UserError(f"only={options.only!r}: no mutant of such a place; see {FILES}")
    n = min(options.sample or len(every), len(every))
    print(f"{len(every)} mutants, {n} chosen with seed {options.seed}")
    chosen = random.Random(options.seed).sample(every, n)
    return sorted(chosen, key=lambda mutant: mutant.file.startswith("jax_"))  # JAX stays compiled


def _options(args: list[str]) -> argparse.Namespace:
    parser = ArgumentParser(prog="python -m parity_tests.score", description=__doc__)
    parser.add_argument("--sample", type=int, help="so many at random; default: all")
    parser.add_argument("--seed", type=int, default=0, help="of the sample")
    parser.add_argument("--only", help="those whose file:scope holds this")
    parser.add_argument("--workers", type=int, default=2, help="processes")
    parser.add_argument("--allowed", type=int, default=0, help="survivors that are no failure")
    parser.add_argument("--json", help="also write the result to this file")
    options = parser.parse_args(args)
    if options.workers < 1:
        raise UserError(f"workers={options.workers}: must be at least 1")
    if options.sample is not None and options.sample < 1:
        raise UserError(f"sample={options.sample}: must be at least 1")
    return options


def _say(verdict: Verdict, index: int, of: int) -> None:
    state = "located" if verdict.located else "caught" if verdict.caught else "SURVIVES"
    mutant = verdict.mutant
    place = f"{mutant.file}:{mutant.line} {mutant.scope}"
    print(f"{index}/{of} {state:9}{verdict.seconds:6.1f} s  {place}: {mutant.operator}", flush=True)
    if state != "located":
        print(mutant.diff, f"-> {verdict.words}"[:300], sep="\n", flush=True)


def summary(done: list[Verdict]) -> dict[str, Any]:
    """Counts of all, by operator and by file, and each survivor's diff."""
    counts: dict[str, Any] = _count(done)
    for name in ("operator", "file"):
        keys = sorted({getattr(v.mutant, name) for v in done})
        counts[f"by {name}"] = {
            key: _count([v for v in done if getattr(v.mutant, name) == key]) for key in keys
        }
    counts["survivors"] = [
        _place(v.mutant) | {"why": explanation(v.mutant, EXPLAINED)} for v in done if not v.caught
    ]
    counts["caught elsewhere"] = [
        _place(v.mutant) | {"found": v.words[:200]} for v in done if v.caught and not v.located
    ]
    return counts


def _count(some: list[Verdict]) -> dict[str, int]:
    return {
        "all": len(some),
        "caught": sum(v.caught for v in some),
        "located": sum(v.located for v in some),
    }


def _place(mutant: Mutant) -> dict[str, str]:
    place = f"{mutant.file}:{mutant.line} {mutant.scope}"
    return {"place": place, "operator": mutant.operator, "diff": mutant.diff}


if __name__ == "__main__":
    sys.exit(main())
