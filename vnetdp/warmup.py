"""The first run compiles the kernels: this says so, and gets it done before a packet waits for it."""

from __future__ import annotations

import fcntl
import logging
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np

from vnetdp_kernels.loops.drive import drive
from vnetdp_kernels.loops.serve import serve
from vnetdp_kernels.platform import cache, jit
from vnetdp_kernels.virtq.bind import check_rings
from vnetdp_kernels.virtq.memory import mark_dirty
from vnetdp_kernels.wire.sock import flush

from .datapath.datapath import NO_LOG
from .device.device import NetDevice
from .endpoints.loopback import NullEndpoint
from .guest.driver import Driver, memory_for
from .stepping import settle
from .system import limits

Say = Callable[[str], None]

_LOOPS = (serve, drive)
_LOCK = "compiling.lock"
_log = logging.getLogger(__name__)


def warm_up(say: Say | None = None) -> float:
    """Compile the kernels of device and driver, or load them from the cache; return the seconds that this took.

    Without it the first frame waits for that: about a minute if they were never compiled, else less than a second. `say` is
    called with a line if they have to be compiled, if another process does that, or if NUMBA_CACHE_DIR names a folder
    that can't be used. ConfigError if a limit of memory is too low for the compiler.
    """
    return compile_once("the kernels", _LOOPS, _run_all, say)


def compile_once(what: str, loops: Sequence[Callable[..., Any]], run: Callable[[], None], say: Say | None) -> float:
    """Have *run* compile, or load from the cache, *loops* and all that they call; return the seconds it took."""
    began = time.perf_counter()
    if not _warm(loops):
        with _one_at_a_time(say):
            _load(what, loops, run, say)
    else:
        _wait_for_the_rest(loops[0], say)
        _load(what, loops, run, say)
    return time.perf_counter() - began


def _warm(loops: Sequence[Callable[..., Any]]) -> bool:
    return all(jit.cache_is_warm(loop) for loop in loops)


@contextmanager
def _one_at_a_time(say: Say | None = None) -> Iterator[None]:
    """Have processes that start together compile once: the first compiles, the others wait and load its files.

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


def _wait_for_the_rest(loop: Callable[..., Any], say: Say | None) -> None:
    """Wait while another command compiles: of all that is compiled, the loops are not the last."""
    folder = jit.found(loop)
    if folder is None:
        return  # loaded, or never compiled
    path = folder / _LOCK
    with suppress(OSError):
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
        try:
            _lock(fd, fcntl.LOCK_SH, path, say)
        finally:
            os.close(fd)


def _lock(fd: int, kind: int, path: Path, say: Say | None) -> None:
    try:
        fcntl.flock(fd, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        if say:
            say(f"waiting for another command, which compiles the kernels and holds {path} ...")
        fcntl.flock(fd, kind)


def _load(what: str, loops: Sequence[Callable[..., Any]], run: Callable[[], None], say: Say | None) -> None:
    if _warm(loops):
        if say and (trouble := cache.passed_over(jit.found(loops[0]))):
            say(trouble)
        run()
        return
    limits.check_memory(to_compile=True)
    began, before = time.perf_counter(), cache.trouble()
    if before:
        _log.warning("%s", before)
    if say:
        often = "at each start" if cache.writable() is None else "once for an installation"
        say(f"compiling {what}, {often}: it takes about a minute of one core ...")
    run()
    if say:
        say(f"compiled in {time.perf_counter() - began:.1f} s")
    if (after := cache.trouble()) != before:  # no room, which shows when it is written
        _log.warning("%s", after)


def _run_all() -> None:
    with (
        memory_for(num=2) as memory,
        NullEndpoint() as left,
        NullEndpoint() as right,
        NetDevice(memory, left, threaded=False) as device,
        Driver(device, memory, right, num=2) as driver,
    ):
        driver.step()
        device.step()
        settle(driver)
        driver.check_adopted(memory.end)
        check_rings(memory.mem, memory.table, np.zeros((1, 6), np.int64))
        mark_dirty(NO_LOG, 0, 1)
        flush(left.sink(0))
        left.next_due_ns()
