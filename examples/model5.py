"""Model 5 (jax_model5, scanned trunk) and its PyTorch reference, on all positions.

python examples/model5.py [--fault NAME] [--html FILE]
"""

from functools import partial
from unittest import mock

import blocks

import portproof
from jax_model5.config import ModelConfig, OptimizerConfig
from jax_model5.losses import nll
from jax_model5.optimizer import optimizer
from torch_ref.loss import loss
from torch_ref.model import F, Model5
from torch_ref.step import make_optimizer

V, L = 61, 9
CONFIG = ModelConfig(V, L, d_model=20, n_heads=2, n_layers=6, remat="none")  # 5 are scanned
UPDATE = OptimizerConfig(learning_rate=1e-3)
MODULES = {name.replace(".", "/"): name for name in "ln_1 attn.qkv attn.proj ln_2 fc out".split()}
SITES = {"attn/drop": "attn.attend", "attn_drop": "attn_drop", "mlp_drop": "mlp_drop"}


def port():
    leaves, taps, masks = blocks.tables(6, "blocks", MODULES, SITES, "attn.attend", T=".T")
    return portproof.Port(
        torch_model=lambda: Model5(CONFIG),
        jax_model=partial(blocks.apply, CONFIG),
        params=blocks.shapes(CONFIG),
        leaves=[
            ("wte.weight", "wte"),
            ("wpe.weight", "wpe"),
            ("ln_f.weight", "ln_f/scale"),
            ("ln_f.bias", "ln_f/bias"),
            *leaves,
        ],
        taps=[
            ("embedding", "drop:in0", "drop:in0"),
            ("drop", "drop", "drop"),
            *taps,
            ("ln_f", "ln_f", "ln_f"),
        ],
        masks=[("drop", "drop"), *masks],
        batch=portproof.tokens(3, L, vocab=V),
        losses=(
            lambda logits, tokens: nll(logits[:, :-1], tokens[:, 1:]).mean(),
            lambda logits, tokens: loss(logits[:, :-1], tokens[:, 1:], L - 1),
        ),
        optimizers=(optimizer(UPDATE, 1), lambda module: make_optimizer(module, UPDATE)),
    )


attend = F.scaled_dot_product_attention
FAULTS = {
    "tanh": lambda: mock.patch.dict(blocks.CHANGED, gelu="tanh"),
    "rate": lambda: mock.patch.dict(blocks.CHANGED, dropout=0.2),
    "unscaled": lambda: mock.patch.object(
        F, "scaled_dot_product_attention", partial(attend, scale=1.0)
    ),
}

if __name__ == "__main__":
    portproof.main(port, FAULTS)
