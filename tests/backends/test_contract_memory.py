"""The rules of `vnetdp.backends.base` about memory, the dirty log and broken rings, asked of every kind of backend."""

from __future__ import annotations

import errno
import threading
from functools import partial

import pytest

from tests.backends.places import FEATURES, HIGH_GPA, LOW_GPA, Place, Stepped, refused
from tests.support.by_hand import NEXT, WRITE, frame
from vnetdp.backends.base import Backend
from vnetdp.shared.memory import DirtyLog, GuestMemory, Region, page_of
from vnetdp.testing import HandRing
from vnetdp.virtio import features as f
from vnetdp.virtio.queue import RECEIVEQ, TRANSMITQ, VRINGS
from vnetdp_kernels import rows as r
from vnetdp_kernels import spec

LOGGED = FEATURES | f.VHOST_F_LOG_ALL


def log_ring(backend: Backend, index: int, ring: HandRing, under: int | None) -> None:
    backend.set_vring_addr(index, ring.desc, ring.avail, ring.used, under)


# --- the dirty log ---


def test_every_page_that_is_written_is_logged_and_no_other(place: Place) -> None:
    receiveq, transmitq = place.rings[0]
    log = DirtyLog(place.memory.end)
    backend = place.bind()
    backend.set_log(log)
    receiveq.post(*range(8))
    place.feed(0, 1)
    place.wait_used(receiveq, 1)
    assert log.take() == [], "logged before VHOST_F_LOG_ALL"
    backend.set_features(LOGGED)
    log_ring(backend, RECEIVEQ, receiveq, receiveq.used)
    log_ring(backend, TRANSMITQ, transmitq, transmitq.used)
    with backend.hold():
        log.take()
    place.feed(0, 3)
    place.wait_used(receiveq, 4)
    with backend.hold():
        # Used rings are marked when kicks are asked for, too.
        written = {page_of(receiveq.buffer(n)) for n in (1, 2, 3)} | {page_of(receiveq.used)}
        assert set(log.take()) - {page_of(transmitq.used)} == written
    transmitq.send(0, frame(0))
    place.kicks[TRANSMITQ].signal()
    place.wait_used(transmitq, 1)
    with backend.hold():
        assert set(log.take()) - {page_of(receiveq.used)} == {page_of(transmitq.used)}
    backend.set_features(FEATURES)
    log.take()
    place.feed(0, 1)
    place.wait_used(receiveq, 5)
    assert log.take() == []
    backend.set_log(None)
    log.close()


@pytest.mark.parametrize("under", [None, LOW_GPA + 0xF0000])
def test_a_used_ring_is_logged_where_it_was_said(place: Place, under: int | None) -> None:
    receiveq = place.rings[0][RECEIVEQ]
    log = DirtyLog(place.memory.end)
    backend = place.configure(features=LOGGED)
    backend.set_log(log)
    log_ring(backend, RECEIVEQ, receiveq, under)
    receiveq.post(0)
    place.feed(0, 1)
    backend.set_backend(RECEIVEQ, place.endpoint)
    place.wait_used(receiveq, 1)
    with backend.hold():
        ring_pages = set() if under is None else {page_of(under)}
        assert set(log.take()) == ring_pages | {page_of(receiveq.buffer(0))}
    backend.set_log(None)
    log.close()


def test_what_binding_writes_is_logged(place: Place) -> None:
    ring = place.rings[0][TRANSMITQ]
    log = DirtyLog(place.memory.end)
    backend = place.configure(features=LOGGED)
    backend.set_log(log)
    log_ring(backend, TRANSMITQ, ring, ring.used)
    # The owner before left it so.
    ring.used_flags = spec.VIRTQ_USED_F_NO_NOTIFY
    with backend.hold():
        backend.set_backend(TRANSMITQ, place.endpoint)
        assert ring.used_flags == 0
        assert log.take() == [page_of(ring.used)]
    backend.set_log(None)
    log.close()


def test_logging_follows_a_new_log_under_traffic(place: Place) -> None:
    receiveq = place.rings[0][RECEIVEQ]
    backend = place.configure(features=LOGGED)
    log_ring(backend, RECEIVEQ, receiveq, receiveq.used)
    receiveq.post(*range(16))
    backend.set_backend(RECEIVEQ, place.endpoint)
    logs = [DirtyLog(place.memory.end) for _ in range(3)]
    for n, log in enumerate(logs):
        backend.set_log(log)
        with backend.hold():
            for other in logs:
                other.take()
        place.feed(0, 1)
        place.wait_used(receiveq, n + 1)
        with backend.hold():
            assert set(log.take()) == {page_of(receiveq.buffer(n)), page_of(receiveq.used)}
            assert [other.take() for other in logs] == [[]] * 3
    backend.set_log(None)
    for log in logs:
        log.close()


# --- the memory table ---


def moved(*kept: Region) -> GuestMemory:
    """Return memory whose window lies otherwise: a region below all others is new."""
    with GuestMemory.create([(0, 1 << 20)]) as extra:
        return GuestMemory([*extra.regions, *kept])


def test_memory_changes_under_a_bound_ring(place: Place) -> None:
    backend, _ = place.bind(0), place.bind(1)
    low, high = place.memory.regions
    with moved(low, high) as other:
        assert other.translate(HIGH_GPA, 1) != place.memory.translate(HIGH_GPA, 1)
        for n, memory in enumerate((other, place.memory, other, place.memory)):
            backend.set_memory(memory)
            for pair in range(2):
                receiveq, transmitq = place.rings[pair]
                receiveq.post(n)
                transmitq.send(n, frame(n))
                place.feed(pair, 1)
                for kick in place.kicks[2 * pair : 2 * pair + 2]:
                    kick.signal()
            for ring in (*place.rings[0], *place.rings[1]):
                place.wait_used(ring, n + 1)
    assert [backend.get_vring_base(i) for i in range(VRINGS)] == [4, 4]


@pytest.mark.parametrize("lost", [0, 1])
def test_memory_without_a_bound_ring_is_refused_and_changes_nothing(place: Place, lost: int) -> None:
    backends = place.bind(0), place.bind(1)
    kept = place.memory.regions[1 - lost]
    # The ring that stays would lie elsewhere in this window.
    with moved(kept) as without:
        for backend in backends:
            refused(errno.EFAULT, backend.set_memory, without)
        for pair in range(2):
            for n in range(3):
                place.rings[pair][TRANSMITQ].send(n, frame(n))
            place.kicks[2 * pair + TRANSMITQ].signal()
        for pair in range(2):
            place.wait_used(place.rings[pair][TRANSMITQ], 3)
        # Let go of the ring that it lacks, and it is as good as any.
        for index in range(VRINGS):
            backends[lost].set_backend(index, None)
        backends[1 - lost].set_memory(without)
        transmitq = place.rings[1 - lost][TRANSMITQ]
        transmitq.send(3, frame(3))
        place.kicks[2 * (1 - lost) + TRANSMITQ].signal()
        place.wait_used(transmitq, 4)
        refused(errno.EFAULT, backends[lost].set_backend, TRANSMITQ, place.endpoint)
        backends[0].set_memory(place.memory)


def test_buffers_may_lie_in_any_region(place: Place) -> None:
    low, high = place.rings[0][TRANSMITQ], place.rings[1][TRANSMITQ]
    place.bind()
    data = bytes(spec.NET_HDR_LEN) + frame(0, 200)
    place.memory.write(low.buffer(0), data[:100])
    place.memory.write(high.buffer(0), data[100:])
    low.put_desc(0, low.buffer(0), 100, NEXT, 1)
    low.put_desc(1, high.buffer(0), len(data) - 100)
    low.offer(0)
    place.kicks[TRANSMITQ].signal()
    place.wait_used(low, 1)
    assert place.backends[0].counters(TRANSMITQ)["bytes"] == 200


# --- broken rings, counters, and standing still ---


def test_a_broken_ring_stops_and_the_others_go_on(place: Place) -> None:
    backend, other = place.bind(0), place.bind(1)
    ring = place.rings[0][TRANSMITQ]
    ring.send(0, frame(0))
    ring.put_desc(1, 1 << 40, 60)
    ring.offer(1)
    place.kicks[TRANSMITQ].signal()
    place.wait_for(lambda: backend.status(TRANSMITQ) == r.E_ADDRESS, "the ring breaks")
    assert ring.taken() == [(0, 0)], "what was good before it is used"
    ring.send(2, frame(2))
    place.kicks[TRANSMITQ].signal()
    place.pass_by()
    assert ring.taken() == []
    assert backend.status(RECEIVEQ) == other.status(TRANSMITQ) == 0
    place.rings[0][RECEIVEQ].post(0)
    place.feed(0, 1)
    place.wait_used(place.rings[0][RECEIVEQ], 1)
    # The driver mends it, and the ring is bound anew where it stood.
    ring.put_desc(1, ring.buffer(1), 60)
    assert backend.get_vring_base(TRANSMITQ) == 1
    backend.set_backend(TRANSMITQ, place.endpoint)
    place.wait_used(ring, 3)
    assert backend.status(TRANSMITQ) == 0


def broken(backend: Backend, index: int) -> bool:
    return backend.status(index) == r.E_DIRECTION


def test_wrong_directions_break_a_ring(place: Place) -> None:
    backend = place.bind()
    receiveq, transmitq = place.rings[0]
    receiveq.put_desc(0, receiveq.buffer(0), 2048)
    receiveq.offer(0)
    transmitq.put_desc(0, transmitq.buffer(0), 2048, WRITE)
    transmitq.offer(0)
    place.feed(0, 1)
    for index in range(VRINGS):
        place.wait_for(partial(broken, backend, index), "E_DIRECTION")


def test_counters_are_of_the_ring(place: Place) -> None:
    backend = place.bind()
    receiveq, transmitq = place.rings[0]
    receiveq.post(0, 1)
    place.feed(0, 2)
    for n in range(3):
        transmitq.send(n, frame(n, 100))
    transmitq.send(3, b"")
    for index in range(VRINGS):
        place.kicks[index].signal()
    place.wait_used(receiveq, 2)
    place.wait_used(transmitq, 4)
    with backend.hold():
        sent, received = backend.counters(TRANSMITQ), backend.counters(RECEIVEQ)
    assert (sent["packets"], sent["bytes"], sent["dropped"]) == (3, 300, 1)
    assert (received["packets"], received["bytes"], received["dropped"]) == (2, 128, 0)
    assert set(sent) == {"packets", "bytes", "dropped", "calls", "kicks"}


def test_held_it_stands_still_for_several_verbs(place: Place) -> None:
    backend, other = place.bind(0), place.bind(1)
    ring = place.rings[0][TRANSMITQ]
    with backend.hold(), other.hold(), backend.hold():
        ring.send(0, frame(0))
        place.kicks[TRANSMITQ].signal()
        for index in range(VRINGS):
            backend.set_backend(index, None)
        backend.set_vring_base(TRANSMITQ, 0)
        backend.set_backend(TRANSMITQ, place.endpoint)
        assert ring.used_idx == 0
    place.wait_used(ring, 1)


def test_verbs_may_come_from_several_threads(place: Place) -> None:
    backends = place.bind(0), place.bind(1)
    errors: list[Exception] = []

    def toggle(pair: int) -> None:
        try:
            for _ in range(50):
                with backends[pair].hold():
                    backends[pair].set_backend(TRANSMITQ, None)
                    base = backends[pair].get_vring_base(TRANSMITQ)
                    backends[pair].set_vring_base(TRANSMITQ, base)
                    backends[pair].set_backend(TRANSMITQ, place.endpoint)
        except Exception as e:  # noqa: BLE001 - told by the test's own thread
            errors.append(e)

    threads = [threading.Thread(target=toggle, args=(pair,)) for pair in range(2)]
    for thread in threads:
        thread.start()
        if isinstance(place.runs, Stepped):
            thread.join()  # userspace backends are changed by one thread at a time
    for thread in threads:
        thread.join()
    assert errors == []
    place.pass_by()
