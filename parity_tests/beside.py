"""A second process that imports what the report needs while the first one does."""

import contextlib
import multiprocessing
import signal
import sys
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import forkserver, resource_tracker
from typing import Any

# A Mac's own libraries may not survive a fork; JAX's threads would not, but are not there yet.
_METHOD = "spawn" if sys.platform == "darwin" else "forkserver"


def start() -> None:
    """Begins to import, in a process from which `pool`'s is forked; it ends with this one.

    It does not heed Ctrl-C: this process, a moment later, ends it.
    """
    if _METHOD == "spawn":
        return
    forkserver.set_forkserver_preload(["parity_tests.shared"])
    resource_tracker.ensure_running()  # a process of its own, which unmasks the signal
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # inherited, not lost
    try:
        with contextlib.suppress(OSError):  # no room for its socket: `pool`'s will not start
            forkserver.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def pool(initializer: Any, *arguments: Any) -> ProcessPoolExecutor:
    """Of one process."""
    start()
    context = multiprocessing.get_context(_METHOD)
    return ProcessPoolExecutor(1, context, initializer, arguments)
