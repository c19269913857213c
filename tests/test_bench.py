"""The benchmark: its arithmetic on made-up times, its processes, its files, its errors."""

import json
import sys

import jax
import jax.numpy as jnp
import matplotlib.image
import numpy as np
import pytest

from jax_model5 import model, step, trees
from jax_model5.bench import __main__ as bench
from jax_model5.bench import cases, ctranslate2_peer, measure, peers, rounds
from jax_model5.config import TrainConfig, to_yaml
from jax_model5.errors import UserError
from tests.tiny import run, tiny, with_model

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


def program(name, script, *args):
    return rounds.Program(name, [sys.executable, "-c", script, *map(str, args)], {})


def test_programs_take_turns_and_keep_their_times(tmp_path):
    log = tmp_path / "log"
    a = program("a", MADE_UP, "a", [1, 2, 3, 4], log)
    b = program("b", MADE_UP, "b", [10, 20, 30, 40], log)
    requests = {"a": {"step": 2}, "b": {"step": 1, "matmul": 1}}
    times = rounds.in_turn([a, b], 2, requests)
    for child in (a, b):
        child.end()
    assert log.read_text().split() == ["a", "b", "b", "a", "b", "b"]
    assert times["a"] == {"step": [[1, 2], [3, 4]], "peak_bytes": 7}
    assert times["b"] == {"step": [[10], [30]], "matmul": [[20], [40]], "peak_bytes": 7}


def test_summary_of_made_up_times():
    assert rounds.summary([4, 1, 3, 2, 5]) == {"median": 3, "q1": 2, "q3": 4, "n": 5}
    assert rounds.summary([7]) == {"median": 7, "q1": 7, "q3": 7, "n": 1}


def test_ratio_is_per_round_so_that_a_slow_minute_cancels():
    ours, theirs = [[1, 2, 3], [10, 20, 30]], [[4, 4, 9], [40, 60, 80]]
    assert rounds.ratio(ours, theirs) == {"rounds": [2, 3], "median": 2.5, "min": 2, "max": 3}
    with pytest.raises(ValueError, match="shorter"):
        rounds.ratio(ours, theirs[:1])


class Result:
    """What a device returns at once and computes later: waiting for it takes time."""

    def __init__(self, clock, seconds):
        self.clock, self.seconds = clock, seconds

    def block_until_ready(self):
        self.clock.now += self.seconds
        return self


class Clock:
    now = 0.0

    def perf_counter(self):
        return self.now


def test_the_clock_stops_when_the_device_is_done_and_sees_a_slow_path(monkeypatch):
    """A planted slow path, 10 times slower on the device, is 10 times slower in the ratio."""
    clock = Clock()
    monkeypatch.setattr(measure, "time", clock)
    fast = [[measure.timed(lambda: {"loss": Result(clock, 0.5)})] for _ in range(3)]
    slow = [[measure.timed(lambda: {"loss": Result(clock, 5.0)})] for _ in range(3)]
    assert rounds.ratio(fast, slow)["median"] == pytest.approx(10)


def test_programs_that_do_other_work_are_refused():
    rounds.require_equal_losses({"a": 10.82, "b": 10.82005}, "float32")
    for other in (10.83, float("nan")):
        with pytest.raises(UserError, match="do not do the same work"):
            rounds.require_equal_losses({"a": 10.82, "b": other}, "float32")


@pytest.mark.parametrize(
    "script",
    [
        "import sys; print('boom', file=sys.stderr); sys.exit(3)",
        "import sys; sys.exit('error: boom')",
        "raise OSError('boom')",
        "e = RuntimeError('boom: out of memory\\nof 3 GiB'); e.add_note('a note'); raise e",
    ],
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


@pytest.mark.slow
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
    assert ours["compile_cold_s"] > 0
    assert ours["of_matmul"] < 1
    assert {"command", "commit", "machine", "precision", "attention", "prng"} <= result.keys()
    assert {"jax", "torch", "processor", "device"} <= result["machine"].keys()
    assert matplotlib.image.imread(out / "tiny_final_token.png").shape[2] == 4


@pytest.mark.slow
def test_a_sweep_predicts_and_measures(tmp_path, case_file, monkeypatch):
    monkeypatch.setitem(cases.SWEEPS, "last_k", (1, 16))
    arguments = f"--case {case_file} --sweep last_k --rounds 1 --steps 2 --out {tmp_path}"
    monkeypatch.setattr(sys, "argv", ["bench", *arguments.split()])
    bench.main()
    result = json.loads((tmp_path / "tiny_final_token_sweep_last_k.json").read_text())
    assert [point["value"] for point in result["points"]] == [1, 16]
    one, all_positions = (point["flops"]["head"] for point in result["points"])
    assert 16 * one == all_positions
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
        ("--batch 0 --generate", "batch=0: must be at least 1"),
        ("--batch 9999 --prompt 255 --generate", "batch=9999: 9999 prompts of 255 tokens are more"),
        ("--prompt 256 --generate", "prompt=256: the window is model.seq_len=256"),
        ("--batch 3 --sweep batch", "batch=3: the batch is swept without it"),
        ("--peer flax --generate", "peer='flax': a text has the peers course, transformers"),
        ("--peer ctranslate2", "peer='ctranslate2': a step has the peers course, tuned, flax"),
        ("--sweep batch --generate", "leave out --sweep"),
        ("--dtype float32 --dtype bfloat16 --sweep batch", "one --dtype at a time"),
        ("--accumulate 2 --sweep batch", "the batch is swept without it"),
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
    lines = [line for line in error.splitlines() if not line.startswith("tokenized ")]
    assert words in error
    assert len(lines) == 1


def test_no_device_is_one_line(monkeypatch):
    monkeypatch.setenv("JAX_PLATFORMS", "quantum")
    with pytest.raises(UserError, match=r"no device: .*quantum.*; check JAX_PLATFORMS"):
        bench.platform_of_jax()


def test_runs_of_other_knobs_have_other_names():
    options = bench.parse_args("--case model5 --dtype bfloat16 --gelu tanh --remat full".split())
    name = bench.file_name(options, cases.case("model5", "cpu"))
    assert name == "model5_final_token_bfloat16_gelu_tanh_remat_full"
    model = bench.configure(options, "cpu").model
    assert (model.dtype, model.gelu, model.remat) == ("bfloat16", "tanh", "full")


def test_a_program_that_died_between_turns_is_told():
    child = program("x", "print('{}', flush=True); raise OSError('boom')")
    child._process.wait()
    with pytest.raises(UserError, match="boom"):
        child.ask("step", 1)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("peer", "variant"),
    [
        ("course", {}),
        ("course", {"gelu": "tanh", "tied_head": False}),
        ("flax", {}),
        ("flax", {"gelu": "tanh", "scale_logits": False, "n_layers": 1}),
        ("flax", {"dtype": "bfloat16"}),
        ("transformers", {}),
        ("transformers", {"gelu": "tanh", "scale_logits": False, "tied_head": False}),
    ],
)
def test_peers_need_the_same_weights_to_compare_losses(peer, variant, tmp_path, text_file):
    """A peer at the weights that our side wrote has our loss; at other weights it has not."""
    config = with_model(tiny(tmp_path, text_file, objective="last_k", last_k=3), **variant)
    path = tmp_path / "config.yaml"
    path.write_text(to_yaml(config))
    weights = str(tmp_path / "weights.npz")
    dtype = config.model.dtype
    ours = peers.ours(config, dtype, tmp_path)
    theirs = getattr(peers, peer)(config, dtype, tmp_path)
    with peers.ended([ours, theirs]):
        losses = {"jax": ours.ask("loss", weights)["loss"]}
        losses["peer"] = theirs.ask("loss", weights)["loss"]
        rounds.require_equal_losses(losses, dtype)
        assert theirs.ask("step", 2)["seconds"][0] > 0 < theirs.ask("eval", 1)["seconds"][0]
        leaves = dict(np.load(weights))
        last = f"blocks.{config.model.n_layers - 1}.ln_1.bias"
        wrong, by = {"float32": (last, 1.0), "bfloat16": ("ln_f.bias", 10.0)}[dtype]
        leaves[wrong] += by
        np.savez(weights, **leaves)
        losses["peer"] = theirs.ask("loss", weights)["loss"]
    with pytest.raises(UserError, match="do not do the same work"):
        rounds.require_equal_losses(losses, dtype)


def test_the_bound_of_a_text_reads_what_each_token_reads(monkeypatch):
    """Of the embeddings a token reads one row; the head is there once, tied or not."""
    config = with_model(TrainConfig(), vocab_size=61, seq_len=8, d_model=16, n_heads=2, n_layers=3)
    params = step.init_state(jax.random.key(0), config=config).params
    read = []
    monkeypatch.setattr(measure, "_sum", lambda tree: read.append(tree) or jnp.zeros(()))
    assert measure.read_weights(params, config) > 0
    embeddings = params["wpe"].nbytes  # wte, tied, is the head
    assert trees.n_bytes(read[0]) == trees.n_bytes(params) - embeddings


@pytest.mark.parametrize(
    "fields", [{}, {"gelu": "tanh", "tied_head": False, "scale_logits": False}]
)
def test_ctranslate2_writes_with_our_logits(fields):
    """At random weights, far from the init."""
    sizes = {"vocab_size": 61, "seq_len": 9, "d_model": 24, "n_heads": 4, "n_layers": 3}
    config = with_model(TrainConfig(), **sizes, **fields)
    shapes, c = step.abstract_state(config).params, config.model
    random = np.random.default_rng(0)
    draw = lambda leaf: random.normal(0.1, 0.2, leaf.shape).astype(np.float32)  # noqa: E731
    params = jax.tree.map(draw, shapes)
    tokens_BxL = random.integers(0, 61, (2, 9))
    engine = ctranslate2_peer.loaded(trees.to_layout(params, c, "torch_ref"), c)
    found = np.array(engine.forward_batch(tokens_BxL.tolist()))
    ours = model.Model5(c).apply({"params": params}, tokens_BxL, n_last=9, deterministic=True)
    np.testing.assert_allclose(found, ours, atol=1e-5 * np.abs(ours).max())
    written = ctranslate2_peer.write_texts(engine, tokens_BxL[:, :4], 5)
    assert [len(one.sequences_ids[0]) for one in written] == [5, 5]


@pytest.mark.slow
def test_texts_are_compared_with_transformers_and_the_bound(tmp_path, text_file):
    config = with_model(tiny(tmp_path, text_file), seq_len=256)
    path = tmp_path / "tiny.yaml"
    path.write_text(to_yaml(config))
    arguments = f"--case {path} --generate --batch 3 --prompt 200 --rounds 2"
    others = ["transformers", "compiled_transformers", "ctranslate2"]
    arguments = [*arguments.split(), *(f"--peer={name}" for name in others), "--out", tmp_path]
    code, stdout, stderr = run(*arguments, module="jax_model5.bench")
    assert code == 0, stderr
    assert "all weights and the cache read in" in stdout
    for name in ("torch transformers", "torch compiled transformers", "ctranslate2"):
        assert f"jax float32 against {name} float32" in stdout
    result = json.loads((tmp_path / "tiny_final_token_batch_3_generate_200.json").read_text())
    ours, theirs, *_ = result["programs"]
    assert (result["texts"], result["generated_tokens"]) == (3, 56)
    assert ours["tokens_per_s"] == 3 * 56 / ours["seconds"]["median"]
    assert ours["of_bound"] == ours["tokens_per_s"] / 3 * result["bound_s"] > 0
    weights = step.abstract_state(config).params
    read = trees.n_bytes(weights) - trees.n_bytes(weights["wpe"])  # wte, tied, is the head
    cache = 3 * (200 + 56 / 2) * 2 * config.model.n_layers * config.model.d_model * 4
    assert result["bound_s"] == pytest.approx(result["read_weights_s"] * (1 + cache / read))
    assert len(theirs["rounds"]) == 2
