"""Comparing configs: equal budgets, runs that are reused, a kill that changes no number."""

import dataclasses
import json
import math
import re
import shlex
import shutil
import signal
import sys
import time
from pathlib import Path

import pytest

from jax_model5 import record
from jax_model5.compare import __main__ as compare
from jax_model5.compare import plan, report, summary
from jax_model5.config import TEST_METRICS, TrainConfig
from jax_model5.errors import UserError
from tests.tiny import MODEL, TEXT, run, start

CONFIG = TrainConfig(model=MODEL, batch_size=4, eval_batches=2)
FINAL = CONFIG
ALL = dataclasses.replace(CONFIG, objective="all_tokens")

YAML = """
objective: {objective}
steps: 20
batch_size: 4
eval_batches: 2
model: {{vocab_size: 257, seq_len: 64, d_model: 16, n_heads: 2, n_layers: 2}}
data: {{source: {folder}/text.txt, tokenizer: bytes, cache_dir: {folder}/cache}}
optimizer: {{learning_rate: 3e-3}}
"""


@pytest.fixture(scope="module")
def configs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("configs")
    (folder / "text.txt").write_text(TEXT)
    paths = []
    for objective in ("final_token", "all_tokens"):
        paths.append(folder / f"{objective}.yaml")
        paths[-1].write_text(YAML.format(objective=objective, folder=folder))
    return [str(path) for path in paths]


# ---- budgets ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("budget", "final", "all_"),
    [
        ("steps=40", 40, 40),
        ("targets=6400", 1600, 100),  # 4 targets a step against 4 x 16
        ("tokens=6400", 100, 100),
        ("seconds=3", 30, 3),
    ],
)
def test_a_budget_is_shared_out_by_the_cost_of_a_step(budget, final, all_, tmp_path, monkeypatch):
    times = {"final_token": 0.1, "all_tokens": 1.0}
    monkeypatch.setattr(plan, "time_steps", lambda config: times[config.objective])
    runs = plan.make_runs({"final": FINAL, "all": ALL}, 2, plan.parse_budget(budget), tmp_path)
    assert [(r.label, r.config.steps) for r in runs] == [
        (f"final-seed0-{final}", final),
        (f"all-seed0-{all_}", all_),
        (f"final-seed1-{final}", final),
        (f"all-seed1-{all_}", all_),
    ]
    assert {r.config.eval_batches * r.config.batch_size for r in runs} == {8}


def test_equal_flops_are_equal():
    budget = plan.parse_budget("flops=1e9")
    runs = plan.make_runs({"final": FINAL, "all": ALL}, 1, budget, Path("nowhere"))
    spent = [r.config.steps * plan.cost_of_step(r.config)["flops"] for r in runs]
    costs = [plan.cost_of_step(r.config)["flops"] for r in runs]
    assert all(1e9 - cost < total <= 1e9 for total, cost in zip(spent, costs, strict=True))
    assert runs[0].config.steps > runs[1].config.steps


@pytest.mark.slow
def test_seconds_are_those_of_the_clock(tmp_path, configs):
    """A step is timed after the first, which may compile."""
    ticks = iter([x for k in range(5) for x in (100 * k, 100 * k + 2)])
    config = plan.read_configs(configs[:1], [])["final_token"]
    assert plan.time_steps(config, clock=lambda: next(ticks)) == 2


# ---- statistics ---------------------------------------------------------------------------------


def test_every_run_reaches_the_common_level():
    """Of three seeds one ends above their mean: the level is where the last run ends."""

    def run(*losses):
        return {"step": [10, 20, 30], "final_token_nll": losses, "all_token_nll": losses}

    runs = {"fast": [run(9, 5, 3), run(9, 5, 4)], "slow": [run(9, 8, 6), run(9, 8, 7)]}
    assert summary.levels(runs) == {"final_token_nll": 7, "all_token_nll": 7}
    steps = [
        summary.steps_to_reach(7, r["step"], r["final_token_nll"])
        for seeds in runs.values()
        for r in seeds
    ]
    assert steps == [15, 15, 25, 30]
    assert summary.steps_to_reach(9.5, [10, 20, 30], [9, 5, 3]) == 10
    assert math.isnan(summary.steps_to_reach(2, [10, 20, 30], [9, 5, 3]))


def test_the_noise_scale_of_seeds_is_no_mean_of_ratios():
    """One seed's |G|² is near 0 by chance: its own ratio would be all of the mean."""
    seeds = [{"trace": 2.0, "squared_norm": norm, "scale": 2 / norm} for norm in (1e-9, 2.0)]
    runs = [
        {
            **{"step": [1], "final_token_nll": [1.0], "all_token_nll": [1.0], "train_std": 0.0},
            **{"noise": {"end": {"1": noise}}, "gap": {}, "text": {}, "documents": {}},
            "judged_by": {},
        }
        for noise in seeds
    ]
    found = summary.summarize({"a": runs}, {"a": {"flops": 1.0}})["a"]
    assert found["noise/end/1/scale"]["mean"] == pytest.approx(2.0)


def test_a_rise_is_of_its_own_loss():
    """The final token's loss jumps by 2 and that of all tokens by 1, both from a later test on."""
    losses = {"final_token_nll": [5.0, 4.0, 6.0, 3.0], "all_token_nll": [9.0, 6.0, 7.0, 5.0]}
    rest = {key: {} for key in ("noise", "gap", "text", "documents", "judged_by")}
    runs = [{"step": [1, 2, 3, 4], "train_std": 0.0, **losses, **rest}]
    found = summary.summarize({"a": runs}, {"a": {"flops": 1.0}})["a"]
    assert found["largest_rise_of_final_token_nll"]["mean"] == 2
    assert found["largest_rise_of_all_token_nll"]["mean"] == 1


def test_a_text_too_short_for_a_figure_shows_a_dash():
    text = dict.fromkeys([key for _, key, _ in report.TEXT], 1.0)
    rows = report.text_rows([text, text | {"divergence": math.nan}])
    assert [row[1:] for row in rows if "nan" in row or "-" in row] == [["1.000", "-"]]


def test_a_value_and_its_spread():
    assert report.value_of(summary.over_seeds([1.0, math.nan]), ".2f") == "-"
    assert report.value_of(summary.over_seeds([1.0, 3.0]), ".2f") == "2.00 ± 1.41"
    assert report.value_of(summary.over_seeds([1.0]), ".2f") == "1.00"


# ---- the command --------------------------------------------------------------------------------


def arguments(configs, out):
    return [*configs, "--seeds", "2", "--noise_windows", "24", "--out", str(out)]


@pytest.fixture(scope="module")
def finished(tmp_path_factory, configs):
    out = tmp_path_factory.mktemp("finished")
    code, stdout, err = run(*arguments(configs, out), module="jax_model5.compare")
    assert code == 0, err
    assert "written" in stdout
    return out


def test_the_result_holds_every_figure(finished):
    result = json.loads((finished / "results.json").read_text())
    assert set(result["runs"]) == {"final_token", "all_tokens"}
    for name, seeds in result["runs"].items():
        assert [figures["seed"] for figures in seeds] == [0, 1]
        for figures in seeds:
            assert len(figures["train_loss"]) == 20
            assert figures["step"] == list(range(21))
            assert set(figures["noise"]["end"]) == {"1", "64"}
            assert set(figures["judged_by"]) == {"final_token", "all_tokens"}
        first = [seeds[0][metric] for metric in TEST_METRICS]
        assert first != [seeds[1][metric] for metric in TEST_METRICS], "the seed did nothing"
        assert result["summary"][name]["final_token_nll"]["std"] > 0
    ends = [
        result["summary"][name]["all_token_nll"]["mean"] for name in ("all_tokens", "final_token")
    ]
    assert ends[0] < ends[1], "sixty-four targets a sequence learn slower than one"


def test_the_page_is_whole_in_itself(finished):
    page = (finished / "index.html").read_text()
    assert page.index("<img") < page.index("<table"), "plots before tables"
    assert page.count("data:image/png;base64,") == 3
    assert not re.search(r'(src|href)="(?!data:)', page)
    for part in ("Learning speed", "Stability", "Fit for generation", "Compute cost", "tr Σ"):
        assert part in page
    text = re.sub(r"base64,[^\"]*", "", page)
    assert "nan" not in text
    speed = text.split("Learning speed")[1].split("</table>")[0]
    assert "<td>-</td>" not in speed, "a run does not reach what all reach"


@pytest.mark.slow
def test_a_second_start_reuses_everything(finished, configs):
    def times():
        kept = [p for p in finished.rglob("*") if p.is_file() and p.parent != finished]
        return {path: path.stat().st_mtime_ns for path in kept}

    before, result = times(), (finished / "results.json").read_bytes()
    code, _, err = run(*arguments(configs, finished), module="jax_model5.compare")
    assert code == 0, err
    assert "measuring" not in err
    assert times() == before
    assert (finished / "results.json").read_bytes() == result


@pytest.mark.slow
@pytest.mark.parametrize("at", ["training", "measuring"])
def test_a_kill_changes_no_number(finished, configs, tmp_path, at):
    """SIGKILL in the middle of a run, or of the measurements after it."""
    process = start(*arguments(configs, tmp_path), module="jax_model5.compare")
    log = tmp_path / "runs/all_tokens-seed0-20/metrics.jsonl"
    figures = tmp_path / "figures/final_token-seed0-20.json"

    def is_time():
        if at == "measuring":
            return figures.exists()
        return log.exists() and len(log.read_text().splitlines()) > 10

    while not is_time():
        assert process.poll() is None, process.communicate()
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not (tmp_path / "results.json").exists()
    code, _, err = run(*arguments(configs, tmp_path), module="jax_model5.compare")
    assert code == 0, err
    found, expected = (
        json.loads((folder / "results.json").read_text()) for folder in (tmp_path, finished)
    )
    assert found.pop("command") != expected.pop("command")  # it names the folder
    assert found == expected


@pytest.mark.slow
def test_a_signal_in_the_second_half_stops_it_and_the_same_command_goes_on(configs, tmp_path):
    """The stop saves a checkpoint of its own; the middle one, which is measured, stays."""
    args = [*configs[:1], "--seeds", "1", "--noise_windows", "24", "--out", tmp_path]
    args += ["--steps", "600", "--keep", "1"]
    process = start(*args, module="jax_model5.compare")
    log = tmp_path / "runs/final_token-seed0-600/metrics.jsonl"
    while not log.exists() or len(log.read_text().splitlines()) < 350:
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 0
    assert "the same command goes on" in err
    code, _, err = run(*args, module="jax_model5.compare")
    assert code == 0, err
    result = json.loads((tmp_path / "results.json").read_text(), parse_constant=pytest.fail)
    assert set(result["runs"]["final_token"][0]["noise"]) == {"middle", "end"}


@pytest.mark.slow
def test_another_budget_in_the_same_folder_is_another_run(finished, configs, tmp_path):
    shutil.copytree(finished, tmp_path / "out")
    args = [*arguments(configs, tmp_path / "out"), "--steps", "30", "--accumulate", "4"]
    code, _, err = run(*args, module="jax_model5.compare")
    assert code == 0, err
    result = json.loads((tmp_path / "out/results.json").read_text())
    assert [len(r["train_loss"]) for r in result["runs"]["final_token"]] == [30, 30]


@pytest.mark.slow
def test_a_run_that_diverges_is_named_and_the_others_are_kept(configs, tmp_path):
    wild = tmp_path / "wild.yaml"
    text = (
        Path(configs[0])
        .read_text()
        .replace("learning_rate: 3e-3", "name: sgd, learning_rate: 1e30")
    )
    wild.write_text(text)
    out = tmp_path / "out"
    args = [str(wild), configs[0], "--seeds", "1", "--out", str(out)]
    code, _, err = run(*args, module="jax_model5.compare")
    assert code == 2
    assert re.match(
        r"error: optimizer\.learning_rate: wild-seed0-20 diverged", err.splitlines()[-1]
    )
    assert "Traceback" not in err
    assert (out / "runs/final_token-seed0-20/checkpoints/20").is_dir()
    assert not (out / "results.json").exists()


@pytest.mark.slow
def test_any_name_of_a_config_is_only_a_name(configs, tmp_path):
    """The figures of a comparison have names of their own: noise/.../scale, .../trace, ..."""
    names = ["scale", "trace", "squared_norm", "noise", "mean", "steps", "judged_by"]
    text = Path(configs[0]).read_text().replace("steps: 20", "steps: 2")
    for name in names:
        (tmp_path / f"{name}.yaml").write_text(text)
    paths = [str(tmp_path / f"{name}.yaml") for name in names]
    args = [*paths, "--seeds", "1", "--noise_windows", "24", "--out", tmp_path / "an out"]
    code, _, err = run(*args, module="jax_model5.compare")
    assert code == 0, err
    text = (tmp_path / "an out/results.json").read_text()
    result = json.loads(text, parse_constant=pytest.fail)
    assert set(result["summary"]) == set(names)
    figures = result["summary"]["scale"]
    assert {f"judged_by/{name}" for name in names} <= figures.keys()
    equal = [result["summary"][name]["all_token_nll"] for name in names]
    assert equal == [equal[0]] * len(names)
    # The command can be pasted, also where a path has a space in it.
    words = shlex.split(result["command"])
    assert words[:3] == ["python", "-m", "jax_model5.compare"]
    assert words[3:] == [str(arg) for arg in args]


@pytest.mark.parametrize("norm", [0.0, math.inf, math.nan])
def test_figures_that_are_not_finite_are_written_as_null(norm, tmp_path):
    noise = {"trace": 1.0, "squared_norm": norm, "scale": math.nan}
    rest = {key: {} for key in ("gap", "text", "documents", "judged_by")}
    losses = {metric: [math.inf] for metric in TEST_METRICS}
    runs = [{"step": [1], "train_std": 0.0, "noise": {"end": {"1": noise}}, **losses, **rest}]
    found = summary.summarize({"a": runs}, {"a": {"flops": 1.0}})
    record.write_json(tmp_path / "found.json", found)
    text = (tmp_path / "found.json").read_text()
    scale = json.loads(text, parse_constant=pytest.fail)["a"]["noise/end/1/scale"]["mean"]
    assert scale == (0.0 if norm == math.inf else None)


BAD = {
    "no config": ([], "CONFIG.yaml"),
    "a missing file": (["none.yaml"], "config='none.yaml': No such file"),
    "one name twice": (["{0}", "{0}"], "two configs are called final_token"),
    "another vocabulary": (["{0}", "{other}"], "model.vocab_size=300 in other and 257 in"),
    "a budget of 0": (["{0}", "--budget", "steps=0"], "budget='steps=0'"),
    "an unknown budget": (["{0}", "--budget", "joules=3"], "budget='joules=3': write KIND=N"),
    "a budget without a number": (["{0}", "--budget", "steps"], "budget='steps'"),
    "a budget below a step": (["{0}", "--budget", "tokens=3"], "buys no step of final_token"),
    "no seeds": (["{0}", "--seeds", "0"], "seeds=0"),
    "too few windows": (["{0}", "--noise_windows", "8"], "noise_windows=8"),
    "unknown key": (["{0}", "--model.width", "3"], "model.width='3': unknown key"),
    "other windows": (["{0}", "{odd}"], "batch_size=3 in odd: does not divide the 8 test windows"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_line(name, configs, tmp_path, monkeypatch, capsys):
    args, part = BAD[name]
    names = {"other": tmp_path / "other.yaml", "odd": tmp_path / "odd.yaml"}
    text = Path(configs[0]).read_text()
    names["other"].write_text(text.replace("257", "300"))
    names["odd"].write_text(text.replace("batch_size: 4", "batch_size: 3"))
    out = tmp_path / "out"
    argv = [arg.format(configs[0], **names) for arg in args]
    monkeypatch.setattr(sys, "argv", ["compare", *argv, "--out", str(out)])
    with pytest.raises(SystemExit) as stop:
        compare.main()
    err = capsys.readouterr().err
    assert stop.value.code == 2
    assert len(err.splitlines()) == 1, err
    assert part in err
    assert not out.exists()


def test_a_folder_that_cannot_be_made_is_one_line(configs, tmp_path):
    (tmp_path / "file").write_text("")
    args = [configs[0], "--out", tmp_path / "file/out"]
    code, _, err = run(*args, module="jax_model5.compare")
    assert code == 2
    assert err.splitlines()[-1].startswith(f"error: out='{tmp_path}/file/out': Not a directory")


@pytest.mark.slow
def test_float64_and_float32_can_be_compared(configs, tmp_path):
    double = tmp_path / "double.yaml"
    double.write_text(
        Path(configs[0]).read_text().replace("n_layers: 2", "n_layers: 2, dtype: float64")
    )
    args = [str(double), configs[0], "--seeds", "1", "--noise_windows", "0", "--steps", "4"]
    code, _, err = run(*args, "--out", tmp_path / "out", module="jax_model5.compare")
    assert code == 0, err


def test_configs_that_can_be_compared_may_differ_in_the_rest():
    plan._require_comparable({"a": FINAL, "b": ALL})
    shorter = dataclasses.replace(FINAL, model=dataclasses.replace(MODEL, seq_len=8))
    with pytest.raises(UserError, match=r"model\.seq_len=8"):
        plan._require_comparable({"a": FINAL, "b": shorter})
