"""Taps and masks on the JAX side: the value on the way forward, its gradient on the way back.

A tap is the identity. Run alone it hands over its argument; differentiated, its cotangent. Calls
come as a loop makes them, cotangents in the opposite order, also if it is unrolled or in remat.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import flax.linen
import jax
import jax.numpy as jnp
import numpy as np

from portproof.port import Pass

_found: Pass | None = None
zero: Any = 0.0  # all taps are functions of it, and none uses the value


@contextlib.contextmanager
def recording(found: Pass) -> Iterator[None]:
    """Taps write to it, and Linen's modules are tapped; what runs is done when it ends."""
    global _found, zero
    _found = found
    try:
        with flax.linen.intercept_methods(_linen):
            yield
            jax.effects_barrier()
    finally:
        _found, zero = None, 0.0


def tap(name: str, x: Any) -> Any:
    """`x` itself, tapped under this name where the port's table asks for it."""
    if _found is None or not isinstance(x, jax.Array):
        return x
    _found.seen.add(name)
    if name not in _found.wanted:
        return x
    if jnp.issubdtype(x.dtype, jnp.floating):
        return _tapped(name, x, zero)
    _hand_over("values", name, x)
    return x


def mask(name: str, keep: Any) -> Any:
    """`keep` itself (True where dropout keeps), for PyTorch to drop by too."""
    return tap(f"{name}:mask", keep)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _tapped(name: str, x: jax.Array, zero: jax.Array) -> jax.Array:
    """`zero` is differentiated, so that the gradient comes here also where x stops it."""
    _hand_over("values", name, x)
    return x


def _backward(name: str, zero: jax.Array, g: jax.Array) -> tuple[jax.Array, jax.Array]:
    _hand_over("gradients", name, g)
    return g, zero


_tapped.defvjp(lambda name, x, zero: (x, zero), _backward)


def _hand_over(kind: str, name: str, x: jax.Array) -> None:
    def write(array: Any) -> None:
        if _found is not None:
            getattr(_found, kind)[name].append(np.array(array))

    jax.debug.callback(write, x, ordered=True)


def _linen(call: Callable, args: tuple, kwargs: dict, context: Any) -> Any:
    if context.method_name != "__call__":
        return call(*args, **kwargs)
    return _module("/".join(context.module.path), call, args, kwargs)


def watch(model: Any) -> Any:
    """An NNX model whose modules are tapped by their paths; outside a proof the model itself."""
    from flax import nnx  # a quarter of a second, for those who use it only

    if _found is not None:
        for path, node in list(nnx.iter_graph(model)):
            if isinstance(node, nnx.Module) and callable(node):
                node.__class__ = _watched(type(node), "/".join(map(str, path)))
    return model


def _watched(base: type, path: str) -> type:
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        return _module(path, functools.partial(base.__call__, self), args, kwargs)

    return type(base.__name__, (base,), {"__call__": call})


def _module(path: str, call: Callable, args: tuple, kwargs: dict) -> Any:
    if _found is None:
        return call(*args, **kwargs)
    _found.running.append(path)
    args = tuple(tap(f"{path}:in{i}", x) for i, x in enumerate(args))
    if f"{path}:mask" in _found.wanted:
        call = functools.partial(_dropout, path, call)
    result = call(*args, **kwargs)
    _found.running.pop()
    if type(result) is tuple:  # a named one is the model's own
        return tuple(tap(f"{path}:out{i}", x) for i, x in enumerate(result))
    return tap(path, result)


def _dropout(path: str, call: Callable, x: jax.Array, *args: Any, **kwargs: Any) -> Any:
    """The call with its mask written down, which its output tells where its input is not 0.

    So 1 is put there for the call, and taken out again; neither has a gradient.
    """
    one = jax.lax.stop_gradient(jnp.where(x == 0, 1, 0).astype(x.dtype))
    result = call(x + one, *args, **kwargs)
    mask(path, result != 0)
    return result - jax.lax.stop_gradient(result) * one
