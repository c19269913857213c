"""Proof that jax_model5 and torch_ref compute the same numbers: the only code that sees both."""

import importlib.metadata

# For XLA_FLAGS: half the compile time, for programs that run once. jax 0.11 has no such emitters.
COMPILE_FAST = "--xla_backend_optimization_level=0 --xla_cpu_opt_preset=FAST_COMPILE"
if importlib.metadata.version("jax").startswith("0.10."):
    COMPILE_FAST += " --xla_cpu_use_fusion_emitters=false"
