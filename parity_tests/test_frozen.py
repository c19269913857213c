"""Frozen parameters: PyTorch's are those without requires_grad, also for clipping."""

import dataclasses

import jax
import pytest
import torch

from jax_model5 import optimizer, step
from parity_tests import bridge, ladder
from torch_ref.step import make_optimizer, make_scheduler, train_step


def distance(freezes_in_pytorch: bool) -> float:
    """Largest relative error of a leaf's weights after three clipped AdamW steps."""
    config = ladder.case("float64", "all_tokens", steps=3)
    update = dataclasses.replace(config.optimizer, clip_norm=0.01, freeze=("wte", "wpe"))
    config = dataclasses.replace(config, optimizer=update)
    with jax.enable_x64(True):
        pair = ladder.Pair(config)
        theirs = pair.torch_model
        for table in (theirs.wte, theirs.wpe):
            table.weight.requires_grad_(not freezes_in_pytorch)
        theirs_update = make_optimizer(theirs, config.optimizer)
        scheduler = make_scheduler(theirs_update, config.optimizer, config.steps)
        moving, _ = optimizer.split_frozen(pair.params, config.optimizer)
        opt_state = optimizer.optimizer(config.optimizer, config.steps).init(moving)
        state = step.TrainState(jax.numpy.int32(0), pair.params, opt_state)
        for _ in range(3):
            state, metrics = step.train_step(state, pair.key, pair.windows, config=config)
            assert metrics["grad_norm"] > config.optimizer.clip_norm
            train_step(theirs, theirs_update, scheduler, torch.from_numpy(pair.windows), config)
        ours, expected = bridge.flat(state.params), bridge.flat(pair.torch_params())
        return max(ladder.relative(ours[name], expected[name]) for name in ours)


@pytest.mark.slow
@pytest.mark.parametrize(("freezes_in_pytorch", "agree"), [(True, True), (False, False)])
def test_frozen_leaves_are_those_without_requires_grad(freezes_in_pytorch, agree):
    assert (distance(freezes_in_pytorch) < ladder.FLOAT64_TOLERANCE) == agree
