"""Planted faults: the mistakes of porting a model, each with the rung that it must fail."""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any
from unittest import mock

import flax.linen
import jax
import torch
import torch.nn.functional as F

import torch_ref.loss
import torch_ref.model
from jax_model5 import model, optimizer

_attention = F.scaled_dot_product_attention
_loss = torch_ref.loss.loss
_torch_attend = torch_ref.model.CausalAttention.forward
_TorchModel = torch_ref.model.Model5
_TorchAttention = torch_ref.model.Attention


@dataclasses.dataclass(frozen=True)
class Fault:
    """`plant()` is a context in which the fault is in the code; `where` is what must be named."""

    name: str
    rung: str
    where: str
    plant: Callable[[], AbstractContextManager[Any]]


def _replace(target: object, name: str, value: object) -> Callable[[], Any]:
    return lambda: mock.patch.object(target, name, value)


@contextlib.contextmanager
def _retraced(plant: Callable[[], AbstractContextManager[Any]]) -> Iterator[None]:
    """A fault in JAX's side: programs compiled without it, and then with it, are dropped."""
    jax.clear_caches()
    with plant():
        yield
    jax.clear_caches()


def _in_jax(target: object, name: str, value: object) -> Callable[[], Any]:
    return lambda: _retraced(_replace(target, name, value))


class UntiedModel(_TorchModel):
    def __init__(self, config):
        super().__init__(config)
        self.head.weight = torch.nn.Parameter(self.wte.weight.detach().clone())


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
    if self.mask is None:
        return _attention(q, k, v, is_causal=True)
    scores = q @ k.transpose(-2, -1) / q.shape[-1] ** 0.5
    future = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
    scores = torch_ref.model.Dropout.forward(self, scores)
    return scores.masked_fill(future, -torch.inf).softmax(-1) @ v


def _not_rescaled(self, x):
    return x if self.mask is None or not self.training else x * self.mask


def _layer_norm(**wrong):
    """jax_model5.model.layer_norm with Flax's defaults where `wrong` says so."""

    def layer_norm(config, name):
        right = {"epsilon": 1e-5, "use_fast_variance": False}
        dtypes = {"dtype": config.dtype, "param_dtype": config.dtype}
        return flax.linen.LayerNorm(**dtypes, **right | wrong, name=name)

    return layer_norm


@contextlib.contextmanager
def _no_dropout_of_its_own():
    def attention(q, k, v, is_causal, dropout_p):
        return _attention(q, k, v, is_causal=is_causal)

    with (
        mock.patch.object(F, "dropout", lambda x, rate, training: x),
        mock.patch.object(F, "scaled_dot_product_attention", attention),
    ):
        yield


FAULTS = [
    Fault(
        "untied head", "1 weights", "head.weight", _replace(torch_ref.model, "Model5", UntiedModel)
    ),
    Fault(
        "missing bias",
        "1 weights",
        "attn.proj.bias",
        _replace(torch_ref.model, "Attention", AttentionWithoutBias),
    ),
    Fault(
        "positions start at 1",
        "2 operations",
        "embedding",
        _replace(
            _TorchModel,
            "embed",
            lambda self, tokens: self.wte(tokens) + self.wpe.weight[: tokens.shape[1]].roll(-1, 0),
        ),
    ),
    Fault(
        "unscaled attention",
        "2 operations",
        "attention",
        _replace(F, "scaled_dot_product_attention", lambda *a, **k: _attention(*a, **k, scale=1.0)),
    ),
    Fault(
        "off-by-one mask",
        "2 operations",
        "attention",
        _replace(F, "scaled_dot_product_attention", _sees_next_token),
    ),
    Fault(
        "swapped Q and K",
        "2 operations",
        "attention",
        _replace(
            F, "scaled_dot_product_attention", lambda q, k, v, **rest: _attention(k, q, v, **rest)
        ),
    ),
    Fault(
        "wrong epsilon (Flax's default)",
        "2 operations",
        "ln_1",
        _in_jax(model, "layer_norm", _layer_norm(epsilon=1e-6)),
    ),
    Fault(
        "fast variance (Flax's default)",
        "2 layer norm, mean 300",
        "ln_f",
        _in_jax(model, "layer_norm", _layer_norm(use_fast_variance=True)),
    ),
    Fault(
        "erf for tanh",
        "2 operations",
        "gelu",
        _replace(torch.nn, "GELU", lambda approximate, gelu=torch.nn.GELU: gelu("none")),
    ),
    Fault(
        "logits not divided by sqrt(D)",
        "2 operations",
        "head",
        _replace(_TorchModel, "logits", lambda self, x: self.head(x)),
    ),
    Fault(
        "target shifted by one",
        "4 loss",
        "loss",
        _replace(
            torch_ref.loss, "loss", lambda logits, targets, n: _loss(logits, targets.roll(1, 1), n)
        ),
    ),
    Fault(
        "log-softmax forgotten",
        "4 loss",
        "loss",
        _replace(F, "log_softmax", lambda logits, dim: logits),
    ),
    Fault(
        "decay inside Adam",
        "6 updates",
        "attn/proj/bias",
        _replace(torch.optim, "AdamW", torch.optim.Adam),
    ),
    Fault(
        "no-op optimizer",
        "6 updates",
        "attn/proj/bias",
        _replace(torch.optim.AdamW, "step", lambda self: None),
    ),
    Fault(
        "clipping without PyTorch's 1e-6",
        "6 updates",
        "attn/proj/bias",
        _in_jax(optimizer, "_CLIP_EPSILON", 0.0),
    ),
    Fault(
        "gradients never zeroed",
        "7 trajectory",
        "loss",
        _replace(torch.optim.AdamW, "zero_grad", lambda self: None),
    ),
    Fault(
        "attention dropout before softmax",
        "7 trajectory, dropout",
        "loss",
        _replace(torch_ref.model.CausalAttention, "forward", _dropout_before_softmax),
    ),
    Fault(
        "survivors not rescaled",
        "7 trajectory, dropout",
        "loss",
        _replace(torch_ref.model.Dropout, "forward", _not_rescaled),
    ),
    Fault(
        "dropout left on in eval",
        "8 train/eval",
        "eval mode",
        _replace(torch_ref.model.CausalAttention, "forward", _dropout_in_eval),
    ),
    Fault("dropout off in train mode", "8 train/eval", "PyTorch drops", _no_dropout_of_its_own),
    Fault(
        "dropout never on in JAX",
        "8 train/eval",
        "JAX drops",
        _in_jax(model, "keep_mask", lambda key, rate, shape: jax.numpy.ones(shape, bool)),
    ),
]
