"""Proof that jax_model5 and torch_ref compute the same numbers: the only code that sees both."""
