"""Figures of generated text: known answers, real text near the corpus, and each fault seen."""

import math
from pydoc_data.topics import topics

import numpy as np
import pytest

from jax_model5 import tokenizer
from jax_model5.compare import text
from jax_model5.corpus import Corpus

BYTES, GPT2 = tokenizer.load("bytes"), tokenizer.load("gpt2")
END = BYTES.eot_token


def corpus(documents, encoding, test_fraction=0.0) -> Corpus:
    parts = [[*encoding.encode_ordinary(text), encoding.eot_token] for text in documents]
    tokens = np.concatenate(parts).astype(np.uint16)
    return Corpus(tokens, len(tokens) - int(test_fraction * len(tokens)), {})


# ---- known answers ------------------------------------------------------------------------------


def test_spaces_words_and_ends_by_hand():
    known = corpus(["The cat sat.", "on a Mat"], BYTES)  # 22 tokens, 4 of them spaces
    samples = [[*b"the CAT 42 ran", END], [*b"mat's"]]
    figures = text.quality(samples, known, BYTES)
    expected = {
        "tokens": 20,
        "end_of_text_share": 1 / 20,
        "space_share": 3 / 20,
        "space_share_corpus": 4 / 22,
        "space_ratio": (3 / 20) / (4 / 22),
        "words": 5,  # the cat ran mat s
        "word_length": 13 / 5,
        "word_length_corpus": 15 / 6,  # the cat sat on a mat
        # lengths 1, 2, 3: 1/5 0 4/5 against 1/6 1/6 4/6
        "word_length_distance": (1 / 30 + 5 / 30 + 4 / 30) / 2,
        "unseen_word_share": 2 / 5,  # ran, s
    }
    assert {name: figures[name] for name in expected} == pytest.approx(expected)


def test_no_word_spans_the_end_of_a_document_and_its_name_is_none():
    tokens = [*b"one", END, *b"two", 300]  # 300: a model's V may be larger than the tokenizer's
    assert text.words(tokens, BYTES) == ["one", "two"]
    known = corpus(["one", "two"], BYTES)
    assert text.quality([list(b"onetwo endoftext")], known, BYTES)["unseen_word_share"] == 1


def test_words_come_from_the_training_part_only():
    known = corpus(["first", "last"], BYTES)
    held_out = Corpus(known.tokens_T, 6, {})
    sample = [list(b"last")]
    assert text.quality(sample, known, BYTES)["unseen_word_share"] == 0
    assert text.quality(sample, held_out, BYTES)["unseen_word_share"] == 1


def test_distinct_counts_over_all_samples_and_within_each():
    rows = [[1, 2, 1, 2], [1, 2, 3]]
    assert text.distinct(rows, 1) == 3 / 7
    assert text.distinct(rows, 2) == 3 / 5  # (1 2) (2 1) (2 3); no (2 1) from row to row
    assert text.distinct(rows, 3) == 3 / 3
    assert text.distinct([[1, 2], [1, 2]], 2) == 1 / 2


def test_the_longest_repeat_is_the_brute_force():
    rng = np.random.default_rng(0)
    for length in [0, 1, 2, *rng.integers(3, 40, 30)]:
        row = rng.integers(0, 3, length).tolist()
        runs = [(i, j) for j in range(length) for i in range(j)]
        expected = max((n for i, j in runs for n in [_common(row, i, j)]), default=0)
        assert text.longest_repeat(row) == expected


def _common(row, i, j):
    """How many tokens from i on equal those from j on."""
    n = 0
    while j + n < len(row) and row[i + n] == row[j + n]:
        n += 1
    return n


def test_a_repeat_counts_within_one_sample():
    known = corpus(["a"], BYTES)
    figures = text.quality([[1, 2, 3], [1, 2, 3], [5, 5, 5, 6], [9, 9]], known, BYTES)
    assert figures["longest_repeat"] == 2
    assert figures["longest_repeat_mean"] == 3 / 4


@pytest.mark.parametrize(
    "samples", [[], [[]], [list(b"\n\n,,")]], ids=["none", "empty", "wordless"]
)
def test_what_has_nothing_to_count_is_nan(samples):
    figures = text.quality(samples, corpus(["some words"], BYTES), BYTES)
    for name in ("word_length", "word_length_distance", "unseen_word_share"):
        assert math.isnan(figures[name]), name
    assert math.isnan(figures["space_share"]) == (figures["tokens"] == 0)
    assert figures["words"] == 0


# ---- real text ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def real():
    """Python's reference in random order, so that both parts hold all kinds of it."""
    names = np.random.default_rng(0).permutation(sorted(topics)).tolist()
    return corpus([topics[name] for name in names], GPT2, test_fraction=0.25)


def windows(tokens_T):
    starts = np.linspace(0, len(tokens_T) - 256, 32).astype(int)
    return [tokens_T[start : start + 256].tolist() for start in starts]


@pytest.fixture(scope="module")
def held_out(real):
    return windows(real.tokens_T[real.n_train :])


def edited(rows, edit):
    """The rows' text, edited and tokenized again."""
    return [GPT2.encode_ordinary(edit(GPT2.decode(row))) for row in rows]


def departures(figures, reference) -> set[str]:
    """The figures that are not those of text like the reference's."""
    near = {
        "space_ratio": 0.85 < figures["space_ratio"] < 1.15,
        "word_length": abs(figures["word_length"] / figures["word_length_corpus"] - 1) < 0.15,
        "word_length_distance": figures["word_length_distance"] < 0.1,
        "unseen_word_share": figures["unseen_word_share"] < 0.2,
        "longest_repeat_mean": figures["longest_repeat_mean"]
        < 3 * reference["longest_repeat_mean"],
    }
    for n in (1, 2, 3):
        name = f"distinct_{n}"
        near[name] = abs(figures[name] / reference[name] - 1) < 0.3
    return {name for name, is_near in near.items() if not is_near}


FAULTS = {
    "spaces removed": (
        lambda rows: edited(rows, lambda words: words.replace(" ", "")),
        {"space_ratio", "word_length", "word_length_distance", "unseen_word_share"},
    ),
    "a loop": (
        lambda rows: edited(rows, lambda words: " the" * 256),
        {"distinct_1", "distinct_2", "distinct_3", "longest_repeat_mean", "word_length_distance"},
    ),
    "letters shifted": (
        lambda rows: edited(rows, lambda words: words.translate(SHIFT)),
        {"unseen_word_share"},
    ),
}
SHIFT = {ord("a") + k: ord("a") + (k + 1) % 26 for k in range(26)}


def test_real_text_is_near_the_corpus(real, held_out):
    of_test = text.quality(held_out, real, GPT2)
    of_train = text.quality(windows(real.tokens_T[: real.n_train]), real, GPT2)
    assert departures(of_test, of_train) == set()
    assert departures(of_train, of_test) == set()
    assert of_train["unseen_word_share"] < 0.01  # only words that a window cuts
    assert of_train["space_ratio"] == pytest.approx(1, abs=0.1)


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_of_the_text_is_seen(real, held_out, fault):
    spoil, seen_by = FAULTS[fault]
    figures = text.quality(spoil(held_out), real, GPT2)
    assert seen_by <= departures(figures, text.quality(held_out, real, GPT2))
