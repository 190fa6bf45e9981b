"""Worker: a vhost worker in a thread of its own, and the verbs that steer it.

A verb stops the thread between two kernel calls, is applied by the same code that userspace uses, and lets it go on.
"""

from __future__ import annotations

import errno
import threading
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack

from ..datapath.datapath import Datapath
from ..datapath.loop_thread import LoopThread, hang_s
from ..endpoints.base import Endpoint
from ..errors import VnetdpError, reason
from ..shared.memory import Words
from ..system import limits
from ..system.owned import Owned
from ..virtio.queue import VRINGS
from .base import Backend
from .userspace import UserspaceBackend
from .verbs import SetBackend, Verb, refusal


class Worker(Owned):
    """A vhost worker: a thread that runs the rings of *pairs* queue pairs of one device. Give it to `NetDevice`.

    - `poll_us`: microseconds for which it busy-polls before it sleeps; 0 sleeps at once, -1 never sleeps.
    - `name`: of the thread.
    - `timeout_s`: seconds after which a thread that does not come back from an endpoint's Python code counts as ended;
      None waits without end.

    If the thread ends, the device takes its rings back by itself, and no ring can be bound any more (ESRCH).
    MachineError if the machine has no more threads, memory or descriptors.
    """

    def __init__(
        self,
        pairs: int,
        poll_us: int = 0,
        name: str = "vhost-worker",
        timeout_s: float | None = 10.0,
    ) -> None:
        self._closing = threading.Event()
        with ExitStack() as made:
            self.datapath = Datapath(pairs)
            made.callback(self.datapath.close)
            self.loop_thread = LoopThread(self.datapath, name, poll_us, timeout_s, self.datapath.abandon)
            made.callback(self.loop_thread.close)
            self.loop_thread.start()
            made.callback(self._closing.set)
            self._watchdog: threading.Thread | None = None
            if timeout_s is not None:
                self._watchdog = threading.Thread(target=self._watch, args=(timeout_s / 4,), name=f"{name}-watchdog")
                self._watchdog.daemon = True
                limits.start(self._watchdog)
            made.pop_all()
        self.backends = [WorkerBackend(self.loop_thread, self.datapath, pair) for pair in range(pairs)]
        """A `Backend` for each queue pair."""

    def _watch(self, period_s: float) -> None:
        """Look, again and again, whether the thread still stops when it is asked to while it has rings."""
        while not self._closing.wait(period_s):
            if self.datapath.bound:
                with self.loop_thread.paused():
                    pass
            if self.loop_thread.error is not None:
                self.loop_thread.listeners.tell_gone()
                return

    def kill(self) -> None:
        """End the thread at once, between two kernel calls, with nothing tidied: its rings stay bound. For tests.

        Nothing happens if it has ended.
        """
        self.fail(VnetdpError("it was killed"))

    def fail(self, exc: BaseException) -> None:
        """Have the thread's loop raise *exc*, as a defect does, which ends the thread. For tests.

        Nothing happens if it has ended. TypeError if *exc* is not an exception.
        """
        self.loop_thread.fail(exc)

    def hang(self, seconds: float) -> None:
        """Keep the thread away from the rings for *seconds*, math.inf for ever, or until `close`. For tests.

        Nothing happens if it has ended. ConfigError if *seconds* is negative.
        """
        wait_s = hang_s(seconds)
        self.loop_thread.call_within(lambda: self._closing.wait(wait_s))

    def close(self) -> None:
        """Stop the thread, and give up its memory and descriptors. A device whose rings it has goes on in userspace."""
        if not self.inherited:
            self._stop()
        self.datapath.close()

    def _stop(self) -> None:
        self._closing.set()
        self.loop_thread.close()
        if self._watchdog is not None:
            self._watchdog.join()
        self.loop_thread.listeners.tell_gone()
        for backend in self.backends:
            backend.unbind()


class WorkerBackend(Backend, Owned):
    """One vhost device of a datapath that a thread runs (see `Backend`)."""

    def __init__(self, loop_thread: LoopThread, datapath: Datapath, pair: int) -> None:
        self._loop_thread = loop_thread
        self._inner = UserspaceBackend(datapath, pair)

    def apply(self, verb: Verb) -> int:
        with self._loop_thread.paused():
            if self._loop_thread.ended and isinstance(verb, SetBackend) and verb.endpoint is not None:
                error = self._loop_thread.error
                why = "was closed" if error is None else f"has ended: {reason(error)}"
                raise refusal(verb, errno.ESRCH, f"the worker's thread {why}")
            return self._inner.apply(verb)

    def bind_rings(self, bases: Sequence[tuple[int, int]], endpoint: Endpoint) -> bool:
        with self._loop_thread.paused():
            return not self._loop_thread.ended and self._inner.bind_rings(bases, endpoint)

    @property
    def worker(self) -> object:
        return self._loop_thread

    def hold(self) -> AbstractContextManager[None]:
        return self._loop_thread.paused()

    def park(self, parked: bool) -> None:
        self._loop_thread.park(parked)

    def listen(self, on_broken: Callable[[], None], on_gone: Callable[[], None]) -> Callable[[], None]:
        return self._loop_thread.listeners.add_device(on_broken, on_gone)

    def status(self, index: int) -> int:
        return self._inner.status(index)

    def row(self, index: int) -> Words:
        return self._inner.row(index)

    def counters(self, index: int) -> dict[str, int]:
        return self._inner.counters(index)

    def unbind(self) -> None:
        """Let go of the endpoint, once the thread has ended."""
        for index in range(VRINGS):
            self._inner.set_backend(index, None)
