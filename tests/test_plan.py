"""Plans for chips that are not here: the text is read right, and bad input is one line."""

import importlib.metadata
import json
import os
import subprocess
import sys

import jax
import numpy as np
import pytest

from jax_model5 import flops
from jax_model5.config import ModelConfig, TrainConfig, parse
from jax_model5.errors import UserError
from jax_model5.plan import __main__ as plan_main
from jax_model5.plan import costs, hlo, report, search
from jax_model5.plan.__main__ import plan_for, split_over
from jax_model5.plan.chips import parse_chips
from jax_model5.plan.compiled import compile_for
from jax_model5.programs import Programs
from tests.tiny import ROOT, run, tiny
from tests.tiny import flags as flags_of

# Seven layers, so that the trunk is a loop; every product once, so that the count is the formula's.
MODEL = ModelConfig(
    vocab_size=509, seq_len=32, d_model=48, n_heads=3, n_layers=7, remat="none", dropout=0.0
)
CONFIG = TrainConfig(model=MODEL, batch_size=4, objective="all_tokens")


@pytest.fixture(scope="module")
def step():
    return Programs(CONFIG).train_step


def test_products_are_counted_as_the_formula_counts_them(step, monkeypatch):
    program = hlo.Program(step.as_text())
    needed = sum(flops.step_flops(CONFIG).values())
    assert sum(costs.flops_by_dtype(program).values()) == pytest.approx(needed, rel=0.02)
    monkeypatch.setattr(hlo.Program, "trip_count", lambda self, loop: 1)
    assert sum(costs.flops_by_dtype(program).values()) < 0.5 * needed, (
        "a loop's body counts once only"
    )


TEXT = """
HloModule jit_step, is_scheduled=true

%fused (param_0: f32[8,64], param_1: s32[]) -> f32[1,64] {
  %param_0 = f32[8,64]{1,0} parameter(0)
  %param_1 = s32[] parameter(1)
  %zero = s32[] constant(0)
  ROOT %row = f32[1,64]{1,0} dynamic-slice(%param_0, %param_1, %zero), dynamic_slice_sizes={1,64}
}

%written (param_0: f32[8,64], param_1: f32[1,64], param_2: s32[]) -> f32[8,64] {
  %param_0 = f32[8,64]{1,0} parameter(0)
  %param_1 = f32[1,64]{1,0} parameter(1)
  %param_2 = s32[] parameter(2)
  %nought = s32[] constant(0)
  ROOT %update = f32[8,64]{1,0} dynamic-update-slice(%param_0, %param_1, %param_2, %nought)
}

%body (state: (s32[], f32[8,64])) -> (s32[], f32[8,64]) {
  %state = (s32[], f32[8,64]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%state), index=0
  %x = f32[8,64]{1,0} get-tuple-element(%state), index=1
  %sliced = f32[1,64]{1,0} fusion(%x, %i), kind=kLoop, calls=%fused
  %all = f32[4,64]{1,0} all-gather(%sliced), replica_groups=[2,4]<=[8], dimensions={0}
  %new = f32[8,64]{1,0} fusion(%x, %sliced, %i), kind=kLoop, calls=%written
  ROOT %next = (s32[], f32[8,64]{1,0}) tuple(%i, %new)
}

%condition (state.1: (s32[], f32[8,64])) -> pred[] {
  %state.1 = (s32[], f32[8,64]{1,0}) parameter(0)
  ROOT %true = pred[] constant(true)
}

ENTRY %main (a: bf16[8,16], b: bf16[16,64], start: (s32[], f32[8,64])) -> f32[8,64] {
  %a = bf16[8,16]{1,0} parameter(0)
  %b = bf16[16,64]{1,0} parameter(1)
  %start = (s32[], f32[8,64]{1,0}) parameter(2)
  %loop = (s32[], f32[8,64]{1,0}) while(%start), condition=%condition, body=%body, \
backend_config={"known_trip_count":{"n":"5"}}
  %sum = f32[8,64]{1,0} all-reduce(%ab), replica_groups={{0,1},{2,3}}, to_apply=%add
  %conv = bf16[8,64]{1,0} convolution(%a, %b), dim_labels=bf_io->bf
  %c = bf16[8,5,16]{2,1,0} parameter(3)
  %d = bf16[8,16,64]{2,1,0} parameter(4)
  %batched = bf16[8,5,64]{2,1,0} convolution(%c, %d), window={size=8}, dim_labels=0bf_0io->0bf
  %summed = bf16[1,5,64]{2,1,0} convolution(%c, %d), window={size=8}, dim_labels=0bf_0io->0bf
  ROOT %ab = f32[8,64]{1,0} dot(%a, %b), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}
"""
BOUND = """s32[] constant(7)
  ROOT %less = pred[] compare(%i, %true), direction=LT"""


def test_a_text_is_read_as_it_was_written():
    program = hlo.Program(TEXT)
    executed = {i.name: (i, times) for i, times in program.executed()}
    assert executed["sliced"][1] == executed["new"][1] == executed["all"][1] == 5
    # A slice moves its row, not the array; an update in place writes its row.
    assert program.traffic(executed["sliced"][0]) == 64 * 4 + 4 + 64 * 4
    assert program.traffic(executed["new"][0]) == 64 * 4 + 4 + 64 * 4
    assert program.traffic(executed["ab"][0]) == 2 * (8 * 16 + 16 * 64) + 4 * 8 * 64
    assert program.flops(executed["ab"][0]) == program.flops(executed["conv"][0]) == 2 * 8 * 16 * 64
    bounded = TEXT.replace("known_trip_count", "unknown").replace("pred[] constant(true)", BOUND)
    times = {i.name: times for i, times in hlo.Program(bounded).executed()}
    assert times["sliced"] == 7  # as a TPU's text has it
    on_chip = hlo.Program(TEXT.replace("f32[8,64]{1,0} dot", "f32[8,64]{1,0:T(8,128)S(1)} dot"))
    (ab,) = (i for i, _ in on_chip.executed() if i.name == "ab")
    assert on_chip.traffic(ab) == 2 * (8 * 16 + 16 * 64)
    assert program.flops(executed["batched"][0]) == 2 * 8 * 5 * 64 * 16
    assert program.flops(executed["summed"][0]) == 2 * 5 * 64 * 8 * 16
    assert hlo.received(executed["all"][0], 8) == 4 * 64 * 4 * 3 / 4
    assert hlo.received(executed["sum"][0], 8) == 2 * 8 * 64 * 4 / 2


STARTED = """
ENTRY %main (a: f32[32], b: f32[8,4]) -> f32[32] {
  %a = f32[32]{0} parameter(0)
  %b = f32[8,4]{1,0} parameter(1)
  %g = (f32[32]{0}, f32[128]{0}) all-gather-start(%a), replica_groups={{0,1,2,3}}
  %s = ((f32[8,4]{1,0}, f32[32]{0}), (f32[2,4]{1,0}, f32[8]{0})) reduce-scatter-start(%b, %a), \
replica_groups={{0,1,2,3}}, calls=%async
  %p = (f32[32]{0}, f32[32]{0}, u32[], u32[]) collective-permute-start(%a), pairs={{0,1}}
  ROOT %r = f32[32]{0} all-reduce-start(%a), replica_groups={{0,1,2,3}}, to_apply=%add
}
"""


def test_a_collective_that_starts_moves_its_results_and_not_its_operands():
    moved = {i.name: hlo.received(i, 4) for i, _ in hlo.Program(STARTED).executed()}
    assert moved["g"] == 128 * 4 * 3 / 4
    assert moved["s"] == (8 + 8) * 4 * 3
    assert moved["p"] == 32 * 4
    assert moved["r"] == 2 * 32 * 4 * 3 / 4


ASYNCHRONOUS = """
%start (p: f32[32]) -> (f32[32], f32[128]) {
  %p = f32[32]{0} parameter(0)
  %g.1 = f32[128]{0} all-gather(%p), channel_id=3, replica_groups={{0,1,2,3}}
  ROOT %t = (f32[32]{0}, f32[128]{0}) tuple(%p, %g.1)
}

%end (p.1: f32[32]) -> f32[128] {
  %p.1 = f32[32]{0} parameter(0)
  ROOT %g.2 = f32[128]{0} all-gather(%p.1), channel_id=3, replica_groups={{0,1,2,3}}
}

%async_collective_fusion.7 (p.2: f32[32]) -> f32[128] {
  %p.2 = f32[32]{0} parameter(0)
  ROOT %g.3 = f32[128]{0} all-gather(%p.2), channel_id=3, replica_groups={{0,1,2,3}}
}

ENTRY %main (a: f32[32]) -> f32[128] {
  %a = f32[32]{0} parameter(0)
  %first = (f32[32]{0}, f32[128]{0}) fusion(%a), kind=kCustom, calls=%start
  %plain = f32[128]{0} all-gather(%a), channel_id=3, replica_groups={{0,1,2,3}}
  %fusion = f32[128]{0} fusion(%a), kind=kCustom, calls=%async_collective_fusion.7
  ROOT %async-collective-done.1 = f32[128]{0} fusion(%a), kind=kCustom, calls=%end
}
"""


def test_a_collective_that_stands_in_several_fusions_is_one():
    found = [(i.name, times) for i, times in hlo.Program(ASYNCHRONOUS).collectives()]
    assert found == [("g.1", 1), ("plain", 1)]


def test_the_floor_is_the_slowest_of_three():
    chips = parse_chips("h100:8")
    found = {"flops_by_dtype": {"bf16": 989.4e12}, "traffic_bytes": 3350e9 / 2, "network_s": 0.25}
    floor = costs.floor(found, CONFIG, chips)
    assert (floor["compute_s"], floor["memory_s"], floor["step_s"]) == (1.0, 0.5, 1.0)
    assert floor["ruled_by"] == "compute"
    in_float32 = costs.floor(found | {"flops_by_dtype": {"f32": 989.4e12}}, CONFIG, chips)
    assert in_float32["step_s"] == 2.0
    assert costs.floor(found | {"network_s": 3.0}, CONFIG, chips)["ruled_by"] == "network"


@pytest.mark.parametrize(
    ("chips", "words"),
    [
        ("v5f:2x2", "did you mean 'v5"),
        ("v5e:2x2x1", "write it as v5e:4x4"),
        ("v5p:4", "write it as v5p:2x2x1"),
        ("h100:0", "write it as h100:8"),
        ("h100", "write it as h100:8"),
    ],
)
def test_bad_chips_are_one_line(tmp_path, chips, words):
    out = f"--out={tmp_path / 'plan'}"
    code, out, err = run("--chips", chips, out, module="jax_model5.plan")
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert err.startswith(f"error: chips='{chips}': ")
    assert words in err
    assert not (tmp_path / "plan").exists()


def test_a_batch_that_does_not_split_is_made_larger_and_said(capfd):
    config = TrainConfig(batch_size=96, accumulate=2)
    assert split_over(parse_chips("v5e:4x4"), config) is config
    assert capfd.readouterr().err == ""
    assert split_over(parse_chips("v5e:16x16"), config).batch_size == 512
    assert "batch_size=96 does not split over 256 chips; planned with 512" in capfd.readouterr().err


@pytest.mark.parametrize(("chips", "extra"), [("v5e:2x2", "plan-tpu"), ("h100:4", "plan-gpu")])
def test_without_a_compiler_the_state_is_planned_and_the_command_named(
    chips, extra, monkeypatch, capfd
):
    def version(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    plan = plan_for(parse_chips(chips), TrainConfig())
    assert f"pip install -e '.[{extra}]'" in capfd.readouterr().err
    assert plan["state"]["parameters"] == 4 * 7_259_008
    assert plan["memory"] == {"argument": 3 * 4 * 7_259_008 + 8}


def test_a_search_without_a_compiler_is_one_line(monkeypatch):
    monkeypatch.setattr(plan_main, "compiler_is_here", lambda chips: "pip install it")
    with pytest.raises(UserError, match="no compiler for v5e:2x2 here; pip install it"):
        plan_main.parse_args(["--search", "--chips=v5e:2x2"])


@pytest.mark.compilers
def test_a_small_model_is_compiled_for_chips_that_are_not_here(tmp_path):
    flags = "--model.d_model=128 --model.n_heads=2 --model.dtype=bfloat16 --mesh.fsdp=4".split()
    chips = "--chips=v5e:2x2", "--chips=h100:4"
    code, _, err = run(*chips, f"--out={tmp_path}", *flags, module="jax_model5.plan")
    assert code == 0, err
    for plan in json.loads((tmp_path / "plan.json").read_text())["plans"]:
        assert plan["fits"]
        c = plan["config"]["model"]
        tables, blocks = 4 * (c["vocab_size"] + c["seq_len"]) * 128, 2 * 12 * 128**2 * c["n_layers"]
        # A table comes once in float32, a block's weights in bfloat16, 3 of 4 shards; these twice,
        # but in a trunk that is unrolled XLA keeps them on a TPU.
        times = {"v5e:2x2": 1, "h100:4": 2}[plan["chips"]]
        assert plan["carried_bytes"]["weights"] == (tables + times * blocks) * 3 / 4
        assert plan["carried_bytes"]["gradients"] >= (tables + 2 * blocks) * 3 / 4
        needed = sum(flops.step_flops(TrainConfig()).values()) / 4
        assert sum(plan["flops_by_dtype"].values()) == pytest.approx(needed, rel=0.1)
    code, _, err = run("--chips=v5e:3x5", f"--out={tmp_path}", *flags, module="jax_model5.plan")
    assert code == 2
    last = err.splitlines()[-1]
    assert last.startswith("error: chips='v5e:3x5': XLA does not know this topology")
    assert last.endswith("try v5e:4x4 or v5e:2x4")


@pytest.mark.compilers
def test_what_a_chip_cannot_hold_is_planned_as_that():
    """XLA's compiler for a TPU makes no program that is too large."""
    keys = "--model.dtype=bfloat16 --model.n_layers=2 --model.remat=none --batch_size=16384".split()
    chips = parse_chips("v5e:1x1")
    found = plan_for(chips, parse(keys, "test"))
    assert found["fits"] is False
    assert found["memory"]["total"] > chips.chip.memory


@pytest.mark.compilers
def test_on_a_gpu_no_layer_s_parameters_are_copied():
    """As a barrier around them makes it: a slice of the stacked trunk, in float32."""
    config = parse("--model.d_model=128 --model.n_heads=2 --model.dtype=bfloat16".split(), "test")
    _, text = compile_for(parse_chips("h100:1"), config)
    arrays = [array for i, _ in hlo.Program(text).executed() for array in i.arrays]
    assert hlo.Array("bf16", (1, 128, 512)) in arrays
    assert hlo.Array("f32", (1, 128, 512)) not in arrays


@pytest.mark.compilers
def test_with_the_compilers_installed_a_run_starts_as_before(tmp_path, text_file):
    """No look-up of a TPU, no words of CUDA's libraries."""
    env = {name: value for name, value in os.environ.items() if name != "JAX_PLATFORMS"}
    code, out, err = run(*flags_of(tiny(tmp_path, text_file)), env=env)
    assert code == 0, err
    assert "1 x cpu" in out
    steps = ("step ", "tokenized ")
    assert [line for line in err.splitlines() if not line.startswith(steps)] == []


# ---- other ways to do the same run --------------------------------------------------------------


def planner(needs):
    """A plan of what `needs(config)` says [bytes], a step's cost by its memory."""
    seen = []

    def plan(chips, config):
        seen.append(config)
        size = needs(config)
        cost = 1e9 / size + config.mesh.fsdp
        return {
            "chips": chips.name,
            "n_chips": chips.n,
            "fits": size <= chips.chip.memory,
            "memory": {"total": size},
            "floor": {"chip_hours_per_billion_tokens": cost, "tokens_per_s": 1.0 * chips.n**0.5},
            "config": config,
        }

    return plan, seen


def test_a_search_tries_all_that_may_fit_and_sorts_them_by_cost():
    plan, seen = planner(lambda c: 1e9 * (c.batch_size / c.accumulate) / c.mesh.fsdp)
    found = search.search(parse_chips("v5e:2x2"), TrainConfig(batch_size=8), plan)
    tried = {(c.model.remat, c.mesh.fsdp, c.accumulate, c.batch_size) for c in seen}
    assert len(tried) == len(seen) == 3 * 2 * 2 * 2
    costs_found = [p["floor"]["chip_hours_per_billion_tokens"] for p in found]
    assert costs_found == sorted(costs_found)
    assert len(found) == 3 * 2 * (1 + 2)  # unsplit, the large batch does not fit
    best = search.frontier(found)
    assert [p["memory"]["total"] for p in best] == sorted({p["memory"]["total"] for p in best})
    unbeaten = [
        p
        for p in found
        if not any(
            q["memory"]["total"] <= p["memory"]["total"]
            and q["floor"]["chip_hours_per_billion_tokens"]
            < p["floor"]["chip_hours_per_billion_tokens"]
            for q in found
        )
    ]
    assert {p["memory"]["total"] for p in best} == {p["memory"]["total"] for p in unbeaten}


def test_what_does_not_fit_is_not_tried_larger():
    plan, seen = planner(lambda c: 1e12)
    assert search.search(parse_chips("v5e:2x2"), TrainConfig(batch_size=8), plan) == []
    assert {c.batch_size // c.accumulate for c in seen} == {8}


@pytest.mark.parametrize(
    ("name", "names"),
    [
        ("h100:8", ["h100:1", "h100:2", "h100:4", "h100:8"]),
        ("v5e:4x4", ["v5e:1x1", "v5e:2x2", "v5e:2x4", "v5e:4x4"]),
        ("v5p:2x2x2", ["v5p:1x1x1", "v5p:2x2x1", "v5p:2x2x2"]),
    ],
)
def test_a_sweep_goes_from_one_chip_to_those(name, names):
    plan, _ = planner(lambda c: 1.0)
    found = search.sweep(parse_chips(name), TrainConfig(), plan)
    assert [p["chips"] for p in found] == names
    n = found[-1]["n_chips"]
    assert report.efficiency(found)[-1] == pytest.approx(n**-0.5)
    found[0]["fits"] = False  # what does not fit is no measure of what does
    assert report.efficiency(found)[1] == 1


@pytest.mark.parametrize(
    ("name", "needs", "keys"),
    [
        ("h100:1", lambda c: 170e9 / c.accumulate, "--accumulate=4"),
        ("h100:1", lambda c: 100e9 if c.model.remat != "full" else 70e9, "--model.remat=full"),
        ("h100:8", lambda c: 300e9 / c.mesh.fsdp, "--mesh.fsdp=8"),
        ("h100:1", lambda c: 1e12, None),
    ],
)
def test_the_nearest_change_that_fits_is_named(name, needs, keys, capfd):
    plan, seen = planner(needs)
    config = TrainConfig(batch_size=64)
    change = search.nearest_that_fits(parse_chips(name), config, plan)
    assert (change and change[0]) == keys
    assert all(c.batch_size == 64 for c in seen)


# ---- planned against measured -------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    "keys",
    [
        "",
        "--model.remat=full",
        "--model.n_layers=7",
        "--model.n_layers=7 --model.remat=full --accumulate=2",
        "--objective=all_tokens --batch_size=8",
        "--model.n_layers=7 --model.dtype=bfloat16 --mesh.fsdp=2",
    ],
)
def test_the_formula_has_the_products_of_the_program_that_runs(keys):
    small = "--model.d_model=64 --model.n_heads=2 --model.vocab_size=1009".split()
    config = parse([*small, *keys.split()], "test")
    n = config.mesh.fsdp
    code = f"""
import sys
from jax_model5 import flops
from jax_model5.config import parse
from jax_model5.plan import costs, hlo, report, search
from jax_model5.programs import Programs
config = parse({[*small, *keys.split()]!r}, "test")
found = costs.flops_by_dtype(hlo.Program(Programs(config).train_step.as_text()))
print(sum(found.values()) * {n})
"""
    env = os.environ | {"XLA_FLAGS": f"--xla_force_host_platform_device_count={n}"}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True)
    planned = sum(flops.step_flops(config).values()) + flops.recomputed_flops(config, n)
    assert float(done.stdout) == pytest.approx(planned, rel=0.02), done.stderr


@pytest.mark.slow
def test_a_plan_holds_where_it_is_measured(tmp_path):
    wide = "--measure", "--model.d_model=384", "--batch_size=8", f"--out={tmp_path}"
    code, out, err = run(*wide, module="jax_model5.plan")
    assert code == 0, err
    found = json.loads((tmp_path / "measured.json").read_text())
    memory, products = found["memory"], found["flops"]
    assert memory["measured"] == pytest.approx(memory["planned"], rel=0.1)  # measured 1.06
    assert products["measured"] == pytest.approx(products["planned"], rel=0.02)
    assert "measured / planned" in out


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ("", "chips: name some"),
        ("--measure --chips=v5e:2x2", "chips: name some"),
        ("--search --chips=v5e:2x2 --chips=h100:8", "want one --chips"),
        ("--search --sweep=chips --chips=v5e:2x2", "not allowed with"),
        ("--chips=v5e:2x2 --mesh.fsdp=8", "mesh.fsdp=8: a mesh of 8 devices, but v5e:2x2 has 4"),
        ("--chips=h100:4 --mesh.data=3 --mesh.fsdp=2", "a mesh of 6 devices, but h100:4 has 4"),
    ],
)
def test_bad_combinations_are_one_line(keys, words):
    code, out, err = run(*keys.split(), module="jax_model5.plan")
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert words in err


def test_bfloat16_sums_over_many_devices_lose_what_float32_keeps():
    """Why gradients travel in float32: 256 devices, each gradient noise around a small mean."""
    rng = np.random.default_rng(0)
    gradients = (rng.normal(size=(256, 4096)) + 0.1).astype(np.float32)
    narrow = gradients.astype(jax.numpy.bfloat16)  # as a product in bfloat16 leaves them
    in_float32 = narrow.astype(np.float32).sum(0)
    in_bfloat16 = narrow[0]
    for row in narrow[1:]:  # a ring
        in_bfloat16 = in_bfloat16 + row
    exact = gradients.astype(np.float64).sum(0)

    def error(total):
        return np.linalg.norm(total.astype(np.float64) - exact) / np.linalg.norm(exact)

    assert error(in_float32) < 2e-3  # measured 9e-4
    assert error(in_bfloat16) > 1e-2  # measured 1.7e-2


LEFT_ALONE = """
import sys, jax
from jax_model5 import startup
startup.DEVICE_FILES = sys.argv[1:]
startup.leave_absent_chips_alone()
print(jax.config.jax_platforms)
"""


@pytest.mark.parametrize(
    ("files", "platforms", "expected"),
    [("/dev/none*", None, "cpu"), ("/dev/nul*", None, "None"), ("/dev/none*", "tpu", "tpu")],
)
def test_chips_that_are_not_here_are_not_looked_for(files, platforms, expected):
    env = {name: value for name, value in os.environ.items() if name != "JAX_PLATFORMS"}
    env |= {"JAX_PLATFORMS": platforms} if platforms else {}
    command = [sys.executable, "-c", LEFT_ALONE, files]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.stdout.split() == [expected], done.stderr
