"""Any two choices meet in one of the six configurations, and what shows only there is named."""

import dataclasses
import itertools
from unittest import mock

import pytest

import torch_ref.model
from jax_model5 import model, optimizer, step, trees
from parity_tests import choices, ladder, report

CONFIG = report.default_config("float64")
EVERY = [CONFIG, *choices.others(CONFIG)]


def made(config, choice):
    """What the configuration has in the fields of a choice."""
    part = getattr(config, choice.rpartition(".")[0] or "model")
    part = config if "." not in choice else part
    return tuple(getattr(part, name) for name in choices.OTHERS[choice][0])


def test_any_two_choices_meet():
    for one, other in itertools.combinations(choices.OTHERS, 2):
        is_first = {
            tuple(made(config, name) == made(CONFIG, name) for name in (one, other))
            for config in EVERY
        }
        assert len(is_first) == 4, (one, other)


def test_every_choice_is_made():
    for choice, others in choices.OTHERS.items():
        found = {made(config, choice) for config in EVERY}
        assert len(found) == 1 + len(others), choice


def test_a_configuration_says_its_choices():
    words = choices.words(EVERY[1], CONFIG)
    assert words.startswith("objective=final_token, accumulate=1, n_layers=1, gelu=tanh, tied")


def test_no_two_sizes_of_a_configuration_are_equal():
    for config in EVERY[1:]:
        c, D = config.model, config.model.d_model
        rows = {config.batch_size, config.batch_size // config.accumulate}
        sizes = [c.seq_len, c.vocab_size, c.n_heads, config.last_k, D, 3 * D, 4 * D]
        sizes += [D // c.n_heads] * (c.n_heads > 1)
        assert len(rows.union(sizes)) == len(rows) + len(sizes), sizes


_logits, _attention = torch_ref.model.Model5.logits, model.Attention.__call__
_block, _split, _run = torch_ref.model.Block.__init__, trees.split, model.run_block


def scaled_where_tied(self, x_BxLxD):
    """T5's rule."""
    of = dataclasses.replace(self.config, scale_logits=self.config.tied_head)
    with mock.patch.object(self, "config", of):
        return _logits(self, x_BxLxD)


def tanh_where_unscaled(self, config):
    gelu = "erf" if config.scale_logits else "tanh"
    _block(self, dataclasses.replace(config, gelu=gelu))


def undropped_alone(self, x, n_last, *, deterministic, slots=None):
    """Weights of a single query are not dropped."""
    return _attention(self, x, n_last, deterministic=deterministic or n_last == 1, slots=slots)


def last_pattern(params, patterns, field):
    return _split(params, patterns[-1:], field)


def undropped_without_remat(config, n_last, *, deterministic):
    return _run(config, n_last, deterministic=deterministic or config.remat == "none")


FAULTS = {
    "T5's rule for logits": ("logits", torch_ref.model.Model5, "logits", scaled_where_tied),
    "GELU by another field": ("gelu", torch_ref.model.Block, "__init__", tanh_where_unscaled),
    "a single query's weights": ("attention", model.Attention, "__call__", undropped_alone),
    "the last pattern only": ("step", optimizer, "split", last_pattern),
    "no remat, no dropout": ("attention", model, "run_block", undropped_without_remat),
}


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS)
def test_what_shows_in_another_configuration_is_named(fault):
    operation, target, name, value = FAULTS[fault]
    config = dataclasses.replace(CONFIG, workdir=fault)  # traced anew
    with mock.patch.object(target, name, value):
        first = [m for m in ladder.measure("7 trajectory, dropout", "", config) if not m.passed]
        found = [row for other in choices.others(config) for row in report._steps_of(other, fault)]
        wrong = [row for row in found if not row.passed]
    assert first == []
    assert operation in wrong[0].operation, wrong[0]
    assert wrong[0].cause.endswith(f"with {fault}")


@pytest.mark.slow
def test_gradients_that_are_all_off_are_of_the_step():
    right = step._over_micro_batches

    def added(mean_loss, moving, windows, config):
        loss, gradients = right(mean_loss, moving, windows, config)
        return loss, step.jax.tree.map(lambda g: g * config.accumulate, gradients)

    config = dataclasses.replace(CONFIG, workdir="added")
    with mock.patch.object(step, "_over_micro_batches", added):
        assert report.first_difference(config).operation == "step"
