# %% [markdown]
"""
# FineWeb: what its documents and columns hold, beside a book, prose and code

**Question.** What do 1,000 documents of FineWeb hold, and how does the web differ from one book?

**The course** (016) counts about 750 tokens in a document of FineWeb, so about 750,000 in the first
1,000, and about 35,000 different ones.

**Expect** the mean to hold and to mislead: half of the documents are shorter than 400 tokens. At
equal length the web uses nearly twice as many different tokens as a book.

The rows on FineWeb need some of it, which is public. With the package `datasets` and a network:

    rows = datasets.load_dataset("HuggingFaceFW/fineweb", split="train", streaming=True).take(300)
    json.dump(list(rows), open("fineweb.json", "w"), default=str)

then `--data.source fineweb.json`, or `fineweb.json,book.txt` for both. Without it the lesson
compares two texts that Python brings along: its documentation and the code of its library.
Ten seconds on two CPU cores; no GPU needed.

How to read the names, such as `x_BxLxD`: `docs/lessons.md`. PyTorch's words in JAX:
`docs/from_pytorch.md`.
"""

# %%
import json
import sysconfig
from pathlib import Path
from typing import NamedTuple

import matplotlib.pyplot as plt
import numpy as np
from lesson import Lesson

from jax_model5 import corpus, tokenizer
from jax_model5.config import DataConfig

lesson = Lesson("16", "FineWeb: its documents and columns, beside a book, prose and code")
encoding = tokenizer.load("gpt2")

# %% [markdown]
"""
## Documents, tokens, and how often each occurs
"""


# %%
class Text(NamedTuple):
    documents: list[str]
    lengths_N: np.ndarray  # tokens of each document
    tokens_T: np.ndarray  # of all of them, in order

    @property
    def counts(self):
        """How often each token that occurs does, the commonest first."""
        counts_V = np.sort(np.bincount(self.tokens_T))[::-1]
        return counts_V[counts_V > 0]

    @property
    def zipf(self):
        """The slope of log count over log rank, from the 10th commonest token to the 1,000th."""
        ranks = np.arange(10, min(1000, len(self.counts)))
        return np.polyfit(np.log(ranks), np.log(self.counts[ranks - 1]), 1)[0]

    @property
    def bytes_per_token(self):
        return sum(len(text.encode()) for text in self.documents) / len(self.tokens_T)

    def unique(self, n):
        """Different ones among the first n tokens."""
        return len(np.unique(self.tokens_T[:n]))


def read(source, n_docs=0):
    documents = list(corpus.documents(DataConfig(source=source, n_docs=n_docs)))
    ids = tokenizer.encode(encoding, documents)
    return Text(documents, np.array([len(each) for each in ids]), np.concatenate(ids).astype(int))


names = corpus.names_of(lesson.source)
texts = {Path(name).stem: read(name) for name in names}
texts["Python's code"] = read(f"{sysconfig.get_path('stdlib')}/*.py", lesson.pick(0, 20))
for name, text in texts.items():
    n = len(text.tokens_T)
    print(
        f"{name}: {len(text.documents):,} documents, {n:,} tokens, {text.lengths_N.mean():,.0f} a "
        f"document (median {np.median(text.lengths_N):,.0f}, longest {text.lengths_N.max():,}), "
        f"{text.unique(n):,} different, the 100 commonest are {text.counts[:100].sum() / n:.0%}, "
        f"{text.bytes_per_token:.2f} bytes a token"
    )

# %%
figure, (left, right) = plt.subplots(1, 2, figsize=(8, 4), layout="constrained")
for name, text in texts.items():
    left.loglog(np.arange(1, len(text.counts) + 1), text.counts / len(text.tokens_T), label=name)
    lengths = np.geomspace(100, len(text.tokens_T), 30).astype(int)
    right.loglog(lengths, [text.unique(n) for n in lengths], label=name)
left.loglog([10, 10_000], [0.01, 1e-5], "k:", linewidth=1, label="1 / rank")
left.set(xlabel="rank of the token", ylabel="share of the text")
right.plot(750_000, 35_000, "k*", label="the course's 1,000 documents")
right.set(xlabel="tokens of the text", ylabel="different tokens")
left.legend(fontsize=8)
right.legend(fontsize=8)
lesson.save(figure, "tokens")

# %% [markdown]
"""
## What holds of every text
"""

# %%
first_name, first = next(iter(texts.items()))
code = texts["Python's code"]
slopes = {name: text.zipf for name, text in texts.items()}
lesson.check(
    "counts fall as 1 / rank (Zipf)",
    "–",
    ", ".join(f"{name} rank^{slope:.2f}" for name, slope in slopes.items()),
    all(-1.2 < slope < -0.8 for slope in slopes.values()),
)
n = len(first.tokens_T)
growth = first.unique(n) / first.unique(n // 2)
lesson.check(
    "twice the text has far fewer than twice the different tokens",
    "–",
    f"{growth:.2f} times as many in {first_name}",
    growth < 1.8,
)
lesson.check(
    "code takes more tokens for its bytes than prose",
    "–",
    f"{code.bytes_per_token:.2f} bytes a token, {first.bytes_per_token:.2f} in {first_name}",
    code.bytes_per_token < first.bytes_per_token,
)
if len(first.documents) > 1:
    mean, median = first.lengths_N.mean(), np.median(first.lengths_N)
    lesson.check(
        "a usual document is as long as the mean",
        "about 750 tokens a document",
        f"mean {mean:,.0f}, median {median:,.0f} in {first_name}",
        mean < 1.25 * median,
    )

# %% [markdown]
"""
## What holds of FineWeb

The data set's columns are text, id, dump, url, date, file_path, language, language_score and
token_count; a copy may have dropped some. A mean of few documents is itself uncertain: what follows
± is its standard error. FineWeb keeps what its classifier calls English with a score of 0.65 or
more, and masks e-mail addresses: likely why the two counts part only where a text has an @.
"""


# %%
def columns(source):
    """The rows of a JSON file that have FineWeb's column of counts; else none."""
    if not source.endswith(".json"):
        return []
    rows = json.loads(Path(source).expanduser().read_text(encoding="utf-8"))
    return [row for row in rows if "token_count" in row]


def judge_counts(fineweb):
    n_documents, n = len(fineweb.documents), len(fineweb.tokens_T)
    mean = 1000 * n / n_documents
    error = 1000 * fineweb.lengths_N.std(ddof=1) / n_documents**0.5
    lesson.check(
        "1,000 documents have about 750,000 tokens",
        "750,000",
        f"{mean:,.0f} ± {error:,.0f}, from {n_documents}",
        abs(mean - 750_000) < 2 * error,
    )
    # Going on like the last half, as a power of the length; it has to slow, for V is finite.
    here, before = fineweb.unique(n), fineweb.unique(n // 2)
    at_most = here * (750_000 / n) ** np.log2(here / before)
    lesson.check(
        "of them about 35,000 different",
        "35,000",
        f"{here:,} in {n:,}; going on like that {at_most:,.0f}, at most",
        here < 35_000 < at_most,
    )


def judge_columns(fineweb, rows):
    print({name: str(value)[:40] for name, value in rows[0].items()})
    is_equal = fineweb.lengths_N == [row["token_count"] for row in rows]
    has_at = np.array(["@" in text for text in fineweb.documents])
    lesson.check(
        "the column token_count is our count",
        "–",
        f"in {is_equal.sum()} of {len(rows)}; an @ stands in {(has_at & ~is_equal).sum()} of the "
        f"{(~is_equal).sum()} others, and in {(has_at & is_equal).sum()} of these",
        is_equal.all(),
    )
    least = min(row["language_score"] for row in rows)
    lesson.check("English with a score of 0.65 or more", "–", f"least {least:.3f}", least >= 0.65)


def judge_against(web, other):
    n = min(len(texts[web].tokens_T), len(texts[other].tokens_T))
    ours, theirs = texts[web].unique(n), texts[other].unique(n)
    lesson.check(
        f"the web has more different tokens than {other}",
        "heterogeneous (lesson 018)",
        f"{ours:,} and {theirs:,} in {n:,}",
        ours > theirs,
    )


webs = {Path(name).stem: rows for name in names if (rows := columns(name))}
for web, rows in webs.items():
    judge_counts(texts[web])
    judge_columns(texts[web], rows)
    for other in sorted(texts.keys() - webs):
        judge_against(web, other)
if not webs:
    print("no FineWeb here: its rows are left out; the top of this lesson says how to get some")
lesson.end()
