"""Model 5's JAX code as a GPT-2, and transformers' GPT2LMHeadModel with random weights.

python examples/gpt2.py [--fault NAME] [--html FILE]
"""

from functools import partial
from unittest import mock

import blocks
import jax
import optax
import torch
from transformers import GPT2Config, GPT2LMHeadModel

import portproof
from jax_model5 import model
from jax_model5.config import ModelConfig

V, L = 61, 9
MODULES = {"ln_1": "ln_1", "attn/qkv": "attn.c_attn", "attn/proj": "attn.c_proj"}
MODULES |= {"ln_2": "ln_2", "fc": "mlp.c_fc", "out": "mlp.c_proj"}
SITES = {"attn/drop": "attn", "attn_drop": "attn.resid_dropout", "mlp_drop": "mlp.dropout"}
CHANGED: dict = {}
"""Fields of the configuration that a fault changes on the PyTorch side."""


def port(n_layers=3, tied=True, attention="sdpa"):
    ours = ModelConfig(V, L, 20, 2, n_layers, scale_logits=False, tied_head=tied, gelu="tanh")
    theirs = GPT2Config(
        vocab_size=V, n_positions=L, n_embd=20, n_layer=n_layers,
        tie_word_embeddings=tied, bos_token_id=0, eos_token_id=0, attn_implementation=attention,
        **{"n_head": 2} | CHANGED,
    )  # fmt: skip
    qkv = "attn>scaled_dot_product_attention"
    leaves, taps, masks = blocks.tables(n_layers, "transformer.h", MODULES, SITES, qkv)
    return portproof.Port(
        torch_model=lambda: GPT2LMHeadModel(theirs),
        jax_model=partial(blocks.apply, ours),
        params=blocks.shapes(ours),
        leaves=[
            ("transformer.wte.weight", "wte"),
            ("transformer.wpe.weight", "wpe"),
            ("transformer.ln_f.weight", "ln_f/scale"),
            ("transformer.ln_f.bias", "ln_f/bias"),
            *([] if tied else [("lm_head.weight", "head")]),
            *leaves,
        ],
        taps=[
            ("embedding", "transformer.drop:in0", "drop:in0"),
            ("drop", "transformer.drop", "drop"),
            *taps,
            ("ln_f", "transformer.ln_f", "ln_f"),
        ],
        masks=[("transformer.drop", "drop"), *masks],
        batch=portproof.tokens(3, L, vocab=V),
        forward=lambda module, tokens_BxL: module(tokens_BxL, use_cache=False).logits,
        optimizers=(optax.sgd(0.1, 0.9), lambda m: torch.optim.SGD(m.parameters(), 0.1, 0.9)),
    )


def without_gradient_of_v(q, k, v, drop):
    return attention(q, k, jax.lax.stop_gradient(v), drop)


attention = model.causal_attention
FAULTS = {
    "epsilon": lambda: mock.patch.dict(CHANGED, layer_norm_epsilon=1e-6),
    "heads": lambda: mock.patch.dict(CHANGED, n_head=4),
    "no gradient": lambda: mock.patch.object(model, "causal_attention", without_gradient_of_v),
}

if __name__ == "__main__":
    portproof.main(port, FAULTS)
