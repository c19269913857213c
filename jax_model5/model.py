"""Model 5 in Flax Linen: a GPT-2 decoder that computes logits for the last N positions only.

Shapes: B batch, L sequence, N last positions that get logits, D model width, H heads, K head
width, F feed-forward width, V vocabulary; of a KV cache S slots, T new tokens and X = B * H.
Parameters are one plain tree:

    wte[V, D]  wpe[L, D]  trunk (blocks 0 ... n-2, stacked on axis 0)  last_block  ln_f

and head[V, D] where the head is not tied to wte.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name, checkpoint_policies

from jax_model5 import flash, sharding
from jax_model5.config import ModelConfig
from jax_model5.kernels import (
    at_least_float32,
    causal_attention,
    gelu,
    keep_mask,
    masked_attention,
    matmul,
    matmul_transposed,
)
from jax_model5.layer_norm import layer_norm

Init = Callable[..., jax.Array]
LAYER_NORM_EPSILON = 1e-5  # PyTorch's; Flax's default is 1e-6


# ---- weight init, by name (course lessons 012 and 013) ------------------------------------------


def kernel_init(config: ModelConfig) -> Init:
    """Init of a linear layer's kernel [fan_in, fan_out]; like PyTorch's, no normal is truncated."""
    name, _, std = config.init.partition(":")
    inits = {
        "course": nn.initializers.normal(0.02),
        "xavier": nn.initializers.variance_scaling(1, "fan_avg", "normal"),
        "kaiming": nn.initializers.variance_scaling(2, "fan_in", "normal"),
        "torch": nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform"),
    }
    return inits[name] if name in inits else nn.initializers.normal(float(std))


def bias_init(config: ModelConfig, fan_in: int) -> Init:
    """Init of a linear layer's bias: 0, but for PyTorch's own default."""
    if config.init != "torch":
        return nn.initializers.zeros_init()
    bound = 1 / math.sqrt(fan_in)
    return lambda key, shape, dtype: jax.random.uniform(key, shape, dtype, -bound, bound)


def wte_init(config: ModelConfig) -> Init:
    """Init of wte [V, D]: the head is a linear layer D -> V, and its rule comes last.

    Not so in PyTorch's own default: there the head takes over what the embedding drew, N(0, 1).
    """
    if config.init == "torch":
        return nn.initializers.normal(1.0)
    init = kernel_init(config)
    return lambda key, shape, dtype: init(key, shape[::-1], dtype).T


def wpe_init(config: ModelConfig) -> Init:
    """Init of wpe [L, D]: the course's is Xavier normal, std sqrt(2 / (L + D))."""
    if config.init in ("course", "xavier"):
        return nn.initializers.variance_scaling(1, "fan_avg", "normal")
    return wte_init(config)


# ---- layers -------------------------------------------------------------------------------------


class Dropout(nn.Module):
    """Inverted dropout (Srivastava et al. 2014); its mask can be recorded in `masks`."""

    rate: float

    @nn.compact
    def __call__(self, x: jax.Array, *, deterministic: bool) -> jax.Array:
        if deterministic or self.rate == 0:
            return x
        keep = keep_mask(self.key(), self.rate, x.shape)
        self.sow("masks", "keep", keep)
        return jnp.where(keep, x / (1 - self.rate), jnp.zeros((), x.dtype))

    def key(self) -> jax.Array:
        """Of the next mask."""
        return self.make_rng("dropout")


def parameter(
    module: nn.Module, name: str, init: Init, shape: tuple[int, ...], dtype: Any
) -> jax.Array:
    """The module's parameter in this dtype, whole, also where a device holds a shard of it."""
    if sharding.is_on_each_device():
        return sharding.gathered(module.get_variable("params", name), shape, dtype)
    return module.param(name, init, shape, at_least_float32(dtype)).astype(dtype)


class Linear(nn.Module):
    """x @ kernel + bias."""

    config: ModelConfig
    n_features: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        c, fan_in = self.config, x.shape[-1]
        kernel = parameter(self, "kernel", kernel_init(c), (fan_in, self.n_features), c.dtype)
        bias = parameter(self, "bias", bias_init(c, fan_in), (self.n_features,), c.dtype)
        # Remat keeps a product without its bias: to add it again costs no pass over memory.
        return checkpoint_name(matmul(x, kernel), self.name or "") + bias


class LayerNorm(nn.Module):
    """`layer_norm` with its scale and bias."""

    config: ModelConfig

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        shape, dtype = (self.config.d_model,), at_least_float32(self.config.dtype)
        scale_D = parameter(self, "scale", nn.initializers.ones_init(), shape, dtype)
        bias_D = parameter(self, "bias", nn.initializers.zeros_init(), shape, dtype)
        return layer_norm(x, scale_D, bias_D, LAYER_NORM_EPSILON)


class Slots(NamedTuple):
    """Where a KV cache of S slots takes T new tokens, and what each of them sees of it."""

    first: jax.Array
    is_seen_XxTxS: jax.Array


class Attention(nn.Module):
    """Causal self-attention of the last N positions over all L (Vaswani et al. 2017)."""

    config: ModelConfig

    @nn.compact
    def __call__(
        self,
        x_BxLxD: jax.Array,
        n_last: int,
        *,
        deterministic: bool,
        slots: Slots | None = None,
    ) -> jax.Array:
        c = self.config
        B, L, D = x_BxLxD.shape
        N, H, K = n_last, c.n_heads, c.d_model // c.n_heads
        qkv = QKV(c, name="qkv")
        drop = Dropout(c.dropout_at("attention"), name="drop")
        if self._is_flash(L, K) and N == L and slots is None:
            y_BxLxD = self._flash(qkv.side_by_side(x_BxLxD), qkv.bias_3D, drop, deterministic)
            return Linear(c, D, name="proj")(y_BxLxD)
        q_BxHxNxK, k_BxHxLxK, v_BxHxLxK = (
            part_BxMxD.reshape(B, -1, H, K).swapaxes(1, 2)  # M is N for queries, L for the others
            for part_BxMxD in qkv(x_BxLxD, N)
        )
        dropped = functools.partial(drop, deterministic=deterministic)
        if slots is not None:
            q_XxNxK = q_BxHxNxK.reshape(B * H, N, K)
            k_XxSxK = self._cached("k", k_BxHxLxK, slots.first)
            v_XxSxK = self._cached("v", v_BxHxLxK, slots.first)
            is_seen_XxNxS = slots.is_seen_XxTxS[:, -N:]
            y_XxNxK = masked_attention(q_XxNxK, k_XxSxK, v_XxSxK, is_seen_XxNxS, dropped)
            y_BxHxNxK = y_XxNxK.reshape(B, H, N, K)
        else:
            y_BxHxNxK = causal_attention(q_BxHxNxK, k_BxHxLxK, v_BxHxLxK, dropped)
        y_BxHxNxK = checkpoint_name(y_BxHxNxK, "attention")
        return Linear(c, D, name="proj")(y_BxHxNxK.swapaxes(1, 2).reshape(B, N, D))

    def _is_flash(self, L: int, K: int) -> bool:
        """Not where masks are asked for: the kernels draw their own."""
        fits = sharding.is_gpu() and flash.fits(L, K, self.config.dtype)
        return fits and not self.is_mutable_collection("masks")

    def _flash(
        self, qkv_BxLx3D: jax.Array, bias_3D: jax.Array, drop: Dropout, deterministic: bool
    ) -> jax.Array:
        rate, keys_2x2 = 0.0 if deterministic else drop.rate, jnp.zeros((2, 2), jnp.uint32)
        if rate:  # one for each half of the queries, as the plain form draws them
            # Of a key of rbg the first two words: they are a threefry key.
            keys_2x2 = jnp.stack([jax.random.key_data(drop.key())[:2] for _ in range(2)])
        n_heads = self.config.n_heads
        return flash.causal_attention(qkv_BxLx3D, bias_3D, keys_2x2, n_heads=n_heads, rate=rate)

    def _cached(self, name: str, new_BxHxTxK: jax.Array, slot: jax.Array) -> jax.Array:
        """The cache's keys or values [B * H, S, K], the new ones written from this slot on.

        With B and H apart XLA on a CPU moves the products' reshape past the write, and copies the
        cache.
        """
        new_XxTxK = new_BxHxTxK.reshape(-1, *new_BxHxTxK.shape[2:])
        cache: nn.Variable = self.variable("cache", name)
        cache.value = jax.lax.dynamic_update_slice_in_dim(cache.value, new_XxTxK, slot, axis=1)
        return cache.value


class QKV(nn.Module):
    """The fused D -> 3D projection; queries are computed for the last N positions only."""

    config: ModelConfig

    def setup(self) -> None:
        c, D = self.config, self.config.d_model
        self.kernel_Dx3D = parameter(self, "kernel", kernel_init(c), (D, 3 * D), c.dtype)
        self.bias_3D = parameter(self, "bias", bias_init(c, D), (3 * D,), c.dtype)

    def __call__(self, x_BxLxD: jax.Array, n_last: int) -> tuple[jax.Array, ...]:
        D = self.config.d_model
        if n_last == x_BxLxD.shape[1]:
            qkv_BxLx3D = self.side_by_side(x_BxLxD) + self.bias_3D
            return qkv_BxLx3D[..., :D], qkv_BxLx3D[..., D : 2 * D], qkv_BxLx3D[..., 2 * D :]
        kernel_Dx3D, bias_3D = self.kernel_Dx3D, self.bias_3D
        q_BxNxD = matmul(x_BxLxD[:, -n_last:], kernel_Dx3D[:, :D]) + bias_3D[:D]
        kv_BxLx2D = matmul(x_BxLxD, kernel_Dx3D[:, D:]) + bias_3D[D:]
        return q_BxNxD, kv_BxLx2D[..., :D], kv_BxLx2D[..., D:]

    def side_by_side(self, x_BxLxD: jax.Array) -> jax.Array:
        """q, k and v in one array qkv_BxLx3D, their bias not yet added."""
        return checkpoint_name(matmul(x_BxLxD, self.kernel_Dx3D), "qkv")


class Block(nn.Module):
    """x + drop(attn(ln_1(x))), then x + drop(mlp(ln_2(x))), for the last N positions."""

    config: ModelConfig

    @nn.compact
    def __call__(
        self,
        x_BxLxD: jax.Array,
        n_last: int,
        *,
        deterministic: bool,
        slots: Slots | None = None,
    ) -> jax.Array:
        c, D, F = self.config, self.config.d_model, 4 * self.config.d_model
        x_BxLxD = sharding.row_major(x_BxLxD)
        h_BxLxD = LayerNorm(c, name="ln_1")(x_BxLxD)
        attention = Attention(c, name="attn")
        h_BxNxD = attention(h_BxLxD, n_last, deterministic=deterministic, slots=slots)
        h_BxNxD = Dropout(c.dropout_at("attention_output"), name="attn_drop")(
            h_BxNxD, deterministic=deterministic
        )
        x_BxNxD = checkpoint_name(x_BxLxD[:, -n_last:] + h_BxNxD, "residual")

        h_BxNxF = Linear(c, F, name="fc")(LayerNorm(c, name="ln_2")(x_BxNxD))
        h_BxNxF = gelu(h_BxNxF, approximate=c.gelu == "tanh")
        h_BxNxD = Linear(c, D, name="out")(h_BxNxF)
        h_BxNxD = Dropout(c.dropout_at("mlp"), name="mlp_drop")(
            h_BxNxD, deterministic=deterministic
        )
        return sharding.row_major(x_BxNxD + h_BxNxD)


UNROLLED = 4  # layers; on a GPU any number, for a loop's stacked arrays are copied there

# What the forward pass of a block keeps for its backward pass, by `model.remat`; fc is the layer's.
_SAVED = {
    "dots": checkpoint_policies.save_only_these_names("qkv", "attention", "residual", "fc"),
    "full": checkpoint_policies.nothing_saveable,
}


def run_block(config: ModelConfig, n_last: int, *, deterministic: bool) -> Callable:
    """(block, x_BxLxD, _) -> (x_BxNxD, None), as `nn.scan` wants it, rematerialized or not."""

    def run(block: Block, x_BxLxD: jax.Array, _: None) -> tuple[jax.Array, None]:
        return block(x_BxLxD, n_last, deterministic=deterministic), None

    if config.remat == "none":
        return run
    # A GPU's trunk is no loop, and without barriers XLA would keep what is to be computed again.
    # Flax remats a function of parameters, keys, x and None. A barrier around whole parameters
    # copies them; around shards it has them gathered again, not kept whole.
    barriers: Any = sharding.is_gpu() and (sharding.n_shards() > 1, True, True, True)
    return nn.remat(run, policy=_SAVED[config.remat], prevent_cse=barriers)


# ---- the model ----------------------------------------------------------------------------------


class Model5(nn.Module):
    """The decoder. `apply({"params": p}, tokens_BxL, n_last=N, deterministic=..., rngs=...)`.

    Returns raw logits_BxNxV of the last N positions, never below float32; log-softmax belongs to
    the loss (course lesson 015). With N < L the last block and the head compute those N positions
    only: the same numbers as slicing the full logits, for a fraction of the work.

    Raises `flax.errors.InvalidRngError` when dropout is on and rngs lacks a "dropout" key.
    """

    config: ModelConfig

    def setup(self) -> None:
        c, dtype = self.config, at_least_float32(self.config.dtype)
        self.wte_VxD = parameter(self, "wte", wte_init(c), (c.vocab_size, c.d_model), dtype)
        self.wpe_LxD = parameter(self, "wpe", wpe_init(c), (c.seq_len, c.d_model), dtype)
        # A head of its own starts as a copy: what the course's code trains on a GPU.
        copy_of_wte: Init = lambda *_: jnp.copy(self.wte_VxD)  # noqa: E731
        self.head_VxD = self.wte_VxD
        if not c.tied_head:
            self.head_VxD = parameter(self, "head", copy_of_wte, self.wte_VxD.shape, dtype)
        self.drop = Dropout(c.dropout_at("embedding"))
        self.trunk = Block(c)
        self.last_block = Block(c)
        self.ln_f = LayerNorm(c)

    def __call__(self, tokens_BxL: jax.Array, *, n_last: int, deterministic: bool) -> jax.Array:
        return self.logits(self.features(tokens_BxL, n_last=n_last, deterministic=deterministic))

    def features(self, tokens_BxL: jax.Array, *, n_last: int, deterministic: bool) -> jax.Array:
        """The final layer norm's output x_BxNxD."""
        c, L = self.config, tokens_BxL.shape[1]
        x_BxLxD = (self.wte_VxD[tokens_BxL] + self.wpe_LxD[:L]).astype(c.dtype)
        x_BxLxD = self.drop(x_BxLxD, deterministic=deterministic)
        if c.n_layers > 1:
            # One compiled block for all. A shallow trunk is unrolled: 1.1 times faster on a CPU.
            # XLA may then keep what remat "dots" would compute again.
            depth = c.n_layers - 1
            is_shallow = depth <= UNROLLED or sharding.is_gpu()
            is_unrolled = is_shallow and c.remat != "full"
            scan = nn.scan(
                run_block(c, L, deterministic=deterministic),
                variable_axes={"params": 0, "masks": 0},
                split_rngs={"params": True, "dropout": True},
                length=depth,
                unroll=depth if is_unrolled else 1,
                check_constancy_invariants=False,  # nothing is; or it is traced twice
            )
            x_BxLxD, _ = scan(self.trunk, x_BxLxD, None)
        run = run_block(c, n_last, deterministic=deterministic)
        x_BxNxD, _ = run(self.last_block, x_BxLxD, None)
        return self.ln_f(x_BxNxD)

    def logits(self, x_BxNxD: jax.Array) -> jax.Array:
        """logits_BxNxV = x head^T [/ sqrt(D)]; the head is wte itself unless it is untied."""
        c = self.config
        logits_BxNxV = matmul_transposed(x_BxNxD, self.head_VxD)
        return logits_BxNxV / math.sqrt(c.d_model) if c.scale_logits else logits_BxNxV


def applied(
    function: Callable[[Model5], Any], config: ModelConfig, params: dict, rngs: dict
) -> Any:
    """`function(model)` of the model with these parameters; each is gathered once for all of it."""
    return nn.apply(function, Model5(config))({"params": params}, rngs=rngs)
