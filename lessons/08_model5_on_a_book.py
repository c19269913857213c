# %% [markdown]
"""
# Model 5 on a book: what it writes before training and after

**Question.** Model 5 learns one book. How far does its loss fall, and does its text get better?

**The course** (08) trains Model 5 on *Gulliver's Travels* for 501 steps of 16 × 256 tokens with
PyTorch's default init, all positions in the loss, no dropout, AdamW at 1e-3. It sees the test loss
fall and the text get better: 100 tokens at temperature 1.

**Expect** both, with a narrower model and windows of 32. Do not expect noise of the untrained one
at the course's size: PyTorch's default embedding is N(0, 1), and a head that is the same table
answers every token with itself. Its loss starts far above ln V = 10.82.

Five and a half minutes of processor time, which two CPU cores share; on a GPU not measured. Offline
the text is what Python ships, and the figures are others; the course's is Project Gutenberg's book
829, given by `--data.source`.

How to read the names, such as `x_BxLxD`: `docs/lessons.md`. PyTorch's words in JAX:
`docs/from_pytorch.md`.
"""

# %%
import dataclasses
import functools

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import torch
from lesson import Lesson, furthest

from jax_model5 import tokenizer
from jax_model5.batches import test_batches, train_batch
from jax_model5.compare.text import quality
from jax_model5.corpus import describe, load_corpus
from jax_model5.generate import Sampling, generate, text_of
from jax_model5.losses import nll
from jax_model5.model import Model5
from jax_model5.programs import Programs, steps
from jax_model5.trees import to_layout
from torch_ref import step as in_torch
from torch_ref.model import Model5 as TorchModel5

lesson = Lesson("08", "Model 5 on a book: what it writes before training and after")
STEPS, EVAL_EVERY, TWIN_STEPS = lesson.pick((300, 50, 4), (10, 5, 2))
ROWS, N_TOKENS = lesson.pick((16, 100), (4, 20))
size = lesson.pick({"seq_len": 32}, {"n_layers": 1, "batch_size": 4})
config = lesson.model5(STEPS, init="torch", eval_batches=lesson.pick(4, 1), **size)
corpus, encoding, V = load_corpus(config), tokenizer.load("gpt2"), config.model.vocab_size
train_T = corpus.tokens_T[: corpus.n_train]
print(describe(corpus))

# %% [markdown]
"""
## Training

The course's model ends in a log-softmax; ours returns logits, and the log-softmax is in the loss,
which comes out the same (lesson 015). The state that `steps` yields is given to its next step, and
so is the first one. The parameters of the start are kept from another call of `init`: it draws the
same ones each time, for they are a function of the seed.
"""

# %%
programs = Programs(config)
start = programs.init().params
tests = [programs.to_devices(batch) for batch in test_batches(corpus, config)]
curve, losses = {0: programs.test(start, tests)["all_token_nll"]}, []
for step, state, metrics in steps(config, corpus, programs=programs):
    losses.append(metrics["loss"])
    if step % EVAL_EVERY == 0:
        curve[step] = programs.test(state.params, tests)["all_token_nll"]
trained = state.params

# %% [markdown]
"""
## The first steps in PyTorch

From the same weights, on the same windows. What a PyTorch loop says by `manual_seed` and a
`DataLoader` is one function here, `train_batch(corpus, config, step)`; `train()` and `eval()` are
an argument, `deterministic`; `no_grad` is not to ask for a gradient; `zero_grad` has nothing to do,
for gradients are values that nobody keeps; and `to(device)` is `programs.to_devices`.
"""

# %%
twin = TorchModel5(config.model)
for name, array in to_layout(start, config.model, "torch_ref").items():
    twin.get_parameter(name).data.copy_(torch.tensor(array))
first = torch.tensor(np.array(tests[0]))
test_in_torch = in_torch.eval_step(twin, first, config)["all_token_nll"]
optimizer = in_torch.make_optimizer(twin, config.optimizer)
scheduler = in_torch.make_scheduler(optimizer, config.optimizer, STEPS)
twin_losses = []
for step in range(TWIN_STEPS):
    windows_BxL1 = torch.from_numpy(train_batch(corpus, config, step))
    metrics = in_torch.train_step(twin, optimizer, scheduler, windows_BxL1, config)
    twin_losses.append(metrics["loss"])
ours = [programs.test(start, tests[:1])["all_token_nll"], *losses[:TWIN_STEPS]]
apart = furthest(np.array(ours), np.array([test_in_torch, *twin_losses]))

# %% [markdown]
"""
## What "better" can mean

Three figures of a text, and two other texts to read them by: windows of the test part, which the
model has not seen, and single tokens of the training part, drawn by their frequency and put in no
order.

- known words: how many of the text's words stand in the training part;
- known pairs: how many of its pairs of neighbouring tokens do;
- distinct tokens: how many different ones there are, of all.
"""


# %%
def written(params):
    """Texts of the model after the course's prompt, tokens [R, N]."""
    prompt = encoding.encode_ordinary("I went on holiday to Liliput and")
    how = {"config": config.model, "sampling": Sampling(temperature=1.0), "n_tokens": N_TOKENS}
    return np.array(list(generate(params, [prompt] * ROWS, jax.random.key(0), **how))).T


def pairs(tokens):
    """A number for each pair of neighbours."""
    return tokens[..., :-1].astype(np.int64) * V + tokens[..., 1:]


def figures(rows_RxN):
    """Shares of known words, known pairs and distinct tokens."""
    of_text = quality(rows_RxN, corpus, encoding)
    known_pairs = np.isin(pairs(rows_RxN), pairs(train_T)).mean()
    return 1 - of_text["unseen_word_share"], known_pairs, of_text["distinct_1"]


starts_R = np.linspace(corpus.n_train, len(corpus.tokens_T) - N_TOKENS, ROWS).astype(int)
texts = {
    "untrained": written(start),
    "trained": written(trained),
    "single tokens": np.random.default_rng(0).choice(train_T, (ROWS, N_TOKENS)),
    "the test part": corpus.tokens_T[starts_R[:, None] + np.arange(N_TOKENS)],
}
shares = {name: figures(rows_RxN) for name, rows_RxN in texts.items()}
for name, rows_RxN in texts.items():
    print(f"--- {name}: {text_of(rows_RxN[0], encoding)!r}")

counts_V = np.bincount(train_T, minlength=V) + 1
by_frequency = -np.log(counts_V / counts_V.sum())[np.array(tests)[..., 1:]].mean()

# %%
figure, (left, right) = plt.subplots(1, 2, figsize=(9, 4), layout="constrained")
left.plot(np.array(losses), color="0.75", label="training")
left.plot(list(curve), list(curve.values()), "o-", label="test")
for height, name in ((np.log(V), "ln V"), (by_frequency, "frequencies alone")):
    left.axhline(height, color="0.5", linewidth=0.8, linestyle=":")
    left.text(STEPS / 4, height + 0.1, name, ha="center", color="0.4")
left.set(xlabel="step", ylabel="loss [nats]")
left.legend(loc="upper right")
for i, (name, of_text) in enumerate(shares.items()):
    right.bar(np.arange(3) + 0.2 * i - 0.3, of_text, 0.2, label=name)
right.set_xticks(range(3), ["known words", "known pairs", "distinct tokens"])
right.set(ylabel="share", ylim=(0, 1.3))
right.legend(ncols=2, loc="upper center")
lesson.save(figure, "book")

# %% [markdown]
"""
## Before training, at the course's size

The logit of a token i is x · w_i / sqrt(D), with x of length sqrt(D) after the last layer norm. At
the start x is mostly the embedding of the input token, w_i itself, of length sqrt(D) too: its own
logit is near sqrt(D), 28 at width 768, and all others are near N(0, 1). With the course's later
init (lesson 012) the embedding is 50 times smaller, and nothing of this happens.
"""


# %%
@functools.partial(jax.jit, static_argnames="model")
def untrained(windows_BxL1, model):
    """The probability that a token is followed by itself, and the loss; means over positions."""
    tokens_BxL = windows_BxL1[:, :-1]
    net, how = Model5(model), {"n_last": tokens_BxL.shape[1], "deterministic": True}
    params = net.init(jax.random.key(0), tokens_BxL, **how)
    logits_BxLxV = net.apply(params, tokens_BxL, **how)
    itself_BxLx1 = jnp.take_along_axis(jax.nn.softmax(logits_BxLxV), tokens_BxL[..., None], -1)
    return itself_BxLx1.mean(), nll(logits_BxLxV, windows_BxL1[:, 1:]).mean()


of_course = lesson.pick({"d_model": 768, "n_heads": 12, "n_layers": 12}, {})
of_course = dataclasses.replace(config.model, **of_course)
itself, loss_at_start = map(float, untrained(tests[0], of_course))

# %% [markdown]
"""
## What holds

Known words alone would be a poor judge: single tokens in no order have nearly as many as the book.
"""

# %%
end, (words, pairs_known, _) = curve[STEPS], shares["trained"]
lesson.check(
    "the test loss falls",
    "falls",
    f"{curve[0]:.2f} → {end:.2f} in {STEPS} steps; frequencies alone give {by_frequency:.2f}",
    end < curve[0],
)
lesson.check(
    "the text gets better",
    "gets better",
    f"known words {shares['untrained'][0]:.2f} → {words:.2f} (test part "
    f"{shares['the test part'][0]:.2f}), known pairs {shares['untrained'][1]:.2f} → "
    f"{pairs_known:.2f} ({shares['the test part'][1]:.2f})",
    words > shares["untrained"][0] and pairs_known > shares["untrained"][1],
    in_fast=False,
)
lesson.check(
    "better than its tokens in no order",
    "–",
    f"known pairs {pairs_known:.2f}, of single tokens {shares['single tokens'][1]:.2f}",
    pairs_known > shares["single tokens"][1],
    in_fast=False,
)
lesson.check(
    "untrained, at the course's size, it repeats itself",
    "–",
    f"with probability {itself:.3f}; its loss is {loss_at_start:.1f}",
    itself > 0.9,
    in_fast=False,
)
lesson.check(
    "the first losses are PyTorch's",
    "–",
    f"{TWIN_STEPS} of them, and the test loss before: {apart:.1e} apart",
    apart < 1e-4,
)
lesson.end()
