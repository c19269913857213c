"""`source=fineweb`, streamed by the real libraries from a hub on loopback that fails on demand."""

import io
import json
import os
import re
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from jax_model5.config import DataConfig, ModelConfig, TrainConfig
from tests.fake_hub import FakeHub
from tests.tiny import ROOT

README = """---
configs:
- config_name: default
  data_files:
  - split: train
    path: data/*/*
- config_name: sample-10BT
  data_files:
  - split: train
    path: sample/10BT/*
---
"""
FIRST, SECOND = "sample/10BT/000_00000.parquet", "sample/10BT/001_00000.parquet"
GROUP = 10  # rows of a Parquet row group; 3 groups a file
N_DOCS = 55  # crosses from the first file into the last group of the second
TEXTS = [f"Document {i}: naïve text\nin two lines, with {i * i} words. 日本" for i in range(60)]

# Runs in a process of its own, since HF_ENDPOINT is read when `datasets` is imported.
CHILD = """
import json, os, socket, sys, time

sleep, look_up = time.sleep, socket.getaddrinfo
time.sleep = lambda seconds: sleep(min(seconds, 0.01))  # before each retry, ours and theirs

def loopback_only(host, *args, **kwargs):
    if host != "127.0.0.1":  # the library also counts downloads and asks for a Parquet export
        raise socket.gaierror("no network in this test")
    return look_up(host, *args, **kwargs)

socket.getaddrinfo = loopback_only

from jax_model5 import corpus, hub, readers
from jax_model5.config import *
from jax_model5.errors import UserError

readers._BATCH_ROWS = 10  # several batches a file
exec(sys.argv[1])
try:
    result = eval(sys.argv[2])
except UserError as error:
    result = {"error": str(error)}
print(json.dumps(result), flush=True)
"""


def _parquet(rows: range, texts: list[str], padding: int = 0) -> bytes:
    """FineWeb's nine columns. `padding` makes every row group that much larger [bytes]."""
    n = len(rows)
    columns = {
        "text": texts,
        "id": [f"<urn:uuid:{i}>" for i in rows],
        "dump": ["CC-MAIN-2024-10"] * n,
        "url": [f"https://example.org/{i}?{'x' * padding * (i % GROUP == 0)}" for i in rows],
        "date": ["2024-01-01T00:00:00Z"] * n,
        "file_path": ["s3://commoncrawl/warc.gz"] * n,
        "language": ["en"] * n,
        "language_score": [0.9] * n,
        "token_count": [len(text) for text in texts],
    }
    file = io.BytesIO()
    pyarrow.parquet.write_table(
        pyarrow.table(columns), file, GROUP, compression="none", use_dictionary=False
    )
    return file.getvalue()


@pytest.fixture(scope="module")
def files() -> dict[str, bytes]:
    return {
        "README.md": README.encode(),
        "data/CC-MAIN-2024-10/000_00000.parquet": _parquet(range(1), ["of another config"]),
        FIRST: _parquet(range(30), TEXTS[:30]),
        # One request fetches row groups up to 32 MiB together: 17 MiB makes it one request each.
        SECOND: _parquet(range(30, 60), TEXTS[30:], padding=17 * 2**20),
    }


@pytest.fixture
def hub(files: dict[str, bytes]) -> Iterator[FakeHub]:
    with FakeHub("HuggingFaceFW/fineweb", files) as running:
        yield running


@pytest.fixture
def evaluate(tmp_path: Path) -> Callable[..., Any]:
    """Evaluates an expression over `jax_model5` in a process that knows no hub but `url`."""

    def run(url: str, expression: str, before: str = "", **environment: str) -> Any:
        inherited = {
            name: value
            for name, value in os.environ.items()
            if not name.lower().endswith("_proxy") and not name.startswith("HF_")
        }
        process = subprocess.run(
            [sys.executable, "-c", CHILD, before, expression],
            env=inherited
            | {"HF_ENDPOINT": url, "HF_HOME": str(tmp_path / "hf"), "PYTHONPATH": str(ROOT)}
            | environment,
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=20,
        )
        assert process.returncode == 0, process.stderr
        return json.loads(process.stdout.splitlines()[-1])

    return run


def _documents(**settings: Any) -> str:
    config = DataConfig(**{"source": "fineweb", "n_docs": N_DOCS} | settings)
    return f"list(corpus.documents({config!r}))"


def _one_line(result: Any) -> str:
    assert set(result) == {"error"}
    assert "\n" not in result["error"]
    return result["error"]


def test_documents_in_order_across_files(hub: FakeHub, evaluate: Callable[..., Any]) -> None:
    assert evaluate(hub.url, _documents()) == TEXTS[:N_DOCS]


def test_another_subset_is_another_config(hub: FakeHub, evaluate: Callable[..., Any]) -> None:
    """The course reads the data set's own first files, `default`; a plain `fineweb` does not."""
    assert evaluate(hub.url, _documents(subset="default")) == ["of another config"]
    same = {"source": "hf:HuggingFaceFW/fineweb", "subset": "sample-10BT"}
    assert evaluate(hub.url, _documents(**same)) == TEXTS[:N_DOCS]
    message = _one_line(evaluate(hub.url, _documents(subset="none-such")))
    assert "none-such" in message


# The hub's client asks for a range of a file up to six times before our retry sees a failure.
OUTAGE = {f"/storage/{SECOND}": ["ok"] * 3 + ["503"] * 6}
# A link that has expired is not asked for again: our retry sees it at once.
TWO_OUTAGES = {f"/storage/{SECOND}": ["ok"] * 3 + ["503"] * 6 + ["403"]}


@pytest.mark.parametrize(
    "outcomes",
    [
        pytest.param({f"/storage/{SECOND}": ["ok", "ok", "cut", "503"]}, id="their retry"),
        pytest.param(OUTAGE, id="our retry"),
        pytest.param(TWO_OUTAGES, id="our retry, twice"),
        pytest.param({"/revision/": ["503"]}, id="our retry, before the first document"),
        pytest.param({"/README.md": ["hang up"]}, id="no answer"),
        pytest.param({"/revision/": ["hang up"]}, id="no answer of the API"),
    ],
)
def test_failures_neither_lose_nor_repeat_documents(
    outcomes: dict[str, list[str]], hub: FakeHub, evaluate: Callable[..., Any]
) -> None:
    hub.outcomes = {piece: list(todo) for piece, todo in outcomes.items()}
    assert evaluate(hub.url, _documents()) == TEXTS[:N_DOCS]
    assert not any(hub.outcomes.values())  # every one of them took place


def test_outage_reaches_our_retry(hub: FakeHub, evaluate: Callable[..., Any]) -> None:
    hub.outcomes = {piece: list(todo) for piece, todo in OUTAGE.items()}
    message = _one_line(evaluate(hub.url, _documents(), before="hub._RETRIES = 0"))
    done = int(re.search(r"after (\d+) documents: .*503", message)[1])
    assert 30 < done < N_DOCS  # inside the second file


def test_without_skip_the_retry_repeats_documents(
    hub: FakeHub, evaluate: Callable[..., Any]
) -> None:
    hub.outcomes = {piece: list(todo) for piece, todo in OUTAGE.items()}
    no_skip = """
import itertools
islice = itertools.islice
itertools.islice = lambda rows, *ends: islice(rows, ends[-1])  # from the first row on
"""
    texts = evaluate(hub.url, _documents(), before=no_skip)
    assert len(texts) == N_DOCS
    assert texts.count(TEXTS[0]) == 2


def test_corpus_counts(hub: FakeHub, evaluate: Callable[..., Any], tmp_path: Path) -> None:
    hub.outcomes = {piece: list(todo) for piece, todo in OUTAGE.items()}
    cache = str(tmp_path / "cache")
    data = DataConfig(source="fineweb", n_docs=N_DOCS, tokenizer="bytes", cache_dir=cache)
    config = TrainConfig(data=data, model=ModelConfig(seq_len=8))
    manifest = evaluate(hub.url, f"corpus.load_corpus({config!r}).manifest")
    contents = [text.encode() for text in TEXTS[:N_DOCS]]
    assert manifest["documents"] == N_DOCS
    assert manifest["tokens"] == sum(map(len, contents)) + N_DOCS  # and one end of text each
    assert manifest["unique_tokens"] == len(set(b"".join(contents))) + 1


def test_nothing_is_written_outside_the_cache(
    hub: FakeHub, evaluate: Callable[..., Any], tmp_path: Path
) -> None:
    """The libraries' own caches are inside ours; where a user's variables name others, there."""
    home = tmp_path / "home"
    home.mkdir(mode=0o500)
    documents = _documents(cache_dir=str(tmp_path / "cache"))
    before = "os.environ.pop('HF_HOME')"
    assert evaluate(hub.url, documents, before, HOME=str(home)) == TEXTS[:N_DOCS]
    assert list(home.rglob("*")) == []
    assert {path.name for path in tmp_path.iterdir()} == {"home", "cache"}
    assert {path.name for path in (tmp_path / "cache").iterdir()} == {"huggingface"}
    assert evaluate(hub.url, documents) == TEXTS[:N_DOCS]
    assert (tmp_path / "hf").is_dir()


@pytest.fixture
def closed_port() -> str:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return f"http://127.0.0.1:{server.getsockname()[1]}"


def _assert_names_the_ways_out(message: str) -> None:
    for words in ("data.source='fineweb'", "network", "offline", "pydocs", ".txt .jsonl .json"):
        assert words in message


@pytest.mark.parametrize("environment", [{}, {"HF_HUB_OFFLINE": "1"}], ids=["down", "offline"])
def test_no_hub_is_one_line(
    environment: dict[str, str], closed_port: str, evaluate: Callable[..., Any]
) -> None:
    _assert_names_the_ways_out(_one_line(evaluate(closed_port, _documents(), **environment)))


def test_no_hub_any_more_is_one_line(
    hub: FakeHub, closed_port: str, evaluate: Callable[..., Any]
) -> None:
    assert evaluate(hub.url, _documents(n_docs=1)) == TEXTS[:1]  # leaves README.md in its cache
    _assert_names_the_ways_out(_one_line(evaluate(closed_port, _documents())))


def test_missing_column_names_the_columns(hub: FakeHub, evaluate: Callable[..., Any]) -> None:
    message = _one_line(evaluate(hub.url, _documents(text_field="body")))
    assert "data.text_field='body'" in message
    columns = "text, id, dump, url, date, file_path, language, language_score, token_count"
    assert f"name one of {columns};" in message


def test_missing_repository_is_one_line(hub: FakeHub, evaluate: Callable[..., Any]) -> None:
    message = _one_line(evaluate(hub.url, _documents(source="hf:owner/none")))
    assert message.startswith("data.source='hf:owner/none'")
    assert "not a public data set" in message


def test_leaving_off_inside_a_file_exits(hub: FakeHub, evaluate: Callable[..., Any]) -> None:
    assert evaluate(hub.url, _documents(n_docs=33)) == TEXTS[:33]
