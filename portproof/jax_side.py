"""The JAX side: jitted passes forward and backward, and the update."""

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import optax

from portproof import taps
from portproof.leaves import flat, unflat
from portproof.port import BadInput, Pass, Port, as_arrays, require_logits, stops

HERE = str(Path(__file__).parent)
FAST_COMPILE = {"xla_backend_optimization_level": 0}  # half the time: less of LLVM's polish
NARROW = (jnp.float32, jnp.bfloat16, jnp.float16)


class JaxSide:
    """The function in one dtype, its weights, and the programs made of it."""

    def __init__(self, port: Port, dtype: str, wanted: frozenset[str]):
        self.port, self.dtype, self.wanted = port, dtype, wanted
        self.leaves, self.seen = dict[str, np.ndarray](), set[str]()
        self._programs: dict[tuple, Any] = {}

    def run(self, train: bool, seed: int = 0) -> Pass:
        """One pass forward, for values and masks, and one backward, for gradients."""
        loss, found = self._call("forward", train, seed)
        (_, (gradients, _)), backward = self._call("backward", train, seed)
        found.loss, found.leaves = np.asarray(loss), _arrays(gradients)
        for name, values in found.values.items():
            came = backward.gradients[name][::-1]  # none before a stop
            found.gradients[name] = [*map(np.zeros_like, values[: len(values) - len(came)]), *came]
        return found

    def _call(self, doing: str, train: bool, seed: int) -> tuple[Any, Pass]:
        with self._traced(doing) as found:
            inputs = self._inputs(seed)
            if (doing, train) not in self._programs:
                self._programs[doing, train] = self._compiled(doing, train, inputs)
            return jax.block_until_ready(self._programs[doing, train](*inputs)), found

    @contextlib.contextmanager
    def _traced(self, doing: str) -> Iterator[Pass]:
        """In this dtype for all threads: a callback's would round what it is handed."""
        found = Pass(self.wanted)
        found.seen = self.seen  # of all passes, for a program is traced once
        before = jax.config.read("jax_enable_x64")
        jax.config.update("jax_enable_x64", self.dtype == "float64")
        try:
            with (
                jax.default_matmul_precision("highest"),
                stops("JAX", doing, found.running),
                taps.recording(found),
            ):
                yield found
        finally:
            jax.config.update("jax_enable_x64", before)

    def _compiled(self, doing: str, train: bool, inputs: tuple) -> Any:
        function: Callable = functools.partial(self._loss, deterministic=not train)
        if doing == "backward":
            function = jax.value_and_grad(function, argnums=(0, 1))
        jax.clear_caches()  # what was traced before has no taps, or those of another trace
        return jax.jit(function, compiler_options=FAST_COMPILE).lower(*inputs).compile()

    def _inputs(self, seed: int = 0) -> tuple:
        batch = as_arrays(self.port.batch, self.dtype, jnp.asarray)
        return self._tree(self.leaves), jnp.zeros((), self.dtype), batch, jax.random.key(seed)

    def _loss(self, params: Any, zero: Any, batch: Any, key: Any, deterministic: bool) -> Any:
        taps.zero = zero
        logits = self.port.jax_model(params, batch, key, deterministic)
        require_logits("JAX", logits, self.dtype)
        return self.port.losses[0](taps.tap("(logits)", logits), batch)

    def require_wide(self) -> None:
        """In float64 nothing may be rounded to less."""
        with self._traced("forward"):
            function = functools.partial(self._loss, deterministic=True)
            jaxpr = jax.make_jaxpr(function)(*self._inputs())
        equations = list(jaxpr.eqns)
        for equation in equations:
            for inner in jax.extend.core.jaxprs_in_params(equation.params):
                equations += inner.eqns  # which this loop comes to
            to = equation.params.get("new_dtype")
            if to in NARROW and equation.invars[0].aval.dtype == jnp.float64:
                lines = str(equation.source_info.traceback).splitlines()
                own = (x for x in lines if "site-packages" not in x and HERE not in x)
                place = next(own, "a line of a library").rpartition("/")[2]
                raise BadInput(
                    f"JAX rounds float64 to {np.dtype(to)} at {place}; let the model compute in "
                    "its weights' dtype, or in jnp.promote_types(x.dtype, jnp.float32)"
                )

    def updates(self) -> Callable:
        """A function of gradients that takes a step; its scalars are float64, as PyTorch's are."""
        transformation = self.port.optimizers[0]

        @functools.partial(jax.jit, compiler_options=FAST_COMPILE)
        def update(gradients: Any, state: Any, params: Any) -> Any:
            changes, state = transformation.update(gradients, state, params)
            return optax.apply_updates(params, changes), state

        with jax.enable_x64(True), stops("JAX", "update"):
            state = transformation.init(self._tree(self.leaves))

        def step(gradients: Mapping[str, np.ndarray]) -> None:
            nonlocal state
            with jax.enable_x64(True), stops("JAX", "update"):
                params, state = update(self._tree(gradients), state, self._tree(self.leaves))
                self.leaves = _arrays(params)

        return step

    def _tree(self, leaves: Mapping[str, np.ndarray]) -> Any:
        return unflat({path: jnp.asarray(leaf) for path, leaf in leaves.items()}, self.port.params)


def _arrays(tree: Any) -> dict[str, np.ndarray]:
    return {path: np.asarray(leaf) for path, leaf in flat(tree).items()}
