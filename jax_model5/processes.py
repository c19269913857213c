"""Several processes as one run: they join, agree on what it is, and end together."""

import atexit
import contextlib
import functools
import os
import re
import secrets
import socket
import subprocess
import sys
import threading
import time
import warnings
import zlib
from collections.abc import Iterator, Mapping
from typing import Any, BinaryIO

import jax
import numpy as np
from jax._src import distributed
from jax._src.lib import _jax
from jax.experimental import multihost_utils

from jax_model5.errors import BAD_INPUT, UserError, last_line, on_failure, write_line

JOIN_SECONDS = 120
"""So long the processes wait for each other at the start."""
LOST_SECONDS = 60
"""So long after one of them is gone, at most, the others go on."""
EXIT_CODE = 4
"""Of a process that ends because another is gone, unless that one ended with bad input."""

_VARIABLES = [f"JAX_{name}" for name in ("COORDINATOR_ADDRESS", "NUM_PROCESSES", "PROCESS_ID")]
_BYE, _CONNECT_SECONDS, _HANDSHAKE_SECONDS, _GRACE_SECONDS = b"bye\n", 2.0, 10.0, 10.0


def is_first() -> bool:
    """Whether this process speaks and writes for all. Starts no device."""
    return not jax.distributed.is_initialized() or jax.process_index() == 0


def are_several() -> bool:
    """Whether the run has other processes. Starts no device where it has not."""
    return jax.distributed.is_initialized() and jax.process_count() > 1


# ---- joining ------------------------------------------------------------------------------------


def join() -> None:
    """Joins the run's other processes: those that three JAX_* variables name, or a launcher's.

    JAX_COORDINATOR_ADDRESS (host:port of process 0), JAX_NUM_PROCESSES and JAX_PROCESS_ID; else
    what JAX finds of Slurm, Open MPI, Kubernetes or a TPU pod. From then on a process that is gone
    ends all of them.

    Raises:
      UserError: not all came within `JOIN_SECONDS`, or the variables are wrong.
    """
    if jax.distributed.is_initialized():
        return
    given = _given() or _of_launcher()
    if given is None:
        return
    try:
        with _no_abort(), warnings.catch_warnings(action="ignore"):
            jax.distributed.initialize(
                **given,
                initialization_timeout=JOIN_SECONDS,
                heartbeat_timeout_seconds=LOST_SECONDS,
                shutdown_timeout_seconds=LOST_SECONDS,
            )
    except ValueError as error:
        if "process_id" in given or "coordinator_address should be defined" not in str(error):
            raise UserError(f"{_named(given)}: {error}") from None
        _note_kubernetes()
        return  # no launcher that JAX knows: this process is alone
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno else str(error)
        raise UserError(f"{_named(given)}: {reason}; name a free port") from None
    except Exception as error:  # also what a launcher's own package raises
        reason = str(error).split("\n")[0]
        if "before any JAX" in reason and "process_id" not in given:
            return  # a notebook that has made arrays is alone
        if "bad_cast" in reason:  # what remains of a status that has no Python form
            reason = f"not all processes came within {JOIN_SECONDS} s"
        # Without JAX's own goodbyes, which fail in many lines.
        on_failure.append(lambda code, line: os._exit(code))
        fix = "start all of them, with one free address"
        raise UserError(f"{_named(given)}: {reason}; {fix}") from None
    if jax.process_count() > 1:
        _watch_each_other()


def _of_launcher() -> dict[str, Any] | None:
    """What JAX would take wrongly from a launcher; None: this process is its only one."""
    counts = {os.environ.get(name) for name in ("SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE")}
    in_plain_pod = "KUBERNETES_SERVICE_HOST" in os.environ and counts == {None}
    if "1" in counts or (in_plain_pod and "JOB_COMPLETION_INDEX" not in os.environ):
        return None
    on_node = os.environ.get("SLURM_STEP_TASKS_PER_NODE", "")
    is_alone_there = re.fullmatch(r"1(\(x\d+\))?", on_node)
    if is_alone_there or os.environ.get("OMPI_COMM_WORLD_LOCAL_SIZE") == "1":
        return {"local_device_ids": []}  # JAX would give it one device of its node
    return {}


def _note_kubernetes() -> None:
    """JAX finds the pods of an indexed job only with the package `kubernetes`."""
    if "JOB_COMPLETION_INDEX" in os.environ:
        ways = "pip install 'jax[k8s]', or set the three JAX_* variables, to join the others"
        write_line(f"this pod is one of a Kubernetes job but alone: {ways}")


def _given() -> dict[str, Any]:
    """What the variables say; nothing where none is set. They win over a launcher."""
    if not any(name in os.environ for name in _VARIABLES):
        return {}
    try:
        address, count, index = (os.environ[name] for name in _VARIABLES)
        numbers = {"num_processes": int(count), "process_id": int(index)}
    except (KeyError, ValueError) as error:
        raise UserError(f"{', '.join(_VARIABLES)}: set all three: {error}") from None
    if not address.rpartition(":")[2].isdecimal():
        raise UserError(f"{_VARIABLES[0]}={address!r}: write it as HOST:PORT")
    return {"coordinator_address": address, **numbers, "cluster_detection_method": "deactivate"}


def _named(given: dict[str, Any]) -> str:
    if "coordinator_address" not in given:
        return "the launcher's processes"
    return (
        f"{_VARIABLES[0]}={given['coordinator_address']!r}, {_VARIABLES[2]}={given['process_id']}"
    )


_SERVICE = """
import contextlib, os, signal, socket, sys, time
from jaxlib import _jax
for name in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
    signal.signal(name, signal.SIG_IGN)
address, n_processes, seconds = sys.argv[1], *map(int, sys.argv[2:])
bounds = {"heartbeat_timeout": seconds, "shutdown_timeout": seconds}
service = _jax.get_distributed_runtime_service(address, n_processes, **bounds)
sys.stdin.read()
for name in os.listdir("/dev/fd"):
    with contextlib.suppress(OSError):
        one = socket.socket(fileno=os.dup(int(name)))
        if one.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
            one.shutdown(socket.SHUT_RDWR)
time.sleep(5)
os._exit(0)
"""


class _Service:
    """JAX's coordination service in a process of its own, which outlives process 0 by 5 seconds.

    Inside process 0 it would be gone with it, and at that the others abort in C++ with a stack,
    before anything in them can say why. In these seconds it takes no new ones: they belong to the
    run that a launcher has started again at the same address.
    """

    def __init__(self, address: str, n_processes: int, **_: Any):
        dual = socket.has_dualstack_ipv6()
        family = socket.AF_INET6 if dual else socket.AF_INET
        port = int(address.rpartition(":")[2])
        # A taken port raises here; in the service it would be a segmentation fault. The process 0
        # of a run that has just ended may be there for some seconds more.
        for seconds in (1, 2, 3, 4, 0):
            try:
                socket.create_server(("", port), family=family, dualstack_ipv6=dual).close()
                break
            except OSError:
                if seconds == 0:
                    raise
                time.sleep(seconds)
        self._process = subprocess.Popen(
            [sys.executable, "-c", _SERVICE, address, str(n_processes), str(LOST_SECONDS)],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )

    def shutdown(self) -> None:
        """Left to its five seconds: the others are still leaving, and its end would abort them."""
        if self._process.stdin is not None:
            self._process.stdin.close()


@contextlib.contextmanager
def _no_abort() -> Iterator[None]:
    """What fails is raised. JAX leaves it to its client, which aborts in C++ with a stack.

    The client takes a callback for it, which `jax.distributed.initialize` does not pass on. (Once
    joined, a process that hangs for LOST_SECONDS still ends the others by that abort.)
    """
    client, service = _jax.get_distributed_runtime_client, _jax.get_distributed_runtime_service
    raises = functools.partial(client, missed_heartbeat_callback=lambda status: None)
    _jax.get_distributed_runtime_client = raises
    _jax.get_distributed_runtime_service = _Service
    try:
        yield
    finally:
        _jax.get_distributed_runtime_client = client
        _jax.get_distributed_runtime_service = service


# ---- agreeing -----------------------------------------------------------------------------------


def require_same(values: Mapping[str, Any]) -> None:
    """Raises UserError on every process, with the names of what is not the same on all."""
    if not are_several():
        return
    digests = np.array([zlib.crc32(repr(value).encode()) for value in values.values()], np.uint32)
    rows = multihost_utils.process_allgather(digests)
    others = {
        name: np.flatnonzero(column != column[0]).tolist()
        for name, column in zip(values, rows.T, strict=True)
        if (column != column[0]).any()
    }
    if others:
        _watch.is_on = False  # all of them end now, each with this line
        multihost_utils.sync_global_devices("the processes differ")
        words = [
            f"{name}={values[name]!r} here, but processes {indices} have another than process 0"
            for name, indices in others.items()
        ]
        raise UserError(f"{'; '.join(words)}; start all with the same settings and text")


def any_of(value: int) -> int:
    """The largest value of all processes, the same on each of them."""
    if not are_several():
        return value
    return int(multihost_utils.process_allgather(np.array(value, np.int32)).max())


# ---- ending together ----------------------------------------------------------------------------


class _Watch:
    """Whether the end of another process ends this one."""

    is_on = False


_watch = _Watch()


def _watch_each_other() -> None:
    """Each process holds a connection to process 0: the system closes it when either is gone.

    That is noticed at once, while JAX's own heartbeats take a minute and end in an abort. Where no
    connection can be made, these remain.
    """
    server, code = None, np.zeros(3, np.uint32)
    if jax.process_index() == 0:
        dual = socket.has_dualstack_ipv6()
        family = socket.AF_INET6 if dual else socket.AF_INET
        server = socket.create_server(
            ("", 0), family=family, dualstack_ipv6=dual, backlog=jax.process_count()
        )
        code[:] = server.getsockname()[1], secrets.randbits(32), secrets.randbits(32)
    port, *token = multihost_utils.broadcast_one_to_all(code).tolist()
    _watch.is_on = True
    password = f"{token}\n".encode()
    if server is not None:
        _start(_serve, server, password)
    else:
        address = distributed.global_state.coordinator_address or ""
        _start(_listen, address.rpartition(":")[0].strip("[]"), int(port), password)
    on_failure.append(_end)  # without the barrier at the end, at which the others are not
    sys.excepthook = _fail
    atexit.register(_leave)


def _start(function: Any, *arguments: Any) -> None:
    threading.Thread(target=function, args=arguments, daemon=True).start()


_connections: dict[int, socket.socket] = {}


def _serve(server: socket.socket, password: bytes) -> None:
    """Process 0: a connection for each of the others."""
    while len(_connections) < jax.process_count() - 1:
        connection, _ = server.accept()
        with contextlib.suppress(OSError, ValueError):
            connection.settimeout(_HANDSHAKE_SECONDS)
            lines = connection.makefile("rb")
            if lines.readline() == password:
                index = int(lines.readline())
                _keep_alive(connection)
                _connections[index] = connection
                _start(_await_end, index, lines)


def _listen(host: str, port: int, password: bytes) -> None:
    """The others: their connection to process 0."""
    try:
        connection = socket.create_connection((host, port), _HANDSHAKE_SECONDS)
        connection.sendall(password + f"{jax.process_index()}\n".encode())
        _keep_alive(connection)
    except OSError as error:
        write_line(
            f"no connection to process 0 at {host}:{port} ({error}): its end is noticed late"
        )
        return
    _connections[0] = connection
    _await_end(0, connection.makefile("rb"))


def _keep_alive(connection: socket.socket) -> None:
    """A machine that is cut off is noticed after half a minute."""
    connection.settimeout(None)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in (("TCP_KEEPIDLE", 10), ("TCP_KEEPINTVL", 5), ("TCP_KEEPCNT", 4)):
        if hasattr(socket, name):  # not on macOS
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


def _await_end(index: int, lines: BinaryIO) -> None:
    """Reads on where the handshake left off: what is said may have come with it."""
    said = b""
    with contextlib.suppress(OSError):
        said = lines.readline()
    if said == _BYE or not _watch.is_on:
        return
    lost, line = index, ""
    if said.endswith(b"\n"):
        first, _, line = said.decode().rstrip("\n").partition(" ")
        lost = int(first)
    with last_line:
        _tell_others(lost, line)
        if line:  # bad input: it would be the same again
            write_line(f"{line} (process {lost} of {jax.process_count()})")
            os._exit(BAD_INPUT)
        _end_because(f"process {lost} of {jax.process_count()} is gone")


def _tell_others(lost: int, line: str) -> None:
    """Also those that are still connecting."""
    n_others = jax.process_count() - 1 if jax.process_index() == 0 else 1
    deadline = time.monotonic() + _CONNECT_SECONDS
    while len(_connections) < n_others and time.monotonic() < deadline:
        time.sleep(0.05)
    for other in list(_connections.values()):
        with contextlib.suppress(OSError):
            other.sendall(f"{lost} {line}\n".encode(errors="backslashreplace"))


def _end(code: int, line: str) -> None:
    """Ends this process, which has failed, and the others: with its line, if that is bad input."""
    _tell_others(jax.process_index(), line if code == BAD_INPUT else "")
    os._exit(code)


def _end_because(what: str) -> None:
    """Ends this process of several with one line; the caller holds `last_line`."""
    again = "so this one ends too; start all of them again: they go on from the last checkpoint"
    write_line(f"error: {what}, {again}")
    os._exit(EXIT_CODE)


def _fail(*error: Any) -> None:
    """An error that nobody catches ends the process at once, and with it the others."""
    with last_line:
        sys.__excepthook__(*error)
        os._exit(1)


def _leave() -> None:
    """A process that has done its work says so."""
    _watch.is_on = False
    for connection in _connections.values():
        with contextlib.suppress(OSError):
            connection.sendall(_BYE)


@contextlib.contextmanager
def lost_ones_end_all() -> Iterator[None]:
    """An error of communication ends this process of several as the loss that caused it does."""
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if not are_several():
            raise
        threading.Event().wait(_GRACE_SECONDS)  # the connection tells which process it is
        with last_line:
            reason = str(error).split("\n")[0][:120]
            _end_because(f"the processes have lost each other ({reason})")
