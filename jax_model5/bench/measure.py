"""One program of the benchmark, in a process of its own: our training step, timed on request.

It prints a JSON object when its first step is done, then one for each line `step N`, `eval N`,
`matmul N`, `read N`, `generate BxP` or `loss PATH` of standard input: the seconds of N runs, each
ended by a synchronization (of N steps, as in training, only the last: one figure, their mean), of B
texts at once after P tokens each, or the loss of the first batch at the initial weights, which it
writes to PATH.
"""

import dataclasses
import functools
import json
import resource
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jax_model5.batches import test_batches, train_batch
from jax_model5.bench.cases import new_tokens
from jax_model5.config import ModelConfig, TrainConfig, parse
from jax_model5.corpus import Corpus, load_corpus
from jax_model5.errors import one_line_errors
from jax_model5.generate import Sampling, generate, of_text, prepared, unstack
from jax_model5.losses import n_last, position_losses
from jax_model5.programs import Programs, steps
from jax_model5.startup import memory_errors, set_up_jax
from jax_model5.trees import n_bytes, to_layout

_ENDLESS = 10**9  # steps: the program runs until nobody asks any more
_PRODUCTS = 8  # pairs of matrix products in one timed call, so that its start does not count


def main() -> None:
    with one_line_errors():
        config = parse(sys.argv[1:], "jax_model5.bench.measure")
        set_up_jax(config)
        with memory_errors(config):
            run(dataclasses.replace(config, steps=_ENDLESS), load_corpus(config))


def run(config: TrainConfig, corpus: Corpus) -> None:
    programs = Programs(config)
    state = programs.init()  # runs while the step is being compiled
    start = time.perf_counter()
    train_step = programs.train_step
    compile_s = time.perf_counter() - start
    ready: dict[int, np.ndarray] = {}  # drawn before the clock starts, as PyTorch's are
    stepping = steps(config, corpus, batches=ready.pop, state=state, programs=programs)

    def run_steps(count: int) -> float:
        step = int(state.step)
        ready.update({i: train_batch(corpus, config, i) for i in range(step, step + count)})
        return timed(lambda: call(count)) / count

    def call(count: int) -> Any:
        nonlocal state
        for _ in range(count):
            _, state, metrics = next(stepping)
        return state, metrics

    tests = [programs.to_devices(test_batches(corpus, config)[0])]
    run_steps(1)
    about = {
        "compile_s": compile_s,
        "program_bytes": program_bytes(train_step),
        "device": jax.devices()[0].device_kind,
        "platform": jax.default_backend(),
        "n_devices": programs.mesh.size,
        "text_dtype": of_text(config.model).dtype,
        "text_bytes": text_bytes(state.params, config.model),
    }
    runs: dict[str, Callable[..., float]] = {
        "eval": lambda: timed(lambda: programs.test(state.params, tests)),
        "matmul": matmul(config, programs.mesh.size),
        "generate": lambda B, prompt: timed(
            lambda: write_texts(state.params, corpus, programs, config, B, prompt)
        ),
        "read": lambda: read_weights(state.params, config),
    }
    serve(about, run_steps, runs, lambda path: initial_loss(config, corpus, programs, path))


def serve(
    about: dict[str, Any],
    run_steps: Callable[[int], float],
    runs: dict[str, Callable[..., float]],
    loss: Callable[[str], float] | None = None,
) -> None:
    """Answers until standard input ends. The first run of each kind is a warm-up, not timed."""
    print(json.dumps(about), flush=True)
    warm: set[str] = set()
    for line in sys.stdin:
        kind, argument = line.rstrip("\n").split(" ", 1)
        if kind == "loss" and loss:
            print(json.dumps({"loss": loss(argument)}), flush=True)
            continue
        if kind == "step":
            seconds = [run_steps(int(argument))]
            print(json.dumps({"seconds": seconds, "peak_bytes": peak_bytes()}), flush=True)
            continue
        is_text, numbers = kind == "generate", [*map(int, argument.split("x"))]
        run = functools.partial(runs[kind], *numbers) if is_text else runs[kind]
        if kind not in warm:
            run()
            warm.add(kind)
        seconds = [run() for _ in range(1 if is_text else numbers[0])]
        print(json.dumps({"seconds": seconds, "peak_bytes": peak_bytes()}), flush=True)


def timed(call: Callable[[], Any]) -> float:
    """Seconds until everything that `call` returns is computed."""
    start = time.perf_counter()
    jax.block_until_ready(call())
    return time.perf_counter() - start


def write_texts(
    params: dict, corpus: Corpus, programs: Programs, config: TrainConfig, B: int, prompt: int
) -> list[np.ndarray]:
    """B texts, drawn after the first tokens of the corpus, `prompt` of them each."""
    return list(
        generate(
            params,
            corpus.tokens_T[: B * prompt].reshape(B, prompt).tolist(),
            programs.key,
            config=config.model,
            sampling=Sampling(),
            n_tokens=new_tokens(config, prompt),
        )
    )


def read_weights(params: dict, config: TrainConfig) -> float:
    """Seconds to read what every token of a text reads, at the speed of memory: to add it up."""
    read = jax.block_until_ready(_of_a_token(prepared(params, config.model)[0]))
    return timed(lambda: _sum(read))


def _of_a_token(unstacked: dict) -> dict:
    """The weights that every token of a text reads whole: of these two it reads one row."""
    return {name: leaves for name, leaves in unstacked.items() if name not in ("wte", "wpe")}


def text_bytes(params: dict, config: ModelConfig) -> int:
    """Of the weights that every token reads."""
    unstacked = jax.eval_shape(functools.partial(unstack, config=of_text(config)), params)
    return n_bytes(_of_a_token(unstacked))


@jax.jit
def _sum(tree: Any) -> jax.Array:
    return optax.tree.sum(jax.tree.map(lambda leaf: leaf.astype(jnp.float32), tree))


def initial_loss(config: TrainConfig, corpus: Corpus, programs: Programs, path: str) -> float:
    """Loss of the first batch at the initial weights, dropout off.

    The weights go to `path`, under torch_ref's names.
    """
    params = programs.init().params
    weights = to_layout(jax.device_get(params), config.model, "torch_ref")
    np.savez(path, **weights)  # type: ignore[arg-type]

    @jax.jit
    def mean_nll(params: dict, windows_BxL1: jax.Array) -> jax.Array:
        n = n_last(config)
        return position_losses(params, windows_BxL1, config, n_last=n, deterministic=True).mean()

    return float(mean_nll(params, programs.to_devices(train_batch(corpus, config, 0))))


def matmul(config: TrainConfig, n_devices: int) -> Callable[[], float]:
    """Times one device's x [B L, D] through the MLP's two matrices, in the model's dtype."""
    c = config.model
    keys = jax.random.split(jax.random.key(0), 3)
    M, D = _positions(config, n_devices), c.d_model
    x_MxD, up_DxF, down_FxD = (
        (jax.random.normal(key, shape) / shape[0] ** 0.5).astype(c.dtype)
        for key, shape in zip(keys, ((M, D), (D, 4 * D), (4 * D, D)), strict=True)
    )

    @jax.jit
    def products(x_MxD: jax.Array) -> jax.Array:
        return jax.lax.fori_loop(0, _PRODUCTS, lambda _, x: x @ up_DxF @ down_FxD, x_MxD)

    return lambda: timed(lambda: products(x_MxD))


def matmul_flops(config: TrainConfig, n_devices: int) -> float:
    """FLOPs of one `matmul` call."""
    D = config.model.d_model
    return _PRODUCTS * 2 * 2.0 * _positions(config, n_devices) * D * 4 * D


def _positions(config: TrainConfig, n_devices: int) -> int:
    """Positions that one device computes at a time."""
    return config.batch_size * config.model.seq_len // (config.accumulate * n_devices)


def peak_bytes() -> int:
    """The most memory that was in use: the device's where it tells, else this process's."""
    stats = jax.devices()[0].memory_stats()
    if stats and "peak_bytes_in_use" in stats:
        return stats["peak_bytes_in_use"]
    scale = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale


def program_bytes(compiled: Any) -> int | None:
    """What the compiled step itself asks for: arguments, results and temporaries."""
    memory = compiled.memory_analysis()
    if memory is None:
        return None
    sizes = memory.argument_size_in_bytes, memory.output_size_in_bytes, memory.temp_size_in_bytes
    return sum(sizes) - memory.alias_size_in_bytes


if __name__ == "__main__":
    main()
