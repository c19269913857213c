"""Planted faults: the mistakes of porting a model, and what each must be caught by and named."""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any
from unittest import mock

import flax.linen
import jax
import jax.numpy as jnp
import optax
import torch
import torch.nn.functional as F

import torch_ref.loss
import torch_ref.model
import torch_ref.step
from jax_model5 import kernels, layer_norm, losses, model, optimizer
from jax_model5.config import TrainConfig
from parity_tests import ladder

_attention = F.scaled_dot_product_attention
_loss = torch_ref.loss.loss
_torch_attend = torch_ref.model.CausalAttention.forward
_TorchModel = torch_ref.model.Model5
_TorchAttention = torch_ref.model.Attention


PYTORCH, JAX = "PyTorch", "JAX"


@dataclasses.dataclass(frozen=True)
class Fault:
    """`plant()` is a context in which the fault is in the code of `side`.

    It must fail the ladder's rung `rung` at `where`, and the report must name `operation`.
    """

    name: str
    side: str
    rung: str
    where: str
    operation: str
    plant: Callable[[], AbstractContextManager[Any]]
    model: dict[str, Any] = dataclasses.field(default_factory=dict)  # the variant that shows it

    def marked(self, config: TrainConfig) -> TrainConfig:
        """Its variant, and no other measurement's config, so that JAX compiles the fault anew."""
        config = dataclasses.replace(config, model=dataclasses.replace(config.model, **self.model))
        in_model = self.side == JAX and self.operation != "optimizer"
        return dataclasses.replace(config, workdir=self.name) if in_model else config


def _replace(target: object, name: str, value: object) -> Callable[[], Any]:
    return lambda: mock.patch.object(target, name, value)


@contextlib.contextmanager
def _updates_retraced(plant: Callable[[], AbstractContextManager[Any]]) -> Iterator[None]:
    """A fault in the optimizer: the models' programs stay."""
    programs = ladder.train_step, ladder.update
    for program in programs:
        program.clear_cache()
    try:
        with plant():
            yield
    finally:
        for program in programs:
            program.clear_cache()


def _in_optimizer(target: object, name: str, value: object) -> Callable[[], Any]:
    return lambda: _updates_retraced(_replace(target, name, value))


class UntiedModel(_TorchModel):
    def __init__(self, config):
        super().__init__(config)
        self.head.weight = torch.nn.Parameter(self.wte.weight.detach().clone())


class TiedModel(_TorchModel):
    def __init__(self, config):
        super().__init__(config)
        self.head.weight = self.wte.weight


class AttentionWithoutBias(_TorchAttention):
    def __init__(self, config):
        super().__init__(config)
        self.proj = torch.nn.Linear(config.d_model, config.d_model, bias=False)


def _sees_next_token(q, k, v, is_causal, dropout_p):
    mask = torch.ones(q.shape[-2], q.shape[-2], dtype=torch.bool).tril(1)
    return _attention(q, k, v, attn_mask=mask, dropout_p=dropout_p)


def _dropout_in_eval(self, q, k, v):
    if self.training:
        return _torch_attend(self, q, k, v)
    return _attention(q, k, v, is_causal=True, dropout_p=self.rate)


def _dropout_before_softmax(self, q, k, v):
    scores = q @ k.transpose(-2, -1) / q.shape[-1] ** 0.5
    future = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
    scores = F.dropout(scores, self.rate, self.training)
    return scores.masked_fill(future, -torch.inf).softmax(-1) @ v


def _not_rescaled(self, x):
    return F.dropout(x, self.p, self.training) * (1 - self.p if self.training else 1)


def _fast_variance(x, epsilon):
    mean = x.mean(-1, keepdims=True)
    return x - mean, jnp.sqrt(jnp.square(x).mean(-1, keepdims=True) - mean**2 + epsilon)


@contextlib.contextmanager
def _no_dropout_of_its_own():
    def attention(q, k, v, is_causal, dropout_p):
        return _attention(q, k, v, is_causal=is_causal)

    with (
        mock.patch.object(F, "dropout", lambda x, *rest: x),
        mock.patch.object(F, "scaled_dot_product_attention", attention),
    ):
        yield


# ---- more mistakes of PyTorch's side ------------------------------------------------------------


def _attention_of(split=None, merge=None):
    """torch_ref's `Attention.forward` with another way into heads or out of them."""

    def forward(self, x):
        B, L, D = x.shape
        if split:
            q, k, v = split(self.qkv(x), self.n_heads)
        else:
            parts = self.qkv(x).chunk(3, dim=-1)
            q, k, v = (part.view(B, L, self.n_heads, -1).transpose(1, 2) for part in parts)
        y = self.attend(q, k, v)
        return self.proj(merge(y) if merge else y.transpose(1, 2).reshape(B, L, D))

    return forward


def _interleaved(qkv, n_heads):
    B, L, _ = qkv.shape
    return qkv.view(B, L, n_heads, 3, -1).permute(3, 0, 2, 1, 4).unbind(0)


def _no_residual(self, x):
    x = self.attn_drop(self.attn(self.ln_1(x)))
    return x + self.mlp_drop(self.out(self.gelu(self.fc(self.ln_2(x)))))


def _sample_variance(self, x):
    x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True) + self.eps).sqrt()
    return x * self.weight + self.bias


def _square_transposed(self, x):
    is_square = self.weight.shape[0] == self.weight.shape[1]
    return F.linear(x, self.weight.T if is_square else self.weight, self.bias)


def _float32_attention(q, k, v, **rest):
    return _attention(q.float(), k.float(), v.float(), **rest).to(q.dtype)


def _bfloat16_logits(self, x):
    return (x.bfloat16() @ self.wte.weight.bfloat16().T / x.shape[-1] ** 0.5).to(x.dtype)


def _smoothed(logits, targets, n):
    flat = logits[:, -n:].flatten(0, 1), targets[:, -n:].flatten().long()
    return F.cross_entropy(*flat, label_smoothing=0.1)


# ---- mistakes of JAX's side ---------------------------------------------------------------------


@jax.custom_vjp
def _twice_the_gradient(x, kernel):
    return x @ kernel


_twice_the_gradient.defvjp(
    lambda x, kernel: (x @ kernel, (x, kernel)),
    lambda saved, g: (g @ saved[1].T, 2 * jnp.einsum("...i,...o->io", saved[0], g)),
)


def _in_float32(x, kernel):
    return (x.astype(jnp.float32) @ kernel.astype(jnp.float32)).astype(x.dtype)


def _attend(scale=1.0, offset=True, through_v=True):
    """jax_model5.kernels.attend with another scale, mask or backward pass."""

    def attend(q, k, v, drop):
        N, L, K = q.shape[2], *k.shape[2:]
        rows = jnp.arange(L - N, L) if offset else jnp.arange(N)
        scores = jnp.where(
            jnp.arange(L) <= rows[:, None], scale * (q @ k.swapaxes(2, 3)) / K**0.5, -jnp.inf
        )
        v = v if through_v else jax.lax.stop_gradient(v)
        return drop(jax.nn.softmax(scores)) @ v

    return attend


_gelu, _nll, _adamw = jax.nn.gelu, losses._nll, optax.adamw


# Wrapped as Flax wraps the methods of a module's class, which it knows by their names.
@flax.linen.module.wrap_method_once
def logits(self, x):
    return x @ self.head_VxD.T / self.config.d_model


def _dropout(divisor=lambda rate: 1 - rate, without=""):
    """jax_model5.model.Dropout with another rescaling, or a site that keeps all."""

    @flax.linen.module.wrap_method_once
    @flax.linen.compact
    def __call__(self, x, *, deterministic):
        if deterministic or self.rate == 0 or self.name == without:
            return x
        keep = model.keep_mask(self.make_rng("dropout"), self.rate, x.shape)
        self.sow("masks", "keep", keep)
        return jnp.where(keep, x / divisor(self.rate), 0)

    return __call__


def _kernels_only(params):
    return jax.tree.map(lambda leaf: leaf.ndim > 1, params)


_SDPA = F, "scaled_dot_product_attention"
_FORWARD = _TorchAttention, "forward"
_ATTEND = torch_ref.model.CausalAttention, "forward"
_B0 = "block 0: "
_WEIGHTS = f"{_B0}attention weights"

# name, side, rung that fails, what it names, operation that the report names, the change
FAULTS = [
    Fault(*fields)
    for fields in [
        # parameters
        (
            "untied head",
            PYTORCH,
            "1 weights",
            "head.weight",
            "parameters",
            _replace(torch_ref.model, "Model5", UntiedModel),
        ),
        (
            "tied where the head is its own",
            PYTORCH,
            "1 weights",
            "head.weight",
            "parameters",
            _replace(torch_ref.model, "Model5", TiedModel),
            {"tied_head": False},
        ),
        (
            "missing bias",
            PYTORCH,
            "1 weights",
            "attn.proj.bias",
            "parameters",
            _replace(torch_ref.model, "Attention", AttentionWithoutBias),
        ),
        # embedding
        (
            "positions start at 1",
            PYTORCH,
            "2 operations",
            "embedding",
            "embedding",
            _replace(
                _TorchModel,
                "embed",
                lambda self, x: self.wte(x) + self.wpe.weight[: x.shape[1]].roll(-1, 0),
            ),
        ),
        (
            "embedding scaled by sqrt(D)",
            PYTORCH,
            "2 operations",
            "embedding",
            "embedding",
            _replace(
                _TorchModel,
                "embed",
                lambda self, x: (
                    self.wte(x) * self.config.d_model**0.5 + self.wpe.weight[: x.shape[1]]
                ),
            ),
        ),
        # layer norm
        (
            "wrong epsilon (Flax's default)",
            JAX,
            "2 operations",
            "ln_1",
            f"{_B0}ln_1",
            _replace(model, "LAYER_NORM_EPSILON", 1e-6),
        ),
        (
            "fast variance (Flax's default)",
            JAX,
            "2 layer norm, mean 300",
            "ln_f",
            "ln_f at mean 300",
            _replace(layer_norm, "_normalized", _fast_variance),
        ),
        (
            "variance over D - 1",
            PYTORCH,
            "2 operations",
            "ln_1",
            f"{_B0}ln_1",
            _replace(torch.nn.LayerNorm, "forward", _sample_variance),
        ),
        # attention
        (
            "q, k, v interleaved by head",
            PYTORCH,
            "2 operations",
            "attention",
            f"{_B0}q",
            _replace(*_FORWARD, _attention_of(split=_interleaved)),
        ),
        (
            "swapped Q and K",
            PYTORCH,
            "2 operations",
            "attention",
            _WEIGHTS,
            _replace(*_SDPA, lambda q, k, v, **rest: _attention(k, q, v, **rest)),
        ),
        (
            "unscaled attention",
            PYTORCH,
            "2 operations",
            "attention",
            _WEIGHTS,
            _replace(*_SDPA, lambda *a, **k: _attention(*a, **k, scale=1.0)),
        ),
        (
            "attention scaled twice",
            JAX,
            "2 operations",
            "attention",
            _WEIGHTS,
            _replace(kernels, "attend", _attend(scale=0.5)),
        ),
        (
            "off-by-one mask",
            PYTORCH,
            "2 operations",
            "attention",
            _WEIGHTS,
            _replace(*_SDPA, _sees_next_token),
        ),
        (
            "mask of a suffix starts at 0",
            JAX,
            "2 operations",
            "attention",
            _WEIGHTS,
            _replace(kernels, "attend", _attend(offset=False)),
        ),
        (
            "attention in float32",
            PYTORCH,
            "2 operations",
            "attention",
            _WEIGHTS,
            _replace(*_SDPA, _float32_attention),
        ),
        (
            "no gradient through v",
            JAX,
            "5 gradients",
            "",
            "block 3: attention, backward",
            _replace(kernels, "attend", _attend(through_v=False)),
        ),
        (
            "heads merged without transpose",
            PYTORCH,
            "2 operations",
            "attention",
            f"{_B0}attention",
            _replace(*_FORWARD, _attention_of(merge=lambda y: y.reshape(len(y), y.shape[2], -1))),
        ),
        (
            "missing residual",
            PYTORCH,
            "2 operations",
            "block",
            f"{_B0}attention residual",
            _replace(torch_ref.model.Block, "forward", _no_residual),
        ),
        # products
        (
            "square kernels transposed",
            PYTORCH,
            "2 operations",
            "proj",
            f"{_B0}proj",
            _replace(torch.nn.Linear, "forward", _square_transposed),
        ),
        (
            "products in float32",
            JAX,
            "2 operations",
            "qkv",
            f"{_B0}q",
            _replace(model, "matmul", _in_float32),
        ),
        (
            "kernel's gradient doubled",
            JAX,
            "5 gradients",
            "kernel",
            "last_block: proj",
            _replace(model, "matmul", _twice_the_gradient),
        ),
        # GELU
        (
            "tanh for erf",
            PYTORCH,
            "2 operations",
            "gelu",
            f"{_B0}gelu",
            _replace(torch.nn, "GELU", lambda approximate, gelu=torch.nn.GELU: gelu("tanh")),
        ),
        (
            "tanh for erf in JAX",
            JAX,
            "2 operations",
            "gelu",
            f"{_B0}gelu",
            _replace(model, "gelu", lambda x, approximate: _gelu(x, approximate=True)),
        ),
        (
            "erf for tanh",
            PYTORCH,
            "2 operations",
            "gelu",
            f"{_B0}gelu",
            _replace(torch.nn, "GELU", lambda approximate, gelu=torch.nn.GELU: gelu("none")),
            {"gelu": "tanh"},
        ),
        (
            "sigmoid GELU",
            PYTORCH,
            "2 operations",
            "gelu",
            f"{_B0}gelu",
            _replace(torch.nn.GELU, "forward", lambda self, x: x * torch.sigmoid(1.702 * x)),
        ),
        # logits and loss
        (
            "logits not divided by sqrt(D)",
            PYTORCH,
            "2 operations",
            "head",
            "logits",
            _replace(_TorchModel, "logits", lambda self, x: self.head(x)),
        ),
        (
            "logits divided twice",
            JAX,
            "2 operations",
            "head",
            "logits",
            _replace(model.Model5, "logits", logits),
        ),
        (
            "logits in bfloat16",
            PYTORCH,
            "2 operations",
            "head",
            "logits",
            _replace(_TorchModel, "logits", _bfloat16_logits),
        ),
        (
            "target shifted by one",
            PYTORCH,
            "4 loss",
            "loss",
            "loss",
            _replace(torch_ref.loss, "loss", lambda x, y, n: _loss(x, y.roll(1, 1), n)),
        ),
        (
            "log-softmax forgotten",
            PYTORCH,
            "4 loss",
            "loss",
            "loss",
            _replace(F, "log_softmax", lambda logits, dim: logits),
        ),
        (
            "label smoothing",
            PYTORCH,
            "4 loss",
            "loss",
            "loss",
            _replace(torch_ref.loss, "loss", _smoothed),
        ),
        (
            "loss in bits",
            JAX,
            "4 loss",
            "loss",
            "loss",
            _replace(losses, "_nll", lambda x, y: _nll(x, y) / jnp.log(2.0)),
        ),
        # dropout
        (
            "attention dropout before softmax",
            PYTORCH,
            "7 trajectory, dropout",
            "loss",
            _WEIGHTS,
            _replace(*_ATTEND, _dropout_before_softmax),
        ),
        (
            "survivors not rescaled",
            PYTORCH,
            "7 trajectory, dropout",
            "loss",
            "embedding dropout",
            _replace(torch.nn.Dropout, "forward", _not_rescaled),
        ),
        (
            "survivors divided by the rate",
            JAX,
            "7 trajectory, dropout",
            "loss",
            "embedding dropout",
            _replace(model.Dropout, "__call__", _dropout(divisor=lambda rate: rate)),
        ),
        (
            "a site that does not drop",
            JAX,
            "7 trajectory, dropout",
            "loss",
            "block 0: attention residual",
            _replace(model.Dropout, "__call__", _dropout(without="attn_drop")),
        ),
        # optimizer
        (
            "decay inside Adam",
            PYTORCH,
            "6 updates",
            "attn/proj/bias",
            "optimizer",
            _replace(torch.optim, "AdamW", torch.optim.Adam),
        ),
        (
            "no-op optimizer",
            PYTORCH,
            "6 updates",
            "attn/proj/bias",
            "optimizer",
            _replace(torch.optim.AdamW, "step", lambda self: None),
        ),
        (
            "epsilon inside the root",
            JAX,
            "6 updates",
            "attn/proj/bias",
            "optimizer",
            _in_optimizer(optax, "adamw", lambda *a, **k: _adamw(*a, **k, eps_root=1e-8)),
        ),
        (
            "biases not decayed",
            JAX,
            "6 updates",
            "bias",
            "optimizer",
            _in_optimizer(optax, "adamw", lambda *a, **k: _adamw(*a, **k, mask=_kernels_only)),
        ),
        (
            "clipping without PyTorch's 1e-6",
            JAX,
            "6 updates",
            "attn/proj/bias",
            "optimizer",
            _in_optimizer(optimizer, "_CLIP_EPSILON", 0.0),
        ),
        (
            "gradients never zeroed",
            PYTORCH,
            "7 trajectory",
            "step 2",
            "step",
            _replace(torch.optim.AdamW, "zero_grad", lambda self: None),
        ),
        (
            "micro-batches summed, not averaged",
            PYTORCH,
            "7 trajectory",
            "loss",
            "step",
            _replace(torch_ref.step, "loss", lambda *a: 2 * _loss(*a)),
        ),
        # train and eval mode
        (
            "dropout left on in eval",
            PYTORCH,
            "8 train/eval",
            "eval mode",
            "train and eval mode",
            _replace(*_ATTEND, _dropout_in_eval),
        ),
        (
            "dropout off in train mode",
            PYTORCH,
            "8 train/eval",
            "PyTorch drops",
            "embedding dropout",
            _no_dropout_of_its_own,
        ),
        (
            "dropout never on in JAX",
            JAX,
            "8 train/eval",
            "JAX drops",
            "train and eval mode",
            _replace(model, "keep_mask", lambda key, rate, shape: jnp.ones(shape, bool)),
        ),
    ]
]
