"""A path -> the files there, their documents in parts, their tokens."""

import bz2
import contextlib
import glob
import gzip
import io
import json
import lzma
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from jax_model5.config import DataConfig
from jax_model5.errors import UserError, disk_errors, require
from jax_model5.readers import READERS, SEEKING, TOKENS, Found, Part, chunks, tokens_of

_TEST_NAMES = re.compile(r"(?<![a-z])(val|valid|validation|test)(?![a-z])")


def files_of(source: str, found: Found) -> list[Path]:
    """The files of a path, a folder or a glob, in order; what is left out stands in `found`.

    Raises:
      UserError: there are none.
    """
    require(source.strip() != "", "data.source", source, "name a file, a folder or a glob")
    root, fix = Path(source).expanduser(), f"not a known kind of file; use {_kinds()}"
    if root.is_file():
        require(is_known(root), "data.source", source, fix)
        return [root]
    starts = [root] if root.is_dir() else _matches(source)
    seen: dict[str, Path] = {}
    files = [path for start in starts for path in _below(start, found, seen, is_named=True)]
    require(len(files) > 0, "data.source", source, f"holds no file of {_kinds()}")
    if tokens := [path for path in files if are_tokens([path])]:
        beside = {str(path): "text beside tokens" for path in files if path not in tokens}
        found.skipped_files |= beside
    return tokens or files


def _matches(source: str) -> list[Path]:
    """What a glob stands for."""
    fix = "use pydocs, fineweb, hf:OWNER/NAME or the path of one"
    with disk_errors("data.source", source, fix):
        matches = sorted(glob.glob(os.path.expanduser(source), recursive=True))
        if not matches:
            os.stat(source)  # says why
    return list(map(Path, matches))


def _below(
    path: Path, found: Found, seen: dict[str, Path], is_named: bool = False
) -> Iterator[Path]:
    """The known files from here on. Links are followed; what they show again is left out."""
    real = os.path.realpath(path)
    if real in seen:
        found.skipped_files[str(path)] = f"the same as {seen[real]}"
        return
    seen[real] = path
    if path.name.startswith(".") and not is_named:
        found.skipped_files[str(path)] = "hidden"
    elif path.is_dir():
        with _format_errors(path):
            saved = _saved_dataset(path, found)
        for below in sorted(path.iterdir()) if saved is None else saved:
            yield from _below(below, found, seen)
    elif path.is_file() and is_known(path):
        yield path
    else:
        found.skipped_files[str(path)] = "of no known kind"


def _saved_dataset(folder: Path, found: Found) -> list[Path] | None:
    """The files of a folder that `save_to_disk` of the package `datasets` wrote, else None."""
    if (folder / "dataset_dict.json").is_file():
        splits = json.loads((folder / "dataset_dict.json").read_text())["splits"]
        fix = f"holds the splits {', '.join(splits)}; name the folder of one"
        require("train" in splits, "data.source", str(folder), fix)
        others = [str(folder / split) for split in splits if split != "train"]
        found.skipped_files |= dict.fromkeys(others, "not the split train")
        return [folder / "train"]
    if (folder / "state.json").is_file() and (folder / "dataset_info.json").is_file():
        state = json.loads((folder / "state.json").read_text())
        return [folder / file["filename"] for file in state["_data_files"]]
    return None


def is_known(path: Path) -> bool:
    return kind_of(path) in READERS or path.suffix.lower() in TOKENS


def kind_of(path: Path) -> str:
    """The suffix that says how the file is read: .jsonl of a.JSONL.gz."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] in _UNPACKED:
        suffixes.pop()
    return suffixes[-1] if suffixes else ""


def _kinds() -> str:
    text, packed, tokens = (" ".join(kinds) for kinds in (READERS, _UNPACKED, TOKENS))
    return f"{text} (also {packed} of these), or tokens: {tokens}"


# ---- documents ----------------------------------------------------------------------------------


def parts_of(path: Path, config: DataConfig, found: Found) -> Iterator[Part]:
    """The documents of a file of any size, in parts; an empty file has none.

    Raises:
      UserError: names the file, and the line or row in it.
    """
    if path.stat().st_size == 0:
        return
    with _format_errors(path), _opened(path) as file:
        yield from READERS[kind_of(path)](file, path, config, found)


def _opened(path: Path) -> Any:
    """The file's bytes, unpacked; where a reader moves about in them, first as a whole."""
    unpack = _UNPACKED.get(path.suffix.lower())
    if unpack is None:
        return open(path, "rb")
    if kind_of(path) not in SEEKING:
        return unpack(path)
    unpacked = tempfile.TemporaryFile()  # noqa: SIM115
    with unpack(path) as packed:
        shutil.copyfileobj(packed, unpacked)
    unpacked.seek(0)
    return unpacked


def _open_zstandard(path: Path) -> BinaryIO:
    import pyarrow

    return io.BufferedReader(pyarrow.input_stream(str(path), compression="zstd"))


_UNPACKED: dict[str, Callable[[Path], Any]] = {
    ".gz": gzip.open,
    ".bz2": bz2.open,
    ".xz": lzma.open,
    ".zst": _open_zstandard,
}


@contextlib.contextmanager
def _format_errors(path: Path) -> Iterator[None]:
    """What a format or a compression raises, each its own, as a `UserError` that names the file."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        first = str(error.__cause__ or error).split("\n")[0]
        reason = getattr(error, "strerror", None) or first or type(error).__name__
        what = f"data.source={str(path)!r}: not readable as {''.join(path.suffixes[-2:])}"
        raise UserError(f"{what}: {reason}") from None


# ---- tokens -------------------------------------------------------------------------------------


def are_tokens(paths: list[Path]) -> bool:
    return all(path.suffix.lower() in TOKENS for path in paths)


def token_arrays(paths: list[Path], n_vocab: int) -> tuple[list[np.ndarray], int]:
    """The token arrays of the files, those of the test files last, and how many of them are these.

    Files named val, valid, validation or test are the test part, if there are others.

    Raises:
      UserError: names the file that holds something else, or a token >= n_vocab.
    """
    train = [path for path in paths if not _TEST_NAMES.search(path.stem.lower())]
    test = [path for path in paths if path not in train] if train else []
    arrays = [_known_tokens(path, n_vocab) for path in [*(train or paths), *test]]
    return arrays, len(test)


def _known_tokens(path: Path, n_vocab: int) -> np.ndarray:
    with _format_errors(path):
        tokens_T, start = tokens_of(path), 0
        for chunk_T in chunks(tokens_T):
            wrong = (chunk_T < 0) | (chunk_T >= n_vocab)
            if wrong.any():
                at = start + int(np.argmax(wrong))
                what = f"token {at} of it is {tokens_T[at]}, but the tokenizer has {n_vocab}"
                raise ValueError(f"{what}; name its data.tokenizer")
            start += len(chunk_T)
    return tokens_T
