"""The strongest PyTorch of the benchmark computes what the course's PyTorch computes."""

import dataclasses

import pytest
import torch

from jax_model5.config import ModelConfig, TrainConfig
from parity_tests.ladder import FLOAT64_TOLERANCE, relative
from torch_ref.bench import TunedModel5, tuned_step
from torch_ref.loss import n_last
from torch_ref.model import Model5
from torch_ref.step import make_optimizer, make_scheduler, train_step

MODEL = ModelConfig(
    vocab_size=101, seq_len=12, d_model=16, n_heads=2, n_layers=3, dropout=0.0, dtype="float64"
)
OBJECTIVES = [("final_token", 1), ("last_k", 5), ("all_tokens", 1)]


def pair(objective, last_k):
    config = TrainConfig(
        model=MODEL, objective=objective, last_k=last_k, batch_size=4, accumulate=2
    )
    course, tuned = Model5(MODEL).double(), TunedModel5(MODEL).double()
    with torch.no_grad():  # far from the init, where attention hardly matters to the loss
        for parameter in course.parameters():
            parameter.normal_(0.1, 0.3)
    tuned.load_state_dict(course.state_dict())
    windows = torch.randint(0, MODEL.vocab_size, (4, MODEL.seq_len + 1))
    return config, course, tuned, windows


@pytest.mark.parametrize(("objective", "last_k"), OBJECTIVES)
def test_tuned_and_course_train_alike(objective, last_k):
    """Losses and parameters of three steps; float64, so that only rounding may differ."""
    config, course, tuned, windows = pair(objective, last_k)
    optimizer = make_optimizer(course, config.optimizer)
    scheduler = make_scheduler(optimizer, config.optimizer, config.steps)
    step = tuned_step(tuned, config, is_compiled=False)
    for _ in range(3):
        theirs = train_step(course, optimizer, scheduler, windows, config)["loss"]
        assert step(windows) == pytest.approx(theirs, rel=1e-12)
    named = dict(course.named_parameters())
    for name, parameter in tuned.named_parameters():
        assert torch.allclose(parameter, named[name], rtol=1e-9, atol=1e-9), name


def test_a_suffix_that_looks_ahead_is_seen():
    """Without its mask the last block's suffix attends to the future."""
    config, course, tuned, windows = pair("last_k", 5)
    plain = torch.nn.functional.scaled_dot_product_attention

    def unmasked(*args, attn_mask=None, **fields):
        return plain(*args, **fields)

    tokens, n = windows[:, :-1], n_last(config)
    expected = course(tokens)[:, -n:].detach()
    assert relative(tuned(tokens, n).detach(), expected) < FLOAT64_TOLERANCE
    torch.nn.functional.scaled_dot_product_attention = unmasked
    try:
        found = tuned(tokens, n).detach()
    finally:
        torch.nn.functional.scaled_dot_product_attention = plain
    # The least of 300 seeds was 1.0e-3; a mean loss, one number, may agree by chance.
    assert relative(found, expected) > 1e-4


def test_dropout_is_on_in_the_suffix():
    model = TunedModel5(dataclasses.replace(MODEL, dropout=0.5)).double()
    tokens = torch.randint(0, MODEL.vocab_size, (4, MODEL.seq_len))
    assert not torch.equal(model.train()(tokens, 1), model(tokens, 1))
    assert torch.equal(model.eval()(tokens, 1), model(tokens, 1))
