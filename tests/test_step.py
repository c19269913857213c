"""One step: accumulation, many devices, many processes, the optimizer's place in it."""

import dataclasses
import functools
import json
import os
import socket
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_model5 import model, step
from jax_model5.config import TrainConfig
from jax_model5.losses import n_last, position_losses
from tests.tiny import MODEL, ROOT, eight_devices, flags, run, slow, start, tiny

PLAIN = TrainConfig(
    model=dataclasses.replace(MODEL, dropout=0.0), batch_size=8, objective="all_tokens"
)


def windows(rows: int = 8) -> jax.Array:
    return jax.random.randint(jax.random.key(9), (rows, MODEL.seq_len + 1), 0, MODEL.vocab_size)


def new_state(config: TrainConfig) -> step.TrainState:
    return jax.jit(step.init_state, static_argnames="config")(jax.random.key(0), config=config)


def in_float64(**fields):
    """Loss and gradients of PLAIN with other fields."""
    config = dataclasses.replace(PLAIN, **fields)
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, dtype="float64"))
    with jax.enable_x64(True):
        run_step = jax.jit(functools.partial(step.loss_and_gradients, config=config))
        return run_step(new_state(config), jax.random.key(0), windows())


def assert_same(ours, expected):
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(expected), strict=True):
        assert np.linalg.norm(a - b) <= 1e-12 * np.linalg.norm(b) + 1e-16


@pytest.mark.parametrize("accumulate", [2, slow(8)])
def test_accumulated_micro_batches_are_the_large_batch(accumulate):
    assert_same(in_float64(accumulate=accumulate), in_float64())


def test_micro_batches_drop_different_units():
    config = dataclasses.replace(PLAIN, accumulate=8, model=dataclasses.replace(MODEL, dropout=0.5))
    state = new_state(config)
    same_rows = jnp.tile(windows(1), (8, 1))
    twice = dataclasses.replace(config, accumulate=1, batch_size=1)
    run_step = jax.jit(step.loss_and_gradients, static_argnames="config")
    loss, _ = run_step(state, jax.random.key(0), same_rows, config=config)
    alone, _ = run_step(state, jax.random.key(0), windows(1), config=twice)
    assert abs(float(loss) - float(alone)) > 1e-4


@pytest.mark.parametrize("objective", ["final_token", slow("all_tokens")])
def test_remat_changes_no_gradient_dropout_on(objective):
    """What is computed again in the backward pass must draw the masks of the forward pass."""
    none, dots, full = (
        in_float64(objective=objective, model=dataclasses.replace(MODEL, remat=remat))
        for remat in ("none", "dots", "full")
    )
    for other in (dots, full):
        assert_same(other, none)


@pytest.mark.parametrize("n_layers", [slow(4), 8])
def test_remat_full_takes_less_memory(n_layers):
    """The compiled program's own figure, at a size where activations outweigh parameters."""

    def temporary_bytes(remat: str) -> int:
        shape = {"n_layers": n_layers, "seq_len": 128, "remat": remat}
        config = dataclasses.replace(PLAIN, model=dataclasses.replace(MODEL, **shape))
        state = jax.eval_shape(functools.partial(step.init_state, config=config), jax.random.key(0))
        batch = jax.ShapeDtypeStruct((8, 129), "int32")
        run_step = jax.jit(functools.partial(step.loss_and_gradients, config=config))
        compiled = run_step.lower(state, jax.random.key(0), batch).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert temporary_bytes("full") < 0.7 * temporary_bytes("none")


def test_a_scanned_trunk_is_the_unrolled_one(monkeypatch):
    unrolled = in_float64(model=MODEL)
    monkeypatch.setattr(model, "UNROLLED", 0)
    assert_same(in_float64(model=MODEL), unrolled)


def test_a_step_moves_every_parameter_and_counts():
    config = dataclasses.replace(PLAIN, model=MODEL)
    before = new_state(config)
    after, metrics = jax.jit(functools.partial(step.train_step, config=config))(
        before, jax.random.key(0), windows()
    )
    assert int(after.step) == 1
    for a, b in zip(jax.tree.leaves(before.params), jax.tree.leaves(after.params), strict=True):
        assert not np.array_equal(a, b)
    assert metrics["learning_rate"] == pytest.approx(config.optimizer.learning_rate)
    assert metrics["grad_norm"] > 0


@pytest.mark.parametrize(
    ("objective", "n"), [slow("final_token", 1), ("last_k", 3), slow("all_tokens", MODEL.seq_len)]
)
def test_only_the_objectives_targets_matter(objective, n):
    """The loss has one value for each of the last N targets, and sees no other."""
    config = dataclasses.replace(PLAIN, objective=objective, last_k=3)
    assert n_last(config) == n
    params = new_state(config).params
    loss = jax.jit(
        functools.partial(position_losses, params, config=config, n_last=n, deterministic=True)
    )
    base = np.asarray(loss(windows()))
    assert base.shape == (8, n)
    last = windows().at[:, -1].add(1)
    assert (np.asarray(loss(last % MODEL.vocab_size))[:, -1] != base[:, -1]).all()
    seen = []

    def seeing(logits, targets):
        seen.append(targets)
        return targets

    position_losses(params, windows(), config, n_last=n, deterministic=True, loss=seeing)
    assert np.array_equal(seen[0], windows()[:, -n:])


def test_eval_reports_both_losses_whatever_the_objective():
    state = new_state(PLAIN)
    final = dataclasses.replace(PLAIN, objective="final_token")
    evaluate = jax.jit(step.eval_step, static_argnames="config")
    results = [evaluate(state.params, windows(), config=c) for c in (PLAIN, final)]
    assert results[0] == results[1]
    nll = functools.partial(position_losses, config=PLAIN, deterministic=True)
    all_nll = jax.jit(functools.partial(nll, n_last=MODEL.seq_len))(state.params, windows())
    last_nll = jax.jit(functools.partial(nll, n_last=1))(state.params, windows())
    assert results[0]["all_token_nll"] == pytest.approx(float(all_nll.mean()), rel=1e-6)
    assert results[0]["final_token_nll"] == pytest.approx(float(last_nll.mean()), rel=1e-6)


# ---- devices and processes ----------------------------------------------------------------------


def losses(workdir) -> list[float]:
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    return [r["loss"] for r in map(json.loads, lines) if r["kind"] == "train"]


@pytest.mark.slow
def test_one_and_eight_devices_train_alike(tmp_path, text_file):
    """Also with the parameters sharded; and a checkpoint of 8 devices restores onto 1."""
    config = tiny(tmp_path, text_file, batch_size=8, steps=8)
    one = tmp_path / "one"
    assert run(*flags(config), "--workdir", one)[0] == 0
    eight = tmp_path / "eight"
    args = [*flags(config), "--mesh.data=2", "--mesh.fsdp=4", "--workdir", eight]
    code, out, err = run(*args, env=eight_devices())
    assert code == 0, err
    assert "8 x cpu" in out
    np.testing.assert_allclose(losses(eight), losses(one), rtol=2e-6)
    code, out, err = run(*flags(config), "--workdir", eight, "--steps", "12")
    assert code == 0, err
    assert "resuming" in out
    assert len(losses(eight)) == 12


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


BATCH_ROWS = """
import os, sys, json, jax
jax.config.update("jax_cpu_collectives_implementation", "gloo")
from jax_model5 import batches, config, corpus, processes, sharding
processes.join()
run = config.parse(sys.argv[1:], "test")
batch = batches.train_batch(corpus.load_corpus(run), run, 5)
rows = sharding.to_devices(sharding.make_mesh(run), batch)
total = jax.jit(lambda x: x.sum())(rows)
shards = {s.index[0].start or 0: s.data.tolist() for s in rows.addressable_shards}
print(json.dumps([jax.process_count(), int(total), shards]))
"""


@pytest.mark.slow
def test_four_processes_see_the_batch_of_one(tmp_path, text_file):
    config = tiny(tmp_path, text_file, batch_size=8)
    port = free_port()

    def launch(process: int | None) -> subprocess.Popen:
        env = dict(os.environ)
        if process is not None:
            env["JAX_COORDINATOR_ADDRESS"] = f"127.0.0.1:{port}"
            env["JAX_NUM_PROCESSES"], env["JAX_PROCESS_ID"] = "4", str(process)
        return subprocess.Popen(
            [sys.executable, "-c", BATCH_ROWS, *flags(config)],
            cwd=ROOT,
            env=env,
            stdout=subprocess.PIPE,
            text=True,
        )

    def result(process: subprocess.Popen) -> tuple[int, int, dict[str, list]]:
        out, _ = process.communicate(timeout=300)
        assert process.returncode == 0
        return json.loads(out.splitlines()[-1])

    count, total, whole = result(launch(None))
    assert count == 1
    together: dict[int, list] = {}
    for count, part_total, shards in map(result, [launch(p) for p in range(4)]):
        assert (count, part_total) == (4, total)
        together |= {int(start): rows for start, rows in shards.items()}
    assert [row for start in sorted(together) for row in together[start]] == whole["0"]


@pytest.mark.slow
def test_two_processes_train_resume_and_write_once(tmp_path, text_file):
    """The whole loop over gloo: the losses of one process, one log, and a resumed end."""
    config = tiny(tmp_path, text_file, steps=8)
    assert run(*flags(config))[0] == 0
    workdir = tmp_path / "two"
    for steps in (5, 8):
        port = free_port()
        processes = [
            start(
                *flags(config),
                f"--steps={steps}",
                f"--workdir={workdir}",
                env=os.environ
                | {
                    "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}",
                    "JAX_NUM_PROCESSES": "2",
                    "JAX_PROCESS_ID": str(index),
                },
            )
            for index in range(2)
        ]
        results = [process.communicate(timeout=300) for process in processes]
        assert [process.returncode for process in processes] == [0, 0], results
    assert "resuming" in results[0][0]
    assert "parameters" in results[0][0]
    assert "parameters" not in results[1][0]  # only the first process speaks and writes
    np.testing.assert_allclose(losses(workdir), losses(tmp_path / "run"), rtol=2e-6)
    assert len((workdir / "metrics.jsonl").read_text().splitlines()) == 8 + 3  # tests at 0, 5 and 8
