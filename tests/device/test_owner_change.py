"""The owner of the rings changes under traffic, any number of times, and no packet is lost, repeated or reordered.

The invariants are those of a migration: I1 each chain used once, I3 the owner's used index is the one in memory, I5 who
does not own a ring does not write, I6 one poller an endpoint's queue, I7 polling started as often as stopped, I9 no
notification lost, I10 frames in order. I1, I4 and I10 are what the ledger checks.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest

from tests.support.by_hand import CAMPAIGN, Traffic, frame, no_descriptor_leaks, rebase, scaled, wait_equal, wait_for
from vnetdp.backends.base import Backend
from vnetdp.backends.faulty import Faults, FaultyBackend
from vnetdp.backends.verbs import GetVringBase, SetBackend, SetVringAddr, SetVringBase, Verb
from vnetdp.backends.worker import Worker
from vnetdp.datapath.datapath import Datapath
from vnetdp.device import vhost_net
from vnetdp.device.device import NetDevice
from vnetdp.device.owners import Owner
from vnetdp.endpoints.base import Endpoint
from vnetdp.endpoints.frames import FrameEndpoint
from vnetdp.endpoints.mailbox import MailboxEndpoint
from vnetdp.guest.driver import Driver, memory_for
from vnetdp.shared.memory import GuestMemory
from vnetdp.testing import Vnet
from vnetdp.virtio import features as f
from vnetdp.virtio.queue import RECEIVEQ, TRANSMITQ
from vnetdp_kernels import rows as r
from vnetdp_kernels import spec

RATE = scaled(40_000, 300)
RINGS = f.VIRTIO_F_VERSION_1 | f.VIRTIO_RING_F_INDIRECT_DESC
SETS = {
    "plain": RINGS,
    "event_idx": RINGS | f.VIRTIO_RING_F_EVENT_IDX,
    "in_order": RINGS | f.VIRTIO_F_IN_ORDER,
    "mrg_rxbuf": RINGS | f.VIRTIO_NET_F_MRG_RXBUF,
    "everything": (1 << 64) - 1,
    "legacy": 0,
}


class WatchedBackend(FaultyBackend):
    """A vhost backend that looks at the invariants at the moment it is given a ring, and when it gives it back."""

    def __init__(self, inner: Backend, pair: int, memory: GuestMemory, datapath: Datapath) -> None:
        super().__init__(inner, pair, Faults())
        self._datapath = datapath
        self._memory = memory
        self._used = [0, 0]
        self._based = [0, 0]
        self.changes = 0

    def _used_idx(self, index: int) -> int:
        return int.from_bytes(self._memory.read(self._used[index] + spec.VIRTQ_RING_IDX, 2), "little")

    def apply(self, verb: Verb) -> int:
        match verb:
            case SetVringBase(index, base):
                self._based[index] = base
            case SetVringAddr(index):
                self._used[index] = verb.used
            case SetBackend(index, Endpoint() as endpoint):
                # Chains are used in order, so whoever had the ring before left used.idx at the next index to take.
                assert self._based[index] == self._used_idx(index), "I3"
                holder = endpoint.polled_by.get(self._pair)
                assert holder is None or holder is self._datapath, "I6"
        answer = super().apply(verb)
        if isinstance(verb, GetVringBase):
            assert answer == self._used_idx(verb.index), "I3"
            self.changes += 1
        return answer


@dataclass
class Setup:
    """A device with both owners, its driver in a thread, and traffic both ways."""

    traffic: Traffic
    memory: GuestMemory
    worker: Worker
    backends: Sequence[WatchedBackend]
    device: NetDevice
    driver: Driver
    expected: Owner = field(default=Owner.VHOST)

    def change(self) -> None:
        """Hand the rings to the other owner, and check what can be seen of it."""
        self.device.set_use_vhost(self.device.owner is not Owner.VHOST)
        self.expected = Owner.USERSPACE if self.expected is Owner.VHOST else Owner.VHOST
        assert self.device.owner is self.expected
        self.check_polling(self.device.queue_pairs)
        bound = self.worker.datapath.vqs[:, r.VQ_BOUND]
        assert bound.all() if self.expected is Owner.VHOST else not bound.any()

    def check_polling(self, pollers: int) -> None:
        endpoint = self.traffic.device
        assert len(endpoint.polled_by) == pollers, "I6"
        assert endpoint.polls_started - endpoint.polls_stopped == pollers, "I7"

    def stand_still(self) -> None:
        """Stop the device as a virtual machine is stopped, look at the rings, and let it go on."""
        device, memory = self.device, self.memory
        device.set_running(False)
        self.check_polling(0)
        bases = [queue.last_avail_idx for queue in device.queues]
        used = [memory.read(q.used, 6 + 8 * q.num) for q in device.queues]
        assert bases == [vhost_net.used_idx(memory, queue) for queue in device.queues], "I3"
        for queue in device.queues:
            avail_idx = int.from_bytes(memory.read(queue.avail + 2, 2), "little")
            assert (avail_idx - queue.last_avail_idx) & 0xFFFF <= queue.num
        assert used == [memory.read(q.used, 6 + 8 * q.num) for q in device.queues], "I5"
        device.set_running(True)
        assert device.owner is self.expected


@contextmanager
def running(
    pairs: int = 1,
    num: int = 64,
    wanted: int | None = None,
    start_at: int = 0,
    rate: float = RATE,
    count: int = -1,
    size: int = 64,
    **driver_options: Any,
) -> Iterator[Setup]:
    """Run traffic; at the end it settles, and every frame is accounted for."""
    with no_descriptor_leaks():
        traffic = Traffic(pairs, size, rate, count)
        memory = memory_for(pairs, num)
        worker = Worker(pairs)
        backends = [WatchedBackend(inner, pair, memory, worker.datapath) for pair, inner in enumerate(worker.backends)]
        device = NetDevice(memory, traffic.device, queue_pairs=pairs, vhost=backends)
        device.set_running(start_at == 0)
        driver = Driver(device, memory, traffic.guest, queue_pairs=pairs, num=num, wanted=wanted, **driver_options)
        if start_at:
            rebase(driver, start_at)
            for queue in device.queues:
                queue.last_avail_idx = start_at
            device.set_running(True)
        driver.start()
        yield Setup(traffic, memory, worker, backends, device, driver)
        traffic.settle(device, driver)
        driver.check()
        assert device.ring_errors() == []
        driver.close()
        device.close()
        worker.close()
        memory.close()
        traffic.check()
        assert traffic.device.polls_started == traffic.device.polls_stopped, "I7"
        traffic.close()


# --- under traffic ---


@pytest.mark.parametrize("pairs", [1, 4])
def test_two_hundred_changes_and_each_owner_moves_packets(pairs: int) -> None:
    changes = scaled(200, 16)
    with running(pairs) as setup:
        for n in range(changes):
            setup.change()
            setup.traffic.wait_for_more()
            if n % 20 == 0:
                setup.stand_still()
        assert setup.device.fallbacks == 0
    assert [backend.changes for backend in setup.backends] == [setup.backends[0].changes] * pairs


@pytest.mark.parametrize("num", [2, 8, 256, 1024])
def test_any_ring_size(num: int) -> None:
    with running(num=num) as setup:
        for _ in range(scaled(30, 6)):
            setup.change()
            setup.traffic.wait_for_more(2)
        setup.stand_still()


@pytest.mark.parametrize("features", SETS)
def test_any_features(features: str) -> None:
    with running(wanted=SETS[features]) as setup:
        assert setup.driver.features == setup.device.device_features & SETS[features]
        for _ in range(scaled(30, 6)):
            setup.change()
            setup.traffic.wait_for_more(2)
        setup.stand_still()


@pytest.mark.parametrize("features", ["plain", "event_idx", "in_order", "everything"])
@pytest.mark.parametrize("num", [4, 256])
def test_indices_wrap_while_owners_change(num: int, features: str) -> None:
    changes, step = scaled(100, 20), scaled(700, 15)
    with running(num=num, wanted=SETS[features], start_at=0xFFF0, rate=0, count=0) as setup:
        for n in range(1, changes + 1):
            setup.traffic.allow(n * step)
            setup.driver.bell.signal()
            setup.change()
            if n % 10 == 0:
                setup.stand_still()
        setup.traffic.wait_until_finished()
        setup.stand_still()
    assert setup.traffic.guest.sent == changes * step
    queue = setup.device.queues[TRANSMITQ]
    assert queue.last_avail_idx == (0xFFF0 + changes * step) & 0xFFFF


def test_frames_in_several_buffers() -> None:
    with running(num=64, size=1400, buffer_len=256, wanted=SETS["everything"]) as setup:
        # The guest's buffers are too short for what it would send: only the device sends.
        setup.traffic.guest.stop()
        for _ in range(scaled(30, 6)):
            setup.change()
            setup.traffic.wait_for_pair(0, 1, to_device=False)
        setup.stand_still()


def test_as_fast_as_it_goes() -> None:
    frames = scaled(1_000_000 if CAMPAIGN else 250_000, 400)
    with running(num=256, rate=0, count=frames, wanted=SETS["everything"]) as setup:
        setup.change()
        while not (setup.traffic.device.finished and setup.traffic.guest.finished):
            setup.change()
            setup.stand_still()
    assert setup.traffic.arrived() == (frames, frames)


def test_other_threads_may_change_it_too() -> None:
    with running(2, rate=RATE) as setup:
        errors: list[Exception] = []

        def toggle(vhost: bool) -> None:
            try:
                for n in range(scaled(60, 6)):
                    setup.device.set_use_vhost(bool(n % 2) is vhost)
                    setup.device.set_link(bool(n % 3))
                setup.device.set_link(True)
            except Exception as e:  # noqa: BLE001 - told by the test's own thread
                errors.append(e)

        threads = [threading.Thread(target=toggle, args=(bool(n),)) for n in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert errors == []
        setup.device.set_link(True)
        setup.traffic.wait_for_more(10)


# --- notifications ---


def test_a_kick_given_while_nobody_owned_the_ring_is_not_lost() -> None:
    with running(rate=0, count=0, wanted=SETS["event_idx"]) as setup:
        # One frame at a time, and everybody asleep in between: each change must wake whoever has to move it.
        for n in range(scaled(40, 8)):
            setup.device.set_running(False)
            setup.device.set_use_vhost(n % 2 == 0)
            setup.traffic.allow(n + 1)
            setup.driver.bell.signal()
            wait_equal(lambda: setup.traffic.guest.sent, n + 1)
            setup.device.set_running(True)
            wait_equal(lambda: setup.traffic.arrived(), (n + 1, n + 1))
        setup.expected = setup.device.owner


def test_a_change_calls_the_driver_and_a_pending_call_stays() -> None:
    with (
        no_descriptor_leaks(),
        memory_for() as memory,
        MailboxEndpoint() as endpoint,
    ):
        worker = Worker(1)
        with NetDevice(memory, endpoint, vhost=worker) as device, Driver(device, memory) as driver:
            for n in range(6):
                for call in device.calls:
                    call.clear()
                endpoint.put(frame(n))
                wait_equal(lambda: vhost_net.used_idx(memory, device.queues[RECEIVEQ]), n + 1)
                device.set_use_vhost(device.owner is not Owner.VHOST)
                for call in device.calls:
                    wait_for(lambda call=call: bool(call.clear()), "I9")  # type: ignore[misc]
                driver.step()
                assert driver.receive() == [frame(n)]
        worker.close()


# --- endpoints in Python ---


class OneServer(FrameEndpoint):
    """Sends each frame back, and checks that only the thread of whoever polls it comes by (I6)."""

    vhost: Datapath | None = None
    strangers = 0
    visits = 0

    def _look(self) -> None:
        self.visits += 1
        holder = self.polled_by.get(0)
        name = threading.current_thread().name
        if holder is None or name != ("vhost-worker" if holder is self.vhost else "userspace-datapath"):
            self.strangers += 1

    def receive_frames(self, queue: int, limit: int) -> Sequence[bytes]:
        self._look()
        return super().receive_frames(queue, limit)

    def transmit_frames(self, queue: int, frames: Sequence[bytes]) -> None:
        self._look()
        super().transmit_frames(queue, frames)

    def frame_received(self, frame: bytes, queue: int) -> bytes:
        return frame


def test_an_endpoint_in_python_is_served_by_its_owner_alone() -> None:
    with no_descriptor_leaks(), OneServer() as endpoint:
        with Vnet(endpoint) as vnet:
            assert isinstance(vnet.worker, Worker)
            with vnet.device.paused():
                endpoint.vhost, endpoint.strangers = vnet.worker.datapath, 0
            for _ in range(scaled(100, 20)):
                vnet.change_owner(1)
                vnet.wait_for(10)
        assert endpoint.strangers == 0
        assert endpoint.visits > 0
        assert endpoint.polls_started == endpoint.polls_stopped
