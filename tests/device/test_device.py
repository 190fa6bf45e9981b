"""The device as its driver sees it: registers, config space, resets, trouble and link (Virtio 1.2, 2 and 5.1)."""

from __future__ import annotations

import struct
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support.by_hand import (
    ACKNOWLEDGE,
    DRIVER,
    FEATURES_OK,
    NEEDS_RESET,
    frame,
    no_descriptor_leaks,
    wait_equal,
    wait_for,
)
from vnetdp.backends.worker import Worker
from vnetdp.device.device import NetDevice
from vnetdp.device.owners import Owner
from vnetdp.endpoints.base import Endpoint
from vnetdp.endpoints.loopback import GenerateEndpoint, NullEndpoint
from vnetdp.endpoints.mailbox import MailboxEndpoint
from vnetdp.errors import ConfigError, EndpointError
from vnetdp.shared.memory import GuestMemory
from vnetdp.testing import READY, HandRing, bring_up
from vnetdp.virtio import features as f
from vnetdp_kernels import rows as r
from vnetdp_kernels import spec

MODERN = f.VIRTIO_F_VERSION_1


class OffloadEndpoint(NullEndpoint):
    """Takes virtio_net_hdr as it is, and remembers what it may give."""

    vnet_hdr = True
    offloads = -1

    def set_offloads(self, mask: int) -> None:
        self.offloads = mask


@pytest.fixture
def memory() -> Iterator[GuestMemory]:
    with GuestMemory.create([(0, 1 << 22)]) as memory:
        yield memory


@pytest.fixture
def endpoint() -> Iterator[GenerateEndpoint]:
    with GenerateEndpoint(2, count=0) as endpoint:
        yield endpoint


@pytest.fixture(params=[Owner.USERSPACE, Owner.VHOST])
def device(request: pytest.FixtureRequest, memory: GuestMemory, endpoint: GenerateEndpoint) -> Iterator[NetDevice]:
    """A device of two pairs that runs where the parameter says, once it may run."""
    with no_descriptor_leaks():
        worker = Worker(2)
        device = NetDevice(memory, endpoint, queue_pairs=2, vhost=worker)
        device.set_use_vhost(request.param is Owner.VHOST)
        yield device
        device.close()
        worker.close()
        assert endpoint.polls_started == endpoint.polls_stopped


def owner_of(device: NetDevice) -> Owner:
    return Owner.VHOST if device.use_vhost else Owner.USERSPACE


# --- status and features ---


def test_nothing_runs_before_driver_ok(device: NetDevice, endpoint: GenerateEndpoint) -> None:
    rings = bring_up(device, MODERN)
    rings[1].send(0, frame(0))
    rings[0].post(0)
    before = [ring.content() for ring in rings]
    device.kicks[1].signal()
    device.set_link(False)
    device.set_link(True)
    device.set_running(False)
    device.set_running(True)
    device.set_use_vhost(device.use_vhost)
    assert device.owner is Owner.NOBODY
    assert not endpoint.polled_by
    assert [ring.content() for ring in rings] == before
    assert not any(call.clear() for call in device.calls)
    assert device.config_call.clear() == 0
    device.set_status(READY)
    assert device.owner is owner_of(device)
    wait_for(lambda: rings[1].used_idx == 1, "the chain that waited is used")


def test_reset_forgets_everything(device: NetDevice) -> None:
    rings = bring_up(device, MODERN)
    device.set_status(READY)
    rings[1].send(0, frame(0))
    device.kicks[1].signal()
    wait_for(lambda: rings[1].used_idx == 1, "the ring runs")
    device.set_status(0)
    assert device.status == 0
    assert device.driver_features == 0
    assert device.owner is Owner.NOBODY
    assert all(queue.last_avail_idx == 0 and not queue.enabled for queue in device.queues)
    assert not any(queue.has_addresses for queue in device.queues)
    assert not any(event.clear() for event in (*device.kicks, *device.calls))
    with pytest.raises(ConfigError, match="no addresses"):
        device.enable_queue(1)


def test_after_a_reset_the_old_rings_are_not_touched(device: NetDevice) -> None:
    old = bring_up(device, MODERN)
    device.set_status(READY)
    old[1].send(0, frame(0))
    device.kicks[1].signal()
    wait_for(lambda: old[1].used_idx == 1, "the ring runs")
    device.set_status(0)
    old[0].post(0)
    old[1].send(1, frame(1))
    device.kicks[1].signal()
    before = [ring.content() for ring in old]
    new = bring_up(device, MODERN, at=old[-1].end)
    device.set_status(READY)
    for n in range(3):
        new[1].send(n, frame(n))
        device.kicks[1].signal()
        wait_equal(lambda: new[1].used_idx, n + 1)
    assert [ring.content() for ring in old] == before


@pytest.fixture(scope="module")
def idle() -> Iterator[NetDevice]:
    """A device that offers everything it can, for looking at registers only."""
    with (
        GuestMemory.create([(0, 1 << 16)]) as memory,
        OffloadEndpoint() as endpoint,
        NetDevice(memory, endpoint, threaded=False, mtu=1500) as device,
    ):
        yield device


def test_it_offers_what_the_specification_asks(idle: NetDevice) -> None:
    assert idle.device_features & f.VIRTIO_F_VERSION_1
    assert f.missing_dependency(idle.device_features) is None
    assert idle.device_features & f.OFFLOADS == f.OFFLOADS
    for bit in (f.VIRTIO_F_RING_PACKED, f.VHOST_F_LOG_ALL, f.VHOST_USER_F_PROTOCOL_FEATURES):
        assert not idle.device_features & bit


@given(st.data())
def test_features_ok_stands_for_every_valid_subset_and_no_other(idle: NetDevice, data: st.DataObject) -> None:
    bits = [1 << n for n in range(64) if idle.device_features >> n & 1]
    wanted = sum(data.draw(st.sets(st.sampled_from(bits))))
    wanted |= sum(data.draw(st.sets(st.sampled_from([1 << n for n in range(64)]), max_size=1)))
    valid = not wanted & ~idle.device_features and f.missing_dependency(wanted) is None
    for _ in range(2):  # the same answer after a reset (2.2.2)
        idle.set_status(0)
        idle.set_status(ACKNOWLEDGE | DRIVER)
        idle.set_driver_features(wanted)
        idle.set_status(ACKNOWLEDGE | DRIVER | FEATURES_OK)
        assert bool(idle.status & FEATURES_OK) == valid
        if valid:
            assert isinstance(idle.endpoint, OffloadEndpoint)
            assert idle.endpoint.offloads == f.guest_offload_mask(wanted)
            with pytest.raises(ConfigError, match="FEATURES_OK"):
                idle.set_driver_features(0)


@pytest.mark.parametrize("status", [READY, READY & ~FEATURES_OK])
@pytest.mark.parametrize("wanted", [f.VIRTIO_F_RING_PACKED, f.VIRTIO_NET_F_GUEST_TSO4, f.VIRTIO_NET_F_MQ])
def test_a_driver_that_ignores_the_refusal_gets_nothing(
    device: NetDevice, endpoint: GenerateEndpoint, status: int, wanted: int
) -> None:
    rings = bring_up(device, MODERN | wanted)
    assert not device.status & FEATURES_OK
    rings[1].send(0, frame(0))
    for _ in range(2):
        device.set_status(status)
        assert device.owner is Owner.NOBODY
        assert not endpoint.polled_by
        assert rings[1].used_idx == 0


def test_a_legacy_driver_needs_no_features_ok(device: NetDevice) -> None:
    rings = bring_up(device, 0)
    device.set_status(READY & ~FEATURES_OK)
    assert device.owner is owner_of(device)
    with pytest.raises(ConfigError):
        device.set_driver_features(f.VIRTIO_F_VERSION_1)
    rings[0].post(0)
    device.endpoint.rows[0, r.EP_LIMIT] = 1
    device.kicks[0].signal()
    device.kicks[1].signal()
    wait_for(lambda: rings[0].taken() == [(0, spec.NET_HDR_LEN_LEGACY + 64)], "a header of ten bytes")


def test_offers_are_closed_under_their_needs(memory: GuestMemory) -> None:
    with OffloadEndpoint() as endpoint:
        offered = f.VIRTIO_NET_F_GUEST_TSO4 | f.VIRTIO_NET_F_HOST_TSO6 | f.VIRTIO_NET_F_CSUM | MODERN | 1 << 63
        with NetDevice(memory, endpoint, offered=offered, threaded=False) as device:
            assert device.device_features == f.VIRTIO_NET_F_HOST_TSO6 | f.VIRTIO_NET_F_CSUM | MODERN
    with NullEndpoint() as plain, NetDevice(memory, plain, threaded=False) as device:
        assert not device.device_features & (f.OFFLOADS | f.VIRTIO_NET_F_MTU)


def test_an_endpoint_that_is_gone_fails_no_register_write(memory: GuestMemory) -> None:
    """As a TAP whose interface was deleted."""

    class GoneEndpoint(OffloadEndpoint):
        gone = False

        def set_offloads(self, mask: int) -> None:
            if self.gone:
                raise EndpointError("the interface is gone")
            super().set_offloads(mask)

    wanted = MODERN | f.VIRTIO_NET_F_GUEST_CSUM
    with GoneEndpoint() as endpoint, NetDevice(memory, endpoint, threaded=False) as device:
        bring_up(device, wanted)
        device.set_status(READY)
        endpoint.gone = True
        device.kicks[1].clear()
        device.kicks[1].signal()
        device.set_status(0)
        assert (device.status, device.driver_features, device.control.guest_offloads) == (0, 0, 0)
        assert device.owner is Owner.NOBODY
        assert not any(queue.enabled or queue.has_addresses for queue in device.queues)
        assert not device.kicks[1].clear()
        assert endpoint.errors == 1
        bring_up(device, wanted)
        assert not device.status & FEATURES_OK
        assert endpoint.errors == 2
        assert device.control.guest_offloads == 0
        endpoint.gone = False
        bring_up(device, wanted)
        assert device.status & FEATURES_OK
        assert endpoint.offloads == device.control.guest_offloads == f.guest_offload_mask(wanted)


# --- configuration space ---


def test_config_space_is_readable_before_any_negotiation(idle: NetDevice) -> None:
    idle.set_status(0)
    space = idle.read_config(0, 12)
    assert space[:6] == idle.control.mac
    assert struct.unpack("<HHH", space[6:]) == (1, 1, 1500)
    for offset in range(13):
        for length in range(13 - offset):
            assert idle.read_config(offset, length) == space[offset : offset + length]
    for offset, length in ((-1, 1), (0, 13), (12, 1), (13, 0), (0, -1)):
        with pytest.raises(ConfigError):
            idle.read_config(offset, length)


def test_link_and_pairs_show_in_config_space(device: NetDevice) -> None:
    assert device.read_config(6, 4) == struct.pack("<HH", 1, 2)
    device.set_link(False)
    assert device.read_config(6, 2) == bytes(2)


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"queue_pairs": 0}, "queue pairs"),
        ({"queue_pairs": 1025}, "queue pairs"),
        ({"queue_pairs": 3}, "has 2 queues"),
        ({"mac": b"\0" * 5}, "5 bytes, not 6"),
        ({"mtu": 67}, "between 68"),
        ({"mtu": 65536}, "between 68"),
        ({"vhost": []}, "0 vhost backends"),
        ({"max_num": 100}, "power of two"),
    ],
)
def test_what_no_device_can_be(
    memory: GuestMemory, endpoint: GenerateEndpoint, wrong: dict[str, object], says: str
) -> None:
    with no_descriptor_leaks(), pytest.raises(ConfigError, match=says):
        NetDevice(memory, endpoint, **wrong)  # type: ignore[arg-type]


def test_a_worker_needs_a_backend_for_each_queue_pair(memory: GuestMemory, endpoint: GenerateEndpoint) -> None:
    with Worker(1) as worker, pytest.raises(ConfigError, match="1 vhost backends for 2 queue pairs"):
        NetDevice(memory, endpoint, queue_pairs=2, vhost=worker)


def test_what_only_some_devices_can_do(idle: NetDevice, device: NetDevice) -> None:
    with pytest.raises(ConfigError, match="without a vhost worker"):
        idle.set_use_vhost(True)
    with pytest.raises(ConfigError, match="threaded=False"):
        device.step()


# --- queues ---


def test_queues_are_checked_when_they_are_set(device: NetDevice) -> None:
    device.set_status(ACKNOWLEDGE | DRIVER)
    for index in (-1, 4):
        with pytest.raises(ConfigError, match="queues 0 to 3"):
            device.set_queue(index, 16, 0x1000, 0x2000, 0x3000)
        with pytest.raises(ConfigError, match="queues 0 to 3"):
            device.enable_queue(index)
        with pytest.raises(ConfigError, match="queues 0 to 3"):
            device.reset_queue(index)
    for num in (0, 3, -16, 65536):
        with pytest.raises(ConfigError, match="power of two"):
            device.set_queue(0, num, 0x1000, 0x2000, 0x3000)
    with pytest.raises(ConfigError, match="larger than 1024"):
        device.set_queue(0, 2048, 0x1000, 0x2000, 0x3000)
    for desc, avail, used in ((0x1008, 0x2000, 0x3000), (0x1000, 0x2001, 0x3000), (0x1000, 0x2000, 0x3002)):
        with pytest.raises(ConfigError, match="aligned"):
            device.set_queue(0, 16, desc, avail, used)
    for addresses in ((1 << 63, 0, 0), (0, 1 << 64, 0), (0, 0, 1 << 52)):
        with pytest.raises(ConfigError, match="is not below"):
            device.set_queue(0, 16, *addresses)
    with pytest.raises(ConfigError, match="no addresses"):
        device.enable_queue(0)
    device.set_queue(0, 16, -1, 0x2000, 0x3000)
    with pytest.raises(ConfigError, match="no addresses"):
        device.enable_queue(0)
    device.set_queue(0, 16, 0x1000, 0x2000, 0x3000)
    device.enable_queue(0)
    device.enable_queue(0)
    with pytest.raises(ConfigError, match="enabled"):
        device.set_queue(0, 16, 0x1000, 0x2000, 0x3000)
    assert device.queues[0].num == 16


def test_rings_outside_memory_mean_needs_reset(device: NetDevice) -> None:
    bring_up(device, MODERN)
    device.reset_queue(3)
    device.set_queue(3, 16, 1 << 40, 0x1000, 0x2000)
    device.enable_queue(3)
    device.set_status(READY)
    assert device.owner is Owner.NOBODY
    assert device.status & NEEDS_RESET
    assert device.config_call.clear() == 1
    assert not device.endpoint.polled_by
    # Nothing but a reset helps.
    device.set_status(READY)
    assert device.status == READY | NEEDS_RESET
    assert device.owner is Owner.NOBODY
    rings = bring_up(device, MODERN)
    device.set_status(READY)
    assert device.status == READY
    rings[3].send(0, frame(0))
    device.kicks[3].signal()
    wait_for(lambda: rings[3].used_idx == 1, "the ring runs")


def test_a_queue_may_be_left_out(device: NetDevice) -> None:
    bring_up(device, MODERN)
    for index in (1, 2, 3):
        device.reset_queue(index)
    device.set_status(READY)
    assert device.owner is owner_of(device)
    assert list(device.endpoint.polled_by) == [0]
    # It may come later (a driver that has DRIVER_OK already).
    late = HandRing(device.memory, 0x200000, 8)
    late.send(0, frame(0))
    device.set_queue(3, 8, late.desc, late.avail, late.used)
    device.enable_queue(3)
    wait_for(lambda: late.used_idx == 1, "the late queue runs")
    assert sorted(device.endpoint.polled_by) == [0, 1]


# --- trouble ---


def test_closing_twice_is_closing_once(device: NetDevice) -> None:
    bring_up(device, MODERN)
    device.set_status(READY)
    device.close()
    assert device.owner is Owner.NOBODY
    device.close()


# --- link, and a stopped machine ---


def test_a_frame_in_hand_is_dropped_by_a_reset(memory: GuestMemory) -> None:
    with MailboxEndpoint() as mailbox, NetDevice(memory, mailbox, threaded=False) as device:
        rings = bring_up(device, MODERN | f.VIRTIO_NET_F_MRG_RXBUF)
        device.set_status(READY)
        rings[0].post(0)
        mailbox.put(frame(0, 3000))
        assert device.step() == 0
        assert mailbox.rows[0, r.EP_PENDING] == spec.NET_HDR_LEN + 3000, "it waits for a second buffer"
        rings = bring_up(device, MODERN | f.VIRTIO_NET_F_MRG_RXBUF)
        device.set_status(READY)
        rings[0].post(0, 1, 2)
        mailbox.put(frame(1))
        assert device.step() == 1
        assert rings[0].taken() == [(0, spec.NET_HDR_LEN + 60)]


def test_link_down_and_stopped_mean_that_nobody_owns(device: NetDevice) -> None:
    rings = bring_up(device, MODERN)
    device.set_status(READY)
    taken = 0
    for switch in (device.set_link, device.set_running):
        for _ in range(3):
            switch(False)
            switch(False)
            assert device.owner is Owner.NOBODY
            assert not device.endpoint.polled_by
            rings[1].send(taken % 16, frame(taken))
            device.kicks[1].signal()
            before = [ring.content() for ring in rings]
            device.set_use_vhost(device.use_vhost)
            assert device.owner is Owner.NOBODY
            assert [ring.content() for ring in rings] == before
            switch(True)
            switch(True)
            assert device.owner is owner_of(device)
            taken += 1
            wait_equal(lambda: rings[1].used_idx, taken)
    assert [head for head, _ in rings[1].taken()] == list(range(taken))
    assert device.config_call.clear() == 6, "one notification a change of the link, none for anything else"


def test_only_a_live_driver_hears_of_the_link(device: NetDevice) -> None:
    device.set_link(False)
    device.set_link(True)
    assert device.config_call.clear() == 0
    bring_up(device, MODERN)
    device.set_link(False)
    device.set_status(READY)
    assert device.owner is Owner.NOBODY
    assert device.config_call.clear() == 0
    device.set_link(True)
    assert device.owner is owner_of(device)
    assert device.config_call.clear() == 1


def test_counters_are_summed_over_owners(device: NetDevice) -> None:
    rings = bring_up(device, MODERN)
    device.set_status(READY)
    for n in range(6):
        rings[1].send(n, frame(n, 100))
        device.kicks[1].signal()
        wait_equal(lambda: rings[1].used_idx, n + 1)
        device.set_use_vhost(not device.use_vhost)
    counters = device.counters()
    assert len(counters) == 4
    assert (counters[1]["packets"], counters[1]["bytes"]) == (6, 600)
    assert counters[3]["packets"] == 0


def test_an_endpoint_of_another_device_leaves_it_without_an_owner(memory: GuestMemory) -> None:
    with Endpoint(1) as shared:
        with NetDevice(memory, shared, threaded=False) as first, NetDevice(memory, shared, threaded=False) as second:
            bring_up(first, MODERN)
            first.set_status(READY)
            bring_up(second, MODERN)
            second.set_status(READY)
            assert (first.owner, second.owner) == (Owner.USERSPACE, Owner.NOBODY)
            assert second.status & NEEDS_RESET
        assert shared.polls_started == shared.polls_stopped == 1
