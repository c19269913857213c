"""Model 5 in JAX. Read its files in this order: each imports only from those before it.

    errors disk config tokenizer readers files hub token_file corpus batches trees sharding kernels
    layer_norm flash model losses optimizer step flops processes startup pace programs checkpoint
    record trackers generate run_folder train

Around them stand, and never import each other:

    huggingface doctor bench compare plan
"""

import glob
import sys
import types
from typing import Any

DEVICE_FILES = ("/dev/nvidia*", "/dev/accel*", "/dev/vfio/*", "/dev/dxg", "/dev/kfd")

# With XLA's compiler for absent GPUs installed (`jax_model5.plan`), JAX loads NVIDIA's kernels and
# client too, and each of their libraries writes to the terminal that there is no driver.
_modules: dict[str, Any] = sys.modules
if sys.platform == "linux" and not any(glob.glob(pattern) for pattern in DEVICE_FILES):
    for _name in ("cuda12", "cuda13"):
        _modules.setdefault(f"jax_{_name}_plugin", None)
        _plugin = types.SimpleNamespace(initialize=lambda: None)
        _modules.setdefault(f"jax_plugins.xla_{_name}", _plugin)
