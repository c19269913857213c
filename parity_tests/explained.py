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
    ("*layer_norm.py:_backward*", "sums", "only on a GPU"),
    ("*model.py:Attention._flash*", "", "only on a GPU: tests/test_flash.py"),
    ("*model.py:Attention._is_flash*", "", "only on a GPU: tests/test_flash.py"),
    ("*model.py:Attention.__call__*", "_flash", "only on a GPU: tests/test_flash.py"),
    ("*model.py:Attention.__call__*", "(y_BxLxD)", "only on a GPU: tests/test_flash.py"),
    ("jax_model5/model.py:Block.__call__", "call left out: sharding . row_major", "only on a GPU"),
    ("*", "raise UserError", "an error's words: tests/test_errors.py"),
    ("*:split_frozen", "words = ", "an error's words: tests/test_errors.py"),
    ("*:require_plain", "", "what the reference refuses: tests/test_given_weights.py"),
    ("*optimizer.py:*", _STOPPED, _UNDIFFERENTIATED),
    ("jax_model5/step.py:train_step*", _STOPPED, _UNDIFFERENTIATED),
    ("jax_model5/step.py:init_state*", _STOPPED, _UNDIFFERENTIATED),
    ("jax_model5/step.py:loss_and_gradients*", "no_gradient*split_frozen(", _UNDIFFERENTIATED),
    ("jax_model5/step.py:loss_and_gradients*", "no_gradient*sharding.", _UNDIFFERENTIATED),
    ("jax_model5/step.py:loss_and_gradients*", "no_gradient*over_micro", _UNDIFFERENTIATED),
    ("jax_model5/step.py:loss_and_gradients*", "no_gradient*return run(", _UNDIFFERENTIATED),
    ("jax_model5/step.py:dropout_key*", _STOPPED, _UNDIFFERENTIATED),
    ("jax_model5/step.py:eval_step*", _STOPPED, _UNDIFFERENTIATED),
    ("jax_model5/step.py:_over_micro_batches*", _STOPPED, _UNDIFFERENTIATED),
    ("torch_ref/step.py:eval_step*", _STOPPED, _UNDIFFERENTIATED),
    ("torch_ref/step.py:param_norm*", _STOPPED, _UNDIFFERENTIATED),
    ("torch_ref/model.py:init_*", _STOPPED, _UNDIFFERENTIATED),
    ("jax_model5/step.py:abstract_state*", _STOPPED, _UNDIFFERENTIATED),
    ("jax_model5/model.py:*_init*", _STOPPED, _UNDIFFERENTIATED),
    ("jax_model5/kernels.py:*matmul_transposed*", _STOPPED, "its gradient is written by hand"),
    ("jax_model5/kernels.py:*product*", _STOPPED, "its gradient is written by hand"),
    ("jax_model5/kernels.py:_is_float32_fast", "", "the form for a CPU: tests/test_kernels.py"),
    ("jax_model5/model.py:Attention._cached", _STOPPED, _UNDIFFERENTIATED),
    ("jax_model5/layer_norm.py:*", _STOPPED, "its gradient is written by hand"),
    ("jax_model5/losses.py:_nll*", _STOPPED, "its gradient is written by hand"),
]
_MEMORY = "what the forward pass keeps: memory and time, not numbers"
EXPLAINED = [
    (
        "jax_model5/step.py:init_state",
        "constant: True -> False*deterministic",
        "what is drawn does not depend on what is dropped",
    ),
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
        "torch_ref/model.py:CausalAttention.forward",
        "operator: - -> ( )*shape[[]-2:]",
        "of four axes the last two are those from 2 on",
    ),
    ("torch_ref/step.py:schedule*", "constant: 1 -> 2*progress = min(", "0 in the last step, too"),
    ("*optimizer.py:_schedule", "forced: warmup = = 0 -> False", "a warm-up of no steps is none"),
    ("*:_over_micro_batches", "forced: * = = 1 -> False", "the mean over one part is its own"),
    ("torch_ref/step.py:schedule*", "constant: 1.0 -> *progress = min(", "a run ends at 1"),
    ("torch_ref/step.py:*", "constant: 1 -> 0*[[]:, 1:]", "the last N targets are the same"),
    ("torch_ref/step.py:*", "slice by one: 1 -> *[[]:, 1:]", "the last N targets are the same"),
    ("torch_ref/*", "argument dropped or swapped: , device", "a CPU is one device"),
    (
        "jax_model5/kernels.py:threefry2x32",
        "constant: 1 -> 2*threefry_first_word",
        "JAX moves an index beyond the end back to the last",
    ),
    ("jax_model5/kernels.py:threefry2x32", "constant: 0 -> 1*zeros_like", "of one shape, both"),
    ("jax_model5/model.py:run_block", "    barriers: Any = ", _MEMORY),
    ("jax_model5/model.py:", "save_only_these_names", _MEMORY),
    ("jax_model5/step.py:abstract_state*", "low_precision", "shapes only"),
]
