"""YAML and command line into one config, and back."""

import dataclasses
import re

import pytest
import yaml

from jax_model5.config import ModelConfig, OptimizerConfig, TrainConfig, flatten, parse, to_yaml
from jax_model5.errors import UserError
from tests.tiny import ROOT, run


def test_the_keys_are_the_contract():
    config = dataclasses.asdict(TrainConfig())
    root = "objective last_k steps batch_size accumulate eval_every eval_batches checkpoint_every"
    root += " keep seed prng init_from init_leaves workdir tracker profile_steps"
    root += " model data optimizer mesh"
    assert " ".join(config) == root
    model = "vocab_size seq_len d_model n_heads n_layers dropout dropout_sites scale_logits"
    assert " ".join(config["model"]) == f"{model} tied_head gelu init dtype remat"
    data = "source subset n_docs text_field separator split_on_end_of_text skip_bad_rows tokenizer"
    assert " ".join(config["data"]) == f"{data} test_fraction sampling cache_dir"
    optimizer = "name learning_rate weight_decay b1 b2 eps schedule warmup_steps clip_norm freeze"
    assert " ".join(config["optimizer"]) == optimizer
    assert [*config["mesh"]] == ["data", "fsdp"]


def test_the_resolved_yaml_reads_back_to_the_same_config(tmp_path):
    args = ["--optimizer.learning_rate", "3e-5", "--model.scale_logits", "false", "--seed=7"]
    args += ["--data.source", "a b: #c.txt", "--optimizer.eps", "1e-20"]
    config = parse(args, "test")
    path = tmp_path / "config.yaml"
    path.write_text(to_yaml(config))
    assert parse(["--config", str(path)], "test") == config
    assert config != TrainConfig()


def test_the_command_line_wins_over_the_file(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text("steps: 5\noptimizer:\n  learning_rate: 1e-3\nmodel: {d_model: 64}\n")
    config = parse(["--model.d_model", "32", "--config", str(path)], "test")
    assert (config.steps, config.model.d_model) == (5, 32)
    assert config.optimizer.learning_rate == 1e-3  # a string to YAML


SHIPPED = sorted((ROOT / "configs").glob("*.yaml"))


@pytest.mark.parametrize("path", SHIPPED, ids=lambda p: p.name)
def test_the_shipped_configs_parse_and_say_what_to_expect(path):
    parse(["--config", str(path)], "test")
    header = path.read_text().split("\n\n")[0]
    assert all(line.startswith("#") for line in header.splitlines())
    assert f"--config configs/{path.name}" in header
    assert re.search(r"\d (s|seconds|minutes|hours)\b", header), "no time"
    assert re.search(r"Loss: .*\d+\.\d", header), "no loss"


# The table of the course's notebooks: what its three configs share, and what each has.
MODEL5 = {
    "model.n_layers": 12,
    "model.n_heads": 12,
    "model.d_model": 768,
    "model.seq_len": 256,
    "model.vocab_size": 50257,
    "model.gelu": "erf",
    "model.scale_logits": True,
    "model.tied_head": True,
    "data.separator": "none",
    "data.test_fraction": 0.1,
    "data.sampling": "random",
    "optimizer.name": "adamw",
    "optimizer.learning_rate": 1e-3,
    "optimizer.weight_decay": 0.01,
    "optimizer.schedule": "constant",
    "eval_batches": 1,
}
FINEWEB = {
    "data.source": "fineweb",
    "data.subset": "default",
    "data.n_docs": 1000,
    "batch_size": 64,
    "steps": 1234,
    "eval_every": 80,
    "model.dropout": 0.1,
    "model.dropout_sites": ("embedding", "attention", "attention_output", "mlp"),
    "model.init": "course",
}
BOOK = {
    "batch_size": 16,
    "steps": 501,
    "eval_every": 100,
    "objective": "all_tokens",
    "model.dropout": 0.0,
    "model.init": "torch",
}


@pytest.mark.parametrize(
    ("name", "own"),
    [
        ("model5", FINEWEB | {"objective": "final_token"}),
        ("model5_all_tokens", FINEWEB | {"objective": "all_tokens"}),
        ("model5_book", BOOK),
    ],
)
def test_a_model5_config_is_the_courses(name, own):
    config = flatten(parse(["--config", str(ROOT / f"configs/{name}.yaml")], "test"))
    assert {key: config[key] for key in MODEL5 | own} == MODEL5 | own


# ---- sequences and bases ------------------------------------------------------------------------


def config_of(tmp_path, text: str, *args: str) -> TrainConfig:
    path = tmp_path / "config.yaml"
    path.write_text(text)
    return parse(["--config", str(path), *args], "test")


@pytest.mark.parametrize(
    "text",
    ['optimizer: {freeze: [wte, "trunk/attn/*"]}', "optimizer: {freeze: wte trunk/attn/*}"],
)
def test_a_sequence_is_a_list_or_words(text, tmp_path):
    assert config_of(tmp_path, text).optimizer.freeze == ("wte", "trunk/attn/*")
    args = ["--optimizer.freeze", "wpe", "ln_f/*", "--seed", "3"]
    config = config_of(tmp_path, text, *args)
    assert (config.optimizer.freeze, config.seed) == (("wpe", "ln_f/*"), 3)
    assert config_of(tmp_path, text, "--optimizer.freeze=").optimizer.freeze == ()


def test_a_sequence_is_no_text_and_stays_hashable():
    with pytest.raises(UserError, match=r"optimizer\.freeze='wte': give a sequence"):
        OptimizerConfig(freeze="wte")
    assert hash(OptimizerConfig(freeze=["wte"])) == hash(OptimizerConfig(freeze=("wte",)))


def test_a_base_says_the_rest(tmp_path):
    (tmp_path / "sets").mkdir()
    (tmp_path / "base.yaml").write_text("steps: 7\nseed: 1\nmodel: {n_layers: 3, n_heads: 2}\n")
    path = tmp_path / "sets/one.yaml"
    path.write_text("base: ../base.yaml\nseed: 2\nmodel: {n_heads: 1}\n")
    config = parse(["--config", str(path), "--steps", "9"], "test")
    assert (config.steps, config.seed) == (9, 2)
    assert (config.model.n_layers, config.model.n_heads) == (3, 1)


@pytest.mark.parametrize("path", sorted((ROOT / "configs/compare").glob("*/*.yaml")), ids=str)
def test_a_set_says_only_what_differs_from_its_base(path):
    lines = path.read_text().splitlines()
    assert lines[0] == f"base: ../{path.parent.name}.yaml"
    assert len(lines) <= 3
    said = {line for line in lines[1:] if not line.endswith(":")}
    assert not said & set(path.parent.with_suffix(".yaml").read_text().splitlines())
    parse(["--config", str(path)], "test")


def test_help_explains_every_key():
    code, out, _ = run("--help")
    assert code == 0
    for key in flatten(TrainConfig()):
        assert f"--{key} " in out, key
    assert out.count("(default:") == len(flatten(TrainConfig()))


def test_a_config_cannot_be_built_wrong():
    with pytest.raises(UserError, match="steps=0"):
        TrainConfig(steps=0)


def test_yaml_is_loaded_safely(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text("seed: !!python/object/apply:os.getpid []\n")
    with pytest.raises(UserError, match="not readable as YAML"):
        parse(["--config", str(path)], "test")
    assert yaml.safe_load(to_yaml(TrainConfig()))["seed"] == 0


@pytest.mark.parametrize("std", ["0.02", "2e-2", "2E-2", ".02", "1."])
def test_a_std_is_any_number_above_zero(std):
    assert ModelConfig(init=f"normal:{std}").init == f"normal:{std}"


@pytest.mark.parametrize("std", ["", "0", "-1", "nan", "inf", "1e999", "x", "1e", "."])
def test_a_std_that_is_none_is_refused(std):
    with pytest.raises(UserError, match=r"write it as normal:0\.02"):
        ModelConfig(init=f"normal:{std}")
