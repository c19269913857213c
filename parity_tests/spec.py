"""Each operation once more, in NumPy: the judge of which side is wrong, and the known mistakes."""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from jax_model5.config import ModelConfig

Array = np.ndarray


@dataclasses.dataclass(frozen=True)
class Inputs:
    """What one operation may use: what came before it, its block's parameters, its mask."""

    config: ModelConfig
    tokens_BxL: Array
    targets_BxL: Array
    values: Mapping[str, Array]  # of its own block and of the root, by operation
    block: Mapping[str, Array]  # "ln_1/scale", ...
    root: Mapping[str, Array]  # "wte", ...
    keep: Mapping[str, Array]  # "drop", "attn/drop", ...; empty with dropout off
    x_BxLxD: Array  # the block's input

    def dropped(self, site: str, x: Array, rescale: float = 1.0) -> Array:
        rate = self.config.dropout
        return x * self.keep[site] / (1 - rate) * rescale if site in self.keep else x


def layer_norm(
    x: Array, params: Mapping[str, Array], name: str, *, eps: float = 1e-5, ddof: int = 0
) -> Array:
    variance = x.var(-1, keepdims=True, ddof=ddof)
    normal = (x - x.mean(-1, keepdims=True)) / np.sqrt(variance + eps)
    return normal * params[f"{name}/scale"] + params[f"{name}/bias"]


def linear(x: Array, params: Mapping[str, Array], name: str) -> Array:
    return x @ params[f"{name}/kernel"] + params[f"{name}/bias"]


def qkv(i: Inputs, part: int, order: str = "qkv") -> Array:
    """The part (0: q, 1: k, 2: v) of the fused projection, by where its columns are."""
    whole = linear(i.values["ln_1"], i.block, "attn/qkv")
    if order == "interleaved":  # [H, 3, K] instead of [3, H, K]
        B, L, H = *whole.shape[:2], i.config.n_heads
        return whole.reshape(B, L, H, 3, -1)[:, :, :, part].reshape(B, L, -1)
    if order == "mixed":  # K before H
        whole = np.split(whole, 3, -1)[part]
        B, L, H = *whole.shape[:2], i.config.n_heads
        return whole.reshape(B, L, -1, H).swapaxes(2, 3).reshape(B, L, -1)
    return np.split(whole, 3, -1)["qkv".index(order[part])]


def weights(
    i: Inputs,
    *,
    scale: float | None = None,
    see: int = 0,
    low: Any = None,
    early: bool = False,
    swapped: bool = False,
) -> Array:
    """softmax(q k^T / sqrt(K)) with causal mask; `see` positions of the future are visible."""
    q, k = (_heads(i.values[name], i.config.n_heads) for name in ("kq" if swapped else "qk"))
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    scores = q @ k.swapaxes(2, 3) * scale
    if early:
        scores = i.dropped("attn/drop", scores)
    N, L = scores.shape[-2:]
    past = np.tril(np.ones((N, L), bool), L - N + see)
    scores = np.where(past, scores, -np.inf)
    scores = scores if low is None else _rounded(scores, low)
    with np.errstate(invalid="ignore"):
        scores = np.exp(scores - scores.max(-1, keepdims=True))
        result = scores / scores.sum(-1, keepdims=True)
    return result if early else i.dropped("attn/drop", result)


def attention(i: Inputs, *, merged: bool = True) -> Array:
    y_BxHxNxK = i.values["attention weights"] @ _heads(i.values["v"], i.config.n_heads)
    B, H, N, K = y_BxHxNxK.shape
    return (y_BxHxNxK.swapaxes(1, 2) if merged else y_BxHxNxK).reshape(B, N, H * K)


def _heads(x_BxLxD: Array, n_heads: int) -> Array:
    B, L, D = x_BxLxD.shape
    return x_BxLxD.reshape(B, L, n_heads, D // n_heads).swapaxes(1, 2)


def gelu(x: Array, variant: str) -> Array:
    if variant == "erf":
        return x * 0.5 * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))
    if variant == "sigmoid":
        return x / (1 + np.exp(-1.702 * x))
    if variant == "relu":
        return np.maximum(x, 0)
    return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def embedding(i: Inputs, shift: int = 0, tokens: float = 1.0, positions: float = 1.0) -> Array:
    L = i.tokens_BxL.shape[1]
    places = np.roll(i.root["wpe"], -shift, axis=0)[:L]
    return tokens * i.root["wte"][i.tokens_BxL] + positions * places


def residual(i: Inputs, branch: str, site: str, *, rescale: float = 1.0, x: float = 1.0) -> Array:
    before = i.x_BxLxD if branch == "proj" else i.values["attention residual"]
    after = i.values[branch]
    return x * before[:, -after.shape[1] :] + i.dropped(site, after, rescale)


def logits(i: Inputs, scale: float | None = None, low: Any = None) -> Array:
    default = i.config.d_model**-0.5 if i.config.scale_logits else 1.0
    x, head = i.values["ln_f"], i.root["wte" if i.config.tied_head else "head"]
    if low is not None:
        x, head = _rounded(x, low), _rounded(head, low)
    return x @ head.T * (default if scale is None else scale)


def loss(i: Inputs, *, roll: int = 0, smooth: float = 0.0, normalized: bool = True) -> Array:
    """Mean NLL of the last N targets, as [1, 1]."""
    z_BxNxV = i.values["logits"]
    N = z_BxNxV.shape[1]
    top = z_BxNxV.max(-1, keepdims=True)
    if normalized:
        z_BxNxV = z_BxNxV - top - np.log(np.exp(z_BxNxV - top).sum(-1, keepdims=True))
    targets_BxN = np.roll(i.targets_BxL, roll, axis=1)[:, -N:, None]
    picked_BxN = np.take_along_axis(z_BxNxV, targets_BxN, -1)[..., 0]
    nll_BxN = -(1 - smooth) * picked_BxN - smooth * z_BxNxV.mean(-1)
    return nll_BxN.mean().reshape(1, 1)


def _rounded(x: Array, dtype: Any) -> Array:
    return x.astype(dtype).astype(x.dtype)


def _norm(name: str, source: Callable[[Inputs], Array], root: bool = False) -> dict[str, Callable]:
    def spec(i: Inputs, **wrong: Any) -> Array:
        return layer_norm(source(i), i.root if root else i.block, name, **wrong)

    return {
        "": spec,
        "epsilon is 1e-6 instead of 1e-5": lambda i: spec(i, eps=1e-6),
        "epsilon is 1e-12 instead of 1e-5": lambda i: spec(i, eps=1e-12),
        "epsilon is 0": lambda i: spec(i, eps=0.0),
        "the variance is divided by D - 1": lambda i: spec(i, ddof=1),
        "it is left out": source,
    }


def _linear(name: str, source: str) -> dict[str, Callable]:
    return {
        "": lambda i: linear(i.values[source], i.block, name),
        "the bias is missing": lambda i: i.values[source] @ i.block[f"{name}/kernel"],
        "the kernel is transposed": lambda i: (
            i.values[source] @ i.block[f"{name}/kernel"].T + i.block[f"{name}/bias"]
        ),
    }


def _qkv(part: int) -> dict[str, Callable]:
    return {
        "": lambda i: qkv(i, part),
        "q and k are swapped": lambda i: qkv(i, part, "kqv"),
        "the columns are read as v, q, k": lambda i: qkv(i, part, "vqk"),
        "the columns are read as [head, q k v] instead of [q k v, head]": lambda i: qkv(
            i, part, "interleaved"
        ),
        "heads are split as [K, H] instead of [H, K]": lambda i: qkv(i, part, "mixed"),
        "the bias is missing": lambda i: np.split(
            i.values["ln_1"] @ i.block["attn/qkv/kernel"], 3, -1
        )[part],
    }


def _residual(branch: str, site: str) -> dict[str, Callable]:
    def spec(i: Inputs, **wrong: Any) -> Array:
        return residual(i, branch, site, **wrong)

    return {
        "": spec,
        "the residual connection is missing": lambda i: spec(i, x=0.0),
        "survivors of dropout are not rescaled": lambda i: spec(i, rescale=1 - i.config.dropout),
        "dropout is left out": lambda i: spec(dataclasses.replace(i, keep={})),
    }


# operation: {"": what it is, a known mistake: what it makes of it}
SPEC: dict[str, dict[str, Callable[[Inputs], Array]]] = {
    "embedding": {
        "": embedding,
        "positions start at 1": lambda i: embedding(i, shift=1),
        "positions are not added": lambda i: embedding(i, positions=0.0),
        "tokens are scaled by sqrt(D)": lambda i: embedding(i, tokens=i.config.d_model**0.5),
    },
    "embedding dropout": {
        "": lambda i: i.dropped("drop", i.values["embedding"]),
        "survivors of dropout are not rescaled": lambda i: i.dropped(
            "drop", i.values["embedding"], 1 - i.config.dropout
        ),
        "dropout is left out": lambda i: i.values["embedding"],
    },
    "ln_1": _norm("ln_1", lambda i: i.x_BxLxD),
    "q": _qkv(0),
    "k": _qkv(1),
    "v": _qkv(2),
    "attention weights": {
        "": weights,
        "q and k are swapped": lambda i: weights(i, swapped=True),
        "scores are not scaled by 1/sqrt(K)": lambda i: weights(i, scale=1.0),
        "scores are scaled by 1/K": lambda i: weights(i, scale=i.config.n_heads / i.config.d_model),
        "scores are scaled by 1/sqrt(D)": lambda i: weights(i, scale=i.config.d_model**-0.5),
        "the mask shows the next token": lambda i: weights(i, see=1),
        "the mask hides the token itself": lambda i: weights(i, see=-1),
        "there is no mask": lambda i: weights(i, see=i.config.seq_len),
        "scores are rounded to float16": lambda i: weights(i, low=np.float16),
        "scores are rounded to float32": lambda i: weights(i, low=np.float32),
        "dropout comes before softmax": lambda i: weights(i, early=True),
        "dropout is left out": lambda i: weights(dataclasses.replace(i, keep={})),
        "survivors of dropout are not rescaled": lambda i: weights(i) * (1 - i.config.dropout),
    },
    "attention": {
        "": attention,
        "heads are merged without the transpose": lambda i: attention(i, merged=False),
    },
    "proj": _linear("attn/proj", "attention"),
    "attention residual": _residual("proj", "attn_drop"),
    "ln_2": _norm("ln_2", lambda i: i.values["attention residual"]),
    "fc": _linear("fc", "ln_2"),
    "gelu": {
        "": lambda i: gelu(i.values["fc"], i.config.gelu),
        "GELU's tanh form instead of erf": lambda i: gelu(i.values["fc"], "tanh"),
        "GELU's erf form instead of tanh": lambda i: gelu(i.values["fc"], "erf"),
        "GELU's sigmoid form": lambda i: gelu(i.values["fc"], "sigmoid"),
        "ReLU instead of GELU": lambda i: gelu(i.values["fc"], "relu"),
    },
    "out": _linear("out", "gelu"),
    "MLP residual": _residual("out", "mlp_drop"),
    "ln_f": _norm("ln_f", lambda i: i.x_BxLxD, root=True),
    "logits": {
        "": logits,
        "logits are not divided by sqrt(D)": lambda i: logits(i, scale=1.0),
        "logits are divided by sqrt(D)": lambda i: logits(i, scale=i.config.d_model**-0.5),
        "logits are divided by D": lambda i: logits(i, scale=1 / i.config.d_model),
        "the product is rounded to float16": lambda i: logits(i, low=np.float16),
        "the product is rounded to float32": lambda i: logits(i, low=np.float32),
    },
    "loss": {
        "": loss,
        "targets are shifted by one": lambda i: loss(i, roll=1),
        "targets are shifted back by one": lambda i: loss(i, roll=-1),
        "log-softmax is forgotten": lambda i: loss(i, normalized=False),
        "it is in bits": lambda i: loss(i) / np.log(2),
        "it is a sum, not a mean": lambda i: loss(i) * i.values["logits"][..., 0].size,
        "labels are smoothed by 0.1": lambda i: loss(i, smooth=0.1),
    },
}
