"""A run's functions compiled for its mesh, and its steps as a generator."""

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np

from jax_model5 import sharding
from jax_model5.batches import train_batch
from jax_model5.config import TEST_METRICS, TrainConfig
from jax_model5.corpus import Corpus
from jax_model5.errors import UserError
from jax_model5.flops import peak_bfloat16
from jax_model5.losses import Loss, nll
from jax_model5.step import TrainState, abstract_state, eval_step, init_state, train_step

Metrics = dict[str, jax.Array]


class Programs:
    """The functions of a config, compiled for its mesh, and the key that they all derive from.

    `devices` may be absent ones, to compile for (`jax_model5.plan`).

    Raises:
      UserError: the mesh does not fit the devices, or JAX is not set up for the config's dtype.
    """

    def __init__(
        self,
        config: TrainConfig,
        loss: Loss = nll,
        devices: Sequence[jax.Device] | None = None,
    ):
        if config.model.dtype == "float64" and not jax.config.jax_enable_x64:  # type: ignore[attr-defined]
            raise UserError("model.dtype='float64': call startup.set_up_jax(config) first")
        self.config, self.loss = config, loss
        self.mesh = sharding.make_mesh(config, devices)
        self._everywhere = sharding.replicated(self.mesh)
        shapes = abstract_state(config)
        self._places = sharding.state_sharding(self.mesh, shapes)
        self.abstract_state = jax.tree.map(
            lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
            shapes,
            self._places,
        )
        init = functools.partial(init_state, config=config)
        self._init = jax.jit(init, out_shardings=self._places)
        evaluate = functools.partial(eval_step, config=config)
        self._evaluate = jax.jit(evaluate, out_shardings=self._everywhere)

    @functools.cached_property
    def key(self) -> jax.Array:
        return jax.jit(self._new_key, out_shardings=self._everywhere)()

    def _new_key(self) -> jax.Array:
        return jax.random.key(self.config.seed, impl=self.config.prng)

    @functools.cached_property
    def init(self) -> Callable[[], TrainState]:
        """() -> the state before the first step."""
        return functools.partial(self._init.lower(self.key).compile(), self.key)

    @functools.cached_property
    def train_step(self) -> Callable[..., tuple[TrainState, Metrics]]:
        """(state, key, windows) -> (next state, metrics). The state is donated.

        Compiled ahead of the first step, so that no step's timing holds a compilation.
        """
        step = jax.jit(
            functools.partial(train_step, config=self.config, loss=self.loss),
            out_shardings=(self._places, self._everywhere),
            donate_argnums=0,
        )
        shape = self.config.batch_size, self.config.model.seq_len + 1
        rows = sharding.batch_sharding(self.mesh)
        batch = jax.ShapeDtypeStruct(shape, np.int32, sharding=rows)
        key = jax.eval_shape(self._new_key)
        key = jax.ShapeDtypeStruct(key.shape, key.dtype, sharding=self._everywhere)
        with jax.set_mesh(self.mesh):
            return step.lower(self.abstract_state, key, batch).compile()

    @property
    def peak(self) -> float | None:
        """The published bfloat16 rate of the mesh [FLOP/s], where its chip is known."""
        peak = peak_bfloat16(self.mesh.devices.flat[0].device_kind)
        return peak and peak * self.mesh.size

    def to_devices(self, batch: np.ndarray) -> jax.Array:
        return sharding.to_devices(self.mesh, batch)

    def test(self, params: dict, test_batches: list[jax.Array]) -> dict[str, float]:
        """Mean test NLL [nats] over the batches, by name."""
        with jax.set_mesh(self.mesh):
            results = [self._evaluate(params, batch) for batch in test_batches]
        totals = jax.device_get(jax.tree.map(lambda *values: sum(values), *results))
        return {name: float(totals[name]) / len(results) for name in TEST_METRICS}


def steps(
    config: TrainConfig,
    corpus: Corpus | None,
    loss: Loss = nll,
    batches: Callable[[int], np.ndarray] | None = None,
    *,
    state: TrainState | None = None,
    programs: Programs | None = None,
) -> Iterator[tuple[int, TrainState, Metrics]]:
    """Trains, and after each step yields (step, state, metrics). Nothing is written.

    The metrics are of that step, on the devices: keeping them waits for nothing, and those of the
    step before are ready. The state is donated to the next step: copy what you keep of it.

    - loss: (logits_BxCxV, targets_BxC) -> loss_BxC.
    - batches: the steps made before, 0 at first -> windows [B, L + 1]; the corpus's unless given.
    - state: where to go on from, donated too; the initial state unless given.
    - programs: a `Programs(config, loss)` of your own, to compile once for several calls.

    Raises:
      UserError: whatever `Programs` raises.
      ValueError: neither a corpus nor batches, or programs of another config or loss.
    """
    programs = programs or Programs(config, loss)
    if (programs.config, programs.loss) != (config, loss):
        raise ValueError("programs: made for another config or loss")
    state = programs.init() if state is None else state
    if batches is None:
        if corpus is None:
            raise ValueError("corpus: give one, or batches of your own")
        batches = functools.partial(train_batch, corpus, config)
    before: Any = None
    for step in range(int(state.step), config.steps):
        batch = programs.to_devices(batches(step))
        state, metrics = programs.train_step(state, programs.key, batch)
        jax.block_until_ready(before)  # one step late, so that the devices never wait for the host
        before = metrics
        yield step + 1, state, metrics
