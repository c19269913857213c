"""The text that people have: what it becomes, and what is said where it cannot be read."""

import bz2
import csv
import gzip
import hashlib
import io
import json
import lzma
import os
import random
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from jax_model5 import corpus, tokenizer
from jax_model5.config import DataConfig, ModelConfig, TrainConfig
from jax_model5.errors import UserError
from tests.tiny import ROOT

TEXTS = [f"Document {i}: naïve text\nin two lines, \t{i * i} “words”. 日本" for i in range(9)]
GPT2 = tokenizer.load("gpt2")


def config_of(source, **data) -> TrainConfig:
    """A config that only opens a corpus: windows of two tokens."""
    cache = str(Path(source).parent / "cache")
    defaults = {"tokenizer": "bytes", "cache_dir": cache, "test_fraction": 0.5}
    return TrainConfig(
        data=DataConfig(source=str(source), **defaults | data), model=ModelConfig(seq_len=1)
    )


def built(source, **data) -> corpus.Corpus:
    return corpus.load_corpus(config_of(source, **data))


def documents(source, **data) -> list[str]:
    return list(corpus.documents(config_of(source, **data).data))


def error(source, **data) -> str:
    """The one line that opening the corpus ends with; nothing stays in the cache."""
    with pytest.raises(UserError) as caught:
        built(source, **data)
    cache = Path(source).parent / "cache"
    assert not cache.exists() or not list(cache.iterdir())
    assert "\n" not in str(caught.value)
    return str(caught.value)


# ---- kinds of files -----------------------------------------------------------------------------


def table_bytes(kind: str, texts=TEXTS) -> bytes:
    """The texts as a file of that kind."""
    table, file = pyarrow.table({"id": range(len(texts)), "text": texts}), io.BytesIO()
    if kind in (".jsonl", ".ndjson"):
        return "".join(json.dumps({"id": 1, "text": text}) + "\n" for text in texts).encode()
    if kind == ".json":
        return json.dumps([{"text": text, "id": [1, {"a": "]"}]} for text in texts]).encode()
    if kind in (".csv", ".tsv"):
        rows = io.StringIO()
        writer = csv.writer(rows, delimiter="\t" if kind == ".tsv" else ",")
        writer.writerows([["id", "text"], *enumerate(texts)])
        return rows.getvalue().encode()
    if kind == ".parquet":
        pyarrow.parquet.write_table(table, file)
    elif kind == ".arrow":
        with pyarrow.ipc.new_stream(file, table.schema) as writer:
            writer.write_table(table, max_chunksize=4)
    elif kind == ".feather as .arrow":
        with pyarrow.ipc.new_file(file, table.schema) as writer:
            writer.write_table(table, max_chunksize=4)
    return file.getvalue()


def zstandard(content: bytes) -> bytes:
    half = len(content) // 2  # two frames, as tools that append write them
    frames = [
        pyarrow.compress(part, "zstd", asbytes=True) for part in (content[:half], content[half:])
    ]
    return b"".join(frames)


PACKED = {
    "": bytes,
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".ZST": zstandard,
}
KINDS = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet", ".arrow", ".feather as .arrow")


@pytest.mark.parametrize("packed", PACKED)
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_table_gives_the_same_documents(tmp_path, kind, packed):
    path = tmp_path / f"rows.v1{kind.split()[-1].upper()}{packed}"
    path.write_bytes(PACKED[packed](table_bytes(kind)))
    assert documents(path) == TEXTS


@pytest.mark.parametrize("packed", PACKED)
@pytest.mark.parametrize("kind", [".txt", ".md", ".py"])
def test_a_text_is_one_document(tmp_path, kind, packed):
    text = "one\r\ntwo\n" + TEXTS[0]
    (tmp_path / f"book{kind}{packed}").write_bytes(PACKED[packed](text.encode()))
    assert documents(tmp_path / f"book{kind}{packed}") == [text]


def test_a_dataset_saved_to_disk(tmp_path):
    import datasets

    data = datasets.Dataset.from_dict({"text": TEXTS})
    shuffled = data.shuffle(seed=3)
    shuffled.save_to_disk(tmp_path / "one", num_shards=2)
    assert documents(tmp_path / "one") == shuffled["text"]
    splits = datasets.DatasetDict({"train": data, "test": data.select([0])})
    splits.save_to_disk(tmp_path / "splits")
    assert documents(tmp_path / "splits") == TEXTS
    splits.pop("train")
    splits.save_to_disk(tmp_path / "no_train")
    assert "the splits test; name the folder of one" in error(tmp_path / "no_train")


def test_a_json_file_may_hold_rows_one_after_the_other(tmp_path):
    path = tmp_path / "rows.json"
    for separator in ("\n", "\n\n", "\r\n"):
        rows = (json.dumps({"text": text}, indent=1) for text in TEXTS)
        path.write_bytes(separator.join(rows).encode())
        assert documents(path) == TEXTS


def test_a_long_row_of_json_goes_over_many_blocks(tmp_path):
    texts = ["short", "long " * 2**20, '[{"text": "brackets"}]', "últ"]
    (tmp_path / "rows.json").write_text(json.dumps([{"text": text} for text in texts], indent=2))
    assert documents(tmp_path / "rows.json") == texts


def test_only_the_text_column_matters(tmp_path):
    """`datasets` casts every column, guesses dates, and refuses a column that appears late."""
    rows = [{"text": "2024-01-01", "a": 1}] * 9 + [{"a": "x", "text": "2", "late": [None]}]
    rows += [{"text": "3", "a": "10", "b": {"c": float("nan")}}]
    path = tmp_path / "rows.jsonl"
    text = "".join(json.dumps(row) + "\n" for row in rows)
    path.write_text(text.replace('"10"', "1" * 5000))
    assert documents(path) == ["2024-01-01"] * 9 + ["2", "3"]
    (tmp_path / "rows.csv").write_text("text,n\n2024-01-01,1\nNA,2\n007,x\n")
    assert documents(tmp_path / "rows.csv") == ["2024-01-01", "NA", "007"]


# ---- folders, globs, several --------------------------------------------------------------------


def test_a_folder_is_read_whole_and_says_what_it_leaves_out(tmp_path, capsys):
    folder = tmp_path / "folder"
    for name in ("a.TXT", "b.md", "sub/c.jsonl.GZ", "sub/deep/d.txt"):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        content = table_bytes(".jsonl", ["in c"]) if "jsonl" in name else f"in {path.stem}".encode()
        path.write_bytes(gzip.compress(content) if name.endswith("GZ") else content)
    for name in (".ipynb_checkpoints/a-checkpoint.txt", ".git/x.txt", "._a.txt", "e.pdf"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("never read")
    (folder / "empty.jsonl").touch()
    (folder / "empty.parquet").touch()
    (folder / "marked.jsonl").write_bytes(b"\xef\xbb\xbf")
    (folder / "empty.txt.gz").write_bytes(gzip.compress(b""))
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere/f.txt").write_text("in f")
    (folder / "z_link").symlink_to(tmp_path / "elsewhere")
    (folder / "z_loop").symlink_to(folder)
    (folder / "z_twice.txt").symlink_to(folder / "b.md")
    expected = ["in a", "in b", "in c", "in d", "in f"]
    assert documents(folder) == expected
    manifest = built(folder).manifest
    assert manifest["documents"] == len(expected)
    err = capsys.readouterr().err
    (line,) = [line for line in err.splitlines() if "not read:" in line]
    for part in (".git (hidden)", "._a.txt (hidden)", "e.pdf (of no known kind)", "; 1 more"):
        assert part in line
    reasons = {Path(name).name: why for name, why in manifest["skipped_files"].items()}
    assert set(reasons) == {
        *(".git", ".ipynb_checkpoints", "._a.txt", "e.pdf", "z_loop", "z_twice.txt")
    }
    assert "the same as" in reasons["z_twice.txt"]


def test_a_folder_that_is_itself_hidden_or_a_link_is_what_was_asked_for(tmp_path):
    (tmp_path / ".hidden").mkdir()
    (tmp_path / ".hidden/a.txt").write_text("a")
    (tmp_path / "link").symlink_to(".hidden")
    assert documents(tmp_path / ".hidden") == documents(tmp_path / "link") == ["a"]
    assert documents(tmp_path / ".hidden/a.txt") == ["a"]


@pytest.mark.parametrize("how", ["{}/.hidden/", "{}/./.hidden", "{}/x/../.hidden"])
def test_a_hidden_folder_that_is_named_is_meant_however_it_is_written(tmp_path, how):
    (tmp_path / ".hidden").mkdir()
    (tmp_path / "x").mkdir()
    (tmp_path / ".hidden/a.txt").write_text("a")
    assert documents(how.format(tmp_path), cache_dir=str(tmp_path / "cache")) == ["a"]


@pytest.mark.parametrize("source", [" ", "{}/a.txt,", ",{}/a.txt"])
def test_a_source_without_a_name_is_not_the_folder_one_is_in(tmp_path, source):
    (tmp_path / "a.txt").write_text("a")
    with pytest.raises(UserError, match="name a file, a folder or a glob"):
        documents(source.format(tmp_path), cache_dir=str(tmp_path / "cache"))


def test_globs_and_several_sources(tmp_path):
    for name in ("b1.txt", "b2.txt", "a.txt", "with, comma.txt"):
        (tmp_path / name).write_text(name)
    (tmp_path / "rows.jsonl").write_bytes(table_bytes(".jsonl"))
    assert documents(f"{tmp_path}/b*.txt") == ["b1.txt", "b2.txt"]
    assert documents(f"{tmp_path}/b*.txt,{tmp_path}/rows.jsonl") == ["b1.txt", "b2.txt", *TEXTS]
    assert documents(tmp_path / "with, comma.txt") == ["with, comma.txt"]
    both = documents(f"{tmp_path}/a.txt,pydocs", n_docs=3)
    assert (both[0], len(both)) == ("a.txt", 3)
    assert "No such file" in error(f"{tmp_path}/c*.txt,{tmp_path}/a.txt")


# ---- rows without text, marks -------------------------------------------------------------------

GOOD = '{"text": "good"}\n'
BAD_ROWS = {
    # kind: (the line, what is said of it)
    "null": ('{"text": null}', "holds no text but None"),
    "number": ('{"text": 5}', "holds no text but 5"),
    "missing": ('{"txet": "a", "id": 1}', "no such column; name one of txet, id"),
    "no object": ('"text"', "is no object with columns"),
    "broken": ("{broken", "is no JSON: Expecting property name"),
    "half a character": ('{"text": "\\ud800"}', "cannot be written as UTF-8"),
}


@pytest.mark.parametrize("kind", BAD_ROWS)
def test_a_row_without_text_is_refused_or_counted(tmp_path, capsys, kind):
    line, reason = BAD_ROWS[kind]
    path = tmp_path / "rows.jsonl"
    path.write_text(GOOD + "\n" + GOOD + line + "\n" + GOOD)  # a blank line counts as a line
    message = error(path)
    assert str(path) in message
    assert "line 4: " in message
    assert message.endswith("; data.skip_bad_rows=true leaves such rows out")
    assert reason in message
    manifest = built(path, skip_bad_rows=True).manifest
    assert (manifest["documents"], manifest["bad_rows"]) == (3, 1)
    assert "left out 1 rows without text" in capsys.readouterr().err


def test_rows_without_text_in_tables(tmp_path):
    texts = ["a", None, "c"]
    pyarrow.parquet.write_table(pyarrow.table({"text": texts}), tmp_path / "rows.parquet")
    assert "row 1: " in error(tmp_path / "rows.parquet")
    assert documents(tmp_path / "rows.parquet", skip_bad_rows=True) == ["a", "c"]
    (tmp_path / "rows.csv").write_text('n,text\n1,"two\nlines"\n2\n3,c\n')
    assert "line 4: " in error(tmp_path / "rows.csv")
    assert documents(tmp_path / "rows.csv", skip_bad_rows=True) == ["two\nlines", "c"]
    (tmp_path / "rows.json").write_text('[{"text": "a"},\n {"text": null},\n {"text": "c"}]')
    assert "line 2: " in error(tmp_path / "rows.json")
    assert documents(tmp_path / "rows.json", skip_bad_rows=True) == ["a", "c"]
    (tmp_path / "none.jsonl").write_text('{"body": "a"}\n' * 3)
    assert "no text but 3 bad rows" in error(tmp_path / "none.jsonl", skip_bad_rows=True)


UNREADABLE = {
    # name: (content, what is said)
    "latin1.txt": ("ab\nnaïve".encode("latin-1"), ["line 2", "byte 5", "UTF-8"]),
    "cut.txt": (("a" * 2**20 + "é").encode()[:-1], ["line 1", f"byte {2**20}", "UTF-8"]),
    "latin1.csv": ("text\nnaïve".encode("latin-1"), ["line 2", "byte 2", "UTF-8"]),
    "quote.csv": (b'text\na\n"never closed\nb\n', ["after line 2", "unexpected end of data"]),
    "cut.json": (b'[{"text": "a"},\n', ["line 2", "inside its list"]),
    "cut_row.json": (b'[{"text": "a"},\n\n {"text": "b', ["line 3", "no JSON"]),
    "late.json": (b'[{"text": "a"}\n, {"text" "b"}]' + b" " * 2**21, ["line 2", "no JSON"]),
    "cut.jsonl.gz": (gzip.compress(table_bytes(".jsonl"))[:-20], ["end-of-stream"]),
    "cut.jsonl.zst": (zstandard(table_bytes(".jsonl"))[:-20], ["Truncated"]),
    "cut.txt.xz": (lzma.compress(b"text" * 99)[:-20], ["end-of-stream"]),
    "no.txt.bz2": (b"no bzip2 at all", ["Invalid data stream"]),
    "no.parquet": (b"PAR1 and nothing", ["not readable as .parquet"]),
    "no.arrow": (b"ARROW1 and nothing", ["not readable as .arrow"]),
    "saved/dataset_dict.json": (b"{", ["not readable as"]),
    "foreign/dataset_dict.json": (b"{}", ["not readable as", "splits"]),
    "model.pickle": (b"", ["not a known kind", ".jsonl", ".npy", ".zst"]),
}


@pytest.mark.parametrize("name", UNREADABLE)
def test_what_cannot_be_read_is_one_line_with_the_place(tmp_path, name):
    content, parts = UNREADABLE[name]
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_bytes(content)
    name = name.split("/")[0]
    message = error(tmp_path / name, skip_bad_rows=True)
    for part in ("data.source=", name, *parts):
        assert part in message


@pytest.mark.parametrize("kind", [".txt", ".jsonl", ".json", ".csv"])
def test_a_byte_order_mark_is_no_token(tmp_path, capsys, kind):
    plain = "text" if kind == ".txt" else table_bytes(kind).decode()
    path = tmp_path / f"a{kind}"
    path.write_bytes(b"\xef\xbb\xbf" + plain.encode())
    assert documents(path) == (["text"] if kind == ".txt" else TEXTS)
    assert built(path).manifest["byte_order_marks"] == 1
    assert "left out 1 byte order marks" in capsys.readouterr().err


MARKED = "one<|endoftext|>\ntwo <|endoftext|><|endoftext|>three"


@pytest.mark.parametrize(
    "text", [MARKED, MARKED + "<|endoftext|>", "<|endoftext|>a b c", "there is no mark"]
)
def test_a_written_end_of_text_splits_on_request(tmp_path, capsys, text, monkeypatch):
    monkeypatch.setattr(tokenizer, "PART", 4)
    path = tmp_path / "a.txt"
    path.write_text(text)
    split = built(path, split_on_end_of_text=True, tokenizer="gpt2").tokens_T.tolist()
    whole = GPT2.encode(text, allowed_special="all")
    assert split == whole if whole[-1] == GPT2.eot_token else [*whole, GPT2.eot_token]
    assert "split_on_end_of_text" not in capsys.readouterr().err
    plain = built(path, tokenizer="gpt2")
    assert plain.tokens_T.tolist() == [*GPT2.encode_ordinary(text), GPT2.eot_token]
    n_marks = text.count("<|endoftext|>")
    assert plain.manifest["end_of_text_marks"] == n_marks
    assert (f"stands in the text {n_marks} times" in capsys.readouterr().err) == (n_marks > 0)


# ---- long texts ---------------------------------------------------------------------------------


@pytest.mark.parametrize("space", [" ", "\n", "\xa0", "\t \r\n", "\u3000"])
@pytest.mark.parametrize("after", ["", "b", " b", "7", "'s"])
def test_long_white_space_has_the_tokens_of_tiktoken(space, after):
    """At a length that tiktoken still does; it ends in a panic above about 900,000."""
    text = "a" + space * (300_000 // len(space)) + after
    assert tokenizer.encode(GPT2, ["x", text, ""]) == [
        GPT2.encode_ordinary("x"),
        GPT2.encode_ordinary(text),
        [],
    ]


@pytest.mark.parametrize("space", [" ", "\n", "\xa0"])
def test_a_million_white_spaces(tmp_path, space):
    """In rows and in texts: what comes before and after has its own tokens."""
    run = space * 1_000_000
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": f"a{run}b"}) + "\n")
    (tmp_path / "a.txt").write_text(f"a{run}b")
    rows = built(tmp_path / "a.jsonl", tokenizer="gpt2").tokens_T
    assert np.array_equal(rows, built(tmp_path / "a.txt", tokenizer="gpt2").tokens_T)
    assert GPT2.decode(rows[:-1].tolist()) == f"a{run}b"


PIECES = ["a", "Z", "é", "日", "7", "²", " ", "  ", "\n", "\t", "\xa0", "\u3000", "'s", "'ll", "'"]
PIECES += ["!", "<|endoftext|>", "<", "|", "\r\n", "\u0301", "Ⅷ", "_", "\U0001f600", "。", "\x1c"]


def some_text(dice: random.Random, n: int) -> str:
    return "".join(dice.choice(PIECES) for _ in range(n))


@pytest.mark.slow
def test_no_cut_changes_a_token(monkeypatch):
    monkeypatch.setattr(tokenizer, "PART", 8)
    dice, n_cuts = random.Random(0), 0
    for _ in range(3000):
        text, size = some_text(dice, dice.randrange(60)), dice.randrange(1, 20)
        blocks = [text[at : at + size] for at in range(0, len(text), size)]
        parts = list(tokenizer.cut(blocks))
        assert "".join(parts) == text
        tokens = [token for ids in tokenizer.encode(GPT2, parts) for token in ids]
        assert tokens == GPT2.encode_ordinary(text), parts
        marks = sum(part.count("<|endoftext|>") for part in parts)
        assert marks == text.count("<|endoftext|>")
        n_cuts += len(parts) - 1
    assert n_cuts > 3000


@pytest.mark.parametrize("cut", [r"(?s:.*).", r"(?s:.*)[ ](?=\S)", r"(?s:.*)\w(?=\w)"])
def test_a_cut_elsewhere_would_change_tokens(monkeypatch, cut):
    monkeypatch.setattr(tokenizer, "_CUTS", (re.compile(cut),))
    with pytest.raises(AssertionError):
        test_no_cut_changes_a_token(monkeypatch)


def test_a_long_text_is_cut(tmp_path):
    """Words, Chinese without a space, and base64: no part is much longer than PART."""
    dice = random.Random(1)
    words = " ".join(some_text(dice, 5) for _ in range(60_000))
    chinese = "".join(dice.choice("日本語中文，。") for _ in range(400_000))
    for text in (words, chinese, "".join(dice.choice("abcXYZ0189+/") for _ in range(400_000))):
        (tmp_path / "a.txt").write_text(text, newline="")
        parts = list(corpus._parts(config_of(tmp_path / "a.txt").data, corpus.Found()))
        assert [is_last for _, is_last in parts] == [False] * (len(parts) - 1) + [True]
        assert "".join(part for part, _ in parts) == text
        assert max(len(part) for part, _ in parts) <= tokenizer.PART


MEMORY = """
import re, resource, sys
from pathlib import Path
from jax_model5 import corpus, tokenizer
from tests.test_text_in import built
if sys.argv[2] == "whole":
    tokenizer.PART = corpus.token_file._BATCH_CHARACTERS = corpus.token_file._BATCH_PARTS = 2**30
def peak():
    # Of this process [MB]; Linux counts the parent's in `ru_maxrss` too.
    status = Path("/proc/self/status")
    if status.exists():
        return int(re.search(r"VmHWM:\\s+(\\d+)", status.read_text())[1]) // 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 2**20
before = peak()
built(sys.argv[1], tokenizer="gpt2")
print(peak() - before)
"""
LINE = " ".join(f"w{i * i % 9973}" for i in range(2000)) + "\n"


def memory(path: Path, how: str) -> int:
    """How much tokenizing adds to a new process's memory at most [MB]."""
    command = [sys.executable, "-c", MEMORY, str(path), how]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return int(done.stdout)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
def test_memory_does_not_grow_with_the_file(tmp_path, name):
    """It is 16 MB; as a whole it takes more than twice as much."""
    path = tmp_path / name
    path.write_text((json.dumps({"text": LINE}) + "\n" if name == "a.jsonl" else LINE) * 1500)
    assert path.stat().st_size > 14e6
    assert memory(path, "in parts") < 200
    shutil.rmtree(tmp_path / "cache")
    assert memory(path, "whole") > 400, "a text that is not cut was not seen"


# ---- tokens -------------------------------------------------------------------------------------


def llm_c(tokens: np.ndarray) -> bytes:
    magic = {"uint16": 20240520, "uint32": 20240801}[tokens.dtype.name]
    header = np.zeros(256, np.int32)
    header[:3] = magic, 1, len(tokens)
    return header.tobytes() + tokens.tobytes()


def npy(tokens: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, tokens)
    return file.getvalue()


TOKEN_FILES = {
    "nanoGPT": ("{}.bin", np.ndarray.tobytes, np.uint16),
    "llm.c": ("tiny_{}_000000.bin", llm_c, np.uint16),
    "llm.c, 32 bits": ("tiny_{}.bin", llm_c, np.uint32),
    "numpy": ("{}.npy", npy, np.int64),
}


@pytest.mark.parametrize("kind", TOKEN_FILES)
def test_files_of_tokens_keep_their_own_split(tmp_path, kind, capsys):
    name, write, dtype = TOKEN_FILES[kind]
    tokens = np.array([5, 7, 256, 9, 11, 256, 12], dtype)
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / name.format("val")).write_bytes(write(tokens[5:]))
    (folder / name.format("train")).write_bytes(write(tokens[:5]))
    (folder / "prepare.py").write_text("nanoGPT keeps it there")
    own = built(folder)
    assert own.tokens_T.tolist() == tokens.tolist()
    assert (own.n_train, own.manifest["test_tokens"], own.manifest["documents"]) == (5, 2, 2)
    assert "prepare.py (text beside tokens)" in capsys.readouterr().err
    alone = built(folder / name.format("train"), test_fraction=0.4)
    assert (alone.tokens_T.tolist(), alone.n_train) == (tokens[:5].tolist(), 3)


BAD_TOKENS = {
    "odd.bin": (b"abc", "odd number of bytes"),
    "cut.bin": (llm_c(np.arange(9, dtype=np.uint16))[:-2], "its header says 9 tokens"),
    "beyond.bin": (np.array([1, 2, 300, 4], np.uint16).tobytes(), "token 2 of it is 300"),
    "negative.npy": (npy(np.array([1, -1])), "token 1 of it is -1"),
    "floats.npy": (npy(np.ones(9)), "no list of whole numbers"),
    "table.npy": (npy(np.ones((2, 2), int)), "no list of whole numbers"),
    "code.npy": (npy(np.array([{}], dtype=object)), "not readable as .npy"),
}


@pytest.mark.parametrize("name", BAD_TOKENS)
def test_what_is_no_file_of_tokens_is_one_line(tmp_path, name):
    content, reason = BAD_TOKENS[name]
    (tmp_path / name).write_bytes(content)
    message = error(tmp_path / name)
    assert name in message
    assert reason in message


# ---- the cache ----------------------------------------------------------------------------------


@pytest.mark.parametrize("field", ["dtype", "tokens", "tokens_sha256", "documents", "written"])
def test_a_manifest_that_was_changed_is_not_believed(tmp_path, capsys, field):
    (tmp_path / "a.txt").write_text("some text " * 20)
    before = built(tmp_path / "a.txt")
    path = next(tmp_path.glob("cache/a-*/manifest.json"))
    fields = json.loads(path.read_text())
    fields[field] = {"dtype": "uint8", "tokens_sha256": "0" * 64}.get(field, 7)
    path.write_text(json.dumps(fields))
    capsys.readouterr()
    again = built(tmp_path / "a.txt")
    assert "damaged: building them again" in capsys.readouterr().err
    assert np.array_equal(before.tokens_T, again.tokens_T)


def test_tokens_are_hashed_once_and_after_a_copy(tmp_path, monkeypatch):
    source = tmp_path / "a.txt"
    source.write_text("some text " * 20)
    tokens_T = built(source).tokens_T
    hashed = []
    sha256 = hashlib.sha256
    monkeypatch.setattr(corpus.hashlib, "sha256", lambda b: hashed.append(len(b)) or sha256(b))
    built(source)
    assert len(tokens_T) not in hashed
    path = next(tmp_path.glob("cache/a-*/tokens.bin"))
    path.write_bytes(path.read_bytes())
    built(source)
    built(source)
    assert hashed.count(len(tokens_T)) == 1


def test_a_long_name_fits_into_a_file_name(tmp_path):
    for name in ("x" * 240 + ".txt", "日" * 80 + ".txt", "-.- .txt", ".a.txt"):
        (tmp_path / name).write_text("some text")
        assert built(tmp_path / name).manifest["tokens"] == 10
    for folder in (tmp_path / "cache").iterdir():
        assert not folder.name.startswith(".")


SMALL = """
import json, os, signal, sys
from jax_model5 import token_file
from jax_model5.errors import one_line_errors
from tests.test_text_in import built
token_file.SAVE_EVERY, token_file._BATCH_PARTS = 1000, 3
if sys.argv[2:]:
    write = token_file._Progress.write
    number = getattr(signal, sys.argv[2])
    token_file._Progress.write = lambda *a: (write(*a), os.kill(os.getpid(), number))
with one_line_errors():
    print(json.dumps(built(sys.argv[1]).manifest))
"""


def in_a_process(source: Path, *signals: str) -> subprocess.CompletedProcess:
    """One that gets the signal, if one is named, each time that it has saved."""
    command = [sys.executable, "-c", SMALL, str(source), *signals]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


@pytest.mark.slow
@pytest.mark.parametrize("change", ["nothing", "text", "tokens", "progress"])
def test_a_kill_while_tokenizing_goes_on_where_it_was(tmp_path, change):
    """Each process is killed once it has saved; the tokens are those of one that was not."""
    source = tmp_path / "rows.jsonl"
    source.write_text("".join(json.dumps({"text": f"{i} " * (i % 90)}) + "\n" for i in range(60)))
    n_kills = 0
    while (done := in_a_process(source, "SIGKILL")).returncode == -signal.SIGKILL:
        n_kills += 1
        (building,) = tmp_path.glob("cache/.rows-*.building")
        if n_kills == 2 and change == "tokens":
            (building / "tokens.bin").write_bytes(b"\0" * 9000)
        elif n_kills == 2 and change == "progress":
            (building / "progress.json").write_text("{")
        elif n_kills == 2 and change == "text":  # with its old time: only its content tells
            times, text = source.stat(), source.read_text()
            source.write_text(text.replace("5 5 5", "7 7 7", 1))
            os.utime(source, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert done.returncode == 0, done.stderr
    assert n_kills == (4 if change == "nothing" else 6)
    (folder,) = tmp_path.glob("cache/*")
    assert {path.name for path in folder.iterdir()} == {"manifest.json", "tokens.bin"}
    tokens = (folder / "tokens.bin").read_bytes()
    shutil.rmtree(folder)
    undisturbed, resumed = json.loads(in_a_process(source).stdout), json.loads(done.stdout)
    assert (folder / "tokens.bin").read_bytes() == tokens
    times_only = {"written", "sha256_of_the_rest"}
    assert {key for key in resumed if resumed[key] != undisturbed[key]} <= times_only


@pytest.mark.slow
def test_a_signal_while_tokenizing_keeps_what_was_saved(tmp_path):
    source = tmp_path / "rows.jsonl"
    source.write_text("".join(json.dumps({"text": f"word {i} " * 40}) + "\n" for i in range(60)))
    saved = []
    for _ in range(2):
        assert in_a_process(source, "SIGTERM").returncode == 128 + signal.SIGTERM
        (progress,) = tmp_path.glob("cache/.rows-*.building/progress.json")
        saved.append(json.loads(progress.read_text())["tokens"])
    assert 0 < saved[0] < saved[1]


@pytest.mark.slow
def test_of_several_processes_one_tokenizes_and_the_others_wait(tmp_path):
    source = tmp_path / "rows.jsonl"
    source.write_text("".join(json.dumps({"text": f"word {i} " * 400}) + "\n" for i in range(300)))
    command = [sys.executable, "-c", SMALL, str(source)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    processes = [subprocess.Popen(command, cwd=ROOT, **pipes) for _ in range(4)]
    ends = [process.communicate() for process in processes]
    assert len({out for out, _ in ends}) == 1, ends
    assert sum("tokenized" in err for _, err in ends) == 1
    assert [path.name[:5] for path in (tmp_path / "cache").iterdir()] == ["rows-"]
