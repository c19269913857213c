"""How heterogeneous a tokenized corpus is, in figures that set a book and the web side by side.

Course lesson 018 blames the loss of Model 5 on heterogeneous data, among other things.
"""

import math

import numpy as np
import tiktoken

from jax_model5.corpus import Corpus

CHUNK = 256
"""Length of the pieces whose unigrams are compared: one training window of Model 5 [tokens]."""


def statistics(corpus: Corpus, encoding: tiktoken.Encoding) -> dict[str, float]:
    """Size, predictability, coverage and spread of a corpus, flat. A second per million tokens.

    - documents, tokens, unique_tokens, and quartiles of the tokens per document.
    - NAME_nll: cross-entropy [nats/token] of the test part under n-gram counts of the training
      part (`kneser_ney`); each order predicts every test token.
    - NAME_seen: share of the test part's n-grams that the training part holds; type_seen: the same
      of its distinct tokens.
    - divergence, divergence_shuffled: see `divergences`.

    Like the windows that a model trains on, an n-gram may span two documents. Counts grow with the
    text: compare two corpora at equal numbers of tokens.
    """
    tokens_T, V = corpus.tokens_T.astype(np.int64), encoding.n_vocab
    train_T, test_T = np.split(tokens_T, [corpus.n_train])
    documents = split_documents(tokens_T, tokens_T, encoding.eot_token)
    figures = {
        "documents": len(documents),
        "tokens": len(tokens_T),
        "unique_tokens": len(np.unique(tokens_T)),
        **_quartiles("document_tokens", np.array([len(document) for document in documents])),
        "type_seen": float(np.isin(np.unique(test_T), train_T).mean()),
    }
    for order, name in enumerate(("unigram", "bigram", "trigram"), 1):
        seen_N = ngrams(train_T, order, V)
        asked_M = ngrams(tokens_T[corpus.n_train - (order - 1) :], order, V)
        figures[f"{name}_nll"] = float(-np.log(kneser_ney(seen_N, asked_M, order, V)).mean())
        figures[f"{name}_seen"] = float(np.isin(asked_M, seen_N).mean())
    return figures | divergences(documents, CHUNK, V)


def split_documents(
    values_T: np.ndarray, tokens_T: np.ndarray, end_of_text: int
) -> list[np.ndarray]:
    """The values of each document, one for each of its tokens; the last is its end of text's.

    Raises ValueError where the values are not as many as the tokens.
    """
    if len(values_T) != len(tokens_T):
        raise ValueError(f"{len(values_T)} values of {len(tokens_T)} tokens")
    parts = np.split(values_T, np.flatnonzero(tokens_T == end_of_text) + 1)
    return [part for part in parts if len(part)]


def _quartiles(name: str, values: np.ndarray) -> dict[str, float]:
    names = (f"{name}_q25", f"{name}_median", f"{name}_q75")
    return dict(zip(names, np.percentile(values, [25, 50, 75]).tolist(), strict=True))


# ---- predictability -----------------------------------------------------------------------------


def ngrams(tokens_T: np.ndarray, order: int, V: int) -> np.ndarray:
    """Each run of `order` tokens as one int64, its digits in base V; needs V**order < 2**63."""
    windows_NxO = np.lib.stride_tricks.sliding_window_view(tokens_T, order)
    return windows_NxO @ V ** np.arange(order - 1, -1, -1, dtype=np.int64)


def kneser_ney(seen_N: np.ndarray, asked_M: np.ndarray, order: int, V: int) -> np.ndarray:
    """P(last token | those before it) of each n-gram asked, from the n-grams seen.

    Interpolated Kneser-Ney (Chen & Goodman 1998): P(w|h) = (max(c(hw) - d, 0) + d t(h) P(w|h'))
    / c(h), with t(h) the distinct tokens seen after h, h' one token shorter, and 1/V below the
    unigram. Below the highest order c counts the distinct n-grams that end so. Each order has one
    discount, d = (n1 + 1) / (n1 + 2 n2 + 2) from the n-grams seen once and twice: the estimate
    n1 / (n1 + 2 n2) of Ney, Essen & Kneser 1994, kept above 0 and below 1. Its sum over the V
    tokens is 1.
    """
    if order == 0:
        return np.full(len(asked_M), 1 / V)
    types, counts = np.unique(seen_N, return_counts=True)
    base = V ** (order - 1)
    lower_M = kneser_ney(types % base, asked_M % base, order - 1, V)
    n1, n2 = (counts == 1).sum(), (counts == 2).sum()
    discount = (n1 + 1) / (n1 + 2 * n2 + 2)
    contexts, first, n_types = np.unique(types // V, return_index=True, return_counts=True)
    count_M = _look_up(types, counts, asked_M)
    total_M = _look_up(contexts, np.add.reduceat(counts, first), asked_M // V)
    kept_M = np.maximum(count_M - discount, 0)
    given_M = discount * _look_up(contexts, n_types, asked_M // V)
    return np.where(total_M > 0, (kept_M + given_M * lower_M) / np.maximum(total_M, 1), lower_M)


def _look_up(keys_N: np.ndarray, values_N: np.ndarray, asked_M: np.ndarray) -> np.ndarray:
    """The value of each key asked, 0 where there is none; the keys are sorted."""
    places_M = np.searchsorted(keys_N, asked_M).clip(max=len(keys_N) - 1)
    return np.where(keys_N[places_M] == asked_M, values_N[places_M], 0)


# ---- spread -------------------------------------------------------------------------------------


def divergences(documents: list[np.ndarray], chunk: int, V: int) -> dict[str, float]:
    """How far the unigrams of a piece of a document are from those of all pieces [nats].

    Each document is cut into pieces of `chunk` tokens (its rest is left out), so that all are
    samples of one size. Even pieces of one text differ by chance: divergence_shuffled is the
    figure of the same tokens in random order, and what divergence has above it is heterogeneity.
    Both are nan where no document is long enough.
    """
    pieces = [doc[: len(doc) // chunk * chunk].reshape(-1, chunk) for doc in documents]
    chunks_KxC = np.concatenate(pieces)
    shuffled = np.random.default_rng(0).permutation(chunks_KxC.ravel()).reshape(chunks_KxC.shape)
    return {
        "divergence": jensen_shannon(chunks_KxC, V),
        "divergence_shuffled": jensen_shannon(shuffled, V),
    }


def jensen_shannon(chunks_KxC: np.ndarray, V: int) -> float:
    """Mean divergence of each row's unigrams from those of all rows (Lin 1991) [nats, 0 to ln 2].

    Two rows without a common token: 3/4 ln(4/3) of each, as by hand.

    >>> round(jensen_shannon(np.array([[0, 0], [1, 1]]), V=2) / math.log(4 / 3), 6)
    0.75
    """
    K, C = chunks_KxC.shape
    if K == 0:
        return math.nan
    q_V = np.bincount(chunks_KxC.ravel(), minlength=V) / (K * C)
    keys, counts = np.unique(np.arange(K)[:, None] * V + chunks_KxC, return_counts=True)
    p_N, q_N = counts / C, q_V[keys % V]
    m_N = (p_N + q_N) / 2
    held = (p_N * np.log(p_N / m_N) + q_N * np.log(q_N / m_N)).sum()
    lacked = (K - q_N.sum()) * math.log(2)  # m is q / 2 where the row has no such token
    return float(held + lacked) / (2 * K)


def document_means(nll_T: np.ndarray, tokens_T: np.ndarray, end_of_text: int) -> np.ndarray:
    """means_D, the mean NLL of each document, from the NLL of each token [nats/token]."""
    return np.array([doc.mean() for doc in split_documents(nll_T, tokens_T, end_of_text)])


def document_spread(nll_T: np.ndarray, tokens_T: np.ndarray, end_of_text: int) -> dict[str, float]:
    """How a model's NLL differs between documents, from the NLL of each token [nats/token].

    - document_nll_q25, _median, _q75, _std: of the documents' means.
    - between_share: variance between documents as a share of all variance, both as components of
      a one-way random-effects model (Searle, Casella & McCulloch 1992, section 3.6), so that short
      documents do not raise it; about 0, negative too, where documents do not differ. nan for one
      document.
    """
    means_D = document_means(nll_T, tokens_T, end_of_text)
    sizes_D = np.array([len(doc) for doc in split_documents(nll_T, tokens_T, end_of_text)])
    D, T = len(means_D), len(nll_T)
    with np.errstate(invalid="ignore", divide="ignore"):
        within = ((nll_T - np.repeat(means_D, sizes_D)) ** 2).sum() / np.float64(T - D)
        between = (sizes_D * (means_D - nll_T.mean()) ** 2).sum() / (D - 1)
        size = (T - (sizes_D**2).sum() / T) / (D - 1)
        component = (between - within) / size
        share = component / (component + within)
    return {
        "nll_documents": D,
        **_quartiles("document_nll", means_D),
        "document_nll_std": float(means_D.std()),
        "between_share": float(share),
    }
