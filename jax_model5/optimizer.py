"""The optax update with PyTorch's formulas, and which parameters it moves."""

import jax
import jax.numpy as jnp
import optax

from jax_model5.config import OptimizerConfig
from jax_model5.errors import UserError
from jax_model5.trees import split

_CLIP_EPSILON = 1e-6  # torch.nn.utils.clip_grad_norm_ adds it; optax's clipping does not


def schedule(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """Learning rate of the update that follows `count` updates; `steps` is the whole run."""
    rate = _schedule(config, steps)
    # A float count: optax computes the schedules in the count's own precision.
    return lambda count: rate(jnp.asarray(count, float))


def _schedule(config: OptimizerConfig, steps: int) -> optax.Schedule:
    peak, warmup = config.learning_rate, config.warmup_steps
    decay = max(steps - warmup, 1)
    after = {
        "constant": optax.constant_schedule(peak),
        "cosine": optax.cosine_decay_schedule(peak, decay),
        "linear": optax.linear_schedule(peak, 0.0, decay),
    }[config.schedule]
    if warmup == 0:
        return after
    return optax.join_schedules([optax.linear_schedule(0.0, peak, warmup), after], [warmup])


def optimizer(config: OptimizerConfig, steps: int) -> optax.GradientTransformation:
    """The whole update. Decay is decoupled in adamw (Loshchilov & Hutter 2019), L2 elsewhere."""
    learning_rate, decay = schedule(config, steps), config.weight_decay
    l2 = optax.add_decayed_weights(decay) if decay else optax.identity()
    moments = {"b1": config.b1, "b2": config.b2, "eps": config.eps}
    update = {
        "adamw": lambda: optax.adamw(learning_rate, **moments, weight_decay=decay),
        "adam": lambda: optax.chain(l2, optax.adam(learning_rate, **moments)),
        "sgd": lambda: optax.chain(l2, optax.sgd(learning_rate, momentum=config.b1 or None)),
    }[config.name]()
    return optax.chain(_clip(config.clip_norm), update) if config.clip_norm else update


def _clip(max_norm: float) -> optax.GradientTransformation:
    def clip(gradients: optax.Updates, params: optax.Params | None) -> optax.Updates:
        scale = jnp.minimum(1.0, max_norm / (optax.tree.norm(gradients) + _CLIP_EPSILON))
        return jax.tree.map(lambda gradient: gradient * scale, gradients)

    return optax.stateless(clip)


def split_frozen(params: dict, config: OptimizerConfig) -> tuple[dict, dict]:
    """The parameters that move, and those that do not: the optimizer never sees the latter.

    Raises:
      UserError: `freeze` names no parameter, or all of them.
    """
    frozen, moving = split(params, config.freeze, "optimizer.freeze")
    if not moving:
        words = " ".join(config.freeze)
        raise UserError(f"optimizer.freeze={words!r}: leaves nothing to train; freeze less")
    return moving, frozen
