"""Starting and stopping an owner of a device's rings, verb by verb, with the reverse unwind.

The order is QEMU's: for each vhost device features, memory and log, for each of its rings size, base, addresses, kick and
call; then its rings are bound. What fails is undone in reverse, and each ring's next index is exact again: a ring
that was bound gives its own, one that never was keeps the old one.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass

from vnetdp_kernels.atomic import load_u16_acquire
from vnetdp_kernels.layout import VIRTQ_RING_IDX

from .backends.base import VRINGS, Backend
from .endpoints.base import Endpoint
from .errors import BackendError
from .memory import DirtyLog, GuestMemory
from .notify import EventFd
from .virtqueue import Virtqueue

_log = logging.getLogger("vnetdp.vhost_net")


@dataclass(frozen=True)
class Rings:
    """What an owner needs to know of a device: its queues (receiveq 2i, transmitq 2i + 1), notifiers and memory."""

    queues: Sequence[Virtqueue]
    kicks: Sequence[EventFd]
    calls: Sequence[EventFd]
    endpoint: Endpoint
    memory: GuestMemory
    log: DirtyLog | None
    features: int
    mtu: int | None


def start_vring(backend: Backend, rings: Rings, pair: int, index: int) -> None:
    """Configure and base one ring; it is not bound by this."""
    n = VRINGS * pair + index
    queue = rings.queues[n]
    backend.set_vring_num(index, queue.num)
    backend.set_vring_base(index, queue.last_avail_idx)
    logged = queue.used if rings.log is not None else None
    backend.set_vring_addr(index, queue.desc, queue.avail, queue.used, logged)
    backend.set_vring_kick(index, rings.kicks[n])
    backend.set_vring_call(index, rings.calls[n])


def stop_vring(backend: Backend, rings: Rings, pair: int, index: int) -> None:
    """Unbind one ring, and keep its next index in the device's queue.

    A backend that can't tell the index any more (it died, or the verb failed) leaves used.idx in guest memory to go
    by: local backends finish each chain they take, so it is the same.
    """
    queue = rings.queues[VRINGS * pair + index]
    try:
        backend.set_backend(index, None)
        queue.last_avail_idx = backend.get_vring_base(index)
    except BackendError as e:
        _log.warning("%s; going on from used.idx", e)
        queue.last_avail_idx = used_idx(rings.memory, queue)


def used_idx(memory: GuestMemory, queue: Virtqueue) -> int:
    """Return used.idx of a queue as it stands in guest memory."""
    return load_u16_acquire(memory.mem, memory.translate(queue.used + VIRTQ_RING_IDX, 2))


def start(backends: Sequence[Backend], rings: Rings) -> None:
    """Give every enabled ring to *backends*; on BackendError everything is undone first."""
    bound: list[tuple[int, int]] = []
    with ExitStack() as stack:
        for backend in backends:
            stack.enter_context(backend.hold())
        try:
            for pair, backend in enumerate(backends):
                if rings.mtu is not None:
                    backend.set_mtu(rings.mtu)
                backend.set_features(rings.features)
                backend.set_memory(rings.memory)
                backend.set_log(rings.log)
                enabled = [i for i in range(VRINGS) if rings.queues[VRINGS * pair + i].enabled]
                for index in enabled:
                    start_vring(backend, rings, pair, index)
                for index in enabled:
                    backend.set_backend(index, rings.endpoint)
                    bound.append((pair, index))
        except BackendError:
            for pair, index in reversed(bound):
                stop_vring(backends[pair], rings, pair, index)
            raise


def stop(backends: Sequence[Backend], rings: Rings) -> None:
    """Take every enabled ring back; afterwards no backend touches a ring, and each queue has its exact index."""
    with ExitStack() as stack:
        for backend in backends:
            stack.enter_context(backend.hold())
        for pair, backend in enumerate(backends):
            for index in range(VRINGS):
                if rings.queues[VRINGS * pair + index].enabled:
                    stop_vring(backend, rings, pair, index)
