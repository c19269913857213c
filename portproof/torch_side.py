"""The PyTorch side: hooks at modules; a mode sees functions, drops by masks, makes float32 wide."""

import contextlib
import copy
import functools
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

from portproof.port import BadInput, Pass, Port, as_arrays, require_logits, stops

DROPOUT, ATTENTION = F.dropout, F.scaled_dot_product_attention


class Listener(TorchFunctionMode):
    """One pass of the model: where it is, what is tapped there, and its dropout."""

    def __init__(self, wide: bool, wanted: Iterable[str] = (), masks: Mapping[str, list] = {}):
        super().__init__()
        self.wide, self.found = wide, Pass(wanted)
        self.masks = {site: iter(calls) for site, calls in masks.items()}
        self.calls: Counter[str] = Counter()

    @contextlib.contextmanager
    def listening(self, model: torch.nn.Module) -> Iterator[None]:
        before, hooks = torch.get_default_dtype(), []
        torch.set_default_dtype(torch.float64 if self.wide else torch.float32)
        for path, module in model.named_modules():
            hooks.append(module.register_forward_pre_hook(functools.partial(self._enter, path)))
            hooks.append(module.register_forward_hook(functools.partial(self._leave, path)))
        try:
            with self:
                yield
        finally:
            torch.set_default_dtype(before)
            for hook in hooks:
                hook.remove()

    def tap(self, name: str, x: Any) -> Any:
        """`x`, its value and its gradient written down; what stops the gradient comes before."""
        if not torch.is_tensor(x) or not x.is_floating_point():
            return x
        self.found.seen.add(name)
        if name not in self.found.wanted:
            return x
        values, gradients = self.found.values[name], self.found.gradients[name]
        values.append(x.numpy(force=True).copy())
        gradients.append(np.zeros_like(values[-1]))
        call = len(gradients) - 1

        def write(g: torch.Tensor) -> None:
            gradients[call] = g.numpy(force=True).copy()

        with torch.enable_grad():
            x = (x if x.requires_grad else x.detach().requires_grad_()).clone()
        x.register_hook(write)
        return x

    def _enter(self, path: str, module: Any, args: tuple) -> tuple:
        self.found.running.append(path)
        return tuple(self.tap(f"{path}:in{i}", x) for i, x in enumerate(args))

    def _leave(self, path: str, module: Any, args: tuple, result: Any) -> Any:
        self.found.running.pop()
        if type(result) is tuple:  # a named one is the model's own
            return tuple(self.tap(f"{path}:out{i}", x) for i, x in enumerate(result))
        return self.tap(path, result)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.multi_head_attention_forward:  # Python: what it calls is seen one by one
            with mock.patch.object(F, "has_torch_function", return_value=False), self:
                return func(*args, **kwargs)
        if self.wide:
            func = torch.Tensor.double if func is torch.Tensor.float else func
            args = [torch.float64 if x is torch.float32 else x for x in args]
            kwargs = {k: torch.float64 if x is torch.float32 else x for k, x in kwargs.items()}
        path = self.found.running[-1]
        name = f"{path}>{getattr(func, '__name__', '')}"
        call = f"{name}#{self.calls[name]}" if self.calls[name] else name
        self.calls[name] += 1
        args = tuple(self.tap(f"{call}:in{i}", x) for i, x in enumerate(args))
        if func is DROPOUT:
            func = functools.partial(self._dropout, path)
        elif func is ATTENTION:
            func = functools.partial(self._attention, path)
        return self.tap(call, func(*args, **kwargs))

    def _dropout(
        self, path: str, x: Any, p: float = 0.5, training: bool = True, inplace: bool = False
    ) -> Any:
        if not training or p == 0:
            return x
        if path in self.masks:
            result = x * self._mask(path, x) / (1 - p)
        else:
            result = DROPOUT(x, p, True)
            self.found.drawn[path].append((result[x != 0].numpy(force=True), p))
        return x.copy_(result) if inplace else result

    def _attention(
        self, path: str, query: Any, key: Any, value: Any, attn_mask: Any = None,
        dropout_p: float = 0.0, *args: Any, **kwargs: Any,
    ) -> Any:  # fmt: skip
        """Its weights are what it makes of one-hot values, for the fused kernels take no mask."""
        if dropout_p == 0:
            return ATTENTION(query, key, value, attn_mask, dropout_p, *args, **kwargs)
        L = value.shape[-2]
        one_hot = torch.eye(L, dtype=value.dtype).expand(*value.shape[:-1], L)
        weights = ATTENTION(query, key, one_hot, attn_mask, 0.0, *args, **kwargs)
        dropped = self._dropout(path, weights, dropout_p)
        return dropped @ value.repeat_interleave(query.shape[-3] // value.shape[-3], -3)

    def _mask(self, path: str, x: torch.Tensor) -> torch.Tensor:
        keep = next(self.masks[path], None)
        if keep is None or keep.shape != tuple(x.shape):
            ours = "no more masks" if keep is None else f"a mask of {list(keep.shape)}"
            there = f"PyTorch drops of {list(x.shape)} at {path}, where JAX has {ours}"
            raise BadInput(f"{there}; drop at the same places, or join JAX's by the row of masks")
        return torch.tensor(keep != 0).to(x.dtype)


class TorchSide:
    """The module in one dtype."""

    def __init__(self, port: Port, dtype: str):
        self.port, self.dtype, self.wide = port, dtype, dtype == "float64"
        self.batch = as_arrays(port.batch, dtype, torch.tensor)
        with stops("PyTorch", "made"), Listener(self.wide).listening(torch.nn.Module()):
            made = copy.deepcopy(port.torch_model())
            self.model = made.double() if self.wide else made.float()
        self.parameters = dict(self.model.named_parameters())
        if odd := [name for name, p in self.parameters.items() if not p.is_floating_point()]:
            raise BadInput(f"PyTorch's {odd[0]} is not real; split it, or let it be a buffer")
        self.buffers = [(m._buffers, copy.deepcopy(m._buffers)) for m in self.model.modules()]

    def named(self) -> dict[str, np.ndarray]:
        """Its parameters by their names."""
        return {name: p.numpy(force=True).copy() for name, p in self.parameters.items()}

    def load(self, named: Mapping[str, np.ndarray]) -> None:
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(torch.tensor(named[name]))

    def run(self, wanted: Iterable[str] = (), masks: Mapping = {}, train: bool = False) -> Pass:
        """One pass forward and backward; without masks it draws its own."""
        for buffers, first in self.buffers:  # as they were at first
            buffers.update(copy.deepcopy(first))
        self.model.train(train)
        self.model.zero_grad()
        batch = copy.deepcopy(self.batch)  # a model may work in it
        listener = Listener(self.wide, wanted, masks)
        found = listener.found
        with listener.listening(self.model):
            with stops("PyTorch", "forward", found.running):
                logits = listener.tap("(logits)", self.port.forward(self.model, batch))
                require_logits("PyTorch", logits, self.dtype)
            with stops("PyTorch", "loss"):
                loss = self.port.losses[1](logits, batch)
        with stops("PyTorch", "backward"):
            loss.backward()
        found.loss = loss.numpy(force=True)
        for name, p in self.parameters.items():
            gradient = torch.zeros_like(p) if p.grad is None else p.grad
            found.leaves[name] = gradient.numpy(force=True).copy()
        return found

    def updates(self) -> Callable:
        """A function that takes a step with the gradients that are there."""
        with stops("PyTorch", "update"):
            return stops("PyTorch", "update")(self.port.optimizers[1](self.model).step)
