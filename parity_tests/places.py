"""Where each line of both models belongs: the operations that a fault in it changes."""

import re
from collections.abc import Iterable

from parity_tests import taps

# The operations in the order in which a step reaches them; of a block once.
ORDER = ["parameters", "initial weights", "embedding", "embedding dropout", *taps.BLOCK_TAPS]
ORDER += ["ln_f", "logits", "loss", "gradients", "optimizer", "step", "evaluation", "KV cache"]
DROPOUT = ("embedding dropout", "attention weights", "attention residual", "MLP residual")
LINEAR = ("q", "k", "v", "proj", "fc", "out")
NORMS = ("ln_1", "ln_2", "ln_f")
HEADS = ("q", "k", "v", "attention weights", "attention")

# file.scope: the operations of its lines; where a scope holds several, by what stands in the line.
PLACES: dict[str, tuple[str, ...] | dict[str, tuple[str, ...]]] = {
    "model.kernel_init": ("initial weights",),
    "model.bias_init": ("initial weights",),
    "model.wte_init": ("initial weights",),
    "model.wpe_init": ("initial weights",),
    "model.parameter": ("parameters", "embedding", *LINEAR, *NORMS, "logits"),
    "model.Dropout": DROPOUT,
    "model.Linear": ("proj", "fc", "out", "initial weights"),
    "model.LayerNorm": (*NORMS, "initial weights"),
    "model.CausalAttention": ("attention weights", "attention"),
    "model.Attention": {
        "cache|slots|_Xx": ("KV cache",),
        "qkv": ("q", "k", "v"),
        "proj": ("attention", "proj"),
        "": (*HEADS, "proj"),
    },
    "model.Attention._cached": ("KV cache",),
    "model.QKV": ("q", "k", "v", "initial weights"),
    "model.Block": {
        "ln_1|row_major": ("ln_1",),
        "attention\\(|Attention|attn\\b": ("q", "attention weights", "attention", "proj"),
        "attn_drop|residual": ("attention residual",),
        "ln_2": ("ln_2",),
        "fc": ("fc",),
        "gelu": ("gelu",),
        "out\\b": ("out",),
        "mlp_drop|return|deterministic": ("MLP residual",),
        "": (*taps.BLOCK_TAPS,),
    },
    "model.run_block": (*taps.BLOCK_TAPS,),
    "model.": {"UNROLLED|_policies": (*taps.BLOCK_TAPS,), "": ()},
    "model.Model5": {
        "head": ("logits",),
        "wte": ("embedding", "logits"),
        "wpe": ("embedding",),
        "drop": ("embedding dropout",),
        "ln_f": ("ln_f",),
        "": ("embedding", *taps.BLOCK_TAPS),
    },
    "model.Model5.features": {
        "wte": ("embedding",),
        "drop": ("embedding dropout",),
        "ln_f": ("ln_f",),
        "": ("embedding dropout", *taps.BLOCK_TAPS, "ln_f"),
    },
    "model.Model5.forward": {
        "drop": ("embedding", "embedding dropout"),
        "ln_f": ("ln_f", "logits"),
        "": (*taps.BLOCK_TAPS,),
    },
    "model.Model5.embed": ("embedding",),
    "model.Model5.logits": ("logits",),
    "model.Model5._init_weights": ("initial weights",),
    "model.init_linear": ("initial weights",),
    "model.init_embedding": ("initial weights",),
    "model.applied": ("loss", "gradients"),
    "kernels.matmul": LINEAR,
    "kernels.product": (*LINEAR, *HEADS),
    "kernels._product": (*LINEAR, *HEADS, "logits"),
    "kernels._product_forward": (*LINEAR, *HEADS),
    "kernels._product_backward": (*LINEAR, *HEADS, "gradients"),
    "kernels._is_float32_fast": (*LINEAR, *HEADS),
    "kernels.matmul_transposed": ("logits",),
    "kernels._matmul_transposed_forward": ("logits",),
    "kernels._matmul_transposed_backward": ("logits", "gradients"),
    "kernels._padded": ("logits",),
    "kernels.gelu": ("gelu",),
    "kernels.keep_mask": DROPOUT,
    "kernels.random_bits": DROPOUT,
    "kernels.threshold": DROPOUT,
    "kernels.threefry2x32": DROPOUT,
    "kernels.threefry_first_word": DROPOUT,
    "kernels.causal_attention": HEADS,
    "kernels.attend": ("attention weights", "attention"),
    "kernels.masked_attention": ("attention weights", "attention"),
    "kernels.at_least_float32": (*NORMS, "attention weights", "logits", "loss", "gelu"),
    "layer_norm.": NORMS,
    "losses.": ("loss", "gradients"),
    "loss.": ("loss", "gradients"),
    "optimizer.": ("optimizer",),
    "step.init_state": ("initial weights", "step", "embedding"),
    "step.abstract_state": ("parameters", "initial weights"),
    "step.dropout_key": (*DROPOUT, "step"),
    "step.loss_and_gradients": ("loss", "gradients", "step"),
    "step._over_micro_batches": ("gradients", "step"),
    "step._micro_batches": ("gradients", "step", "evaluation"),
    "step.make_optimizer": ("optimizer",),
    "step.make_scheduler": ("optimizer",),
    "step.schedule": ("optimizer",),
    "step.eval_step": ("evaluation",),
    "step.autocast": (*NORMS, "attention weights", "gelu", "logits", "loss", "step"),
    "step.": ("gradients", "optimizer", "step"),
}

# What the report calls a stage -> operations.
_STAGES = {
    "q, k, v": ("q", "k", "v"),
    "embedding and logits": ("embedding", "logits", "gradients"),
    "ln_f at mean 300": ("ln_f",),
    "train and eval mode": ("evaluation", *DROPOUT, "step"),
    "suffix path and KV cache": ("logits", "KV cache"),
    "four devices": ("step", *DROPOUT, "parameters"),
    "bfloat16": (*NORMS, "attention weights", "gelu", "logits", "loss"),
    "dropout by chance": DROPOUT,
}


def operations_of(place: str, code: str = "") -> tuple[str, ...]:
    """The operations of a line of code in `place`, "file.scope"; none where nothing is known."""
    for known, operations in sorted(PLACES.items(), key=lambda item: -len(item[0])):
        if place == known or place.startswith(known if known[-1] == "." else f"{known}."):
            makes = _MADE if place.endswith(("__init__", "setup")) else ()
            return *_in_line(operations, code), *makes
    return ()


_MADE = ("parameters", "initial weights")


def _in_line(
    operations: tuple[str, ...] | dict[str, tuple[str, ...]], code: str
) -> tuple[str, ...]:
    if isinstance(operations, tuple):
        return operations
    found = [ops for pattern, ops in operations.items() if pattern and re.search(pattern, code)]
    return tuple(op for ops in found for op in ops) or operations[""]


def is_near(reported: str, expected: Iterable[str]) -> bool:
    """Whether what the report names is one of the operations, or the one before or after it."""
    name = reported.rpartition(": ")[2].removesuffix(", backward")
    found = _STAGES.get(name) or ((name,) if name in ORDER else operations_of(name))
    places = [ORDER.index(operation) for operation in found]
    return any(abs(ORDER.index(other) - place) <= 1 for other in expected for place in places)
