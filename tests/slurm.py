"""A real Slurm of one node, in a folder of its own: its daemons run until the test ends."""

import contextlib
import getpass
import os
import socket
import subprocess
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

from tests.tiny import free_port

_CONF = """
ClusterName=one
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller_port}
SlurmdPort={node_port}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
SlurmUser={user}
SlurmdUser={user}
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerParameters=sched_interval=1,batch_sched_delay=1
JobAcctGatherType=jobacct_gather/none
MpiDefault=none
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
NodeName={host} NodeAddr=127.0.0.1 CPUs=2
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE OverSubscribe=FORCE:4
"""


@contextlib.contextmanager
def one_node(folder: Path) -> Iterator[Mapping[str, str]]:
    """The environment in which `sbatch` and `srun` know it. The folder's path must be short."""
    key = folder / "munge.key"
    key.write_bytes(os.urandom(1024))
    key.chmod(0o400)
    folder.chmod(0o755)
    conf = folder / "slurm.conf"
    names = {
        "host": socket.gethostname().split(".")[0],
        "folder": folder,
        "user": getpass.getuser(),
    }
    conf.write_text(_CONF.format(**names, controller_port=free_port(), node_port=free_port()))
    env = os.environ | {"SLURM_CONF": str(conf)}
    munge = {"key-file": key} | {name: folder / f"munge.{name}" for name in ("socket", "pid-file")}
    munge |= {name: folder / f"munge.{name}" for name in ("log-file", "seed-file")}
    (folder / "state").mkdir()
    (folder / "spool").mkdir()
    daemons = [
        ["munged", "--force", "--foreground", *(f"--{name}={p}" for name, p in munge.items())],
        ["slurmctld", "-D", "-i"],
        ["slurmd", "-D"],
    ]
    with contextlib.ExitStack() as stack:
        for daemon in daemons:
            stack.enter_context(_running(daemon, env))
            time.sleep(0.5)
        deadline = time.monotonic() + 60
        while "idle" not in _output("sinfo", "-h", "-o", "%t", env=env):
            assert time.monotonic() < deadline, (folder / "slurmctld.log").read_text()
            time.sleep(0.2)
        yield env


@contextlib.contextmanager
def _running(command: list[str], env: Mapping[str, str]) -> Iterator[None]:
    silent = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    process = subprocess.Popen(command, env=env, **silent)
    try:
        yield
    finally:
        process.terminate()
        process.wait(timeout=60)


def job(env: Mapping[str, str], job_id: str) -> dict[str, str]:
    """What Slurm says of a job: JobState, Restarts, ..."""
    words = _output("scontrol", "--oneliner", "show", "job", job_id, env=env).split()
    return dict(word.split("=", 1) for word in words if "=" in word)


def _output(*command: str, env: Mapping[str, str]) -> str:
    return subprocess.run(command, env=env, capture_output=True, text=True).stdout
