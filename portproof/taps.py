"""Taps and masks on the JAX side: the value on the way forward, its gradient on the way back.

A tap is the identity. Run alone it hands over its argument; differentiated, its cotangent. The
callbacks are ordered, so a scanned layer's calls come as the loop makes them, and the cotangents
in the opposite order, also where the loop is unrolled or rematerialized.
"""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

import flax.linen
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx


@dataclasses.dataclass
class Recorder:
    """What the taps write to; `running` are the modules that are being called."""

    wanted: frozenset[str]
    masked: frozenset[str] = frozenset()
    values: dict[str, list[np.ndarray]] = dataclasses.field(default_factory=dict)
    gradients: dict[str, list[np.ndarray]] = dataclasses.field(default_factory=dict)
    masks: dict[str, list[np.ndarray]] = dataclasses.field(default_factory=dict)
    seen: set[str] = dataclasses.field(default_factory=set)
    running: list[str] = dataclasses.field(default_factory=list)
    zero: Any = 0.0


_recorder: Recorder | None = None


def differentiate(zero: Any) -> None:
    """All taps from here on are functions of this scalar, of which none uses the value."""
    if _recorder is not None:
        _recorder.zero = zero


@contextlib.contextmanager
def recording(recorder: Recorder) -> Iterator[None]:
    """Taps write to it, and Linen's modules are tapped; what runs is done when it ends."""
    global _recorder
    _recorder = recorder
    try:
        with flax.linen.intercept_methods(_linen):
            yield
            jax.effects_barrier()
    finally:
        _recorder = None


def tap(name: str, x: Any) -> Any:
    """`x` itself, tapped under this name where the port's table asks for it."""
    if _recorder is None:
        return x
    _recorder.seen.add(name)
    if name not in _recorder.wanted or not jnp.issubdtype(x.dtype, jnp.floating):
        return x
    return _tapped(name, x, _recorder.zero)


def mask(name: str, keep: Any) -> Any:
    """`keep` itself (True where dropout keeps), for PyTorch to drop by too."""
    if _recorder is not None and name in _recorder.masked:
        jax.debug.callback(functools.partial(_write, "masks", name), keep, ordered=True)
    return keep


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _tapped(name: str, x: jax.Array, zero: jax.Array) -> jax.Array:
    """`zero` is differentiated, so that the gradient comes here also where x stops it."""
    jax.debug.callback(functools.partial(_write, "values", name), x, ordered=True)
    return x


def _forward(name: str, x: jax.Array, zero: jax.Array) -> tuple[jax.Array, jax.Array]:
    return x, zero


def _backward(name: str, zero: jax.Array, g: jax.Array) -> tuple[jax.Array, jax.Array]:
    jax.debug.callback(functools.partial(_write, "gradients", name), g, ordered=True)
    return g, zero


_tapped.defvjp(_forward, _backward)


def _write(where: str, name: str, array: Any) -> None:
    if _recorder is not None:
        getattr(_recorder, where).setdefault(name, []).append(np.array(array))


# ---- modules ------------------------------------------------------------------------------------


def _linen(call: Callable, args: tuple, kwargs: dict, context: Any) -> Any:
    if context.method_name != "__call__":
        return call(*args, **kwargs)
    return _module("/".join(context.module.path), call, args, kwargs)


def watch(model: Any) -> Any:
    """An NNX model whose modules are tapped by their paths; outside a proof the model itself."""
    if _recorder is not None:
        for path, node in list(nnx.iter_graph(model)):
            if isinstance(node, nnx.Module) and callable(node):
                node.__class__ = _watched(type(node), "/".join(map(str, path)))
    return model


def _watched(base: type, path: str) -> type:
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        return _module(path, functools.partial(base.__call__, self), args, kwargs)

    return type(base.__name__, (base,), {"__call__": call})


def _module(path: str, call: Callable, args: tuple, kwargs: dict) -> Any:
    if _recorder is None:
        return call(*args, **kwargs)
    _recorder.running.append(path)
    args = _tapped_each(f"{path}:in", args)
    if path in _recorder.masked:
        result = _dropout(path, call, args, kwargs)
    else:
        result = call(*args, **kwargs)
    if isinstance(result, tuple):
        result = _tapped_each(f"{path}:out", result)
    else:
        (result,) = _tapped_each(path, (result,), "")
    _recorder.running.pop()
    return result


def _tapped_each(name: str, parts: tuple, form: str = "{}") -> tuple:
    return tuple(
        tap(name + form.format(i), x) if isinstance(x, jax.Array) else x
        for i, x in enumerate(parts)
    )


def _dropout(path: str, call: Callable, args: tuple, kwargs: dict) -> Any:
    """The call with its mask written down, which its output tells where its input is not 0.

    So 1 is put there for the call, and taken out again; neither has a gradient.
    """
    x, *more = args
    one = jax.lax.stop_gradient(jnp.where(x == 0, 1, 0).astype(x.dtype))
    result = call(x + one, *more, **kwargs)
    mask(path, result != 0)
    return result - jax.lax.stop_gradient(result) * one
