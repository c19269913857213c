"""GPT-2 weights of Hugging Face in and out as safetensors; `python -m jax_model5.huggingface`."""

import argparse
import contextlib
import dataclasses
import json
import math
import os
import re
import shlex
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import huggingface_hub
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy

from jax_model5 import tokenizer
from jax_model5.checkpoint import Checkpoints, read_params
from jax_model5.config import (
    DataConfig,
    ModelConfig,
    OptimizerConfig,
    TrainConfig,
    config_of_run,
    to_yaml,
)
from jax_model5.disk import replace_text
from jax_model5.errors import ArgumentParser, UserError, one_line_errors
from jax_model5.kernels import at_least_float32
from jax_model5.model import LAYER_NORM_EPSILON
from jax_model5.startup import set_up_jax
from jax_model5.step import TrainState, abstract_state
from jax_model5.trees import from_layout, table, to_layout

HEAD = "lm_head.weight"  # where the head is tied, a second name of wte.weight, if it is there
_PREFIX = "transformer."
_MASKS = re.compile(r"h\.\d+\.attn\.(masked_)?bias")  # causal masks, which old files store
_FLOATS = ("F16", "BF16", "F32", "F64")

# The fields of config.json that make the numbers, with the defaults of transformers' GPT2Config.
GPT2: dict[str, Any] = {
    "vocab_size": 50257,
    "n_positions": 1024,
    "n_embd": 768,
    "n_head": 12,
    "n_layer": 12,
    "n_inner": None,
    "activation_function": "gelu_new",
    "resid_pdrop": 0.1,
    "embd_pdrop": 0.1,
    "attn_pdrop": 0.1,
    "layer_norm_epsilon": LAYER_NORM_EPSILON,
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
    "tie_word_embeddings": True,
    "add_cross_attention": False,
}
SIZES = {
    "vocab_size": "vocab_size",
    "seq_len": "n_positions",
    "d_model": "n_embd",
    "n_heads": "n_head",
    "n_layers": "n_layer",
}
GELUS = {"gelu_new": "tanh", "gelu_pytorch_tanh": "tanh", "gelu": "erf"}
DROPOUTS = ("resid_pdrop", "embd_pdrop", "attn_pdrop")
FIXED = (  # GPT-2's own value is the only one that Model 5 knows
    "layer_norm_epsilon",
    "scale_attn_weights",
    "scale_attn_by_inverse_layer_idx",
    "add_cross_attention",
)


def mismatches(tensors: dict[str, Any], config: ModelConfig) -> list[str]:
    """Everything in which the names, shapes and dtypes of the tensors are not those of `config`."""
    wanted = {place.name: place.shape for place in table(config, "gpt2")}
    if HEAD in tensors:
        wanted[HEAD] = wanted["wte.weight"]
    wrong = [f"missing {name}" for name in wanted if name not in tensors]
    wrong += [f"unknown {name}" for name in tensors if name not in wanted]
    for name, shape in wanted.items():
        if name in tensors and (found := tuple(tensors[name].get_shape())) != shape:
            wrong.append(f"{name} is {list(found)} and should be {list(shape)}")
        if name in tensors and (dtype := tensors[name].get_dtype()) not in _FLOATS:
            wrong.append(f"{name} is {dtype} and should be one of {', '.join(_FLOATS)}")
    return wrong


# ---- import -------------------------------------------------------------------------------------


def import_weights(source: str, out: Path) -> None:
    """Writes a folder like a run's with the weights of `source`, a folder or a name of the hub.

    Raises:
      UserError: not to be had, damaged, another architecture, or tensors that do not fit.
    """
    folder = locate(source)
    fields = GPT2 | read_json(folder / "config.json")
    model = model_config(fields, folder)
    tensors = open_tensors(folder)
    wrong = mismatches(tensors, model)
    if wrong:
        raise UserError(
            f"weights={str(folder)!r}: the tensors do not fit config.json: {'; '.join(wrong)}; "
            "use the config.json that was saved with them"
        )
    if "F64" in {tensor.get_dtype() for tensor in tensors.values()}:
        model = dataclasses.replace(model, dtype="float64")
    data = DataConfig(tokenizer="gpt2" if model.vocab_size >= GPT2["vocab_size"] else "bytes")
    config = TrainConfig(
        objective="all_tokens",  # as these weights were trained; and a step that does not undo it
        batch_size=4,
        model=model,
        data=data,
        optimizer=OptimizerConfig(learning_rate=3e-5),
        workdir=str(out),
    )
    set_up_jax(config)
    params = read_tensors(folder, tensors, model)
    with new_folder(out) as partial:
        replace_text(partial / "config.yaml", to_yaml(config))
        checkpoints = Checkpoints(partial / "checkpoints", keep=1)
        checkpoints.save(TrainState(jnp.zeros((), jnp.int32), params, ()), config, "")
        checkpoints.wait()
    say_imported(out, model, fields)


def say_imported(out: Path, model: ModelConfig, fields: dict[str, Any]) -> None:
    """The closing line: what is there now, and the commands that use it."""
    if len({fields[field] for field in DROPOUTS}) > 1:
        rates = ", ".join(f"{field}={fields[field]}" for field in DROPOUTS)
        print(f"note: {rates}, but Model 5 has one rate: {model.dropout}, that of resid_pdrop")
    n_params = sum(math.prod(place.shape) for place in table(model, "gpt2"))
    here = shlex.quote(str(out))
    print(
        f"{out}: {n_params:,} parameters, {model.n_layers} layers, {model.n_heads} heads, width "
        f"{model.d_model}, {model.seq_len} positions, {model.vocab_size} tokens, {model.dtype}; "
        f"next: python -m jax_model5.generate --workdir {here} --prompt TEXT, or python -m "
        f"jax_model5.train --config {here}/config.yaml --init_from {here} --workdir NEW"
    )


def locate(source: str) -> Path:
    """The folder `source`, or the one that the hub's client keeps of that name."""
    folder = os.path.expanduser(source)
    if os.path.isdir(folder):
        return Path(folder)
    patterns = ["config.json", "*.safetensors", "*.safetensors.index.json"]
    try:
        return Path(huggingface_hub.snapshot_download(source, allow_patterns=patterns))
    except (OSError, ValueError) as error:
        reason = str(error).strip().split("\n")[0][:120]
        raise UserError(
            f"weights={source!r}: no such folder, and the hub does not give it: {reason}; "
            "offline, name a folder that holds config.json and model.safetensors"
        ) from None


def read_json(path: Path) -> dict[str, Any]:
    try:
        fields = json.loads(path.read_bytes())
    except OSError as error:
        raise UserError(
            f"weights={str(path.parent)!r}: {path.name}: {error.strerror}; name a folder that "
            "save_pretrained wrote"
        ) from None
    except (ValueError, RecursionError) as error:
        raise UserError(
            f"weights={str(path)!r}: not readable as JSON: {error}; save it anew"
        ) from None
    if not isinstance(fields, dict):
        raise UserError(f"weights={str(path)!r}: expected {{...}}, JSON's object; save it anew")
    return fields


def model_config(fields: dict[str, Any], folder: Path) -> ModelConfig:
    """What the fields of the folder's config.json describe, in float32.

    Raises:
      UserError: a field whose value Model 5 does not know.
    """

    def require_field(holds: bool, field: str, fix: str) -> None:
        if not holds:
            found = json.dumps(fields.get(field))
            raise UserError(f"{field}={found} in {folder / 'config.json'}: {fix}")

    own = "Model 5 knows no other; choose weights of a plain GPT-2"
    require_field(fields.get("model_type") == "gpt2", "model_type", f'must be "gpt2": {own}')
    for field in SIZES.values():
        require_field(type(fields[field]) is int, field, "must be a whole number")
    for field in DROPOUTS:
        require_field(type(fields[field]) in (int, float), field, "must be a number")
    for field in FIXED:
        require_field(
            fields[field] == GPT2[field], field, f"must be {json.dumps(GPT2[field])}: {own}"
        )
    width = 4 * fields["n_embd"]
    require_field(fields["n_inner"] in (None, width), "n_inner", f"must be null or {width}: {own}")
    tied = fields["tie_word_embeddings"]
    require_field(isinstance(tied, bool), "tie_word_embeddings", "must be true or false")
    gelu = GELUS.get(str(fields["activation_function"]))
    require_field(
        gelu is not None, "activation_function", f"must be one of {', '.join(GELUS)}: {own}"
    )
    sizes = {ours: fields[theirs] for ours, theirs in SIZES.items()}
    return ModelConfig(
        **sizes,
        dropout=fields["resid_pdrop"],
        scale_logits=False,
        tied_head=tied,
        gelu=gelu,  # type: ignore[arg-type]
    )


def open_tensors(folder: Path) -> dict[str, Any]:
    """GPT-2's names, without prefix and masks -> safetensors' slices: only headers are read.

    Raises:
      UserError: a file that is missing or damaged, or a name that occurs twice.
    """
    tensors: dict[str, Any] = {}
    for path in weight_files(folder):
        try:
            file = safetensors.safe_open(path, framework="numpy")
        except (OSError, safetensors.SafetensorError) as error:
            raise UserError(
                f"weights={str(folder)!r}: {path.name} cannot be read: {error}; fetch it again, "
                "or write it with save_pretrained (pickled weights are never read)"
            ) from None
        for key in file.keys():  # noqa: SIM118
            name = key.removeprefix(_PREFIX)
            if name in tensors:
                raise UserError(f"weights={str(folder)!r}: holds {name} twice; save it anew")
            if not _MASKS.fullmatch(name):
                tensors[name] = file.get_slice(key)
    return tensors


def weight_files(folder: Path) -> list[Path]:
    """model.safetensors, or the shards that its index names."""
    whole, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if whole.exists() or not index.exists():
        return [whole]
    shard_of = read_json(index).get("weight_map")
    if not isinstance(shard_of, dict):
        raise UserError(f"weights={str(index)!r}: has no weight_map; save it anew")
    # Only the last part of a name: an index cannot point out of its folder.
    return [folder / Path(str(name)).name for name in sorted(set(map(str, shard_of.values())))]


def read_tensors(folder: Path, tensors: dict[str, Any], config: ModelConfig) -> dict:
    """Our parameters. Raises UserError where a tied head is not wte."""
    if config.tied_head and HEAD in tensors:
        head_VxD, wte_VxD = tensors[HEAD][:], tensors["wte.weight"][:]
        if not np.array_equal(head_VxD.view(np.uint8), wte_VxD.view(np.uint8)):
            raise UserError(
                f"weights={str(folder)!r}: {HEAD} is not wte.weight, but config.json ties them; "
                "set tie_word_embeddings to false there"
            )
    return from_layout(lambda name: tensors[name][:], config, "gpt2")


# ---- export -------------------------------------------------------------------------------------


def export_weights(run: str, out: Path, shard_size: str) -> None:
    """Writes the newest weights of a run as `transformers`' GPT2LMHeadModel reads them.

    Raises:
      UserError: no run, no whole checkpoint, or a folder that cannot be written.
    """
    config = config_of_run(run, "jax_model5.huggingface")
    set_up_jax(config)
    params = read_params(run, abstract_state(config).params)
    if config.model.scale_logits:
        params = fold_scale(params, config.model)
    named = to_layout(params, config.model, "gpt2")
    tensors = {name if name == HEAD else _PREFIX + name: leaf for name, leaf in named.items()}
    shards = split(tensors, shard_size)
    with new_folder(out) as partial:
        for name, text in json_files(config, shards).items():
            replace_text(partial / name, text)
        for name, keys in shards.filename_to_tensors.items():
            part = {key: tensors[key] for key in keys}
            safetensors.numpy.save_file(part, partial / name, metadata={"format": "pt"})
        if config.data.tokenizer == "gpt2":
            merges, vocab = tokenizer.gpt2_files()
            shutil.copyfile(merges, partial / "merges.txt")
            shutil.copyfile(vocab, partial / "vocab.json")
    if config.model.scale_logits:
        print("the logits' division by sqrt(D) is folded into ln_f: GPT-2 has none")
    n_params = sum(leaf.size for leaf in tensors.values())
    print(
        f"{out}: {n_params:,} parameters in {len(shards.filename_to_tensors)} safetensors; "
        f"next: transformers.GPT2LMHeadModel.from_pretrained({str(out)!r})"
    )


def fold_scale(params: dict, config: ModelConfig) -> dict:
    """The same logits from a model that does not divide them by sqrt(D).

    x head^T / sqrt(D) is linear in ln_f's scale and bias; the head, which may be wte, stays.
    """
    root = math.sqrt(config.d_model)

    def divided(leaf: Any) -> np.ndarray:
        return (np.asarray(leaf, np.float64) / root).astype(leaf.dtype)

    return params | {"ln_f": {name: divided(leaf) for name, leaf in params["ln_f"].items()}}


def split(tensors: dict[str, np.ndarray], shard_size: str) -> huggingface_hub.StateDictSplit:
    try:
        return huggingface_hub.split_state_dict_into_shards_factory(
            tensors,
            get_storage_size=lambda tensor: tensor.nbytes,
            filename_pattern="model{suffix}.safetensors",
            max_shard_size=shard_size,
        )
    except (ValueError, OverflowError):
        raise UserError(f"shard_size={shard_size!r}: write it as 500MB or 5GB") from None


def json_files(config: TrainConfig, shards: huggingface_hub.StateDictSplit) -> dict[str, str]:
    """The text of config.json, and of the index when there are several shards."""
    model = config.model
    end = tokenizer.load(config.data.tokenizer).eot_token
    fields = GPT2 | {
        "model_type": "gpt2",
        "architectures": ["GPT2LMHeadModel"],
        "activation_function": "gelu_new" if model.gelu == "tanh" else "gelu",
        "tie_word_embeddings": model.tied_head,
        "torch_dtype": np.dtype(at_least_float32(model.dtype)).name,
        **{theirs: getattr(model, ours) for ours, theirs in SIZES.items()},
        **dict.fromkeys(DROPOUTS, model.dropout),
        **dict.fromkeys(("bos_token_id", "eos_token_id"), end if end < model.vocab_size else None),
    }
    files: dict[str, Any] = {"config.json": fields}
    if len(shards.filename_to_tensors) > 1:
        index = {"metadata": shards.metadata, "weight_map": shards.tensor_to_filename}
        files["model.safetensors.index.json"] = index
    return {name: json.dumps(content, indent=2) + "\n" for name, content in files.items()}


# ---- the command --------------------------------------------------------------------------------


def require_new(out: Path) -> None:
    """Raises UserError when `out` holds something already."""
    try:
        is_new = not os.path.lexists(out) or (out.is_dir() and not any(out.iterdir()))
    except OSError as error:
        raise UserError(f"out={str(out)!r}: {error.strerror}; name another folder") from None
    if not is_new:
        raise UserError(f"out={str(out)!r}: is not an empty folder; name another")


@contextlib.contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """A folder beside `out` that takes its place when all is written: a kill leaves no half."""
    target = out.resolve()
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=target.parent) as scratch:
            partial = Path(scratch) / target.name
            partial.mkdir()
            yield partial
            partial.rename(target)
    except (OSError, safetensors.SafetensorError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise UserError(
            f"out={str(out)!r}: cannot be written: {reason}; make room or name another folder"
        ) from None


def parse_args(args: Sequence[str]) -> argparse.Namespace:
    parser = ArgumentParser(prog="python -m jax_model5.huggingface", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    reads = commands.add_parser("import", help="GPT-2 weights -> a folder like a run's")
    weights = "a folder that save_pretrained wrote, or a name of the hub such as gpt2"
    reads.add_argument("weights", metavar="PATH_OR_NAME", help=weights)
    writes = commands.add_parser("export", help="a run's newest weights -> GPT-2's files")
    writes.add_argument("run", metavar="RUN", help="the run's workdir")
    size = "largest file, such as 500MB; default 5GB"
    writes.add_argument("--shard_size", default="5GB", help=size)
    for command in (reads, writes):
        command.add_argument("--out", metavar="DIR", required=True, help="a new or empty folder")
    return parser.parse_args(args)


def main() -> None:
    with one_line_errors():
        options = parse_args(sys.argv[1:])
        out = Path(options.out).expanduser()
        require_new(out)
        if options.command == "import":
            import_weights(options.weights, out)
        else:
            export_weights(options.run, out, options.shard_size)


if __name__ == "__main__":
    main()
