"""One program of the benchmark, in a process of its own: our training step, timed on request.

It prints a JSON object when its first step is done, then one for each line `step N`, `eval N` or
`matmul N` of standard input: the seconds of N runs, each ended by a synchronization.
"""

import json
import resource
import sys
import time
from collections.abc import Callable
from typing import Any

import jax

from jax_model5 import data, sharding
from jax_model5.config import TrainConfig, one_line_errors, parse
from jax_model5.train import Programs, set_up_jax

_PRODUCTS = 8  # pairs of matrix products in one timed call, so that its start does not count


def main() -> None:
    with one_line_errors():
        config = parse(sys.argv[1:], "jax_model5.bench.measure")
        set_up_jax(config)
        corpus, programs = data.load_corpus(config), Programs(config)
    start = time.perf_counter()
    train_step = programs.compile_train()
    compile_s = time.perf_counter() - start
    state, step, loss = programs.init(programs.key), 0, float("nan")

    def run_step() -> float:
        nonlocal state, step, loss
        batch = data.train_batch(corpus, config, step)
        step += 1
        start = time.perf_counter()
        state, metrics = train_step(state, programs.key, sharding.to_devices(programs.mesh, batch))
        loss = float(metrics["loss"])
        return time.perf_counter() - start

    def run_eval() -> float:
        batch = sharding.to_devices(programs.mesh, data.test_batches(corpus, config)[0])
        start = time.perf_counter()
        jax.block_until_ready(programs.evaluate(state.params, batch))
        return time.perf_counter() - start

    run_step()
    about = {
        "loss": loss,
        "compile_s": compile_s,
        "program_bytes": program_bytes(train_step),
        "device": jax.devices()[0].device_kind,
        "platform": jax.default_backend(),
        "n_devices": programs.mesh.size,
        "versions": {"jax": jax.__version__, "jaxlib": jax.lib.__version__},
    }
    serve(about, {"step": run_step, "eval": run_eval, "matmul": matmul(config)})


def serve(about: dict[str, Any], timed: dict[str, Callable[[], float]]) -> None:
    """Answers until standard input ends. The first call of each kind is a warm-up, not timed."""
    print(json.dumps(about), flush=True)
    warm = {"step"}
    for line in sys.stdin:
        kind, count = line.split()
        if kind not in warm:
            timed[kind]()
            warm.add(kind)
        seconds = [timed[kind]() for _ in range(int(count))]
        print(json.dumps({"seconds": seconds, "peak_bytes": peak_bytes()}), flush=True)


def matmul(config: TrainConfig) -> Callable[[], float]:
    """Times x [B L, D] through the MLP's two matrices, and nothing else, in the model's dtype."""
    c = config.model
    keys = jax.random.split(jax.random.key(0), 3)
    M, D = config.batch_size * c.seq_len // config.accumulate, c.d_model
    x_MxD, up_DxF, down_FxD = (
        (jax.random.normal(key, shape) / shape[0] ** 0.5).astype(c.dtype)
        for key, shape in zip(keys, ((M, D), (D, 4 * D), (4 * D, D)), strict=True)
    )

    @jax.jit
    def products(x_MxD: jax.Array) -> jax.Array:
        return jax.lax.fori_loop(0, _PRODUCTS, lambda _, x: x @ up_DxF @ down_FxD, x_MxD)

    def run() -> float:
        start = time.perf_counter()
        jax.block_until_ready(products(x_MxD))
        return time.perf_counter() - start

    return run


def matmul_flops(config: TrainConfig) -> float:
    """FLOPs of one `matmul` call."""
    positions = config.batch_size * config.model.seq_len // config.accumulate
    return _PRODUCTS * 2 * 2.0 * positions * config.model.d_model * 4 * config.model.d_model


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
