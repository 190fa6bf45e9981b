"""The first run compiles the kernels: this says so, and gets it done before a packet waits for it."""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from vnetdp_kernels import guest, jit, loops, verbs

from .datapath import NO_LOG
from .device import NetDevice
from .driver import Driver, memory_for
from .endpoints.loopback import NullEndpoint

_LOOPS = (loops.serve, loops.drive)


def warm_up(say: Callable[[str], None] | None = None) -> float:
    """Compile, or load from the cache, what a device and a driver run; return the seconds it took.

    *say* is told only if there is something to wait for.
    """
    began = time.perf_counter()
    with _one_at_a_time():
        _load(say)
    return time.perf_counter() - began


@contextmanager
def _one_at_a_time() -> Iterator[None]:
    """Have processes that start together compile once: the others wait, and then load what the first one made."""
    folder = getattr(getattr(loops.serve, "stats", None), "cache_path", None)
    if folder is None or not os.access(folder, os.W_OK):
        yield
        return
    with open(Path(folder) / "compiling.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _load(say: Callable[[str], None] | None) -> None:
    began = time.perf_counter()
    cold = not all(jit.cache_is_warm(loop) for loop in _LOOPS)
    if cold and say:
        say("compiling the kernels, once for an installation: about 20 s, a minute on a busy machine ...")
    with (
        memory_for(num=2) as memory,
        NullEndpoint() as left,
        NullEndpoint() as right,
        NetDevice(memory, left, threaded=False) as device,
        Driver(device, memory, right, num=2) as driver,
    ):
        driver.step()
        device.step()
        driver.check_adopted(memory.end)
        verbs.check_rings(memory.mem, memory.table, np.zeros((1, 6), np.int64))
        guest.mark_dirty(NO_LOG, 0, 1)
    if cold and say:
        say(f"compiled in {time.perf_counter() - began:.1f} s")
