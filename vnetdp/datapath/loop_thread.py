"""LoopThread: the thread that runs a datapath or a driver, and is paused while either is changed; and its `Listeners`."""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, suppress
from queue import Empty, SimpleQueue
from typing import NoReturn, Protocol

from vnetdp_kernels import rows as r
from vnetdp_kernels.platform import interrupt

from ..errors import ConfigError, VnetdpError, reason
from ..shared.memory import Words
from ..shared.notify import EventFd
from ..system import limits
from ..system.owned import Owned, OwnedLock

_log = logging.getLogger("vnetdp.datapath")

_LOOK = 0  # no pause's turn: "has another pause begun?"
_STUCK_S = 0.5  # no kernel takes that long to look at the doorbell, unless a system call holds it


class Runnable(Protocol):
    """The object that a `LoopThread` runs: a datapath or a driver."""

    ctl: Words
    bell: EventFd

    def run(self, budget: int = -1, poll_us: int = 0, timeout_ms: int = 0) -> tuple[int, int]: ...


def call_away(target: Runnable) -> None:
    """Have the thread that runs *target* leave the kernels, if a close that ^C broke off left one there."""
    target.ctl[r.CTL_DOORBELL] = 1
    target.bell.signal()


def check_exception(exc: BaseException) -> None:
    """Raise TypeError if *exc* is not an exception, which a loop could raise."""
    if not isinstance(exc, BaseException):
        raise TypeError(f"a worker fails with an exception, such as OSError(), not with a {type(exc).__name__}")


def hang_s(seconds: float) -> float:
    """Return the seconds of a hang as a wait takes them; ConfigError if it can't be that long."""
    if not seconds >= 0:
        raise ConfigError(f"a worker can't hang for {seconds} s: give 0 or more, math.inf for ever")
    return min(seconds, threading.TIMEOUT_MAX)


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
        """Call the on_gone of every listener; a listener that raises does not keep the others from theirs."""
        for _, on_gone in tuple(self._all):
            try:
                on_gone()
            except Exception:  # noqa: BLE001 - a defect of one
                _log.exception("a device could not take back its rings")


class _Pause:
    """The context of `LoopThread.paused`, made once: a hundred verbs in one hand-over enter it."""

    def __init__(self, halt: Callable[[], None], go_on: Callable[[], None]) -> None:
        self._halt = halt
        self._go_on = go_on

    def __enter__(self) -> None:
        self._halt()

    def __exit__(self, *exc: object) -> None:
        self._go_on()


class LoopThread(Owned):
    """A thread that runs a datapath (or a driver) from `start` on, and can be paused while its rings are changed.

    Register `close` before `start`: ^C can come between any two steps, and the datapath or driver outlives the thread.

    `with loop_thread.paused():` returns once the thread has left the kernel, and nothing touches the rings until the block
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
        self._resume: SimpleQueue[int | Callable[[], object]] = SimpleQueue()
        self._turn = 0  # goes through both queues: an entry that a broken-off pause left there matches no other pause
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
            while not (self._stopping or self._ended):
                why, _ = self._target.run(-1, self.poll_us, -1)
                if self._ended:
                    return  # it was taken for hung
                if why == r.LOOP_BROKEN:
                    self.listeners.tell_broken()
                if ctl[r.CTL_DOORBELL]:
                    self._stand_still()
                    while self._to_signal:
                        with suppress(OSError):
                            self._to_signal.pop().signal()
                else:
                    bell.clear()
        except BaseException as e:  # noqa: BLE001 - SystemExit too: after any exception the rings are served no more
            if self._ended or self.inherited:
                return  # the child of a user's function that forked ends with this thread, its only one
            _log.error("%s ended: %s", self._thread.name, reason(e), exc_info=not isinstance(e, VnetdpError))
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
            if callable(told):
                told()
            elif told == _LOOK and turn != self._turn:
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
        """Raise ConfigError if this very thread is the caller: it would wait for itself to pause."""
        if threading.get_ident() == self._thread.ident and not self._ended:
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

    def call_within(self, call: Callable[[], object]) -> None:
        """Have the thread call *call* at once, outside the kernels; an exception in it ends the thread. For tests."""
        with self.paused():
            self._resume.put(call)

    def fail(self, exc: BaseException) -> None:
        """Have the thread raise *exc* at once, as a defect does. For tests."""
        check_exception(exc)

        def defect() -> NoReturn:
            raise exc

        self.call_within(defect)

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
                    self._resume.put(self._turn)  # it is parked, and the thread that parked it may be gone
            if not (self._hung or self._never):
                self._thread.join()
        except BaseException:  # ^C
            self._leave()
            raise

    def _leave(self) -> None:
        """Have the thread end all the same, or enter no kernel any more: its datapath or driver may be closed next."""
        if self._ended:
            return
        self._stopping = True
        call_away(self._target)
        self._resume.put(self._turn)
        self._thread.join(_STUCK_S)
        if not self._ended and self._abandon():
            self._ended = self._hung = True
