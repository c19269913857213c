"""What is on disk is whole: files replaced in one piece, folders locked, JSON that knows itself."""

import contextlib
import fcntl
import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

_SEAL = "sha256_of_the_rest"


@contextlib.contextmanager
def replaced(path: Path) -> Iterator[BinaryIO]:
    """A file to write that takes the place of `path` whole or not at all.

    It stays so when the machine stops.
    """
    partial = path.with_name(f".{path.name}.partial")
    with open(partial, "wb") as file:
        yield file
        file.flush()
        sync(file.fileno())
    partial.replace(path)
    sync_folder(path.parent)


def replace_text(path: Path, text: str) -> None:
    with replaced(path) as file:
        file.write(text.encode())


def sync(file: int) -> None:
    """Returns when what was written to the open file is on the disk itself."""
    os.fsync(file)


def sync_folder(folder: Path) -> None:
    """Returns when the names in the folder are on the disk itself."""
    opened = os.open(folder, os.O_RDONLY)
    try:
        sync(opened)
    finally:
        os.close(opened)


# ---- locks: on folders themselves, so that none leaves a file behind ----------------------------


def lock(folder: int, *, waits: bool = False) -> bool:
    """Takes an open folder for this process alone, until it is closed; False: another has it."""
    try:
        fcntl.flock(folder, fcntl.LOCK_EX | (0 if waits else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    return True


def is_locked(folder: Path) -> bool:
    """Whether another process has taken the folder."""
    opened = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(opened, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(opened)
    return False


# ---- JSON that tells when a bit of it has changed -----------------------------------------------


def sealed(fields: dict[str, Any]) -> dict[str, Any]:
    """The fields with the SHA-256 of them all."""
    return {**fields, _SEAL: _digest(fields)}


def is_sealed(fields: dict[str, Any]) -> bool:
    """Whether the fields are those that `sealed` saw."""
    rest = {name: value for name, value in fields.items() if name != _SEAL}
    return fields.get(_SEAL) == _digest(rest)


def _digest(fields: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()
