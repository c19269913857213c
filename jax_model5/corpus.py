"""A source (text, FineWeb, ...) -> one token array on disk."""

import contextlib
import dataclasses
import hashlib
import itertools
import json
import mmap
import os
import platform
import re
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tiktoken

from jax_model5 import disk, files, hub, token_file, tokenizer
from jax_model5.config import DataConfig, TrainConfig
from jax_model5.errors import UserError, disk_errors, require, write_line
from jax_model5.readers import Found, Part, chunks, parts, split_documents

_STALE_SECONDS = 7 * 86400


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


class Source(NamedTuple):
    """A source by name: its documents, and what decides them besides the config."""

    parts: Callable[[DataConfig, Found], Iterator[Part]]
    version: str = ""
    n_docs: int | None = None
    """How many documents unless `data.n_docs` says so; None: all."""


def _pydocs(_config: DataConfig, _found: Found) -> Iterator[Part]:
    from pydoc_data.topics import topics  # 0.7 MB of text, read only when it is the source

    return parts(topics[name] for name in sorted(topics))


SOURCES = {
    "pydocs": Source(_pydocs, version=platform.python_version()),
    "fineweb": Source(hub.fineweb, n_docs=hub.FINEWEB_DOCS),
}


def documents(config: DataConfig) -> Iterator[str]:
    """The source's documents, in order, at most `n_docs` of them.

    Raises:
      UserError: no such file or data set, a row without text, not UTF-8, no network.
    """
    texts: list[str] = []
    for text, is_last in _parts(config, Found()):
        texts.append(text)
        if is_last:
            yield "".join(texts)
            texts = []


def _parts(config: DataConfig, found: Found) -> Iterator[Part]:
    chained = itertools.chain.from_iterable(
        _parts_of(name, config, found) for name in names_of(config.source)
    )
    every = split_documents(chained, found, config.split_on_end_of_text)
    return _first(every, config.n_docs or None)


def _parts_of(name: str, config: DataConfig, found: Found) -> Iterator[Part]:
    if name in SOURCES:
        source = SOURCES[name]
        return _first(source.parts(config, found), config.n_docs or source.n_docs)
    if name.startswith("hf:"):
        return parts(hub.hub_texts(name[3:], config.subset or None, config, found))
    paths = files.files_of(name, found)
    fix = "holds tokens, which are not joined with other sources; name their folder or a glob"
    require(not files.are_tokens(paths), "data.source", name, fix)
    return itertools.chain.from_iterable(files.parts_of(path, config, found) for path in paths)


def names_of(source: str) -> list[str]:
    """The sources that commas separate, unless they are a part of one path."""
    return [source] if os.path.exists(os.path.expanduser(source)) else source.split(",")


def _first(every: Iterator[Part], n_docs: int | None) -> Iterator[Part]:
    """The parts of the first n documents; None: of all."""
    done = 0
    while n_docs is None or done < n_docs:
        part = next(every, None)
        if part is None:
            return
        done += part[1]
        yield part


# ---- the cache ----------------------------------------------------------------------------------


def load_corpus(config: TrainConfig) -> Corpus:
    """Opens the tokenized corpus of `config.data`, building it first where the cache lacks it.

    Of several processes one builds it, and the others wait.

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
        if not is_whole(folder):
            _build(config.data, encoding, folder)
        tokens_T, manifest = _open(folder, in_windows=True)
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
    fields = "source n_docs text_field separator skip_bad_rows split_on_end_of_text tokenizer"
    identity: list[Any] = [getattr(config, field) for field in fields.split()]
    for name in names_of(config.source):
        if name in SOURCES or name.startswith("hf:"):
            identity += [config.subset, getattr(SOURCES.get(name), "version", "")]
            continue
        with disk_errors("data.source", name, "name another"):
            for path in files.files_of(name, Found()):
                status = path.stat()
                identity.append([str(path.resolve()), status.st_size, status.st_mtime_ns])
    digest = hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:16]
    is_path = os.path.exists(os.path.expanduser(config.source))
    stem = Path(config.source).stem if is_path else config.source
    # 40 characters of UTF-8 and what is put around them fit into a file name.
    return re.sub(r"[^\w.-]+", "-", stem).lstrip(".")[:40] + f"-{digest}"


def _open(folder: Path, *, in_windows: bool = False) -> tuple[np.ndarray, dict[str, Any]]:
    """Tokens and manifest. Of a window anywhere, what the system would read ahead is for nothing.

    That is up to megabytes a window; a file of less than a gigabyte is soon in memory that way.
    """
    manifest = json.loads((folder / "manifest.json").read_text())
    with open(folder / "tokens.bin", "rb") as file:
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    if in_windows and len(mapped) > 2**30 and hasattr(mmap, "MADV_RANDOM"):  # not on Windows
        with contextlib.suppress(OSError):  # it is advice
            mapped.madvise(mmap.MADV_RANDOM)
    return np.frombuffer(mapped, manifest["dtype"]), manifest


def is_of_an_older_version(folder: Path) -> bool:
    """Whether the folder holds a corpus without a seal, which no run opens any more."""
    try:
        return "written" not in json.loads((folder / "manifest.json").read_text())
    except (OSError, ValueError):
        return False


def is_whole(folder: Path, *, by_content: bool = False) -> bool:
    """Whether the folder holds a corpus whose tokens match its manifest.

    Tokens that were not written to since are read again only where `by_content`.
    """
    try:
        tokens_T, manifest = _open(folder)
        written = (folder / "tokens.bin").stat().st_mtime_ns
        if not (disk.is_sealed(manifest) and len(tokens_T) == manifest["tokens"]):
            return False
        if written == manifest["written"] and not by_content:
            return True
        is_whole = hashlib.sha256(tokens_T.data).hexdigest() == manifest["tokens_sha256"]
    except (OSError, ValueError, KeyError, TypeError):
        return False
    if is_whole and written != manifest["written"]:  # a copy: next time its time tells
        with contextlib.suppress(OSError):
            os.utime(folder / "tokens.bin", ns=(manifest["written"], manifest["written"]))
    return is_whole


def _is_cached(folder: Path) -> bool:
    """Whether the folder holds a whole corpus; a damaged one is announced and removed."""
    if not folder.exists():
        return False
    if is_whole(folder):
        return True
    write_line(f"the cached tokens in {folder} are damaged: building them again")
    shutil.rmtree(folder, ignore_errors=True)
    return False


def _build(config: DataConfig, encoding: tiktoken.Encoding, folder: Path) -> None:
    """Tokenizes into another folder and renames it: a kill leaves no half corpus.

    What it leaves is gone on with.
    """
    building = folder.with_name(f".{folder.name}.building")
    folder.parent.mkdir(parents=True, exist_ok=True)
    _remove_stale(folder.parent)
    with _alone(building):
        try:
            if not _is_cached(folder):  # else another process was first
                manifest = disk.sealed(_manifest(config, encoding, building))
                text = json.dumps(manifest, indent=2) + "\n"
                disk.replace_text(building / "manifest.json", text)
                (building / token_file.PROGRESS).unlink(missing_ok=True)
                building.rename(folder)
                disk.sync_folder(folder.parent)
        finally:
            if not (building / token_file.PROGRESS).exists():
                shutil.rmtree(building, ignore_errors=True)


def _manifest(config: DataConfig, encoding: tiktoken.Encoding, folder: Path) -> dict[str, Any]:
    """Writes tokens.bin into the folder; what stands in it, and what else the source holds."""
    paths, found = _token_paths(config)
    if paths:
        counts = _copied(paths, encoding, folder)
    else:
        counts, found = _tokenized(config, encoding, folder)
    for line in _notes(config, found):
        write_line(line)
    named = {key: getattr(config, key) for key in ("source", "separator", "tokenizer")}
    return {**named, **counts, **dataclasses.asdict(found)}


def _tokenized(
    config: DataConfig, encoding: tiktoken.Encoding, folder: Path
) -> tuple[dict[str, Any], Found]:
    separator, found = tokenizer.END_OF_TEXT if config.separator == "end_of_text" else "", Found()
    try:
        counts = token_file.tokenize(_parts(config, found), separator, encoding, folder)
    except token_file.Changed:
        (folder / token_file.PROGRESS).unlink()
        return _tokenized(config, encoding, folder)
    if counts["characters"] == 0:
        bad = f" but {found.bad_rows:,} bad rows" if found.bad_rows else ""
        raise UserError(f"data.source={config.source!r}: holds no text{bad}; name one that does")
    return counts, found


def _token_paths(config: DataConfig) -> tuple[list[Path], Found]:
    """The files of a source of tokens; none, if it is one of text."""
    name, found = config.source, Found()
    if name in SOURCES or name.startswith("hf:") or len(names_of(name)) > 1:
        return [], found
    paths = files.files_of(name, found)
    if not files.are_tokens(paths):
        return [], found
    require(config.n_docs == 0, "data.n_docs", config.n_docs, "tokens are all taken; leave it out")
    return paths, found


def _copied(paths: list[Path], encoding: tiktoken.Encoding, folder: Path) -> dict[str, Any]:
    file = token_file.TokenFile(folder, encoding)
    arrays, n_test_files = files.token_arrays(paths, encoding.n_vocab)
    for array_T in arrays:
        for chunk_T in chunks(array_T):
            file.add(chunk_T)
    n_test = sum(map(len, arrays[len(arrays) - n_test_files :]))
    counts = {"documents": max(1, file.n_of(encoding.eot_token)), "test_tokens": n_test}
    return {**counts, **file.close()}


def _notes(config: DataConfig, found: Found) -> Iterator[str]:
    """What a user would otherwise not know, a line each."""
    if found.skipped_files:
        first = "; ".join(f"{name} ({why})" for name, why in [*found.skipped_files.items()][:5])
        more = f"; {len(found.skipped_files) - 5} more" if len(found.skipped_files) > 5 else ""
        yield f"not read: {first}{more}"
    if found.bad_rows:
        yield f"left out {found.bad_rows:,} rows without text"
    if found.byte_order_marks:
        yield f"left out {found.byte_order_marks:,} byte order marks"
    if found.end_of_text_marks and not config.split_on_end_of_text:
        yield (
            f"{tokenizer.END_OF_TEXT} stands in the text {found.end_of_text_marks:,} times and is "
            "taken as text; --data.split_on_end_of_text true ends a document there"
        )


@contextlib.contextmanager
def _alone(building: Path) -> Iterator[None]:
    """The folder, made where it lacks, for this process alone."""
    has_waited = False
    while True:
        building.mkdir(exist_ok=True)
        with contextlib.suppress(FileNotFoundError):  # another has renamed or removed it
            opened = os.open(building, os.O_RDONLY)
            if not disk.lock(opened):
                if not has_waited:
                    where = building.parent
                    write_line(f"waiting for the process that tokenizes into {where}")
                has_waited = disk.lock(opened, waits=True)
            if os.path.exists(building) and os.path.samestat(building.stat(), os.fstat(opened)):
                break
            os.close(opened)
    try:
        yield
    finally:
        os.close(opened)


def _remove_stale(cache: Path) -> None:
    """Removes what a kill left behind a week ago or more."""
    for building in cache.glob(".*.building"):
        with contextlib.suppress(FileNotFoundError):
            newest = max(path.stat().st_mtime for path in (building, *building.iterdir()))
            if time.time() - newest > _STALE_SECONDS and not disk.is_locked(building):
                shutil.rmtree(building, ignore_errors=True)


def _split(tokens_T: np.ndarray, manifest: dict[str, Any], config: TrainConfig) -> Corpus:
    n_test = manifest.get("test_tokens") or int(len(tokens_T) * config.data.test_fraction)
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
