"""A second process that imports what the report needs while the first one does."""

import multiprocessing
import signal
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import forkserver
from typing import Any


def start() -> None:
    """Begins to import, in a process from which `pool`'s is forked; it ends with this one.

    JAX's threads would not survive a fork, but only a computation starts them. It does not heed
    Ctrl-C: this process, a moment later, ends it.
    """
    forkserver.set_forkserver_preload(["parity_tests.shared"])
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # inherited, not lost
    try:
        forkserver.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def pool(initializer: Any, *arguments: Any) -> ProcessPoolExecutor:
    """Of one process."""
    start()
    context = multiprocessing.get_context("forkserver")
    return ProcessPoolExecutor(1, context, initializer, arguments)
