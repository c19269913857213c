"""The output of every operation and its gradient, tapped from both models as they stand.

Nothing in the models knows of it: Flax's method interceptors and PyTorch's module hooks see each
module's input and output, and q, k, v, the attention weights and the rest are among them.
"""

import functools
from collections.abc import Callable, Mapping
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

# operation: the JAX module, the end of it that is tapped, the PyTorch module, the end of it.
# The ends: "in" its first argument, "out" its result; a number picks one of several.
BLOCK_TAPS = {
    "ln_1": ("ln_1", "out", "ln_1", "out"),
    "q": ("attn/qkv", 0, "attn.attend", 0),
    "k": ("attn/qkv", 1, "attn.attend", 1),
    "v": ("attn/qkv", 2, "attn.attend", 2),
    "attention weights": ("attn/drop", "out", "attn.attend", "weights"),
    "attention": ("attn/proj", "in", "attn.proj", "in"),
    "proj": ("attn/proj", "out", "attn.proj", "out"),
    "attention residual": ("ln_2", "in", "ln_2", "in"),
    "ln_2": ("ln_2", "out", "ln_2", "out"),
    "fc": ("fc", "out", "fc", "out"),
    "gelu": ("out", "in", "out", "in"),
    "out": ("out", "out", "out", "out"),
    "MLP residual": ("", "out", "", "out"),
}
ROOT_TAPS = {
    "embedding": ("drop", "in", "drop", "in"),
    "embedding dropout": ("drop", "out", "drop", "out"),
    "ln_f": ("ln_f", "out", "ln_f", "out"),
    "logits": ("", "logits", "", "out"),
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
    shapes = jax.eval_shape(functools.partial(_run, config), pair.params, windows, key, {})[1]
    zeros = {}
    for path, leaf in leaves_of(shapes).items():
        where, slash, name = path.rpartition("/")
        if name in _TAP_NAMES:
            zeros[f"{where}{slash}d {name}"] = jax.tree.map(
                lambda s: jnp.zeros(s.shape, s.dtype), leaf
            )
    tapped = jax.jit(jax.value_and_grad(functools.partial(_run, config), argnums=3, has_aux=True))
    (loss, values), gradients = tapped(pair.params, windows, key, tree_of(zeros))
    flat_values = leaves_of(values)
    masks = {path: leaf for path, leaf in flat_values.items() if path.endswith("keep")}
    masks = bridge.record_masks({"masks": tree_of(masks)})
    deltas = {
        path.replace("/d ", "/").removeprefix("d "): leaf
        for path, leaf in leaves_of(gradients).items()
    }
    outputs = _by_operation(flat_values, config) | {"loss": np.asarray(loss).reshape(1, 1)}
    return outputs, _by_operation(deltas, config), masks


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
    ends = {end: name for name, (where, end, *_) in table.items() if where == path}
    if context.method_name == "logits":
        return _tap(module, ends["logits"], next_fun(*args, **kwargs))
    if context.method_name != "__call__" or not ends:
        return next_fun(*args, **kwargs)
    if "in" in ends:
        args = (_tap(module, ends["in"], args[0]), *args[1:])
    result = next_fun(*args, **kwargs)
    if "out" in ends:
        return _tap(module, ends["out"], result)
    if 0 in ends:
        return tuple(_tap(module, ends[i], part) for i, part in enumerate(result))
    return result


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
        array = np.asarray(bridge.join_halves(sown, padding=0))
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
    if config.model.dropout:
        bridge.replay_masks(theirs, masks, config.model)
        theirs.train()
    tensors: dict[str, torch.Tensor] = {}
    hooks = []
    for layer, block in enumerate(theirs.blocks):
        taps = {f"block {layer}: {name}": tap[2:] for name, tap in BLOCK_TAPS.items()}
        for name, tap in taps.items():
            hooks += _hooks(block, name, *tap, tensors)
    for name, tap in ROOT_TAPS.items():
        hooks += _hooks(theirs, name, *tap[2:], tensors)
    windows = torch.from_numpy(pair.windows)
    n = torch_ref.loss.n_last(config)
    loss = torch_ref.loss.loss(theirs(windows[:, :-1]), windows[:, 1:], n)
    loss.backward()
    for hook in hooks:
        hook.remove()
    values = {name: tensor.detach().numpy() for name, tensor in tensors.items()}
    gradients = {
        name: np.zeros_like(values[name]) if tensor.grad is None else tensor.grad.numpy()
        for name, tensor in tensors.items()
    }
    values["loss"] = loss.detach().reshape(1, 1).numpy()
    return _as_jax_lays_out(values, gradients)


def _hooks(root: torch.nn.Module, name: str, path: str, end: Any, tensors: dict) -> list:
    try:
        return [_hook(root.get_submodule(path), name, end, tensors)]
    except AttributeError:  # gone, or under another name: the report says so
        return []


def _hook(module: torch.nn.Module, name: str, end: Any, tensors: dict) -> Any:
    def keep(tensor: torch.Tensor) -> None:
        if tensor.requires_grad:
            tensor.retain_grad()
        tensors[name] = tensor

    def keep_alias(_: Any, args: tuple) -> tuple:
        """Keeps the gradient of this use of the tensor, not of others of the same tensor."""
        alias = args[0].view_as(args[0])
        keep(alias)
        return alias, *args[1:]

    if end == "in":
        return module.register_forward_pre_hook(keep_alias)
    if end == "out":
        return module.register_forward_hook(lambda _, args, result: keep(result))
    if end == "weights":
        return module.register_forward_hook(
            lambda _, args, result: keep(_weights(module, *args, result))
        )
    return module.register_forward_pre_hook(lambda _, args: keep(args[end]))


def _weights(module: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, y: Any) -> Any:
    """What the module itself multiplies v by: its result for v = identity.

    The weights' gradient is that of y times v^T: they are not in the graph of the loss.
    """
    L = k.shape[2]
    with torch.no_grad():
        ones = torch.eye(L, dtype=v.dtype, device=v.device).expand(*v.shape[:2], L, L)
        weights = type(module).forward(module, q, k, ones)
    y.register_hook(lambda gradient: setattr(weights, "grad", gradient @ v.detach().mT))
    return weights


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
