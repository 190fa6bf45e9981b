"""The first run compiles the kernels: this says so, and gets it done before a packet waits for it."""

from __future__ import annotations

import fcntl
import logging
import os
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import numpy as np

from vnetdp_kernels import cache, guest, jit, loops, verbs

from . import limits
from .datapath import NO_LOG
from .device import NetDevice
from .driver import Driver, memory_for
from .endpoints.loopback import NullEndpoint

_LOOPS = (loops.serve, loops.drive)
_LOCK = "compiling.lock"
_log = logging.getLogger(__name__)


def warm_up(say: Callable[[str], None] | None = None) -> float:
    """Compile, or load from the cache, what a device and a driver run; return the seconds it took.

    *say* is told only if there is something to wait for.
    """
    began = time.perf_counter()
    if _cold():
        with _one_at_a_time(say):
            _load(say)
    else:
        _wait_for_the_rest(say)
        _load(say)
    return time.perf_counter() - began


def _cold() -> bool:
    return not all(jit.cache_is_warm(loop) for loop in _LOOPS)


@contextmanager
def _one_at_a_time(say: Callable[[str], None] | None = None) -> Iterator[None]:
    """Have processes that start together compile once: the others wait, and then load what the first one made.

    The lock only saves work: where it can't be had, each compiles.
    """
    folder = cache.writable()
    with ExitStack() as stack:
        if folder is not None:
            with suppress(OSError):
                path = folder.path / _LOCK
                fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644)
                stack.callback(os.close, fd)
                _lock(fd, fcntl.LOCK_EX, path, say)
        yield


def _wait_for_the_rest(say: Callable[[str], None] | None) -> None:
    """Wait while another command compiles: of all that is compiled, the loops are not the last."""
    folder = jit.found(loops.serve)
    if folder is None:
        return  # loaded, or never compiled
    path = folder / _LOCK
    with suppress(OSError):
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
        try:
            _lock(fd, fcntl.LOCK_SH, path, say)
        finally:
            os.close(fd)


def _lock(fd: int, kind: int, path: Path, say: Callable[[str], None] | None) -> None:
    try:
        fcntl.flock(fd, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        if say:
            say(f"waiting for another command, which compiles the kernels and holds {path} ...")
        fcntl.flock(fd, kind)


def _load(say: Callable[[str], None] | None) -> None:
    began = time.perf_counter()
    cold = _cold()
    if cold:
        limits.check_memory(to_compile=True)
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
    if cold and (trouble := cache.trouble()):
        _log.warning("%s", trouble)
