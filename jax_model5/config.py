"""Frozen dataclasses for one run, their validation, and YAML + command line -> one config."""

import argparse
import contextlib
import dataclasses
import difflib
import io
import math
import os
import sys
import typing
from collections.abc import Iterator, Sequence
from typing import Any, Literal, NoReturn

import tyro
import yaml

DROPOUT_SITES = "embedding attention attention_output mlp"


class UserError(Exception):
    """Bad input. The message is the one line that names the field, the value and the mend."""


@contextlib.contextmanager
def one_line_errors() -> Iterator[None]:
    """Ends the process with one line on standard error and exit code 2 on a `UserError`."""
    try:
        yield
    except UserError as error:
        print("error:", " ".join(str(error).split()), file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        raise SystemExit(130) from None


class ArgumentParser(argparse.ArgumentParser):
    """Options of a command without a run's config; bad ones raise `UserError`."""

    def __init__(self, **fields: Any):
        super().__init__(**fields, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; --help lists the options")


def _require(holds: bool, field: str, value: object, mend: str) -> None:
    if not holds:
        raise UserError(f"{field}={value!r}: {mend}")


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """The decoder. GPT-2 small is 12 layers, 12 heads, width 768; Model 5 adds scaled logits."""

    vocab_size: int = 50257
    """V, size of the token embedding and of the logits [tokens]."""
    seq_len: int = 256
    """L, length of a training sequence [tokens]."""
    d_model: int = 128
    """D, width of the residual stream [features]."""
    n_heads: int = 4
    """H, attention heads; must divide d_model [heads]."""
    n_layers: int = 4
    """Transformer blocks [blocks]."""
    dropout: float = 0.1
    """Dropout rate at the sites of dropout_sites [probability, 0 <= rate < 1]."""
    dropout_sites: str = DROPOUT_SITES
    """Which sites drop: any of embedding, attention (its weights), attention_output, mlp."""
    scale_logits: bool = True
    """Divide the logits by sqrt(d_model): True in Model 5, False for GPT-2 weights."""
    gelu: Literal["tanh", "erf"] = "tanh"
    """GELU variant; tanh is GPT-2's."""
    init: str = "course"
    """Weight init: course, xavier, kaiming, torch, or normal:STD such as normal:0.05."""
    dtype: Literal["float32", "bfloat16", "float64"] = "float32"
    """Compute dtype. Parameters, softmax and loss are never below float32; float64 is for proof."""
    remat: Literal["none", "dots", "full"] = "dots"
    """What the backward pass computes again instead of keeping it: none; dots: all but the products
    with weights and the attention's output; full: every block. dots is also faster on a CPU."""

    def __post_init__(self) -> None:
        for name in ("vocab_size", "seq_len", "d_model", "n_heads", "n_layers"):
            value = getattr(self, name)
            _require(value >= 1, f"model.{name}", value, "must be at least 1")
        divides = self.d_model % self.n_heads == 0
        mend = f"must divide model.d_model={self.d_model}"
        _require(divides, "model.n_heads", self.n_heads, mend)
        _require(0 <= self.dropout < 1, "model.dropout", self.dropout, "must be in [0, 1)")
        unknown = set(self.dropout_sites.split()) - set(DROPOUT_SITES.split())
        mend = f"use any of {DROPOUT_SITES}"
        _require(not unknown, "model.dropout_sites", self.dropout_sites, mend)
        self._check_init()

    def dropout_at(self, site: str) -> float:
        """The rate of one kind of site (course lesson 017)."""
        return self.dropout if site in self.dropout_sites.split() else 0.0

    def _check_init(self) -> None:
        name, _, std = self.init.partition(":")
        names = "course, xavier, kaiming, torch or normal:STD"
        if name == "normal":
            _require(_is_positive(std), "model.init", self.init, "write it as normal:0.02")
        else:
            known = self.init in ("course", "xavier", "kaiming", "torch")
            _require(known, "model.init", self.init, f"use {names}")


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """The text, its tokens, and how windows are drawn from them."""

    source: str = "pydocs"
    """pydocs, fineweb, hf:OWNER/NAME, or a path: .txt .jsonl .json .parquet or a folder of them."""
    n_docs: int = 0
    """Use the first n documents; 0: all of them, and 1000 of fineweb [documents]."""
    text_field: str = "text"
    """Column that holds the text, in every source with columns."""
    tokenizer: Literal["gpt2", "bytes"] = "gpt2"
    """gpt2: 50257 tokens, offline; bytes: 256 bytes + end of text, for tiny tests."""
    test_fraction: float = 0.1
    """Share of the tokens, at the end, that is never trained on [0 < fraction < 1]."""
    sampling: Literal["random", "epoch"] = "random"
    """random: uniform window starts, with replacement; epoch: shuffled disjoint windows."""
    cache_dir: str = "~/.cache/jax_model5"
    """Folder of tokenized corpora and compiled programs."""

    def __post_init__(self) -> None:
        _require(self.source != "", "data.source", self.source, "name a source, such as pydocs")
        _require(self.n_docs >= 0, "data.n_docs", self.n_docs, "must be 0 (all) or more")
        fraction = self.test_fraction
        _require(0 < fraction < 1, "data.test_fraction", fraction, "must be between 0 and 1")


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """The update. Names and formulas are PyTorch's: only adamw decouples its weight decay."""

    name: Literal["adamw", "adam", "sgd"] = "adamw"
    """adamw: decay outside the adaptive step; adam, sgd: decay added to the gradient (L2)."""
    learning_rate: float = 3e-3
    """Peak learning rate [parameter units per step]."""
    weight_decay: float = 0.01
    """Weight decay, on every parameter as in the course [1 / learning rate]."""
    b1: float = 0.9
    """Decay of the first moment; momentum for sgd [0 <= b1 < 1]."""
    b2: float = 0.999
    """Decay of the second moment [0 <= b2 < 1]."""
    eps: float = 1e-8
    """Added to the root of the second moment [gradient units]."""
    schedule: Literal["constant", "cosine", "linear"] = "constant"
    """Learning rate after the warm-up; cosine and linear reach 0 at the last step."""
    warmup_steps: int = 0
    """Steps of linear warm-up from 0 [steps]."""
    clip_norm: float = 0.0
    """Clip the global gradient norm to this; 0: no clipping [gradient units]."""
    freeze: str = ""
    """Parameters that never move: paths such as "wte trunk/attn/*", separated by spaces."""

    def __post_init__(self) -> None:
        for name in ("learning_rate", "weight_decay", "eps", "clip_norm"):
            value = getattr(self, name)
            finite = math.isfinite(value) and value >= 0
            _require(finite, f"optimizer.{name}", value, "must be finite and 0 or more")
        for name in ("b1", "b2"):
            value = getattr(self, name)
            _require(0 <= value < 1, f"optimizer.{name}", value, "must be in [0, 1)")
        mend = "must be 0 or more"
        _require(self.warmup_steps >= 0, "optimizer.warmup_steps", self.warmup_steps, mend)


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """The devices: the batch is split over data x fsdp, the parameters over fsdp."""

    data: int = 0
    """Devices along the data axis; 0: all that fsdp leaves [devices]."""
    fsdp: int = 1
    """Devices that share one copy of the parameters [devices]."""

    def __post_init__(self) -> None:
        _require(self.data >= 0, "mesh.data", self.data, "must be 0 (all devices) or more")
        _require(self.fsdp >= 1, "mesh.fsdp", self.fsdp, "must be at least 1")


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """Train Model 5. Start it again with the same workdir and it goes on where it was."""

    objective: Literal["final_token", "all_tokens", "last_k"] = "final_token"
    """Which positions get a loss: the last one, all of them, or the last `last_k`."""
    last_k: int = 1
    """Positions that get a loss under objective last_k [positions]."""
    steps: int = 160
    """Optimizer steps of the whole run [steps]."""
    batch_size: int = 16
    """B, sequences per optimizer step, over all devices [sequences]."""
    accumulate: int = 1
    """Micro-batches per optimizer step; must divide batch_size [micro-batches]."""
    eval_every: int = 80
    """Steps between two test losses [steps]."""
    eval_batches: int = 4
    """Fixed test batches per evaluation [batches]."""
    checkpoint_every: int = 80
    """Steps between two checkpoints [steps]."""
    keep: int = 2
    """Newest checkpoints kept [checkpoints]."""
    seed: int = 0
    """The one seed of weights, batches and dropout [integer >= 0]."""
    prng: Literal["threefry2x32", "rbg", "unsafe_rbg"] = "threefry2x32"
    """Random bits of init and dropout; rbg is faster on TPU."""
    init_from: str = ""
    """Folder of a run or of imported weights that the initial weights come from; none: drawn."""
    init_leaves: str = "*"
    """Parameters taken from init_from: paths such as "wte wpe", separated by spaces."""
    workdir: str = "runs/quickstart"
    """The only folder that the run writes its results into."""
    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    mesh: MeshConfig = MeshConfig()

    def __post_init__(self) -> None:
        at_least_1 = "steps batch_size accumulate eval_every eval_batches checkpoint_every keep"
        for name in at_least_1.split():
            value = getattr(self, name)
            _require(value >= 1, name, value, "must be at least 1")
        _require(0 <= self.seed < 2**32, "seed", self.seed, "must be in [0, 2**32)")
        fits = 1 <= self.last_k <= self.model.seq_len
        mend = f"must be from 1 to model.seq_len={self.model.seq_len}"
        _require(fits, "last_k", self.last_k, mend)
        divides = self.batch_size % self.accumulate == 0
        _require(
            divides, "accumulate", self.accumulate, f"must divide batch_size={self.batch_size}"
        )
        _require(self.workdir != "", "workdir", self.workdir, "name a folder")
        paths = 'name parameters, or "*" for all'
        _require(self.init_leaves.strip() != "", "init_leaves", self.init_leaves, paths)

    @property
    def test_metric(self) -> str:
        """The test NLL that is shown beside the training loss."""
        return "final_token_nll" if self.objective == "final_token" else "all_token_nll"


def _is_positive(text: str) -> bool:
    try:
        return 0 < float(text) < math.inf
    except ValueError:
        return False


def flatten(config: TrainConfig) -> dict[str, Any]:
    """The config as {"model.d_model": 128, ...}, in the order of its fields."""
    return dict(_leaves(dataclasses.asdict(config)))


def _leaves(tree: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def to_yaml(config: TrainConfig) -> str:
    """The resolved config as YAML that `--config` reads back to an equal config."""
    return yaml.safe_dump(dataclasses.asdict(config), sort_keys=False)


def parse(args: Sequence[str], prog: str) -> TrainConfig:
    """Reads `[--config FILE.yaml] [--key value] ...` into a config; later keys win.

    Raises:
      UserError: unknown key, missing or mistyped value, unreadable YAML, a value out of range.
    """
    if any(arg in ("-h", "--help") for arg in args):
        return _tyro(["--help"], prog)
    settings = _command_line(args)
    path = settings.pop("config", None)
    settings = (_yaml_settings(path) if path is not None else {}) | settings
    known = flatten(TrainConfig())
    for key in settings:
        _require(key in known, key, settings[key], f"unknown key{_nearest(key, known)}")
    tokens = {key: f"--{key}={_text(key, value)}" for key, value in settings.items()}
    try:
        return _tyro(list(tokens.values()), prog)
    except SystemExit:
        # tyro explains itself over several lines: find the one setting that it cannot read.
        for key, token in tokens.items():
            try:
                _tyro([token], prog)
            except UserError:
                continue  # out of range only because the other settings are missing
            except SystemExit:
                raise UserError(f"{key}={settings[key]!r}: expected {_expected(key)}") from None
        raise


def config_of_run(workdir: str, prog: str) -> TrainConfig:
    """The resolved config that a run wrote into its folder. Raises UserError where it is none."""
    path = os.path.join(os.path.expanduser(workdir), "config.yaml")
    if not os.path.isfile(path):
        raise UserError(f"workdir={workdir!r}: holds no config.yaml; name the folder of a run")
    return parse(["--config", path], prog)


def _tyro(args: list[str], prog: str) -> TrainConfig:
    """One `tyro.cli` call; `SystemExit`, without tyro's own words, where it can't read args."""
    with contextlib.redirect_stderr(io.StringIO()):
        return tyro.cli(
            TrainConfig,
            args=args,
            prog=f"python -m {prog} [--config FILE.yaml]",
            use_underscores=True,
            config=(tyro.conf.FlagConversionOff,),
        )


def _command_line(args: Sequence[str]) -> dict[str, Any]:
    settings: dict[str, Any] = {}
    rest = list(args)
    while rest:
        arg = rest.pop(0)
        if not arg.startswith("--"):
            raise UserError(f"{arg!r}: expected --key value; every key begins with two dashes")
        key, equals, value = arg[2:].partition("=")
        if not equals:
            if not rest or rest[0].startswith("--"):
                raise UserError(f"--{key}: its value is missing; write --{key} VALUE")
            value = rest.pop(0)
        settings[key] = value
    return settings


def _yaml_settings(path: str) -> dict[str, Any]:
    try:
        with open(os.path.expanduser(path), encoding="utf-8") as file:
            tree = yaml.safe_load(file)
    except OSError as error:
        raise UserError(f"config={path!r}: {error.strerror}; name a YAML file") from None
    except (yaml.YAMLError, ValueError) as error:
        raise UserError(f"config={path!r}: not readable as YAML: {error}") from None
    if not isinstance(tree, dict):
        raise UserError(f"config={path!r}: expected lines of `key: value`")
    settings = {str(key): value for key, value in _leaves(tree)}
    for key, value in settings.items():
        one_value = isinstance(value, bool | int | float | str)
        _require(one_value, f"{key} in {path}", value, "give it one number, word or true/false")
    return settings


def _text(key: str, value: object) -> str:
    text = str(value)
    is_switch = _expected(key) == "True or False"
    return text.capitalize() if is_switch else text


def _nearest(key: str, known: Sequence[str] | dict[str, Any]) -> str:
    by_name = [name for name in known if name.rpartition(".")[2] == key]
    nearest = by_name or difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    return f"; did you mean {nearest[0]}?" if nearest else "; --help lists them all"


def _expected(key: str) -> str:
    owner: type = TrainConfig
    *groups, name = key.split(".")
    for group in groups:
        owner = typing.get_type_hints(owner)[group]
    hint = typing.get_type_hints(owner)[name]
    if typing.get_origin(hint) is Literal:
        return "one of " + ", ".join(typing.get_args(hint))
    return {int: "a whole number", float: "a number", bool: "True or False"}.get(hint, "text")
