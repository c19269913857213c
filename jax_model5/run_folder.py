"""A run is its folder: the lock on it, its files, what is finished in it, the words about it."""

import contextlib
import functools
import math
import os
import shlex
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np

from jax_model5 import batches, disk, processes, record, startup, tokenizer
from jax_model5.checkpoint import Checkpoints, read_params
from jax_model5.config import TrainConfig, to_yaml
from jax_model5.corpus import Corpus, describe
from jax_model5.errors import disk_errors, require
from jax_model5.generate import Sampling, generate, text_of
from jax_model5.optimizer import split_frozen
from jax_model5.programs import Programs
from jax_model5.step import TrainState
from jax_model5.trackers import open_tracker
from jax_model5.trees import n_elements, split

# What is sampled at the end: the course's prompt at its temperature (lessons 013 and 018) and at a
# cooler one; then a test window, which alone is full: each token comes from the last position.
PROMPT, TEMPERATURE, COOLER = "I went on holiday to Liliput and", 1.1, 0.7
_SAMPLE_TOKENS, _SHOWN_TOKENS = 100, 30


class RunFolder:
    """The workdir of one run, by its config."""

    def __init__(self, config: TrainConfig):
        self.config = config
        self.path = Path(config.workdir).expanduser()
        self.log_path = self.path / "metrics.jsonl"

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """The folder for this run alone: a lock on the folder itself leaves no file behind.

        Raises:
          UserError: it cannot be written, or another run holds it.
        """
        workdir = self.config.workdir
        with disk_errors("workdir", workdir, "name a folder that can be written"):
            self.path.mkdir(parents=True, exist_ok=True)
            folder = os.open(self.path, os.O_RDONLY)
        try:
            if processes.is_first():
                fix = "another run is writing into it; wait for its end, or name another folder"
                require(disk.lock(folder), "workdir", workdir, fix)
            yield
        finally:
            os.close(folder)

    def require_writable(self) -> None:
        """Raises UserError where nothing can be written into the folder."""
        fix = "cannot be written into; name another folder"
        require(os.access(self.path, os.W_OK), "workdir", self.config.workdir, fix)

    @functools.cached_property
    def checkpoints(self) -> Checkpoints:
        """The run's checkpoints."""
        return Checkpoints(self.path / "checkpoints", self.config.keep)

    def given_params(self, programs: Programs) -> dict:
        """The leaves that `init_from` gives a run which has not saved anything yet.

        Raises:
          UserError: whatever `read_params` raises, or `init_leaves` matches nothing.
        """
        saved = (self.path / "checkpoints").glob("*")
        if not self.config.init_from or any(path.name.isdigit() for path in saved):
            return {}
        params = programs.abstract_state.params
        wanted, _ = split(params, self.config.init_leaves, "init_leaves")
        return read_params(self.config.init_from, wanted, "init_from")

    def open_log(self, step: int | None) -> list[record.Sink]:
        """Writes config.yaml and opens the log behind `step`, and the tracker with its records.

        Raises:
          UserError: the tracker cannot be opened.
        """
        kept = [r for r in record.read(self.log_path) if step is not None and r["step"] <= step]
        tracker = open_tracker(self.config, self.path, kept)
        disk.replace_text(self.path / "config.yaml", to_yaml(self.config))
        return [record.MetricsLog(self.log_path, step), *tracker]

    # ---- results --------------------------------------------------------------------------------

    def lacking(self, step: int) -> list[str]:
        """The results of a run that ends at `step` which are not there; samples.txt is the last."""
        names = ["metrics.jsonl", "loss.png", "samples.txt"]
        there = {name for name in names if (self.path / name).exists()}
        text = (self.path / "samples.txt").read_bytes() if "samples.txt" in there else b""
        if not text.startswith(f"# step {step}\n".encode()):
            there.discard("samples.txt")
        return [name for name in names if name not in there]

    def write_results(self, corpus: Corpus, programs: Programs, state: TrainState) -> None:
        """loss.png and samples.txt, whose text is also shown."""
        text = self._sample(corpus, programs, state)
        if processes.is_first():
            config, records = self.config, record.read(self.log_path)
            path = self.path / "loss.png"
            if records or not path.exists():  # a picture tells more than a log that was lost
                record.plot(records, config.model.vocab_size, config.test_metric, path)
            disk.replace_text(self.path / "samples.txt", text)
        startup.say(text)

    def _sample(self, corpus: Corpus, programs: Programs, state: TrainState) -> str:
        encoding = tokenizer.load(self.config.data.tokenizer)
        window_L = batches.test_batches(corpus, self.config)[0, 0, 1:].tolist()
        prompt = encoding.encode_ordinary(PROMPT)
        parts = [f"# step {int(state.step)}\n"]
        samples = ((prompt, TEMPERATURE), (prompt, COOLER), (window_L, COOLER))
        for index, (start, temperature) in enumerate(samples):
            tokens = generate(
                state.params,
                [start],
                jax.random.fold_in(programs.key, index),
                config=self.config.model,
                sampling=Sampling(temperature),
                n_tokens=_SAMPLE_TOKENS,
            )
            shown = text_of(start[-_SHOWN_TOKENS:], encoding)
            text = text_of(np.concatenate(list(tokens)), encoding)
            parts.append(f"--- temperature {temperature}: {shown!r} continues\n{text}\n")
        return "\n".join(parts)

    # ---- words ----------------------------------------------------------------------------------

    def introduction(self, corpus: Corpus, programs: Programs, start: int, given: dict) -> str:
        config, params = self.config, programs.abstract_state.params
        lines = [
            describe(corpus),
            f"{n_elements(params):,} parameters, {config.objective}, {config.model.dtype}, "
            f"{programs.mesh.size} x {jax.devices()[0].device_kind}; a uniform guess is ln V = "
            f"{math.log(config.model.vocab_size):.2f} nats",
        ]
        if given:
            lines.append(f"{n_elements(given):,} of them are from {config.init_from}")
        if config.optimizer.freeze:
            frozen = n_elements(split_frozen(params, config.optimizer)[1])
            lines.append(f"{frozen:,} of them are frozen: {' '.join(config.optimizer.freeze)}")
        if start:
            lines.append(f"resuming {config.workdir} at step {start}")
        return "\n".join(lines)

    def resume_command(self) -> str:
        path = shlex.quote(str(Path(self.config.workdir) / "config.yaml"))
        return f"python -m jax_model5.train --config {path}"

    def finished(self, step: int) -> str:
        longer = f"to go on longer:\n  {self.resume_command()} --steps {2 * step}"
        schedule = self.config.optimizer.schedule
        if schedule != "constant":
            longer = f"its {schedule} schedule ends here: train longer in a new workdir"
        return (
            f"finished at step {step}: {self.config.workdir}/ holds loss.png, samples.txt, "
            f"metrics.jsonl, config.yaml and checkpoints/; {longer}"
        )
