"""A queue whose driver breaks the rules stops, until it is reset; the other queues live, whoever owns them."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.support.by_hand import NEEDS_RESET, frame, no_descriptor_leaks, wait_equal, wait_for
from vnetdp.backends.process import WorkerProcess
from vnetdp.backends.worker import Worker
from vnetdp.device.device import NetDevice
from vnetdp.device.owners import Owner
from vnetdp.endpoints.loopback import EchoEndpoint, GenerateEndpoint
from vnetdp.errors import GuestError
from vnetdp.shared.memory import DirtyLog, GuestMemory
from vnetdp.testing import READY, HandRing, bring_up
from vnetdp.virtio import features as f
from vnetdp_kernels import rows as r
from vnetdp_kernels import spec

MODERN = f.VIRTIO_F_VERSION_1


@pytest.fixture
def memory() -> Iterator[GuestMemory]:
    with GuestMemory.create([(0, 1 << 22)]) as memory:
        yield memory


@pytest.fixture(params=["userspace", "vhost", "vhost-process"])
def device(request: pytest.FixtureRequest, memory: GuestMemory) -> Iterator[NetDevice]:
    """A device of two pairs that runs where the parameter says."""
    with no_descriptor_leaks(), GenerateEndpoint(2, count=0) as endpoint:
        worker = WorkerProcess(2) if request.param == "vhost-process" else Worker(2)
        device = NetDevice(memory, endpoint, queue_pairs=2, vhost=[*worker.backends])
        device.set_use_vhost(request.param != "userspace")
        yield device
        device.close()
        worker.close()
        assert endpoint.polls_started == endpoint.polls_stopped


def send_one(device: NetDevice, ring: HandRing, index: int) -> None:
    """Send a frame by a queue, and wait until it is used."""
    then = ring.used_idx
    ring.send(then % ring.num, frame(then))
    device.kicks[index].signal()
    wait_equal(lambda: ring.used_idx, then + 1)


def break_one(device: NetDevice, ring: HandRing, index: int) -> None:
    """Make a chain available that no device may touch, and wait until the queue has stopped for it."""
    ring.put_desc(15, 1 << 50, 60)
    ring.offer(15)
    device.kicks[index].signal()
    wait_for(lambda: index in [error.queue for error in device.ring_errors()], f"queue {index} is broken")


def test_a_broken_ring_asks_for_a_reset_while_other_pairs_live(device: NetDevice) -> None:
    rings = bring_up(device, MODERN)
    device.set_status(READY)
    rings[1].put_desc(0, 1 << 50, 60)
    rings[1].offer(0)
    device.kicks[1].signal()
    wait_for(lambda: device.config_call.clear() == 1, "the driver is told")
    assert device.status & NEEDS_RESET
    assert isinstance(device.last_error, GuestError)
    assert (device.last_error.queue, device.last_error.status) == (1, r.E_ADDRESS)
    assert [error.queue for error in device.ring_errors()] == [1]
    # The other pair goes on, and the other ring of this one.
    for n in range(3):
        rings[3].send(n, frame(n))
        device.kicks[3].signal()
        wait_equal(lambda: rings[3].used_idx, n + 1)
    assert rings[1].used_idx == 0
    # A second queue that breaks is no second notification.
    rings[2].put_desc(0, rings[2].buffer(0), 60)
    rings[2].offer(0)
    device.endpoint.rows[1, r.EP_LIMIT] = 1
    device.kicks[3].signal()
    wait_for(lambda: len(device.ring_errors()) == 2, "a second broken queue")
    assert device.config_call.clear() == 0
    rings = bring_up(device, MODERN)
    device.set_status(READY)
    assert device.status == READY
    assert device.ring_errors() == []
    rings[1].send(0, frame(0))
    device.kicks[1].signal()
    wait_for(lambda: rings[1].used_idx == 1, "everything runs after the reset")


def test_a_queue_that_was_reset_is_not_broken(device: NetDevice) -> None:
    rings = bring_up(device, MODERN)
    device.set_status(READY)
    rings[1].put_desc(0, 0, 0)
    rings[1].offer(0)
    device.kicks[1].signal()
    wait_for(lambda: bool(device.ring_errors()), "a broken queue")
    device.reset_queue(1)
    assert device.ring_errors() == []
    device.check_rings()
    fresh = HandRing(device.memory, rings[-1].end)
    fresh.send(0, frame(0))
    device.set_queue(1, fresh.num, fresh.desc, fresh.avail, fresh.used)
    device.enable_queue(1)
    wait_equal(lambda: fresh.used_idx, 1)
    assert device.status & NEEDS_RESET, "only a reset of the device takes that back"


def test_a_stepped_device_says_needs_reset_too(memory: GuestMemory) -> None:
    with EchoEndpoint() as echo, NetDevice(memory, echo, threaded=False) as device:
        rings = bring_up(device, MODERN)
        device.set_status(READY)
        rings[0].post(0)
        rings[1].send(0, frame(0))
        assert device.step() == 1
        assert rings[0].taken() == [(0, 72)]
        rings[1].avail_idx = 1000
        assert device.step() == 0
        assert device.status & NEEDS_RESET
        assert device.step() == 0


def test_a_broken_queue_stays_broken_and_the_others_go_on_when_the_owner_changes(device: NetDevice) -> None:
    rings = bring_up(device, MODERN)
    device.set_status(READY)
    for index in (1, 3):
        send_one(device, rings[index], index)
    break_one(device, rings[1], 1)
    for _ in range(3):
        device.set_use_vhost(not device.use_vhost)
        assert device.owner is (Owner.VHOST if device.use_vhost else Owner.USERSPACE)
        assert device.status == READY | NEEDS_RESET
        assert [error.queue for error in device.ring_errors()] == [1]
        send_one(device, rings[3], 3)
        device.set_status(READY)
        send_one(device, rings[3], 3)
    assert rings[1].used_idx == 1
    assert device.queues[1].last_avail_idx == 1, "the chain that broke it was not taken"
    assert device.config_call.clear() == 1, "told once"
    assert device.fallbacks == 0
    # Reset, it runs under the owner of the day.
    device.reset_queue(1)
    assert device.ring_errors() == []
    fresh = HandRing(device.memory, rings[-1].end)
    device.set_queue(1, fresh.num, fresh.desc, fresh.avail, fresh.used)
    device.enable_queue(1)
    send_one(device, fresh, 1)
    device.set_use_vhost(not device.use_vhost)
    send_one(device, fresh, 1)
    send_one(device, rings[3], 3)


def test_a_queue_that_broke_under_each_owner(device: NetDevice) -> None:
    rings = bring_up(device, MODERN)
    device.set_status(READY)
    break_one(device, rings[1], 1)
    device.set_use_vhost(not device.use_vhost)
    break_one(device, rings[3], 3)
    device.set_link(False)
    device.set_link(True)
    assert [error.queue for error in device.ring_errors()] == [1, 3]
    device.set_status(0)
    assert device.ring_errors() == []
    rings = bring_up(device, MODERN)
    device.set_status(READY)
    for index in (1, 3):
        send_one(device, rings[index], index)
    assert device.status == READY


def test_logging_starts_and_stops_beside_a_broken_queue(device: NetDevice) -> None:
    rings = bring_up(device, MODERN)
    device.set_status(READY)
    break_one(device, rings[1], 1)
    device.set_use_vhost(not device.use_vhost)  # to one who never heard of it
    log = DirtyLog(device.memory.end)
    device.set_log(log)
    send_one(device, rings[3], 3)
    wait_for(lambda: rings[3].used // spec.PAGE_SIZE in log.pages(), "the used ring, which is marked behind the write")
    device.set_log(None)
    send_one(device, rings[3], 3)
    assert device.fallbacks == 0
    log.close()


def test_a_state_that_is_loaded_anew_takes_the_place_of_one_that_was_broken(memory: GuestMemory) -> None:
    with (
        EchoEndpoint() as here,
        EchoEndpoint() as there,
        NetDevice(memory, here, threaded=False) as source,
        NetDevice(memory, there, threaded=False, running=False) as target,
    ):
        bring_up(source, MODERN)
        source.set_status(READY)
        source.set_running(False)
        target.load_state(source.save_state())
        target.mark_broken()
        target.set_running(True)
        assert (target.owner, target.status) == (Owner.NOBODY, READY | NEEDS_RESET)
        target.set_running(False)
        target.load_state(source.save_state())
        target.set_running(True)
        assert (target.owner, target.status) == (Owner.USERSPACE, READY)
