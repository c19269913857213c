"""Model 5 as Flax's users write it: unrolled layers, nn.Dense, all logits, optax; timed as a peer.

`python -m jax_model5.bench.flax_peer [--config FILE]` speaks the protocol of measure.py.
"""

import dataclasses
import functools
import sys
import time
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from jax_model5.batches import test_batches, train_batch
from jax_model5.bench.measure import program_bytes, serve, timed
from jax_model5.config import ModelConfig, TrainConfig, parse
from jax_model5.corpus import Corpus, load_corpus
from jax_model5.errors import one_line_errors, require
from jax_model5.losses import n_last
from jax_model5.optimizer import optimizer
from jax_model5.startup import memory_errors, set_up_jax
from jax_model5.trees import blocks_of, from_layout


class Block(nn.Module):
    config: ModelConfig

    @nn.compact
    def __call__(self, x: jax.Array, *, deterministic: bool) -> jax.Array:
        c, (B, L, D) = self.config, x.shape
        dense = functools.partial(nn.Dense, dtype=c.dtype)
        norm = functools.partial(nn.LayerNorm, epsilon=1e-5, dtype=c.dtype)
        rate = c.dropout_at("attention")
        drops = not deterministic and rate > 0
        h = dense(3 * D, name="qkv")(norm(name="ln_1")(x))
        q, k, v = (part.reshape(B, L, c.n_heads, -1) for part in jnp.split(h, 3, axis=-1))
        h = nn.dot_product_attention(
            q,
            k,
            v,
            mask=nn.make_causal_mask(jnp.ones((B, L))),
            broadcast_dropout=False,
            dropout_rng=self.make_rng("dropout") if drops else None,
            dropout_rate=rate,
            deterministic=not drops,
        )
        h = dense(D, name="proj")(h.reshape(B, L, D))
        x = x + nn.Dropout(c.dropout_at("attention_output"), deterministic=deterministic)(h)
        h = dense(4 * D, name="fc")(norm(name="ln_2")(x))
        h = dense(D, name="out")(nn.gelu(h, approximate=c.gelu == "tanh"))
        return x + nn.Dropout(c.dropout_at("mlp"), deterministic=deterministic)(h)


class Model(nn.Module):
    """tokens [B, L] -> logits [B, L, V]."""

    config: ModelConfig

    @nn.compact
    def __call__(self, tokens: jax.Array, *, deterministic: bool) -> jax.Array:
        c, L = self.config, tokens.shape[1]
        wte = nn.Embed(c.vocab_size, c.d_model, dtype=c.dtype, name="wte")
        wpe = nn.Embed(c.seq_len, c.d_model, dtype=c.dtype, name="wpe")
        x = wte(tokens) + wpe(jnp.arange(L))
        x = nn.Dropout(c.dropout_at("embedding"), deterministic=deterministic)(x)
        for i in range(c.n_layers):
            x = Block(c, name=f"block_{i}")(x, deterministic=deterministic)
        x = nn.LayerNorm(epsilon=1e-5, dtype=c.dtype, name="ln_f")(x)
        logits = wte.attend(x).astype(jnp.float32)
        return logits / c.d_model**0.5 if c.scale_logits else logits


def mean_nll(params: Any, windows: jax.Array, key: Any = None, *, config: TrainConfig) -> jax.Array:
    """Over the last N positions; dropout is off without a key."""
    rngs = None if key is None else {"dropout": key}
    n = n_last(config)
    logits: Any = Model(config.model).apply(
        {"params": params}, windows[:, :-1], deterministic=key is None, rngs=rngs
    )
    targets = windows[:, -n:]
    return optax.softmax_cross_entropy_with_integer_labels(logits[:, -n:], targets).mean()


def params_of(ours: dict) -> dict:
    """Our parameters by this model's names."""
    blocks = blocks_of(ours.get("trunk", {}), ours["last_block"])
    params = {name: {"embedding": ours[name]} for name in ("wte", "wpe")}
    params["ln_f"] = ours["ln_f"]
    for i, block in enumerate(blocks):
        layers = {name: leaves for name, leaves in block.items() if name != "attn"}
        params[f"block_{i}"] = layers | block["attn"]
    return params


def init(config: TrainConfig) -> tuple[Any, Any]:
    """Parameters and the optimizer's state."""
    tokens = jnp.zeros((1, config.model.seq_len), jnp.int32)
    params = Model(config.model).init(jax.random.key(0), tokens, deterministic=True)["params"]
    return params, optimizer(config.optimizer, config.steps).init(params)


def train_step(
    params: Any, state: Any, windows: jax.Array, index: jax.Array, *, config: TrainConfig
) -> tuple[Any, Any, jax.Array]:
    key = jax.random.fold_in(jax.random.key(config.seed, impl=config.prng), index)
    loss, gradients = jax.value_and_grad(mean_nll)(params, windows, key, config=config)
    updates, state = optimizer(config.optimizer, config.steps).update(gradients, state, params)
    return optax.apply_updates(params, updates), state, loss


def run(config: TrainConfig, corpus: Corpus) -> None:
    params, state = jax.jit(init, static_argnames="config")(config=config)
    first, tested = train_batch(corpus, config, 0), test_batches(corpus, config)[0]
    start, n_done = time.perf_counter(), 0
    step = jax.jit(train_step, static_argnames="config", donate_argnums=(0, 1))
    compiled = step.lower(params, state, first, np.int32(0), config=config).compile()
    about = {
        "compile_s": time.perf_counter() - start,
        "program_bytes": program_bytes(compiled),
        "device": jax.devices()[0].device_kind,
    }
    nll_of = jax.jit(mean_nll, static_argnames="config")
    all_tokens = dataclasses.replace(config, objective="all_tokens")  # which a test measures, too

    def call(batches: list[np.ndarray]) -> Any:
        nonlocal params, state, n_done
        for batch in batches:
            params, state, loss = compiled(params, state, batch, np.int32(n_done))
            n_done += 1
        return params, state, loss

    def run_steps(count: int) -> float:
        batches = [train_batch(corpus, config, n_done + i) for i in range(count)]
        return timed(lambda: call(batches)) / count

    def loss_at(path: str) -> float:
        with np.load(path) as named:
            ours = from_layout(lambda name: named[name], config.model, "torch_ref")
        return float(nll_of(params_of(ours), first, config=config))

    def test() -> float:
        return timed(lambda: nll_of(params, tested, config=all_tokens))

    run_steps(1)
    serve(about, run_steps, {"eval": test}, loss_at)


def require_plain(config: TrainConfig) -> None:
    """Raises UserError where the config asks for what this peer has not."""
    c, fix = config, "leave out --peer flax"
    require(c.model.tied_head, "model.tied_head", False, fix)
    require(c.accumulate == 1, "accumulate", c.accumulate, fix)
    require(not c.init_from, "init_from", c.init_from, fix)
    require(not c.optimizer.freeze, "optimizer.freeze", c.optimizer.freeze, fix)


def main() -> None:
    with one_line_errors():
        config = parse(sys.argv[1:], "jax_model5.bench.flax_peer")
        require_plain(config)
        set_up_jax(config)
        with memory_errors(config):
            run(config, load_corpus(config))


if __name__ == "__main__":
    main()
