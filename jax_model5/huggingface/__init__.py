"""GPT-2 weights of Hugging Face in and out; `python -m jax_model5.huggingface`."""
