"""A source of text -> one token array on disk; (seed, step) -> a batch of windows."""

import contextlib
import dataclasses
import functools
import glob
import hashlib
import itertools
import json
import os
import platform
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, BinaryIO

import numpy as np
import rich.console
import rich.progress
import tiktoken

from jax_model5 import tokenizer
from jax_model5.config import DataConfig, TrainConfig, UserError

SUFFIXES = {".txt": "text", ".jsonl": "json", ".json": "json", ".parquet": "parquet"}
FINEWEB = ("HuggingFaceFW/fineweb", "sample-10BT")
FINEWEB_DOCS = 1000
_RETRIES = 4
_BATCH_DOCS = 512
_STALE_SECONDS = 86400
_OFFLINE_WAYS = "offline, use data.source=pydocs or a path to .txt .jsonl .json .parquet files"


@dataclasses.dataclass(frozen=True)
class Corpus:
    """A token array on disk, split into a training part and the test part at its end."""

    tokens_T: np.ndarray
    n_train: int
    manifest: dict[str, Any]

    @property
    def fingerprint(self) -> str:
        """SHA-256 over the tokens: equal fingerprints give equal batches."""
        return self.manifest["tokens_sha256"]


# ---- a source -> documents ----------------------------------------------------------------------


def documents(config: DataConfig) -> Iterator[str]:
    """The source's documents, in order, at most `n_docs` of them.

    Raises:
      UserError: no such file or data set, missing column, not UTF-8, no network.
    """
    limit = config.n_docs or (FINEWEB_DOCS if config.source == "fineweb" else None)
    return itertools.islice(_all_documents(config), limit)


def _all_documents(config: DataConfig) -> Iterator[str]:
    if config.source == "pydocs":
        return _pydocs()
    if config.source == "fineweb":
        return _hub_documents(*FINEWEB, config)
    if config.source.startswith("hf:"):
        repository = config.source[3:]
        if not re.fullmatch(r"[\w.-]+/[\w.-]+", repository):
            raise UserError(f"data.source={config.source!r}: write it as hf:OWNER/NAME")
        return _hub_documents(repository, None, config)
    return itertools.chain.from_iterable(
        _text_file(path) if path.suffix == ".txt" else _table(path, config)
        for path in _files(config.source)
    )


def _pydocs() -> Iterator[str]:
    from pydoc_data.topics import topics  # 0.7 MB of text, read only when it is the source

    return (topics[name] for name in sorted(topics))


def _files(source: str) -> list[Path]:
    root = Path(source).expanduser()
    kinds = " ".join(SUFFIXES)
    if root.is_dir():
        paths = [path for path in sorted(root.rglob("*")) if path.suffix in SUFFIXES]
        paths = [path for path in paths if path.is_file()]
        if not paths:
            raise UserError(f"data.source={source!r}: the folder holds no file of {kinds}")
        return paths
    if not root.exists():
        raise UserError(
            f"data.source={source!r}: no such file or folder; use pydocs, fineweb, hf:OWNER/NAME "
            "or the path of one"
        )
    if root.suffix not in SUFFIXES:
        raise UserError(f"data.source={source!r}: not a known kind of file; use {kinds}")
    return [root]


def _text_file(path: Path) -> Iterator[str]:
    try:
        # newline="" keeps CRLF: the course's token counts include it.
        with open(path, encoding="utf-8", newline="") as file:
            yield file.read()
    except UnicodeDecodeError as error:
        raise UserError(
            f"data.source={str(path)!r}: byte {error.start} is not UTF-8; convert the file to UTF-8"
        ) from None
    except OSError as error:
        raise UserError(f"data.source={str(path)!r}: {error.strerror}") from None


def _table(path: Path, config: DataConfig) -> Iterator[str]:
    datasets = _import_datasets()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # what it logs is raised as well
    try:
        if path.suffix == ".parquet":
            with open(path, "rb") as file:
                yield from _texts(_parquet_rows(file, config), config)
        else:
            rows = datasets.load_dataset(
                SUFFIXES[path.suffix],
                data_files=glob.escape(str(path)),
                split="train",
                streaming=True,
            )
            yield from _texts(rows, config)
    except UserError:
        raise
    except Exception as error:  # each file format has errors of its own
        reason = str(error.__cause__ or error).split("\n")[0] or type(error).__name__
        raise UserError(
            f"data.source={str(path)!r}: not readable as {path.suffix}: {reason}"
        ) from None


def _parquet_rows(file: BinaryIO, config: DataConfig) -> Iterator[dict[str, Any]]:
    """The rows, read in this thread and only the text of them.

    `datasets` would leave Parquet files to Arrow's threads. They read on after the last document
    that is asked for, and a Python that ends meanwhile aborts or hangs (apache/arrow#45214).
    """
    import pyarrow.parquet

    parquet = pyarrow.parquet.ParquetFile(file, pre_buffer=False)
    is_there = config.text_field in parquet.schema_arrow.names
    columns = [config.text_field] if is_there else None
    for batch in parquet.iter_batches(_BATCH_DOCS, columns=columns, use_threads=False):
        yield from batch.to_pylist()


def _hub_rows(repository: str, name: str | None, config: DataConfig) -> Iterator[dict[str, Any]]:
    import fsspec

    datasets = _import_datasets()
    files = datasets.load_dataset_builder(repository, name=name).config.data_files or {}
    urls = files.get("train", [])
    if not urls or not all(url.endswith(".parquet") for url in urls):
        yield from datasets.load_dataset(repository, name=name, split="train", streaming=True)
        return
    for url in urls:
        with fsspec.open(url) as file:
            yield from _parquet_rows(file, config)


def _hub_documents(repository: str, name: str | None, config: DataConfig) -> Iterator[str]:
    datasets = _import_datasets()
    done = failures = 0
    while True:
        try:
            rows = itertools.islice(_hub_rows(repository, name, config), done, None)
            for text in _texts(rows, config, done):
                yield text
                done, failures = done + 1, 0
            return
        except UserError:
            raise
        except datasets.exceptions.DatasetNotFoundError:
            raise UserError(
                f"data.source={config.source!r}: {repository} is not a public data set of the hub"
            ) from None
        except (ValueError, datasets.data_files.EmptyDatasetError) as error:
            reason = str(error).split("\n")[0]  # no such config or split, a damaged file
            raise UserError(f"data.source={config.source!r}: not readable: {reason}") from None
        except Exception as error:  # the HTTP client's errors are no OSError
            failures += 1
            # One retry before the first document: the hub's client has retried for 23 s itself.
            if failures > (_RETRIES if done else 1) or datasets.config.HF_HUB_OFFLINE:
                reason = str(error).split("\n")[0] or type(error).__name__
                raise UserError(
                    f"data.source={config.source!r}: cannot be read after {done} documents: "
                    f"{reason}; check the network, or {_OFFLINE_WAYS}"
                ) from None
            time.sleep(2.0**failures)


def _import_datasets() -> ModuleType:
    """Imports `datasets` late (a second, and only a first run needs it) and without frameworks."""
    for framework in ("TORCH", "JAX", "TF"):
        os.environ.setdefault(f"USE_{framework}", "0")
    import datasets

    datasets.disable_progress_bars()
    return datasets


def _texts(rows: Iterable[dict[str, Any]], config: DataConfig, first: int = 0) -> Iterator[str]:
    field = config.text_field
    for index, row in enumerate(rows, first):
        if field not in row:
            raise UserError(
                f"data.text_field={field!r}: {config.source} has no such column; "
                f"it has {', '.join(row)}"
            )
        if not isinstance(row[field], str):
            raise UserError(f"data.text_field={field!r}: row {index} holds no text")
        yield row[field]


# ---- documents -> tokens on disk ----------------------------------------------------------------


def load_corpus(config: TrainConfig) -> Corpus:
    """Opens the tokenized corpus of `config.data`, building it first where the cache lacks it.

    Raises:
      UserError: whatever `documents` raises, no text, a split without a window, token ids
        beyond model.vocab_size, a cache folder that cannot be written.
    """
    encoding = tokenizer.load(config.data.tokenizer)
    if config.model.vocab_size < encoding.n_vocab:
        raise UserError(
            f"model.vocab_size={config.model.vocab_size}: the {encoding.name} tokenizer has token "
            f"ids up to {encoding.n_vocab - 1}; use {encoding.n_vocab}"
        )
    root = Path(config.data.cache_dir).expanduser()
    folder = root / _cache_name(config.data)
    try:
        if not _is_cached(folder):
            _build(config.data, encoding, folder)
        tokens_T, manifest = _open(folder)
    except OSError as error:
        raise UserError(
            f"data.cache_dir={config.data.cache_dir!r}: {error.strerror or error}; name a folder "
            "that can be written and has room"
        ) from None
    return _split(tokens_T, manifest, config)


def describe(corpus: Corpus) -> str:
    """One line for the start of a run."""
    counts = corpus.manifest
    return (
        f"{counts['source']}: {counts['documents']:,} documents, {counts['tokens']:,} tokens "
        f"({counts['unique_tokens']:,} unique), {corpus.n_train:,} of them for training"
    )


def _cache_name(config: DataConfig) -> str:
    """Names everything that decides the tokens, without reading the text."""
    identity: list[Any] = [config.source, config.n_docs, config.text_field, config.tokenizer]
    remote = config.source == "fineweb" or config.source.startswith("hf:")
    if config.source == "pydocs":
        identity.append(platform.python_version())
    elif not remote:
        try:
            for path in _files(config.source):
                status = path.stat()
                identity.append([str(path.resolve()), status.st_size, status.st_mtime_ns])
        except OSError as error:
            raise UserError(f"data.source={config.source!r}: {error.strerror}") from None
    digest = hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:16]
    stem = Path(config.source).stem if not remote else config.source.replace("/", "-")
    return f"{stem.replace(':', '-')}-{digest}"


def _open(folder: Path) -> tuple[np.ndarray, dict[str, Any]]:
    manifest = json.loads((folder / "manifest.json").read_text())
    return np.memmap(folder / "tokens.bin", dtype=manifest["dtype"], mode="r"), manifest


def is_whole(folder: Path) -> bool:
    """Whether the folder holds a corpus whose tokens match its manifest."""
    try:
        tokens_T, manifest = _open(folder)
        return hashlib.sha256(tokens_T.data).hexdigest() == manifest["tokens_sha256"]
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _is_cached(folder: Path) -> bool:
    """Whether the folder holds a whole corpus; a damaged one is announced and removed."""
    if not folder.exists():
        return False
    whole = is_whole(folder)
    if not whole:
        print(f"the cached tokens in {folder} are damaged: building them again", file=sys.stderr)
        shutil.rmtree(folder, ignore_errors=True)
    return whole


def _build(config: DataConfig, encoding: tiktoken.Encoding, folder: Path) -> None:
    """Tokenizes into a temporary folder and renames it, so that a kill leaves no half corpus."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    _remove_stale(folder.parent)
    building = Path(tempfile.mkdtemp(prefix=f".building-{folder.name}-", dir=folder.parent))
    try:
        counts = _write_tokens(config, encoding, building / "tokens.bin")
        (building / "manifest.json").write_text(json.dumps(counts, indent=2) + "\n")
        with contextlib.suppress(OSError):  # another run was first: its corpus serves
            building.rename(folder)
    finally:
        shutil.rmtree(building, ignore_errors=True)


def _remove_stale(cache: Path) -> None:
    """Removes what a kill left behind a day ago or more."""
    for building in cache.glob(".building-*"):
        with contextlib.suppress(FileNotFoundError):
            newest = max(path.stat().st_mtime for path in (building, *building.iterdir()))
            if time.time() - newest > _STALE_SECONDS:
                shutil.rmtree(building, ignore_errors=True)


def _write_tokens(config: DataConfig, encoding: tiktoken.Encoding, path: Path) -> dict[str, Any]:
    dtype = np.dtype(np.uint16 if encoding.n_vocab <= 2**16 else np.uint32)
    text_sha256, tokens_sha256 = hashlib.sha256(), hashlib.sha256()
    is_seen_V = np.zeros(encoding.n_vocab, bool)
    n_documents = n_tokens = n_characters = 0
    rate = ""
    seconds = 0.0
    with open(path, "wb") as file, _progress() as progress:
        task = progress.add_task("tokenizing", total=config.n_docs or None, rate="")
        for batch in _batched(documents(config)):
            for text in batch:
                text_sha256.update(_utf8(text, n_documents, config))
                text_sha256.update(tokenizer.END_OF_TEXT.encode())
                n_documents, n_characters = n_documents + 1, n_characters + len(text)
            start = time.monotonic()
            ids = encoding.encode_ordinary_batch(batch, num_threads=os.cpu_count() or 1)
            seconds += time.monotonic() - start
            array = np.concatenate([np.array([*doc, encoding.eot_token], dtype) for doc in ids])
            is_seen_V[array] = True
            tokens_sha256.update(array.data)
            file.write(array.data)
            n_tokens += len(array)
            rate = f"{n_tokens / seconds:,.0f} tokens/s"
            progress.update(task, completed=n_documents, rate=rate)
    if n_characters == 0:
        raise UserError(f"data.source={config.source!r}: holds no text; name one that does")
    print(f"tokenized {n_documents:,} documents, {n_tokens:,} tokens at {rate}", file=sys.stderr)
    return {
        "source": config.source,
        "tokenizer": config.tokenizer,
        "documents": n_documents,
        "tokens": n_tokens,
        "unique_tokens": int(is_seen_V.sum()),
        "dtype": dtype.name,
        "text_sha256": text_sha256.hexdigest(),
        "tokens_sha256": tokens_sha256.hexdigest(),
    }


def _utf8(text: str, index: int, config: DataConfig) -> bytes:
    try:
        return text.encode()
    except UnicodeEncodeError:
        raise UserError(
            f"data.source={config.source!r}: document {index} cannot be written as UTF-8; mend it"
        ) from None


def _batched(texts: Iterator[str]) -> Iterator[list[str]]:
    while batch := list(itertools.islice(texts, _BATCH_DOCS)):
        yield batch


def _progress() -> rich.progress.Progress:
    return rich.progress.Progress(
        rich.progress.TextColumn("{task.description}"),
        rich.progress.BarColumn(),
        rich.progress.MofNCompleteColumn(),
        rich.progress.TextColumn("documents, {task.fields[rate]}"),
        console=(console := rich.console.Console(stderr=True)),
        disable=not console.is_terminal,
        transient=True,
    )


# ---- tokens -> batches --------------------------------------------------------------------------


def _split(tokens_T: np.ndarray, manifest: dict[str, Any], config: TrainConfig) -> Corpus:
    n_test = int(len(tokens_T) * config.data.test_fraction)
    n_train = len(tokens_T) - n_test
    window = config.model.seq_len + 1
    for part, size in (("training", n_train), ("test", n_test)):
        if size < window:
            raise UserError(
                f"data.source={config.data.source!r}: {len(tokens_T):,} tokens leave a {part} "
                f"split of {size:,}, less than one window of {window}; use more text or a smaller "
                "model.seq_len"
            )
    return Corpus(tokens_T, n_train, manifest)


def train_batch(corpus: Corpus, config: TrainConfig, step: int) -> np.ndarray:
    """The global batch of `step`: windows [B, L + 1]; inputs `[:, :-1]`, targets `[:, 1:]`.

    A pure function of (seed, step), so resuming needs no iterator state.
    """
    sampler = _random_starts if config.data.sampling == "random" else _epoch_starts
    return _windows(corpus, config, sampler(corpus, config, step))


def test_batches(corpus: Corpus, config: TrainConfig) -> np.ndarray:
    """The fixed test windows [eval_batches, B, L + 1], evenly spaced, the same for every seed."""
    last = len(corpus.tokens_T) - (config.model.seq_len + 1)
    n_windows = config.eval_batches * config.batch_size
    starts = np.linspace(corpus.n_train, last, n_windows).astype(np.int64)
    return _windows(corpus, config, starts).reshape(config.eval_batches, config.batch_size, -1)


def _windows(corpus: Corpus, config: TrainConfig, starts_B: np.ndarray) -> np.ndarray:
    return corpus.tokens_T[starts_B[:, None] + np.arange(config.model.seq_len + 1)].astype(np.int32)


def _random_starts(corpus: Corpus, config: TrainConfig, step: int) -> np.ndarray:
    generator = np.random.Generator(np.random.Philox(key=[config.seed, step]))
    return generator.integers(0, corpus.n_train - config.model.seq_len, config.batch_size)


def _epoch_starts(corpus: Corpus, config: TrainConfig, step: int) -> np.ndarray:
    n_windows = (corpus.n_train - 1) // config.model.seq_len
    places_B = step * config.batch_size + np.arange(config.batch_size)
    epochs_B, offsets_B = np.divmod(places_B, n_windows)
    orders = {epoch: _epoch_order(config.seed, epoch, n_windows) for epoch in set(epochs_B)}
    windows = [orders[epoch][offset] for epoch, offset in zip(epochs_B, offsets_B, strict=True)]
    return np.array(windows) * config.model.seq_len


@functools.lru_cache(maxsize=2)
def _epoch_order(seed: int, epoch: int, n_windows: int) -> np.ndarray:
    return np.random.Generator(np.random.Philox(key=[seed, epoch])).permutation(n_windows)
