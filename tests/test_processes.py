"""Several processes as one run: they join, agree, and when one is gone, all end with one line."""

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from jax_model5 import processes, record
from tests.tiny import HEED_SIGNALS, ROOT, flags, free_port, run, start, tiny

SHORT_WAIT = """
import runpy, sys
from jax_model5 import processes
processes.JOIN_SECONDS = 15
runpy.run_module("jax_model5.train", run_name="__main__")
"""
GONE = "so this one ends too; start all of them again: they go on from the last checkpoint"


def launch(config, indices, n, *more, address=None, code=None, env=()):
    """The processes `indices` of n, each a dict of its own flags where `more` has them."""
    address = address or f"127.0.0.1:{free_port()}"
    names = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
    prefix = [sys.executable, "-c", code] if code else [sys.executable, "-m", "jax_model5.train"]
    return [
        subprocess.Popen(
            [*HEED_SIGNALS, *prefix, *flags(config), *(more[index] if more else ())],
            env=os.environ
            | dict(zip(names, (address, str(n), str(index)), strict=True))
            | dict(env),
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for index in indices
    ]


def ends(processes, seconds=300) -> list[tuple[int, str]]:
    """(exit code, the lines of standard error that are no progress) of each."""
    results = []
    for process in processes:
        _, err = process.communicate(timeout=seconds)
        quiet = ("tokenized ", "waiting for the process that tokenizes", "step ")
        lines = [line for line in err.splitlines() if not line.startswith(quiet)]
        results.append((process.returncode, "\n".join(lines)))
    return results


def wait_for_steps(config, processes, n: int) -> None:
    log, deadline = Path(config.workdir, "metrics.jsonl"), time.monotonic() + 120
    while len(record.read(log)) < n:
        assert time.monotonic() < deadline
        assert all(process.poll() is None for process in processes), ends(processes)
        time.sleep(0.05)


# ---- agreeing -----------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("what", ["a setting", "the text", "the folder"])
def test_processes_that_differ_are_refused_with_the_name(tmp_path, text_file, what):
    config = tiny(tmp_path, text_file)
    other = tmp_path / "other.txt"
    other.write_text(text_file.read_text().replace("line", "lime"))
    changed, name = {
        "a setting": ("--optimizer.learning_rate=0.5", "optimizer.learning_rate=0.001 here"),
        "the text": (f"--data.source={other}", "the tokens of data.source="),
        "the folder": (f"--workdir={tmp_path}/elsewhere", "workdir="),
    }[what]
    first, second = ends(launch(config, range(2), 2, (), (changed,)))
    for code, line in (first, second):
        assert code == 2, line
        assert "\n" not in line
        assert "processes [1] have another than process 0" in line
        assert "start all with the same settings and text" in line
    assert name in first[1]
    assert not Path(config.workdir).exists()
    assert not (tmp_path / "elsewhere").exists()


@pytest.mark.slow
def test_a_cache_and_the_place_of_the_text_may_be_each_ones_own(tmp_path, text_file):
    config = tiny(tmp_path, text_file, steps=2)
    copy = tmp_path / "copy.txt"
    copy.write_text(text_file.read_text())
    own = (f"--data.source={copy}", f"--data.cache_dir={tmp_path}/own")
    assert ends(launch(config, range(2), 2, (), own)) == [(0, ""), (0, "")]


@pytest.mark.slow
def test_a_mesh_that_leaves_a_process_out_is_refused(tmp_path, text_file):
    config = tiny(tmp_path, text_file)
    for code, line in ends(launch(config, range(2), 2, *[("--mesh.data=1",)] * 2)):
        assert code == 2
        assert line.startswith(
            "error: mesh.data=1: a mesh of 1 x 1 devices leaves out processes [1]"
        )
        assert "\n" not in line, "each says it itself, or as the other's"


# ---- one that is gone ---------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("lost", [0, 2])
def test_when_one_of_four_is_killed_the_others_end_with_one_line(tmp_path, text_file, lost):
    config = tiny(tmp_path, text_file, steps=100_000, eval_every=100_000, batch_size=8)
    processes = launch(config, range(4), 4)
    wait_for_steps(config, processes, 20)
    processes[lost].send_signal(signal.SIGKILL)
    killed = time.monotonic()
    for index, (code, line) in enumerate(ends(processes)):
        expected = (
            (-signal.SIGKILL, "")
            if index == lost
            else (4, f"error: process {lost} of 4 is gone, {GONE}")
        )
        assert (code, line) == expected
    assert time.monotonic() - killed < 60  # stated in docs/reliability.md


@pytest.mark.parametrize("broken", [0, 1])
def test_bad_input_of_one_process_ends_the_others(tmp_path, text_file, broken):
    """It cannot read its text, and the others would wait for it for ever; 2 hears of 1 by 0."""
    config = tiny(tmp_path, text_file)
    not_text = tmp_path / "broken.txt"
    not_text.write_bytes(b"\xff")
    own = [(), (), ()]
    own[broken] = (f"--data.source={not_text}",)
    found = ends(launch(config, range(3), 3, *own))
    code, line = found.pop(broken)
    assert code == 2
    assert "is not UTF-8" in line
    ended = (2, f"{line} (process {broken} of 3)")
    assert found == [ended, ended], "a launcher would try again"


def test_what_is_said_with_the_first_word_is_heard(monkeypatch):
    """One fails just after joining: its line lies in the socket behind its password."""
    said, codes = [], []

    def end(code):
        codes.append(code)
        raise SystemExit

    monkeypatch.setattr(threading, "excepthook", lambda args: None)
    monkeypatch.setattr(processes, "write_line", said.append)
    monkeypatch.setattr(processes, "_connections", {})
    monkeypatch.setattr(processes._watch, "is_on", True)
    monkeypatch.setattr(processes.os, "_exit", end)
    monkeypatch.setattr(processes.jax, "process_count", lambda: 2)
    with socket.create_server(("127.0.0.1", 0)) as server:
        with socket.create_connection(server.getsockname()) as client:
            client.sendall(b"secret\n1\n1 error: bad text\n")
        processes._serve(server, b"secret\n")
        deadline = time.monotonic() + 60
        while not codes and time.monotonic() < deadline:
            time.sleep(0.01)
    assert (said, codes) == (["error: bad text (process 1 of 2)"], [2])


JOINS = {
    # what is wrong: (indices that start, number, address, exit codes, what each line says)
    "one never starts": ([0], 2, None, "not all processes came within 15 s"),
    "the first never starts": ([1], 2, None, "not all processes came within 15 s"),
    "no such host": ([0, 1], 2, "no.such.host.example:1234", "not all processes came within 15 s"),
    "no port": ([0], 2, "127.0.0.1", "write it as HOST:PORT"),
}


@pytest.mark.slow
@pytest.mark.parametrize("what", JOINS)
def test_processes_that_do_not_meet_end_with_one_line(tmp_path, text_file, what):
    indices, n, address, said = JOINS[what]
    config = tiny(tmp_path, text_file)
    for code, line in ends(launch(config, indices, n, address=address, code=SHORT_WAIT)):
        assert code == 2, line
        assert line.startswith("error: JAX_COORDINATOR_ADDRESS=")
        assert said in line
        assert "\n" not in line


@pytest.mark.slow
def test_a_taken_port_is_one_line(tmp_path, text_file):
    config = tiny(tmp_path, text_file)
    with socket.create_server(("", 0), family=socket.AF_INET6, dualstack_ipv6=True) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
        (code, line), _ = ends(launch(config, [0, 1], 2, address=address, code=SHORT_WAIT))
    assert code == 2
    assert "Address already in use; name a free port" in line


# ---- agreeing on damage and signals -------------------------------------------------------------

ONE_CANNOT_READ = """
import os, runpy
from jax_model5 import checkpoint
read = checkpoint._read_state
def damaged(manager, step, *rest):
    is_damaged = step == 12 and os.environ["JAX_PROCESS_ID"] == "1"
    if is_damaged and "WHEN" == "before":
        raise ValueError("this process cannot read it")
    tree = read(manager, step, *rest)
    if is_damaged:
        raise ValueError("this process cannot read it")
    return tree
checkpoint._read_state = damaged
runpy.run_module("jax_model5.train", run_name="__main__")
"""


@pytest.mark.slow
@pytest.mark.parametrize("when", ["before", "after"])
def test_damage_that_one_process_sees_is_damage_for_all(tmp_path, text_file, when):
    """It raises before it reads, or behind it: the others are not left in a barrier."""
    config = tiny(tmp_path, text_file)
    assert ends(launch(config, range(2), 2)) == [(0, ""), (0, "")]
    longer = [("--steps=14",)] * 2
    code = ONE_CANNOT_READ.replace("WHEN", when)
    (code, line), second = ends(launch(config, range(2), 2, *longer, code=code))
    assert code == 0, line
    assert "checkpoint 12 is damaged (another process cannot read it)" in line
    assert "going on from checkpoint 8" in line
    assert second[0] == 0, second
    assert {path.name for path in Path(config.workdir, "checkpoints").iterdir()} == {"12", "14"}


@pytest.mark.slow
def test_a_signal_that_another_process_got_is_named(tmp_path, text_file):
    config = tiny(tmp_path, text_file, steps=100_000, eval_every=100_000)
    processes = launch(config, range(2), 2)
    wait_for_steps(config, processes, 20)
    processes[1].send_signal(signal.SIGTERM)
    out, err = processes[0].communicate(timeout=60)
    assert processes[0].returncode == processes[1].wait(timeout=60) == 0, err
    step = int(re.search(r"SIGTERM: saved step (\d+)", out)[1])
    assert step % 10 == 0
    assert Path(config.workdir, "checkpoints", str(step)).is_dir()


# ---- launchers ----------------------------------------------------------------------------------


JOB = os.getpid() % 4096  # JAX makes the port of it


def slurm(index: int) -> dict[str, str]:
    """What srun gives each task of a step of two."""
    return {
        "SLURM_JOB_ID": str(JOB),
        "SLURM_STEP_NODELIST": "localhost",
        "SLURM_NTASKS": "2",
        "SLURM_STEP_NUM_NODES": "1",
        "SLURM_PROCID": str(index),
        "SLURM_LOCALID": str(index),
    }


def open_mpi(index: int) -> dict[str, str]:
    """What mpirun gives each of two."""
    return {
        "OMPI_MCA_orte_hnp_uri": f"{(JOB + 1) * 4096}.0;tcp://127.0.0.1:1",
        "OMPI_COMM_WORLD_SIZE": "2",
        "OMPI_COMM_WORLD_RANK": str(index),
        "OMPI_COMM_WORLD_LOCAL_RANK": str(index),
    }


@pytest.mark.slow
@pytest.mark.parametrize("launcher", [slurm, open_mpi])
def test_processes_of_a_launcher_join(tmp_path, text_file, launcher):
    config = tiny(tmp_path, text_file, steps=2)
    processes = [
        start(*flags(config), env=os.environ | launcher(index), prefix=()) for index in range(2)
    ]
    outs = [process.communicate(timeout=300) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outs
    assert "2 x cpu" in outs[0][0]
    assert "parameters" not in outs[1][0]


ALONE = {
    "a step of one task": {"SLURM_NTASKS": "1", "SLURM_STEP_NODELIST": "localhost"},
    "mpirun -n 1": {"OMPI_COMM_WORLD_SIZE": "1", "OMPI_MCA_orte_hnp_uri": "4096.0;tcp://[::1]:1"},
    "a batch script, which is no step": {"SLURM_JOB_ID": "1", "SLURM_NTASKS": "4"},
    "a plain pod": {"KUBERNETES_SERVICE_HOST": "10.0.0.1"},
}


@pytest.mark.parametrize("where", ALONE)
def test_a_launchers_only_process_joins_none(monkeypatch, where):
    joined = []
    for name, value in ALONE[where].items():
        monkeypatch.setenv(name, value)

    def initialize(**given):
        joined.append(given)
        raise ValueError("coordinator_address should be defined.")

    monkeypatch.setattr(processes.jax.distributed, "initialize", initialize)
    processes.join()
    assert len(joined) == where.startswith("a batch")


TASKS = {
    # what the launcher says of the node: the devices that JAX is told to take, if any
    "1": [],
    "1(x4)": [],
    "2": None,
    "8(x2),1": None,
    "12": None,
}


@pytest.mark.parametrize("tasks", TASKS)
def test_the_only_task_of_a_node_keeps_all_its_devices(monkeypatch, tasks):
    """JAX would give it the one of its number on the node."""
    monkeypatch.setenv("SLURM_NTASKS", "4")
    monkeypatch.setenv("SLURM_STEP_TASKS_PER_NODE", tasks)
    expected = {} if TASKS[tasks] is None else {"local_device_ids": TASKS[tasks]}
    assert processes._of_launcher() == expected


UNCAUGHT = """
import os, runpy
from jax_model5 import processes, record
write = record.Recorder.flush
def flush(self):
    if self._pending and self._pending[0] == 5 and os.environ["JAX_PROCESS_ID"] == "1":
        raise ZeroDivisionError("a bug")
    write(self)
record.Recorder.flush = flush
runpy.run_module("jax_model5.train", run_name="__main__")
"""


@pytest.mark.slow
def test_an_error_that_nobody_catches_ends_all(tmp_path, text_file):
    config = tiny(tmp_path, text_file)
    first, second = ends(launch(config, range(2), 2, code=UNCAUGHT))
    assert first == (4, f"error: process 1 of 2 is gone, {GONE}")
    assert second[0] == 1
    assert second[1].endswith("ZeroDivisionError: a bug")


def test_a_port_that_is_free_in_a_moment_is_waited_for(monkeypatch):
    """The service of a run that was killed holds it for some seconds more."""
    waits, server = [], socket.create_server(("", 0), family=socket.AF_INET6, dualstack_ipv6=True)

    def sleep(seconds):
        waits.append(seconds)
        if len(waits) == 2:
            server.close()

    monkeypatch.setattr(processes.time, "sleep", sleep)
    monkeypatch.setattr(processes.subprocess, "Popen", lambda *args, **how: None)
    processes._Service(f"[::]:{server.getsockname()[1]}", 2)
    assert waits == [1, 2]
    taken = socket.create_server(("", 0), family=socket.AF_INET6, dualstack_ipv6=True)
    with taken, pytest.raises(OSError, match="in use"):
        processes._Service(f"[::]:{taken.getsockname()[1]}", 2)
    assert sum(waits) > 5  # longer than the service stays


def test_a_service_that_ends_keeps_its_processes_and_takes_no_new_ones():
    """At once gone, it aborts those that are leaving; open, it takes those of the next run."""
    port = free_port()
    service = processes._Service(f"127.0.0.1:{port}", 2)

    def connect():
        return socket.create_connection(("127.0.0.1", port), 10)

    deadline = time.monotonic() + 60
    while True:
        try:
            member = connect()
            break
        except ConnectionRefusedError:
            assert time.monotonic() < deadline
            time.sleep(0.05)
    member.recv(1)  # the service's first words: it has taken it
    service.shutdown()
    with pytest.raises(ConnectionRefusedError):  # noqa: PT012
        while time.monotonic() < deadline:
            with contextlib.suppress(ConnectionResetError):  # it closed on one that was in line
                connect().close()
    assert service._process.poll() is None
    member.settimeout(0.1)
    with pytest.raises(TimeoutError):  # noqa: PT012
        while member.recv(4096):
            pass
    assert service._process.wait(timeout=60) == 0


@pytest.mark.slow
def test_the_variables_win_over_a_launcher(tmp_path, text_file):
    config = tiny(tmp_path, text_file, steps=2)
    wrong = slurm(0) | {"SLURM_NTASKS": "7"}
    assert ends(launch(config, range(2), 2, env=wrong)) == [(0, ""), (0, "")]
    assert run(*flags(config))[0] == 0  # and a batch script of Slurm, which is no step, is alone


DEVICES = """
import sys, time
import jax
from jax_model5 import processes
processes.join()
while not processes._connections:  # Python cannot end while JAX's C++ waits in a thread
    time.sleep(0.01)
print(jax.config.read("jax_cuda_visible_devices"), file=sys.stderr)
"""


@pytest.mark.slow
def test_processes_that_the_variables_name_keep_all_their_devices(tmp_path, text_file):
    """Else a launcher's number on the node would hide all devices but one."""
    config = tiny(tmp_path, text_file)
    ended = ends(launch(config, range(2), 2, env=slurm(0), code=DEVICES))
    assert ended == [(0, "all"), (0, "all")]
