"""The rules of `vnetdp.backends.base`, asked of every kind of backend."""

from __future__ import annotations

import errno

import pytest

from tests.backends.places import FEATURES, LOW_GPA, REGION_LEN, Place, Spare, refused
from tests.support.by_hand import frame
from vnetdp.endpoints.loopback import GenerateEndpoint, NullEndpoint
from vnetdp.shared.notify import EventFd
from vnetdp.virtio import features as f
from vnetdp.virtio.queue import RECEIVEQ, TRANSMITQ, VRINGS
from vnetdp_kernels import rows as r
from vnetdp_kernels import spec

# --- size, base, addresses ---


def test_sizes_bases_and_rings_have_limits(place: Place) -> None:
    backend = place.backends[0]
    for num in (-1, 0, 3, 255, 0x10000, 1 << 17):
        refused(errno.EINVAL, backend.set_vring_num, RECEIVEQ, num)
    backend.set_vring_base(TRANSMITQ, 0xFFFF)
    for base in (-1, 0x10000):
        refused(errno.EINVAL, backend.set_vring_base, TRANSMITQ, base)
    assert backend.get_vring_base(TRANSMITQ) == 0xFFFF
    for mtu in (-1, 0, 67, 65536):
        refused(errno.EINVAL, backend.set_mtu, mtu)
    backend.set_mtu(68)
    backend.set_mtu(65535)
    for index in (-1, VRINGS):
        refused(errno.ENOBUFS, backend.set_vring_num, index, 16)
        refused(errno.ENOBUFS, backend.set_vring_base, index, 0)
        refused(errno.ENOBUFS, backend.get_vring_base, index)
        refused(errno.ENOBUFS, backend.set_vring_addr, index, 0, 0, 0)
        refused(errno.ENOBUFS, backend.set_vring_kick, index, None)
        refused(errno.ENOBUFS, backend.set_vring_call, index, None)
        refused(errno.ENOBUFS, backend.set_vring_enable, index, True)
        refused(errno.ENOBUFS, backend.set_vring_inflight, index, 0, 0)
        refused(errno.ENOBUFS, backend.set_backend, index, None)
        refused(errno.ENOBUFS, backend.set_backend, index, place.endpoint)


def test_a_bound_ring_keeps_its_size_and_base(place: Place) -> None:
    backend = place.bind()
    for index in (RECEIVEQ, TRANSMITQ):
        refused(errno.EBUSY, backend.set_vring_num, index, 32)
        refused(errno.EBUSY, backend.set_vring_base, index, 5)
    ring = place.rings[0][TRANSMITQ]
    ring.send(0, frame(0))
    place.kicks[TRANSMITQ].signal()
    place.wait_used(ring, 1)
    backend.set_backend(RECEIVEQ, None)
    backend.set_vring_num(RECEIVEQ, 32)
    backend.set_vring_base(RECEIVEQ, 5)
    assert backend.get_vring_base(RECEIVEQ) == 5
    assert backend.get_vring_base(TRANSMITQ) == 1


def test_addresses_are_aligned_and_in_memory(place: Place) -> None:
    backend = place.configure()
    ring = place.rings[0][TRANSMITQ]
    good = [ring.desc, ring.avail, ring.used]
    for part, skew in enumerate((8, 1, 2)):
        misaligned, outside, across = good.copy(), good.copy(), good.copy()
        misaligned[part] += skew
        outside[part] = 0x1000
        across[part] = LOW_GPA + REGION_LEN - 16
        refused(errno.EINVAL, backend.set_vring_addr, TRANSMITQ, *misaligned)
        refused(errno.EFAULT, backend.set_vring_addr, TRANSMITQ, *outside)
        refused(errno.EFAULT, backend.set_vring_addr, TRANSMITQ, *across)
        for beyond in (1 << 63, 1 << 64, -(1 << 63)):
            wrong = good.copy()
            wrong[part] = beyond
            refused(errno.EFAULT, backend.set_vring_addr, TRANSMITQ, *wrong)
    # Nothing changed: the ring is still where it was.
    backend.set_backend(TRANSMITQ, place.endpoint)
    ring.send(0, frame(0))
    place.kicks[TRANSMITQ].signal()
    place.wait_used(ring, 1)


def test_addresses_come_after_memory_and_size(place: Place) -> None:
    backend = place.backends[0]
    refused(errno.EFAULT, backend.set_vring_addr, TRANSMITQ, LOW_GPA, LOW_GPA + 0x1000, LOW_GPA + 0x2000)
    backend.set_memory(place.memory)
    refused(errno.EFAULT, backend.set_vring_addr, TRANSMITQ, LOW_GPA, LOW_GPA + 0x1000, LOW_GPA + 0x2000)
    backend.set_vring_num(TRANSMITQ, 16)
    backend.set_vring_addr(TRANSMITQ, LOW_GPA, LOW_GPA + 0x1000, LOW_GPA + 0x2000)


def test_a_ring_that_grew_past_memory_is_not_bound(place: Place) -> None:
    backend = place.configure()
    at = LOW_GPA + REGION_LEN - 16 * 16
    backend.set_vring_addr(TRANSMITQ, at, LOW_GPA, LOW_GPA + 0x1000)
    backend.set_vring_num(TRANSMITQ, 32)
    refused(errno.EFAULT, backend.set_backend, TRANSMITQ, place.endpoint)
    backend.set_vring_num(TRANSMITQ, 16)
    backend.set_backend(TRANSMITQ, place.endpoint)


# --- binding ---


def test_binding_needs_size_addresses_and_memory(place: Place) -> None:
    backend = place.backends[0]
    ring = place.rings[0][TRANSMITQ]
    refused(errno.EFAULT, backend.set_backend, TRANSMITQ, place.endpoint)
    backend.set_memory(place.memory)
    refused(errno.EFAULT, backend.set_backend, TRANSMITQ, place.endpoint)
    backend.set_vring_num(TRANSMITQ, ring.num)
    refused(errno.EFAULT, backend.set_backend, TRANSMITQ, place.endpoint)
    assert place.endpoint.polls_started == place.endpoint.polls_stopped
    backend.set_vring_addr(TRANSMITQ, ring.desc, ring.avail, ring.used)
    backend.set_backend(TRANSMITQ, place.endpoint)


def test_binding_looks_once_without_a_kick(place: Place) -> None:
    receiveq, transmitq = place.rings[0]
    receiveq.post(0, 1)
    transmitq.send(0, frame(0))
    place.feed(0, 1)
    place.bind()
    place.wait_used(transmitq, 1)
    place.wait_used(receiveq, 1)
    assert transmitq.taken() == [(0, 0)]
    assert receiveq.taken() == [(0, spec.NET_HDR_LEN + 64)]


def test_used_idx_is_read_when_the_ring_is_bound(place: Place) -> None:
    ring = place.rings[0][TRANSMITQ]
    backend = place.configure(base=7)
    # What a migration does: the last page arrives after everything but the binding is done.
    ring.avail_idx = 7
    ring.used_idx = 0xFFFF
    ring.send(3, frame(0))
    backend.set_backend(TRANSMITQ, place.endpoint)
    place.wait_used(ring, 0)
    assert place.memory.read(ring.used + 4 + 8 * 15, 8) == bytes([3, 0, 0, 0, 0, 0, 0, 0])
    assert backend.get_vring_base(TRANSMITQ) == 8


def test_indices_go_on_from_the_base_and_wrap(place: Place) -> None:
    receiveq, transmitq = place.rings[0]
    for base in (1, 0x7FFF, 0xFFF8, 0xFFFF):
        for ring in place.rings[0]:
            ring.avail_idx = ring.used_idx = base
            ring.taken_from(base)
        receiveq.post(*range(12))
        backend = place.bind(base=base)
        place.feed(0, 12)
        for n in range(12):
            transmitq.send(n, frame(n))
        place.kicks[TRANSMITQ].signal()
        place.wait_used(transmitq, (base + 12) & 0xFFFF)
        place.wait_used(receiveq, (base + 12) & 0xFFFF)
        assert [head for head, _ in transmitq.taken()] == list(range(12))
        assert [head for head, _ in receiveq.taken()] == list(range(12))
        assert [backend.get_vring_base(i) for i in range(VRINGS)] == [(base + 12) & 0xFFFF] * 2


def test_a_base_that_is_not_the_ring_s_breaks_it(place: Place) -> None:
    backend = place.bind(base=100)
    place.wait_for(lambda: backend.status(TRANSMITQ) == r.E_AVAIL_IDX, "E_AVAIL_IDX")


def test_a_second_binding_changes_nothing(place: Place) -> None:
    backend = place.bind()
    ring = place.rings[0][TRANSMITQ]
    ring.send(0, frame(0))
    place.kicks[TRANSMITQ].signal()
    place.wait_used(ring, 1)
    backend.set_backend(TRANSMITQ, place.endpoint)
    ring.send(1, frame(1))
    place.kicks[TRANSMITQ].signal()
    place.wait_used(ring, 2)
    assert ring.taken() == [(0, 0), (1, 0)]
    assert place.endpoint.polls_started == 1


def test_binding_forgets_what_was_known_of_the_ring(place: Place) -> None:
    receiveq = place.rings[0][RECEIVEQ]
    backend = place.bind(features=FEATURES | f.VIRTIO_RING_F_EVENT_IDX)
    place.bind(1)
    receiveq.post(*range(8))
    place.feed(0, 5)
    place.wait_used(receiveq, 5)
    receiveq.used_event = 4
    backend.set_backend(RECEIVEQ, None)
    # The driver lays the ring out anew, where the old one was: 4 buffers used, and one more available.
    receiveq.avail_idx, receiveq.used_idx = 4, 4
    receiveq.post(0)
    place.calls[RECEIVEQ].clear()
    backend.set_vring_base(RECEIVEQ, 4)
    backend.set_backend(RECEIVEQ, place.endpoint)
    place.feed(0, 2)
    place.wait_used(receiveq, 5)
    place.wait_for(lambda: place.calls[RECEIVEQ].clear() > 0, "a call, though index 5 was signalled before")
    place.pass_by()
    assert receiveq.used_idx == 5, "buffers that are not available any more were used"
    # The same without another base: what it knew to be available is not.
    receiveq.post(1, 2)
    place.kicks[RECEIVEQ].signal()
    place.wait_used(receiveq, 6)
    backend.set_backend(RECEIVEQ, None)
    receiveq.avail_idx = 6
    backend.set_backend(RECEIVEQ, place.endpoint)
    place.feed(0, 1)
    place.pass_by()
    assert receiveq.used_idx == 6


def test_an_endpoint_needs_a_queue_for_each_pair(place: Place) -> None:
    backend = place.configure(pair=1)
    with NullEndpoint(1) as narrow:
        refused(errno.ENOTSOCK, backend.set_backend, TRANSMITQ, narrow)
        # The other pair may use it, and runs.
        first = place.configure(pair=0)
        first.set_backend(TRANSMITQ, narrow)
        place.rings[0][TRANSMITQ].send(0, frame(0))
        place.kicks[TRANSMITQ].signal()
        place.wait_used(place.rings[0][TRANSMITQ], 1)
        first.set_backend(TRANSMITQ, None)
        assert narrow.polls_started == narrow.polls_stopped


def test_an_endpoint_may_have_more_queues_than_are_used(place: Place) -> None:
    with GenerateEndpoint(64, count=0) as wide:
        backend = place.configure()
        backend.set_backend(TRANSMITQ, wide)
        place.rings[0][TRANSMITQ].send(0, frame(0))
        place.kicks[TRANSMITQ].signal()
        place.wait_used(place.rings[0][TRANSMITQ], 1)
        backend.set_backend(TRANSMITQ, None)


def test_one_device_has_one_endpoint(place: Place) -> None:
    backend = place.bind()
    with NullEndpoint(2) as other:
        backend.set_backend(TRANSMITQ, None)
        refused(errno.EBUSY, backend.set_backend, TRANSMITQ, other)
        assert not other.polled_by
        backend.set_backend(RECEIVEQ, None)
        backend.set_backend(TRANSMITQ, other)
        assert other.polled_by
        backend.set_backend(TRANSMITQ, None)
        assert other.polls_started == other.polls_stopped


def test_an_endpoint_has_one_owner(place: Place, spare: Spare) -> None:
    second = Place("worker", spare)
    mine = place.bind()
    theirs = second.configure()
    for index in (RECEIVEQ, TRANSMITQ):
        refused(errno.EBUSY, theirs.set_backend, index, place.endpoint)
    assert place.endpoint.polls_started == 1
    theirs.set_backend(TRANSMITQ, None)
    mine.set_backend(RECEIVEQ, None)
    refused(errno.EBUSY, theirs.set_backend, RECEIVEQ, place.endpoint)
    mine.set_backend(TRANSMITQ, None)
    theirs.set_backend(TRANSMITQ, place.endpoint)
    refused(errno.EBUSY, mine.set_backend, TRANSMITQ, place.endpoint)
    second.rings[0][TRANSMITQ].send(0, frame(0))
    second.kicks[TRANSMITQ].signal()
    second.wait_used(second.rings[0][TRANSMITQ], 1)
    second.close()
    assert not place.endpoint.polled_by
    assert place.endpoint.polls_started == place.endpoint.polls_stopped


# --- unbinding ---


def test_unbinding_can_be_repeated(place: Place) -> None:
    backend = place.backends[0]
    backend.set_backend(TRANSMITQ, None)
    place.bind()
    for _ in range(3):
        backend.set_backend(TRANSMITQ, None)
    backend.set_backend(RECEIVEQ, None)
    backend.set_backend(RECEIVEQ, None)
    assert place.endpoint.polls_started == place.endpoint.polls_stopped == 1


def test_get_vring_base_keeps_the_base(place: Place) -> None:
    backend = place.backends[0]
    assert backend.get_vring_base(TRANSMITQ) == 0
    place.configure(base=300)
    assert [backend.get_vring_base(TRANSMITQ) for _ in range(2)] == [300, 300]


@pytest.mark.parametrize("verb", ["get_vring_base", "set_backend"])
def test_nothing_touches_a_ring_that_is_let_go(place: Place, verb: str) -> None:
    backend, _ = place.bind(0), place.bind(1)
    receiveq, transmitq = place.rings[0]
    for n in range(3):
        transmitq.send(n, frame(n))
    place.kicks[TRANSMITQ].signal()
    place.wait_used(transmitq, 3)
    for index in (RECEIVEQ, TRANSMITQ):
        if verb == "get_vring_base":
            assert backend.get_vring_base(index) == 3 * index
        else:
            backend.set_backend(index, None)
    for kick in place.kicks[:2]:
        kick.clear()
    place.feed(0, 5)
    receiveq.post(*range(8))
    for n in range(3, 8):
        transmitq.send(n, frame(n))
    before = receiveq.content(), transmitq.content()
    for kick in place.kicks[:2]:
        kick.signal()
    place.pass_by()
    assert (receiveq.content(), transmitq.content()) == before
    assert [kick.clear() for kick in place.kicks[:2]] == [1, 1]
    assert place.calls[RECEIVEQ].clear() == 0
    # Bound again, each chain that was waiting is used, and none twice.
    assert [backend.get_vring_base(i) for i in range(VRINGS)] == [0, 3]
    for index in (RECEIVEQ, TRANSMITQ):
        backend.set_backend(index, place.endpoint)
    place.wait_used(transmitq, 8)
    place.wait_used(receiveq, 5)
    assert [head for head, _ in transmitq.taken()] == list(range(8))
    assert [head for head, _ in receiveq.taken()] == list(range(5))


def test_one_ring_of_a_pair_goes_on_without_the_other(place: Place) -> None:
    backend = place.bind()
    receiveq, transmitq = place.rings[0]
    backend.set_backend(TRANSMITQ, None)
    receiveq.post(0)
    place.feed(0, 1)
    place.kicks[RECEIVEQ].signal()
    place.wait_used(receiveq, 1)
    assert place.endpoint.polled_by
    assert transmitq.used_idx == 0


def test_a_ring_that_is_disabled_uses_what_is_sent_and_does_nothing(place: Place) -> None:
    backend = place.bind()
    place.bind(1)
    receiveq, transmitq = place.rings[0]
    for index in range(VRINGS):
        backend.set_vring_enable(index, False)
    receiveq.post(0)
    place.feed(0, 1)
    transmitq.send(0, frame(0))
    place.kicks[TRANSMITQ].signal()
    place.wait_used(transmitq, 1)
    place.pass_by()
    assert transmitq.taken() == [(0, 0)]
    assert receiveq.used_idx == 0
    assert place.endpoint.rows[0, r.EP_TO_WIRE] == 0
    assert backend.counters(TRANSMITQ)["dropped"] == 1
    for index in range(VRINGS):
        backend.set_vring_enable(index, True)
    transmitq.send(1, frame(1))
    place.kicks[TRANSMITQ].signal()
    place.wait_used(transmitq, 2)
    place.wait_used(receiveq, 1)
    assert place.endpoint.rows[0, r.EP_TO_WIRE] == 1


# --- kick and call ---


def test_a_kick_wakes_the_ring_and_a_call_tells_of_it(place: Place) -> None:
    place.bind()
    ring = place.rings[0][TRANSMITQ]
    for n in range(4):
        ring.send(n, frame(n))
        place.kicks[TRANSMITQ].signal()
        place.wait_used(ring, n + 1)
        place.wait_for(lambda: place.calls[TRANSMITQ].clear() > 0, "a call")
    assert place.calls[RECEIVEQ].clear() == 0
    assert place.backends[0].counters(TRANSMITQ)["calls"] == 1 + 4


def test_no_kick_means_polling_and_no_call_means_silence(place: Place) -> None:
    backend = place.configure()
    backend.set_vring_kick(TRANSMITQ, None)
    backend.set_vring_call(TRANSMITQ, None)
    backend.set_backend(TRANSMITQ, place.endpoint)
    ring = place.rings[0][TRANSMITQ]
    for n in range(3):
        ring.send(n, frame(n))
        place.wait_used(ring, n + 1)
    assert place.calls[TRANSMITQ].clear() == 0


def test_kick_and_call_are_replaced_under_a_bound_ring(place: Place) -> None:
    backend = place.bind()
    ring = place.rings[0][TRANSMITQ]
    with EventFd() as kick, EventFd() as call:
        backend.set_vring_kick(TRANSMITQ, kick)
        backend.set_vring_call(TRANSMITQ, call)
        ring.send(0, frame(0))
        kick.signal()
        place.wait_used(ring, 1)
        place.wait_for(lambda: call.clear() > 0, "a call at the new eventfd")
        assert place.calls[TRANSMITQ].clear() == 0
        backend.set_vring_call(TRANSMITQ, None)
        backend.set_vring_kick(TRANSMITQ, None)
        ring.send(1, frame(1))
        place.wait_used(ring, 2)
    assert backend.get_vring_base(TRANSMITQ) == 2


@pytest.mark.parametrize("wants", [True, False])
def test_a_bound_ring_calls_once_unless_the_driver_wants_none(place: Place, wants: bool) -> None:
    """Whoever had the ring before may have left a decision open."""
    place.bind(1)
    ring = place.rings[0][TRANSMITQ]
    ring.avail_flags = 0 if wants else spec.VIRTQ_AVAIL_F_NO_INTERRUPT
    for _ in range(3):
        backend = place.configure()
        backend.set_backend(TRANSMITQ, place.endpoint)
        place.pass_by()
        place.pass_by()
        assert place.calls[TRANSMITQ].clear() == wants
        backend.set_backend(TRANSMITQ, None)


def test_the_driver_may_ask_for_no_calls(place: Place) -> None:
    backend = place.bind()
    place.bind(1)
    ring = place.rings[0][TRANSMITQ]
    ring.avail_flags = spec.VIRTQ_AVAIL_F_NO_INTERRUPT
    ring.send(0, frame(0))
    place.kicks[TRANSMITQ].signal()
    place.wait_used(ring, 1)
    place.pass_by()
    assert place.calls[TRANSMITQ].clear() == 0
    assert backend.counters(TRANSMITQ)["calls"] == 1


# --- features and MTU ---


def test_features_stand_while_a_ring_is_bound(place: Place) -> None:
    backend = place.bind()
    refused(errno.EBUSY, backend.set_features, FEATURES | f.VIRTIO_RING_F_EVENT_IDX)
    refused(errno.EBUSY, backend.set_features, (FEATURES | f.VHOST_F_LOG_ALL) & ~f.VIRTIO_NET_F_MRG_RXBUF)
    backend.set_features(FEATURES | f.VHOST_F_LOG_ALL)
    backend.set_features(FEATURES)
    for index in (RECEIVEQ, TRANSMITQ):
        backend.set_backend(index, None)
    backend.set_features(FEATURES | f.VIRTIO_RING_F_EVENT_IDX)


def test_what_it_cannot_do_it_refuses(place: Place) -> None:
    refused(errno.EOPNOTSUPP, place.backends[0].set_features, FEATURES | f.VIRTIO_F_RING_PACKED)


def test_the_header_is_as_long_as_the_features_say(place: Place) -> None:
    receiveq = place.rings[0][RECEIVEQ]
    for n, features in enumerate((0, f.VIRTIO_NET_F_MRG_RXBUF, f.VIRTIO_F_VERSION_1)):
        receiveq.post(n)
        backend = place.bind(base=n, features=features)
        place.feed(0, 1)
        place.wait_used(receiveq, n + 1)
        assert receiveq.taken() == [(n, 64 + (12 if features else 10))]
        for index in range(VRINGS):
            backend.set_backend(index, None)
