"""HandRing: a driver's side of a split virtqueue that is written byte by byte, and so can break every rule of it.

Rings are read and written with `struct` alone, never with the accessors of vnetdp: a test compares two pieces of code.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final, overload

from vnetdp_kernels import spec

from ..device.device import NetDevice
from ..errors import ConfigError
from ..shared.memory import GuestMemory
from ..virtio.queue import queues_of, ring_len
from ..virtio.state import (
    VIRTIO_CONFIG_S_ACKNOWLEDGE,
    VIRTIO_CONFIG_S_DRIVER,
    VIRTIO_CONFIG_S_DRIVER_OK,
    VIRTIO_CONFIG_S_FEATURES_OK,
)

_BUFFER_LEN: Final = 2048
READY: Final = (
    VIRTIO_CONFIG_S_ACKNOWLEDGE | VIRTIO_CONFIG_S_DRIVER | VIRTIO_CONFIG_S_FEATURES_OK | VIRTIO_CONFIG_S_DRIVER_OK
)
"""The device status of a driver that is ready (Virtio 1.2, 3.1.1): `set_status(READY)` comes last, after `bring_up`."""


@dataclass(frozen=True, slots=True)
class Descriptor:
    """A descriptor as it lies in memory (Virtio 1.2, 2.7.5). Any value that fits its field may stand there."""

    at: int
    """Its number in the ring's descriptor table, or in the indirect table."""
    gpa: int
    """The guest address of its buffer, or of an indirect table: 64 bits."""
    length: int
    """The bytes of that buffer: 32 bits."""
    flags: int = 0
    """`HandRing.NEXT`, `WRITE` and `INDIRECT`: 16 bits."""
    following: int = 0
    """The number of the next descriptor, if NEXT is set: 16 bits."""
    table: int | None = None
    """The guest address of the indirect table that it lies in; None: the ring's own table."""


@dataclass(frozen=True, slots=True)
class Chain:
    """A descriptor chain as plain data, for `HandRing.lay`."""

    head: int
    """The number of its first descriptor, for the avail ring: 16 bits."""
    descriptors: tuple[Descriptor, ...]
    """The descriptors to write, in any order."""
    breaks: str = ""
    """The reason for which a queue has to break at it, as the text of a `GuestError` names it; empty for a valid chain."""


class _Field:
    """A u16 of a ring: *skip* bytes into its part, and *entry* bytes more for each entry of the ring."""

    def __init__(self, part: str, skip: int, entry: int) -> None:
        self._part, self._skip, self._entry = part, skip, entry

    def _gpa(self, ring: HandRing) -> int:
        return int(getattr(ring, self._part)) + self._skip + self._entry * ring.num

    @overload
    def __get__(self, ring: None, owner: type[HandRing]) -> _Field: ...
    @overload
    def __get__(self, ring: HandRing, owner: type[HandRing]) -> int: ...
    def __get__(self, ring: HandRing | None, owner: type[HandRing]) -> int | _Field:
        if ring is None:
            return self
        return int.from_bytes(ring.memory.read(self._gpa(ring), 2), "little")

    def __set__(self, ring: HandRing, value: int) -> None:
        ring.memory.write(self._gpa(ring), struct.pack("<H", value & 0xFFFF))


class HandRing:
    """The driver's side of a split virtqueue in *memory*, written byte by byte (Virtio 1.2, 2.7).

    The descriptor table, the avail ring, the used ring and each of *num* buffers (4096 bytes) begin on pages of their own,
    from guest address *at* on. Nothing else is written: what the driver has to hold to, this class need not.

    - `num`: descriptors, 1 to 32768.
    - `start`: the value at which avail.idx and used.idx begin, 0 to 65535.

    ConfigError if a part of the ring is not inside guest memory, a number does not fit its field, or there is no
    descriptor or buffer of that number. Values that fit are written, whatever a device may make of them.
    """

    NEXT: Final = spec.VIRTQ_DESC_F_NEXT
    """A descriptor's flag: the chain goes on."""
    WRITE: Final = spec.VIRTQ_DESC_F_WRITE
    """A descriptor's flag: the device writes the buffer."""
    INDIRECT: Final = spec.VIRTQ_DESC_F_INDIRECT
    """A descriptor's flag: the buffer is a table of descriptors."""

    desc: int
    """The guest address of the descriptor table."""
    avail: int
    """The guest address of the avail ring."""
    used: int
    """The guest address of the used ring."""

    avail_flags = _Field("avail", 0, 0)
    """avail.flags: 1 asks for no calls. Set modulo 65536, as each of these fields."""
    avail_idx = _Field("avail", 2, 0)
    """avail.idx: the index behind the last chain made available."""
    used_event = _Field("avail", 4, 2)
    """used_event: the used index at which the driver wants a call."""
    used_flags = _Field("used", 0, 0)
    """used.flags: 1 asks for no kicks."""
    used_idx = _Field("used", 2, 0)
    """used.idx: the index behind the last chain that the device used."""
    avail_event = _Field("used", 4, 8)
    """avail_event: the avail index at which the device wants a kick."""

    def __init__(self, memory: GuestMemory, at: int, num: int = 16, start: int = 0) -> None:
        if not 1 <= num <= spec.VIRTQ_MAX_NUM:
            raise ConfigError(f"a ring of {num} descriptors: 1 to {spec.VIRTQ_MAX_NUM} can be")
        self.memory = memory
        self.num = num
        """Descriptors."""
        lens = ring_len(num)
        self.desc, self.avail, self.used, self._buffers = at, *self._behind(at, lens)
        for gpa, length in zip((self.desc, self.avail, self.used), lens, strict=True):
            memory.translate(gpa, length)
        self.end = self._buffers + num * spec.PAGE_SIZE
        """The guest address behind the last buffer: another ring may begin here."""
        self.avail_idx = self.used_idx = start
        self._seen = start

    @staticmethod
    def _behind(at: int, lens: tuple[int, ...]) -> Iterator[int]:
        for length in lens:
            at += spec.align_up(length, spec.PAGE_SIZE)
            yield at

    def buffer(self, i: int) -> int:
        """Return the guest address of buffer *i*: 4096 bytes."""
        if not 0 <= i < self.num:
            raise ConfigError(f"buffer {i} of a ring of {self.num}: 0 to {self.num - 1} can be")
        return self._buffers + i * spec.PAGE_SIZE

    def put_desc(
        self, i: int, gpa: int, length: int, flags: int = 0, following: int = 0, *, table: int | None = None
    ) -> None:
        """Write descriptor *i*; the parameters are those of `Descriptor`. It is not made available by this."""
        if not 0 <= i < (self.num if table is None else spec.VIRTQ_MAX_NUM):
            last = (self.num if table is None else spec.VIRTQ_MAX_NUM) - 1
            raise ConfigError(f"descriptor {i} of {'the ring' if table is None else 'a table'}: 0 to {last} can be")
        for name, value, bits in (
            ("address", gpa, 64),
            ("length", length, 32),
            ("flags", flags, 16),
            ("next", following, 16),
        ):
            _check(f"descriptor {i}: {name}", value, bits)
        at = self.desc if table is None else table
        self.memory.write(at + spec.VIRTQ_DESC_SIZE * i, struct.pack("<QIHH", gpa, length, flags, following))

    def offer(self, *heads: int) -> None:
        """Make the chains that begin at the descriptors *heads* available; no kick is given."""
        idx = self.avail_idx
        for k, head in enumerate(heads):
            _check("head", head, 16)
            self.memory.write(self.avail + 4 + 2 * ((idx + k) % self.num), struct.pack("<H", head))
        self.avail_idx = idx + len(heads)

    def lay(self, chain: Chain) -> None:
        """Write the descriptors of *chain*, and make it available; no kick is given."""
        for desc in chain.descriptors:
            self.put_desc(desc.at, desc.gpa, desc.length, desc.flags, desc.following, table=desc.table)
        self.offer(chain.head)

    def send(self, head: int, data: bytes) -> None:
        """Make a virtio_net_hdr of 12 zeros and *data* available, in buffer *head* and the descriptor of that number."""
        self.memory.write(self.buffer(head), bytes(spec.NET_HDR_LEN) + data)
        self.put_desc(head, self.buffer(head), spec.NET_HDR_LEN + len(data))
        self.offer(head)

    def post(self, *heads: int) -> None:
        """Make a receive buffer of 2048 bytes available in each of the descriptors *heads*."""
        for head in heads:
            self.put_desc(head, self.buffer(head), _BUFFER_LEN, self.WRITE)
        self.offer(*heads)

    def taken(self) -> list[tuple[int, int]]:
        """Return the used elements (id, length in bytes) published since the last call, oldest first."""
        idx = self.used_idx
        found = []
        for k in range(self._seen, self._seen + ((idx - self._seen) & 0xFFFF)):
            head, length = struct.unpack("<II", self.memory.read(self.used + 4 + 8 * (k % self.num), 8))
            found.append((head, length))
        self._seen = idx
        return found

    def taken_from(self, idx: int) -> None:
        """Have `taken` begin at used index *idx*."""
        self._seen = idx & 0xFFFF

    def content(self) -> bytes:
        """Return every byte of the ring and of its buffers."""
        return self.memory.read(self.desc, self.end - self.desc)


def bring_up(device: NetDevice, features: int = 0, num: int = 16, at: int = 0x10000) -> list[HandRing]:
    """Do all that a driver does before DRIVER_OK (Virtio 1.2, 3.1.1); return the rings of all queues, which are empty.

    - `features`: the feature bits to accept. The device refuses a set that it does not offer: see its `status`.
    - `num`: descriptors of each queue.
    - `at`: the guest address of the first ring; each other ring follows the last buffer of the one before.

    `device.set_status(READY)` comes next, and gives the rings an owner. ConfigError if the rings don't fit.
    """
    for status in (0, VIRTIO_CONFIG_S_ACKNOWLEDGE, VIRTIO_CONFIG_S_ACKNOWLEDGE | VIRTIO_CONFIG_S_DRIVER):
        device.set_status(status)
    device.set_driver_features(features)
    device.set_status(READY & ~VIRTIO_CONFIG_S_DRIVER_OK)
    rings: list[HandRing] = []
    for index in range(queues_of(device.queue_pairs)):
        ring = HandRing(device.memory, at, num)
        device.set_queue(index, num, ring.desc, ring.avail, ring.used)
        device.enable_queue(index)
        rings.append(ring)
        at = ring.end
    return rings


def _check(name: str, value: int, bits: int) -> None:
    if not 0 <= value < 1 << bits:
        raise ConfigError(f"{name} {value:#x} does not fit a field of {bits} bits: 0 to {(1 << bits) - 1:#x} can be")
