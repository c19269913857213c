"""The output of every operation and its gradient, tapped from both models as they stand.

Nothing in the models knows of it: Flax's method interceptors and portproof's hooks see each
module's input and output, and q, k, v, the attention weights and the rest are among them. JAX's
are sown, not handed to portproof's callbacks: JAX's cache keeps no program that calls back.
"""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import flax.linen
import jax
import jax.numpy as jnp
import numpy as np
import torch

import torch_ref.loss
from jax_model5 import losses, model, step
from jax_model5.config import TrainConfig
from jax_model5.trees import leaves_of, tree_of
from parity_tests import bridge
from parity_tests.ladder import Pair
from portproof.port import Pass
from portproof.torch_side import Listener

# operation: JAX's place, PyTorch's place, as portproof names them: "ln_1" is a module's output,
# "ln_2:in0" its first argument, "attn/qkv:out1" its second result.
BLOCK_TAPS = {
    "ln_1": ("ln_1", "ln_1"),
    "q": ("attn/qkv:out0", "attn.attend:in0"),
    "k": ("attn/qkv:out1", "attn.attend:in1"),
    "v": ("attn/qkv:out2", "attn.attend:in2"),
    "attention weights": ("attn/drop", "attn.attend:weights"),
    "attention": ("attn/proj:in0", "attn.proj:in0"),
    "proj": ("attn/proj", "attn.proj"),
    "attention residual": ("ln_2:in0", "ln_2:in0"),
    "ln_2": ("ln_2", "ln_2"),
    "fc": ("fc", "fc"),
    "gelu": ("out:in0", "out:in0"),
    "out": ("out", "out"),
    "MLP residual": ("", ""),
}
ROOT_TAPS = {
    "embedding": ("drop:in0", "drop:in0"),
    "embedding dropout": ("drop", "drop"),
    "ln_f": ("ln_f", "ln_f"),
    "logits": ("logits", ""),
}
# Whose backward pass a gradient comes out of, where that is not the next operation.
CONSUMERS = {
    "q": "attention weights",
    "k": "attention weights",
    "v": "attention",
    "ln_1": "q, k, v",
}

Values = dict[str, np.ndarray]


def names(n_layers: int) -> list[str]:
    """Every operation, in the order in which the forward pass reaches it."""
    blocks = [f"block {layer}: {name}" for layer in range(n_layers) for name in BLOCK_TAPS]
    return ["embedding", "embedding dropout", *blocks, "ln_f", "logits", "loss"]


def consumer(name: str, order: list[str]) -> str:
    """The operation whose backward pass computes the gradient of `name`'s output."""
    block, colon, operation = name.rpartition(": ")
    if operation in CONSUMERS:
        return f"{block}{colon}{CONSUMERS[operation]}"
    return order[order.index(name) + 1]


# ---- JAX ----------------------------------------------------------------------------------------


@functools.cache  # PyTorch's faults leave it as it is
def of_jax(config: TrainConfig) -> tuple[Values, Values, Any]:
    """Each operation's output, its gradient, and the dropout masks that were drawn."""
    pair = Pair(config)
    windows = jnp.asarray(pair.windows)
    key = step.dropout_key(pair.key, 0, 0)
    tapped = jax.jit(jax.value_and_grad(functools.partial(_run, config), argnums=3, has_aux=True))
    off = dataclasses.replace(config.model, dropout=0.0)  # taps have the same shapes
    zeros = _zeros(dataclasses.replace(config, model=off))
    (loss, values), gradients = tapped(pair.params, windows, key, tree_of(zeros))
    flat_values = leaves_of(values)
    masks = {path: leaf for path, leaf in flat_values.items() if path.endswith("keep")}
    masks = bridge.record_masks(tree_of(masks))
    deltas = {
        path.replace("/d ", "/").removeprefix("d "): leaf
        for path, leaf in leaves_of(gradients).items()
    }
    outputs = _by_operation(flat_values, config) | {"loss": np.asarray(loss).reshape(1, 1)}
    return outputs, _by_operation(deltas, config), masks


@functools.cache
def _zeros(config: TrainConfig) -> dict[str, Any]:
    """To be added to the taps, by their paths."""
    pair, of_run = Pair(config), functools.partial(_run, config)
    _, shapes = jax.eval_shape(of_run, pair.params, pair.windows, pair.key, {})
    zeros = {}
    for path, leaf in leaves_of(shapes).items():
        where, slash, name = path.rpartition("/")
        if name in _TAP_NAMES:
            zeros[f"{where}{slash}d {name}"] = jax.tree.map(_zeros_like, leaf)
    return zeros


def _zeros_like(leaf: jax.ShapeDtypeStruct) -> np.ndarray:
    return np.zeros(leaf.shape, leaf.dtype)


def _run(config: TrainConfig, params: Any, windows: jax.Array, key: jax.Array, deltas: Any) -> Any:
    """The loss with `deltas` added to the taps, so that their gradients are the taps'."""
    n = losses.n_last(config)
    # `masks` is the one collection that the scanned trunk carries besides its parameters.
    with flax.linen.intercept_methods(_intercept):
        logits, variables = model.Model5(config.model).apply(
            {"params": params, "masks": deltas},
            windows[:, :-1],
            n_last=n,
            deterministic=config.model.dropout == 0,
            rngs={"dropout": key},
            mutable=["masks"],
        )
    return losses.nll(logits, windows[:, -n:]).mean(), variables["masks"]


_TAP_NAMES = {*BLOCK_TAPS, *ROOT_TAPS}


def _intercept(next_fun: Callable, args: tuple, kwargs: dict, context: Any) -> Any:
    module = context.module
    stack, _, path = "/".join(module.path).partition("/")
    table = BLOCK_TAPS if stack in ("trunk", "last_block") else ROOT_TAPS
    path = path if table is BLOCK_TAPS else stack
    names = {ours: name for name, (ours, _) in table.items()}

    def tap(place: str, x: Any) -> Any:
        return _tap(module, names[place], x) if place in names else x

    if context.method_name == "logits":
        return tap("logits", next_fun(*args, **kwargs))
    if context.method_name != "__call__":
        return next_fun(*args, **kwargs)
    args = tuple(tap(f"{path}:in{i}", x) for i, x in enumerate(args))
    result = next_fun(*args, **kwargs)
    if isinstance(result, tuple):
        return tuple(tap(f"{path}:out{i}", x) for i, x in enumerate(result))
    return tap(path, result)


def _tap(module: Any, name: str, value: jax.Array) -> jax.Array:
    calls = module.get_variable("masks", name, ())
    deltas = module.get_variable("masks", f"d {name}", None)
    value = value if deltas is None else value + deltas[len(calls)]
    module.sow("masks", name, value)
    return value


def _by_operation(leaves: Mapping[str, tuple], config: TrainConfig) -> Values:
    values = {}
    for path, sown in leaves.items():
        where, _, name = path.rpartition("/")
        if name not in _TAP_NAMES:
            continue
        array = bridge.join_halves(sown, padding=0)
        if where.startswith("trunk"):
            values |= {f"block {layer}: {name}": part for layer, part in enumerate(array)}
        elif where.startswith("last_block"):
            values[f"block {config.model.n_layers - 1}: {name}"] = array
        else:
            values[name] = array
    return values


# ---- PyTorch ------------------------------------------------------------------------------------


def of_torch(pair: Pair, masks: Any) -> tuple[Values, Values]:
    """Each operation's output and its gradient; with dropout, on the masks given."""
    config, theirs = pair.config, pair.torch_model
    calls = {}
    if config.model.dropout:
        theirs.train()
        sites = bridge.masks_by_site(masks, config.model)
        # Attention drops twice: what it makes of v, and the weights by themselves.
        calls = {site: [mask] * (1 + site.endswith("attend")) for site, mask in sites.items()}
    places = _torch_places(config.model.n_layers)
    listener = Listener(wide=False, wanted=places.values(), masks=calls)
    windows, found = torch.from_numpy(pair.windows), listener.found
    n = torch_ref.loss.n_last(config)
    # In this order: the weights are made while the listener knows that their module runs.
    with _weights_tapped(theirs, found), listener.listening(theirs):
        loss = torch_ref.loss.loss(theirs(windows[:, :-1]), windows[:, 1:], n)
        if getattr(loss, "requires_grad", False) and loss.ndim == 0:  # else all gradients are 0
            loss.backward()
    values, gradients = (
        {name: calls[place][-1] for name, place in places.items() if calls.get(place)}
        for calls in (found.values, found.gradients)
    )
    if torch.is_tensor(loss):
        values["loss"] = loss.detach().reshape(1, -1).numpy()
    return _as_jax_lays_out(values, gradients)


def _torch_places(n_layers: int) -> dict[str, str]:
    return {name: theirs for name, (_, theirs) in ROOT_TAPS.items()} | {
        f"block {layer}: {name}": f"blocks.{layer}.{theirs}".removesuffix(".")
        for layer in range(n_layers)
        for name, (_, theirs) in BLOCK_TAPS.items()
    }


@contextlib.contextmanager
def _weights_tapped(model: torch.nn.Module, found: Pass) -> Iterator[None]:
    """What each attention multiplies v by: its result for v = identity.

    The weights' gradient is that of the result times v^T: they are not in the graph of the loss.
    """

    def hook(path: str, module: Any, args: tuple, y: torch.Tensor) -> None:
        q, k, v = args
        L, place = k.shape[2], f"{path}:weights"
        with torch.no_grad():
            identity = torch.eye(L, dtype=v.dtype).expand(*v.shape[:2], L, L)
            weights = type(module).forward(module, q, k, identity).numpy()
        found.values[place].append(weights)
        found.gradients[place].append(np.zeros_like(weights))

        def write(gradient: torch.Tensor) -> None:
            found.gradients[place][-1] = (gradient @ v.detach().mT).numpy()

        if y.requires_grad:
            y.register_hook(write)

    hooks = [
        module.register_forward_hook(functools.partial(hook, path))
        for path, module in model.named_modules()
        if path.endswith(".attend")
    ]
    try:
        yield
    finally:
        for one in hooks:
            one.remove()


def _as_jax_lays_out(values: Values, gradients: Values) -> tuple[Values, Values]:
    """q, k, v [B, H, L, K] as [B, L, D]; masked weights reach nothing, so their gradient is 0."""
    for name in list(values):
        operation = name.rpartition(": ")[2]
        if operation in ("q", "k", "v"):
            for part in (values, gradients):
                B, H, L, K = part[name].shape
                part[name] = part[name].transpose(0, 2, 1, 3).reshape(B, L, H * K)
        if operation == "attention weights":
            gradients[name] = np.tril(gradients[name])
    return values, gradients
