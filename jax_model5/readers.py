"""The contents of a file -> its documents in parts, or the tokens that stand in it."""

import codecs
import csv
import dataclasses
import itertools
import json
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from jax_model5.config import DataConfig
from jax_model5.errors import UserError
from jax_model5.tokenizer import END_OF_TEXT, cut

Part = tuple[str, bool]
"""A part of a document's text, and whether it is the last of it."""
Rows = Iterable[tuple[int, Any]]
"""Each row by its number."""

_BLOCK, _BATCH_ROWS, _CHUNK = 2**20, 512, 2**24
_BYTE_ORDER_MARK = "\ufeff"
# An int of 4,301 digits is an error to Python; here it is no text, like any number.
_DECODER = json.JSONDecoder(parse_int=lambda digits: int(digits[:4300]))
_GAP = re.compile(r"[\s,]*")
_LLM_C = {20240520: "<u2", 20240801: "<u4"}  # the first number of llm.c's header of 256
_HEADER = 256 * 4  # bytes


@dataclasses.dataclass
class Found:
    """What stands in a source besides its tokens; the manifest holds it."""

    bad_rows: int = 0
    byte_order_marks: int = 0
    end_of_text_marks: int = 0
    skipped_files: dict[str, str] = dataclasses.field(default_factory=dict)


class BadRow(Exception):
    """A row without text. The message says what is wrong with it."""


# ---- rows -> texts -> parts ---------------------------------------------------------------------


def texts(rows: Rows, place: str, unit: str, config: DataConfig, found: Found) -> Iterator[str]:
    """The text of each row.

    Raises:
      UserError: a row has none, and `data.skip_bad_rows` is not set; names the row.
    """
    for number, row in rows:
        try:
            text = _text_of(row, config.text_field)
        except BadRow as error:
            if not config.skip_bad_rows:
                raise UserError(
                    f"data.source={place!r}: {unit} {number}: {error}; "
                    "data.skip_bad_rows=true leaves such rows out"
                ) from None
            found.bad_rows += 1
        else:
            yield text


def _text_of(row: Any, field: str) -> str:
    if isinstance(row, bytes):
        row = _json_of(row)
    if not isinstance(row, dict):
        raise BadRow("is no object with columns")
    if field not in row:
        raise BadRow(f"data.text_field={field!r}: no such column; name one of {', '.join(row)}")
    text = row[field]
    if not isinstance(text, str):
        raise BadRow(f"data.text_field={field!r} holds no text but {str(text)[:40]}")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise BadRow(f"{text[error.start]!r} cannot be written as UTF-8") from None
    return text


def _json_of(line: bytes) -> Any:
    try:
        return _DECODER.decode(line.decode())
    except UnicodeDecodeError as error:
        raise BadRow(f"byte {error.start} of it is not UTF-8") from None
    except (ValueError, RecursionError) as error:
        raise BadRow(f"is no JSON: {error}") from None


def parts(texts: Iterable[str]) -> Iterator[Part]:
    """Each text is a document."""
    for text in texts:
        yield from _document(cut([text]))


def _document(texts: Iterable[str]) -> Iterator[Part]:
    """The parts of one document, at least one."""
    before: str | None = None
    for text in texts:
        if before is not None:
            yield before, False
        before = text
    yield before or "", True


def split_documents(parts: Iterable[Part], found: Found, splits: bool) -> Iterator[Part]:
    """Counts where a text spells END_OF_TEXT, and where `splits`, ends a document there.

    With the separator end_of_text the tokens are then those of tiktoken's
    `encode(text, allowed_special="all")`.
    """
    is_new = False  # nothing has come since a mark
    for text, is_last in parts:
        *heads, tail = text.split(END_OF_TEXT)
        found.end_of_text_marks += len(heads)
        if not splits:
            yield text, is_last
            continue
        yield from ((head, True) for head in heads)
        is_new = (is_new or bool(heads)) and not tail
        if tail or (is_last and not is_new):
            yield tail, is_last
        is_new = is_new and not is_last


# ---- readers: (bytes, path, config, found) -> parts ---------------------------------------------


def _text(file: BinaryIO, _path: Path, _config: DataConfig, found: Found) -> Iterator[Part]:
    """The whole file is a document; an empty one is none. CRLF stays: the course counts it."""
    blocks = _blocks(file, found)
    for first in blocks:
        yield from _document(cut(itertools.chain([first], blocks)))


def _json_lines(file: BinaryIO, path: Path, config: DataConfig, found: Found) -> Iterator[Part]:
    rows = ((number, line) for number, line in _lines(file, found) if line.strip())
    return parts(texts(rows, str(path), "line", config, found))


def _json(file: BinaryIO, path: Path, config: DataConfig, found: Found) -> Iterator[Part]:
    rows = _json_rows(_blocks(file, found))
    return parts(texts(rows, str(path), "line", config, found))


def _csv(file: BinaryIO, path: Path, config: DataConfig, found: Found) -> Iterator[Part]:
    is_tabs = ".tsv" in (suffix.lower() for suffix in path.suffixes)
    rows = _csv_rows(_lines(file, found), "excel-tab" if is_tabs else "excel")
    return parts(texts(rows, str(path), "line", config, found))


def _parquet(file: BinaryIO, path: Path, config: DataConfig, found: Found) -> Iterator[Part]:
    rows = enumerate(parquet_rows(file, config))
    return parts(texts(rows, str(path), "row", config, found))


def _arrow(file: BinaryIO, path: Path, config: DataConfig, found: Found) -> Iterator[Part]:
    rows = enumerate(_arrow_rows(file, config))
    return parts(texts(rows, str(path), "row", config, found))


READERS: dict[str, Callable[[BinaryIO, Path, DataConfig, Found], Iterator[Part]]] = {
    ".txt": _text,
    ".md": _text,
    ".py": _text,
    ".jsonl": _json_lines,
    ".ndjson": _json_lines,
    ".json": _json,
    ".csv": _csv,
    ".tsv": _csv,
    ".parquet": _parquet,
    ".arrow": _arrow,
}
SEEKING = (".parquet", ".arrow")
"""The kinds that are not read from the first byte to the last."""


def _blocks(file: BinaryIO, found: Found) -> Iterator[str]:
    """The text of a file in blocks; ValueError where it is not UTF-8."""
    rest, offset, line = b"", 0, 1
    while block := file.read(_BLOCK):
        rest += block
        try:
            text, n_bytes = codecs.utf_8_decode(rest, "strict", False)
        except UnicodeDecodeError as error:
            raise _not_utf8(rest, error.start, offset, line) from None
        if offset == 0 and text.startswith(_BYTE_ORDER_MARK):
            found.byte_order_marks += 1
            text = text[1:]
        line += rest.count(b"\n", 0, n_bytes)
        rest, offset = rest[n_bytes:], offset + n_bytes
        if text:
            yield text
    if rest:
        raise _not_utf8(rest, 0, offset, line)


def _not_utf8(block: bytes, at: int, offset: int, line: int) -> ValueError:
    line += block.count(b"\n", 0, at)
    what = f"line {line}: byte {offset + at} of the file is not UTF-8"
    return ValueError(f"{what}; convert the file to UTF-8")


def _lines(file: BinaryIO, found: Found) -> Iterator[tuple[int, bytes]]:
    for number, line in enumerate(file, 1):
        if number == 1 and line.startswith(codecs.BOM_UTF8):
            found.byte_order_marks += 1
            line = line.removeprefix(codecs.BOM_UTF8)
        yield number, line


def _json_rows(blocks: Iterator[str]) -> Iterator[tuple[int, Any]]:
    """The rows of one list, or one after the other, by their lines; ValueError where they end.

    Only the row at hand is in memory.
    """
    text, at, line, depth, is_first = "", 0, 1, 0, True
    while True:
        gap = _GAP.match(text, at).end()  # type: ignore[union-attr]
        line, at = line + text.count("\n", at, gap), gap
        if at == len(text):
            text, at = next(blocks, ""), 0
            if not text:
                break
        elif text[at] == ("[" if is_first else "]" if depth else None):
            depth, at, is_first = 1 - depth, at + 1, False
        else:
            is_first = False
            try:
                row, end = _DECODER.raw_decode(text, at)
            except json.JSONDecodeError as error:
                n_blocks = 1 + (len(text) - at) // _BLOCK
                more = "".join(itertools.islice(blocks, n_blocks)) if _is_cut(error, text) else ""
                if not more:
                    line += text.count("\n", at, error.pos)
                    raise ValueError(f"line {line}: is no JSON: {error.msg}") from None
                text, at = text[at:] + more, 0
                continue
            yield line, row
            line, at = line + text.count("\n", at, end), end
    if depth:
        raise ValueError(f"line {line}: the file ends inside its list of rows")


def _is_cut(error: json.JSONDecodeError, text: str) -> bool:
    """Whether what follows the text might mend it."""
    return error.msg.startswith("Unterminated") or error.pos > len(text) - 16


def _csv_rows(lines: Iterable[tuple[int, bytes]], dialect: str) -> Iterator[tuple[int, Any]]:
    """The rows by the lines that they end at; a broken quote is a ValueError."""
    csv.field_size_limit(sys.maxsize)
    reader = csv.DictReader((_decoded(*line) for line in lines), dialect=dialect, strict=True)
    names = reader.fieldnames or ()
    try:
        for row in reader:
            yield reader.line_num, {name: row[name] for name in names}
    except csv.Error as error:
        raise ValueError(f"after line {reader.line_num}: {error}") from None


def _decoded(number: int, line: bytes) -> str:
    try:
        return line.decode()
    except UnicodeDecodeError as error:
        what = f"line {number}: byte {error.start} of it is not UTF-8"
        raise ValueError(f"{what}; convert the file to UTF-8") from None


def parquet_rows(file: BinaryIO, config: DataConfig) -> Iterator[dict[str, Any]]:
    """The rows, read in this thread and only the text of them.

    `datasets` would leave Parquet files to Arrow's threads. They read on after the last document
    that is asked for, and a Python that ends meanwhile aborts or hangs (apache/arrow#45214).
    """
    import pyarrow.parquet

    parquet, field = pyarrow.parquet.ParquetFile(file, pre_buffer=False), config.text_field
    columns = [field] if field in parquet.schema_arrow.names else None
    for batch in parquet.iter_batches(_BATCH_ROWS, columns=columns, use_threads=False):
        yield from batch.to_pylist()


def _arrow_rows(file: BinaryIO, config: DataConfig) -> Iterator[dict[str, Any]]:
    """The rows of Arrow's file format or of its stream, which `datasets` writes."""
    import pyarrow

    is_file = file.read(6) == b"ARROW1"
    file.seek(0)
    reader = pyarrow.ipc.open_file(file) if is_file else pyarrow.ipc.open_stream(file)
    indices = range(reader.num_record_batches) if is_file else itertools.count()
    for index in indices:
        try:
            batch = reader.get_batch(index) if is_file else reader.read_next_batch()
        except StopIteration:
            return
        if config.text_field in batch.schema.names:
            batch = batch.select([config.text_field])
        for start in range(0, batch.num_rows, _BATCH_ROWS):
            yield from batch.slice(start, _BATCH_ROWS).to_pylist()


# ---- tokens -------------------------------------------------------------------------------------


def tokens_of(path: Path) -> np.ndarray:
    """The tokens_T of a .npy, of nanoGPT's .bin (uint16 alone), of llm.c's (behind a header).

    Raises:
      ValueError: the file is not what it should be.
    """
    if path.suffix.lower() == ".npy":
        array = np.load(path, mmap_mode="r", allow_pickle=False)
        if array.ndim != 1 or array.dtype.kind not in "iu":
            raise ValueError(f"holds {array.dtype}{list(array.shape)}, no list of whole numbers")
        return array
    size = path.stat().st_size
    header = np.fromfile(path, "<i4", 3)
    if size >= _HEADER and int(header[0]) in _LLM_C:
        dtype, n_tokens = np.dtype(_LLM_C[int(header[0])]), int(header[2])
        if size != _HEADER + n_tokens * dtype.itemsize:
            raise ValueError(f"is cut: its header says {n_tokens:,} tokens")
        return np.memmap(path, dtype, "r", _HEADER)
    if size % 2:
        raise ValueError("has an odd number of bytes, and no header: tokens take two each")
    return np.memmap(path, "<u2", "r")


def chunks(tokens_T: np.ndarray) -> Iterator[np.ndarray]:
    """The tokens in parts that fit into any memory."""
    for start in range(0, len(tokens_T), _CHUNK):
        yield tokens_T[start : start + _CHUNK]


TOKENS = (".bin", ".npy")
