"""A Llama in Flax NNX (Touvron et al. 2023), and transformers' LlamaForCausalLM, random weights.

python examples/llama.py [--fault NAME] [--html FILE]
"""

from functools import partial
from unittest import mock

import jax.numpy as jnp
import llama_nnx
import optax
import torch
from flax import nnx
from llama_nnx import RATE, D, F, G, H, K, N, V
from transformers import LlamaConfig, LlamaForCausalLM

import portproof

GRAPH, PARAMS = nnx.split(nnx.eval_shape(lambda: llama_nnx.Llama(nnx.Rngs(0))))
THEIRS = LlamaConfig(
    vocab_size=V, hidden_size=D, intermediate_size=F, num_hidden_layers=N, head_dim=K,
    num_attention_heads=H, num_key_value_heads=G, attention_dropout=RATE, rms_norm_eps=1e-5,
    tie_word_embeddings=False, attn_implementation="eager",
)  # fmt: skip
LAYER, ATTENTION = "model.layers.{i}", "model.layers.{i}.self_attn"


def apply(params, tokens_BxL, key, deterministic):
    model = portproof.watch(nnx.merge(GRAPH, params))
    return model(tokens_BxL, None if deterministic else nnx.Rngs(dropout=key))


LEAVES = [
    ("model.embed_tokens.weight", "embed"),
    (f"{LAYER}.input_layernorm.weight", "layers/{i}/norm_1/scale"),
    ([f"{ATTENTION}.{n}_proj.weight" for n in "qkv"], "layers/{i}/attn/qkv/kernel.T"),
    (f"{ATTENTION}.o_proj.weight", "layers/{i}/attn/out/kernel.T"),
    (f"{LAYER}.post_attention_layernorm.weight", "layers/{i}/norm_2/scale"),
    ([f"{LAYER}.mlp.{n}_proj.weight" for n in ("gate", "up")], "layers/{i}/gate_up/kernel.T"),
    (f"{LAYER}.mlp.down_proj.weight", "layers/{i}/down/kernel.T"),
    ("model.norm.weight", "norm/scale"),
    ("lm_head.weight", "head/kernel.T"),
]
TAPS = [
    ("embedding", "model.embed_tokens", "embedding"),
    ("layer {i}: norm 1", f"{LAYER}.input_layernorm", "layers/{i}/norm_1"),
    ("layer {i}: rotated q", f"{ATTENTION}>matmul:in0", "rotated q"),
    ("layer {i}: weights", f"{ATTENTION}>softmax", "weights"),
    ("layer {i}: attention", f"{ATTENTION}.o_proj:in0", "layers/{i}/attn/out:in0"),
    ("layer {i}: SwiGLU", f"{LAYER}.mlp.down_proj:in0", "layers/{i}/down:in0"),
    ("layer {i}: output", LAYER, "layers/{i}"),
    ("norm", "model.norm", "norm"),
]


def port():
    return portproof.Port(
        torch_model=lambda: LlamaForCausalLM(THEIRS),
        jax_model=apply,
        params=PARAMS,
        leaves=LEAVES,
        taps=TAPS,
        masks=[(ATTENTION, "layers/{i}/attn/drop")],
        batch=portproof.tokens(3, 9, vocab=V),
        forward=lambda module, tokens_BxL: module(tokens_BxL, use_cache=False).logits,
        optimizers=(optax.adam(1e-3), lambda m: torch.optim.Adam(m.parameters(), 1e-3)),
    )


# The papers' pairs are features 0 and 1, 2 and 3, ...; transformers' are half a head apart.
NEIGHBOURS = jnp.array([0, 2, 4, 1, 3, 5])
rotate, TILED = llama_nnx.rotate, partial(jnp.tile, reps=(1, H // G, 1, 1))
FAULTS = {
    "pairs": lambda: mock.patch.object(llama_nnx, "rotate", lambda x: rotate(x[..., NEIGHBOURS])),
    "groups": lambda: mock.patch.object(llama_nnx, "repeat", TILED),
    "gelu": lambda: mock.patch.object(nnx, "silu", nnx.gelu),
}

if __name__ == "__main__":
    portproof.main(port, FAULTS)
