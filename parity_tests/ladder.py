"""The ladder: nine rungs, each of which measures both models and names what differs most."""

import contextlib
import dataclasses
import fnmatch
import functools
import itertools
import math
import typing
from collections.abc import Callable, Iterator, Mapping
from typing import Any
from unittest import mock

import flax.linen
import jax
import jax.numpy as jnp
import numpy as np
import optax
import torch

import torch_ref.loss
import torch_ref.model
import torch_ref.step
from jax_model5 import generate, kernels, layer_norm, losses, model, optimizer, programs, step
from jax_model5.config import MeshConfig, ModelConfig, OptimizerConfig, TrainConfig
from jax_model5.trees import table
from parity_tests import bridge, chance, memory
from portproof.port import BadInput
from portproof.report import FLOAT64_TOLERANCE, relative
from portproof.torch_side import Listener

DTYPES = ("float64", "float32")

# The largest errors allowed. float64 leaves rounding no room: what is above 1e-12 is a bug.
# Beside each: the worst error measured on a CPU, which it exceeds at most fourfold.
FLOAT32_TOLERANCES: dict[str, float] = {
    "2 operations": 6e-7,  # 2.1e-7
    "2 layer norm, mean 300": 6e-5,  # 2.6e-5
    "2 large scores": 3e-6,  # 1.0e-6
    "3 logits": 3e-6,  # 1.5e-6
    "4 loss": 4e-7,  # 2.3e-7
    "4 losses by position": 4e-7,  # 1.0e-7
    "5 gradients": 1.6e-5,  # 8.2e-6: 1.9e-14 in float64, both of the same cancellation
    "6 updates": 9e-5,  # 3.3e-5
    "7 trajectory": 4e-4,  # 2.7e-4
    "7 trajectory, dropout": 8e-5,  # 3.8e-5
    "8 train/eval": 4e-7,  # 3.0e-7
    "8 four devices": 4e-4,
}


@dataclasses.dataclass(frozen=True)
class Measurement:
    """The error of one comparison; `where` names the leaf or the operation."""

    rung: str
    dtype: str
    case: str
    where: str
    error: float  # ||ours - theirs|| / ||theirs||
    max_abs: float

    @property
    def tolerance(self) -> float:
        return tolerance(self.rung, self.dtype)

    @property
    def passed(self) -> bool:
        return self.error <= self.tolerance  # NaN fails

    def __str__(self) -> str:
        verb = "agrees" if self.passed else "DIFFERS"
        return (
            f"rung {self.rung} [{self.case}, {self.dtype}]: {self.where} {verb}: "
            f"error {self.error:.1e}, tolerance {self.tolerance:.1e}"
        )


def tolerance(rung: str, dtype: str) -> float:
    if rung in EXACT:
        return 0.0
    return FLOAT64_TOLERANCE if dtype == "float64" else FLOAT32_TOLERANCES[rung]


def max_abs(found: Any, expected: Any) -> float:
    """The largest difference of one element."""
    found, expected = np.asarray(found, np.float64), np.asarray(expected, np.float64)
    if found.shape != expected.shape:
        return np.inf
    return float(np.max(np.abs(found - expected), initial=0.0))


class Pair:
    """Both models with the same weights (random unless given), and windows [B, L + 1]."""

    def __init__(self, config: TrainConfig, params: Any = None):
        self.config = config
        self.n_layers = config.model.n_layers
        self.dtype = jnp.dtype(config.model.dtype)
        self.key = jax.random.key(config.seed)
        self.random = np.random.default_rng(config.seed)
        # Far from the init: biases, scales and every leaf's place matter. Smaller in a deep model,
        # as GPT-2's own init is, or each layer would multiply the rounding of those before it.
        scale = min(1.0, 3 / self.n_layers) ** 0.5
        mean, std = 0.1 * scale, 0.2 * scale
        self.params = self.random_tree(mean, std) if params is None else params
        self.windows = self._windows(config)
        self.torch_model = torch_ref.model.Model5(config.model).to(self.torch_dtype)
        bridge.load(self.torch_model, self.params, config.model)
        self.torch_model.eval()

    def _windows(self, config: TrainConfig) -> np.ndarray:
        """Random tokens; each of a small vocabulary is an input, for every row's gradient."""
        V, shape = config.model.vocab_size, (config.batch_size, config.model.seq_len)
        inputs = self.random.permutation(np.resize(np.arange(V), shape).ravel()).reshape(shape)
        last = self.random.integers(0, V, (config.batch_size, 1))
        return np.concatenate([inputs, last], axis=1).astype(np.int32)

    @property
    def torch_dtype(self) -> torch.dtype:
        return getattr(torch, self.config.model.dtype)

    def normal(self, *shape: int, mean: float = 0.0) -> tuple[np.ndarray, torch.Tensor]:
        """The same random array for both sides."""
        array = self.random.normal(mean, 1.0, shape).astype(self.dtype)
        return array, torch.from_numpy(array.copy())

    def random_tree(self, mean: float, std: float) -> Any:
        """Random values for every parameter."""
        return jax.tree.map(
            lambda leaf: self.random.normal(mean, std, leaf.shape).astype(self.dtype),
            _shapes(self.config.model),
        )

    def torch_params(self) -> Any:
        """PyTorch's parameters as a tree of JAX's."""
        return bridge.from_torch(self.named_parameters(), self.config.model)

    def named_parameters(self) -> dict[str, torch.nn.Parameter]:
        """PyTorch's counterparts of the JAX leaves."""
        return bridge.counterparts(self.torch_model, self.config.model)

    def state(self) -> step.TrainState:
        update = optimizer.optimizer(self.config.optimizer, self.config.steps)
        moving, _ = optimizer.split_frozen(self.params, self.config.optimizer)
        return step.TrainState(jnp.int32(0), self.params, jax.jit(update.init)(moving))

    def block_params(self, layer: int) -> Any:
        if layer == self.n_layers - 1:
            return self.params["last_block"]
        return jax.tree.map(lambda leaf: leaf[layer], self.params["trunk"])


def _shapes(config: ModelConfig) -> Any:
    """Of every leaf, whatever is dropped."""
    sites = ModelConfig().dropout_sites
    return _shapes_of(dataclasses.replace(config, dropout=0.0, dropout_sites=sites))


@functools.cache
def _shapes_of(config: ModelConfig) -> Any:
    return step.abstract_state(TrainConfig(model=config)).params


# ---- rungs --------------------------------------------------------------------------------------

# Each comparison: where, what we have, what PyTorch has (or what must be).
Comparisons = Iterator[tuple[str, Any, Any]]
_QKV_BIAS = "attn/qkv/bias"


def weights(config: TrainConfig) -> Comparisons:
    """JAX -> PyTorch -> JAX returns every leaf, bit for bit, and nothing else."""
    pair = Pair(config)
    for place in table(config.model, "torch_ref"):  # the table takes one for another both ways
        stack, _, path = place.path.partition("/")
        root = f"blocks.{place.layer if stack == 'trunk' else pair.n_layers - 1}."
        parts = f"{root}{path}" if stack in ("trunk", "last_block") else place.path
        name = parts.replace("/", ".").replace("kernel", "weight").replace("scale", "weight")
        expected = name if "." in name else f"{name}.weight"
        yield f"{place.name}, of {place.path}", place.name == expected, True
    extra = dict(pair.torch_model.named_parameters()).keys() ^ pair.named_parameters().keys()
    yield f"parameters {sorted(extra)}" if extra else "parameters", len(extra), 0
    back = bridge.flat(pair.torch_params())
    for name, leaf in bridge.flat(pair.params).items():
        yield name, back[name], leaf


def operations(config: TrainConfig) -> Comparisons:
    """Every operation of the forward pass on the same random inputs."""
    pair, c = Pair(config), config.model
    B, L, D = config.batch_size, c.seq_len, c.d_model
    theirs, block = pair.torch_model, pair.torch_model.blocks[0]
    tokens = torch.from_numpy(pair.windows[:, :-1])
    # layer norm at scale 1e-3, where a wrong epsilon shows
    inputs = [(scale * x, scale * y) for scale in (1.0, 1e-3) for x, y in [pair.normal(B, L, D)]]
    (x, torch_x), (small_x, torch_small_x) = inputs
    wide, torch_wide = pair.normal(B, L, 4 * D)
    expected = {
        "embedding": theirs.embed(tokens),
        "ln_1": block.ln_1(torch_x),
        "ln_2": block.ln_2(torch_small_x),
        "qkv": block.attn.qkv(torch_x),
        "proj": block.attn.proj(torch_x),
        "fc": block.fc(torch_x),
        "gelu": block.gelu(torch_x),
        "out": block.out(torch_wide),
        "attention": block.attn(torch_x),
        "block": block(torch_x),
        "head": theirs.logits(torch_x),
    }
    ours = _operations(pair.params, pair.block_params(0), tokens.numpy(), x, small_x, wide, config)
    for name, tensor in expected.items():
        yield name, ours[name], tensor.detach()


@functools.partial(jax.jit, static_argnames="config")
def _operations(
    params: Any,
    block: Any,
    tokens: jax.Array,
    x: jax.Array,
    small_x: jax.Array,
    wide: jax.Array,
    config: TrainConfig,
) -> dict[str, jax.Array]:
    c, L = config.model, x.shape[1]
    attention = block["attn"]

    def linear(params: Any, x: jax.Array) -> jax.Array:
        return model.Linear(c, params["kernel"].shape[1]).apply({"params": params}, x)

    return {
        "embedding": params["wte"][tokens] + params["wpe"][:L],
        "ln_1": model.LayerNorm(c).apply({"params": block["ln_1"]}, x),
        "ln_2": model.LayerNorm(c).apply({"params": block["ln_2"]}, small_x),
        "qkv": jnp.concatenate(model.QKV(c).apply({"params": attention["qkv"]}, x, L), -1),
        "proj": linear(attention["proj"], x),
        "fc": linear(block["fc"], x),
        "gelu": model.gelu(x, approximate=c.gelu == "tanh"),
        "out": linear(block["out"], wide),
        "attention": model.Attention(c).apply({"params": attention}, x, L, deterministic=True),
        "block": model.Block(c).apply({"params": block}, x, L, deterministic=True),
        "head": model.Model5(c).apply({"params": params}, x, method="logits"),
    }


def large_mean(config: TrainConfig) -> Comparisons:
    """Layer norm far from 0, where a one-pass variance E[x^2] - E[x]^2 loses its digits."""
    pair, c = Pair(config), config.model
    x, torch_x = pair.normal(config.batch_size, c.seq_len, c.d_model, mean=300.0)
    g, torch_g = pair.normal(*x.shape)
    of_x = functools.partial(model.LayerNorm(c).apply, {"params": pair.params["ln_f"]})
    ours, of_ours = _with_gradients(of_x, g, x)
    theirs = pair.torch_model.ln_f(torch_x.requires_grad_())
    theirs.backward(torch_g)
    yield "ln_f", ours, theirs.detach()
    yield "ln_f, backward", *of_ours, torch_x.grad


def _with_gradients(function: Callable, g: Any, *arguments: Any) -> tuple[Any, tuple]:
    """A function's result, and where the gradient g of it leads; by one program."""

    def both(g: Any, *arguments: Any) -> tuple[Any, tuple]:
        result, of_gradient = jax.vjp(function, *arguments)
        return result, of_gradient(g.astype(result.dtype))

    return jax.jit(both)(g, *arguments)


def large_scores(config: TrainConfig) -> Comparisons:
    """Scores and logits whose exponential is no number: their largest is to be taken off first.

    The logits are those of GPT-2's whole vocabulary, its last token among the targets.
    """
    pair, c = Pair(config), config.model
    size = 1000 if c.dtype == "float64" else 100
    (q, torch_q), (k, torch_k), (v, torch_v) = (
        pair.normal(1, c.n_heads, c.seq_len, c.d_model // c.n_heads) for _ in range(3)
    )
    expected = pair.torch_model.blocks[0].attn.attend(size * torch_q, torch_k, torch_v)
    attend = jax.jit(lambda *qkv: kernels.attend(*qkv, lambda weights: weights))
    yield "attention", attend(size * q, k, v), expected
    z, torch_z = pair.normal(1, 3, 50_257, mean=3.0 * size)
    targets = np.array([[0, 50_256, 7]])
    of_each = [
        torch_ref.loss.loss(torch_z[:, :n], torch.from_numpy(targets[:, :n]), 1) for n in (1, 2, 3)
    ]
    thirds = np.full(targets.shape, 1 / 3, c.dtype)  # the gradient of a mean
    ours, of_mean = _with_gradients(lambda z: losses.nll(z, jnp.asarray(targets)), thirds, z)
    yield "losses", ours, np.array([of_each])
    torch_ref.loss.loss(torch_z.requires_grad_(), torch.from_numpy(targets), 3).backward()
    yield "losses, backward", *of_mean, torch_z.grad


def logits(config: TrainConfig) -> Comparisons:
    """The logits of all positions, and of the last one on the suffix path."""
    pair = Pair(config)
    tokens = pair.windows[:, :-1]
    expected = pair.torch_model(torch.from_numpy(tokens)).detach()
    for name, n in (("logits, all positions", config.model.seq_len), ("logits, last position", 1)):
        ours = _logits(pair.params, tokens, config=config, n_last=n)
        yield name, ours, expected[:, -n:]
    n = config.model.seq_len - 2
    short = _logits(pair.params, tokens[:, :n], config=config, n_last=n)
    expected_short = pair.torch_model(torch.from_numpy(tokens[:, :n])).detach()
    yield "logits, of fewer tokens", short, expected_short
    pad_B = np.arange(len(tokens)) % 2  # prompts of two lengths
    padded = np.array([np.roll(row, pad) for row, pad in zip(tokens, pad_B, strict=True)])
    for name in ("wte", "head"):
        of = Pair(_with_model(config, tied_head=name == "wte"))
        head = generate.unstack(of.params, of.config.model)["head"]
        yield f"the head of a text is {name}", head, of.params[name]
    ours = _cached_logits(pair.params, padded, pad_B, config=config)
    first_Bx1 = (config.model.seq_len // 2 - 1 - pad_B)[:, None]
    rows_Bx1, position_BxP = np.indices(first_Bx1.shape)[0], first_Bx1 + np.arange(ours.shape[1])
    yield "logits, from the KV cache", ours, expected[rows_Bx1, position_BxP]
    x, table_VxD = pair.normal(2, 3, config.model.d_model)[0], pair.params["wte"]
    with mock.patch.object(kernels.sharding, "is_gpu", return_value=True):
        of_padded = kernels.matmul_transposed(x, table_VxD)
    yield "logits, of a table that is padded for a GPU", of_padded, x @ table_VxD.T


@functools.partial(jax.jit, static_argnames=("config", "n_last"))
def _logits(params: Any, tokens: jax.Array, *, config: TrainConfig, n_last: int) -> Any:
    return model.Model5(config.model).apply(
        {"params": params}, tokens, n_last=n_last, deterministic=True
    )


@functools.partial(jax.jit, static_argnames="config")
def _cached_logits(
    params: Any, tokens_BxL: jax.Array, pad_B: jax.Array, *, config: TrainConfig
) -> jax.Array:
    """As text is generated: after the first half at once, and in a loop after five more tokens."""
    unstacked, c = generate.unstack(params, config.model), config.model
    cache, half = generate.empty_cache(c, len(tokens_BxL), c.seq_len), c.seq_len // 2
    first_Bx1xD, cache = generate.extend(unstacked, cache, tokens_BxL[:, :half], 0, pad_B, 1, c)

    def one_more(cache: list, slot: jax.Array) -> tuple[list, jax.Array]:
        token_Bx1 = jax.lax.dynamic_slice_in_dim(tokens_BxL, slot, 1, axis=1)
        x_Bx1xD, cache = generate.extend(unstacked, cache, token_Bx1, slot, pad_B, 1, c)
        return cache, x_Bx1xD

    slots = jnp.arange(half, min(c.seq_len, half + 5))
    _, more_PxBx1xD = jax.lax.scan(one_more, cache, slots)
    parts = [generate.logits(unstacked, x_Bx1xD, c) for x_Bx1xD in (first_Bx1xD, *more_PxBx1xD)]
    return jnp.stack(parts, axis=1)


def position_losses(config: TrainConfig) -> Comparisons:
    """The NLL of each position on its own: a mean does not see rows in another order."""
    pair, L = Pair(config), config.model.seq_len
    B = ROWS + 1
    windows = np.resize(pair.windows, (B, L + 1))
    logits_BxLxV = pair.torch_model(torch.from_numpy(windows[:, :-1])).detach()
    targets_BxL = torch.from_numpy(windows[:, 1:])

    def of_one(b: int, t: int) -> torch.Tensor:
        rows = slice(b, b + 1)
        return torch_ref.loss.loss(logits_BxLxV[rows, : t + 1], targets_BxL[rows, : t + 1], 1)

    expected_BxL = np.array([[of_one(b, t) for t in range(L)] for b in range(B)])
    for name, n in (("final_token", 1), ("all_tokens", L), ("last_k", config.last_k)):
        of = dataclasses.replace(config, objective=name)
        yield f"positions of {name}", [losses.n_last(of), torch_ref.loss.n_last(of)], [n, n]
    # Each half of the attention one query; chunks of two positions with a rest; and of one, whose
    # rows are too many.
    parts = ((3, 1), (3, 2), (3, min(5, L)), (3, L), (B, L))
    found = _position_losses(pair.params, windows, config=config, parts=parts)
    for (rows, n), ours in zip(parts, found, strict=True):
        yield f"losses of the last {n} of {rows} rows", ours, expected_BxL[:rows, -n:]


@functools.partial(jax.jit, static_argnames=("config", "parts"))
def _position_losses(
    params: Any, windows: jax.Array, *, config: TrainConfig, parts: tuple[tuple[int, int], ...]
) -> list[jax.Array]:
    """Of each (rows, n) of `parts` the first rows' last n positions."""
    how = {"config": config, "deterministic": True}
    return [losses.position_losses(params, windows[:b], n_last=n, **how) for b, n in parts]


@functools.partial(jax.jit, static_argnames=("config", "n_last"))
def _dropped_losses(
    params: Any, windows: jax.Array, key: Any, *, config: TrainConfig, n_last: int
) -> jax.Array:
    how = {"n_last": n_last, "deterministic": False, "dropout_key": key}
    return losses.position_losses(params, windows, config, **how)


def loss(config: TrainConfig) -> Comparisons:
    """The objective's mean NLL."""
    pair = Pair(config)
    ours, _ = _loss_and_gradients(pair.state(), pair.key, pair.windows, config=config)
    yield f"{config.objective} loss", ours, _torch_loss(pair).detach()


def gradients(config: TrainConfig) -> Comparisons:
    """The gradient of every leaf: ||a - b|| / ||b||; that of the keys' bias is 0 on both sides.

    Of twice the loss, which is exact, so that a loss that is given counts.
    """
    pair = Pair(config)
    how = {"config": config, "loss": _twice}
    _, ours = _loss_and_gradients(pair.state(), pair.key, pair.windows, **how)
    (2 * _torch_loss(pair)).backward()
    theirs = {  # where none has come it is 0
        name: torch.zeros_like(tensor) if tensor.grad is None else tensor.grad
        for name, tensor in pair.named_parameters().items()
    }
    expected = bridge.flat(bridge.from_torch(theirs, config.model))
    for name, leaf in bridge.flat(ours).items():
        yield name, leaf, expected[name]
        if name.endswith(_QKV_BIAS):
            keys = [np.split(gradient, 3, axis=-1)[1] for gradient in (leaf, expected[name])]
            norm = np.linalg.norm(expected[name])
            yield f"{name}, keys", np.stack(keys) / norm, np.zeros((2, *keys[0].shape))


def _twice(logits_BxCxV: jax.Array, targets_BxC: jax.Array) -> jax.Array:
    return 2 * losses.nll(logits_BxCxV, targets_BxC)


_loss_and_gradients = jax.jit(step.loss_and_gradients, static_argnames=("config", "loss"))


def _torch_loss(pair: Pair) -> torch.Tensor:
    windows = torch.from_numpy(pair.windows)
    n = torch_ref.loss.n_last(pair.config)
    return torch_ref.loss.loss(pair.torch_model(windows[:, :-1]), windows[:, 1:], n)


def updates(config: TrainConfig) -> Comparisons:
    """Five updates from shared random gradients of a norm near 10: how far every leaf moved."""
    pair = Pair(config)
    theirs = torch_ref.step.make_optimizer(pair.torch_model, config.optimizer)
    scheduler = torch_ref.step.make_scheduler(theirs, config.optimizer, config.steps)
    params, state, parameters = pair.params, pair.state().opt_state, pair.named_parameters()
    windows, at_once = torch.from_numpy(pair.windows), dataclasses.replace(config, accumulate=1)
    for _ in range(config.steps):
        grads = pair.random_tree(mean=0.0, std=0.1)
        given = bridge.to_torch(grads, config.model)
        pair.torch_model.zero_grad()
        with mock.patch.object(torch_ref.step, "loss", _loss_of_gradients(parameters, given)):
            torch_ref.step.train_step(pair.torch_model, theirs, scheduler, windows, at_once)
        params, state = update(grads, state, params, config=config)
    yield from _moved(pair, params)


def schedules(config: TrainConfig) -> Comparisons:
    """Each kind after each warm-up, at every step and beyond the last: the benchmark goes on."""
    rate, counts = config.optimizer.learning_rate, np.arange(config.steps + 3)
    kinds = typing.get_args(typing.get_type_hints(OptimizerConfig)["schedule"])
    for kind, warmup in itertools.product(kinds, (0, 1, 2, config.steps)):
        update = dataclasses.replace(config.optimizer, schedule=kind, warmup_steps=warmup)
        ours = optimizer.schedule(update, config.steps)(counts) / rate
        theirs = [torch_ref.step.schedule(update, config.steps)(int(n)) for n in counts]
        yield f"{kind} after {warmup}", np.broadcast_to(ours, counts.shape), theirs


def _loss_of_gradients(parameters: Any, given: Any) -> Callable[..., torch.Tensor]:
    return lambda *_: sum((parameters[name] * gradient).sum() for name, gradient in given.items())


@functools.partial(jax.jit, static_argnames="config")
def update(grads: Any, state: Any, params: Any, *, config: TrainConfig) -> Any:
    update = optimizer.optimizer(config.optimizer, config.steps)
    changes, state = update.update(grads, state, params)
    return optax.apply_updates(params, changes), state


def _moved(pair: Pair, params: Any) -> Comparisons:
    """Errors relative to the distance from the start, so that standing still is an error of 1."""
    start, ours, theirs = map(without_keys_bias, (pair.params, params, pair.torch_params()))
    for name in start:
        yield name, ours[name] - start[name], theirs[name] - start[name]


def without_keys_bias(params: Any) -> dict[str, np.ndarray]:
    """Every leaf by its path; of the biases of q, k and v those of q and v.

    Softmax ignores a constant added to all scores of a query, so the true gradient of the keys'
    bias is 0 (rung 5 measures that), and what moves it is rounding noise divided by Adam's epsilon.
    """
    leaves = bridge.flat(params)
    for name in leaves:
        if name.endswith(_QKV_BIAS):
            leaves[name] = np.stack(np.split(leaves[name], 3, axis=-1)[::2])
    return leaves


def trajectory(config: TrainConfig) -> Comparisons:
    """`config.steps` optimizer steps of both loops; with dropout, on JAX's recorded masks."""
    pair = Pair(config)
    with jax.disable_jit(False):  # compiled, also where a single pass is not
        for index, (ours, theirs) in enumerate(train_both(pair)):
            for name in theirs.metrics:
                yield f"{name} of step {index + 1}", ours.metrics[name], theirs.metrics[name]
            kinds = set(map(type, theirs.metrics.values()))
            yield f"PyTorch's figures of step {index + 1} are floats", kinds == {float}, True
            if limit := config.optimizer.clip_norm:
                is_clipped = theirs.metrics["grad_norm"] > limit
                yield f"step {index + 1} is clipped", is_clipped, True
    yield from _moved(pair, ours.params)


@dataclasses.dataclass(frozen=True)
class Trained:
    """One side after a step: its metrics and its parameters."""

    metrics: Mapping[str, Any]
    params: Any


def train_both(
    pair: Pair, on_mesh: programs.Programs | None = None
) -> Iterator[tuple[Trained, Trained]]:
    """Steps of both loops on the same batches, and on the same masks where dropout is on.

    `on_mesh`: JAX's programs, if not those of one device.
    """
    config, of_step = pair.config, functools.partial(train_step, config=pair.config)
    for name in _frozen(config):
        pair.torch_model.get_parameter(name).requires_grad_(False)
    theirs = torch_ref.step.make_optimizer(pair.torch_model, config.optimizer)
    scheduler = torch_ref.step.make_scheduler(theirs, config.optimizer, config.steps)
    state = pair.state()
    if on_mesh:  # the state is donated; pair's parameters are NumPy's, and stay
        places = jax.tree.map(lambda leaf: leaf.sharding, on_mesh.abstract_state)
        state, of_step = jax.device_put(state, places), on_mesh.train_step
    for index in range(config.steps):
        windows = np.roll(pair.windows, index, axis=1)
        given = (on_mesh.key, on_mesh.to_devices(windows)) if on_mesh else (pair.key, windows)
        with _on_masks_of(pair, index, windows):
            state, ours = of_step(state, *given)
            expected = torch_ref.step.train_step(
                pair.torch_model, theirs, scheduler, torch.from_numpy(windows), config
            )
        expected["param_norm"] = torch_ref.step.param_norm(pair.torch_model)
        yield Trained(ours, state.params), Trained(expected, pair.torch_params())


def _frozen(config: TrainConfig) -> set[str]:
    """PyTorch's names of the leaves whose path is among the patterns."""
    places = table(config.model, "torch_ref")
    patterns = config.optimizer.freeze
    return {one.name for one in places if any(fnmatch.fnmatch(one.path, p) for p in patterns)}


@contextlib.contextmanager
def _on_masks_of(pair: Pair, index: int, windows: np.ndarray) -> Iterator[None]:
    """PyTorch's model drops what JAX drops in this step, micro-batch by micro-batch."""
    config = pair.config
    if config.model.dropout == 0:
        yield
        return
    masks = [
        bridge.masks_by_site(
            masks_of(
                pair.params,
                step.dropout_key(pair.key, index, micro),
                windows[micro :: config.accumulate],
                config=config,
            ),
            config.model,
        )
        for micro in range(config.accumulate)
    ]
    calls = {site: [of_micro[site] for of_micro in masks] for site in masks[0]}
    with Listener(wide=False, masks=calls).listening(pair.torch_model):
        yield


train_step = jax.jit(step.train_step, static_argnames="config")


def masks_of(params: Any, key: jax.Array, windows: jax.Array, *, config: TrainConfig) -> Any:
    """What JAX drops in a forward pass, one array a site."""
    return bridge.record_masks(_sown(params, key, windows, config=config))


@functools.partial(jax.jit, static_argnames="config")
def _sown(params: Any, key: jax.Array, windows: jax.Array, *, config: TrainConfig) -> Any:
    _, variables = model.Model5(config.model).apply(
        {"params": params},
        windows[:, :-1],
        n_last=losses.n_last(config),
        deterministic=False,
        rngs={"dropout": key},
        method="features",
        mutable=["masks"],
    )
    return variables["masks"]


def modes(config: TrainConfig) -> Comparisons:
    """`model.eval()` is `deterministic=True`, also in a model with dropout; train mode is not."""
    pair = Pair(config)
    windows = torch.from_numpy(pair.windows)
    ours = _eval_step(pair.params, pair.windows, config=config)
    pair.torch_model.train()
    expected = torch_ref.step.eval_step(pair.torch_model, windows, config)
    logits_BxLxV, targets_BxL = pair.torch_model(windows[:, :-1]).detach(), windows[:, 1:]
    for name, n in (("final_token_nll", 1), ("all_token_nll", config.model.seq_len)):
        of_last = torch_ref.loss.loss(logits_BxLxV, targets_BxL, n)
        yield f"eval mode: {name}", [ours[name], expected[name]], [of_last] * 2
    kinds = set(map(type, expected.values()))
    yield "eval mode: PyTorch's figures are floats", kinds == {float}, True
    if config.model.dtype != "float64":
        return  # what follows does not depend on the dtype
    of_step = functools.partial(step.train_step, config=config, loss=_twice)
    gradients = optimizer.split_frozen(pair.params, config.optimizer)[0]
    with mock.patch.object(step, "loss_and_gradients", return_value=(0.0, gradients)) as given:
        jax.eval_shape(of_step, pair.state(), pair.key, pair.windows)
    is_given = given.call_args.kwargs.get("loss") is _twice
    yield "train mode: the loss that is given counts", is_given, True
    if config.model.dropout == 0:
        return
    pair.torch_model.train()
    first, second = (pair.torch_model(windows[:, :-1]).detach() for _ in range(2))
    yield "train mode: PyTorch drops", torch.equal(first, second), False
    keys = [jax.random.key(seed) for seed in range(2)]
    n = losses.n_last(config)
    ours_BxN = [
        _dropped_losses(pair.params, pair.windows, key, config=config, n_last=n) for key in keys
    ]
    yield "deterministic=False: JAX drops", jnp.array_equal(*ours_BxN), False
    expected_key = pair.key
    for part in (step.DROPOUT, 70_000, 2):  # what it is for, the step, the micro-batch
        expected_key = jax.random.fold_in(expected_key, part)
    found = step.dropout_key(pair.key, 70_000, 2)
    yield "the dropout key", *map(jax.random.key_data, (found, expected_key))


_eval_step = jax.jit(step.eval_step, static_argnames="config")


def in_bfloat16(config: TrainConfig) -> Comparisons:
    """Whatever computes in float32 under bfloat16: at most its result is rounded, once."""
    pair, c = Pair(config), config.model
    B, L, D = config.batch_size, c.seq_len, c.d_model
    x, wide = (4 * pair.normal(*shape)[0] for shape in ((B, L, D), (B, L, 7 * D)))
    q, k, v = (
        pair.normal(B, c.n_heads, L, D // c.n_heads)[0].astype(jnp.bfloat16) for _ in range(3)
    )
    leaves = (pair.params["ln_f"][name].astype(jnp.float32) for name in ("scale", "bias"))
    norm = *leaves, model.LAYER_NORM_EPSILON
    targets = jnp.zeros((B, L), jnp.int32)

    def normal(x: jax.Array) -> jax.Array:
        return layer_norm.layer_norm(x, *norm)

    rounded = {
        "layer norm": (normal, x),
        "its gradient": (lambda x: jax.vjp(normal, x)[1](q.reshape(x.shape).astype(x.dtype))[0], x),
        "erf GELU": (lambda x: kernels.gelu(x, approximate=False), x),
        "loss": (lambda x: losses.nll(x, targets), wide),
    }
    for name, (function, argument) in rounded.items():
        low, function = argument.astype(jnp.bfloat16), jax.jit(function)
        exact = function(low.astype(float))
        yield f"{name} in bfloat16", _is_rounded_once(function(low), exact), True
    products = {"mi,io->mo": (x[0], wide[0, 1:, :D].T), "bhnk,bhlk->bhnl": (q, k)}
    products["bhnl,bhlk->bhnk"] = (q.astype(float) @ k.astype(float).swapaxes(2, 3), v)
    for (axes, pair_of), is_wide in itertools.product(products.items(), (False, True)):
        with mock.patch.object(kernels, "_is_float32_fast", lambda is_wide=is_wide: is_wide):
            is_right = _is_product_rounded_once(axes, *pair_of)
        form = "float32, cast" if is_wide else "bfloat16"
        yield f"product {axes} in {form}", is_right, True
    for is_cpu, is_wide in itertools.product((False, True), repeat=2):
        wide_or_not = "float32" if is_cpu and is_wide else "bfloat16"
        what = f"sums of a product in {wide_or_not} (CPU {is_cpu}, float32 fast {is_wide})"
        yield what, _sums_in(is_cpu, is_wide) == wide_or_not, True
    yield from _layer_norm_in_bfloat16(pair, x, q.reshape(x.shape))
    yield "softmax in bfloat16", _is_softmax_rounded_once(pair), True
    for what, is_right in _logits_in_bfloat16(x, pair.params["wte"]):
        yield what, is_right, True
    yield from _embedding_in_bfloat16(config)
    yield "gradients of micro-batches add up in float32", *_accumulated(config)
    yield "gradients reach the optimizer in float32", *_first_moment(config)
    for dtype in ("float32", "bfloat16"):
        of_dtype = dataclasses.replace(config, model=dataclasses.replace(c, dtype=dtype))
        leaves = jax.tree.leaves(step.abstract_state(of_dtype))
        kinds = {str(leaf.dtype) for leaf in leaves if jnp.issubdtype(leaf.dtype, jnp.floating)}
        yield f"weights and moments under {dtype} are float32", kinds == {"float32"}, True
        bound = model.Model5(of_dtype.model).bind({"params": pair.params})
        tables = bound.wte_VxD, bound.wpe_LxD, bound.head_VxD
        is_wide = {str(table.dtype) for table in tables} == {"float32"}
        yield f"both tables under {dtype} are float32", is_wide, True
        with torch_ref.step.autocast(torch.zeros(1), of_dtype):
            casts = torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu")
        is_cast = casts == (True, torch.bfloat16)
        yield f"PyTorch under {dtype} casts to bfloat16", is_cast, dtype == "bfloat16"


def _layer_norm_in_bfloat16(pair: Pair, x: np.ndarray, g: np.ndarray) -> Comparisons:
    """Its scale and bias are float32, as are their gradients."""
    low, params = x.astype(jnp.bfloat16), pair.params["ln_f"]
    leaves = [params[name].astype(jnp.float32) for name in ("scale", "bias")]
    of_module = model.LayerNorm(dataclasses.replace(pair.config.model, dtype="bfloat16"))

    def norm(x: np.ndarray, *leaves: jax.Array) -> jax.Array:
        return layer_norm.layer_norm(x, *leaves, model.LAYER_NORM_EPSILON)

    found = jax.jit(of_module.apply)({"params": params}, low)
    _, ours = _with_gradients(functools.partial(norm, low), g, *leaves)
    wide = functools.partial(norm, low.astype(float))
    of_wide, exact = _with_gradients(wide, g.astype(float), *leaves)
    yield "layer norm of float32's scale", _is_rounded_once(found, of_wide), True
    for name, one, right in zip(("scale", "bias"), ours, exact, strict=True):
        yield f"gradient of layer norm's {name} in float32", relative(one, right) < 1e-5, True


def _is_rounded_once(found: Any, exact: Any) -> bool:
    """To bfloat16 after float32: half a last place, and what float32's own rounding may add."""
    exact = np.asarray(exact, float)
    size = np.abs(exact)
    last_place = np.exp2(np.floor(np.log2(np.maximum(size, 1e-30))) - 7)
    allowed = 0.5 * last_place + 2.0**-20 * size.max()
    return bool((np.abs(np.asarray(found, float) - exact) <= allowed).all())


def _gradient_like(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    return np.cos(np.arange(math.prod(shape))).reshape(shape).astype(dtype)


def _is_softmax_rounded_once(pair: Pair) -> bool:
    """Of 300 positions: beyond 256 bfloat16 takes one for the next."""
    q, k, v = (pair.normal(1, 1, 300, 4)[0].astype(jnp.bfloat16) for _ in range(3))

    @jax.jit
    def weights(q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[jax.Array, jax.Array]:
        scores = kernels.product("bhnk,bhlk->bhnl", q, k) / math.sqrt(4)
        exact = jax.nn.softmax(jnp.where(jnp.tri(300) > 0, scores.astype(float), -jnp.inf))
        found: list[jax.Array] = []
        kernels.attend(q, k, v, lambda weights: found.append(weights) or weights)
        return found[0], exact

    return _is_rounded_once(*weights(q, k, v))


def _logits_in_bfloat16(x_BxLxD: np.ndarray, table_VxD: np.ndarray) -> Iterator[tuple[str, bool]]:
    """Of rounded factors, summed in float32, as is the table's gradient; that of x is rounded."""
    x, table = x_BxLxD.astype(jnp.bfloat16), table_VxD.astype(jnp.float32)
    g = _gradient_like((*x.shape[:2], len(table)), jnp.float32)
    found, (of_x, of_table) = _with_gradients(kernels.matmul_transposed, g, x, table)
    wide = (array.astype(jnp.bfloat16).astype(float) for array in (g, x, table))
    exact, exacts = _with_gradients(lambda x, table: x @ table.T, *wide)
    for what, ours, right in (("logits", found, exact), ("gradient of wte", of_table, exacts[1])):
        is_float32 = ours.dtype == jnp.float32 and relative(ours, right) < 1e-6
        yield f"{what} in float32", is_float32
    is_low = of_x.dtype == jnp.bfloat16
    yield "gradient of logits in bfloat16", is_low and _is_rounded_once(of_x, exacts[0])


def _embedding_in_bfloat16(config: TrainConfig) -> Comparisons:
    """Both tables' rows added in float32, and the gradients of one row's 64 times all positions."""
    pair = Pair(_with_model(config, dtype="float32", n_layers=1))
    bfloat16 = model.Model5(dataclasses.replace(pair.config.model, dtype="bfloat16"))
    tokens, heard = np.full((64, config.model.seq_len), 7), list[jax.Array]()

    def hear(next_fun: Callable, args: tuple, kwargs: dict, context: Any) -> Any:
        heard.extend(args if context.module.path == ("drop",) else ())
        return next_fun(*args, **kwargs)

    dtypes = set()

    def of_tables(wte: jax.Array, wpe: jax.Array) -> jax.Array:
        params = {"params": pair.params | {"wte": wte, "wpe": wpe}}
        with flax.linen.intercept_methods(hear):
            logits = bfloat16.apply(params, tokens, n_last=1, deterministic=True)
        dtypes.add(str(logits.dtype))
        return heard.pop()

    g = _gradient_like((*tokens.shape, config.model.d_model), jnp.bfloat16)
    found, (of_wte, of_wpe) = _with_gradients(of_tables, g, pair.params["wte"], pair.params["wpe"])
    yield "logits of the model in float32", dtypes == {"float32"}, True
    wte, wpe = (pair.params[name].astype(float) for name in ("wte", "wpe"))
    exact = np.broadcast_to(wte[7] + wpe, found.shape)
    yield "embedding in bfloat16", _is_rounded_once(found, exact), True
    of_rows = {"wte": (of_wte[7], g.astype(float).sum((0, 1)))}
    of_rows["wpe"] = of_wpe, g.astype(float).sum(0)
    for name, pair_of in of_rows.items():
        yield f"gradient of {name}'s rows in float32", relative(*pair_of) < 1e-5, True


def _accumulated(config: TrainConfig) -> tuple[bool, bool]:
    """Three gradients that no bfloat16 holds, each of a micro-batch."""
    low = dataclasses.replace(_with_model(config, dtype="bfloat16"), batch_size=3, accumulate=3)
    g_3x5 = jnp.asarray(np.sqrt(np.arange(1, 16, dtype=np.float32)).reshape(3, 5))

    def mean_loss(moving: dict, _: jax.Array, micro_batch: jax.Array) -> jax.Array:
        return (moving["w"] * g_3x5[micro_batch]).sum()

    of_all = jax.jit(functools.partial(step._over_micro_batches, mean_loss, config=low))
    _, found = of_all({"w": np.zeros(5, np.float32)}, np.zeros((3, 2), np.int32))
    return bool(relative(found["w"], g_3x5.mean(0)) < 1e-6), True


def _first_moment(config: TrainConfig) -> tuple[bool, bool]:
    """Of AdamW's after one step: a tenth of gradients that no bfloat16 holds."""
    low = dataclasses.replace(_with_model(config, dtype="bfloat16", n_layers=1), optimizer=ADAMW)
    pair = Pair(_with_model(low, dtype="float32"))
    gradients = pair.random_tree(mean=0.0, std=0.1)
    given = mock.patch.object(step, "loss_and_gradients", return_value=(0.0, gradients))
    with given:
        of_step = jax.jit(functools.partial(step.train_step, config=low))
        after, _ = of_step(pair.state(), pair.key, pair.windows)
    found = bridge.flat(optax.tree.get(after.opt_state, "mu"))
    errors = [relative(10 * found[path], g) for path, g in bridge.flat(gradients).items()]
    return max(errors) < 1e-6, True


def _is_product_rounded_once(axes: str, *factors: np.ndarray) -> bool:
    """And both of its gradients; all are bfloat16."""
    shape = jax.eval_shape(functools.partial(jnp.einsum, axes), *factors).shape
    low = [array.astype(jnp.bfloat16) for array in (_gradient_like(shape, float), *factors)]
    wide = [array.astype(float) for array in low]
    found, of_found = _with_gradients(functools.partial(kernels.product, axes), *low)
    exact, of_exact = _with_gradients(functools.partial(jnp.einsum, axes), *wide)
    pairs = zip((found, *of_found), (exact, *of_exact), strict=True)
    return all(one.dtype == jnp.bfloat16 and _is_rounded_once(one, right) for one, right in pairs)


def _sums_in(is_cpu: bool, is_wide: bool) -> str:
    """The dtype of a bfloat16 product's result before it is cast."""
    low = jnp.zeros((2, 2), jnp.bfloat16)
    with (
        mock.patch.object(kernels.sharding, "is_cpu", return_value=is_cpu),
        mock.patch.object(kernels, "_is_float32_fast", return_value=is_wide),
    ):
        traced = jax.make_jaxpr(functools.partial(kernels.product, "mi,io->mo"))(low, low)
    dots = [e for e in memory.equations(traced.jaxpr) if e.primitive.name == "dot_general"]
    return " ".join(str(one.outvars[0].aval.dtype) for one in dots)


def on_devices(config: TrainConfig) -> Comparisons:
    """Two steps and a test on 2 x 2 devices against PyTorch's; none where there are fewer.

    A leaf is frozen: it is placed, and gathered, by a way of its own.
    """
    if len(jax.devices()) < 4:
        return
    two_layers = dataclasses.replace(config.model, n_layers=2, remat="none")
    frozen = dataclasses.replace(config.optimizer, freeze=("wpe",))
    # 2 rows of a micro-batch on each device.
    mesh = {"mesh": MeshConfig(data=2, fsdp=2), "batch_size": 16, "accumulate": 2}
    config = dataclasses.replace(config, model=two_layers, steps=2, optimizer=frozen, **mesh)
    pair, four = Pair(config), programs.Programs(config)
    with jax.disable_jit(False):
        for index, (ours, theirs) in enumerate(train_both(pair, four)):
            for name in theirs.metrics:
                yield f"{name} of step {index + 1}", ours.metrics[name], theirs.metrics[name]
        batches = pair.windows, np.roll(pair.windows, 1, axis=1)
        tested = four.test(ours.params, [four.to_devices(batch) for batch in batches])
        both = [
            torch_ref.step.eval_step(pair.torch_model, torch.from_numpy(batch), config)
            for batch in batches
        ]
        for name in both[0]:
            yield f"tested: {name}", tested[name], sum(one[name] for one in both) / 2
    yield from _moved(pair, ours.params)
    four.config = dataclasses.replace(config, seed=7, prng="rbg")
    del four.key
    expected = jax.random.key(7, impl="rbg")
    yield "the run's key", *map(jax.random.key_data, (four.key, expected))


def dropout_by_chance(config: TrainConfig) -> Comparisons:
    """What either side drops on its own, by statistics."""
    pair = Pair(config)
    figures = [*chance.dropout_of_torch(pair.torch_model, config.model)]
    figures += chance.generators_of_jax(config.model.dropout)
    for n_layers in (4, 6):  # a trunk that is unrolled, and one that is scanned
        of = _with_model(config, n_layers=n_layers)
        figures += chance.dropout_of_jax(masks_of(*_many(of), config=of), of.model)
    for site in config.model.dropout_sites:
        of = _with_model(config, n_layers=1, dropout_sites=(site,))
        figures += chance.dropout_of_torch(torch_ref.model.Model5(of.model), of.model)
        masks = jax.eval_shape(functools.partial(_sown, config=of), *_many(of))
        figures += chance.only_site_of_jax(masks, site)
    figures += chance.own_masks_of_torch(pair.torch_model, lambda: _train_torch(pair))
    for figure in figures:
        yield figure.what, figure.deviates, False


def _many(config: TrainConfig) -> tuple[Any, jax.Array, np.ndarray]:
    """Parameters, a key, and 64 windows."""
    pair = Pair(config)
    windows = np.resize(pair.windows, (64, config.model.seq_len + 1))
    return pair.params, step.dropout_key(pair.key, 0, 0), windows


def _train_torch(pair: Pair) -> None:
    """Two steps of PyTorch's own."""
    theirs = torch_ref.step.make_optimizer(pair.torch_model, pair.config.optimizer)
    scheduler = torch_ref.step.make_scheduler(theirs, pair.config.optimizer, pair.config.steps)
    for _ in range(2):
        windows = torch.from_numpy(pair.windows)
        torch_ref.step.train_step(pair.torch_model, theirs, scheduler, windows, pair.config)


def _with_model(config: TrainConfig, **fields: Any) -> TrainConfig:
    return dataclasses.replace(config, model=dataclasses.replace(config.model, **fields))


def inits_by_chance(config: TrainConfig) -> Comparisons:
    """The initial weights of either side, by statistics."""
    for figure in chance.inits(config):
        yield figure.what, figure.deviates, False


RUNGS: dict[str, Callable[[TrainConfig], Comparisons]] = {
    "1 weights": weights,
    "2 operations": operations,
    "2 layer norm, mean 300": large_mean,
    "2 large scores": large_scores,
    "3 logits": logits,
    "4 loss": loss,
    "4 losses by position": position_losses,
    "5 gradients": gradients,
    "6 schedules": schedules,
    "6 updates": updates,
    "7 trajectory": trajectory,
    "7 trajectory, dropout": trajectory,
    "8 train/eval": modes,
    "8 bfloat16": in_bfloat16,
    "8 four devices": on_devices,
    "9 dropout, by chance": dropout_by_chance,
    "9 initial weights, by chance": inits_by_chance,
}
EXACT = ("1 weights", "8 bfloat16", "9 dropout, by chance", "9 initial weights, by chance")
ONCE = ("6 schedules", "8 bfloat16", "9 dropout, by chance", "9 initial weights, by chance")
ON_DEVICES = "8 four devices"  # the report's own, which has them
WITH_DROPOUT = ("7 trajectory, dropout", "8 train/eval", "9 dropout, by chance")


def measure(rung: str, case: str, config: TrainConfig) -> list[Measurement]:
    """Runs one rung at the config's dtype, and at the devices' full float32 precision."""
    dtype = config.model.dtype
    with exactly(dtype):
        try:
            comparisons = [
                (where, relative(found, expected), max_abs(found, expected))
                for where, found, expected in RUNGS[rung](config)
            ]
        except (bridge.Mismatch, BadInput) as mismatch:
            comparisons = [(str(mismatch), np.inf, np.inf)]
    return [Measurement(rung, dtype, case, *comparison) for comparison in comparisons]


@contextlib.contextmanager
def exactly(dtype: str) -> Iterator[None]:
    """JAX in this dtype, neither side on TF32, PyTorch's own dropout from one seed.

    Logits come in chunks of a few rows with a rest, as those of a full-size vocabulary do.
    """
    torch.manual_seed(0)
    torch.set_float32_matmul_precision("highest")
    in_chunks = mock.patch.object(losses, "ROWS", ROWS)
    with in_chunks, jax.enable_x64(dtype == "float64"), jax.default_matmul_precision("highest"):
        yield


ROWS = 7  # of logits at once: chunks of 2 positions at a batch of 3


# ---- cases --------------------------------------------------------------------------------------


ADAMW = OptimizerConfig(learning_rate=1e-3)


def case(
    dtype: str,
    objective: str = "final_token",
    batch_size: int = 3,
    steps: int = 5,
    accumulate: int = 1,
    optimizer: OptimizerConfig | None = None,
    **model_fields: Any,
) -> TrainConfig:
    # No two sizes that a mistake could take for each other are equal: H, K, L; D, K²; B, N; and
    # sqrt(D) is not D / 4, log2(D), H² or 2H, as that of 16 is.
    fields = {"vocab_size": 61, "seq_len": 9, "d_model": 22, "n_heads": 2, "n_layers": 3}
    fields |= {"dropout": 0.0, "dtype": dtype} | model_fields
    return TrainConfig(
        objective=objective,
        last_k=5,
        batch_size=batch_size,
        steps=steps,
        accumulate=accumulate,
        model=ModelConfig(**fields),
        optimizer=optimizer or ADAMW,
    )


SHAPES: dict[str, dict[str, Any]] = {
    "3 layers, 2 heads, L 9": {},
    "1 layer, 1 head, L 9, batch 1, tanh": {
        "n_layers": 1,
        "n_heads": 1,
        "batch_size": 1,
        "gelu": "tanh",
    },
    "3 layers, 1 head, L 65, unscaled logits": {
        "n_heads": 1,
        "seq_len": 65,
        "scale_logits": False,
        "batch_size": 1,
    },
    "1 layer, 2 heads, L 256": {"n_layers": 1, "seq_len": 256},
    "3 layers, 2 heads, L 256, tanh": {"seq_len": 256, "gelu": "tanh", "batch_size": 1},
    "2 layers, 4 heads, L 33, width 64": {
        "n_layers": 2,
        "n_heads": 4,
        "seq_len": 33,
        "d_model": 64,
    },
}
# Every rung with each GELU, each head, and trunks of 2 layers (unrolled) and of 7 (scanned, as the
# full size is): the full size's own choice, and four of the eight that show each pair together.
VARIANTS: dict[str, dict[str, Any]] = {
    f"{n_layers} layers, {gelu}, {'tied' if tied else 'untied'}": {
        "n_layers": n_layers,
        "gelu": gelu,
        "tied_head": tied,
    }
    for n_layers, gelu, tied in (
        (8, "erf", True),
        (8, "erf", False),
        (8, "tanh", True),
        (3, "erf", True),
        (3, "tanh", False),
    )
}
OBJECTIVES = ("final_token", "all_tokens", "last_k")
OPTIMIZERS: dict[str, OptimizerConfig] = {
    "adamw": ADAMW,
    "adamw, cosine, warm-up, clipped": dataclasses.replace(
        ADAMW, schedule="cosine", warmup_steps=2, clip_norm=0.5
    ),
    "adam, other moments, linear at once, clipped": dataclasses.replace(
        ADAMW,
        name="adam",
        b1=0.8,
        b2=0.95,
        eps=1e-3,
        schedule="linear",
        weight_decay=0.1,
        clip_norm=0.5,
    ),
    "adamw, linear after one step, other moments": dataclasses.replace(
        ADAMW, b1=0.8, b2=0.95, eps=1e-3, weight_decay=0.1, schedule="linear", warmup_steps=1
    ),
    "adamw without decay or momentum": dataclasses.replace(ADAMW, b1=0.0, weight_decay=0.0),
    "sgd, momentum, linear after one step, a limit above": OptimizerConfig(
        name="sgd",
        learning_rate=0.1,
        schedule="linear",
        warmup_steps=1,
        weight_decay=0.1,
        clip_norm=100.0,
    ),
    "sgd, cosine at once, clipped": OptimizerConfig(
        name="sgd", learning_rate=0.1, b1=0.0, weight_decay=0.1, schedule="cosine", clip_norm=0.5
    ),
}


OF_A_SHAPE = (
    "1 weights",
    "2 operations",
    "2 layer norm, mean 300",
    "2 large scores",
    "3 logits",
)


def cases(dtype: str) -> Iterator[tuple[str, str, TrainConfig]]:
    """(rung, case, config) of the whole ladder: every objective, on the two outer shapes all."""
    for index, (name, fields) in enumerate(SHAPES.items()):
        for rung in OF_A_SHAPE:
            yield rung, name, case(dtype, **fields)
        is_outer = index in (0, len(SHAPES) - 1)
        for objective in OBJECTIVES if is_outer else [OBJECTIVES[index % 3]]:
            for rung in ("4 loss", "5 gradients"):
                yield rung, f"{name}, {objective}", case(dtype, objective, **fields)
    for name, update in OPTIMIZERS.items():
        yield "6 updates", name, case(dtype, optimizer=update, n_layers=2)
    yield from _trajectories(dtype)
    for rung in ("8 train/eval", *(ONCE if dtype == "float64" else ())):
        yield rung, "dropout 0.1", case(dtype, dropout=0.1)
    variants = list(VARIANTS.items())
    for name, fields in variants if dtype == "float64" else variants[:1]:
        for rung in (rung for rung in RUNGS if rung not in (*ONCE, ON_DEVICES)):
            dropout = 0.1 if rung in WITH_DROPOUT else 0.0
            yield rung, name, case(dtype, "last_k", steps=20, dropout=dropout, **fields)


def _trajectories(dtype: str) -> Iterator[tuple[str, str, TrainConfig]]:
    first, *_, last = SHAPES
    paths = [(first, "all_tokens"), (last, "final_token")]
    if dtype == "float64":
        paths += [(first, "final_token"), (last, "last_k")]
    for shape, objective in paths:
        for rate, rung in ((0.0, "7 trajectory"), (0.1, "7 trajectory, dropout")):
            config = case(dtype, objective, steps=20, dropout=rate, **SHAPES[shape])
            yield rung, f"{shape}, {objective}", config
    if dtype == "float64":
        for other in ("attention", "attention_output"):  # any two sites swapped show
            sites = {"dropout": 0.1, "dropout_sites": ("embedding", other)}
            two = case(dtype, "all_tokens", steps=20, **sites)
            yield "7 trajectory, dropout", f"embedding and {other}", two
    accumulated = case(dtype, "all_tokens", 6, steps=20, accumulate=3)
    yield "7 trajectory", "accumulated over 3 micro-batches", accumulated


def smallest(rung: str) -> TrainConfig:
    """The float64 case that a planted fault must fail."""
    rate = 0.1 if rung in WITH_DROPOUT else 0.0
    update = dataclasses.replace(ADAMW, clip_norm=0.5) if rung == "6 updates" else ADAMW
    return case("float64", dropout=rate, optimizer=update)
