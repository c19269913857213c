"""The training loop and nothing else; `python -m jax_model5.train`."""

import contextlib
import errno
import fcntl
import functools
import math
import os
import shlex
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from jax_model5 import data, metrics, objectives, sharding, tokenizer
from jax_model5.checkpoint import Checkpoints, read_params
from jax_model5.config import TrainConfig, UserError, one_line_errors, parse, to_yaml
from jax_model5.generate import Sampling, generate, text_of
from jax_model5.optimizer import merge, split, split_frozen
from jax_model5.step import TEST_METRICS, TrainState, eval_step, init_state, train_step

_SAMPLE_ROWS, _SAMPLE_TOKENS, _PROMPT_TOKENS = 2, 60, 30
_SAMPLE_TEMPERATURES = (0.7, 1.0)


class Diverged(Exception):
    """The loss or its gradient is not finite. The message is one line for the user."""


class StopSignal:
    """Within it, SIGTERM or SIGINT asks the run to stop; a second one ends it at once."""

    def __init__(self) -> None:
        self.name = ""

    def __enter__(self) -> "StopSignal":
        self._before = {
            number: signal.signal(number, self._remember)
            for number in (signal.SIGTERM, signal.SIGINT)
        }
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _remember(self, number: int, _frame: object) -> None:
        self.name = signal.Signals(number).name
        signal.signal(number, signal.SIG_DFL)

    def is_set(self, step: int) -> bool:
        """Whether any process was asked; many processes agree on it every 10 steps."""
        if jax.process_count() == 1:
            return bool(self.name)
        return step % 10 == 0 and bool(
            multihost_utils.process_allgather(np.array(bool(self.name))).any()
        )


class Programs:
    """The run's functions, compiled for its mesh, and the key that they all derive from."""

    def __init__(self, config: TrainConfig):
        self.mesh = sharding.make_mesh(config)
        everywhere = sharding.replicated(self.mesh)
        rows = sharding.batch_sharding(self.mesh)
        new_key = functools.partial(jax.random.key, config.seed, impl=config.prng)
        self.key = jax.jit(new_key, out_shardings=everywhere)()

        init = functools.partial(init_state, config=config)
        shapes = jax.eval_shape(init, self.key)
        places = sharding.state_sharding(self.mesh, shapes)
        self.init = jax.jit(init, out_shardings=places)
        self.abstract_state = jax.tree.map(
            lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
            shapes,
            places,
        )
        windows = (config.batch_size, config.model.seq_len + 1)
        self._abstract_batch = jax.ShapeDtypeStruct(windows, np.int32, sharding=rows)
        self._train = jax.jit(
            functools.partial(train_step, config=config),
            out_shardings=(places, everywhere),
            donate_argnums=0,
        )
        self.evaluate = jax.jit(
            functools.partial(eval_step, config=config), out_shardings=everywhere
        )

    def compile_train(self) -> Callable[..., Any]:
        """Compiles ahead of the first step, so that no step's timing holds a compilation."""
        return self._train.lower(self.abstract_state, self.key, self._abstract_batch).compile()


class Recorder:
    """Writes each step's metrics one step late, so that the devices never wait for the host."""

    def __init__(
        self, config: TrainConfig, log: metrics.MetricsLog | None, line: metrics.ProgressLine
    ):
        self._config, self._log, self._line = config, log, line
        self._pending: tuple[int, Any] | None = None
        self._n_targets = config.batch_size * objectives.n_last(config)
        self.start_clock()

    def start_clock(self) -> None:
        self._last = time.perf_counter()

    def add(self, step: int, device_metrics: Any) -> None:
        self.flush()
        self._pending = step, device_metrics

    def flush(self) -> None:
        """Waits for the pending step and records it. Raises Diverged where it isn't finite."""
        if self._pending is None:
            return
        step, device_metrics = self._pending
        self._pending = None
        values = jax.device_get(device_metrics)
        _require_finite(step, values)
        record = {name: float(values[name]) for name in ("loss", "grad_norm", "learning_rate")}
        now = time.perf_counter()
        seconds, self._last = now - self._last, now
        tokens = self._config.batch_size * self._config.model.seq_len
        record["tokens_per_second"] = round(tokens / seconds, 1)
        record["targets_per_second"] = round(self._n_targets / seconds, 1)
        if self._log:
            self._log.write("train", step, **record)
        self._line.train(step, record, seconds)

    def evaluation(self, step: int, values: dict[str, float]) -> None:
        _require_finite(step, values)
        if self._log:
            self._log.write("eval", step, **values)
        self._line.evaluation(values[self._config.test_metric])


def _require_finite(step: int, values: dict[str, float]) -> None:
    for name, value in values.items():
        if not math.isfinite(value):
            raise Diverged(f"step {step}: {name}={value}")


def main() -> int:
    sys.stdout.reconfigure(errors="replace")  # type: ignore[union-attr]  # samples hold any text
    with one_line_errors():
        config = parse(sys.argv[1:], "jax_model5.train")
        sharding.set_up_jax(config)
        with disk_and_memory_errors(config):
            return train(config)


@contextlib.contextmanager
def disk_and_memory_errors(config: TrainConfig) -> Iterator[None]:
    """A full disk or device as a `UserError`."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"workdir={config.workdir!r}: {error.strerror or error}; make room or name another "
            "folder. What was saved is kept"
        ) from None
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise UserError(
            f"batch_size={config.batch_size}: the devices' memory is too small; raise "
            f"accumulate={config.accumulate}, or lower batch_size"
        ) from None


def train(config: TrainConfig) -> int:
    """Starts or resumes the run in `config.workdir`; returns its exit code.

    0: finished, or stopped by a signal and saved; 3: the loss is no longer finite.
    """
    corpus = data.load_corpus(config)
    programs = Programs(config)
    given = given_params(config, programs)
    with own_workdir(config) as workdir:
        checkpoints = Checkpoints(workdir / "checkpoints", config.keep)
        state = checkpoints.restore(programs.abstract_state, config, corpus.fingerprint)
        start = 0 if state is None else int(state.step)
        if start >= config.steps and is_sampled(workdir, start):
            say(finished(config, start))
            return 0
        log = None
        if jax.process_index() == 0:
            metrics.replace_text(workdir / "config.yaml", to_yaml(config))
            log = metrics.MetricsLog(workdir / "metrics.jsonl", start)
        say(introduction(config, corpus, programs, start, given))
        if state is None:
            state = programs.init(programs.key)
            state = state.replace(params=merge(state.params, given))
        with StopSignal() as stop:
            try:
                state = loop(config, corpus, programs, checkpoints, log, stop, state)
            except Diverged as error:
                checkpoints.wait()
                print(f"{error}: stopped. {diverged_help(checkpoints)}", file=sys.stderr)
                return 3
        step = int(state.step)
        if step < config.steps:
            say(f"{stop.name}: saved step {step}. Go on with\n  {resume_command(config)}")
            return 0
        write_results(config, corpus, programs, state, workdir)
        say(finished(config, step))
        return 0


def given_params(config: TrainConfig, programs: Programs) -> dict:
    """The leaves that `init_from` gives a run which has not saved anything yet.

    Raises:
      UserError: whatever `read_params` raises, or `init_leaves` matches nothing.
    """
    saved = (Path(config.workdir).expanduser() / "checkpoints").glob("*")
    if not config.init_from or any(path.name.isdigit() for path in saved):
        return {}
    wanted, _ = split(programs.abstract_state.params, config.init_leaves, "init_leaves")
    return read_params(config.init_from, wanted, "init_from")


def loop(
    config: TrainConfig,
    corpus: data.Corpus,
    programs: Programs,
    checkpoints: Checkpoints,
    log: metrics.MetricsLog | None,
    stop: StopSignal,
    state: TrainState,
) -> TrainState:
    """Steps until `config.steps` or a signal; the state that it returns is saved."""
    step = int(state.step)
    test_batches = [
        sharding.to_devices(programs.mesh, b) for b in data.test_batches(corpus, config)
    ]
    say("compiling the training step")
    run_step = programs.compile_train()
    with metrics.ProgressLine(config.steps, step, quiet=log is None) as line:
        recorder = Recorder(config, log, line)
        while step < config.steps and not stop.is_set(step):
            batch = sharding.to_devices(programs.mesh, data.train_batch(corpus, config, step))
            state, device_metrics = run_step(state, programs.key, batch)
            step += 1
            recorder.add(step, device_metrics)
            is_eval = step % config.eval_every == 0 or step == config.steps
            is_save = step % config.checkpoint_every == 0 or step == config.steps
            if is_eval or is_save:
                recorder.flush()
                if is_eval:
                    recorder.evaluation(step, evaluate(programs, state, test_batches))
                if is_save:
                    save(checkpoints, log, state, config, corpus)
                recorder.start_clock()
        recorder.flush()
    if checkpoints.latest_step() != step:
        save(checkpoints, log, state, config, corpus)
    checkpoints.wait()
    return state


def evaluate(
    programs: Programs, state: TrainState, test_batches: list[jax.Array]
) -> dict[str, float]:
    """Mean test NLL [nats] over the fixed batches, by name."""
    results = [programs.evaluate(state.params, batch) for batch in test_batches]
    totals = jax.device_get(jax.tree.map(lambda *values: sum(values), *results))
    return {name: float(totals[name]) / len(results) for name in TEST_METRICS}


def save(
    checkpoints: Checkpoints,
    log: metrics.MetricsLog | None,
    state: TrainState,
    config: TrainConfig,
    corpus: data.Corpus,
) -> None:
    if log:
        log.sync()  # a checkpoint never knows more than the log
    checkpoints.save(state, config, corpus.fingerprint)


# ---- a run's words and results ------------------------------------------------------------------


def say(text: str) -> None:
    if jax.process_index() == 0:
        print(text, flush=True)


@contextlib.contextmanager
def own_workdir(config: TrainConfig) -> Iterator[Path]:
    """The workdir, for this run alone: a lock on the folder itself leaves no file behind.

    Raises:
      UserError: it cannot be written, or another run holds it.
    """
    workdir = Path(config.workdir).expanduser()
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        folder = os.open(workdir, os.O_RDONLY)
        if not os.access(workdir, os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    except OSError as error:
        raise UserError(
            f"workdir={config.workdir!r}: {error.strerror}; name a folder that can be written"
        ) from None
    try:
        if jax.process_index() == 0:
            fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield workdir
    except BlockingIOError:
        raise UserError(
            f"workdir={config.workdir!r}: another run is writing into it; wait for its end, or "
            "name another folder"
        ) from None
    finally:
        os.close(folder)


def introduction(
    config: TrainConfig, corpus: data.Corpus, programs: Programs, start: int, given: dict
) -> str:
    params = programs.abstract_state.params
    n_parameters = n_elements(params)
    device = jax.devices()[0]
    lines = [
        data.describe(corpus),
        f"{n_parameters:,} parameters, {config.objective}, {config.model.dtype}, "
        f"{programs.mesh.size} x {device.device_kind}; a uniform guess is ln V = "
        f"{math.log(config.model.vocab_size):.2f} nats",
    ]
    if given:
        lines.append(f"{n_elements(given):,} of them are from {config.init_from}")
    if config.optimizer.freeze:
        frozen = n_elements(split_frozen(params, config.optimizer)[1])
        lines.append(f"{frozen:,} of them are frozen: {config.optimizer.freeze}")
    if start:
        lines.append(f"resuming {config.workdir} at step {start}")
    return "\n".join(lines)


def n_elements(tree: Any) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


def resume_command(config: TrainConfig) -> str:
    path = shlex.quote(str(Path(config.workdir) / "config.yaml"))
    return f"python -m jax_model5.train --config {path}"


def finished(config: TrainConfig, step: int) -> str:
    longer = f"to go on longer:\n  {resume_command(config)} --steps {2 * step}"
    if config.optimizer.schedule != "constant":
        longer = (
            f"its {config.optimizer.schedule} schedule ends here: train longer in a new workdir"
        )
    return (
        f"finished at step {step}: {config.workdir}/ holds loss.png, samples.txt, metrics.jsonl, "
        f"config.yaml and checkpoints/; {longer}"
    )


def diverged_help(checkpoints: Checkpoints) -> str:
    latest = checkpoints.latest_step()
    last_good = f"checkpoint {latest} in {checkpoints.folder}" if latest else "none was saved yet"
    return (
        f"The last good state: {last_good}. Lower optimizer.learning_rate or set "
        "optimizer.clip_norm, in a new workdir"
    )


def is_sampled(workdir: Path, step: int) -> bool:
    """Whether the results of this very step are written: samples.txt is the last of them."""
    path = workdir / "samples.txt"
    return path.exists() and path.read_text(encoding="utf-8").startswith(f"# step {step}\n")


def write_results(
    config: TrainConfig, corpus: data.Corpus, programs: Programs, state: TrainState, workdir: Path
) -> None:
    text = sample_text(config, corpus, programs, state)
    if jax.process_index() == 0:
        records = metrics.read(workdir / "metrics.jsonl")
        metrics.plot(records, config.model.vocab_size, config.test_metric, workdir / "loss.png")
        metrics.replace_text(workdir / "samples.txt", text)
    say(text)


def sample_text(
    config: TrainConfig, corpus: data.Corpus, programs: Programs, state: TrainState
) -> str:
    encoding = tokenizer.load(config.data.tokenizer)
    tokens_BxL = data.test_batches(corpus, config)[0][:_SAMPLE_ROWS, 1:]
    parts = [f"# step {int(state.step)}\n"]
    for temperature in _SAMPLE_TEMPERATURES:
        new_NxB = generate(
            state.params,
            tokens_BxL,
            programs.key,
            config=config.model,
            sampling=Sampling(temperature),
            n_tokens=_SAMPLE_TOKENS,
        )
        for prompt, new_N in zip(tokens_BxL, np.array(list(new_NxB)).T, strict=True):
            shown = text_of(prompt[-_PROMPT_TOKENS:], encoding), text_of(new_N, encoding)
            parts.append(f"--- temperature {temperature}: {shown[0]!r} continues\n{shown[1]}\n")
    return "\n".join(parts)


if __name__ == "__main__":
    sys.exit(main())
