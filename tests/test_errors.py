"""Bad input through the real command line: one line, exit code 2, no traceback, no result."""

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from jax_model5 import train
from tests.tiny import ROOT, TEXT, flags, run, tiny

ONE_LINE = {
    # name: (arguments, what the line must say)
    "unknown key": ("--model.d_modl 64", ["model.d_modl='64'", "did you mean model.d_model?"]),
    "key without its group": ("--d_model 64", ["d_model='64'", "did you mean model.d_model?"]),
    "no such key at all": ("--frobnicate 1", ["frobnicate='1'", "--help"]),
    "a group for a key": ("--model 3", ["model='3'", "unknown key"]),
    "missing value": ("--steps", ["--steps", "value is missing"]),
    "missing value before a key": ("--steps --seed 1", ["--steps", "value is missing"]),
    "no dashes": ("steps 3", ["'steps'", "two dashes"]),
    "text for a whole number": ("--steps ten", ["steps='ten'", "a whole number"]),
    "fraction for a whole number": ("--batch_size 1.5", ["batch_size='1.5'", "a whole number"]),
    "text for a number": ("--model.dropout much", ["model.dropout='much'", "a number"]),
    "text for a switch": ("--model.scale_logits maybe", ["model.scale_logits", "True or False"]),
    "not one of the names": ("--objective last", ["objective='last'", "final_token"]),
    "unknown dtype": ("--model.dtype float16", ["model.dtype='float16'", "bfloat16"]),
    "no steps": ("--steps 0", ["steps=0", "at least 1"]),
    "no rows": ("--batch_size 0", ["batch_size=0", "at least 1"]),
    "heads that do not divide": ("--model.n_heads 3", ["model.n_heads=3", "d_model=16"]),
    "dropout of 1": ("--model.dropout 1.0", ["model.dropout=1.0", "[0, 1)"]),
    "dropout below 0": ("--model.dropout=-0.1", ["model.dropout=-0.1", "[0, 1)"]),
    "unknown dropout site": (
        "--model.dropout_sites everywhere",
        ["model.dropout_sites='everywhere'", "attention_output"],
    ),
    "no layers": ("--model.n_layers 0", ["model.n_layers=0", "at least 1"]),
    "unknown init": ("--model.init orthogonal", ["model.init='orthogonal'", "xavier"]),
    "init without std": ("--model.init normal:", ["model.init='normal:'", "normal:0.02"]),
    "last_k beyond L": ("--last_k 17", ["last_k=17", "seq_len=16"]),
    "accumulate does not divide": ("--accumulate 3", ["accumulate=3", "batch_size=4"]),
    "learning rate not a number": ("--optimizer.learning_rate nan", ["learning_rate=nan"]),
    "b2 of 1": ("--optimizer.b2 1", ["optimizer.b2=1", "[0, 1)"]),
    "warm-up beyond the run": (
        "--optimizer.warmup_steps 13",
        ["optimizer.warmup_steps=13", "at most steps=12"],
    ),
    "two words for one value": ("--objective final_token all_tokens", ["'all_tokens'", "dashes"]),
    "unknown separator": ("--data.separator newline", ["data.separator='newline'", "none"]),
    "a base of its own": ("--config {tmp}/own_base.yaml", ["base=", "its own base"]),
    "a base that is not there": ("--config {tmp}/no_base.yaml", ["none.yaml", "No such file"]),
    "a base without a name": ("--config {tmp}/list_base.yaml", ["base in", "name a YAML file"]),
    "a list for one value": ("--config {tmp}/list_value.yaml", ["steps in", "[1, 2]"]),
    "a null in a list": ("--config {tmp}/null_word.yaml", ["optimizer.freeze in", "None"]),
    "negative seed": ("--seed -1", ["seed=-1"]),
    "test fraction": ("--data.test_fraction 1", ["data.test_fraction=1", "between 0 and 1"]),
    "seed of 33 bits": (f"--seed {2**32}", ["seed=4294967296"]),
    "source with a name too long": (
        "--data.source " + "x" * 300 + ".txt",
        ["data.source=", "long"],
    ),
    "no repository of the hub": ("--data.source hf:json", ["data.source='hf:json'", "OWNER/NAME"]),
    "a date in a file": ("--config {tmp}/date.yaml", ["config=", "YAML"]),
    "half a coordinator": ("", ["JAX_COORDINATOR_ADDRESS", "set all three"]),
    "no config file": ("--config {tmp}/none.yaml", ["config=", "none.yaml", "No such file"]),
    "config is no YAML": ("--config {tmp}/broken.yaml", ["config=", "YAML"]),
    "config runs no code": ("--config {tmp}/code.yaml", ["config=", "YAML"]),
    "config is a list": ("--config {tmp}/list.yaml", ["config=", "key: value"]),
    "unknown key in a file": ("--config {tmp}/unknown.yaml", ["optimizer.lr", "unknown key"]),
    "null in a file": ("--config {tmp}/null.yaml", ["steps", "None"]),
    "no such source": (
        "--data.source {tmp}/none.txt",
        ["data.source=", "No such file", "use pydocs"],
    ),
    "unknown kind of file": ("--data.source {tmp}/text.pdf", ["data.source=", ".jsonl"]),
    "empty file": ("--data.source {tmp}/empty.txt", ["data.source=", "holds no text"]),
    "folder without text": ("--data.source {tmp}/folder", ["data.source=", "holds no file"]),
    "not UTF-8": ("--data.source {tmp}/latin1.txt", ["data.source=", "byte 3", "UTF-8"]),
    "missing column": (
        "--data.source {tmp}/rows.jsonl --data.text_field body",
        ["data.text_field='body'", "name one of id, text"],
    ),
    "a column without text": (
        "--data.source {tmp}/rows.jsonl --data.text_field id",
        ["data.text_field='id'", "line 1", "no text"],
    ),
    "broken rows": ("--data.source {tmp}/broken.jsonl", ["broken.jsonl", "line 2", "is no JSON"]),
    "broken parquet": ("--data.source {tmp}/broken.parquet", ["not readable as .parquet"]),
    "text too short": ("--data.source {tmp}/short.txt", ["data.source=", "window of 17"]),
    "test split without a window": (
        "--data.test_fraction 0.0001",
        ["data.source=", "test split", "window of 17"],
    ),
    "token ids beyond V": ("--model.vocab_size 100", ["model.vocab_size=100", "257"]),
    "no network": ("--data.source fineweb", ["data.source='fineweb'", "network", "pydocs"]),
    "workdir in a file": ("--workdir {tmp}/short.txt/run", ["workdir=", "Not a directory"]),
    "cache in a file": (
        "--data.cache_dir {tmp}/short.txt/cache",
        ["data.cache_dir=", "Not a directory"],
    ),
    "more devices than there are": ("--mesh.fsdp 2", ["mesh.fsdp=2", "there are 1"]),
    "no such backend": ("", ["no device", "JAX_PLATFORMS"]),
    "batch does not split": ("", ["batch_size=4", "8 devices", "multiple of 8"]),
}
ENVIRONMENTS = {
    "no network": {"HF_HUB_OFFLINE": "1"},
    "no such backend": {"JAX_PLATFORMS": "quantum"},
    "half a coordinator": {"JAX_COORDINATOR_ADDRESS": "127.0.0.1:1"},
    "batch does not split": {"XLA_FLAGS": "--xla_force_host_platform_device_count=8"},
}


def write_inputs(folder: Path) -> None:
    texts = {
        "broken.yaml": "steps: [1\n",
        "code.yaml": "steps: !!python/object/apply:os.system ['true']\n",
        "date.yaml": "workdir: 2024-02-30\n",
        "list.yaml": "- steps\n",
        "unknown.yaml": "optimizer:\n  lr: 0.1\n",
        "null.yaml": "steps:\n",
        "own_base.yaml": "base: own_base.yaml\n",
        "no_base.yaml": "base: none.yaml\n",
        "list_base.yaml": "base: [a.yaml]\n",
        "list_value.yaml": "steps: [1, 2]\n",
        "null_word.yaml": "optimizer: {freeze: [wte, null]}\n",
        "text.pdf": TEXT,
        "empty.txt": "",
        "short.txt": "short",
        "rows.jsonl": json.dumps({"id": 1, "text": "some text"}) + "\n",
        "broken.jsonl": '{"text": "a"}\n{"text": \n',
        "broken.parquet": "PAR1 and then nothing",
    }
    for name, text in texts.items():
        (folder / name).write_text(text)
    (folder / "latin1.txt").write_bytes("nai\u00efve".encode("latin-1"))
    (folder / "folder").mkdir()


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs")
    write_inputs(folder)
    return folder


@pytest.fixture
def main_here(monkeypatch, capsys):
    """The command line in this process, which saves its imports: (exit code, output, errors)."""

    def main_here(*args):
        monkeypatch.setattr(sys, "argv", ["train", *args])
        with pytest.raises(SystemExit) as stop:
            train.main()
        return stop.value.code, *capsys.readouterr()

    return main_here


@pytest.mark.parametrize("name", ONE_LINE)
def test_bad_input_ends_with_one_line(name, inputs, tmp_path, text_file, main_here):
    more, parts = ONE_LINE[name]
    args = [*flags(tiny(tmp_path, text_file)), *more.format(tmp=inputs).split()]
    if name in ENVIRONMENTS:
        code, out, err = run(*args, env=os.environ | ENVIRONMENTS[name])
    else:
        code, out, err = main_here(*args)
    assert code == 2, err
    lines = [line for line in err.splitlines() if not line.startswith("tokenized ")]
    assert len(lines) == 1, err
    assert lines[0].startswith("error: ")
    assert len(lines[0]) < 500
    for part in parts:
        assert part in lines[0], lines[0]
    assert out == ""
    assert {path.name for path in tmp_path.iterdir()} <= {"cache"}, "a result was written"
    assert not list(tmp_path.glob("cache/.*.building")), "half a corpus was left"


@pytest.mark.slow
def test_the_reference_says_the_same():
    for args in ("--model.d_modl 64", "--data.source none.txt"):
        ours, theirs = (
            run(*args.split(), module=f"{m}.train") for m in ("jax_model5", "torch_ref")
        )
        assert ours == theirs
        assert ours[0] == 2


WITHOUT_TORCH = """
import importlib.util, runpy, sys
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name == "torch" else find(name, *rest)
runpy.run_module(sys.argv.pop(1), run_name="__main__")
"""


@pytest.mark.parametrize(
    "command", ["parity_tests", "torch_ref.train", "jax_model5.bench --peer course"]
)
def test_what_needs_pytorch_says_so(command):
    """README's first command installs none."""
    command = [sys.executable, "-c", WITHOUT_TORCH, *command.split()]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ")
    assert line.endswith("needs torch; pip install -e '.[test]'")


STREAMS = {
    # how the streams are: (exit code, what standard error says)
    ">&-": (0, "tokenized "),
    "2>/dev/full": (0, ""),
    "> /dev/full": (0, "tokenized "),
}


@pytest.mark.slow
@pytest.mark.parametrize("how", STREAMS)
def test_a_run_without_a_reader_goes_on(how, tmp_path, text_file):
    """Also one that has to tokenize first: its words are no fault of the cache's disk."""
    args = shlex.join([sys.executable, "-m", "jax_model5.train", *flags(tiny(tmp_path, text_file))])
    shell = ["bash", "-c", f"{args} {how}"]
    done = subprocess.run(shell, cwd=ROOT, capture_output=True, text=True)
    code, said = STREAMS[how]
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    assert done.stderr.startswith(said)
    assert (tmp_path / "run/samples.txt").exists()


def test_bad_input_without_a_reader_keeps_its_exit_code(tmp_path, text_file):
    args = [*flags(tiny(tmp_path, text_file)), "--steps=0"]
    unread = ["bash", "-c", 'exec "$@" 2>/dev/full', "--"]
    assert run(*args, prefix=unread)[0] == 2


# As on a full disk, a write fails: no file may grow beyond 20 kB.
FULL_DISK = ["bash", "-c", 'ulimit -f 20; exec "$@"', "--"]


@pytest.mark.parametrize("kilobytes", [800_000, 1_600_000, 2_500_000])
def test_an_address_space_too_small_is_one_line(tmp_path, text_file, kilobytes):
    small = ["bash", "-c", f'ulimit -v {kilobytes}; exec "$@"', "--"]
    code, out, err = run(*flags(tiny(tmp_path, text_file)), prefix=small)
    assert (code, out) == (2, "")
    assert err.startswith(f"error: ulimit -v={kilobytes}: the address space is too small")
    assert len(err.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_while_tokenizing(tmp_path, text_file):
    code, _, err = run(*flags(tiny(tmp_path, text_file)), prefix=FULL_DISK)
    assert code == 2
    assert err.startswith("error: data.cache_dir=")
    assert "File too large" in err
    assert len(err.splitlines()) == 1
    assert list((tmp_path / "cache").glob("*text*")) == []
    assert list((tmp_path / "cache").glob(".*.building")) == []


@pytest.mark.slow
def test_a_full_disk_while_saving_keeps_what_was_saved(tmp_path, text_file):
    config = tiny(tmp_path, text_file, steps=8)
    assert train.train(config) == "finished"
    before = sorted(Path(config.workdir, "checkpoints").iterdir())
    longer = [*flags(config), "--steps=16"]
    code, _, err = run(*longer, prefix=FULL_DISK)
    assert code == 2
    line = err.strip().splitlines()[-1]
    assert line.startswith("error: workdir=")
    assert "Traceback" not in err
    assert sorted(Path(config.workdir, "checkpoints").glob("[0-9]")) == before
    assert run(*longer)[0] == 0
