"""Heterogeneity of a corpus: closed forms, probabilities that sum to 1, leaks and topics seen."""

import collections
import math

import numpy as np
import pytest

from jax_model5 import tokenizer
from jax_model5.compare import heterogeneity as C
from jax_model5.corpus import Corpus, load_corpus
from tests.tiny import TEXT, tiny

BYTES = tokenizer.load("bytes")
END, V = BYTES.eot_token, BYTES.n_vocab


def corpus(tokens, n_train) -> Corpus:
    return Corpus(np.asarray(tokens, np.uint16), n_train, {})


def nll(train_T, test_T, order, n_vocab) -> float:
    seen, asked = (C.ngrams(part, order, n_vocab) for part in (train_T, test_T))
    return -np.log(C.kneser_ney(seen, asked, order, n_vocab)).mean()


# ---- probabilities ------------------------------------------------------------------------------


def plain(grams, asked, n_vocab, fault=""):
    """Interpolated Kneser-Ney once more, from the formula, for one n-gram (a tuple)."""
    if not asked:
        return 1 / n_vocab
    counts = collections.Counter(grams)
    shorter = [gram[1:] for gram in (grams if fault == "counts, no continuations" else counts)]
    lower = plain(shorter, asked[1:], n_vocab, fault)
    after = [gram for gram in counts if gram[:-1] == asked[:-1]]
    if not after:
        return lower
    n1, n2 = (list(counts.values()).count(n) for n in (1, 2))
    d = (n1 + 1) / (n1 + 2 * n2 + 2)
    total = sum(counts[gram] for gram in after)
    given = d * (1 if fault == "one discount for all" else len(after))
    if fault == "nothing given":
        given = 0
    return (max(counts[asked] - d, 0) + given * lower) / total


def small_text():
    """Tokens of V = 6 that leave some unseen, some contexts unseen, and some seen once."""
    p = [0.5, 0.3, 0.12, 0.05, 0.03, 0]
    return np.random.default_rng(0).choice(6, 60, p=p), 6


def sums_to_1(probability, order, n_vocab) -> bool:
    all_grams = np.arange(n_vocab**order)
    sums = probability(all_grams).reshape(-1, n_vocab).sum(1)
    return bool(np.allclose(sums, 1, rtol=0, atol=1e-14))


def tuples(codes, order, n_vocab):
    return [tuple(int(c) // n_vocab**k % n_vocab for k in range(order - 1, -1, -1)) for c in codes]


def probability_of(tokens, order, n_vocab, fault):
    grams = tuples(C.ngrams(tokens, order, n_vocab), order, n_vocab)
    return lambda codes: np.array(
        [plain(grams, asked, n_vocab, fault) for asked in tuples(codes, order, n_vocab)]
    )


@pytest.mark.parametrize("order", [1, 2, 3])
def test_probabilities_sum_to_1_and_are_the_formulas(order):
    tokens, n_vocab = small_text()
    seen, codes = C.ngrams(tokens, order, n_vocab), np.arange(n_vocab**order)
    ours = C.kneser_ney(seen, codes, order, n_vocab)
    assert (ours > 0).all()
    assert sums_to_1(lambda asked: C.kneser_ney(seen, asked, order, n_vocab), order, n_vocab)
    expected = probability_of(tokens, order, n_vocab, "")(codes)
    np.testing.assert_allclose(ours, expected, rtol=1e-13)


@pytest.mark.parametrize("fault", ["nothing given", "one discount for all"])
def test_a_sum_other_than_1_is_seen(fault):
    tokens, n_vocab = small_text()
    assert not sums_to_1(probability_of(tokens, 2, n_vocab, fault), 2, n_vocab)


def test_other_counts_below_the_highest_order_are_seen():
    """They sum to 1 as well: only the formula tells them from Kneser-Ney's."""
    tokens, n_vocab = small_text()
    codes = np.arange(n_vocab**2)
    faulty = probability_of(tokens, 2, n_vocab, "counts, no continuations")
    assert sums_to_1(faulty, 2, n_vocab)
    ours = C.kneser_ney(C.ngrams(tokens, 2, n_vocab), codes, 2, n_vocab)
    assert not np.allclose(ours, faulty(codes), rtol=1e-3)


def test_the_ngrams_of_a_large_vocabulary_stay_apart():
    big = 50257
    codes = C.ngrams(np.array([0, big - 1, big - 1, big - 1]), 3, big)
    assert codes.tolist() == [big**2 - 1, big**3 - 1]


# ---- predictability -----------------------------------------------------------------------------


def test_uniform_tokens_cost_ln_v():
    tokens = np.random.default_rng(0).integers(0, 20, 200_000)
    train, test = np.split(tokens, [180_000])
    for order, above in ((1, 1e-3), (2, 5e-3), (3, 0.05)):
        assert math.log(20) - 1e-3 < nll(train, test, order, 20) < math.log(20) + above


def test_a_markov_chain_costs_its_transition_entropy():
    rng, n_vocab, T = np.random.default_rng(0), 12, 120_000
    p_VxV = rng.dirichlet(np.full(n_vocab, 0.5), n_vocab)
    to_VxV, draws_T, tokens = p_VxV.cumsum(1), rng.random(T), [0]
    for draw in draws_T[1:]:
        tokens.append(min(int(np.searchsorted(to_VxV[tokens[-1]], draw)), n_vocab - 1))
    share_V = np.bincount(tokens, minlength=n_vocab) / T
    entropy = -(share_V[:, None] * p_VxV * np.log(p_VxV)).sum()
    train, test = np.split(np.array(tokens), [T * 9 // 10])
    assert nll(train, test, 2, n_vocab) == pytest.approx(entropy, abs=0.02)
    assert nll(train, test, 3, n_vocab) == pytest.approx(entropy, abs=0.03)
    assert nll(train, test, 1, n_vocab) > entropy + 0.2
    # The figure is the order's own: without the order of the tokens it is not reached.
    assert nll(rng.permutation(train), rng.permutation(test), 2, n_vocab) > entropy + 0.2


def is_honest(trigram_nll: float, n_vocab: int) -> bool:
    """Uniform tokens cannot be predicted, whatever the model: nothing is below ln V."""
    return trigram_nll > math.log(n_vocab) - 0.02


def test_a_leak_of_the_test_part_is_seen():
    train, test = np.split(np.random.default_rng(0).integers(0, V, 40_000), [36_000])
    clean = C.statistics(corpus([*train, *test], 36_000), BYTES)
    assert is_honest(clean["trigram_nll"], V)
    estimation = (V - 1) / (2 * 36_000)  # what counts of a sample cost, to first order
    assert clean["unigram_nll"] == pytest.approx(math.log(V) + estimation, abs=4e-3)
    assert clean["trigram_seen"] < 0.01
    assert not is_honest(nll(np.array([*train, *test]), test, 3, V), V)
    copied = C.statistics(corpus([*train, *test, *test], 40_000), BYTES)
    assert not is_honest(copied["trigram_nll"], V)
    assert copied["trigram_seen"] > 0.999


def test_coverage_by_hand():
    train, test = [1, 2, 3, 1, 2, END], [2, 3, 9, 2, 3, END]
    figures = C.statistics(corpus(train + test, len(train)), BYTES)
    assert figures["unigram_seen"] == 5 / 6  # all but 9
    assert figures["type_seen"] == 3 / 4
    # (end, 2), (2, 3), (3, 9), (9, 2), (2, 3), (3, end): the context reaches into training.
    assert figures["bigram_seen"] == 2 / 6
    assert figures["trigram_seen"] == 0


def test_documents_and_tokens_are_those_of_the_manifest(tmp_path):
    folder = tmp_path / "texts"
    folder.mkdir()
    for n in range(1, 5):
        (folder / f"{n}.txt").write_text(TEXT[: 100 * n - 1])
    built = load_corpus(tiny(tmp_path, folder))
    figures = C.statistics(built, BYTES)
    for name in ("documents", "tokens", "unique_tokens"):
        assert figures[name] == built.manifest[name]
    quartiles = [figures[f"document_tokens_{name}"] for name in ("q25", "median", "q75")]
    assert quartiles == [175, 250, 325]  # of 100, 200, 300, 400
    assert all(isinstance(value, int | float) for value in figures.values())


def test_a_last_document_without_an_end_counts():
    tokens = np.array([5, END, END, 6, 7])
    parts = C.split_documents(np.arange(5), tokens, END)
    assert [part.tolist() for part in parts] == [[0, 1], [2], [3, 4]]
    with pytest.raises(ValueError, match="4 values of 5 tokens"):
        C.split_documents(np.arange(4), tokens, END)


# ---- spread -------------------------------------------------------------------------------------


def test_the_divergence_is_the_definition():
    chunks = np.random.default_rng(0).zipf(1.5, (7, 30)) % 40
    q_V = np.bincount(chunks.ravel(), minlength=40) / chunks.size

    def kl(a, b):
        return sum(x * math.log(x / y) for x, y in zip(a, b, strict=True) if x)

    expected = []
    for chunk in chunks:
        p_V = np.bincount(chunk, minlength=40) / 30
        m_V = (p_V + q_V) / 2
        expected.append(kl(p_V, m_V) / 2 + kl(q_V, m_V) / 2)
    assert C.jensen_shannon(chunks, 40) == pytest.approx(np.mean(expected), rel=1e-12)
    assert C.jensen_shannon(np.tile(np.arange(30), (7, 1)), 40) == pytest.approx(0, abs=1e-15)


def documents_of(rng, sizes, topics):
    """Documents of Zipf-like tokens; each topic has an order of the vocabulary of its own."""
    p_V = 1 / np.arange(1, 201)
    orders = [rng.permutation(200) for _ in range(topics)]
    return [rng.choice(orders[i % topics], size, p=p_V / p_V.sum()) for i, size in enumerate(sizes)]


def excess(documents) -> float:
    """What the divergence has above chance, as a share of chance."""
    figures = C.divergences(documents, 64, 200)
    return figures["divergence"] / figures["divergence_shuffled"] - 1


def test_documents_alike_differ_by_chance_only_and_topics_by_more():
    rng = np.random.default_rng(0)
    assert abs(excess(documents_of(rng, [128] * 300, topics=1))) < 0.01
    assert excess(documents_of(rng, [128] * 300, topics=2)) > 0.1


def test_a_long_document_does_not_win_by_its_length():
    rng = np.random.default_rng(0)
    long, short = (documents_of(rng, [size] * (2**15 // size), topics=1) for size in (4096, 70))
    alike = [C.divergences(documents, 64, 200)["divergence"] for documents in (long, short)]
    assert alike[0] == pytest.approx(alike[1], rel=0.01)
    whole = [C.jensen_shannon(np.array(documents), 200) for documents in (long, short)]
    assert whole[0] < whole[1] / 5  # what whole documents would have said


def test_documents_shorter_than_a_piece_have_no_divergence():
    assert math.isnan(C.divergences([np.arange(5)], 64, 200)["divergence"])


def nll_of_documents(rng, sizes, between_std):
    """NLL of each token, N(its document's level, 1), and the tokens: each document's end."""
    levels = rng.normal(3, between_std, len(sizes))
    tokens = np.concatenate([[*[0] * (size - 1), END] for size in sizes])
    return np.repeat(levels, sizes) + rng.standard_normal(sum(sizes)), tokens


def test_the_share_between_documents_is_the_known_one():
    rng = np.random.default_rng(0)
    nll_T, tokens_T = nll_of_documents(rng, rng.integers(2, 40, 4000), between_std=0.5)
    spread = C.document_spread(nll_T, tokens_T, END)
    assert spread["nll_documents"] == 4000
    assert spread["between_share"] == pytest.approx(0.25 / 1.25, abs=0.015)
    assert spread["document_nll_median"] == pytest.approx(3, abs=0.05)


def test_short_documents_do_not_make_a_share():
    rng = np.random.default_rng(0)
    nll_T, tokens_T = nll_of_documents(rng, np.full(4000, 3), between_std=0)
    assert abs(C.document_spread(nll_T, tokens_T, END)["between_share"]) < 0.02
    means_D = C.document_means(nll_T, tokens_T, END)
    assert means_D.var() / nll_T.var() > 0.3  # what the plain share of the variance would be


def test_the_spread_by_hand():
    tokens_T = np.array([7, END, 7, 7, END, END])
    nll_T = np.array([1.0, 3, 4, 5, 6, 9])
    assert C.document_means(nll_T, tokens_T, END).tolist() == [2, 5, 9]
    spread = C.document_spread(nll_T, tokens_T, END)
    assert [spread[f"document_nll_{name}"] for name in ("q25", "median", "q75")] == [3.5, 5, 7]
    assert spread["document_nll_std"] == pytest.approx(math.sqrt(74) / 3)
    within, between = 4 / 3, (2 * (2 - 14 / 3) ** 2 + 3 / 9 + (9 - 14 / 3) ** 2) / 2
    component = (between - within) / ((6 - 14 / 6) / 2)
    assert spread["between_share"] == pytest.approx(component / (component + within))


def test_one_document_has_no_share_between():
    spread = C.document_spread(np.arange(4.0), np.array([1, 2, 3, END]), END)
    assert math.isnan(spread["between_share"])
    assert spread["document_nll_std"] == 0
