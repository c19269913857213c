"""Frozen dataclasses for one run, their validation, and YAML + command line -> one config."""

import contextlib
import dataclasses
import difflib
import io
import math
import os
import re
import typing
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import tyro
import yaml

from jax_model5.errors import UserError, disk_errors, require

DROPOUT_SITES = ("embedding", "attention", "attention_output", "mlp")
TEST_METRICS = ("final_token_nll", "all_token_nll")
"""What every evaluation reports, whatever the objective [nats]."""


def _as_tuple(config: Any, group: str, name: str) -> None:
    """A list as well as a tuple is a sequence of words; a text alone would be one of letters."""
    words, field = getattr(config, name), f"{group}.{name}".lstrip(".")
    fix = "give a sequence of words, such as a list"
    require(not isinstance(words, str), field, words, fix)
    object.__setattr__(config, name, tuple(words))


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
    dropout_sites: tuple[str, ...] = DROPOUT_SITES
    """Which sites drop: any of embedding, attention (its weights), attention_output, mlp."""
    scale_logits: bool = True
    """Divide the logits by sqrt(d_model): True in Model 5, False for GPT-2 weights."""
    tied_head: bool = True
    """The head is the token embedding; False: a table of its own that starts equal to it."""
    gelu: Literal["erf", "tanh"] = "erf"
    """GELU variant: erf is Model 5's and torch.nn.GELU's, tanh is GPT-2's."""
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
            require(value >= 1, f"model.{name}", value, "must be at least 1")
        divides = self.d_model % self.n_heads == 0
        fix = f"must divide model.d_model={self.d_model}"
        require(divides, "model.n_heads", self.n_heads, fix)
        require(0 <= self.dropout < 1, "model.dropout", self.dropout, "must be in [0, 1)")
        _as_tuple(self, "model", "dropout_sites")
        for site in self.dropout_sites:
            fix = f"use any of {' '.join(DROPOUT_SITES)}"
            require(site in DROPOUT_SITES, "model.dropout_sites", site, fix)
        self._check_init()

    def dropout_at(self, site: str) -> float:
        """The rate of one kind of site (course lesson 017)."""
        return self.dropout if site in self.dropout_sites else 0.0

    def _check_init(self) -> None:
        name, _, std = self.init.partition(":")
        if name == "normal":
            is_number = re.fullmatch(r"(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?", std) is not None
            is_std = is_number and 0 < float(std) < math.inf
            require(is_std, "model.init", self.init, "write it as normal:0.02")
        else:
            known = self.init in ("course", "xavier", "kaiming", "torch")
            fix = "use course, xavier, kaiming, torch or normal:STD"
            require(known, "model.init", self.init, fix)


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """The text, its tokens, and how windows are drawn from them."""

    source: str = "pydocs"
    """pydocs, fineweb, hf:OWNER/NAME, or files: a path, a folder, a glob. Commas join several. Text
    (.txt .md .py), rows (.jsonl .ndjson .json .csv .tsv .parquet .arrow), packed or not (.gz .bz2
    .xz .zst), or tokens (.bin .npy), of which files named val or test are the test part."""
    subset: str = ""
    """Config of a hub's data set; none: its own default, and sample-10BT of fineweb."""
    n_docs: int = 0
    """Use the first n documents; 0: all of them, and 1000 of fineweb [documents]."""
    text_field: str = "text"
    """Column that holds the text, in every source with columns."""
    separator: Literal["end_of_text", "none"] = "end_of_text"
    """What ends each document: the end-of-text token, or nothing, as in the course."""
    split_on_end_of_text: bool = False
    """A document also ends where the text spells <|endoftext|>; False: that is text."""
    skip_bad_rows: bool = False
    """Leave out rows without text and count them; False: the first one stops the run."""
    tokenizer: Literal["gpt2", "bytes"] = "gpt2"
    """gpt2: 50257 tokens, offline; bytes: 256 bytes + end of text, for tiny tests."""
    test_fraction: float = 0.1
    """Share of the tokens, at the end, that is never trained on [0 < fraction < 1]."""
    sampling: Literal["random", "epoch"] = "random"
    """random: uniform window starts, with replacement; epoch: shuffled disjoint windows."""
    cache_dir: str = "~/.cache/jax_model5"
    """Folder of tokenized corpora and compiled programs."""

    def __post_init__(self) -> None:
        require(self.source != "", "data.source", self.source, "name a source, such as pydocs")
        require(self.n_docs >= 0, "data.n_docs", self.n_docs, "must be 0 (all) or more")
        fraction = self.test_fraction
        require(0 < fraction < 1, "data.test_fraction", fraction, "must be between 0 and 1")


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
    freeze: tuple[str, ...] = ()
    """Parameters that never move: paths such as wte "trunk/attn/*"."""

    def __post_init__(self) -> None:
        _as_tuple(self, "optimizer", "freeze")
        for name in ("learning_rate", "weight_decay", "eps", "clip_norm"):
            value = getattr(self, name)
            finite = math.isfinite(value) and value >= 0
            require(finite, f"optimizer.{name}", value, "must be finite and 0 or more")
        for name in ("b1", "b2"):
            value = getattr(self, name)
            require(0 <= value < 1, f"optimizer.{name}", value, "must be in [0, 1)")
        fix = "must be 0 or more"
        require(self.warmup_steps >= 0, "optimizer.warmup_steps", self.warmup_steps, fix)


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """The devices: the batch is split over data x fsdp, the parameters over fsdp."""

    data: int = 0
    """Devices along the data axis; 0: all that fsdp leaves [devices]."""
    fsdp: int = 1
    """Devices that share one copy of the parameters [devices]."""

    def __post_init__(self) -> None:
        require(self.data >= 0, "mesh.data", self.data, "must be 0 (all devices) or more")
        require(self.fsdp >= 1, "mesh.fsdp", self.fsdp, "must be at least 1")


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
    eval_every: int = 16
    """Steps between two test losses; the first is of step 0 [steps]."""
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
    init_leaves: tuple[str, ...] = ("*",)
    """Parameters taken from init_from: paths such as wte wpe."""
    workdir: str = "runs/quickstart"
    """The only folder that the run writes its results into."""
    tracker: Literal["none", "tensorboard", "wandb"] = "none"
    """Where else the log's records go: TensorBoard's files, or Weights & Biases."""
    profile_steps: str = ""
    """FIRST:END, such as 10:13: an XProf trace of steps 10, 11 and 12 in workdir [steps]."""
    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    mesh: MeshConfig = MeshConfig()

    def __post_init__(self) -> None:
        at_least_1 = "steps batch_size accumulate eval_every eval_batches checkpoint_every keep"
        for name in at_least_1.split():
            value = getattr(self, name)
            require(value >= 1, name, value, "must be at least 1")
        require(0 <= self.seed < 2**32, "seed", self.seed, "must be in [0, 2**32)")
        fits = 1 <= self.last_k <= self.model.seq_len
        fix = f"must be from 1 to model.seq_len={self.model.seq_len}"
        require(fits, "last_k", self.last_k, fix)
        divides = self.batch_size % self.accumulate == 0
        require(divides, "accumulate", self.accumulate, f"must divide batch_size={self.batch_size}")
        require(self.workdir != "", "workdir", self.workdir, "name a folder")
        fix = f"write it as FIRST:END, such as 10:13, with FIRST up to steps={self.steps}"
        is_profile = len(self.profiled) > 0 and self.profiled.start <= self.steps
        require(is_profile or not self.profile_steps, "profile_steps", self.profile_steps, fix)
        _as_tuple(self, "", "init_leaves")
        require(self.init_leaves != (), "init_leaves", "", 'name parameters, or "*" for all')
        warmup, fix = self.optimizer.warmup_steps, f"must be at most steps={self.steps}"
        require(warmup <= self.steps, "optimizer.warmup_steps", warmup, fix)

    @property
    def profiled(self) -> range:
        """The steps of `profile_steps`, counted from 1."""
        ends = re.fullmatch(r"([1-9]\d*):([1-9]\d*)", self.profile_steps)
        return range(int(ends[1]), int(ends[2])) if ends else range(0)

    @property
    def test_metric(self) -> str:
        """The test NLL that is shown beside the training loss."""
        final_token, all_tokens = TEST_METRICS
        return final_token if self.objective == "final_token" else all_tokens


def flatten(config: TrainConfig) -> dict[str, Any]:
    """The config as {"model.d_model": 128, ...}, in the order of its fields."""
    return flatten_settings(dataclasses.asdict(config))


def flatten_settings(tree: dict[str, Any]) -> dict[str, Any]:
    """Nested settings as {"model.d_model": 128, ...}."""
    return dict(_leaves(tree))


def _leaves(tree: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def to_yaml(config: TrainConfig) -> str:
    """The resolved config as YAML that `--config` reads back to an equal config."""
    return yaml.safe_dump(dataclasses.asdict(config), sort_keys=False)


# ---- YAML and command line ----------------------------------------------------------------------


def parse(args: Sequence[str], prog: str) -> TrainConfig:
    """Reads `[--config FILE.yaml] [--key value] ...` into a config; later keys win.

    Raises:
      UserError: unknown key, missing or mistyped value, unreadable YAML, a value out of range.
    """
    if any(arg in ("-h", "--help") for arg in args):
        return _tyro(["--help"], prog)
    settings = _command_line(args)
    if "config" in settings:
        path = os.path.expanduser(" ".join(settings.pop("config")))
        settings = _yaml_settings(path) | _workdir_of(path) | settings
    for key, words in settings.items():
        require(key in _KINDS, key, " ".join(words), f"unknown key{_nearest(key)}")
    messages = io.StringIO()
    try:
        with contextlib.redirect_stderr(messages):
            return _tyro([token for item in settings.items() for token in _tokens(*item)], prog)
    except SystemExit:
        # tyro explains itself in a box of several lines, which names the key.
        named = re.findall(r"--([\w.]+)", messages.getvalue())
        key = next(key for key in (*named, *settings) if key in settings)
        value = " ".join(settings[key])
        raise UserError(f"{key}={value!r}: expected {_expected(key)}") from None


def _workdir_of(path: str) -> dict[str, list[str]]:
    """The folder of a run means itself by its config.yaml, wherever it was copied or moved to."""
    folder, name = os.path.split(path)
    is_run = os.path.exists(os.path.join(folder, "metrics.jsonl"))
    with contextlib.suppress(OSError):
        is_run |= any(map(str.isdigit, os.listdir(os.path.join(folder, "checkpoints"))))
    return {"workdir": [folder or "."]} if name == "config.yaml" and is_run else {}


def config_of_run(workdir: str, prog: str) -> TrainConfig:
    """The resolved config that a run wrote into its folder. Raises UserError where it is none."""
    path = os.path.join(os.path.expanduser(workdir), "config.yaml")
    there = os.path.isfile(path)
    require(there, "workdir", workdir, "holds no config.yaml; name the folder of a run")
    return parse(["--config", path], prog)


def _tyro(args: list[str], prog: str) -> TrainConfig:
    return tyro.cli(
        TrainConfig,
        args=args,
        prog=f"python -m {prog} [--config FILE.yaml]",
        use_underscores=True,
        config=(tyro.conf.FlagConversionOff,),
    )


def _command_line(args: Sequence[str]) -> dict[str, list[str]]:
    """{key: its words}; only a sequence may have none, or several."""
    settings: dict[str, list[str]] = {}
    rest = list(args)
    while rest:
        arg = rest.pop(0)
        if not arg.startswith("--"):
            raise UserError(f"{arg!r}: expected --key value; every key begins with two dashes")
        key, equals, value = arg[2:].partition("=")
        if equals:
            settings[key] = [value]
            continue
        if not rest or rest[0].startswith("--"):
            raise UserError(f"--{key}: its value is missing; write --{key} VALUE")
        settings[key] = [rest.pop(0)]
        while _KINDS.get(key) is tuple and rest and not rest[0].startswith("--"):
            settings[key].append(rest.pop(0))
    return settings


def _yaml_settings(path: str, above: Sequence[str] = ()) -> dict[str, list[str]]:
    """{key: its words} of a file; what it does not say is its `base`'s, a path beside it."""
    path = os.path.normpath(os.path.expanduser(path))
    require(path not in above, "base", path, "is its own base; name another file")
    tree = _yaml_tree(path)
    base = tree.pop("base", None)
    require(base is None or isinstance(base, str), f"base in {path}", base, "name a YAML file")
    settings = {}
    for key, value in flatten_settings(tree).items():
        require(key in _KINDS, f"{key} in {path}", value, f"unknown key{_nearest(key)}")
        is_sequence = _KINDS[key] is tuple
        parts = value if is_sequence and isinstance(value, list) else [value]
        plain = all(isinstance(part, bool | int | float | str) for part in parts)
        fix = "give it a list of words" if is_sequence else "give it one number, word or true/false"
        require(plain, f"{key} in {path}", value, fix)
        settings[key] = [str(part) for part in parts]
    if base is None:
        return settings
    return _yaml_settings(os.path.join(os.path.dirname(path), base), [*above, path]) | settings


def _yaml_tree(path: str) -> dict[str, Any]:
    try:
        with disk_errors("config", path, "name a YAML file"), open(path, encoding="utf-8") as file:
            tree = yaml.safe_load(file)
    except (yaml.YAMLError, ValueError) as error:
        raise UserError(f"config={path!r}: not readable as YAML: {error}") from None
    if not isinstance(tree, dict):
        raise UserError(f"config={path!r}: expected lines of `key: value`")
    return {str(key): value for key, value in tree.items()}


def _tokens(key: str, words: Sequence[str]) -> list[str]:
    """What tyro reads: a sequence as words, of which one may hold several; True for true."""
    if _KINDS[key] is tuple:
        return [f"--{key}", *(part for word in words for part in word.split())]
    text = " ".join(words)
    return [f"--{key}={text.capitalize() if _KINDS[key] is bool else text}"]


def _nearest(key: str) -> str:
    by_name = [name for name in _KINDS if name.rpartition(".")[2] == key]
    nearest = by_name or difflib.get_close_matches(key, _KINDS, n=1, cutoff=0.5)
    return f"; did you mean {nearest[0]}?" if nearest else "; --help lists them all"


def _expected(key: str) -> str:
    kind = _KINDS[key]
    if isinstance(kind, tuple):
        return "one of " + ", ".join(kind)
    names = {int: "a whole number", float: "a number", bool: "True or False", tuple: "words"}
    return names.get(kind, "text")


def _kinds(owner: type, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(key, its type, or the choices that it has) of every field."""
    for name, hint in typing.get_type_hints(owner).items():
        if dataclasses.is_dataclass(hint):
            yield from _kinds(typing.cast(type, hint), f"{prefix}{name}.")
        elif typing.get_origin(hint) is Literal:
            yield f"{prefix}{name}", typing.get_args(hint)
        else:
            yield f"{prefix}{name}", typing.get_origin(hint) or hint


_KINDS: dict[str, Any] = dict(_kinds(TrainConfig))
