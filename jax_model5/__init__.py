"""Model 5 in JAX. Read its files in this order: each imports only from those before it.

    errors disk config tokenizer readers files hub token_file corpus batches trees sharding kernels
    layer_norm flash model losses optimizer step flops processes startup pace programs checkpoint
    record trackers generate run_folder train

Around them stand, and never import each other:

    huggingface doctor bench compare plan
"""
