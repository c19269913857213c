"""Generation: the cache changes no number, and tokens are drawn from the stated distribution."""

import dataclasses
import functools
import io
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_model5 import checkpoint, generate, model, step, tokenizer, train, trees
from jax_model5.checkpoint import read_params
from jax_model5.config import TrainConfig, config_of_run
from jax_model5.errors import UserError
from jax_model5.generate import Sampling
from tests.tiny import MODEL, ROOT, run, tiny, with_model

GREEDY = Sampling(greedy=True)
FLOAT64 = dataclasses.replace(MODEL, dtype="float64")
PROMPTS = [[1, 2, 3], [200], list(range(40, 52))]  # of three lengths; the window holds 16


@functools.cache
def params_of(config=MODEL):
    state = step.init_state(jax.random.key(0), config=TrainConfig(model=config))
    params = jax.tree.map(lambda leaf: leaf * 10, state.params)  # far from uniform
    if not config.tied_head:
        params["head"] = params["head"][::-1]
    return params


@pytest.fixture
def float64():
    with jax.enable_x64(True):
        yield


def sample(prompts, n_tokens, sampling, seed=0, config=MODEL, **fields):
    """The new tokens of each row, [B, N]."""
    key = jax.random.key(seed)
    params = params_of(config)
    tokens = generate.generate(
        params, prompts, key, config=config, sampling=sampling, n_tokens=n_tokens, **fields
    )
    return np.array(list(tokens)).T


def re_forward(prompts, n_tokens, config=MODEL):
    """Greedy tokens without a cache: each row alone, its last L tokens run forward again."""
    apply = jax.jit(functools.partial(model.Model5(config).apply, n_last=1, deterministic=True))
    rows = [list(prompt) for prompt in prompts]
    for row in rows:
        for _ in range(n_tokens):
            window = jnp.array([row[-config.seq_len :]])
            row.append(int(apply({"params": params_of(config)}, window)[0, 0].argmax()))
    return np.array([row[-n_tokens:] for row in rows])


VARIANTS = [FLOAT64, dataclasses.replace(FLOAT64, gelu="tanh", tied_head=False)]


def cached_error(shift=0, config=FLOAT64):
    """Distance of cached logits from those of one forward pass; `shift` misplaces the tokens."""
    extend = jax.jit(functools.partial(generate.extend, n_last=1, config=config))
    params, unstacked = params_of(config), generate.unstack(params_of(config), config)
    tokens = np.random.default_rng(0).integers(0, 257, (2, 16))
    apply = functools.partial(model.Model5(config).apply, n_last=16, deterministic=True)
    full = jax.jit(apply)({"params": params}, tokens)
    # Nine tokens at once, of which the second row's first two are padding; then one by one.
    pad, errors = np.array([0, 2]), []
    slots = np.stack([tokens[0], np.roll(tokens[1], 2)])
    cache = generate.empty_cache(config, 2, 19)
    for first, end in [(0, 9), *((i, i + 1) for i in range(9, 16))]:
        slot = first + shift * (first > 0)
        x, cache = extend(unstacked, cache, slots[:, first:end], slot, pad)
        logits = generate.logits(unstacked, x, config)
        errors.append(np.abs(logits - full[np.arange(2), end - 1 - pad]).max())
    return max(errors) / np.abs(full).max()


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("config", VARIANTS, ids=["erf, tied", "tanh, untied"])
def test_cached_logits_are_those_of_a_forward_pass(config):
    assert cached_error(config=config) < 1e-12
    assert cached_error(shift=-1, config=config) > 1e-3, "a misplaced key was not seen"


def test_matrices_are_cast_once_and_for_all_tokens():
    low = dataclasses.replace(MODEL, dtype="bfloat16")
    leaves = trees.leaves_of(generate.unstack(params_of(), low))
    blocks = [trees.leaves_of(block) for block in leaves.pop("blocks")]
    is_cast = {path: leaf.dtype == jnp.bfloat16 for path, leaf in (leaves | blocks[-1]).items()}
    assert {path for path, cast in is_cast.items() if cast} == {
        "head",
        *(f"{layer}/kernel" for layer in ("attn/qkv", "attn/proj", "fc", "out")),
    }
    assert cached_error(config=low) < 0.1  # measured 0.03 with the tests' XLA flags, 0 without
    assert cached_error(config=low, shift=-1) > 0.5


def test_a_cpu_reads_its_blocks_where_they_are_and_keeps_them_for_the_text():
    """A step that takes over the parameters in the middle of a text does not change it."""
    params = jax.tree.map(jnp.copy, params_of())
    unstacked, _ = generate.prepared(params, MODEL)
    stack = params["trunk"]["fc"]["kernel"]
    place = unstacked["blocks"][1]["fc"]["kernel"].unsafe_buffer_pointer()
    assert place == stack.unsafe_buffer_pointer() + stack.nbytes // len(stack)
    del unstacked
    how = {"config": MODEL, "sampling": GREEDY, "n_tokens": 12}
    expected = np.array(list(generate.generate(params, PROMPTS, jax.random.key(0), **how)))
    text = generate.generate(params, PROMPTS, jax.random.key(0), **how)
    first = next(text)
    step = jax.jit(lambda params: jax.tree.map(lambda leaf: 0 * leaf, params), donate_argnums=0)
    jax.block_until_ready(step(params))
    np.testing.assert_array_equal(np.array([first, *text]), expected)


def test_a_cpu_writes_the_text_of_a_bfloat16_model_in_float32(monkeypatch):
    low = dataclasses.replace(MODEL, dtype="bfloat16")
    assert generate.prepared(params_of(), low)[1].dtype == "float32"
    assert np.array_equal(sample(PROMPTS, 12, GREEDY, config=low), sample(PROMPTS, 12, GREEDY))
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    unstacked, config = generate.prepared(params_of(), low)
    assert config.dtype == unstacked["head"].dtype == "bfloat16"


def test_a_text_is_the_same_token_by_token_and_many_at_once(monkeypatch):
    """Ten tokens in a window of 16 after a prompt of 3: a full call, one of a rest of two."""
    texts = []
    for at_once in (generate.AT_ONCE, 1):
        monkeypatch.setattr(generate, "AT_ONCE", at_once)
        generate.decode.clear_cache()
        texts.append([sample(PROMPTS[:n], 11, Sampling(0.8)) for n in (1, 2)])
    generate.decode.clear_cache()
    for many, one_by_one in zip(*texts, strict=True):
        assert np.array_equal(many, one_by_one)


def test_a_text_is_drawn_with_rbg_too():
    key = jax.random.key(0, impl="rbg")
    draws = generate.draw(key, jnp.zeros((4000, 7)), Sampling())
    assert np.abs(np.bincount(draws, minlength=7) / 4000 - 1 / 7).max() < 0.03  # 5 deviations


@pytest.mark.usefixtures("float64")
def test_a_batch_of_lengths_past_the_window_equals_re_forward():
    """30 new tokens: the longest row fills its window of 16 after 4, the others later."""
    found = sample(PROMPTS, 30, GREEDY, config=FLOAT64)
    assert np.array_equal(found, re_forward(PROMPTS, 30, FLOAT64))
    assert len(set(found[0])) > 5, "too monotonous to tell"


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("longest", [33, 70])
def test_a_window_wider_than_its_prompts_equals_re_forward(longest):
    """33 tokens are run as 48 in a cache of 128 slots, 70 as 80; both pass the window of 100."""
    wide = dataclasses.replace(FLOAT64, seq_len=100)
    prompts = [list(range(longest)), [5, 6, 7], [200]]
    n_tokens = 110 - longest
    found = sample(prompts, n_tokens, GREEDY, config=wide)
    assert np.array_equal(found, re_forward(prompts, n_tokens, wide))


def test_one_decode_step_serves_all_tokens():
    generate.decode.clear_cache()
    sample(PROMPTS, 4, GREEDY)
    sample([[7, 8], [9], [3]], 10, GREEDY)
    assert generate.decode._cache_size() == 1


def test_a_prompt_gets_the_same_text_alone_and_in_a_batch():
    together = sample(PROMPTS, 12, Sampling(0.8))
    alone = sample(PROMPTS[:1], 12, Sampling(0.8))
    assert np.array_equal(together[0], alone[0])
    assert not np.array_equal(together, sample(PROMPTS, 12, Sampling(0.8), seed=1))


def test_a_row_ends_at_the_end_token_and_all_of_them_end_the_run():
    whole = sample(PROMPTS, 12, GREEDY)
    end = int(whole[0, 3])
    found = sample(PROMPTS, 12, GREEDY, end=end)
    first = [list(row).index(end) if end in row else 12 for row in whole]
    for row, before, k in zip(found, whole, first, strict=True):
        assert np.array_equal(row[:k], before[:k])
        assert (row[k:] == end).all()
    alone = sample(PROMPTS[:1], 12, GREEDY, end=end)
    assert alone.shape == (1, first[0] + 1)


def exact(logits, temperature=1.0, top_k=0, top_p=1.0):
    """The stated distribution, token by token, in plain Python."""
    p = np.exp(logits / temperature - (logits / temperature).max())
    order = sorted(range(len(p)), key=lambda i: -p[i])
    order = order[: top_k or None]
    total = sum(p[i] for i in order)
    kept, reached = [], 0.0
    for i in order:
        kept.append(i)
        reached += p[i] / total
        if reached >= top_p:
            break
    probabilities = np.zeros(len(p))
    probabilities[kept] = p[kept] / p[kept].sum()
    return probabilities


SAMPLINGS = [
    Sampling(),
    Sampling(0.7),
    Sampling(2.0, top_k=5),
    Sampling(1.5, top_p=0.6),
    Sampling(1.3, top_k=20, top_p=0.9),
    Sampling(top_p=1e-9),
    Sampling(top_k=1),
]


@pytest.mark.parametrize("sampling", SAMPLINGS, ids=str)
def test_draws_follow_the_exact_probabilities(sampling):
    rows = 20_000
    logits = np.random.default_rng(1).normal(0, 2, 40)
    expected = exact(logits, sampling.temperature, sampling.top_k, sampling.top_p)
    tiled = jnp.tile(jnp.asarray(logits, jnp.float32), (rows, 1))
    drawn = np.asarray(generate.draw(jax.random.key(0), tiled, sampling))
    observed = np.bincount(drawn, minlength=40) / rows
    assert not observed[expected == 0].any(), "an excluded token was drawn"
    bound = 5 * np.sqrt(expected * (1 - expected) / rows) + 1e-9
    assert (np.abs(observed - expected) <= bound).all()
    if sampling != SAMPLINGS[0]:
        assert (np.abs(observed - exact(logits)) > bound).any(), "the plain softmax would pass, too"


def test_the_first_token_is_drawn_from_the_models_own_softmax():
    rows = 4000
    prompt = list(range(10))
    logits = model.Model5(MODEL).apply(
        {"params": params_of()}, jnp.array([prompt]), n_last=1, deterministic=True
    )[0, 0]
    expected = exact(np.asarray(logits, float), 0.7)
    drawn = sample([prompt] * rows, 1, Sampling(0.7))[:, 0]
    observed = np.bincount(drawn, minlength=MODEL.vocab_size) / rows
    assert (np.abs(observed - expected) <= 5 * np.sqrt(expected / rows) + 1e-3).all()


# ---- the command --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def workdir(tmp_path_factory, text_file):
    folder = tmp_path_factory.mktemp("trained")
    config = with_model(tiny(folder, text_file, steps=30), d_model=32)
    assert train.train(config) == "finished"
    return config.workdir


@pytest.fixture
def command(monkeypatch, capsys):
    """The command line in this process: (exit code, output, errors)."""

    def command(*args):
        monkeypatch.setattr(sys, "argv", ["generate", *map(str, args)])
        try:
            generate.main()
            code = 0
        except SystemExit as stop:
            code = stop.code
        return code, *capsys.readouterr()

    return command


def test_the_command_writes_the_prompt_and_its_continuation(workdir):
    args = ("--workdir", workdir, "--prompt", "7 times", "--n_tokens", 20, "--greedy")
    code, out, err = run(*args, module="jax_model5.generate")
    assert code == 0, err
    assert out.startswith("7 times")
    assert len(out) > 20
    assert "tokens/s" in err


def test_a_batch_is_one_text_after_the_other(workdir, command):
    one = command("--workdir", workdir, "--prompt", "7 times", "--n_tokens", 20, "--seed", 3)
    both = command(
        *("--workdir", workdir, "--prompt", "7 times", "--prompt", "and that", "--n_tokens", 20),
        *("--seed", 3),
    )
    assert one[0] == both[0] == 0
    assert both[1].startswith(f"--- prompt 1\n{one[1]}--- prompt 2\nand that")


def test_a_character_of_many_tokens_is_written_whole(command, monkeypatch, workdir):
    tokens = [np.array([byte]) for byte in "é世".encode()]
    monkeypatch.setattr(generate, "generate", lambda *_, **__: iter(tokens))
    assert command("--workdir", workdir, "--prompt", "x")[1] == "xé世\n"


BAD = {
    "no workdir": (("--prompt", "a"), "--workdir"),
    "not a run": (("--workdir", "{tmp}", "--prompt", "a"), "holds no config.yaml"),
    "nothing saved": (("--workdir", "{tmp}/empty", "--prompt", "a"), "holds no checkpoints/"),
    "a prompt like an option": (("--prompt", "--x"), "is written --prompt=-x"),
    "no such file": (("--prompt_file", "{tmp}/none"), "none': No such file"),
    "not UTF-8": (("--prompt_file", "{tmp}/latin1"), "byte 2 is not UTF-8"),
    "long white space": (("--prompt", " " * 1_000_000), "1000000 tokens"),
    "prompt beyond the window": (("--workdir", "{run}", "--prompt", "a" * 17), "17 tokens"),
    "temperature 0": (("--temperature", "0"), "temperature=0: must be above 0"),
    "temperature below 0": (("--temperature", "-1"), "temperature=-1"),
    "temperature nan": (("--temperature", "nan"), "temperature=nan"),
    "top_p 0": (("--top_p", "0"), "top_p=0"),
    "top_p above 1": (("--top_p", "1.5"), "top_p=1.5"),
    "top_k below 0": (("--top_k", "-3"), "top_k=-3"),
    "top_k not a number": (("--top_k", "many"), "--top_k"),
    "no tokens": (("--n_tokens", "0"), "n_tokens=0"),
    "negative seed": (("--seed", "-1"), "seed=-1"),
    "unknown option": (("--beam", "3"), "--beam"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_line(name, command, workdir, tmp_path):
    args, part = BAD[name]
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty/config.yaml").write_text("seed: 1\n")
    (tmp_path / "latin1").write_bytes("naï".encode("latin-1") + b"ve")
    if "--workdir" not in args and name != "no workdir":
        args = ("--workdir", "{run}", "--prompt", "a", *args)
    code, out, err = command(*[arg.format(run=workdir, tmp=tmp_path) for arg in args])
    assert (code, out) == (2, "")
    assert len(err.splitlines()) == 1
    assert err.startswith("error: ")
    assert part in err


def test_a_prompt_from_a_file_or_standard_input(command, workdir, tmp_path, monkeypatch):
    (tmp_path / "prompt").write_bytes(b"7 times\r\n")
    rest = ("--workdir", workdir, "--n_tokens", 9, "--greedy")
    typed = command(*rest, "--prompt", "7 times")
    assert typed[0] == 0
    assert command(*rest, "--prompt_file", tmp_path / "prompt")[1] == typed[1]
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"7 times\n")))
    assert command(*rest, "--prompt_file", "-")[1] == typed[1]


def test_without_a_prompt_the_text_begins_after_an_end_of_text(command, workdir):
    rest = ("--workdir", workdir, "--n_tokens", 9, "--greedy")
    free = command(*rest)
    assert free[0] == 0
    assert command(*rest, "--prompt", "")[:2] == free[:2]
    config = config_of_run(workdir, "test")
    params = read_params(workdir, step.abstract_state(config).params)
    key, how = jax.random.key(0), {"config": config.model, "sampling": GREEDY, "n_tokens": 9}
    expected = np.concatenate(list(generate.generate(params, [[256]], key, **how)))
    assert free[1] == bytes(expected.tolist()).decode(errors="replace") + "\n"


def test_weights_that_are_not_finite_are_named(command, workdir, monkeypatch):
    read = checkpoint._read_state

    def damaged(*args):
        tree = read(*args)
        tree["params"]["ln_f"]["bias"] = tree["params"]["ln_f"]["bias"] * np.nan
        return tree

    monkeypatch.setattr(checkpoint, "_read_state", damaged)
    monkeypatch.setattr(checkpoint, "_changed_bits", lambda *_: "")
    code, out, err = command("--workdir", workdir, "--prompt", "a")
    assert (code, out) == (2, "")
    assert "ln_f/bias hold NaN or infinity" in err


TERMINALS = {
    # how standard output is: (exit code, what standard error says)
    "| head -c 5": ([0, 141], ""),
    "> /dev/full": ([2], "error: standard output: No space left on device; make room"),
    ">&-": ([0], "first token after"),
    ">&- 2>&-": ([0], ""),
}


@pytest.mark.parametrize("how", TERMINALS)
def test_a_closed_or_full_terminal_is_no_traceback(how, workdir):
    command = f"{sys.executable} -m jax_model5.generate --workdir {workdir} --n_tokens 40 {how}"
    shell = ["bash", "-c", f"set -o pipefail; {command}"]
    done = subprocess.run(shell, cwd=ROOT, capture_output=True, text=True, errors="replace")
    codes, said = TERMINALS[how]
    assert done.returncode in codes, done.stderr
    assert "Traceback" not in done.stderr
    assert "Exception ignored" not in done.stderr
    assert len(done.stderr.splitlines()) <= 1
    assert said in done.stderr


def test_a_prompt_beyond_the_vocabulary_is_refused(workdir):
    config = TrainConfig(model=dataclasses.replace(MODEL, vocab_size=100))
    encoding = tokenizer.load("gpt2")
    with pytest.raises(UserError, match=r"beyond model\.vocab_size=100"):
        generate.encode_prompt("hello world", encoding, config)
