"""The launchers of docs/clusters, real ones: preempted, cut short, killed, they lose nothing."""

import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
import yaml

from jax_model5 import processes, record
from jax_model5.config import parse
from tests import slurm
from tests.test_resume import numbers
from tests.tiny import HEED_SIGNALS, ROOT, flags, free_port, run, tiny

CLUSTERS = ROOT / "docs" / "clusters"
RUN = {"steps": 800, "checkpoint_every": 50, "eval_every": 50, "batch_size": 8}


def wait_for(condition, seconds=300):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def n_records(config) -> int:
    return len(record.read(Path(config.workdir) / "metrics.jsonl"))


def tasks(config) -> list[int]:
    """The processes that train this run, not their launchers."""
    pattern = rf"^[^ ]*python.* -m jax_model5.train.*{config.workdir}"
    found = subprocess.run(["pgrep", "-f", pattern], capture_output=True)
    return [int(pid) for pid in found.stdout.split()]


def differences(found: list[str], expected: list[str]) -> list[float]:
    """Relative ones of every training loss."""
    loss = re.compile(r'"kind": "train".*"loss": ([\d.]+)')
    pairs = zip(found, expected, strict=True)
    matches = [(loss.search(a), loss.search(b)) for a, b in pairs]
    return [abs(float(a[1]) / float(b[1]) - 1) for a, b in matches if a and b]


def end_of(process: subprocess.Popen) -> tuple[int, str]:
    out, err = process.communicate(timeout=300)
    return process.returncode, out + err


# ---- Slurm --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def cluster():
    """Its sockets have short paths only under /tmp."""
    with tempfile.TemporaryDirectory(dir="/tmp") as folder, slurm.one_node(Path(folder)) as env:
        yield env


@pytest.fixture(scope="module")
def never_stopped(cluster, tmp_path_factory, text_file):
    """The numbers of the run under srun, from its beginning to its end."""
    config = tiny(tmp_path_factory.mktemp("srun"), text_file, **RUN)
    command = ["srun", "--ntasks=2", sys.executable, "-m", "jax_model5.train", *flags(config)]
    done = subprocess.run(command, env=cluster, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "2 x cpu" in done.stdout
    return numbers(Path(config.workdir))


class Job:
    """docs/clusters/slurm.sh, submitted as two tasks."""

    def __init__(self, env, config, folder: Path):
        self._env, self.log = env | {"PYTHON": sys.executable}, folder / "model5.log"
        options = ["--ntasks-per-node=2", f"--chdir={folder}", f"--output={self.log}"]
        script = str(CLUSTERS / "slurm.sh")
        self.number = self._do("sbatch", "--parsable", *options, script, *flags(config)).strip()

    def _do(self, *command: str) -> str:
        done = subprocess.run(command, env=self._env, capture_output=True, text=True)
        assert done.returncode == 0, (command, done.stderr)
        return done.stdout

    def cancel(self, *options: str) -> None:
        self._do("scancel", *options, self.number)

    @property
    def about(self) -> dict[str, str]:
        return slurm.job(self._env, self.number)

    def is_started_again(self, n_times: int) -> bool:
        about = self.about
        assert about["JobState"] in ("RUNNING", "COMPLETING", "PENDING"), self.log.read_text()
        return about["JobState"] == "RUNNING" and about["Restarts"] == str(n_times)

    def end(self) -> dict[str, str]:
        wait_for(lambda: self.about["JobState"] in ("COMPLETED", "FAILED", "CANCELLED"))
        return self.about


def preempt(job: Job, _: object) -> None:
    job.cancel("--signal=TERM")


def reach_the_time_limit(job: Job, _: object) -> None:
    job.cancel("--batch", "--signal=USR1")


def lose_a_task(job: Job, config) -> None:
    os.kill(tasks(config)[-1], signal.SIGKILL)


STOPS = {"SIGTERM: saved step": preempt, "saved step": reach_the_time_limit, "is gone": lose_a_task}


@pytest.mark.launchers
@pytest.mark.parametrize("line", STOPS)
def test_slurm_queues_it_again_and_no_number_changes(
    cluster, tmp_path, text_file, never_stopped, line
):
    config = tiny(tmp_path, text_file, **RUN)
    job = Job(cluster, config, tmp_path)
    for n_stops in (1, 2):
        wait_for(lambda n=n_stops: n_records(config) > 200 * n)
        STOPS[line](job, config)
        wait_for(lambda n=n_stops: job.is_started_again(n))
    about = job.end()
    assert (about["JobState"], about["Restarts"]) == ("COMPLETED", "2"), job.log.read_text()
    assert job.log.read_text().count(line) == 2
    assert numbers(Path(config.workdir)) == never_stopped


@pytest.mark.launchers
def test_two_tasks_of_srun_compute_what_two_devices_do(tmp_path, text_file, never_stopped):
    config = tiny(tmp_path, text_file, **RUN)
    two = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=2"
    code, _, err = run(*flags(config), env=os.environ | {"XLA_FLAGS": two})
    assert code == 0, err
    found = differences(numbers(Path(config.workdir)), never_stopped)
    assert len(found) == RUN["steps"]
    assert max(found) <= 3e-7  # 0.0: Gloo adds two numbers as one process does


@pytest.mark.launchers
def test_a_job_that_is_cancelled_stays_so(cluster, tmp_path, text_file):
    config = tiny(tmp_path, text_file, **RUN | {"steps": 1_000_000})
    job = Job(cluster, config, tmp_path)
    wait_for(lambda: n_records(config) > 200)
    job.cancel()
    about = job.end()
    assert (about["JobState"], about["Restarts"]) == ("CANCELLED", "0")
    assert "SIGTERM: saved step" in job.log.read_text()
    wait_for(lambda: not tasks(config))


@pytest.mark.launchers
def test_bad_input_is_not_tried_again(cluster, tmp_path, text_file):
    job = Job(cluster, tiny(tmp_path, tmp_path / "no such text", **RUN), tmp_path)
    about = job.end()
    assert (about["JobState"], about["ExitCode"], about["Restarts"]) == ("FAILED", "2:0", "0")


# ---- Open MPI -----------------------------------------------------------------------------------


def mpi(config, folder: Path) -> subprocess.Popen:
    """docs/clusters/openmpi.sh with two processes on this host."""
    hosts = folder / "hosts"
    hosts.write_text("localhost slots=2\n")
    options = {"PYTHON": sys.executable, "PER_HOST": "2", "MPI_OPTIONS": "--allow-run-as-root"}
    options["RETRY_SECONDS"] = "1"
    return subprocess.Popen(
        [*HEED_SIGNALS, CLUSTERS / "openmpi.sh", hosts, *flags(config)],
        env=os.environ | options,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.launchers
def test_mpirun_is_asked_to_stop_and_goes_on(tmp_path, text_file, never_stopped):
    config = tiny(tmp_path, text_file, **RUN)
    first = mpi(config, tmp_path)
    wait_for(lambda: n_records(config) > 200)
    first.terminate()
    code, words = end_of(first)
    assert code == 0, words
    assert "SIGTERM: saved step" in words
    assert not tasks(config)
    code, words = end_of(mpi(config, tmp_path))
    assert code == 0, words
    assert numbers(Path(config.workdir)) == never_stopped


@pytest.mark.launchers
def test_mpirun_loses_a_process_and_starts_all_again(tmp_path, text_file, never_stopped):
    config = tiny(tmp_path, text_file, **RUN)
    run = mpi(config, tmp_path)
    for n_stops in (1, 2):
        wait_for(lambda n=n_stops: n_records(config) > 200 * n)
        os.kill(tasks(config)[-1], signal.SIGKILL)
    code, words = end_of(run)
    assert code == 0, words
    assert words.count("resuming ") == 2
    assert numbers(Path(config.workdir)) == never_stopped


# ---- by hand, and what no machine here can start ------------------------------------------------


@pytest.mark.slow
def test_by_hand_each_host_is_one_process_of_the_run(tmp_path, text_file):
    ssh = tmp_path / "ssh"
    ssh.write_text('#!/bin/sh\necho $1 >> $HOSTS_SEEN; exec sh -c "$2"\n')
    ssh.chmod(0o755)
    config = tiny(tmp_path / "with a space", text_file)
    env = os.environ | {
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "HOSTS_SEEN": str(tmp_path / "seen"),
        "PORT": str(free_port()),
        "PYTHON": sys.executable,
    }
    command = [CLUSTERS / "by_hand.sh", "localhost other", *flags(config)]
    done = subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "2 x cpu" in done.stdout
    assert sorted((tmp_path / "seen").read_text().split()) == ["localhost", "other"]
    assert len(numbers(Path(config.workdir))) > config.steps


def test_the_job_set_names_what_a_process_reads():
    (host,) = yaml.safe_load((CLUSTERS / "jobset.yaml").read_text())["spec"]["replicatedJobs"]
    job = host["template"]["spec"]
    (container,) = job["template"]["spec"]["containers"]
    env = {variable["name"]: variable.get("value") for variable in container["env"]}
    assert set(env) == set(processes._VARIABLES)
    assert env["JAX_NUM_PROCESSES"] == str(job["parallelism"]) == str(job["completions"])
    assert container["command"] == ["python", "-m", "jax_model5.train"]
    parse(container["args"], "jax_model5.train")


@pytest.mark.parametrize("script", sorted(CLUSTERS.glob("*.sh")), ids=lambda path: path.name)
def test_a_script_can_be_run_as_it_is(script):
    assert os.access(script, os.X_OK)
    subprocess.run(["bash", "-n", script], check=True)
