"""A run's newest weights -> the files that `transformers` reads."""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
import safetensors.numpy

from jax_model5 import tokenizer
from jax_model5.checkpoint import read_params
from jax_model5.config import ModelConfig, TrainConfig, config_of_run
from jax_model5.disk import replace_text
from jax_model5.errors import UserError
from jax_model5.huggingface.folder import new_folder
from jax_model5.huggingface.layout import DROPOUTS, GPT2, HEAD, PREFIX, SIZES
from jax_model5.kernels import at_least_float32
from jax_model5.startup import set_up_jax
from jax_model5.step import abstract_state
from jax_model5.trees import to_layout


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
    tensors = {name if name == HEAD else PREFIX + name: leaf for name, leaf in named.items()}
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
    if config.data.tokenizer != "gpt2":
        print(f"there is no Hugging Face tokenizer: the run's is {config.data.tokenizer}")
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
    """The text of each JSON file: the model, its generation, its tokenizer, the index of shards."""
    model = config.model
    end = tokenizer.load(config.data.tokenizer).eot_token
    ends = dict.fromkeys(("bos_token_id", "eos_token_id"), end if end < model.vocab_size else None)
    fields = GPT2 | {
        "model_type": "gpt2",
        "architectures": ["GPT2LMHeadModel"],
        "activation_function": "gelu_new" if model.gelu == "tanh" else "gelu",
        "tie_word_embeddings": model.tied_head,
        "torch_dtype": np.dtype(at_least_float32(model.dtype)).name,
        **{theirs: getattr(model, ours) for ours, theirs in SIZES.items()},
        **dict.fromkeys(DROPOUTS, model.dropout),
        **ends,
    }
    files: dict[str, Any] = {"config.json": fields, "generation_config.json": ends}
    if config.data.tokenizer == "gpt2":
        special = ("bos_token", "eos_token", "unk_token")
        files["tokenizer_config.json"] = {
            "tokenizer_class": "GPT2Tokenizer",
            "model_max_length": model.seq_len,  # a pipeline cuts a long text to it
            **dict.fromkeys(special, tokenizer.END_OF_TEXT),
        }
    if len(shards.filename_to_tensors) > 1:
        index = {"metadata": shards.metadata, "weight_map": shards.tensor_to_filename}
        files["model.safetensors.index.json"] = index
    return {name: json.dumps(content, indent=2) + "\n" for name, content in files.items()}
