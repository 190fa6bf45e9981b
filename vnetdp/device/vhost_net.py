"""Starting and stopping an owner of a device's rings, verb by verb, with the reverse unwind.

The order is QEMU's: for each vhost device features, memory and log, for each of its rings size, base, addresses, kick and
call; when all that is done (`configure`), the rings are bound (`bind`). The two can lie far apart: a migration configures
early and binds last. A failed start is undone in reverse, and each ring's next index is exact again: a ring that was
bound gives its own, a ring that never was keeps the old one.
"""

from __future__ import annotations

import errno
import logging
import time
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from operator import attrgetter

from vnetdp_kernels import spec
from vnetdp_kernels.platform.atomic import load_u16_acquire
from vnetdp_kernels.virtq.memory import mark_dirty

from ..backends.base import Backend
from ..endpoints.base import Endpoint
from ..errors import BackendError, UnbindError
from ..shared.memory import DirtyLog, GuestMemory
from ..shared.notify import EventFd
from ..virtio.queue import VRINGS, Virtqueue, pair_of, queue_of, ring_len, vring_of

_log = logging.getLogger("vnetdp.vhost_net")

# Compared for all queues at once during a blackout: written out, a property a queue costs three times as much.
_setup_of = attrgetter("enabled", "num", "desc", "avail", "used")


@dataclass(slots=True)
class Rings:
    """A device as its owners see it: its queues (receiveq 2i, transmitq 2i + 1), notifiers and memory.

    broken: queues that no owner gets, until the driver resets them.
    """

    queues: Sequence[Virtqueue]
    kicks: Sequence[EventFd]
    calls: Sequence[EventFd]
    endpoint: Endpoint
    memory: GuestMemory
    log: DirtyLog | None
    features: int
    mtu: int | None
    broken: Collection[int] = ()

    def may_run(self, n: int) -> bool:
        """True if queue *n* is one for an owner to serve: enabled, and not broken."""
        return self.queues[n].enabled and n not in self.broken

    def setups(self) -> list[object]:
        """Return the setup of each queue for an owner, its base aside; None for a queue that may not run."""
        if self.broken:
            return [_setup_of(queue) if self.may_run(n) else None for n, queue in enumerate(self.queues)]
        return [setup if setup[0] else None for setup in map(_setup_of, self.queues)]


@dataclass
class Prepared:
    """The setup that an owner was told since its last stop: `configure` tells it only the changes."""

    mtu: int | None = None
    features: int | None = None
    memory: tuple[GuestMemory, DirtyLog | None] | None = None
    setups: list[object] = field(default_factory=list)  # by queue
    bases: dict[int, int] = field(default_factory=dict)
    failed_ns: int = 0  # when binding failed, CLOCK_MONOTONIC


def one_a_worker(backends: Sequence[Backend]) -> list[Backend]:
    """Return one backend for each worker: to pause it pauses every backend of that worker."""
    return list({id(backend.worker): backend for backend in backends}.values())


@contextmanager
def standing_still(backends: Sequence[Backend]) -> Iterator[None]:
    """Pause every backend for the length of the block; each worker once."""
    with ExitStack() as stack:
        for backend in one_a_worker(backends):
            stack.enter_context(backend.hold())
        yield


def enabled_queues(rings: Rings) -> list[tuple[int, int, int]]:
    """Return (queue, pair, vring) of each enabled queue, in order."""
    return [(n, pair_of(n), vring_of(n)) for n, queue in enumerate(rings.queues) if queue.enabled]


def start_vring(backend: Backend, rings: Rings, pair: int, index: int) -> None:
    """Configure and base one ring; it is not bound by this."""
    n = queue_of(pair, index)
    queue = rings.queues[n]
    backend.set_vring_num(index, queue.num)
    backend.set_vring_base(index, queue.last_avail_idx)
    logged = queue.used if rings.log is not None else None
    backend.set_vring_addr(index, queue.desc, queue.avail, queue.used, logged)
    backend.set_vring_kick(index, rings.kicks[n])
    backend.set_vring_call(index, rings.calls[n])


def stop_vring(backend: Backend, rings: Rings, pair: int, index: int) -> BackendError | None:
    """Unbind one ring, and keep its next index in the device's queue; return the error of a backend that is gone.

    If the backend can't tell the index any more (it died, or the verb failed), used.idx in guest memory is taken: local
    backends finish each chain they take, so it is the same. UnbindError, and the index as it was, if the backend may go
    on with the ring.
    """
    queue = rings.queues[queue_of(pair, index)]
    gone: BackendError | None = None
    try:
        backend.set_backend(index, None)
    except UnbindError:
        raise
    except BackendError as e:
        if e.errno != errno.ESRCH:  # a backend that is gone says so again, when asked next
            _log.warning("%s; get_vring_base unbinds the ring too", e)
    try:
        queue.last_avail_idx = backend.get_vring_base(index)
    except BackendError as e:
        # That a backend is gone is said once for all its rings, when the next owner gets them.
        gone = e if e.errno == errno.ESRCH else None
        _log.log(logging.INFO if gone else logging.WARNING, "%s; the next owner begins at used.idx", e)
        queue.last_avail_idx = used_idx(rings.memory, queue)
        if rings.log is not None:
            # It may have been killed between a write to the used ring and its mark.
            mark_dirty(rings.log.log, queue.used, ring_len(queue.num)[2])
    if queue_of(pair, index) in rings.broken:
        # Under any owner, the chain that broke the queue is not used; this backend may never have had that chain.
        queue.last_avail_idx = used_idx(rings.memory, queue)
    return gone


def used_idx(memory: GuestMemory, queue: Virtqueue) -> int:
    """Return used.idx of a queue in guest memory; once guest memory is closed, the queue's last_avail_idx."""
    if memory.closed:
        return queue.last_avail_idx
    return load_u16_acquire(memory.mem, memory.translate(queue.used + spec.VIRTQ_RING_IDX, 2))


def configure(backends: Sequence[Backend], rings: Rings, prepared: Prepared) -> None:
    """Tell *backends* the settings that *prepared* lacks; bind nothing, and leave a known ring's base to `bind`.

    None of their rings may be bound. On BackendError forget *prepared*: nothing is bound, so there is nothing to undo.
    """
    memory = rings.memory, rings.log
    new_mtu = rings.mtu is not None and prepared.mtu != rings.mtu
    new_features = prepared.features != rings.features
    new_memory = prepared.memory != memory
    setups = rings.setups()
    known = [None] * len(setups) if new_memory or not prepared.setups else prepared.setups
    if not (new_mtu or new_features or new_memory) and setups == known:
        return
    for pair, backend in enumerate(backends):
        if new_mtu and rings.mtu is not None:
            backend.set_mtu(rings.mtu)
        if new_features:
            backend.set_features(rings.features)
        if new_memory:
            backend.set_memory(rings.memory)
            backend.set_log(rings.log)
        for index in range(VRINGS):
            n = queue_of(pair, index)
            if setups[n] is not None and setups[n] != known[n]:
                start_vring(backend, rings, pair, index)
                prepared.bases[n] = rings.queues[n].last_avail_idx
    prepared.mtu, prepared.features, prepared.memory = rings.mtu, rings.features, memory
    prepared.setups = setups


def bind(backends: Sequence[Backend], rings: Rings, prepared: Prepared, one_site: bool) -> None:
    """Set the base of every ring that may run and bind it; on any exception unbind the rings tried, with their indices.

    one_site: one thread runs all *backends*, so it may take all rings at once.
    """
    broken = rings.broken
    wanted = [(n, queue.last_avail_idx) for n, queue in enumerate(rings.queues) if queue.enabled and n not in broken]
    if one_site and wanted and backends[0].bind_rings(wanted, rings.endpoint):
        return
    tried: list[tuple[int, int]] = []
    try:
        for n, base in wanted:
            if prepared.bases[n] != base:
                backends[pair_of(n)].set_vring_base(vring_of(n), base)
                prepared.bases[n] = base
        for n, _ in wanted:
            tried.append((pair_of(n), vring_of(n)))  # a ring whose binding fails may have run for a moment
            backends[pair_of(n)].set_backend(vring_of(n), rings.endpoint)
    except BaseException as e:
        prepared.failed_ns = time.monotonic_ns()
        stop_vrings(backends, rings, reversed(tried), e)
        raise


def start(backends: Sequence[Backend], rings: Rings) -> None:
    """Give every ring that may run to *backends*; on BackendError everything is undone first."""
    prepared = Prepared()
    with standing_still(backends):
        configure(backends, rings, prepared)
        bind(backends, rings, prepared, len(one_a_worker(backends)) == 1)


def set_log(backends: Sequence[Backend], rings: Rings) -> None:
    """Tell backends that serve *rings* of a dirty log, or that there is none any more; on BackendError some know of it."""
    with standing_still(backends):
        for pair, backend in enumerate(backends):
            backend.set_log(rings.log)
            backend.set_features(rings.features)
            for vring in range(VRINGS):
                if rings.may_run(queue_of(pair, vring)):
                    q = rings.queues[queue_of(pair, vring)]
                    backend.set_vring_addr(vring, q.desc, q.avail, q.used, q.used if rings.log else None)


def stop(backends: Sequence[Backend], rings: Rings) -> BackendError | None:
    """Take every enabled ring back; afterwards no backend touches a ring, and each queue has its exact index.

    Returns the error of a backend that was gone. UnbindError if a backend may go on with a ring; all others are taken back.
    """
    with standing_still(backends):
        return stop_vrings(backends, rings, [(pair, index) for _, pair, index in enabled_queues(rings)])


def stop_vrings(
    backends: Sequence[Backend], rings: Rings, which: Iterable[tuple[int, int]], cause: BaseException | None = None
) -> BackendError | None:
    """Take back the rings *which*, (pair, index) each; return the error of a backend that was gone.

    UnbindError, after all of them, if a backend may go on with a ring.
    """
    kept: UnbindError | None = None
    gone: BackendError | None = None
    for pair, index in which:
        try:
            gone = stop_vring(backends[pair], rings, pair, index) or gone
        except UnbindError as e:
            kept = kept or e
    if kept is not None:
        raise kept from cause
    return gone
