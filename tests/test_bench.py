"""The benchmark: its arithmetic on made-up times, its processes, its files, its errors."""

import json
import sys

import matplotlib.image
import pytest

from jax_model5.bench import __main__ as bench
from jax_model5.bench import cases, rounds
from jax_model5.config import TrainConfig, UserError, to_yaml
from tests.tiny import run, tiny

# A program of made-up times: it speaks the protocol and writes down when it was asked.
MADE_UP = """
import json, sys
name, seconds, log = sys.argv[1], json.loads(sys.argv[2]), sys.argv[3]
print("a library talks"); print(json.dumps({"loss": 1.0}), flush=True)
for line in sys.stdin:
    kind, count = line.split()
    print(name, file=open(log, "a"))
    print(json.dumps({"seconds": seconds[: int(count)], "peak_bytes": 7}), flush=True)
    seconds = seconds[int(count) :]
"""
# A program that serves a real clock: its step sleeps, or does not.
SLOW_PATH = """
import sys, time
from jax_model5.bench.measure import serve
def step():
    start = time.perf_counter()
    time.sleep(float(sys.argv[1]))
    return time.perf_counter() - start
serve({"loss": 1.0}, {"step": step})
"""


def program(name, script, *args):
    return rounds.Program(name, [sys.executable, "-c", script, *map(str, args)], {})


def test_programs_take_turns_and_keep_their_times(tmp_path):
    log = tmp_path / "log"
    a = program("a", MADE_UP, "a", [1, 2, 3, 4], log)
    b = program("b", MADE_UP, "b", [10, 20, 30, 40], log)
    times = rounds.in_turn([a, b], 2, 2)
    for child in (a, b):
        child.end()
    assert log.read_text().split() == ["a", "b", "a", "b"]
    assert times["a"] == {"rounds": [[1, 2], [3, 4]], "peak_bytes": 7}
    assert times["b"]["rounds"] == [[10, 20], [30, 40]]


def test_summary_of_made_up_times():
    assert rounds.summary([4, 1, 3, 2, 5]) == {"median": 3, "q1": 2, "q3": 4, "n": 5}
    assert rounds.summary([7]) == {"median": 7, "q1": 7, "q3": 7, "n": 1}


def test_ratio_is_per_round_so_that_a_slow_minute_cancels():
    ours, theirs = [[1, 2, 3], [10, 20, 30]], [[4, 4, 9], [40, 60, 80]]
    assert rounds.ratio(ours, theirs) == {"rounds": [2, 3], "median": 2.5, "min": 2, "max": 3}
    with pytest.raises(ValueError, match="shorter"):
        rounds.ratio(ours, theirs[:1])


def test_the_benchmark_sees_a_planted_slow_path():
    fast, slow = program("fast", SLOW_PATH, 0), program("slow", SLOW_PATH, 0.05)
    times = rounds.in_turn([fast, slow], 2, 3)
    for child in (fast, slow):
        child.end()
    assert rounds.ratio(times["fast"]["rounds"], times["slow"]["rounds"])["min"] > 2


def test_programs_that_do_other_work_are_refused():
    rounds.require_equal_losses({"a": 10.82, "b": 10.83})
    for other in (10.7, float("nan")):
        with pytest.raises(UserError, match="do not do the same work"):
            rounds.require_equal_losses({"a": 10.82, "b": other})


@pytest.mark.parametrize(
    "script", ["import sys; print('boom', file=sys.stderr); sys.exit(3)", "raise OSError('boom')"]
)
def test_a_program_that_dies_is_one_line(script):
    with pytest.raises(UserError, match=r"x ended with exit code \d: .*boom"):
        program("x", script)


def test_a_program_that_dies_later_is_one_line():
    child = program("x", "print('{}', flush=True); input(); raise OSError('boom')")
    with pytest.raises(UserError, match="boom"):
        child.ask("step", 1)


def test_ratios_pair_equal_dtypes_and_the_best():
    def row(name, seconds):
        times = {"rounds": [[seconds]], "step": {"median": seconds}, "peak_bytes": 2}
        return {"name": name, **times}

    rows = [
        row("jax float32", 2),
        row("jax bfloat16", 4),
        row("torch course float32", 10),
        row("torch tuned eager float32", 6),
        row("torch tuned compile bfloat16", 1),
    ]
    pairs = {(r["ours"], r["theirs"]): r["median"] for r in bench.ratios(rows)}
    assert pairs == {
        ("jax float32", "torch course float32"): 5,
        ("jax float32", "torch tuned eager float32"): 3,
        ("jax bfloat16", "torch tuned compile bfloat16"): 0.25,
        ("jax float32", "torch tuned compile bfloat16"): 0.5,
    }


def test_cases_by_name():
    assert cases.case("small", "cpu") == TrainConfig()
    assert cases.case("model5", "cpu").batch_size == 4
    assert cases.case("model5", "gpu").batch_size == 64
    assert [value for value, _ in cases.sweep_points(TrainConfig(), "last_k")] == [
        1,
        4,
        16,
        64,
        256,
    ]
    for sweep, names in cases.SWEEPS.items():
        assert len(cases.sweep_points(TrainConfig(), sweep)) == len(names)


@pytest.fixture
def case_file(tmp_path, text_file):
    path = tmp_path / "tiny.yaml"
    path.write_text(to_yaml(tiny(tmp_path, text_file)))
    return path


def test_a_comparison_writes_its_table_json_and_plot(tmp_path, case_file):
    out = tmp_path / "out"
    arguments = f"--case {case_file} --peer course --rounds 2 --steps 1 --out {out}".split()
    code, stdout, stderr = run(*arguments, module="jax_model5.bench")
    assert code == 0, stderr
    assert "jax float32 against torch course float32:" in stdout
    result = json.loads((out / "tiny_final_token.json").read_text())
    ours, course = result["programs"]
    assert ours["flops"].keys() == {"full blocks", "suffix block", "attention", "head"}
    assert ours["step"]["n"] == course["step"]["n"] == 2
    assert ours["first_step_cold_s"] > 0 < ours["compile_s"]
    assert ours["loss"] == pytest.approx(course["loss"], abs=0.05)
    assert {"command", "commit", "machine", "precision", "attention", "prng"} <= result.keys()
    assert {"jax", "torch", "processor", "device"} <= result["machine"].keys()
    assert matplotlib.image.imread(out / "tiny_final_token.png").shape[2] == 4


def test_a_sweep_predicts_and_measures(tmp_path, case_file):
    arguments = f"--case {case_file} --sweep last_k --rounds 1 --steps 2 --out {tmp_path}".split()
    code, _, stderr = run(*arguments, module="jax_model5.bench")
    assert code == 0, stderr
    result = json.loads((tmp_path / "tiny_final_token_sweep_last_k.json").read_text())
    assert [point["value"] for point in result["points"]] == [1, 4, 16]
    assert [point["flops"]["head"] for point in result["points"]] == sorted(
        point["flops"]["head"] for point in result["points"]
    )
    assert all(point["predicted_s"] > 0 for point in result["points"])
    assert (tmp_path / "tiny_final_token_sweep_last_k.png").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("--case smal", "case='smal': use small, model5, or"),
        ("--rounds 0", "rounds=0: must be at least 1"),
        ("--steps two", "invalid int value: 'two'"),
        ("--sweep width", "invalid choice: 'width'"),
        ("--peer tuned --sweep batch", "a sweep has no peers"),
        ("--accumulate 3", "accumulate=3: must divide batch_size=16"),
        ("--out /dev/null/x", "name another folder"),
    ],
)
def test_bad_input_is_one_line(arguments, words, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["bench", *arguments.split()])
    with pytest.raises(SystemExit) as stop:
        bench.main()
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert words in error
    assert error.count("\n") == 1
