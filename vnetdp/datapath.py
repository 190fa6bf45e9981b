"""Datapath: a straight line between an endpoint and the rings of one device, shared by every local backend.

It owns the device's queue rows and the scratch that kernels need; what serves the rings when is its owner's affair.
Also here: `Paced`, the thread that runs a datapath or a driver between two changes to it, and its `Listeners`.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, suppress
from queue import Empty, SimpleQueue
from typing import Protocol

import numpy as np

from vnetdp_kernels import rows as r
from vnetdp_kernels import spec
from vnetdp_kernels.loops.serve import serve
from vnetdp_kernels.platform import interrupt, peer
from vnetdp_kernels.rows import Control, Guest, Limits, Rings, Scratch
from vnetdp_kernels.wire import frame, port

from . import limits
from .endpoints.base import Endpoint
from .errors import ConfigError, VnetdpError
from .memory import Bytes, DirtyLog, GuestMemory, SharedBlock, Words
from .notify import EventFd
from .owned import Owned, OwnedLock
from .virtqueue import queues_of

_log = logging.getLogger("vnetdp.datapath")

_UNSET = (
    r.VQ_DESC,
    r.VQ_AVAIL,
    r.VQ_USED,
    r.VQ_DESC_GPA,
    r.VQ_AVAIL_GPA,
    r.VQ_USED_GPA,
    r.VQ_LOG_USED,
)
_LOOK = 0  # no pause's turn: "has another pause begun?"
_STUCK_S = 0.5  # no kernel takes that long to look at the doorbell, unless a system call holds it
NO_LOG: Bytes = np.zeros(0, np.uint8)
NO_MEMORY: Bytes = np.zeros(1, np.uint8)
NO_TABLE: Words = np.zeros((0, r.REGION_SLOTS), np.int64)


def scratch_for(pairs: int, max_num: int = spec.VIRTQ_MAX_NUM) -> Scratch:
    """Return the arrays that a loop over *pairs* queue pairs of up to *max_num* descriptors needs and nobody keeps."""
    cap = max(max_num, r.MIN_CHAIN_CAP)
    return Scratch(
        iov=np.zeros((2 * cap, r.IOV_SLOTS), np.int64),
        frame_iov=np.zeros((cap, r.IOV_SLOTS), np.int64),
        chains=np.zeros((cap, 2), np.int64),
        hdr=np.zeros(frame.HDR_SCRATCH, np.uint8),
        words=np.zeros(port.SCRATCH_WORDS, np.int64),
        pollfds=np.zeros((2, 3 * pairs + 1), np.int64),
        one=peer.tell_words(),
    )


class Datapath(Owned):
    """The device's side of the rings of *pairs* queue pairs, for `UserspaceBackend` to steer. Nothing runs but by `run`.

    It is not thread-safe: no verb of its backends may be called while it runs. `block_fd` is internal. Its rows, in
    shared memory, are vqs int64[2 × pairs, VQ_SLOTS]: receiveq 2i, transmitq 2i + 1.
    """

    def __init__(self, pairs: int, block_fd: int | None = None) -> None:
        self.pairs = pairs
        with ExitStack() as made:
            self.block = SharedBlock(queues_of(pairs) * r.VQ_SLOTS * 8 + spec.PAGE_SIZE, block_fd)
            made.callback(self.block.close)
            self._own_endpoint = self.endpoint = made.enter_context(Endpoint(pairs))
            self.bell = EventFd()
            made.pop_all()
        self.vqs: Words = self.block.carve(np.int64, queues_of(pairs), r.VQ_SLOTS)
        self.ctl: Words = self.block.carve(np.int64, r.CTL_SLOTS)
        self.memory: GuestMemory | None = None
        self.log: DirtyLog | None = None
        self.logging: set[int] = set()  # pairs with VHOST_F_LOG_ALL
        self.translated: list[GuestMemory | None] = [None] * queues_of(pairs)  # by which table a ring's offsets are
        self.notify: Words = np.full((queues_of(pairs), 2), -1, np.int64)
        self._scratch = scratch_for(pairs)
        self._in_kernel = False
        self._abandoned = False
        if block_fd is None:
            for slot in _UNSET:
                self.vqs[:, slot] = -1
            self.vqs[:, r.VQ_ENABLED] = 1

    @property
    def bound(self) -> bool:
        """True while a ring is bound."""
        return self.endpoint is not self._own_endpoint

    @property
    def dirty_bits(self) -> Bytes:
        """The dirty log's bits, if writes are logged; else an empty array. @private"""
        return self.log.log if self.log and self.logging else NO_LOG

    @property
    def rings(self) -> Rings:
        """The rings as kernels take them; guest memory is left out while no ring is bound."""
        memory = self.memory if self.bound else None
        guest = (
            Guest(memory.mem, memory.table, self.dirty_bits) if memory else Guest(NO_MEMORY, NO_TABLE, self.dirty_bits)
        )
        return Rings(guest, self.vqs, self.notify)

    def run(self, budget: int = -1, poll_us: int = 0, timeout_ms: int = 0) -> tuple[int, int]:
        """Serve the bound queues, in this thread. Return two numbers: an internal one, and the frames moved.

        - `budget`: move at most so many frames; -1 sets no limit.
        - `poll_us`: busy-poll so many microseconds before sleeping; -1 never sleeps.
        - `timeout_ms`: 0 returns once there is nothing to do; -1 waits for more, without end.
        """
        self.check_maker()
        endpoint, control = self.endpoint, Control(self.ctl, self.bell.fd)
        moved = 0
        while True:
            endpoint.service()
            self._in_kernel = True  # before the look at _abandoned: `abandon` does it the other way round
            if self._abandoned:
                self._in_kernel = False
                return r.LOOP_CONTROL, moved
            limits = Limits(budget if budget < 0 else budget - moved, poll_us, timeout_ms)
            reason, n = serve(self.rings, endpoint.wire, control, self._scratch, limits)
            self._in_kernel = False
            moved += n
            if reason != r.LOOP_PYTHON:
                endpoint.service()
                return reason, moved
            if 0 <= budget <= moved:
                endpoint.service()
                return r.LOOP_BUDGET, moved

    def abandon(self) -> bool:
        """Have the thread that runs the datapath enter no kernel ever again; False, and nothing done, if it is in one now.

        It may be in an endpoint's Python code, for as long as that takes; the rings can be taken from it all the same.
        @private
        """
        self._abandoned = True
        if self._in_kernel:
            self._abandoned = False
        return self._abandoned

    def let_go(self) -> None:
        """Forget the endpoint, once no ring is bound: the next one to poll it serves its Python side alone. @private"""
        self.endpoint = self._own_endpoint

    def close(self) -> None:
        if self.bell.fd >= 0 and not self.inherited:
            call_away(self)
        self.bell.close()
        self._own_endpoint.close()
        self.block.close()


class Runnable(Protocol):
    """What `Paced` runs: a datapath, or a driver."""

    ctl: Words
    bell: EventFd

    def run(self, budget: int = -1, poll_us: int = 0, timeout_ms: int = 0) -> tuple[int, int]: ...


def call_away(target: Runnable) -> None:
    """Have the thread that runs *target* leave the kernels, if a close that ^C broke off left one there."""
    target.ctl[r.CTL_DOORBELL] = 1
    target.bell.signal()


class Listeners:
    """The devices that hear of a thread or process that runs their rings: that a ring broke, or that it is gone."""

    def __init__(self) -> None:
        self._all: list[tuple[Callable[[], None], Callable[[], None]]] = []

    def add(self, on_broken: Callable[[], None], on_gone: Callable[[], None]) -> Callable[[], None]:
        """Have *on_broken* called whenever a ring broke, *on_gone* once nothing runs the rings; return the undoing."""
        listener = (on_broken, on_gone)
        self._all.append(listener)

        def remove() -> None:
            with suppress(ValueError):
                self._all.remove(listener)

        return remove

    def add_device(self, on_broken: Callable[[], None], on_gone: Callable[[], None]) -> Callable[[], None]:
        """As `add`, for a device. ConfigError while another device is there: a datapath has one guest's memory."""
        if self._all:
            raise ConfigError("another device has this worker: make a worker for each device")
        return self.add(on_broken, on_gone)

    def tell_broken(self) -> None:
        for on_broken, _ in tuple(self._all):
            on_broken()

    def tell_gone(self) -> None:
        """Tell every listener: one that fails costs the others nothing."""
        for _, on_gone in tuple(self._all):
            try:
                on_gone()
            except Exception:  # noqa: BLE001 - a defect of one
                _log.exception("a device could not take back its rings")


class _Pause:
    """What `Paced.paused` returns: a hundred verbs in one hand-over enter it, so it is made once."""

    def __init__(self, halt: Callable[[], None], go_on: Callable[[], None]) -> None:
        self._halt = halt
        self._go_on = go_on

    def __enter__(self) -> None:
        self._halt()

    def __exit__(self, *exc: object) -> None:
        self._go_on()


class Paced(Owned):
    """A thread that runs a datapath (or a driver) from `start` on, and stands still while somebody changes it.

    Register `close` before `start`: ^C can come between any two steps, and what the thread runs outlives the thread.

    `with paced.paused():` returns once the thread has left the kernel, and nothing touches the rings until the block
    ends. Nests, also across calls. `listeners` are told in the thread: each time a queue broke, when they may not pause
    it, and as the last thing, if an exception ended it (`error`).

    timeout_s: after so long the thread, if it is in no kernel but in an endpoint's Python code, is taken for hung and
    counts as ended; it enters no kernel any more. None waits for ever.
    """

    def __init__(
        self,
        target: Runnable,
        name: str,
        poll_us: int = 0,
        timeout_s: float | None = None,
        abandon: Callable[[], bool] = lambda: False,
    ) -> None:
        self._target = target
        self.poll_us = poll_us
        self._timeout_s = math.inf if timeout_s is None else timeout_s
        self._abandon = abandon
        self._lock = OwnedLock(self)
        self._pause = _Pause(self._halt, self._go_on)
        self._depth = 0
        # Queues, not events: to wake a thread by one costs a tenth.
        self._parked: SimpleQueue[int] = SimpleQueue()
        self._resume: SimpleQueue[int] = SimpleQueue()
        self._turn = 0  # goes through both: what a pause that was broken off left there is of no other
        self._stopping = False
        self._begun = threading.Lock()  # taken by the thread as it begins, or by `close`, so that it never does
        self._ended = False
        self._never = False  # it did not begin, and does not any more
        self._hung = False
        self._to_signal: list[EventFd] = []
        interrupt.install()
        self.listeners = Listeners()
        self.error: BaseException | None = None
        self._thread = threading.Thread(target=self._main, name=name, daemon=True)

    def start(self) -> None:
        """Start the thread, once."""
        limits.start(self._thread)

    def _main(self) -> None:
        if not self._begun.acquire(blocking=False):
            return  # it was closed before
        ctl, bell = self._target.ctl, self._target.bell
        try:
            while not self._stopping:
                reason, _ = self._target.run(-1, self.poll_us, -1)
                if self._ended:
                    return  # it was taken for hung
                if reason == r.LOOP_BROKEN:
                    self.listeners.tell_broken()
                if ctl[r.CTL_DOORBELL]:
                    self._stand_still()
                    while self._to_signal:
                        with suppress(OSError):
                            self._to_signal.pop().signal()
                else:
                    bell.clear()
        except BaseException as e:  # noqa: BLE001 - SystemExit too: whatever it is, nobody serves the rings any more
            if self._ended or self.inherited:
                return  # the child of a user's function that forked ends with this thread, its only one
            _log.exception("%s ended", self._thread.name)
            self.error = e
        self._ended = True
        self._parked.put(self._turn)
        if self.error is not None:
            self.listeners.tell_gone()

    def _stand_still(self) -> None:
        """Park, and return once the pause that this is for is over; a later one may have begun meanwhile."""
        turn = self._turn
        self._parked.put(turn)
        while (told := self._resume.get()) != turn:
            if told == _LOOK and turn != self._turn:
                turn = self._turn
                self._parked.put(turn)

    @property
    def ended(self) -> bool:
        """True once the thread runs nothing any more: it was closed, or died, or hangs."""
        return self._ended

    @property
    def native_id(self) -> int:
        """The thread's id as the kernel knows it, for setting its affinity."""
        return self._thread.native_id or 0

    def paused(self) -> AbstractContextManager[None]:
        """Hold the thread outside the kernels for the length of the block."""
        return self._pause

    def check_outside(self) -> None:
        """Raise ConfigError in this very thread, which no one else can hold while it waits."""
        if threading.current_thread() is self._thread and not self._ended:
            raise ConfigError(
                f"{self._thread.name} can't stop itself: change the device in another thread, not in its endpoint's code"
            )

    def _halt(self) -> None:
        self.check_outside()
        self._lock.acquire()
        # A thread that ended, even by a defect, never parks again; nor need it be dead yet.
        if self._depth == 0 and not self._ended:
            try:
                self._turn += 1
                self._resume.put(_LOOK)  # it may be parked already, for a doorbell that rang without a pause
                self._target.ctl[r.CTL_DOORBELL] = 1
                self._target.bell.signal()
                self._wait_until_parked()
            except BaseException:  # ^C: the thread may be about to park, and goes on at once
                self._target.ctl[r.CTL_DOORBELL] = 0
                self._resume.put(self._turn)
                self._lock.release()
                raise
        self._depth += 1

    def _wait_until_parked(self) -> None:
        until = time.monotonic() + self._timeout_s
        while True:
            try:
                while self._parked.get(timeout=min(_STUCK_S, self._timeout_s)) != self._turn and not self._ended:
                    pass
                return
            except Empty:
                if time.monotonic() >= until and self._abandon():
                    self._ended = self._hung = True
                    self.error = VnetdpError(
                        f"{self._thread.name} has not come back from Python for {self._timeout_s:g} s"
                    )
                    _log.info("%s; its rings are taken from it", self.error)  # whose they are says so
                    return
                interrupt.interrupt(self._thread.ident or 0)

    def _go_on(self) -> None:
        self._depth -= 1
        if self._depth == 0 and not self._ended:
            self._target.bell.clear()
            self._target.ctl[r.CTL_DOORBELL] = 0
            self._resume.put(self._turn)
        self._lock.release()

    def park(self, parked: bool) -> None:
        """Have the thread stand still until it is told otherwise, by whichever thread; each True needs a False."""
        if parked:
            with self.paused():
                self._depth += 1
        else:
            self._lock.acquire()
            self._go_on()

    def signal_later(self, event: EventFd) -> None:
        """Have the thread signal *event*, a peer's, when it goes on; only while it stands still."""
        self._to_signal.append(event)

    def close(self) -> None:
        """Stop the thread and wait for it. A forked child has no thread to stop."""
        if self.inherited:
            return
        self.check_outside()
        try:
            self._stopping = True
            if self._begun.acquire(blocking=False):
                self._ended = self._never = True
            with self.paused():
                if self._depth > 1 and not self._ended:
                    self._resume.put(self._turn)  # it is parked, and whoever parked it may be gone
            if not (self._hung or self._never):
                self._thread.join()
        except BaseException:  # ^C
            self._leave()
            raise

    def _leave(self) -> None:
        """Have the thread end all the same, or enter no kernel any more: what it runs may be closed next."""
        if self._ended:
            return
        self._stopping = True
        call_away(self._target)
        self._resume.put(self._turn)
        self._thread.join(_STUCK_S)
        if not self._ended and self._abandon():
            self._ended = self._hung = True
