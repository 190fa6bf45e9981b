"""Every place a vhost device can run, made alike, so that one contract can be asked of all of them.

A new kind of backend is one line in KINDS.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import pytest

from tests.support.by_hand import wait_for
from vnetdp.backends.base import Backend
from vnetdp.backends.faulty import Faults, FaultyBackend
from vnetdp.backends.process import WorkerProcess
from vnetdp.backends.userspace import UserspaceBackend
from vnetdp.backends.worker import Worker
from vnetdp.datapath.datapath import Datapath
from vnetdp.endpoints.loopback import GenerateEndpoint
from vnetdp.errors import BackendError
from vnetdp.shared.memory import GuestMemory
from vnetdp.shared.notify import EventFd
from vnetdp.testing import HandRing
from vnetdp.virtio import features as f
from vnetdp.virtio.queue import RECEIVEQ, TRANSMITQ
from vnetdp_kernels import rows as r

LOW_GPA = 1 << 30
HIGH_GPA = 1 << 32
REGION_LEN = 1 << 20
FEATURES = f.VIRTIO_F_VERSION_1 | f.VIRTIO_NET_F_MRG_RXBUF


class Runs(Protocol):
    """Whatever runs the backends of a place by itself: a worker in a thread, or in a process."""

    @property
    def backends(self) -> Sequence[Backend]: ...
    def close(self) -> None: ...


class Stepped:
    """Userspace backends, run in the caller's thread whenever a test waits."""

    def __init__(self, pairs: int) -> None:
        self.datapath = Datapath(pairs)
        self.backends = [UserspaceBackend(self.datapath, pair) for pair in range(pairs)]

    def close(self) -> None:
        for backend in self.backends:
            for index in (RECEIVEQ, TRANSMITQ):
                backend.set_backend(index, None)
        self.datapath.close()


class Wrapped:
    """A worker whose backends pass through `FaultyBackend`, with no faults to strike."""

    def __init__(self, pairs: int) -> None:
        self._worker = Worker(pairs)
        self.backends = [FaultyBackend(inner, pair, Faults()) for pair, inner in enumerate(self._worker.backends)]

    def close(self) -> None:
        self._worker.close()


PAIRS = 2


class Spare:
    """A worker process that is there already when it is wanted: it takes its time to start, while other tests run."""

    def __init__(self) -> None:
        self._next = WorkerProcess(PAIRS)

    def take(self) -> WorkerProcess:
        """Return it, and start another."""
        taken, self._next = self._next, WorkerProcess(PAIRS)
        return taken

    def close(self) -> None:
        self._next.close()


KINDS: dict[str, Callable[[Spare], Runs]] = {
    "userspace": lambda _: Stepped(PAIRS),
    "worker": lambda _: Worker(PAIRS),
    "busy worker": lambda _: Worker(PAIRS, poll_us=-1),
    "faulty": lambda _: Wrapped(PAIRS),
    "process": lambda spare: spare.take(),
}


class Place:
    """Two vhost devices of one kind over one endpoint, and their four rings by hand in guest memory of two regions.

    The endpoint takes every frame, and gives as many as `feed` says. Nothing is configured yet.
    """

    def __init__(self, kind: str, spare: Spare) -> None:
        self.runs = KINDS[kind](spare)
        self.memory = GuestMemory.create([(LOW_GPA, REGION_LEN), (HIGH_GPA, REGION_LEN)])
        self.endpoint = GenerateEndpoint(2, count=0)
        low = HandRing(self.memory, LOW_GPA)
        high = HandRing(self.memory, HIGH_GPA)
        self.rings = [
            (low, HandRing(self.memory, low.end)),
            (high, HandRing(self.memory, high.end)),
        ]
        self.kicks = [EventFd() for _ in range(4)]
        self.calls = [EventFd() for _ in range(4)]

    @property
    def backends(self) -> Sequence[Backend]:
        return self.runs.backends

    def configure(self, pair: int = 0, base: int = 0, features: int = FEATURES) -> Backend:
        """Do all that comes before binding."""
        backend = self.backends[pair]
        backend.set_features(features)
        backend.set_memory(self.memory)
        for index, ring in enumerate(self.rings[pair]):
            backend.set_vring_num(index, ring.num)
            backend.set_vring_base(index, base)
            backend.set_vring_addr(index, ring.desc, ring.avail, ring.used)
            backend.set_vring_kick(index, self.kicks[2 * pair + index])
            backend.set_vring_call(index, self.calls[2 * pair + index])
        return backend

    def bind(self, pair: int = 0, base: int = 0, features: int = FEATURES) -> Backend:
        """Configure a pair and bind both its rings; the call that comes with it is taken."""
        backend = self.configure(pair, base, features)
        for index in (RECEIVEQ, TRANSMITQ):
            backend.set_backend(index, self.endpoint)
            self.wait_for_call(2 * pair + index)
        return backend

    def wait_for_call(self, n: int) -> None:
        """Take a call of queue *n*, once it comes."""
        self.wait_for(lambda: bool(self.calls[n].clear()), "a call")

    def feed(self, pair: int, frames: int) -> None:
        """Have the endpoint make so many frames more. No descriptor tells of them, so a hold makes a worker look."""
        self.endpoint.rows[pair, r.EP_LIMIT] += frames
        with self.backends[pair].hold():
            pass

    def wait_for(self, done: Callable[[], bool], what: str) -> None:
        """Run the place until *done* says so."""

        def pump() -> bool:
            if isinstance(self.runs, Stepped):
                self.runs.datapath.run(-1, 0, 0)
            return done()

        wait_for(pump, what)

    def wait_used(self, ring: HandRing, used_idx: int) -> None:
        self.wait_for(lambda: ring.used_idx == used_idx, f"used.idx == {used_idx}, not {ring.used_idx}")

    def pass_by(self, pair: int = 1) -> None:
        """Return after a pass over all rings that began after the call; pair *pair*, bound and idle, is witness.

        A frame it moves may belong to a pass already begun; the one after that can't.
        """
        ring = self.rings[pair][TRANSMITQ]
        for _ in range(2):
            then = ring.used_idx
            ring.send(0, bytes(60))
            self.kicks[2 * pair + TRANSMITQ].signal()
            self.wait_used(ring, (then + 1) & 0xFFFF)

    def close(self) -> None:
        self.runs.close()
        for event in (*self.kicks, *self.calls):
            event.close()
        self.endpoint.close()
        self.memory.close()


def refused(code: int, call: Callable[..., object], *args: object) -> BackendError:
    """Check that a verb fails with *code*."""
    with pytest.raises(BackendError) as caught:
        call(*args)
    assert caught.value.errno == code, caught.value
    assert caught.value.verb == call.__name__
    return caught.value
