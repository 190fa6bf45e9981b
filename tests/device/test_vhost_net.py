"""Starting and stopping an owner: the order of the verbs, and the exact undoing of any that fails."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from dataclasses import replace

import pytest

from tests.support.by_hand import frame, no_descriptor_leaks
from vnetdp.backends.base import Backend
from vnetdp.backends.faulty import Fault, Faults, FaultyBackend
from vnetdp.backends.names import VERBS
from vnetdp.backends.userspace import UserspaceBackend
from vnetdp.datapath.datapath import Datapath
from vnetdp.device import vhost_net
from vnetdp.endpoints.loopback import NullEndpoint
from vnetdp.errors import BackendError
from vnetdp.shared.memory import DirtyLog, GuestMemory
from vnetdp.shared.notify import EventFd
from vnetdp.testing import HandRing
from vnetdp.virtio import features as f
from vnetdp.virtio.queue import RECEIVEQ, TRANSMITQ, Virtqueue
from vnetdp_kernels import rows as r
from vnetdp_kernels import spec

PAIRS = 3
BASE = 0xFFFE


class Tracing(Fault):
    """A fault that never strikes, and remembers every verb that it was asked about."""

    def __init__(self) -> None:
        super().__init__("set_mtu")
        self.calls: list[tuple[str, int, int | None]] = []

    def strikes(self, verb: str, pair: int, index: int | None) -> bool:
        self.calls.append((verb, pair, index))
        return False


class Bed:
    """Three pairs in userspace backends behind faults, all configured in a device's way; queues begin at BASE."""

    def __init__(self) -> None:
        self.memory = GuestMemory.create([(0, 1 << 22)])
        self.endpoint = NullEndpoint(PAIRS)
        self.datapath = Datapath(PAIRS)
        self.trace = Tracing()
        self.faults = Faults([self.trace])
        self.backends: list[Backend] = [
            FaultyBackend(UserspaceBackend(self.datapath, pair), pair, self.faults) for pair in range(PAIRS)
        ]
        self.ring_list: list[HandRing] = []
        at = 0
        for _ in range(2 * PAIRS):
            self.ring_list.append(HandRing(self.memory, at, 8, BASE))
            at = self.ring_list[-1].end
        self.events = [EventFd() for _ in range(4 * PAIRS)]
        self.log = DirtyLog(self.memory.end)
        queues = [Virtqueue(8, r.desc, r.avail, r.used, True, BASE) for r in self.ring_list]
        kicks, calls = self.events[: 2 * PAIRS], self.events[2 * PAIRS :]
        features = f.VIRTIO_F_VERSION_1
        self.rings = vhost_net.Rings(queues, kicks, calls, self.endpoint, self.memory, None, features, 1500)

    @property
    def bound(self) -> list[int]:
        return [int(bound) for bound in self.datapath.vqs[:, r.VQ_BOUND]]

    def close(self) -> None:
        self.datapath.close()
        self.log.close()
        for event in self.events:
            event.close()
        self.endpoint.close()
        self.memory.close()


@pytest.fixture
def bed() -> Iterator[Bed]:
    with no_descriptor_leaks():
        bed = Bed()
        yield bed
        assert bed.endpoint.polls_started == bed.endpoint.polls_stopped
        bed.close()


def test_verbs_come_in_order_and_each_ring_is_bound_last(bed: Bed) -> None:
    vhost_net.start(bed.backends, bed.rings)
    a_device = ["set_mtu", "set_features", "set_memory", "set_log"]
    a_ring = ["set_vring_num", "set_vring_base", "set_vring_addr", "set_vring_kick", "set_vring_call"]
    expected: list[tuple[str, int, int | None]] = []
    for pair in range(PAIRS):
        expected += [(verb, pair, None) for verb in a_device]
        expected += [(verb, pair, index) for index in (RECEIVEQ, TRANSMITQ) for verb in a_ring]
    expected += [("set_backend", pair, index) for pair in range(PAIRS) for index in (RECEIVEQ, TRANSMITQ)]
    assert bed.trace.calls == expected
    assert [*a_device, *a_ring, "set_backend", "get_vring_base"] == list(VERBS)
    assert bed.bound == [1] * 2 * PAIRS
    bed.trace.calls.clear()
    vhost_net.stop(bed.backends, bed.rings)
    assert bed.bound == [0] * 2 * PAIRS
    rings = [(pair, index) for pair in range(PAIRS) for index in range(2)]
    assert bed.trace.calls == [(verb, *ring) for ring in rings for verb in ("unbind", "get_vring_base")]
    assert [queue.last_avail_idx for queue in bed.rings.queues] == [BASE] * 2 * PAIRS


def test_queues_that_are_not_enabled_are_left_out(bed: Bed) -> None:
    for index in (0, 3, 4, 5):
        bed.rings.queues[index].enabled = False
        bed.rings.queues[index].desc = -1
    vhost_net.start(bed.backends, bed.rings)
    assert bed.bound == [0, 1, 1, 0, 0, 0]
    vhost_net.stop(bed.backends, bed.rings)


@pytest.mark.parametrize("mtu", [None, 9000])
def test_the_mtu_is_told_only_if_there_is_one(bed: Bed, mtu: int | None) -> None:
    rings = replace(bed.rings, mtu=mtu)
    vhost_net.start(bed.backends, rings)
    assert (("set_mtu", 0, None) in bed.trace.calls) == (mtu is not None)
    vhost_net.stop(bed.backends, rings)


def test_used_rings_are_logged_under_their_own_address(bed: Bed) -> None:
    rings = replace(bed.rings, log=bed.log, features=bed.rings.features | f.VHOST_F_LOG_ALL)
    vhost_net.start(bed.backends, rings)
    assert bed.datapath.vqs[:, r.VQ_LOG_USED].tolist() == [queue.used for queue in rings.queues]
    vhost_net.stop(bed.backends, rings)
    vhost_net.start(bed.backends, bed.rings)
    assert (bed.datapath.vqs[:, r.VQ_LOG_USED] == -1).all()
    vhost_net.stop(bed.backends, bed.rings)


@pytest.mark.parametrize("logged", [False, True])
def test_the_used_rings_of_one_that_is_gone_are_sent_again(bed: Bed, logged: bool) -> None:
    """It may have been killed after it published, and before it marked that."""
    rings = replace(bed.rings, log=bed.log, features=bed.rings.features | f.VHOST_F_LOG_ALL) if logged else bed.rings
    vhost_net.start(bed.backends, rings)
    bed.log.take()
    bed.faults.append(Fault("get_vring_base", times=-1))
    vhost_net.stop(bed.backends, rings)
    pages = {at // spec.PAGE_SIZE for queue in rings.queues for at in (queue.used, queue.used + 6 + 8 * 8 - 1)}
    assert set(bed.log.pages()) == (pages if logged else set())


@pytest.mark.parametrize("silent", [False, True])
@pytest.mark.parametrize("verb", [verb for verb in VERBS if verb != "get_vring_base"])
def test_whatever_fails_is_undone_and_indices_are_exact(bed: Bed, verb: str, silent: bool) -> None:
    """silent: the backend can't tell an index any more either."""
    for pair in range(PAIRS):
        for index in [None] if verb in ("set_mtu", "set_features", "set_memory", "set_log") else [0, 1]:
            # Left over from another time: an owner that goes by this is wrong.
            for backend in bed.backends:
                for ring in (RECEIVEQ, TRANSMITQ):
                    backend.set_vring_base(ring, 0x1234)
            bed.faults[1:] = [Fault(verb, pair, index)]
            if silent:
                bed.faults.append(Fault("get_vring_base", times=-1))
            with pytest.raises(BackendError) as caught:
                vhost_net.start(bed.backends, bed.rings)
            assert (caught.value.verb, caught.value.index) == (verb, index)
            assert bed.bound == [0] * 2 * PAIRS
            assert not bed.endpoint.polled_by
            assert [queue.last_avail_idx for queue in bed.rings.queues] == [BASE] * 2 * PAIRS
    bed.faults[1:] = []
    vhost_net.start(bed.backends, bed.rings)
    bed.ring_list[3].send(0, frame(0))
    assert bed.datapath.run() == (r.LOOP_IDLE, 1)
    vhost_net.stop(bed.backends, bed.rings)
    expected = [BASE] * 2 * PAIRS
    expected[3] += 1
    assert [queue.last_avail_idx for queue in bed.rings.queues] == expected
    assert vhost_net.used_idx(bed.memory, bed.rings.queues[3]) == BASE + 1


def test_an_index_that_is_not_told_is_used_idx(bed: Bed) -> None:
    vhost_net.start(bed.backends, bed.rings)
    for n in range(5):
        bed.ring_list[1].send(n, frame(n))
    assert bed.datapath.run() == (r.LOOP_IDLE, 5)
    bed.faults.append(Fault("get_vring_base", 0, TRANSMITQ))
    vhost_net.stop(bed.backends, bed.rings)
    assert bed.rings.queues[1].last_avail_idx == (BASE + 5) & 0xFFFF
    assert bed.bound == [0] * 2 * PAIRS


def test_what_was_told_last_is_kept_so_that_nothing_new_can_pass_for_it(bed: Bed) -> None:
    prepared = vhost_net.Prepared()
    with GuestMemory(bed.memory.regions) as memory:
        rings = replace(bed.rings, memory=memory)
        vhost_net.configure([], rings, prepared)
        known = weakref.ref(memory)
    del memory, rings
    gc.collect()
    assert known() is not None
