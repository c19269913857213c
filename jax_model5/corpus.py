"""A source (text, FineWeb, ...) -> one token array on disk."""

import contextlib
import dataclasses
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
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import rich.console
import rich.progress
import tiktoken

from jax_model5 import tokenizer
from jax_model5.config import DataConfig, TrainConfig
from jax_model5.errors import UserError, disk_errors, require

SUFFIXES = {".txt": "text", ".jsonl": "json", ".json": "json", ".parquet": "parquet"}
FINEWEB, FINEWEB_SUBSET, FINEWEB_DOCS = "HuggingFaceFW/fineweb", "sample-10BT", 1000
_RETRIES, _BATCH_DOCS, _STALE_SECONDS = 4, 512, 86400


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
    return itertools.islice(_all_documents(config), config.n_docs or None)


def _all_documents(config: DataConfig) -> Iterator[str]:
    if config.source in SOURCES:
        return SOURCES[config.source].documents(config)
    if config.source.startswith("hf:"):
        return _hub_documents(config.source[3:], config.subset or None, config)
    return itertools.chain.from_iterable(
        _text_file(path) if path.suffix == ".txt" else _table(path, config)
        for path in _files(config.source)
    )


def _pydocs(_: DataConfig) -> Iterator[str]:
    from pydoc_data.topics import topics  # 0.7 MB of text, read only when it is the source

    return (topics[name] for name in sorted(topics))


def _fineweb(config: DataConfig) -> Iterator[str]:
    documents = _hub_documents(FINEWEB, config.subset or FINEWEB_SUBSET, config)
    return itertools.islice(documents, config.n_docs or FINEWEB_DOCS)


def _files(source: str) -> list[Path]:
    root, kinds = Path(source).expanduser(), " ".join(SUFFIXES)
    if root.is_dir():
        paths = [p for p in sorted(root.rglob("*")) if p.suffix in SUFFIXES and p.is_file()]
        require(len(paths) > 0, "data.source", source, f"the folder holds no file of {kinds}")
        return paths
    fix = "no such file or folder; use pydocs, fineweb, hf:OWNER/NAME or the path of one"
    require(root.exists(), "data.source", source, fix)
    fix = f"not a known kind of file; use {kinds}"
    require(root.suffix in SUFFIXES, "data.source", source, fix)
    return [root]


def _text_file(path: Path) -> Iterator[str]:
    try:
        # newline="" keeps CRLF: the course's token counts include it.
        errors = disk_errors("data.source", str(path), "name another")
        with errors, open(path, encoding="utf-8", newline="") as file:
            text = file.read()
    except UnicodeDecodeError as error:
        fix = f"byte {error.start} is not UTF-8; convert the file to UTF-8"
        raise UserError(f"data.source={str(path)!r}: {fix}") from None
    yield text


def _table(path: Path, config: DataConfig) -> Iterator[str]:
    try:
        with _quiet_datasets() as datasets:
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
        what = f"data.source={str(path)!r}: not readable as {path.suffix}"
        raise UserError(f"{what}: {reason}") from None


def _parquet_rows(file: BinaryIO, config: DataConfig) -> Iterator[dict[str, Any]]:
    """The rows, read in this thread and only the text of them.

    `datasets` would leave Parquet files to Arrow's threads. They read on after the last document
    that is asked for, and a Python that ends meanwhile aborts or hangs (apache/arrow#45214).
    """
    import pyarrow.parquet

    parquet, field = pyarrow.parquet.ParquetFile(file, pre_buffer=False), config.text_field
    columns = [field] if field in parquet.schema_arrow.names else None
    for batch in parquet.iter_batches(_BATCH_DOCS, columns=columns, use_threads=False):
        yield from batch.to_pylist()


def _hub_rows(
    datasets: ModuleType, repository: str, subset: str | None, config: DataConfig
) -> Iterator[dict[str, Any]]:
    import fsspec

    files = datasets.load_dataset_builder(repository, name=subset).config.data_files or {}
    urls = files.get("train", [])
    if not urls or not all(url.endswith(".parquet") for url in urls):
        yield from datasets.load_dataset(repository, name=subset, split="train", streaming=True)
        return
    for url in urls:
        with fsspec.open(url) as file:
            yield from _parquet_rows(file, config)


def _hub_documents(repository: str, subset: str | None, config: DataConfig) -> Iterator[str]:
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repository):
        raise UserError(f"data.source={config.source!r}: write it as hf:OWNER/NAME")
    with _quiet_datasets() as datasets:
        yield from _with_retries(datasets, repository, subset, config)


def _with_retries(
    datasets: ModuleType, repository: str, subset: str | None, config: DataConfig
) -> Iterator[str]:
    """The documents, gone on with after a failure where they broke off."""
    done = failures = 0
    while True:
        try:
            rows = _hub_rows(datasets, repository, subset, config)
            for text in _texts(itertools.islice(rows, done, None), config, done):
                yield text
                done, failures = done + 1, 0
            return
        except UserError:
            raise
        except datasets.exceptions.DatasetNotFoundError:
            reason = f"{repository} is not a public data set of the hub"
            raise UserError(f"data.source={config.source!r}: {reason}") from None
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
                    f"{reason}; check the network, or offline, use data.source=pydocs or a path to "
                    ".txt .jsonl .json .parquet files"
                ) from None
            time.sleep(2.0**failures)


@contextlib.contextmanager
def _quiet_datasets() -> Iterator[ModuleType]:
    """`datasets` without a word, for what it logs is raised as well; its settings are put back.

    Imported late, because that takes a second that only a first run needs, and without the
    frameworks that it would import.
    """
    names = [f"USE_{framework}" for framework in ("TORCH", "JAX", "TF")]
    added = {name: "0" for name in names if name not in os.environ}
    os.environ |= added
    try:
        import datasets
    finally:
        for name in added:
            del os.environ[name]
    verbosity, bars = datasets.logging.get_verbosity(), datasets.are_progress_bars_disabled()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    datasets.disable_progress_bars()
    try:
        yield datasets
    finally:
        datasets.logging.set_verbosity(verbosity)
        if not bars:
            datasets.enable_progress_bars()


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


class Source(NamedTuple):
    """A source by name: its documents, and what decides them besides the config."""

    documents: Callable[[DataConfig], Iterator[str]]
    version: str = ""


SOURCES = {"pydocs": Source(_pydocs, platform.python_version()), "fineweb": Source(_fineweb)}


# ---- documents -> tokens on disk ----------------------------------------------------------------


def load_corpus(config: TrainConfig) -> Corpus:
    """Opens the tokenized corpus of `config.data`, building it first where the cache lacks it.

    Raises:
      UserError: whatever `documents` raises, no text, a split without a window, token ids
        beyond model.vocab_size, a cache folder that cannot be written.
    """
    encoding = tokenizer.load(config.data.tokenizer)
    V, last = config.model.vocab_size, encoding.n_vocab - 1
    fix = f"the {encoding.name} tokenizer has token ids up to {last}; use {last + 1}"
    require(last < V, "model.vocab_size", V, fix)
    root = Path(config.data.cache_dir).expanduser()
    folder = root / _cache_name(config.data)
    fix = "name a folder that can be written and has room"
    with disk_errors("data.cache_dir", config.data.cache_dir, fix):
        if not _is_cached(folder):
            _build(config.data, encoding, folder)
        tokens_T, manifest = _open(folder)
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
    fields = "source n_docs text_field separator tokenizer"
    identity: list[Any] = [getattr(config, field) for field in fields.split()]
    is_named = config.source in SOURCES or config.source.startswith("hf:")
    if is_named:
        identity += [config.subset, getattr(SOURCES.get(config.source), "version", "")]
    else:
        with disk_errors("data.source", config.source, "name another"):
            for path in _files(config.source):
                status = path.stat()
                identity.append([str(path.resolve()), status.st_size, status.st_mtime_ns])
    digest = hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:16]
    stem = config.source.replace("/", "-") if is_named else Path(config.source).stem
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
    if is_whole(folder):
        return True
    print(f"the cached tokens in {folder} are damaged: building them again", file=sys.stderr)
    shutil.rmtree(folder, ignore_errors=True)
    return False


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
    ends = config.separator == "end_of_text"
    separator, end = (tokenizer.END_OF_TEXT, [encoding.eot_token]) if ends else ("", [])
    text_sha256, tokens_sha256 = hashlib.sha256(), hashlib.sha256()
    is_seen_V = np.zeros(encoding.n_vocab, bool)
    n_documents = n_tokens = n_characters = 0
    seconds, rate = 0.0, ""
    with open(path, "wb") as file, _progress() as progress:
        task = progress.add_task("tokenizing", total=config.n_docs or None, rate="")
        texts = documents(config)
        while batch := list(itertools.islice(texts, _BATCH_DOCS)):
            for text in batch:
                text_sha256.update(_utf8(text, n_documents, config))
                text_sha256.update(separator.encode())
                n_documents, n_characters = n_documents + 1, n_characters + len(text)
            start = time.monotonic()
            ids = encoding.encode_ordinary_batch(batch, num_threads=os.cpu_count() or 1)
            seconds += time.monotonic() - start
            array = np.concatenate([np.array([*doc, *end], dtype) for doc in ids])
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
        "separator": config.separator,
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
        what = f"document {index} cannot be written as UTF-8; fix it"
        raise UserError(f"data.source={config.source!r}: {what}") from None


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
