"""A state that a device takes over from another: the endpoint learns what concerns it, and it is all or nothing."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest

from vnetdp.device.device import NetDevice
from vnetdp.endpoints.loopback import NullEndpoint
from vnetdp.errors import ConfigError, EndpointError
from vnetdp.shared.memory import GuestMemory
from vnetdp.testing import READY
from vnetdp.virtio import features as f
from vnetdp.virtio.queue import Virtqueue
from vnetdp.virtio.state import VIRTIO_CONFIG_S_DRIVER_OK, Control, DeviceState, StateDelta
from vnetdp_kernels import spec

FEATURES = f.VIRTIO_F_VERSION_1 | f.VIRTIO_NET_F_GUEST_CSUM | f.VIRTIO_NET_F_GUEST_TSO4
OFFLOADS = spec.OFFLOAD_CSUM | spec.OFFLOAD_TSO4
QUEUE = Virtqueue(16, 0x1000, 0x2000, 0x3000, True, 5)


class Choosy(NullEndpoint):
    """Knows what it was told, and refuses what it is asked to refuse."""

    vnet_hdr = True

    def __init__(self) -> None:
        super().__init__(2)
        self.refused = ""
        self.told: dict[str, Any] = {"mtu": 1500, "offloads": 0, "active": {0, 1}}

    def _tell(self, what: str, value: Any) -> None:
        if what == self.refused:
            raise EndpointError(f"no {what}")
        self.told[what] = value

    def set_mtu(self, mtu: int) -> None:
        self._tell("mtu", mtu)

    def set_offloads(self, mask: int) -> None:
        self._tell("offloads", mask)

    def set_queue_active(self, queue: int, active: bool) -> None:
        self._tell("active", self.told["active"] | {queue} if active else self.told["active"] - {queue})


@pytest.fixture
def endpoint() -> Iterator[Choosy]:
    with Choosy() as endpoint:
        yield endpoint


@pytest.fixture
def device(endpoint: Choosy) -> Iterator[NetDevice]:
    with (
        GuestMemory.create([(0, 1 << 20)]) as memory,
        NetDevice(memory, endpoint, queue_pairs=2, mtu=1500, running=False) as device,
    ):
        yield device


CONTROL = Control(mtu=1400, curr_queue_pairs=1, guest_offloads=OFFLOADS)
STATE = DeviceState(READY, FEATURES, CONTROL, [QUEUE, QUEUE, Virtqueue(), Virtqueue()])


def test_the_endpoint_learns_what_concerns_it(device: NetDevice, endpoint: Choosy) -> None:
    device.load_state(STATE)
    assert device.save_state() == STATE
    assert endpoint.told == {"mtu": 1400, "offloads": OFFLOADS, "active": {0}}
    device.load_delta(StateDelta({}, {"mtu": 1300, "guest_offloads": 0}, {}, [(0, 7)]))
    assert endpoint.told == {"mtu": 1300, "offloads": 0, "active": {0}}
    assert (device.control.mtu, device.queues[0].last_avail_idx) == (1300, 7)


@pytest.mark.parametrize("refused", ["mtu", "offloads", "active"])
def test_an_endpoint_that_refuses_a_part_leaves_all_as_it_was(
    device: NetDevice, endpoint: Choosy, refused: str
) -> None:
    before, told = device.save_state(), endpoint.told.copy()
    endpoint.refused = refused
    with pytest.raises(EndpointError, match=f"no {refused}"):
        device.load_state(STATE)
    assert device.save_state() == before
    assert endpoint.told == told
    endpoint.refused = ""
    device.load_state(STATE)
    assert device.save_state() == STATE


@pytest.mark.parametrize("more", [spec.OFFLOAD_ECN, 1 << 8, 1 << 40, 1 << 63])
def test_an_offload_that_was_not_negotiated(device: NetDevice, endpoint: Choosy, more: int) -> None:
    device.load_state(STATE)
    wrong: dict[str, Any] = {"guest_offloads": OFFLOADS | more}
    with pytest.raises(ConfigError, match="were not negotiated"):
        device.load_state(replace(STATE, control=replace(CONTROL, **wrong)))
    with pytest.raises(ConfigError, match="were not negotiated"):
        device.load_delta(StateDelta({}, wrong, {}, []))
    with pytest.raises(ConfigError, match="were not negotiated"):
        device.load_delta(StateDelta({"features": FEATURES & ~f.VIRTIO_NET_F_GUEST_TSO4}, {}, {}, []))
    with pytest.raises(ConfigError, match="were not negotiated"):
        device.set_control(**wrong)
    assert device.save_state() == STATE
    assert endpoint.told["offloads"] == OFFLOADS


def test_the_driver_is_told_to_look_at_the_configuration(device: NetDevice) -> None:
    """It may have been told of a change where it was, and not have looked yet."""
    device.load_state(replace(STATE, status=READY & ~VIRTIO_CONFIG_S_DRIVER_OK))
    assert device.config_call.clear() == 0
    device.load_state(STATE)
    assert device.config_call.clear() == 1
    device.load_delta(StateDelta({}, {"rx_mode": 3}, {}, [(0, 9)]))
    assert device.config_call.clear() == 0, "what came with the status is pending until the driver runs"
    device.load_delta(StateDelta({}, {"net_status": 3}, {}, []))
    assert device.config_call.clear() == 1


def test_indices_of_queues_that_the_same_delta_changes(device: NetDevice) -> None:
    device.load_state(STATE)
    with pytest.raises(ConfigError, match="queue 1 has an index and is not enabled"):
        device.load_delta(StateDelta({}, {}, {1: Virtqueue()}, [(0, 9), (1, 9)]))
    assert device.save_state() == STATE
    device.load_delta(StateDelta({}, {}, {2: QUEUE}, [(0, 9), (2, 11)]))
    assert [queue.last_avail_idx for queue in device.queues] == [9, 5, 11, 0]
