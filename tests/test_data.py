"""Tokenizer, corpus cache, split and samplers."""

import dataclasses
import json
import mmap
import re
import signal
import time
from pathlib import Path

import numpy as np
import pytest

from jax_model5 import batches, corpus, disk, tokenizer
from jax_model5.config import DataConfig, TrainConfig
from tests.tiny import TEXT, start, tiny


@pytest.fixture
def config(tmp_path, text_file):
    return tiny(tmp_path, text_file)


def test_gpt2_tokens_are_openais():
    gpt2 = tokenizer.load("gpt2")
    assert (gpt2.n_vocab, gpt2.eot_token) == (50257, 50256)
    assert gpt2.encode_ordinary("Hello world") == [15496, 995]
    # A text that merely spells the marker does not end a document.
    assert gpt2.eot_token not in gpt2.encode_ordinary(tokenizer.END_OF_TEXT)


@pytest.mark.parametrize("name", ["gpt2", "bytes"])
def test_text_survives_encoding(name):
    text = "naïve 日本\r\n  spaces\t and ünïcode \U0001f600"
    encoding = tokenizer.load(name)
    assert encoding.decode(encoding.encode_ordinary(text)) == text


def test_pydocs_has_the_size_that_the_docs_state(tmp_path):
    config = TrainConfig(data=DataConfig(cache_dir=str(tmp_path)))
    tokens = corpus.load_corpus(config)
    assert 120_000 < tokens.manifest["tokens"] < 170_000  # 139,016 on Python 3.11
    assert tokens.manifest["documents"] > 70


def test_documents_are_joined_with_end_of_text(tmp_path):
    rows = [{"text": "first"}, {"text": "sécond\r\n"}, {"text": "third"}]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    config = tiny(tmp_path, tmp_path / "rows.json")
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, seq_len=1))
    tokens = corpus.load_corpus(config)
    joined = b"first\x00s\xc3\xa9cond\r\n\x00third\x00"
    expected = [256 if byte == 0 else byte for byte in joined]
    raw = tokenizer.load("bytes").decode_bytes(tokens.tokens_T.tolist())
    assert raw == joined.replace(b"\x00", b"<|endoftext|>")
    assert len(tokens.tokens_T) == len(expected)
    counts = tokens.manifest
    assert (counts["documents"], counts["tokens"]) == (3, len(expected))
    assert counts["unique_tokens"] == len(set(tokens.tokens_T.tolist()))


def test_without_a_separator_documents_are_joined_by_nothing(tmp_path):
    """As the course joins them: encoded one by one, no end of text between them."""
    (tmp_path / "rows.json").write_text(json.dumps([{"text": "first"}, {"text": "second"}]))
    config = tiny(tmp_path, tmp_path / "rows.json")
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, seq_len=1))
    plain = dataclasses.replace(config, data=dataclasses.replace(config.data, separator="none"))
    joined = corpus.load_corpus(plain)
    assert bytes(joined.tokens_T.tolist()) == b"firstsecond"
    assert joined.manifest["separator"] == "none"
    assert (joined.manifest["documents"], joined.manifest["tokens"]) == (2, 11)
    assert corpus.load_corpus(config).manifest["tokens"] == 13  # another corpus of the same source


@pytest.mark.parametrize("suffix", ["jsonl", "json", "parquet", "folder", "[1]*.jsonl"])
def test_every_kind_of_file_gives_the_same_documents(tmp_path, suffix):
    import pandas

    texts = [f"text {i} ünïcode" for i in range(7)]
    frame = pandas.DataFrame({"id": range(7), "body": texts})
    path = tmp_path / f"rows.{suffix}"
    if suffix.endswith("jsonl"):
        frame.to_json(path, orient="records", lines=True, force_ascii=False)
    elif suffix == "json":
        frame.to_json(path, orient="records")
    elif suffix == "parquet":
        frame.to_parquet(path)
    else:
        path.mkdir()
        frame[:3].to_parquet(path / "a.parquet")
        frame[3:].to_json(path / "b.jsonl", orient="records", lines=True)
    config = DataConfig(source=str(path), text_field="body", n_docs=6)
    assert list(corpus.documents(config)) == texts[:6]


def test_crlf_is_kept(tmp_path):
    (tmp_path / "book.txt").write_bytes(b"one\r\ntwo\r\n")
    assert list(corpus.documents(DataConfig(source=str(tmp_path / "book.txt")))) == [
        "one\r\ntwo\r\n"
    ]


def test_a_second_run_does_not_tokenize_again(config, monkeypatch):
    first = corpus.load_corpus(config)
    monkeypatch.setattr(corpus, "_build", None)
    assert corpus.load_corpus(config).fingerprint == first.fingerprint


def test_a_changed_file_is_tokenized_again(tmp_path, config):
    path = tmp_path / "own.txt"
    path.write_text(TEXT)
    config = tiny(tmp_path, path)
    before = corpus.load_corpus(config).fingerprint
    path.write_text(TEXT + "more")
    assert corpus.load_corpus(config).fingerprint != before


@pytest.mark.parametrize("damage", ["flip a byte", "cut the tokens", "cut the manifest", "no file"])
def test_a_damaged_cache_is_announced_and_rebuilt(config, damage, capsys):
    whole = corpus.load_corpus(config)
    tokens_T = np.array(whole.tokens_T)
    folder = next(Path(config.data.cache_dir).glob("text-*"))
    tokens, manifest = folder / "tokens.bin", folder / "manifest.json"
    content = bytearray(tokens.read_bytes())
    if damage == "flip a byte":
        content[1000] ^= 1
        tokens.write_bytes(content)
    elif damage == "cut the tokens":
        tokens.write_bytes(content[:-7])
    elif damage == "cut the manifest":
        manifest.write_text(manifest.read_text()[:50])
    else:
        tokens.unlink()
    capsys.readouterr()
    rebuilt = corpus.load_corpus(config)
    assert "damaged" in capsys.readouterr().err
    assert rebuilt.fingerprint == whole.fingerprint
    assert np.array_equal(rebuilt.tokens_T, tokens_T)


def test_a_kill_while_tokenizing_leaves_no_half_corpus(tmp_path):
    source, cache = tmp_path / "docs.jsonl", tmp_path / "cache"
    source.write_text("".join(json.dumps({"text": TEXT[:3000]}) + "\n" for _ in range(20_000)))
    args = ["--data.source", source, "--data.cache_dir", cache, "--workdir", tmp_path / "run"]
    process = start(*args, "--steps", "1")
    deadline = time.monotonic() + 60
    while not any(path.stat().st_size for path in cache.glob(".*.building/tokens.bin")):
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert [path for path in cache.glob("*") if path.name != "xla"] == list(
        cache.glob(".*.building")
    )


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="only Linux tells")
def test_ten_billion_tokens_are_opened_and_sampled_where_they_lie(config):
    """A file of 20 GB, all hole: not read at the start, and nothing ahead of a window."""
    corpus.load_corpus(config)
    (path,) = Path(config.data.cache_dir).glob("*/tokens.bin")
    with path.open("r+b") as file:
        file.truncate(2 * 10**10)
    manifest = json.loads((path.parent / "manifest.json").read_text())
    manifest |= {"tokens": 10**10, "written": path.stat().st_mtime_ns}
    manifest = disk.sealed({name: value for name, value in manifest.items() if name != disk._SEAL})
    (path.parent / "manifest.json").write_text(json.dumps(manifest))
    large = corpus.load_corpus(config)
    assert large.n_train == 8 * 10**9
    for step in range(20):
        batches.train_batch(large, config, step)
    *_, mapping = Path("/proc/self/smaps").read_text().split(str(path))
    resident = 1024 * int(re.search(r"Rss: +(\d+)", mapping)[1])
    assert resident < 200 * mmap.PAGESIZE  # of 80 windows two pages each
    assert " rr" in re.search("VmFlags:(.*)", mapping)[1]


# ---- split and samplers -------------------------------------------------------------------------


def numbered(config: TrainConfig, n_tokens: int = 1000) -> corpus.Corpus:
    """A corpus whose token t is t, so that a window shows where it was cut."""
    manifest = {"tokens_sha256": "numbered"}
    return corpus._split(np.arange(n_tokens, dtype=np.uint16), manifest, config)


def test_training_never_sees_the_test_split(config):
    tokens = numbered(config)
    assert tokens.n_train == 800
    for sampling in ("random", "epoch"):
        sampled = dataclasses.replace(
            config, data=dataclasses.replace(config.data, sampling=sampling)
        )
        drawn = np.concatenate([batches.train_batch(tokens, sampled, k) for k in range(500)])
        assert drawn.max() <= 799
        assert (np.diff(drawn, axis=1) == 1).all()
        assert drawn.shape[1] == config.model.seq_len + 1
    assert drawn.min() == 0
    tests = batches.test_batches(tokens, config)
    assert tests.shape == (2, 4, 17)
    assert tests.min() == 800
    assert tests.max() == 999


def test_random_starts_are_uniform_and_reach_both_ends(config):
    tokens = numbered(config)
    starts = np.concatenate([batches.train_batch(tokens, config, k)[:, 0] for k in range(20_000)])
    n_starts = 800 - 16
    assert (starts.min(), starts.max()) == (0, n_starts - 1)
    counts = np.bincount(starts, minlength=n_starts)
    expected = len(starts) / n_starts
    chi2 = ((counts - expected) ** 2 / expected).sum()
    assert abs(chi2 - n_starts) < 5 * np.sqrt(2 * n_starts)


def test_an_epoch_visits_each_window_once(config):
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, sampling="epoch"))
    tokens = numbered(config, n_tokens=816)
    n_windows = (tokens.n_train - 1) // 16
    assert n_windows % 4 == 0
    steps = n_windows // 4
    epochs = [
        np.concatenate(
            [batches.train_batch(tokens, config, e * steps + k)[:, 0] for k in range(steps)]
        )
        for e in range(2)
    ]
    for starts in epochs:
        assert sorted(starts) == [16 * i for i in range(n_windows)]
    assert not np.array_equal(*epochs)


def test_a_batch_is_a_function_of_seed_and_step(config):
    tokens = numbered(config)
    other_seed = dataclasses.replace(config, seed=1)
    assert np.array_equal(
        batches.train_batch(tokens, config, 3), batches.train_batch(tokens, config, 3)
    )
    assert not np.array_equal(
        batches.train_batch(tokens, config, 3), batches.train_batch(tokens, config, 4)
    )
    assert not np.array_equal(
        batches.train_batch(tokens, config, 3), batches.train_batch(tokens, other_seed, 3)
    )
    assert np.array_equal(
        batches.test_batches(tokens, config), batches.test_batches(tokens, other_seed)
    )
