"""Data sets of the Hugging Face hub, streamed -> the parts of their documents."""

import contextlib
import itertools
import os
import re
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

from jax_model5.config import DataConfig
from jax_model5.errors import UserError
from jax_model5.readers import Found, Part, parquet_rows, parts, texts

FINEWEB, FINEWEB_SUBSET, FINEWEB_DOCS = "HuggingFaceFW/fineweb", "sample-10BT", 1000
_RETRIES = 4


def fineweb(config: DataConfig, found: Found) -> Iterator[Part]:
    return parts(hub_texts(FINEWEB, config.subset or FINEWEB_SUBSET, config, found))


def hub_texts(
    repository: str, subset: str | None, config: DataConfig, found: Found
) -> Iterator[str]:
    """The documents of a data set's training split.

    Raises:
      UserError: no such data set or column, a row without text, no network.
    """
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repository):
        raise UserError(f"data.source={config.source!r}: write it as hf:OWNER/NAME")
    with _quiet_datasets(config.cache_dir) as datasets:
        rows = _with_retries(datasets, repository, subset, config)
        yield from texts(rows, config.source, "row", config, found)


def _with_retries(
    datasets: ModuleType, repository: str, subset: str | None, config: DataConfig
) -> Iterator[tuple[int, dict[str, Any]]]:
    """The rows by their numbers, gone on with after a failure where they broke off."""
    done = failures = 0
    while True:
        try:
            for row in itertools.islice(_rows(datasets, repository, subset, config), done, None):
                yield done, row
                done, failures = done + 1, 0
            return
        except datasets.exceptions.DatasetNotFoundError:
            reason = f"{repository} is not a public data set of the hub"
            raise UserError(f"data.source={config.source!r}: {reason}") from None
        except (ValueError, datasets.data_files.EmptyDatasetError) as error:
            reason = str(error).split("\n")[0]  # no such config or split, a damaged file
            raise UserError(f"data.source={config.source!r}: not readable: {reason}") from None
        except Exception as error:  # the HTTP client's errors are no OSError
            failures += 1
            # One retry before the first row: the hub's client has retried for 23 s itself.
            if failures > (_RETRIES if done else 1) or datasets.config.HF_HUB_OFFLINE:
                reason = str(error).split("\n")[0] or type(error).__name__
                raise UserError(
                    f"data.source={config.source!r}: cannot be read after {done} documents: "
                    f"{reason}; check the network, or offline, use data.source=pydocs or a path to "
                    ".txt .jsonl .json .parquet files"
                ) from None
            time.sleep(2.0**failures)


def _rows(
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
            yield from parquet_rows(file, config)


@contextlib.contextmanager
def _quiet_datasets(cache_dir: str) -> Iterator[ModuleType]:
    """`datasets` without a word, for what it logs is raised as well; its settings are put back.

    Imported late, because that takes a second that only a first run needs, without the frameworks
    that it would import, and with its own caches inside ours unless its variables name others.
    """
    variables = {f"USE_{framework}": "0" for framework in ("TORCH", "JAX", "TF")}
    if "HF_HOME" not in os.environ:
        cache = Path(cache_dir).expanduser() / "huggingface"
        kinds = ("HUB", "XET", "ASSETS", "DATASETS", "MODULES")
        variables |= {f"HF_{kind}_CACHE": str(cache / kind.lower()) for kind in kinds}
    added = {name: value for name, value in variables.items() if name not in os.environ}
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
