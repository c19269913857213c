"""A folder that is there whole or not at all."""

import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path

import safetensors

from jax_model5.errors import UserError


@contextlib.contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """A folder beside `out` that takes its place when all is written: a kill leaves no half."""
    target = out.resolve()
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=target.parent) as scratch:
            partial = Path(scratch) / target.name
            partial.mkdir()
            yield partial
            partial.rename(target)
    except (OSError, safetensors.SafetensorError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise UserError(
            f"out={str(out)!r}: cannot be written: {reason}; make room or name another folder"
        ) from None
