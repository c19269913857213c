"""YAML and command line into one config, and back."""

import dataclasses
import re

import pytest
import yaml

from jax_model5.config import TrainConfig, UserError, flatten, parse, to_yaml
from tests.tiny import ROOT, run


def test_the_keys_are_the_contract():
    config = dataclasses.asdict(TrainConfig())
    root = "objective last_k steps batch_size accumulate eval_every eval_batches checkpoint_every"
    root += " keep seed prng init_from init_leaves workdir model data optimizer mesh"
    assert " ".join(config) == root
    model = "vocab_size seq_len d_model n_heads n_layers dropout dropout_sites scale_logits gelu"
    assert " ".join(config["model"]) == f"{model} init dtype remat"
    data = "source n_docs text_field tokenizer test_fraction sampling cache_dir"
    assert " ".join(config["data"]) == data
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


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda p: p.name)
def test_the_shipped_configs_parse_and_say_what_to_expect(path):
    parse(["--config", str(path)], "test")
    header = path.read_text().split("\n\n")[0]
    assert all(line.startswith("#") for line in header.splitlines())
    assert f"--config configs/{path.name}" in header
    assert re.search(r"\d (s|seconds|minutes|hours)\b", header), "no time"
    assert re.search(r"Loss: .*\d+\.\d", header), "no loss"


def test_model5_yaml_is_the_courses():
    config = parse(["--config", str(ROOT / "configs/model5.yaml")], "test")
    model = config.model
    sizes = (model.n_layers, model.n_heads, model.d_model, model.seq_len, model.vocab_size)
    assert sizes == (12, 12, 768, 256, 50257)
    assert (config.batch_size, config.eval_every, model.dropout) == (64, 80, 0.1)
    assert (config.data.source, config.data.n_docs) == ("fineweb", 1000)
    assert (config.objective, config.optimizer.name) == ("final_token", "adamw")


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
