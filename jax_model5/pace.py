"""Whether one of several processes is slower than the others at the same work."""

import socket
import time

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from jax_model5 import processes
from jax_model5.startup import note

SLOW = 2.0
"""So many times the median of all, twice in a row, is worth a line."""
_WORK_SECONDS, _WIDTH, _NAME_BYTES = 0.05, 1024, 64


class Pace:
    """Measures each process's own devices; in a step all wait for the slowest one, unseen."""

    def __init__(self) -> None:
        self._n_products, self._before = 1, np.zeros(0)

    def check(self) -> None:
        """Says which process is slow, and how much; all of them call it together."""
        if not processes.are_several():
            return
        if self._before.size == 0:
            self._agree_on_the_work()
        seconds = multihost_utils.process_allgather(np.float32(work_seconds(self._n_products)))
        slow = slowness(seconds)
        if self._before.size and (both := np.minimum(slow, self._before)).max() >= SLOW:
            index = int(both.argmax())
            ratio, host = both[index], self._hosts[index]
            note(f"process {index} ({host}) takes {ratio:.1f} times as long as the others")
        self._before = slow

    def _agree_on_the_work(self) -> None:
        """As many products as take process 0 a twentieth of a second."""
        while work_seconds(self._n_products) < _WORK_SECONDS and processes.is_first():
            self._n_products *= 2
        self._n_products = processes.any_of(self._n_products)
        name = socket.gethostname().encode()[:_NAME_BYTES].ljust(_NAME_BYTES)
        names = multihost_utils.process_allgather(np.frombuffer(name, np.uint8))
        self._hosts = [row.tobytes().decode(errors="replace").strip() for row in names]


def slowness(seconds: np.ndarray) -> np.ndarray:
    """Of each process, how many times as long as the others' median it took."""
    others = [np.median(np.delete(seconds, index)) for index in range(len(seconds))]
    return seconds / np.maximum(others, 1e-9)


def work_seconds(n_products: int) -> float:
    """So long this process's slowest device takes for that many products of matrices."""
    return max(_device_seconds(device, n_products) for device in jax.local_devices())


def _device_seconds(device: jax.Device, n_products: int) -> float:
    with jax.default_device(device):
        x = jnp.full((_WIDTH, _WIDTH), 1 / _WIDTH)
        jax.block_until_ready(_products(x, 1))  # compiled, and the device is idle
        start = time.perf_counter()
        jax.block_until_ready(_products(x, n_products))
        return time.perf_counter() - start


@jax.jit
def _products(x: jax.Array, n: int) -> jax.Array:
    return jax.lax.fori_loop(0, n, lambda _, y: y @ x, x)
