"""Mutants that no proof of numbers can see: why, in one sentence each."""

# (file:scope, a part of "operator, new line, diff", why); * is anything. What NOT_RUN has is
# left out; an explanation excuses a survivor only: whatever is caught counts as caught.
NOT_RUN = [
    ("*layer_norm.py:gradients_of_a_gpu*", "", "a GPU's kernel: tests/test_kernels.py runs it"),
    ("*layer_norm.py:_kernel*", "", "a GPU's kernel: tests/test_kernels.py runs it"),
    ("*layer_norm.py:_backward*", "is_gpu", "only on a GPU"),
    ("*layer_norm.py:_backward*", "_gpu", "only on a GPU"),
    ("*layer_norm.py:_backward*", "fits", "only on a GPU"),
    ("*model.py:Attention._flash*", "", "only on a GPU: tests/test_flash.py"),
    ("*model.py:Attention._is_flash*", "", "only on a GPU: tests/test_flash.py"),
    ("*model.py:Attention.__call__*", "_flash", "only on a GPU: tests/test_flash.py"),
    ("*", "raise UserError", "an error's words: tests/test_errors.py"),
]
_UNDIFFERENTIATED = "nothing is differentiated through it"
_MEMORY = "what the forward pass keeps: memory and time, not numbers"
_ONE_SIDE = "a GPU's branch, or a hint on memory layout: no number on a CPU"
EXPLAINED = [
    ("*", "call left out*checkpoint_name", "a name for remat: the value is the same"),
    ("*", "argument dropped*checkpoint_name", "a name for remat: the value is the same"),
    ("*optimizer.py:*", "gradient stopped", _UNDIFFERENTIATED),
    ("*step.py:train_step*", "gradient stopped*TrainState", _UNDIFFERENTIATED),
    ("jax_model5/step.py:train_step*", "gradient stopped", _UNDIFFERENTIATED),
    ("jax_model5/step.py:init_state*", "gradient stopped", _UNDIFFERENTIATED),
    ("jax_model5/step.py:abstract_state*", "gradient stopped", _UNDIFFERENTIATED),
    ("jax_model5/step.py:dropout_key*", "gradient stopped", _UNDIFFERENTIATED),
    ("jax_model5/step.py:eval_step*", "gradient stopped", _UNDIFFERENTIATED),
    ("jax_model5/step.py:_over_micro_batches*", "gradient stopped", _UNDIFFERENTIATED),
    ("torch_ref/step.py:eval_step*", "gradient stopped", _UNDIFFERENTIATED),
    ("torch_ref/step.py:param_norm*", "gradient stopped", _UNDIFFERENTIATED),
    ("torch_ref/model.py:*init*", "gradient stopped", _UNDIFFERENTIATED),
    ("jax_model5/model.py:*_init*", "gradient stopped", _UNDIFFERENTIATED),
    ("*:_over_micro_batches", "zeros = *low_precision(gradients)", "zeros are exact"),
    ("*:_over_micro_batches", "+    zeros = ((jnp.zeros(())), ", "JAX's own default is that dtype"),
    ("*:loss_and_gradients*", "merge(frozen, moving)", "two parts without a common leaf"),
    ("*:_over_micro_batches", "low_precision(jax.tree.map(jnp.zeros_like", "zeros are exact"),
    (
        "torch_ref/model.py:*__init__",
        "statements exchanged",
        "modules made in another order draw other numbers of the same law",
    ),
    (
        "jax_model5/step.py:init_state",
        "jax.random.fold_in(key, INIT)",
        "another key: other numbers of the same law",
    ),
    (
        "torch_ref/model.py:init_linear",
        "call left out*nn.init.uniform_(weight",
        "PyTorch's own init of a linear layer has this law",
    ),
    (
        "torch_ref/model.py:CausalAttention.forward",
        "statement deleted*scaled_dot_product_attention",
        "the form by hand below it computes the same",
    ),
    ("torch_ref/*", "argument dropped*device=", "a CPU is one device"),
    ("torch_ref/loss.py:loss", "statements exchanged", "two lines that do not need each other"),
    (
        "jax_model5/model.py:Attention._cached",
        "stack(?1 * start_B, start_B, 0 * start_B",
        "XLA moves the start of a whole axis back to 0",
    ),
    ("*:at_least_float32", "promote_types(jnp.float32, dtype)", "the same in either order"),
    ("jax_model5/model.py:run_block*", "prevent_cse", _MEMORY),
    ("jax_model5/model.py:run_block*", "remat", _MEMORY),
    ("jax_model5/model.py:Model5.features", "unroll", _MEMORY),
    ("jax_model5/model.py:Model5.features", "is_shallow", _MEMORY),
    ("jax_model5/model.py:Model5.features", "is_unrolled", _MEMORY),
    ("jax_model5/model.py:", "UNROLLED", _MEMORY),
    ("jax_model5/model.py:", "save_only_these_names", _MEMORY),
    ("jax_model5/model.py:Block*", "row_major", _ONE_SIDE),
    ("jax_model5/kernels.py:_padded", "", _ONE_SIDE),
    ("jax_model5/losses.py:", "_ROWS_OF_A_GPU", _ONE_SIDE),
    ("jax_model5/losses.py:*", "is_gpu", _ONE_SIDE),
    ("jax_model5/losses.py:", "ROWS = ", "how many rows at once: memory, not numbers"),
]
