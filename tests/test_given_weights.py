"""Training that starts from given weights, and weights that never move."""

import dataclasses
import functools
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_model5 import checkpoint, step, train
from jax_model5.config import TrainConfig
from jax_model5.errors import UserError
from jax_model5.programs import Programs
from jax_model5.run_folder import RunFolder
from jax_model5.trees import merge, split
from tests.tiny import MODEL, flags, run, slow, tiny, with_model, with_optimizer

SOME = with_optimizer(TrainConfig(model=MODEL, batch_size=4), freeze=("wte", "trunk/attn/*"))


def params_of(config, workdir=None):
    return checkpoint.read_params(workdir or config.workdir, step.abstract_state(config).params)


def same_bits(a, b):
    return np.asarray(a).tobytes() == np.asarray(b).tobytes()


def moved(before, after):
    """Paths of the leaves that are not the same bits."""
    pairs = zip(jax.tree.leaves_with_path(before), jax.tree.leaves(after), strict=True)
    keystr = functools.partial(jax.tree_util.keystr, simple=True, separator="/")
    return {keystr(path) for (path, a), b in pairs if not same_bits(a, b)}


@pytest.mark.parametrize(
    ("accumulate", "name"), [(1, "sgd"), (2, "adamw"), slow(1, "adamw"), slow(2, "sgd")]
)
def test_frozen_leaves_do_not_move_by_a_bit(name, accumulate):
    config = dataclasses.replace(with_optimizer(SOME, name=name), accumulate=accumulate)
    state = step.init_state(jax.random.key(0), config=config)
    params = state.params | {"wte": state.params["wte"].at[0, 0].set(-0.0)}
    state = state.replace(params=params)
    windows = jax.random.randint(jax.random.key(1), (4, MODEL.seq_len + 1), 0, MODEL.vocab_size)
    run_step = jax.jit(functools.partial(step.train_step, config=config))
    after, _ = run_step(state, jax.random.key(0), windows)
    changed = moved(state.params, after.params)
    everything = moved(state.params, jax.tree.map(lambda leaf: leaf + 1, state.params))
    frozen = {"wte"} | {path for path in everything if path.startswith("trunk/attn/")}
    assert changed == everything - frozen


def test_frozen_leaves_cost_no_optimizer_memory():
    def moments(config):
        state = jax.eval_shape(functools.partial(step.init_state, config=config), jax.random.key(0))
        return sum(leaf.size for leaf in jax.tree.leaves(state.opt_state) if leaf.ndim)

    shapes = step.abstract_state(SOME).params
    frozen, moving = split(shapes, SOME.optimizer.freeze, "")
    sizes = [sum(leaf.size for leaf in jax.tree.leaves(part)) for part in (frozen, moving)]
    assert sizes[0] > 0
    assert moments(SOME) == 2 * sizes[1]
    assert moments(with_optimizer(SOME, freeze=())) == 2 * sum(sizes)


@pytest.mark.slow
def test_the_gradient_norm_is_that_of_what_moves():
    """As PyTorch's, where a parameter without requires_grad has no gradient."""
    state = step.init_state(jax.random.key(0), config=SOME)
    windows = jnp.ones((4, MODEL.seq_len + 1), jnp.int32)
    _, whole = step.loss_and_gradients(
        state, jax.random.key(0), windows, config=with_optimizer(SOME, freeze=())
    )
    _, moving = split(whole, SOME.optimizer.freeze, "")
    _, reported = step.train_step(state, jax.random.key(0), windows, config=SOME)
    expected = np.sqrt(sum(float((leaf**2).sum()) for leaf in jax.tree.leaves(moving)))
    assert reported["grad_norm"] == pytest.approx(expected, rel=1e-5)


def test_split_and_merge_are_inverse():
    params = step.abstract_state(SOME).params
    assert merge(*split(params, ["wte", "last_block/*/bias"], "")) == params


@pytest.mark.parametrize(
    ("freeze", "part"),
    [("wte head", "'head' is no parameter; they are"), ("*", "leaves nothing to train")],
)
def test_a_freeze_that_cannot_be_is_refused(freeze, part):
    with pytest.raises(UserError, match=r"optimizer\.freeze=") as error:
        step.abstract_state(with_optimizer(SOME, freeze=freeze.split()))
    assert part in str(error.value)


# ---- init_from ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def source(tmp_path_factory, text_file):
    """A finished run to start from."""
    config = tiny(tmp_path_factory.mktemp("source"), text_file, seed=5)
    assert train.train(config) == "finished"
    return config


@pytest.mark.parametrize("leaves", [slow("*"), "wte"])
def test_a_run_starts_from_given_weights(source, tmp_path, leaves):
    config = dataclasses.replace(
        with_optimizer(source, learning_rate=0.0), workdir=str(tmp_path / "run"), seed=0, steps=1
    )
    given = dataclasses.replace(config, init_from=source.workdir, init_leaves=[leaves])
    assert train.train(given) == "finished"
    ours, theirs = params_of(given), params_of(source)
    everything = moved(ours, jax.tree.map(lambda leaf: leaf + 1, ours))
    taken = everything - moved(ours, theirs)
    untouched = {path for path in taken if "bias" in path or "ln_" in path}  # equal from the start
    assert "wte" in taken
    assert ("trunk/fc/kernel" in taken) == (leaves == "*")
    if leaves == "wte":
        assert taken <= {"wte"} | untouched


@pytest.mark.slow
def test_frozen_given_embeddings_and_a_resume_that_needs_no_source(source, tmp_path, text_file):
    """Course lesson 07: embeddings copied and frozen."""
    copy = shutil.copytree(source.workdir, tmp_path / "copy")
    config = dataclasses.replace(
        with_optimizer(source, freeze=("wte",)), workdir=str(tmp_path / "run"), seed=1
    )
    config = dataclasses.replace(config, init_from=str(copy), init_leaves=["wte"])
    assert train.train(dataclasses.replace(config, steps=4)) == "finished"
    shutil.rmtree(copy)
    assert train.train(config) == "finished"
    assert same_bits(params_of(config)["wte"], params_of(source)["wte"])
    assert "trunk/fc/kernel" in moved(params_of(config), params_of(source))


def test_a_run_that_saved_nothing_yet_starts_from_the_given_weights_again(source, tmp_path):
    config = dataclasses.replace(source, workdir=str(tmp_path / "run"), init_from=source.workdir)
    (tmp_path / "run/checkpoints/0.orbax-checkpoint-tmp").mkdir(parents=True)
    programs, folder = Programs(config), RunFolder(config)
    assert folder.given_params(programs)
    (tmp_path / "run/checkpoints/4").mkdir()
    assert folder.given_params(programs) == {}


BAD = {
    "no such folder": ({"init_from": "{tmp}/none"}, "init_from='{tmp}/none': holds no checkpoints"),
    "nothing saved there": ({"init_from": "{tmp}/empty"}, "has saved no checkpoint yet"),
    "no such leaf": ({"init_leaves": "wte head"}, "init_leaves='wte head': 'head' is no parameter"),
    "another width": ({"model.d_model": 32}, "wte is float32[257, 16] there and float32[257, 32]"),
    "frozen nothing": ({"optimizer.freeze": "head"}, "optimizer.freeze='head'"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_line(name, source, tmp_path):
    fields, part = BAD[name]
    (tmp_path / "empty/checkpoints").mkdir(parents=True)
    fields = {"init_from": source.workdir} | fields
    args = [f"--{key}={str(value).format(tmp=tmp_path)}" for key, value in fields.items()]
    code, out, err = run(*flags(source), f"--workdir={tmp_path}/run", *args)
    assert (code, out) == (2, ""), err
    assert len(err.splitlines()) == 1
    assert part.format(tmp=tmp_path) in err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("key", ["--optimizer.freeze=wte", "--init_from={}"])
def test_the_reference_says_that_it_has_neither(source, key):
    code, _, err = run(*flags(source), key.format(source.workdir), module="torch_ref.train")
    assert code == 2
    assert err.startswith("error: init_from, optimizer.freeze:")


def test_a_checkpoint_that_is_older_than_a_field_is_read(source):
    stored = dataclasses.asdict(source)
    del stored["init_from"], stored["optimizer"]["freeze"], stored["model"]["tied_head"]
    assert checkpoint.config_changes(stored, source) == []
    changed = with_model(with_optimizer(source, freeze=("wte",)), dropout=0.2)
    assert len(checkpoint.config_changes(stored, changed)) == 2
