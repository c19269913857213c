"""The PyTorch side: hooks at modules, and a mode that sees functions, drops by given masks, widens.

Float64 means float64 throughout: where a model asks for float32 by name (many compute a norm or a
softmax so), the mode gives it float64.
"""

import contextlib
import functools
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

from portproof.port import BadInput, Pass, Port, as_arrays, stops, to_torch

DROPOUT, ATTENTION = F.dropout, F.scaled_dot_product_attention
Masks = Mapping[str, Sequence[np.ndarray]]


class Share(NamedTuple):
    """How much one site dropped of what it could."""

    dropped: int
    n: int
    rate: float

    def deviations(self) -> float:
        """The share's distance from the rate in standard deviations of a fair draw."""
        spread = math.sqrt(self.rate * (1 - self.rate) / self.n)
        return abs(self.dropped / self.n - self.rate) / spread


class Listener(TorchFunctionMode):
    """One pass of the model: where it is, what is tapped there, and its dropout."""

    def __init__(self, model: torch.nn.Module, wanted: set[str], masks: Masks | None, wide: bool):
        super().__init__()
        self.model, self.wanted, self.wide = model, wanted, wide
        self.masks = None if masks is None else {site: iter(m) for site, m in masks.items()}
        self.found = Pass()
        self.shares: dict[str, Share] = {}
        self.running = [""]
        self.calls: list[Counter] = [Counter()]  # of functions, in each running module
        self.seen: set[str] = set()

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        before, hooks = torch.get_default_dtype(), []
        torch.set_default_dtype(torch.float64 if self.wide else torch.float32)
        for path, module in self.model.named_modules():
            enter, leave = (functools.partial(f, path) for f in (self._enter, self._leave))
            hooks.append(module.register_forward_pre_hook(enter))
            hooks.append(module.register_forward_hook(leave))
        try:
            with self:
                yield
        finally:
            torch.set_default_dtype(before)
            for hook in hooks:
                hook.remove()

    def tap(self, name: str, x: Any) -> Any:
        self.seen.add(name)
        if name not in self.wanted or not torch.is_tensor(x) or not x.is_floating_point():
            return x
        return _Tap.apply(x, name, self.found)

    def _enter(self, path: str, module: Any, args: tuple) -> tuple:
        self.running.append(path)
        self.calls.append(Counter())
        return tuple(self.tap(f"{path}:in{i}", x) for i, x in enumerate(args))

    def _leave(self, path: str, module: Any, args: tuple, result: Any) -> Any:
        self.running.pop()
        self.calls.pop()
        if isinstance(result, tuple):
            return tuple(self.tap(f"{path}:out{i}", x) for i, x in enumerate(result))
        return self.tap(path, result)

    def __torch_function__(
        self, func: Callable, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if self.wide:
            func, args, kwargs = _widened(func, args, kwargs)
        path, calls = self.running[-1], self.calls[-1]
        name = getattr(func, "__name__", "")
        call = f"{path}>{name}" + (f"#{calls[name]}" if calls[name] else "")
        calls[name] += 1
        args = tuple(self.tap(f"{call}:in{i}", x) for i, x in enumerate(args))
        if func is DROPOUT:
            return self.tap(call, self._dropout(path, *args, **kwargs))
        if func is ATTENTION and kwargs.get("dropout_p"):
            return self.tap(call, self._attention(path, *args, **kwargs))
        return self.tap(call, func(*args, **kwargs))

    # ---- dropout --------------------------------------------------------------------------------

    def _dropout(
        self, path: str, x: Any, p: float = 0.5, training: bool = True, inplace: bool = False
    ) -> Any:
        if not training or p == 0:
            return x
        if self.masks is not None:
            return x * self._mask(path, x) / (1 - p)
        result = DROPOUT(x, p, True)
        dropped = result[x != 0] == 0
        self.shares[path] = Share(int(dropped.sum()), dropped.numel(), p)
        return result

    def _attention(self, path: str, q: Any, k: Any, v: Any, mask: Any = None, **how: Any) -> Any:
        """By its definition, for the fused kernels take no mask."""
        p, mask = how.pop("dropout_p"), how.pop("attn_mask", mask)
        weights = _attention_weights(q, k, mask, **how)
        dropped = self._dropout(path, weights, p)
        return dropped @ v.repeat_interleave(q.shape[-3] // v.shape[-3], -3)

    def _mask(self, path: str, x: torch.Tensor) -> torch.Tensor:
        assert self.masks is not None
        keep = next(self.masks[path], None)
        if keep is None:
            raise BadInput(f"PyTorch drops at {path} more often than JAX; mend the masks' table")
        if keep.shape != tuple(x.shape):
            raise BadInput(
                f"the mask of {path} is {list(keep.shape)} and PyTorch drops of {list(x.shape)}; "
                "name another site or give the row a function that joins JAX's masks"
            )
        return to_torch(keep != 0).to(x.dtype)


def _attention_weights(
    q: Any, k: Any, mask: Any, is_causal: bool = False, scale: Any = None, enable_gqa: bool = False
) -> Any:
    if enable_gqa:
        k = k.repeat_interleave(q.shape[-3] // k.shape[-3], -3)
    scores = q @ k.mT * (q.shape[-1] ** -0.5 if scale is None else scale)
    if is_causal:
        scores = scores.masked_fill(torch.ones_like(scores, dtype=torch.bool).triu(1), -math.inf)
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else scores + mask
    return scores.softmax(-1)


def _widened(func: Callable, args: Any, kwargs: Any) -> tuple:
    if func is torch.Tensor.float:
        func = torch.Tensor.double
    wide = [torch.float64 if x is torch.float32 else x for x in args]
    return func, wide, {k: torch.float64 if x is torch.float32 else x for k, x in kwargs.items()}


class _Tap(torch.autograd.Function):
    """The identity; writes down its argument, then its gradient at the same place of the list."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, name: str, found: Pass) -> torch.Tensor:  # type: ignore[override]
        values = found.values.setdefault(name, [])
        ctx.place = found.gradients.setdefault(name, []), len(values)
        array = x.detach().numpy().copy()
        values.append(array)
        ctx.place[0].append(np.zeros_like(array))
        return x.clone()

    @staticmethod
    def backward(ctx: Any, g: torch.Tensor) -> tuple:  # type: ignore[override]
        gradients, i = ctx.place
        gradients[i] = g.numpy().copy()
        return g, None, None


class TorchSide:
    """The module in one dtype."""

    def __init__(self, port: Port, dtype: str):
        self.port, self.dtype = port, getattr(torch, dtype)
        self.is_wide = dtype == "float64"
        self.batch = as_arrays(port.batch, dtype, to_torch)
        nothing = Listener(torch.nn.Module(), set(), None, self.is_wide)
        with stops("PyTorch", "made"), nothing.listening():
            self.model = port.torch_model()
            self.parameters = dict(self.model.to(self.dtype).named_parameters())

    def named(self, gradients: bool = False) -> dict[str, np.ndarray]:
        """Its parameters (or their gradients, 0 where nothing came) by their names."""
        arrays = {}
        for name, p in self.parameters.items():
            gradient = torch.zeros_like(p) if p.grad is None else p.grad
            arrays[name] = (gradient if gradients else p).numpy(force=True).copy()
        return arrays

    def load(self, named: Mapping[str, np.ndarray]) -> None:
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(to_torch(named[name]))

    def run(
        self, wanted: Iterable[str] = (), masks: Masks | None = None, train: bool = False
    ) -> Listener:
        """One pass forward and backward; without masks it draws its own."""
        self.model.train(train)
        self.model.zero_grad(set_to_none=True)
        listener = Listener(self.model, {*wanted}, masks, self.is_wide)
        with listener.listening():
            with stops("PyTorch", "forward", listener.running):
                logits = listener.tap("logits", self.port.forward(self.model, self.batch))
            if logits.dtype != self.dtype:
                raise BadInput(
                    f"PyTorch's logits are {logits.dtype} with {self.dtype} weights; let the model "
                    "compute in its weights' dtype"
                )
            with stops("PyTorch", "loss"):
                loss = self.port.losses[1](logits, self.batch)
        with stops("PyTorch", "backward"):
            loss.backward()
        listener.found.loss = loss.detach().numpy()
        listener.found.leaves = self.named(gradients=True)
        return listener

    def updates(self) -> Callable:
        """A function that takes a step with the gradients that are there."""
        with stops("PyTorch", "update"):
            optimizer = self.port.optimizers[1](self.model)

        def step() -> None:
            with stops("PyTorch", "update"):
                optimizer.step()

        return step
