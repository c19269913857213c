"""Model 5 in plain PyTorch, as the course writes it: the reference that jax_model5 must equal."""
