"""The inflight area (vhost-user 4e): what a back end leaves behind in shared memory, for the one that comes after it.

Our back ends take chains in order and finish each batch before the next, so what is in flight after a crash is
exactly what lies between used.idx and avail.idx: a successor goes on from used.idx. The one thing that used.idx can't tell
is a move from ring to ring that was cut between its two publications; the journal behind the standard part can.
"""

from __future__ import annotations

import os
import struct

from vnetdp_kernels import layout
from vnetdp_kernels.atomic import load_u16_acquire, store_u16_release

from .errors import ConfigError, RequestRefused
from .memory import GuestMemory, Region, create_memfd
from .vhost_user.message import Inflight

_VERSION = 1


def _queue_len(queue_size: int) -> int:
    """Return the bytes of one queue's part."""
    size = layout.INFLIGHT_HEADER_LEN + layout.INFLIGHT_DESC_LEN * queue_size
    return -(-size // layout.INFLIGHT_ALIGN) * layout.INFLIGHT_ALIGN


class InflightArea:
    """An area for *num_queues* queues of *queue_size* descriptors; *fd* is owned."""

    def __init__(self, fd: int, offset: int, length: int, num_queues: int, queue_size: int) -> None:
        self.fd = fd
        self.offset = offset
        self.length = length
        self.num_queues = num_queues
        self.queue_size = queue_size

    @classmethod
    def create(cls, num_queues: int, queue_size: int, max_queues: int) -> InflightArea:
        """Make an area; RequestRefused for counts that no device has."""
        _check(num_queues, queue_size, max_queues)
        length = num_queues * (_queue_len(queue_size) + layout.JOURNAL_LEN)
        length = -(-length // layout.PAGE_SIZE) * layout.PAGE_SIZE
        return cls(create_memfd("vnetdp-inflight", length), 0, length, num_queues, queue_size)

    @classmethod
    def attach(cls, said: Inflight, fd: int, max_queues: int) -> InflightArea:
        """Take an area that a front end gives back; RequestRefused if it can't be what it says."""
        _check(said.num_queues, said.queue_size, max_queues)
        if said.size < said.num_queues * _queue_len(said.queue_size) or said.offset % layout.PAGE_SIZE:
            raise RequestRefused(f"an inflight area of {said.size} bytes is too small, or not aligned")
        length = -(-said.size // layout.PAGE_SIZE) * layout.PAGE_SIZE
        if said.offset + said.size > os.fstat(fd).st_size:
            raise RequestRefused("an inflight area that ends behind its file")
        return cls(fd, said.offset, length, said.num_queues, said.queue_size)

    def describe(self) -> Inflight:
        return Inflight(self.length, self.offset, self.num_queues, self.queue_size)

    def region(self) -> Region:
        """Return the area as something to map beside guest memory."""
        return Region(0, self.length, self.fd, self.offset)

    def area_at(self, index: int) -> int:
        """Return where in the area a queue's part begins."""
        return index * _queue_len(self.queue_size)

    def journal_at(self, index: int) -> int:
        """Return where a queue's journal is; 0, which is none, if whoever made the area left no room for it."""
        at = self.num_queues * _queue_len(self.queue_size) + index * layout.JOURNAL_LEN
        return at if at + layout.JOURNAL_LEN <= self.length else 0

    def recover(self, index: int, memory: GuestMemory, num: int, used: int, other_used: int | None) -> int:
        """Return the next avail index to take of a queue whose area this is, finishing what was cut off.

        used: guest address of its used ring; other_used: that of its pair's other queue, None = not known.
        """
        if index >= self.num_queues or num > self.queue_size:
            raise RequestRefused(f"vring {index} of size {num} is not in an inflight area for {self.queue_size}")
        mem = memory.mem
        raw = mem.data
        area = memory.beside_offset + self.area_at(index)
        try:
            used_at = memory.translate(used + layout.VIRTQ_RING_IDX, 2)
            other_at = None if other_used is None else memory.translate(other_used + layout.VIRTQ_RING_IDX, 2)
        except ConfigError as e:
            raise RequestRefused(str(e)) from e
        version, desc_num = struct.unpack_from("<HH", raw, area + layout.INFLIGHT_VERSION)
        if version == 0:
            struct.pack_into("<HH", raw, area + layout.INFLIGHT_VERSION, _VERSION, num)
        elif version != _VERSION or desc_num != num:
            raise RequestRefused(f"vring {index}: inflight area of version {version} for {desc_num} descriptors")
        journal = self.journal_at(index)
        if journal and index % 2 == 1 and other_at is not None:
            at = memory.beside_offset + journal
            receiveq_idx, transmitq_idx, valid = struct.unpack_from("<HHH", raw, at)
            if valid and load_u16_acquire(mem, other_at) == receiveq_idx:
                ahead = (transmitq_idx - load_u16_acquire(mem, used_at)) & 0xFFFF
                if ahead <= num:
                    store_u16_release(mem, used_at, transmitq_idx)
            struct.pack_into("<H", raw, at + layout.JOURNAL_VALID, 0)
        idx = load_u16_acquire(mem, used_at)
        struct.pack_into("<H", raw, area + layout.INFLIGHT_USED_IDX, idx)
        return idx

    def close(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


def _check(num_queues: int, queue_size: int, max_queues: int) -> None:
    if not 0 < num_queues <= max_queues:
        raise RequestRefused(f"an inflight area for {num_queues} queues; the device has {max_queues}")
    if not 0 < queue_size <= layout.VIRTQ_MAX_NUM:
        raise RequestRefused(f"an inflight area for queues of {queue_size} descriptors")
