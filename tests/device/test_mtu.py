"""VIRTIO_NET_F_MTU: no frame to the guest is longer, unless it is a segment that the guest takes (5.1.4.1)."""

from __future__ import annotations

import struct

import pytest

from tests.support.by_hand import frame
from vnetdp.device.device import NetDevice
from vnetdp.endpoints.base import Endpoint
from vnetdp.endpoints.loopback import EchoEndpoint
from vnetdp.endpoints.mailbox import MailboxEndpoint
from vnetdp.guest.driver import Driver, memory_for
from vnetdp.virtio import features as f
from vnetdp_kernels import spec

MTU = 1500
TAGS = (b"", b"\x81\x00", b"\x88\xa8")  # the EtherType of a frame without a VLAN tag, and of two with one
LONGEST = spec.ETH_HLEN + MTU
FRAMES = [
    (tag, length + len(tag[:1]) * spec.VLAN_HLEN)
    for tag in TAGS
    for length in (60, LONGEST - 1, LONGEST, LONGEST + 1, 4000)
]
HEADER = struct.Struct("<BBHHHHH")
EVERY = (1 << 64) - 1


class Segments(MailboxEndpoint):
    """A mailbox of frames that may be segments."""

    vnet_hdr = True


def through(endpoint: Endpoint, offered: int, put: list[tuple[bytes, bytes]]) -> list[int]:
    """Send frames to a guest, from its wire or, if that echoes, from the guest itself; return their lengths there."""
    with (
        memory_for() as memory,
        NetDevice(memory, endpoint, mtu=MTU, offered=offered, threaded=False) as device,
        Segments() as own,
        Driver(device, memory, own, buffer_len=8192) as guest,
    ):
        assert bool(guest.features & f.VIRTIO_NET_F_MTU) == bool(offered & f.VIRTIO_NET_F_MTU)
        box = endpoint if isinstance(endpoint, MailboxEndpoint) else own
        for data, header in put:
            assert box.put(data, header)
        got: list[bytes] = []
        for _ in range(16):
            guest.step()
            device.step()
            got += own.take()
        return [len(data) for data in got]


def frames() -> list[tuple[bytes, bytes]]:
    """Return each of FRAMES, with a header that asks for nothing."""
    made = []
    for n, (tag, length) in enumerate(FRAMES):
        data = frame(n, length)
        made.append((data[:12] + (tag or b"\x88\xb5") + data[14:], bytes(12)))
    return made


def passing() -> list[int]:
    """Return the lengths of FRAMES that a link of that MTU carries: a tag is beside the MTU."""
    return [length for tag, length in FRAMES if length <= LONGEST + bool(tag) * spec.VLAN_HLEN]


def gso(kind: int) -> bytes:
    return HEADER.pack(spec.VIRTIO_NET_HDR_F_NEEDS_CSUM, kind, 54, 1448, 34, 16, 0)


@pytest.mark.parametrize("mtu", [True, False])
def test_a_long_frame_from_the_wire_is_dropped_and_counted(mtu: bool) -> None:
    with MailboxEndpoint() as wire:
        offered = EVERY if mtu else EVERY ^ f.VIRTIO_NET_F_MTU
        got = through(wire, offered, frames())
        assert got == (passing() if mtu else [length for _, length in FRAMES])
        assert wire.counters()["dropped_long"] == len(FRAMES) - len(got)


def test_a_segment_may_be_longer_and_an_ecn_bit_alone_is_none() -> None:
    with Segments() as wire:
        put = [
            (frame(0, 4000), gso(spec.VIRTIO_NET_HDR_GSO_TCPV4)),
            (frame(1, 4000), gso(spec.VIRTIO_NET_HDR_GSO_NONE)),
        ]
        assert through(wire, EVERY, put) == [4000]
        assert wire.counters()["dropped_long"] == 1


def test_what_goes_from_ring_to_ring_is_held_to_it_too() -> None:
    with EchoEndpoint() as wire:
        got = through(wire, EVERY, frames())
        assert got == passing()
        assert wire.counters()["dropped_long"] == len(FRAMES) - len(got)
