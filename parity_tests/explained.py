"""Mutants that no proof of numbers can see: why, in one sentence each."""

# (file:scope, a part of "operator: what is gone -> what came, newline, the line", why); * is
# anything. What NOT_RUN has is left out; an explanation excuses a survivor only: whatever is caught
# counts as caught.
_STOPPED = "gradient stopped: "
_UNDIFFERENTIATED = "nothing is differentiated through it"
NOT_RUN = [
    ("*layer_norm.py:gradients_of_a_gpu*", "", "a GPU's kernel: tests/test_kernels.py runs it"),
    ("*layer_norm.py:_kernel*", "", "a GPU's kernel: tests/test_kernels.py runs it"),
    ("*layer_norm.py:_backward*", "is_gpu", "only on a GPU"),
    ("*layer_norm.py:_backward*", "_gpu", "only on a GPU"),
    ("*layer_norm.py:_backward*", "fits", "only on a GPU"),
    ("*model.py:Attention._flash*", "", "only on a GPU: tests/test_flash.py"),
    ("*model.py:Attention._is_flash*", "", "only on a GPU: tests/test_flash.py"),
    ("*model.py:Attention.__call__*", "_flash", "only on a GPU: tests/test_flash.py"),
    ("jax_model5/kernels.py:_padded", "", "only on a GPU"),
    ("jax_model5/losses.py:", "_ROWS_OF_A_GPU = ", "only on a GPU"),
    ("jax_model5/model.py:Block.__call__", "call left out: sharding . row_major", "only on a GPU"),
    ("*", "raise UserError", "an error's words: tests/test_errors.py"),
    ("*optimizer.py:*", _STOPPED, _UNDIFFERENTIATED),
    ("jax_model5/step.py:train_step*", _STOPPED, _UNDIFFERENTIATED),
    ("jax_model5/step.py:init_state*", _STOPPED, _UNDIFFERENTIATED),
    ("jax_model5/step.py:dropout_key*", _STOPPED, _UNDIFFERENTIATED),
    ("jax_model5/step.py:eval_step*", _STOPPED, _UNDIFFERENTIATED),
    ("jax_model5/step.py:_over_micro_batches*", _STOPPED, _UNDIFFERENTIATED),
    ("torch_ref/step.py:eval_step*", _STOPPED, _UNDIFFERENTIATED),
    ("torch_ref/step.py:param_norm*", _STOPPED, _UNDIFFERENTIATED),
    ("torch_ref/model.py:*init*", _STOPPED, _UNDIFFERENTIATED),
    ("jax_model5/model.py:*_init*", _STOPPED, _UNDIFFERENTIATED),
    ("jax_model5/kernels.py:*matmul*", _STOPPED, "its gradient is written by hand"),
    ("jax_model5/kernels.py:_product", _STOPPED, "its gradient is written by hand"),
    ("jax_model5/layer_norm.py:*", _STOPPED, "its gradient is written by hand"),
    ("jax_model5/losses.py:_nll*", _STOPPED, "its gradient is written by hand"),
]
_MEMORY = "what the forward pass keeps: memory and time, not numbers"
EXPLAINED = [
    ("*", "call left out: checkpoint_name", "a name for remat: the value is the same"),
    ("*:_over_micro_batches", "low_precision ( )*zeros_like", "zeros are exact"),
    ("*:_over_micro_batches", "low_precision ( )*zeros = ", "zeros are exact"),
    ("*:_over_micro_batches", "swapped: , at_least_float32", "JAX's own default is that dtype"),
    ("*:loss_and_gradients*", "swapped: *frozen*merge(moving", "parts without a common leaf"),
    (
        "jax_model5/step.py:init_state",
        "call left out: jax . random . fold_in",
        "another key: other numbers of the same law",
    ),
    (
        "torch_ref/model.py:init_linear",
        "call left out: nn . init . uniform_*(weight",
        "PyTorch's own init of a linear layer has this law",
    ),
    (
        "torch_ref/model.py:CausalAttention.forward",
        "statement deleted: return F . scaled_dot_product_attention",
        "the form by hand below it computes the same",
    ),
    (
        "torch_ref/model.py:CausalAttention.forward",
        "statement deleted: if self . mask is None",
        "the form by hand below it computes the same",
    ),
    (
        "torch_ref/model.py:init_head",
        "nn . init . normal_",
        "PyTorch's own init of an embedding has this law",
    ),
    ("torch_ref/step.py:*", "constant: 1 -> 0*[[]:, 1:]", "the last N targets are the same"),
    ("torch_ref/step.py:*", "slice by one: 1 -> *[[]:, 1:]", "the last N targets are the same"),
    ("torch_ref/*", "argument dropped or swapped: , device", "a CPU is one device"),
    (
        "jax_model5/model.py:Attention._cached",
        "constant: 0 -> 1*starts_Bx3 = ",
        "XLA moves the start of a whole axis back to 0",
    ),
    ("*:at_least_float32", "swapped: *promote_types", "the same in either order"),
    ("jax_model5/model.py:run_block", "swapped: , prevent_cse", _MEMORY),
    ("jax_model5/model.py:run_block", "swapped: , policy", _MEMORY),
    ("jax_model5/model.py:run_block", "call left out: nn . remat", _MEMORY),
    ("jax_model5/model.py:run_block", 'branch forced*if config.remat == "none"', _MEMORY),
    ("jax_model5/model.py:run_block", 'comparison*if config.remat == "none"', _MEMORY),
    ("jax_model5/model.py:Model5.features", "swapped: *unroll = depth", _MEMORY),
    ("jax_model5/model.py:Model5.features", "unroll=depth if is_unrolled else 1", _MEMORY),
    ("jax_model5/model.py:Model5.features", "            is_shallow = ", _MEMORY),
    ("jax_model5/model.py:Model5.features", "            is_unrolled = ", _MEMORY),
    ("jax_model5/model.py:", "UNROLLED = ", _MEMORY),
    ("jax_model5/losses.py:", "\nROWS = ", "how many rows at once: memory, not numbers"),
    ("jax_model5/losses.py:_in_chunks", "    C = max(", "how many rows at once: memory"),
]
