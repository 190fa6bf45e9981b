"""The inflight area (vhost-user 4e): the chains in flight, in shared memory, for the back end's successor.

Our back ends take chains in order and finish each batch before the next, so the chains in flight after a crash
are exactly those from used.idx to avail.idx: a successor goes on from used.idx. The one thing that used.idx can't tell
is a move from ring to ring that was cut between its two publications; the journal behind the standard part can.

Another program's back end flags each chain that it has in hand. If it finished chains out of order, those can't be told
from the rest by an index, and its area is refused.
"""

from __future__ import annotations

import os
import struct

import numpy as np

from vnetdp_kernels import rows as r
from vnetdp_kernels import spec
from vnetdp_kernels.platform.atomic import load_u16_acquire, store_u16, store_u16_release

from ..errors import ConfigError, RequestRefused
from ..shared.mapping import create_memfd
from ..shared.memory import Bytes, GuestMemory, Region
from ..virtio.queue import is_receiveq
from .message import Inflight

_VERSION = 1
_DESC = np.dtype([("inflight", "u1"), ("padding", "V5"), ("next", "<u2"), ("counter", "<u8")])


def _queue_len(queue_size: int) -> int:
    """Return the bytes of one queue's part."""
    size = spec.INFLIGHT_HEADER_LEN + spec.INFLIGHT_DESC_LEN * queue_size
    return spec.align_up(size, spec.INFLIGHT_ALIGN)


def _whole_pages(length: int) -> int:
    return spec.align_up(length, spec.PAGE_SIZE)


class InflightArea:
    """An area of *size* bytes for *num_queues* queues of *queue_size* descriptors; *fd* is owned."""

    def __init__(self, fd: int, offset: int, size: int, num_queues: int, queue_size: int) -> None:
        self.fd = fd
        self.offset = offset
        self.size = size
        self.num_queues = num_queues
        self.queue_size = queue_size

    @classmethod
    def create(cls, num_queues: int, queue_size: int, max_queues: int) -> InflightArea:
        """Make an area; RequestRefused for counts that no device has."""
        _check(num_queues, queue_size, max_queues)
        size = _size_with_journals(num_queues, queue_size)
        return cls(create_memfd("vnetdp-inflight", size), 0, size, num_queues, queue_size)

    @classmethod
    def attach(cls, said: Inflight, fd: int, max_queues: int) -> InflightArea:
        """Take an area that a front end gives back; RequestRefused if it does not fit its description."""
        _check(said.num_queues, said.queue_size, max_queues)
        if said.size < said.num_queues * _queue_len(said.queue_size) or said.offset % spec.PAGE_SIZE:
            least = said.num_queues * _queue_len(said.queue_size)
            raise RequestRefused(
                f"inflight area {said.offset:#x}+{said.size:#x}: {least} bytes are needed, at a whole page"
            )
        if said.offset + said.size > (there := os.fstat(fd).st_size):
            raise RequestRefused(
                f"inflight area {said.offset:#x}+{said.size:#x} extends past the end of its {there}-byte file"
            )
        return cls(fd, said.offset, said.size, said.num_queues, said.queue_size)

    def describe(self) -> Inflight:
        return Inflight(self.size, self.offset, self.num_queues, self.queue_size)

    def region(self) -> Region:
        """Return the area as something to map beside guest memory."""
        return Region(0, _whole_pages(self.size), self.fd, self.offset)

    def area_at(self, index: int) -> int:
        """Return where in the area a queue's part begins."""
        return index * _queue_len(self.queue_size)

    def journal_at(self, index: int) -> int:
        """Return where a queue's journal is; 0, which is none, if the area has not the size of those we make."""
        if self.size != _size_with_journals(self.num_queues, self.queue_size):
            return 0
        return self.num_queues * _queue_len(self.queue_size) + index * r.JOURNAL_LEN

    def recover(self, index: int, memory: GuestMemory, num: int, avail: int, used: int, other_used: int | None) -> int:
        """Return the next avail index to take of queue *index*, completing work that was cut off.

        avail, used: guest addresses of its rings; other_used: that of its pair's other queue, None = not known.
        RequestRefused for an area that can't be gone on from.
        """
        if index >= self.num_queues or num > self.queue_size:
            raise RequestRefused(
                f"vring {index} of size {num} is not in an inflight area of {self.num_queues} queues of {self.queue_size}"
            )
        mem = memory.mem
        raw = mem.data
        area = memory.beside_offset + self.area_at(index)
        try:
            used_at = memory.translate(used + spec.VIRTQ_RING_IDX, 2)
            avail_at = memory.translate(avail, spec.VIRTQ_RING_ENTRIES + 2 * num)
            other_at = None if other_used is None else memory.translate(other_used + spec.VIRTQ_RING_IDX, 2)
        except ConfigError as e:
            raise RequestRefused(str(e)) from e
        version, desc_num = struct.unpack_from("<HH", raw, area + spec.INFLIGHT_VERSION)
        if version == 0:
            # The version last: if we are killed here, the next back end finds no area, or the whole of one.
            store_u16(mem, area + spec.INFLIGHT_DESC_NUM, num)
            store_u16_release(mem, area + spec.INFLIGHT_VERSION, _VERSION)
        elif version != _VERSION or desc_num != num:
            raise RequestRefused(
                f"vring {index}: inflight area of version {version} for {desc_num} descriptors, not {_VERSION} for {num}"
            )
        journal = self.journal_at(index)
        if journal and not is_receiveq(index) and other_at is not None:
            at = memory.beside_offset + journal
            receiveq_idx, transmitq_idx, valid = struct.unpack_from("<HHH", raw, at)
            if valid and load_u16_acquire(mem, other_at) == receiveq_idx:
                ahead = (transmitq_idx - load_u16_acquire(mem, used_at)) & 0xFFFF
                if ahead <= num:
                    store_u16_release(mem, used_at, transmitq_idx)
            store_u16_release(mem, at + r.JOURNAL_VALID, 0)
        idx = load_u16_acquire(mem, used_at)
        entries = mem[area + spec.INFLIGHT_HEADER_LEN :][: num * spec.INFLIGHT_DESC_LEN]
        last_batch_head, used_idx = struct.unpack_from("<HH", raw, area + spec.INFLIGHT_LAST_BATCH_HEAD)
        heads = _in_flight(entries, last_batch_head, (idx - used_idx) & 0xFFFF)
        if heads != _next_heads(mem, avail_at, num, idx, len(heads)):
            raise RequestRefused(
                f"vring {index}: the previous back end's chains in flight are not the next in the avail ring: {heads[:8]}"
            )
        entries.view(_DESC)["inflight"] = 0
        store_u16(mem, area + spec.INFLIGHT_USED_IDX, idx)
        return idx

    def forget(self, index: int, memory: GuestMemory) -> None:
        """Forget a queue that has nothing in flight: the queue set up in its place may have another size."""
        if index < self.num_queues:
            area = memory.mem[memory.beside_offset :]
            area[self.area_at(index) :][: _queue_len(self.queue_size)] = 0
            journal = self.journal_at(index)
            if journal:
                area[journal:][: r.JOURNAL_LEN] = 0

    def close(self) -> None:
        fd, self.fd = self.fd, -1  # first: another thread that closes it, too, finds none
        if fd >= 0:
            os.close(fd)


def _size_with_journals(num_queues: int, queue_size: int) -> int:
    return _whole_pages(num_queues * (_queue_len(queue_size) + r.JOURNAL_LEN))


def _in_flight(entries: Bytes, last_batch_head: int, batch: int) -> list[int]:
    """Return the heads of the chains in flight, as they were taken, after the last *batch* that was used.

    entries: a queue's, 16 bytes a descriptor; a peer's, so they are looked at once, and may hold anything.
    """
    descs = entries.copy().view(_DESC)
    num = len(descs)
    head = last_batch_head
    for _ in range(batch if batch <= num else 0):
        if head < num:
            descs["inflight"][head] = 0
            head = int(descs["next"][head])
    flagged = np.flatnonzero(descs["inflight"])
    return [int(head) for head in flagged[np.argsort(descs["counter"][flagged], kind="stable")]]


def _next_heads(mem: Bytes, avail_at: int, num: int, idx: int, limit: int) -> list[int]:
    """Return up to *limit* heads of the chains available from *idx* on."""
    waiting = (load_u16_acquire(mem, avail_at + spec.VIRTQ_RING_IDX) - idx) & 0xFFFF
    ring = mem[avail_at + spec.VIRTQ_RING_ENTRIES :][: 2 * num].view("<u2")
    return [int(ring[(idx + k) % num]) for k in range(min(limit, waiting, num))]


def _check(num_queues: int, queue_size: int, max_queues: int) -> None:
    if not 0 < num_queues <= max_queues:
        raise RequestRefused(f"inflight area for {num_queues} queues; the device has {max_queues}")
    if not 0 < queue_size <= spec.VIRTQ_MAX_NUM:
        raise RequestRefused(f"inflight area for queues of {queue_size} descriptors, not 1 to {spec.VIRTQ_MAX_NUM}")
