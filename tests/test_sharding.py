"""What travels between devices: read from the program that XLA compiles for eight of them."""

import dataclasses
import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_model5 import kernels, sharding
from tests.tiny import ROOT, eight_devices, slow

# H != K, D != K^2, no size is another's; 16 rows of 32 positions on 8 devices.
MODEL = """
--model.d_model=48 --model.n_heads=3 --model.n_layers=7 --model.seq_len=32 --model.vocab_size=509
--data.tokenizer=bytes --batch_size=16 --steps=20
""".split()

READ = """
import json, sys, collections
import jax
from jax_model5.config import parse
from jax_model5.plan import hlo
from jax_model5.programs import Programs
from jax_model5.trees import n_bytes
from tests import test_sharding
test_sharding.plant(sys.argv[1])
config = parse(sys.argv[2:], "test")
programs = Programs(config)
program = hlo.Program(programs.train_step.as_text())
moved, shapes, rows = collections.Counter(), set(), set()
for collective, times in program.collectives():
    moved[collective.opcode.removesuffix("-start")] += times * hlo.received(collective, 8)
    shapes |= {array.dims for array in collective.arrays}
for instruction, _ in program.executed():
    for inner in program.inside(instruction):
        if hlo.is_product(inner):
            rows |= set(inner.arrays[0].dims)
params = programs.abstract_state.params
print(json.dumps([moved, sorted(shapes), sorted(rows), n_bytes(params)]))
"""


def plant(fault: str) -> None:
    from jax_model5 import losses, model, sharding

    if fault == "few rows":
        losses.ROWS = 8
    if fault == "no split":  # XLA splits as it likes: the tree before these tests
        sharding.on_each_device = lambda function, *_: function
    if fault == "table twice":  # its lookup's and its head's gradients cross apart

        def logits(self, x_BxNxD):
            table = sharding.gathered(self.get_variable("params", "wte"), (509, 48), "float32")
            return model.matmul_transposed(x_BxNxD, table) / 48**0.5

        model.Model5.logits = logits


def read(fault: str, *mesh: str) -> tuple[dict, set, set, int]:
    command = [sys.executable, "-c", READ, fault, *MODEL, *mesh]
    env = os.environ | eight_devices()
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    moved, shapes, rows, n_bytes = json.loads(done.stdout.splitlines()[-1])
    return moved, {tuple(shape) for shape in shapes}, set(rows), n_bytes


MESHES = {"fsdp": ("--mesh.data=1", "--mesh.fsdp=8"), "both": ("--mesh.data=2", "--mesh.fsdp=4")}


def require_little_travels(fault: str, mesh: str, *flags: str) -> None:
    moved, shapes, rows, n_bytes = read(fault, *MESHES[mesh], *flags)
    assert 16 * 32 not in rows, "a product has the rows of the whole batch"
    assert 2 * 32 in rows
    assert not {16, 16 * 32} & {size for shape in shapes for size in shape}, "an activation moves"
    assert set(moved) == {"all-gather", "reduce-scatter", "all-reduce"}
    fsdp = 8 if mesh == "fsdp" else 4
    once = n_bytes * (fsdp - 1) / fsdp
    assert moved["all-gather"] + moved["reduce-scatter"] < 1.1 * 3 * once
    assert 0.9 * once < moved["reduce-scatter"] < once, "a gradient crosses twice"


@pytest.mark.parametrize("objective", [slow("final_token"), "all_tokens"])
@pytest.mark.parametrize("mesh", [slow("both"), "fsdp"])
def test_only_weights_and_gradients_travel_and_each_once(mesh, objective):
    require_little_travels("", mesh, f"--objective={objective}")


def test_a_chunk_of_the_loss_counts_a_device_s_rows():
    """8 rows of logits at once are 4 positions of a device's 2 sequences."""
    *_, rows, _ = read("few rows", *MESHES["fsdp"], "--objective=all_tokens")
    assert 8 in rows


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["no split", "table twice"])
def test_what_travels_needlessly_is_seen(fault):
    with pytest.raises(AssertionError, match=r"product|twice"):
        require_little_travels(fault, "fsdp")


LOSSES = """
import json, sys
import numpy as np
from jax_model5.config import parse
from jax_model5.programs import steps
from jax_model5.startup import set_up_jax

def draw(step):
    return np.random.default_rng(step).integers(0, 509, (16, 33), dtype=np.int32)

runs = []
for mesh in (1, 1), (8, 1), (1, 8), (2, 4):
    flags = [f"--mesh.data={mesh[0]}", f"--mesh.fsdp={mesh[1]}"]
    config = parse([*sys.argv[1:], *flags], "test")
    set_up_jax(config)
    runs.append([float(metrics["loss"]) for *_, metrics in steps(config, None, batches=draw)])
print(json.dumps(runs))
"""


# float32: measured 2.3e-7, float64: 2.2e-16, relative
@pytest.mark.slow
@pytest.mark.parametrize(
    ("dtype", "prng", "tolerance"),
    [
        ("float32", "threefry2x32", 3e-7),
        ("float64", "threefry2x32", 1e-13),
        ("float64", "rbg", 1e-13),
    ],
)
def test_twenty_losses_are_those_of_one_device(dtype, prng, tolerance):
    flags = [f"--model.dtype={dtype}", f"--prng={prng}", "--accumulate=2"]
    command = [sys.executable, "-c", LOSSES, *MODEL, *flags]
    env = os.environ | eight_devices()
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    one, *others = np.array(json.loads(done.stdout.splitlines()[-1]))
    for losses in others:
        np.testing.assert_allclose(losses, one, rtol=tolerance)


def test_a_row_has_its_mask_on_whichever_device(monkeypatch):
    for prng in ("threefry2x32", "rbg"):
        key = jax.random.key(0, impl=prng)
        whole = kernels.keep_mask(key, 0.5, (6, 5, 7))
        with monkeypatch.context() as on_the_second_of_three:
            on_the_second_of_three.setattr(sharding, "first_row", lambda n_rows: jnp.int32(n_rows))
            on_the_second_of_three.setattr(sharding, "n_devices", lambda: 3)
            assert np.array_equal(kernels.keep_mask(key, 0.5, (2, 5, 7)), whole[2:4])
        assert not np.array_equal(kernels.keep_mask(key, 0.5, (2, 5, 7)), whole[2:4])


@dataclasses.dataclass(frozen=True)
class Device:
    id: int
    slice_index: int
    process_index: int = 0
    device_kind: str = "a chip"
    platform: str = "gpu"


def test_fsdp_stays_inside_a_slice():
    devices = [Device(i, slice_index=i % 2) for i in range(8)]
    for row in sharding._arranged(4, 2, devices):
        assert len({device.slice_index for device in row}) == 1
    along_data = sharding._arranged(2, 4, devices)
    assert [row[0].slice_index for row in along_data] == [0, 1]
    assert {device.id for device in along_data.ravel()} == set(range(8))
