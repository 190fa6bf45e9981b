"""A ring by hand: every byte that it writes is where the specification has it, and what cannot be is said in one line."""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator

import pytest

from vnetdp import ConfigError, GuestMemory, MailboxEndpoint, NetDevice, features
from vnetdp.testing import READY, Chain, Descriptor, HandRing, bring_up

AT = 0x10000


@pytest.fixture
def memory() -> Iterator[GuestMemory]:
    with GuestMemory.create([(0, 1 << 20)]) as memory:
        yield memory


def test_descriptors_heads_and_indices_lie_where_the_specification_has_them(memory: GuestMemory) -> None:
    ring = HandRing(memory, AT, 8, start=0xFFFF)
    ring.put_desc(3, 0x1122334455667788, 0x99AABBCC, HandRing.NEXT | HandRing.WRITE, 7)
    assert memory.read(AT + 3 * 16, 16) == struct.pack("<QIHH", 0x1122334455667788, 0x99AABBCC, 3, 7)
    ring.offer(3, 5)
    assert memory.read(ring.avail + 2, 2) == struct.pack("<H", 1)  # the index wraps
    assert memory.read(ring.avail + 4 + 2 * 7, 2) == struct.pack("<H", 3)
    assert memory.read(ring.avail + 4, 2) == struct.pack("<H", 5)
    ring.used_event, ring.avail_event = 0x1234, 0x5678
    assert memory.read(ring.avail + 4 + 2 * 8, 2) == struct.pack("<H", 0x1234)
    assert memory.read(ring.used + 4 + 8 * 8, 2) == struct.pack("<H", 0x5678)
    assert (ring.used_event, ring.avail_event, ring.used_idx) == (0x1234, 0x5678, 0xFFFF)


def test_used_elements_are_told_once(memory: GuestMemory) -> None:
    ring = HandRing(memory, AT, 4, start=0xFFFE)
    for k, (head, length) in enumerate([(3, 60), (1, 0), (2, 1514)]):
        memory.write(ring.used + 4 + 8 * ((0xFFFE + k) % 4), struct.pack("<II", head, length))
    ring.used_idx = 1
    assert ring.taken() == [(3, 60), (1, 0), (2, 1514)]
    assert ring.taken() == []
    ring.taken_from(0)
    assert ring.taken() == [(2, 1514)]


def test_a_chain_is_laid_as_it_is_said_in_the_ring_and_in_a_table(memory: GuestMemory) -> None:
    ring = HandRing(memory, AT, 4)
    table = ring.buffer(3)
    ring.lay(
        Chain(
            2,
            (
                Descriptor(2, table, 32, HandRing.INDIRECT),
                Descriptor(0, 0x5000, 10, HandRing.NEXT, 1, table),
                Descriptor(1, 0x6000, 20, 0, 0, table),
            ),
        )
    )
    assert memory.read(ring.desc + 32, 16) == struct.pack("<QIHH", table, 32, HandRing.INDIRECT, 0)
    assert memory.read(table, 32) == struct.pack("<QIHHQIHH", 0x5000, 10, HandRing.NEXT, 1, 0x6000, 20, 0, 0)
    assert memory.read(ring.avail + 2, 4) == struct.pack("<HH", 1, 2)


WRONG: dict[str, Callable[[HandRing], object]] = {
    "descriptor -1 of the ring: 0 to 3 can be": lambda ring: ring.put_desc(-1, 0, 1),
    "descriptor 4 of the ring: 0 to 3 can be": lambda ring: ring.put_desc(4, 0, 1),
    "descriptor -1 of a table: 0 to 32767 can be": lambda ring: ring.put_desc(-1, 0, 1, table=ring.buffer(0)),
    "buffer -1 of a ring of 4: 0 to 3 can be": lambda ring: ring.buffer(-1),
    "buffer 4 of a ring of 4: 0 to 3 can be": lambda ring: ring.post(4),
    "descriptor 0: address -0x1 does not fit a field of 64 bits": lambda ring: ring.put_desc(0, -1, 1),
    "descriptor 0: length 0x100000000 does not fit a field of 32": lambda ring: ring.put_desc(0, 0, 1 << 32),
    "descriptor 0: flags 0x10000 does not fit a field of 16": lambda ring: ring.put_desc(0, 0, 1, 1 << 16),
    "descriptor 0: next -0x1 does not fit a field of 16 bits": lambda ring: ring.put_desc(0, 0, 1, 1, -1),
    "head 0x10000 does not fit a field of 16 bits": lambda ring: ring.offer(1 << 16),
    "guest range 0x100000+0xc is not inside guest memory": lambda ring: HandRing(ring.memory, 0xFD000, 4).send(0, b""),
    "guest range 0x100000+0x10 is not inside guest memory": lambda ring: ring.put_desc(0, 0, 1, table=1 << 20),
    "guest range -0x1000+0x40 is not inside guest memory": lambda ring: HandRing(ring.memory, -0x1000, 4),
    "a ring of 0 descriptors: 1 to 32768 can be": lambda ring: HandRing(ring.memory, AT, 0),
}


@pytest.mark.parametrize("says", WRONG)
def test_what_cannot_be_is_one_clear_error_and_writes_nothing(memory: GuestMemory, says: str) -> None:
    ring = HandRing(memory, AT, 4)
    before = memory.read(0, memory.end)
    with pytest.raises(ConfigError) as caught:
        WRONG[says](ring)
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)
    assert memory.read(0, memory.end) == before


def test_a_device_serves_rings_that_were_brought_up_by_hand(memory: GuestMemory) -> None:
    with MailboxEndpoint() as wire, NetDevice(memory, wire, threaded=False) as device:
        receiveq, transmitq = bring_up(device, features.VIRTIO_F_VERSION_1)
        device.set_status(READY)
        receiveq.post(2)
        transmitq.send(1, b"\2" * 60)
        wire.put(b"\3" * 70)
        assert device.step() == 2
        assert (wire.take(), transmitq.taken(), receiveq.taken()) == ([b"\2" * 60], [(1, 0)], [(2, 82)])
        assert memory.read(receiveq.buffer(2) + 12, 70) == b"\3" * 70
        assert receiveq.content()[-4096 * 14 : -4096 * 13][12:82] == b"\3" * 70
