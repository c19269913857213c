"""Hugging Face's safetensors -> a folder like a run's."""

import dataclasses
import math
import os
import re
import shlex
from pathlib import Path
from typing import Any

import huggingface_hub
import jax.numpy as jnp
import numpy as np
import safetensors

from jax_model5 import tokenizer
from jax_model5.checkpoint import Checkpoints, require_finite
from jax_model5.config import DataConfig, ModelConfig, OptimizerConfig, TrainConfig, to_yaml
from jax_model5.disk import replace_text
from jax_model5.errors import UserError
from jax_model5.huggingface.folder import new_folder
from jax_model5.huggingface.layout import (
    DROPOUTS,
    GPT2,
    HEAD,
    PREFIX,
    mismatches,
    model_config,
    read_json,
)
from jax_model5.startup import set_up_jax
from jax_model5.step import TrainState
from jax_model5.trees import from_layout, table

_MASKS = re.compile(r"h\.\d+\.attn\.(masked_)?bias")  # causal masks, which old files store
_WRAPPERS = re.compile(r"^(_orig_mod\.|module\.)+")  # of torch.compile and DistributedDataParallel


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
    data = DataConfig(tokenizer=tokenizer_of(folder, model))  # type: ignore[arg-type]
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
    require_finite(params, "weights", str(folder))
    with new_folder(out) as partial:
        replace_text(partial / "config.yaml", to_yaml(config))
        checkpoints = Checkpoints(partial / "checkpoints", keep=1)
        checkpoints.save(TrainState(jnp.zeros((), jnp.int32), params, ()), config, "")
        checkpoints.wait()
    say_imported(out, config, fields)


def tokenizer_of(folder: Path, model: ModelConfig) -> str:
    """The tokenizer of the weights: GPT-2's, or where no file tells, what their size fits.

    Raises:
      UserError: a file tells of another.
    """
    try:
        is_gpt2 = tokenizer.is_gpt2(folder)
    except (ValueError, OSError, AttributeError, TypeError) as error:
        reason = f"its tokenizer cannot be read: {error}"
        raise UserError(f"weights={str(folder)!r}: {reason}; save it anew") from None
    if is_gpt2 is False:
        raise UserError(
            f"weights={str(folder)!r}: their tokenizer is not GPT-2's, and their text would be "
            "nonsense here; to take the weights alone, move the tokenizer's files away"
        )
    return "gpt2" if is_gpt2 or model.vocab_size >= GPT2["vocab_size"] else "bytes"


def say_imported(out: Path, config: TrainConfig, fields: dict[str, Any]) -> None:
    """The closing line: what is there now, and the commands that use it."""
    model = config.model
    if len({fields[field] for field in DROPOUTS}) > 1:
        rates = ", ".join(f"{field}={fields[field]}" for field in DROPOUTS)
        print(f"note: {rates}, but Model 5 has one rate: {model.dropout}, that of resid_pdrop")
    n_params = sum(math.prod(place.shape) for place in table(model, "gpt2"))
    here = shlex.quote(str(out))
    print(
        f"{out}: {n_params:,} parameters, {model.n_layers} layers, {model.n_heads} heads, width "
        f"{model.d_model}, {model.seq_len} positions, {model.vocab_size} tokens, {model.dtype}, "
        f"tokenizer {config.data.tokenizer}; "
        f"next: python -m jax_model5.generate --workdir {here} --prompt TEXT, or python -m "
        f"jax_model5.train --config {here}/config.yaml --init_from {here} --workdir NEW"
    )


def locate(source: str) -> Path:
    """The folder `source`, or the one that the hub's client keeps of that name."""
    folder = os.path.expanduser(source)
    if os.path.isdir(folder):
        return Path(folder)
    patterns = ["*.json", "*.safetensors", "merges.txt", "vocab.txt", "*.model"]
    try:
        return Path(huggingface_hub.snapshot_download(source, allow_patterns=patterns))
    except (OSError, ValueError) as error:
        reason = str(error).strip().split("\n")[0][:120]
        raise UserError(
            f"weights={source!r}: no such folder, and the hub does not give it: {reason}; "
            "offline, name a folder that holds config.json and model.safetensors"
        ) from None


def open_tensors(folder: Path) -> dict[str, Any]:
    """GPT-2's names, without prefix and masks -> safetensors' slices: only headers are read.

    Raises:
      UserError: a file that is missing or damaged, or a name that occurs twice.
    """
    tensors: dict[str, Any] = {}
    wrappers = set()
    for path in weight_files(folder):
        try:
            file = safetensors.safe_open(path, framework="numpy")
        except (OSError, safetensors.SafetensorError) as error:
            raise UserError(
                f"weights={str(folder)!r}: {path.name} cannot be read: {error}; fetch it again, "
                "or write it with save_pretrained (pickled weights are never read)"
            ) from None
        for key in file.keys():  # noqa: SIM118
            bare = _WRAPPERS.sub("", key)
            wrappers.add(key.removesuffix(bare))
            name = bare.removeprefix(PREFIX)
            if name in tensors:
                raise UserError(f"weights={str(folder)!r}: holds {name} twice; save it anew")
            if not _MASKS.fullmatch(name):
                tensors[name] = file.get_slice(key)
    if wrapped := " ".join(sorted(filter(None, wrappers))):
        print(f"note: left out {wrapped} at the beginning of names")
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
