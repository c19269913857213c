"""Model 5, a GPT-2-small decoder with dropout, trained on the final token: JAX and Flax."""
