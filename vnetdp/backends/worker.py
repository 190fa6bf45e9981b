"""Worker: a vhost worker in a thread of its own, and the verbs that steer it.

A verb stops the thread between two kernel calls, is applied by the same code that userspace uses, and lets it go on.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack

from ..datapath import Datapath, Paced
from ..endpoints.base import Endpoint
from ..errors import BackendError
from ..memory import DirtyLog, GuestMemory
from ..notify import EventFd
from .userspace import UserspaceBackend


class Worker:
    """A thread that serves *pairs* vhost devices, `backends[i]` for queue pair i.

    poll_us: busy-poll so long before sleeping on the eventfds; 0 sleeps at once, -1 never sleeps. *on_broken* is called
    in the thread when a ring broke, *on_gone* when an exception ended the thread; from then on no ring can be bound (ESRCH).
    """

    def __init__(
        self,
        pairs: int,
        poll_us: int = 0,
        name: str = "vhost-worker",
        on_broken: Callable[[], None] | None = None,
        on_gone: Callable[[], None] | None = None,
    ) -> None:
        with ExitStack() as made:
            self.datapath = Datapath(pairs)
            made.callback(self.datapath.close)
            self.paced = Paced(self.datapath, name, poll_us, on_broken, on_gone)
            made.pop_all()
        self.backends = [WorkerBackend(self.paced, self.datapath, pair) for pair in range(pairs)]

    @property
    def on_broken(self) -> Callable[[], None] | None:
        """What is called, in the thread, when a ring broke."""
        return self.paced.on_broken

    @on_broken.setter
    def on_broken(self, call: Callable[[], None] | None) -> None:
        self.paced.on_broken = call

    @property
    def on_gone(self) -> Callable[[], None] | None:
        """What is called, in the thread, when an exception ended it."""
        return self.paced.on_gone

    @on_gone.setter
    def on_gone(self, call: Callable[[], None] | None) -> None:
        self.paced.on_gone = call

    def close(self) -> None:
        """Stop the thread and give up every descriptor. Rings that were bound are not touched any more."""
        self.paced.close()
        for backend in self.backends:
            backend.unbind()
        self.datapath.close()


class WorkerBackend:
    """One vhost device of a datapath that a thread runs (see `Backend`)."""

    def __init__(self, paced: Paced, datapath: Datapath, pair: int) -> None:
        self._paced = paced
        self._inner = UserspaceBackend(datapath, pair)

    def set_mtu(self, mtu: int) -> None:
        with self._paced.paused():
            self._inner.set_mtu(mtu)

    def set_features(self, features: int) -> None:
        with self._paced.paused():
            self._inner.set_features(features)

    def set_memory(self, memory: GuestMemory) -> None:
        with self._paced.paused():
            self._inner.set_memory(memory)

    def set_log(self, log: DirtyLog | None) -> None:
        with self._paced.paused():
            self._inner.set_log(log)

    def set_vring_num(self, index: int, num: int) -> None:
        with self._paced.paused():
            self._inner.set_vring_num(index, num)

    def set_vring_base(self, index: int, base: int) -> None:
        with self._paced.paused():
            self._inner.set_vring_base(index, base)

    def get_vring_base(self, index: int) -> int:
        with self._paced.paused():
            return self._inner.get_vring_base(index)

    def set_vring_addr(self, index: int, desc: int, avail: int, used: int, log_used: int | None = None) -> None:
        with self._paced.paused():
            self._inner.set_vring_addr(index, desc, avail, used, log_used)

    def set_vring_kick(self, index: int, kick: EventFd | None) -> None:
        with self._paced.paused():
            self._inner.set_vring_kick(index, kick)

    def set_vring_call(self, index: int, call: EventFd | None) -> None:
        with self._paced.paused():
            self._inner.set_vring_call(index, call)

    def set_vring_enable(self, index: int, enabled: bool) -> None:
        with self._paced.paused():
            self._inner.set_vring_enable(index, enabled)

    def set_vring_inflight(self, index: int, area: int, journal: int) -> None:
        with self._paced.paused():
            self._inner.set_vring_inflight(index, area, journal)

    def set_backend(self, index: int, endpoint: Endpoint | None) -> None:
        with self._paced.paused():
            if endpoint is not None and self._paced.error is not None:
                raise BackendError("set_backend", errno.ESRCH, index, "the worker's thread has ended")
            self._inner.set_backend(index, endpoint)

    def bind_rings(self, bases: Sequence[tuple[int, int]], endpoint: Endpoint) -> bool:
        with self._paced.paused():
            return self._paced.error is None and self._inner.bind_rings(bases, endpoint)

    @property
    def site(self) -> object:
        return self._paced

    def hold(self) -> AbstractContextManager[None]:
        return self._paced.paused()

    def park(self, parked: bool) -> None:
        self._paced.park(parked)

    def status(self, index: int) -> int:
        return self._inner.status(index)

    def counters(self, index: int) -> dict[str, int]:
        return self._inner.counters(index)

    def unbind(self) -> None:
        """Let go of the endpoint, once the thread has ended."""
        for index in range(2):
            self._inner.set_backend(index, None)
