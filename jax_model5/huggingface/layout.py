"""What a folder of GPT-2 weights holds: the fields of config.json, and the names of tensors."""

import json
from pathlib import Path
from typing import Any

from jax_model5.config import ModelConfig
from jax_model5.errors import UserError
from jax_model5.model import LAYER_NORM_EPSILON
from jax_model5.trees import table

HEAD = "lm_head.weight"  # where the head is tied, a second name of wte.weight, if it is there
PREFIX = "transformer."
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
