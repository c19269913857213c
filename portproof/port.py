"""What is to be proved: two models, the tables that join them, and how it ends early."""

import collections
import contextlib
import dataclasses
import difflib
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
import optax
import torch


class BadInput(Exception):
    """The port cannot be measured as it is given. One line: the place and the fix."""


class Stopped(Exception):
    """An exception inside one of the two models, which is a verdict."""


@contextlib.contextmanager
def stops(side: str, doing: str, running: Sequence[str] = ()) -> Iterator[None]:
    """What a model raises is a verdict; what this library raises is not."""
    try:
        yield
    except (BadInput, Stopped):
        raise
    except Exception as error:
        place = ", ".join(filter(None, [side, doing, *running[-1:]]))
        message = " ".join(str(error).split())[:300]
        raise Stopped(f"{place}: {type(error).__name__}: {message}") from error


def require_logits(side: str, logits: Any, dtype: str) -> None:
    """Of the weights' dtype, so that nothing of less precision came before them."""
    found = str(getattr(logits, "dtype", type(logits).__name__))
    if found.removeprefix("torch.") != dtype:
        raise BadInput(
            f"{side}'s logits are {found} with {dtype} weights; let the model return one array, "
            "computed in its weights' dtype"
        )


def next_token_jax(logits_BxLxV: Any, tokens_BxL: Any) -> Any:
    """The mean cross-entropy of each token from those before it."""
    losses = optax.softmax_cross_entropy_with_integer_labels
    return losses(logits_BxLxV[:, :-1], tokens_BxL[:, 1:]).mean()


def next_token_torch(logits_BxLxV: torch.Tensor, tokens_BxL: torch.Tensor) -> torch.Tensor:
    """The same."""
    return torch.nn.functional.cross_entropy(logits_BxLxV[:, :-1].mT, tokens_BxL[:, 1:].long())


@dataclasses.dataclass(frozen=True)
class Port:
    """Two models and what joins them. In every table PyTorch comes first.

    `{i}` is every number that fits among PyTorch's names and that no other row names. Where the
    JAX side lacks it, that side is stacked: these are in order its places on axis 0, or its calls.

    Attributes:
      torch_model: builds PyTorch's module; called once a dtype.
      jax_model: (params, batch, key, deterministic) -> logits. It computes in its weights' dtype.
      params: JAX's tree of parameters, or of their shapes.
      leaves: rows (PyTorch's names, JAX's paths). "fc/kernel.T" is transposed. Several names of
        one side are one tensor, joined on PyTorch's axis 0.
      taps: rows (name, PyTorch's place, JAX's place), and if the layouts differ a function that
        lays PyTorch's array out as JAX's. Places: "ln_1" is a module's output, "ln_1:in0" its
        first argument, "qkv:out2" its third result, "attn>softmax#1:in0" (PyTorch) the first
        argument of the second softmax inside the module attn.
      batch: given to both, as arrays.
      masks: rows (PyTorch's module that drops, JAX's module or name of `portproof.mask`), one for
        each of its calls in order; if JAX draws several for a call, a function that joins them.
      forward: (PyTorch's module, batch) -> logits.
      losses: JAX's and PyTorch's (logits, batch) -> loss.
      optimizers: optax's, and a function that makes the one of PyTorch's module.
    """

    torch_model: Callable[[], torch.nn.Module]
    jax_model: Callable[[Any, Any, Any, bool], Any]
    params: Any
    leaves: Sequence[tuple]
    taps: Sequence[tuple]
    batch: Any
    optimizers: tuple[optax.GradientTransformation, Callable]
    masks: Sequence[tuple] = ()
    forward: Callable[[Any, Any], torch.Tensor] = lambda model, batch: model(batch)
    losses: tuple[Callable, Callable] = (next_token_jax, next_token_torch)


class Pass:
    """One pass of one side: what is tapped, the calls at each tap, and what came of it.

    `seen` is every place that could be tapped, `running` the modules that are being called, and
    `drawn` what PyTorch kept at each call of a site, and its rate.
    """

    def __init__(self, wanted: Iterable[str] = ()):
        self.wanted, self.seen, self.running = frozenset(wanted), set[str](), [""]
        self.values: dict[str, list] = collections.defaultdict(list)
        self.gradients: dict[str, list] = collections.defaultdict(list)
        self.drawn: dict[str, list] = collections.defaultdict(list)
        self.leaves: dict[str, np.ndarray] = {}
        self.loss: Any = None


def tokens(*shape: int, vocab: int) -> np.ndarray:
    """A batch made from its shape."""
    return np.random.default_rng(1).integers(0, vocab, shape)


def numbers(pattern: str, names: Iterable[str], taken: Collection[str] = ()) -> list:
    """The numbers that `{i}` of "h.{i}.fc" stands for; itself where there are none."""
    form = re.compile(re.escape(pattern).replace(r"\{i\}", r"(\d+)"))
    fits = [m for name in names if name not in taken and (m := form.fullmatch(name))]
    return sorted(int(m[1]) for m in fits if m.lastindex) or ["{i}"]


def nearest(name: str, names: Iterable[str]) -> str:
    """The name, and those that it may have meant."""
    close = difflib.get_close_matches(name, list(names), n=3, cutoff=0.0)
    return f"{name} (nearest: {', '.join(close) or 'there are none'})"


def as_arrays(batch: Any, dtype: str, make: Callable) -> Any:
    """The batch for one side: its floats in this dtype."""
    arrays = jax.tree.map(np.array, batch)
    if odd := [a.dtype for a in jax.tree.leaves(arrays) if a.dtype.kind not in "biufc"]:
        raise BadInput(f"the batch holds {odd[0]}; give a dictionary of arrays of numbers")
    return jax.tree.map(lambda a: make(a.astype(dtype) if a.dtype.kind == "f" else a), arrays)
