"""Texts of Model 5 by CTranslate2, an engine that only generates; timed as a peer on a CPU.

`python -m jax_model5.bench.ctranslate2_peer [--config FILE]` speaks the protocol of measure.py.
"""

import importlib.metadata
import math
import sys
import tempfile
from collections.abc import Mapping
from typing import Any

import ctranslate2
import jax
import numpy as np
from ctranslate2.specs.common_spec import Activation
from ctranslate2.specs.transformer_spec import TransformerDecoderModelSpec

from jax_model5 import startup
from jax_model5.bench.cases import new_tokens
from jax_model5.bench.measure import serve, timed
from jax_model5.config import ModelConfig, TrainConfig, parse
from jax_model5.corpus import Corpus, load_corpus
from jax_model5.errors import UserError, one_line_errors, require
from jax_model5.programs import Programs
from jax_model5.trees import to_layout


def loaded(weights: Mapping[str, np.ndarray], config: ModelConfig) -> ctranslate2.Generator:
    """The engine on all cores, from weights under torch_ref's names; a token's text: its number."""
    spec = specification(weights, config)
    with tempfile.TemporaryDirectory() as folder:
        spec.save(folder)
        return ctranslate2.Generator(
            folder, compute_type="float32", intra_threads=startup.n_cores()
        )


def specification(weights: Mapping[str, np.ndarray], c: ModelConfig) -> TransformerDecoderModelSpec:
    """Model 5 in their terms, as their converter writes GPT-2; the head divides the logits."""
    activation = {"erf": Activation.GELU, "tanh": Activation.GELUTanh}[c.gelu]
    spec = TransformerDecoderModelSpec.from_config(
        c.n_layers, c.n_heads, pre_norm=True, activation=activation
    )

    def norm(part: Any, name: str) -> None:
        part.gamma, part.beta = weights[f"{name}.weight"], weights[f"{name}.bias"]

    def linear(part: Any, name: str) -> None:
        part.weight, part.bias = weights[f"{name}.weight"], weights[f"{name}.bias"]

    decoder, head_VxD = spec.decoder, weights["wte.weight" if c.tied_head else "head.weight"]
    decoder.scale_embeddings = False
    decoder.embeddings.weight = weights["wte.weight"]
    decoder.position_encodings.encodings = weights["wpe.weight"]
    norm(decoder.layer_norm, "ln_f")
    decoder.projection.weight = head_VxD / math.sqrt(c.d_model) if c.scale_logits else head_VxD
    for i, layer in enumerate(decoder.layer):
        attention, mlp = layer.self_attention, layer.ffn
        norm(attention.layer_norm, f"blocks.{i}.ln_1")
        linear(attention.linear[0], f"blocks.{i}.attn.qkv")
        linear(attention.linear[1], f"blocks.{i}.attn.proj")
        norm(mlp.layer_norm, f"blocks.{i}.ln_2")
        linear(mlp.linear_0, f"blocks.{i}.fc")
        linear(mlp.linear_1, f"blocks.{i}.out")
    spec.register_vocabulary([str(token) for token in range(c.vocab_size)])
    spec.config.bos_token = spec.config.eos_token = spec.config.unk_token = "0"
    spec.validate()
    return spec


def write_texts(generator: ctranslate2.Generator, prompt_BxT: np.ndarray, n_tokens: int) -> Any:
    """None ends early: token 0, which the engine takes for the end, is never drawn."""
    return generator.generate_batch(
        prompt_BxT.astype(str).tolist(),
        max_length=n_tokens,
        min_length=n_tokens,
        sampling_topk=0,
        include_prompt_in_result=False,
    )


def run(config: TrainConfig, corpus: Corpus) -> None:
    weights = to_layout(jax.device_get(Programs(config).init().params), config.model, "torch_ref")
    generator = loaded(weights, config.model)
    version = importlib.metadata.version("ctranslate2")

    def write(B: int, prompt: int) -> float:
        prompt_BxT, n = corpus.tokens_T[: B * prompt].reshape(B, prompt), new_tokens(config, prompt)
        return timed(lambda: write_texts(generator, prompt_BxT, n))

    def train(count: int) -> float:
        raise UserError("ctranslate2: it only writes texts; leave the peer out")

    serve({"versions": {"ctranslate2": version}}, train, {"generate": write})


def main() -> None:
    with one_line_errors():
        config = parse(sys.argv[1:], "jax_model5.bench.ctranslate2_peer")
        dtype, fix = config.model.dtype, "use --dtype float32, or leave out --peer ctranslate2"
        require(dtype == "float32", "model.dtype", dtype, fix)
        startup.set_up_jax(config)
        fix = "this peer writes on a CPU; set JAX_PLATFORMS=cpu"
        require(jax.default_backend() == "cpu", "peer", "ctranslate2", fix)
        run(config, load_corpus(config))


if __name__ == "__main__":
    main()
