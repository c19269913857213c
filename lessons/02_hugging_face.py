# %% [markdown]
"""
# Hugging Face: a model's weights in, out, and judged by `transformers`

**Question.** Are weights that come from Hugging Face, or go there, the same model on both sides?

**The course** (02) shows the hub: models, data sets and spaces, some public, some gated.

**Expect** equal logits to rounding, the same greedy text and the same tokens, in and out. One thing
has no place in GPT-2's files: Model 5 divides its logits by sqrt(D). Exported, the division is
folded into the weights of the last layer norm, and the logits stay.

Needs no network: the weights are random, all of them (a fresh GPT-2 has biases of 0, and a bias in
the wrong place would not be seen). Half a minute on two CPU cores; no GPU needed.

How to read the names, such as `x_BxLxD`: `docs/lessons.md`. PyTorch's words in JAX:
`docs/from_pytorch.md`.
"""

# %%
import dataclasses
import logging
import shutil
import tempfile
from pathlib import Path

import jax
import numpy as np
import torch
import transformers
from lesson import Lesson, furthest

from jax_model5 import corpus, tokenizer
from jax_model5.checkpoint import read_params
from jax_model5.config import DataConfig, config_of_run, to_yaml
from jax_model5.generate import Sampling, generate
from jax_model5.huggingface.exporting import export_weights
from jax_model5.huggingface.importing import import_weights
from jax_model5.model import Model5
from jax_model5.step import abstract_state

lesson = Lesson("02", "Hugging Face: a model's weights in, out, and judged by transformers")
transformers.utils.logging.disable_progress_bar()
transformers.utils.logging.set_verbosity_error()
logging.getLogger("absl").setLevel(logging.ERROR)  # Orbax says that it only reads
folder = Path(tempfile.mkdtemp())

# %% [markdown]
"""
## Public and gated

A repository of the hub is a folder under version control: config.json, weights, a tokenizer, a card
that says what it is. `gpt2` is public: `from_pretrained("gpt2")` downloads it for anyone. A gated
one, such as Llama's, shows its card, and gives its files only to an account that has accepted its
licence: log in with `hf auth login`, or set HF_TOKEN. Data sets are kept the same way, and FineWeb
is public (lesson 016). A space is a program that the hub runs.

## In

Here `save_pretrained` makes such a folder. Our import reads the sizes from config.json and the
tensors from model.safetensors, and leaves a folder like that of a run. Given a name of the hub, it
downloads first: `python -m jax_model5.huggingface import gpt2 --out FOLDER`.
"""

# %%
sizes = lesson.pick({"n_embd": 256, "n_layer": 6}, {"n_embd": 32, "n_layer": 2})
torch.manual_seed(0)
theirs = transformers.GPT2LMHeadModel(transformers.GPT2Config(n_head=4, n_positions=64, **sizes))
for parameter in theirs.parameters():
    torch.nn.init.normal_(parameter, std=0.1)
theirs = theirs.double().eval()
theirs.save_pretrained(folder / "theirs")
import_weights(str(folder / "theirs"), folder / "imported")

config = config_of_run(str(folder / "imported"), "lesson 02")
params = read_params(config.workdir, abstract_state(config).params)

# %% [markdown]
"""
## The same logits

`deterministic=True` is what `eval()` is in PyTorch. `no_grad` has no twin: JAX keeps nothing for a
backward pass unless `jax.grad` asks for one. The last model is the control: Model 5's GELU and
division, the same weights, and other logits. What config.json says is a part of the model.
"""


# %%
def logits_here(model, tokens_BxL):
    def apply(params, tokens_BxL):
        n = tokens_BxL.shape[1]
        return Model5(model).apply({"params": params}, tokens_BxL, n_last=n, deterministic=True)

    return np.asarray(jax.jit(apply)(params, tokens_BxL))


def logits_there(model, tokens_BxL):
    with torch.no_grad():
        return model(torch.tensor(tokens_BxL)).logits.numpy()


L, V = config.model.seq_len, config.model.vocab_size
tokens_BxL = np.random.default_rng(0).integers(0, V, (2, L))
model5 = dataclasses.replace(config.model, gelu="erf", scale_logits=True)
gpt2_BxLxV, model5_BxLxV = (logits_here(m, tokens_BxL) for m in (config.model, model5))
theirs_BxLxV = logits_there(theirs, tokens_BxL)

prompt_1x8, n_new = tokens_BxL[:1, :8], lesson.pick(40, 8)
how = {"config": config.model, "sampling": Sampling(greedy=True), "n_tokens": n_new}
drawn = np.concatenate(list(generate(params, prompt_1x8.tolist(), jax.random.key(0), **how)))
drawn_there = theirs.generate(torch.tensor(prompt_1x8), do_sample=False, max_new_tokens=n_new)
n_equal = int((drawn == drawn_there[0, 8:].numpy()).sum())

# %% [markdown]
"""
## Out

Once as they came, once as a Model 5 of ours (a copy of the folder with another config.yaml). The
export writes GPT-2's vocabulary and merges too, so `transformers` makes its tokenizer from them.
"""

# %%
export_weights(config.workdir, folder / "back", "5GB")
back = transformers.GPT2LMHeadModel.from_pretrained(folder / "back").state_dict()
tensors = theirs.state_dict()
n_same_bits = sum(torch.equal(tensor, back[name]) for name, tensor in tensors.items())

shutil.copytree(config.workdir, folder / "model5")
as_model5 = dataclasses.replace(config, model=model5)
(folder / "model5/config.yaml").write_text(to_yaml(as_model5))
export_weights(str(folder / "model5"), folder / "exported", "5GB")
exported = transformers.GPT2LMHeadModel.from_pretrained(folder / "exported").eval()
apart_out = furthest(model5_BxLxV, logits_there(exported, tokens_BxL))

ours = tokenizer.load("gpt2")
their_tokenizer = transformers.GPT2Tokenizer.from_pretrained(folder / "exported")
texts = list(corpus.documents(DataConfig(source=lesson.source, n_docs=lesson.pick(50, 5))))
texts += [
    "",
    "  two  spaces\n\n\n",
    "naïve Ωμέγα 東京 🙂",
    "don't I'LL 3.14 x==y",
    "\ta\r\n\u00a0b",
]
equal_texts = [ours.encode_ordinary(text) == their_tokenizer(text).input_ids for text in texts]
KNOWN = {"Hello world": [15496, 995], " Hello world": [18435, 995]}  # of transformers' own docs
known = {text: ours.encode_ordinary(text) for text in KNOWN}
shutil.rmtree(folder)

# %%
apart_in = furthest(gpt2_BxLxV, theirs_BxLxV)
apart_control = furthest(model5_BxLxV, theirs_BxLxV)
lesson.check(
    "weights come in: the same logits in float64",
    "–",
    f"furthest apart {apart_in:.1e} of {abs(theirs_BxLxV).max():.1f}",
    apart_in < 1e-11,
)
lesson.check(
    "the control, erf GELU and scaled logits, is seen",
    "–",
    f"furthest apart {apart_control:.1e}",
    apart_control > 1e-3,
)
lesson.check(
    "the same greedy text", "–", f"{n_equal} of {n_new} tokens", n_equal == len(drawn) == n_new
)
lesson.check(
    "weights go back out: the same bits",
    "–",
    f"{n_same_bits} of {len(tensors)} tensors",
    n_same_bits == len(tensors) == len(back),
)
lesson.check(
    "a Model 5 goes out: the same logits, division and all",
    "–",
    f"furthest apart {apart_out:.1e} of {abs(model5_BxLxV).max():.1f}",
    apart_out < 1e-11,
)
lesson.check(
    "the same tokens",
    "GPT-2's tokenizer",
    f"{sum(equal_texts)} of {len(texts)} texts; {len(KNOWN)} known ones "
    + ("right" if known == KNOWN else "wrong"),
    all(equal_texts) and known == KNOWN,
)
lesson.end()
