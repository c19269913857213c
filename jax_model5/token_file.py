"""Parts of documents -> the file of their tokens, gone on with after a kill."""

import contextlib
import dataclasses
import hashlib
import itertools
import json
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import rich.console
import rich.progress
import tiktoken

from jax_model5 import disk, tokenizer
from jax_model5.errors import write_line
from jax_model5.readers import Part, chunks

PROGRESS = "progress.json"
SAVE_EVERY = 2**24
"""A kill loses the work on at most so many tokens."""
_BATCH_PARTS, _BATCH_CHARACTERS = 512, 2**22
_SILENCE_SECONDS = 10.0
_NOTHING = hashlib.sha256().hexdigest()


class TokenFile:
    """tokens.bin of a folder while it grows, its hash and its counts.

    Of a file that is there already it keeps the first `n_kept` tokens.
    """

    def __init__(self, folder: Path, encoding: tiktoken.Encoding, n_kept: int = 0):
        self.path, self.sha256, self.n_tokens = folder / "tokens.bin", hashlib.sha256(), 0
        self.dtype = np.dtype(np.uint16 if encoding.n_vocab <= 2**16 else np.uint32)
        self._n_of_V = np.zeros(encoding.n_vocab, np.int64)
        self._file = open(self.path, "ab")  # noqa: SIM115
        self._file.truncate(n_kept * self.dtype.itemsize)
        kept_T = np.memmap(self.path, self.dtype, "r") if n_kept else np.empty(0, self.dtype)
        for chunk_T in chunks(kept_T):
            self._count(chunk_T)

    def add(self, tokens_T: np.ndarray) -> None:
        tokens_T = np.ascontiguousarray(tokens_T, self.dtype)
        self._count(tokens_T)
        self._file.write(tokens_T.data)

    def _count(self, tokens_T: np.ndarray) -> None:
        self.sha256.update(tokens_T.data)
        self.n_tokens += len(tokens_T)
        self._n_of_V += np.bincount(tokens_T, minlength=len(self._n_of_V))

    def n_of(self, token: int) -> int:
        """How often a token stands in the file."""
        return int(self._n_of_V[token])

    def sync(self) -> None:
        """Returns when the tokens are on the disk itself."""
        self._file.flush()
        disk.sync(self._file.fileno())

    def close(self) -> dict[str, Any]:
        """What a manifest says of the tokens."""
        self.sync()
        self._file.close()
        return {
            "tokens": self.n_tokens,
            "unique_tokens": int(np.count_nonzero(self._n_of_V)),
            "dtype": self.dtype.name,
            "tokens_sha256": self.sha256.hexdigest(),
            "written": self.path.stat().st_mtime_ns,
        }


# ---- text -> tokens -----------------------------------------------------------------------------


class Changed(Exception):
    """The text, or what is on disk, is not what the progress tells of."""


class _Text:
    """What a manifest says of a text."""

    def __init__(self, separator: str):
        self._separator, self.sha256 = separator.encode(), hashlib.sha256()
        self.n_documents = self.n_characters = 0

    def add(self, batch: Sequence[Part]) -> None:
        for text, is_last in batch:
            self.sha256.update(text.encode() + self._separator * is_last)
            self.n_documents += is_last
            self.n_characters += len(text)


@dataclasses.dataclass(frozen=True)
class _Progress:
    """How much of a text has its tokens on disk, whatever happens to the process."""

    batches: int = 0
    tokens: int = 0
    text_sha256: str = _NOTHING
    tokens_sha256: str = _NOTHING

    @classmethod
    def of(cls, n_batches: int, text: _Text, file: TokenFile) -> "_Progress":
        return cls(n_batches, file.n_tokens, text.sha256.hexdigest(), file.sha256.hexdigest())

    @classmethod
    def read(cls, folder: Path) -> "_Progress":
        with contextlib.suppress(OSError, ValueError, TypeError):
            return cls(**json.loads((folder / PROGRESS).read_text()))
        return cls()

    def write(self, folder: Path) -> None:
        disk.replace_text(folder / PROGRESS, json.dumps(dataclasses.asdict(self)))


def tokenize(
    parts: Iterable[Part], separator: str, encoding: tiktoken.Encoding, folder: Path
) -> dict[str, Any]:
    """Writes tokens.bin into the folder, from where a killed process left it; what was said of it.

    The text up to there is read and hashed again, but not tokenized.

    Raises:
      Changed: start anew.
    """
    saved, text, end = _Progress.read(folder), _Text(separator), [encoding.eot_token]
    file, batches = TokenFile(folder, encoding, saved.tokens), _batches(parts)
    for batch in itertools.islice(batches, saved.batches):
        text.add(batch)
    if saved != _Progress.of(saved.batches, text, file):
        raise Changed
    with _Meter(saved.tokens) as meter:
        for n_batches, batch in enumerate(batches, saved.batches + 1):
            text.add(batch)
            ids = tokenizer.encode(encoding, [part for part, _ in batch])
            ends = [end if separator and is_last else [] for _, is_last in batch]
            pairs = zip(ids, ends, strict=True)
            file.add(np.concatenate([np.array(i + e, file.dtype) for i, e in pairs]))
            meter.show(text.n_documents, file.n_tokens)
            if file.n_tokens - saved.tokens >= SAVE_EVERY:
                file.sync()
                saved = _Progress.of(n_batches, text, file)
                saved.write(folder)
    counts = {"documents": text.n_documents, "characters": text.n_characters}
    return {**counts, "text_sha256": text.sha256.hexdigest(), **file.close()}


def _batches(parts: Iterable[Part]) -> Iterator[list[Part]]:
    """So much text at a time that every core has some, and memory stays small."""
    batch: list[Part] = []
    n_characters = 0
    for part in parts:
        batch.append(part)
        n_characters += len(part[0])
        if len(batch) == _BATCH_PARTS or n_characters >= _BATCH_CHARACTERS:
            yield batch
            batch, n_characters = [], 0
    if batch:
        yield batch


class _Meter:
    """How far it is: live on a terminal, elsewhere a line every ten seconds; and one at the end."""

    def __init__(self, n_before: int):
        self._console = rich.console.Console(stderr=True)
        text = rich.progress.TextColumn("{task.description}")
        is_off = not self._console.is_terminal
        self._live = rich.progress.Progress(
            rich.progress.SpinnerColumn(),
            text,
            console=self._console,
            transient=True,
            disable=is_off,
        )
        self._task = self._live.add_task("tokenizing")
        self._n_before, self._line = n_before, ""

    def __enter__(self) -> "_Meter":
        self._start = self._shown = time.monotonic()
        self._live.start()
        return self

    def show(self, n_documents: int, n_tokens: int) -> None:
        now = time.monotonic()
        rate = (n_tokens - self._n_before) / (now - self._start)
        self._line = f"{n_documents:,} documents, {n_tokens:,} tokens at {rate:,.0f} tokens/s"
        self._live.update(self._task, description=f"tokenizing {self._line}")
        if not self._console.is_terminal and now - self._shown > _SILENCE_SECONDS:
            write_line(f"tokenizing {self._line}")
            self._shown = now

    def __exit__(self, error: object, *_: object) -> None:
        self._live.stop()
        if self._line and error is None:
            write_line(f"tokenized {self._line}")
