"""Frozen parameters: PyTorch's are those without requires_grad, also for clipping."""

import dataclasses

import pytest
import torch

from parity_tests import ladder


@pytest.mark.slow
@pytest.mark.parametrize(("freezes_in_pytorch", "agree"), [(True, True), (False, False)])
def test_frozen_leaves_are_those_without_requires_grad(monkeypatch, freezes_in_pytorch, agree):
    update = dataclasses.replace(ladder.ADAMW, clip_norm=0.01, freeze=("wte", "wpe"))
    config = ladder.case("float64", "all_tokens", steps=3, optimizer=update)
    if not freezes_in_pytorch:
        monkeypatch.setattr(torch.nn.Parameter, "requires_grad_", lambda self, needed: self)
    results = ladder.measure("7 trajectory", "frozen", config)
    assert all(result.passed for result in results) == agree
