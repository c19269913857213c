"""`TrainState`, and the pure functions that make it, move it one step, and evaluate it."""

import functools
from collections.abc import Callable

import flax.struct
import jax
import jax.numpy as jnp
import optax

from jax_model5 import sharding
from jax_model5.config import TEST_METRICS, TrainConfig
from jax_model5.kernels import at_least_float32
from jax_model5.losses import Loss, n_last, nll, position_losses
from jax_model5.model import Model5
from jax_model5.optimizer import optimizer, schedule, split_frozen
from jax_model5.trees import merge

INIT, DROPOUT, SAMPLE = range(3)  # what a key is for: folded into the run's one key


@flax.struct.dataclass
class TrainState:
    """All that a step changes; `step` counts the updates made."""

    step: jax.Array
    params: dict
    opt_state: optax.OptState


def init_state(key: jax.Array, *, config: TrainConfig) -> TrainState:
    """The state before the first step, a function of the run's key."""
    tokens_BxL = jnp.zeros((1, config.model.seq_len), jnp.int32)
    variables = Model5(config.model).init(
        jax.random.fold_in(key, INIT), tokens_BxL, n_last=1, deterministic=True
    )
    params = variables["params"]
    moving, _ = split_frozen(params, config.optimizer)
    opt_state = optimizer(config.optimizer, config.steps).init(moving)
    return TrainState(jnp.zeros((), jnp.int32), params, opt_state)


@functools.cache
def abstract_state(config: TrainConfig) -> TrainState:
    """The shape and dtype of every leaf of a run's state, without a device.

    Raises:
      UserError: `freeze` names no parameter, or all of them.
    """

    def init(seed: jax.Array) -> TrainState:
        return init_state(jax.random.key(seed, impl=config.prng), config=config)

    with jax.enable_x64(config.model.dtype == "float64"):
        return jax.eval_shape(init, jax.ShapeDtypeStruct((), jnp.uint32))


def dropout_key(key: jax.Array, step: jax.Array | int, micro_batch: jax.Array | int) -> jax.Array:
    """The dropout key of one micro-batch: a pure function of (seed, step, micro-batch)."""
    key = jax.random.fold_in(jax.random.fold_in(key, DROPOUT), step)
    return jax.random.fold_in(key, micro_batch)


def train_step(
    state: TrainState,
    key: jax.Array,
    windows_BxL1: jax.Array,
    *,
    config: TrainConfig,
    loss: Loss = nll,
) -> tuple[TrainState, dict[str, jax.Array]]:
    """One optimizer step with dropout on. `key` is the run's key, windows are [B, L + 1].

    Returns the next state and loss [nats of nll], grad_norm (before clipping), learning_rate and
    the param_norm of the next state.
    """
    mean_loss, gradients = loss_and_gradients(state, key, windows_BxL1, config=config, loss=loss)
    update = optimizer(config.optimizer, config.steps)
    moving, frozen = split_frozen(state.params, config.optimizer)
    updates, opt_state = update.update(gradients, state.opt_state, moving)
    metrics = {
        "loss": mean_loss,
        "grad_norm": _norm(gradients),
        "learning_rate": jnp.asarray(schedule(config.optimizer, config.steps)(state.step)),
    }
    params = merge(optax.apply_updates(moving, updates), frozen)
    metrics["param_norm"] = _norm(params)
    return TrainState(state.step + 1, params, opt_state), metrics


def _norm(tree: dict) -> jax.Array:
    """XLA on a CPU would share the squares with the update, in memory, but for a barrier."""
    return optax.tree.norm(jax.lax.optimization_barrier(tree) if sharding.is_cpu() else tree)


def loss_and_gradients(
    state: TrainState,
    key: jax.Array,
    windows_BxL1: jax.Array,
    *,
    config: TrainConfig,
    loss: Loss = nll,
) -> tuple[jax.Array, dict]:
    """Mean loss of a batch, and its gradients with respect to the parameters that are not frozen.

    Each device computes its own rows; over the devices only parameters and gradients travel.
    """
    moving, frozen = split_frozen(state.params, config.optimizer)
    fsdp = sharding.n_shards()
    specs = sharding.specs(moving, fsdp)

    def of_a_device(
        moving: dict, frozen: dict, key: jax.Array, step: jax.Array, windows_bxL1: jax.Array
    ) -> tuple[jax.Array, dict]:
        def mean_loss(moving: dict, windows_bxL1: jax.Array, micro_batch: jax.Array) -> jax.Array:
            return position_losses(
                merge(moving, frozen),
                windows_bxL1,
                config,
                n_last=n_last(config),
                deterministic=False,
                loss=loss,
                dropout_key=dropout_key(key, step, micro_batch),
            ).mean()

        mean, gradients = _over_micro_batches(mean_loss, moving, windows_bxL1, config)
        return sharding.mean(mean), sharding.mean_gradients(gradients, specs)

    run = sharding.on_each_device(
        of_a_device,
        (specs, sharding.specs(frozen, fsdp), sharding.WHOLE, sharding.WHOLE, sharding.ROWS),
        (sharding.WHOLE, specs),
    )
    return run(moving, frozen, key, state.step, windows_BxL1)


def _over_micro_batches(
    mean_loss: Callable[..., jax.Array], moving: dict, windows_BxL1: jax.Array, config: TrainConfig
) -> tuple[jax.Array, dict]:
    """The mean of `mean_loss(moving, windows_bxL1, index)` and its gradients, by one scan."""
    value_and_grad = jax.value_and_grad(mean_loss)
    if config.accumulate == 1:
        return value_and_grad(moving, windows_BxL1, jnp.int32(0))

    def add(total: tuple, micro: tuple) -> tuple[tuple, None]:
        return jax.tree.map(jnp.add, total, value_and_grad(moving, *micro)), None

    micro = (_micro_batches(windows_BxL1, config), jnp.arange(config.accumulate))
    gradients = jax.tree.map(jnp.zeros_like, moving)
    zeros = (jnp.zeros((), at_least_float32(config.model.dtype)), gradients)
    total, _ = jax.lax.scan(add, zeros, micro)
    return jax.tree.map(lambda x: x / config.accumulate, total)


def _micro_batches(windows_BxL1: jax.Array, config: TrainConfig) -> jax.Array:
    """[accumulate, B / accumulate, L + 1], every accumulate-th row: each device keeps its own."""
    shape = (-1, config.accumulate, windows_BxL1.shape[1])
    return windows_BxL1.reshape(shape).swapaxes(0, 1)


def eval_step(
    params: dict, windows_BxL1: jax.Array, *, config: TrainConfig
) -> dict[str, jax.Array]:
    """Final-token and all-token NLL [nats] of one test batch, dropout off, any objective."""

    def of_a_device(params: dict, windows_BxL1: jax.Array) -> tuple[jax.Array, jax.Array]:
        def nll_of(windows_bxL1: jax.Array) -> jax.Array:
            n = config.model.seq_len
            return position_losses(params, windows_bxL1, config, n_last=n, deterministic=True)

        nll_AxbxL = jax.lax.map(nll_of, _micro_batches(windows_BxL1, config))
        return sharding.mean((nll_AxbxL[..., -1].mean(), nll_AxbxL.mean()))

    specs = sharding.specs(params, sharding.n_shards()), sharding.ROWS
    means = sharding.on_each_device(of_a_device, specs, sharding.WHOLE)(params, windows_BxL1)
    return dict(zip(TEST_METRICS, means, strict=True))
