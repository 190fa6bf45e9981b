"""OwnDatapath: the device's own datapath, which runs its rings in a thread of the device's or step by step."""

from __future__ import annotations

from collections.abc import Sequence

from ..backends.base import Backend
from ..backends.userspace import UserspaceBackend
from ..backends.worker import Worker
from ..datapath.datapath import Datapath
from ..endpoints.base import Endpoint
from ..endpoints.clock import Clock
from ..errors import ConfigError
from ..shared.memory import Words
from ..system.owned import Owned


def hand_in(clock: Clock | None, endpoint: Endpoint, threaded: bool, backends: Sequence[Backend]) -> None:
    """Have *endpoint* read *clock*, if there is one. ConfigError unless the caller itself runs all that moves its frames."""
    if clock is None and endpoint.clock is None:
        return
    if threaded:
        raise ConfigError("a thread sleeps by the machine's clock: with a clock= the device needs threaded=False")
    if not all(isinstance(backend.worker, Datapath) for backend in backends):
        raise ConfigError(
            "a vhost worker sleeps by the machine's clock: with a clock= take a UserspaceBackend of a Datapath that you run"
        )
    if clock is None:
        raise ConfigError(
            f"{endpoint.name}: it reads a clock that was handed in: give the device the same one (clock=)"
        )
    endpoint.read_clock(clock)


class OwnDatapath(Owned):
    """A userspace datapath for *queue_pairs* pairs. threaded, poll_us: as in `NetDevice`. backends: one a pair."""

    def __init__(self, queue_pairs: int, threaded: bool, poll_us: int) -> None:
        self.worker = Worker(queue_pairs, poll_us, "userspace-datapath", timeout_s=None) if threaded else None
        self._datapath = Datapath(queue_pairs, stepped=True) if self.worker is None else self.worker.datapath
        self.backends: Sequence[Backend] = (
            [UserspaceBackend(self._datapath, pair) for pair in range(queue_pairs)]
            if self.worker is None
            else self.worker.backends
        )

    @property
    def rows(self) -> Words:
        """The queue rows: int64[2 * queue_pairs, VQ_SLOTS]."""
        return self._datapath.vqs

    @property
    def stepped(self) -> Datapath:
        """The datapath, if there is no thread; otherwise ConfigError."""
        if self.worker is not None:
            raise ConfigError("the device has a thread: make it with threaded=False to step it")
        return self._datapath

    def plug(self, made: Sequence[tuple[int, int]]) -> None:
        """Learn the descriptors of kick and call of each queue that were *made* since, if there is no thread."""
        if self.worker is None:
            self._datapath.notify[:] = made

    @property
    def native_id(self) -> int:
        """The kernel's id of the thread. ConfigError if there is none."""
        if self.worker is None:
            raise ConfigError("the device has no thread: it was made with threaded=False")
        return self.worker.loop_thread.native_id

    def close(self) -> None:
        (self._datapath if self.worker is None else self.worker).close()
