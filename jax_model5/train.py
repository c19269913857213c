"""The loop with its checkpoints and signals, and nothing else; `python -m jax_model5.train`."""

import dataclasses
import enum
import signal
import sys
from collections.abc import Sequence

from jax_model5 import processes
from jax_model5.batches import test_batches
from jax_model5.checkpoint import Checkpoints
from jax_model5.config import TrainConfig, flatten, parse
from jax_model5.corpus import Corpus, load_corpus
from jax_model5.errors import disk_errors, one_line_errors
from jax_model5.pace import Pace
from jax_model5.programs import Programs, steps
from jax_model5.record import Diverged, ProgressLine, Recorder, Sink, traced
from jax_model5.run_folder import RunFolder
from jax_model5.startup import memory_errors, note, say, set_up_jax, versions
from jax_model5.step import TrainState
from jax_model5.trackers import require_tracker
from jax_model5.trees import merge


class Outcome(enum.StrEnum):
    """What happened to a run: its end, a signal after which it is saved, a loss not finite."""

    FINISHED = "finished"
    STOPPED = "stopped"
    DIVERGED = "diverged"


EXIT_CODES = {Outcome.FINISHED: 0, Outcome.STOPPED: 0, Outcome.DIVERGED: 3}


class StopSignal:
    """Within it, a signal asks the run to stop; a second one ends it at once.

    A signal that is ignored stays so: `nohup` ignores SIGHUP, and its run goes on.
    """

    def __init__(self) -> None:
        self._number = self._agreed = 0

    def __enter__(self) -> "StopSignal":
        self._before = {
            number: signal.signal(number, self._remember)
            for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
            if signal.getsignal(number) != signal.SIG_IGN
        }
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _remember(self, number: int, _frame: object) -> None:
        self._number = number
        signal.signal(number, signal.SIG_DFL)

    def is_set(self, step: int) -> bool:
        """Whether any process was asked; many processes agree on it every 10 steps.

        JAX's own `reached_preemption_sync_point` knows SIGTERM only, and takes it from Python.
        """
        if not processes.are_several() or step % 10 == 0:
            self._agreed = processes.any_of(self._number)
        return bool(self._agreed)

    @property
    def name(self) -> str:
        """The signal that some process got."""
        return signal.Signals(self._agreed).name


def main() -> int:
    with one_line_errors():
        sys.stdout.reconfigure(errors="replace")  # type: ignore[union-attr]  # samples hold any text
        config = parse(sys.argv[1:], "jax_model5.train")
        set_up_jax(config)
        return EXIT_CODES[train(config)]


def train(config: TrainConfig, trackers: Sequence[Sink] = ()) -> Outcome:
    """Starts or resumes the run in `config.workdir`. A tracker gets every record of its log.

    Only the first of many processes has trackers.

    Raises:
      UserError: bad input, a full disk, a device without memory.
    """
    require_tracker(config)
    corpus = load_corpus(config)
    fix = "make room or name another folder. What was saved is kept"
    errors = disk_errors("workdir", config.workdir, fix)
    with processes.lost_ones_end_all(), errors, memory_errors(config):
        processes.require_same(_what_decides(config, corpus))
        folder, programs = RunFolder(config), Programs(config)
        given = folder.given_params(programs)
        with folder.lock():
            return _run(folder, corpus, programs, given, trackers)


def _what_decides(config: TrainConfig, corpus: Corpus) -> dict[str, object]:
    """What has to be the same on all processes: a source and a cache may be on their own disks."""
    fields = flatten(config)
    del fields["data.cache_dir"], fields["data.source"]
    return {**fields, "the tokens of data.source": corpus.fingerprint, "packages": versions()}


def _run(
    folder: RunFolder, corpus: Corpus, programs: Programs, given: dict, trackers: Sequence[Sink]
) -> Outcome:
    """From the newest checkpoint, or the start, to what happens."""
    config, checkpoints = folder.config, folder.checkpoints
    state = checkpoints.restore(programs.abstract_state, config, corpus.fingerprint)
    start = None if state is None else int(state.step)
    if start is not None and start >= config.steps:
        lacking = folder.lacking(start)
        if not processes.any_of(bool(lacking)):
            say(folder.finished(start))
            return Outcome.FINISHED
        note(f"{config.workdir} is at its end, but has no {', no '.join(lacking)}: writing again")
    folder.require_writable()
    sinks = [*folder.open_log(start), *trackers] if processes.is_first() else []
    say(folder.introduction(corpus, programs, start or 0, given))
    if state is None:
        state = programs.init()
        state = dataclasses.replace(state, params=merge(state.params, given))
    with StopSignal() as stop:
        try:
            if int(state.step) < config.steps:
                state = _loop(folder, corpus, programs, sinks, stop, state)
        except Diverged as error:
            checkpoints.wait()
            note(f"{error}: stopped. {_diverged_help(checkpoints)}")
            return Outcome.DIVERGED
    if int(state.step) < config.steps:
        say(f"{stop.name}: saved step {int(state.step)}. Go on with\n  {folder.resume_command()}")
        return Outcome.STOPPED
    folder.write_results(corpus, programs, state)
    say(folder.finished(int(state.step)))
    return Outcome.FINISHED


def _loop(
    folder: RunFolder,
    corpus: Corpus,
    programs: Programs,
    sinks: Sequence[Sink],
    stop: StopSignal,
    state: TrainState,
) -> TrainState:
    """Steps until `config.steps` or a signal; the state that it returns is saved."""
    config, pace, start = folder.config, Pace(), int(state.step)
    tests = [programs.to_devices(batch) for batch in test_batches(corpus, config)]
    say("compiling the training step")
    _ = programs.train_step  # before the clock starts
    with ProgressLine(config, start, programs.peak) as line:
        recorder = Recorder(config, [*sinks, line])
        if start == 0:
            recorder.write("eval", 0, **programs.test(state.params, tests))
        step = start
        recorder.start_clock()
        asked = stop.is_set(start)  # while it compiled
        stepping = () if asked else steps(config, corpus, state=state, programs=programs)
        for step, state, metrics in traced(stepping, config.profiled, start, folder.path):
            recorder.add(step, metrics)
            is_last = step == config.steps
            is_end = is_last or stop.is_set(step)
            is_test = is_last or step % config.eval_every == 0
            is_save = is_end or step % config.checkpoint_every == 0
            if is_test or is_save:
                recorder.flush()
                if is_test:
                    recorder.write("eval", step, **programs.test(state.params, tests))
                    pace.check()
                if is_save:
                    recorder.sync()  # a checkpoint never knows more than the log
                    folder.checkpoints.save(state, config, corpus.fingerprint)
                recorder.start_clock()
            if is_end:
                break
    if folder.checkpoints.latest_step() != step:
        folder.checkpoints.save(state, config, corpus.fingerprint)
    folder.checkpoints.wait()
    return state


def _diverged_help(checkpoints: Checkpoints) -> str:
    latest = checkpoints.latest_step()
    last_good = f"checkpoint {latest} in {checkpoints.folder}" if latest else "none was saved yet"
    return (
        f"The last good state: {last_good}. Lower optimizer.learning_rate or set "
        "optimizer.clip_norm, in a new workdir"
    )


if __name__ == "__main__":
    sys.exit(main())
