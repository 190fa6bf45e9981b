"""A guest's memory, its rings and its endpoints, laid out by hand: what the tests of the kernels share.

Rings and buffers are read and written here with `struct`, never with the accessors under test.
"""

from __future__ import annotations

import os
import struct
from collections import deque
from collections.abc import Iterator

import numpy as np

from vnetdp_kernels import rows as r
from vnetdp_kernels import spec
from vnetdp_kernels.loops.drive import drive
from vnetdp_kernels.loops.serve import serve
from vnetdp_kernels.net import device, driver
from vnetdp_kernels.platform import peer
from vnetdp_kernels.platform.atomic import Bytes, Words
from vnetdp_kernels.rows import Control, DriverRings, Guest, Limits, LoopScratch, Rings, Scratch, Sink, Source, Wire
from vnetdp_kernels.virtq import split_device, split_driver
from vnetdp_kernels.wire import port
from vnetdp_kernels.wire.frame import HDR_SCRATCH

CAMPAIGN = os.environ.get("VNETDP_CAMPAIGN") == "1"
COMPILED = hasattr(split_device.gather, "py_func")  # False with NUMBA_DISABLE_JIT=1

CANARY = 0xA5
HOLE = 1 << 16  # bytes of each hole in the window, and of the guards around it
LOW_GPA = 0x10_0000
HIGH_GPA = 0x1000_0000
TOP_LEN = 1 << 16
TOP_GPA = (1 << 63) - TOP_LEN  # its last byte has the highest address that an int64 holds

NEXT = spec.VIRTQ_DESC_F_NEXT
WRITE = spec.VIRTQ_DESC_F_WRITE
INDIRECT = spec.VIRTQ_DESC_F_INDIRECT


def scaled(compiled: int, plain: int) -> int:
    """Return how much to do: plain Python runs the kernels some hundred times slower."""
    return compiled if COMPILED else plain


def pattern(n: int, length: int = 60) -> bytes:
    """Return bytes that tell frame *n* from its neighbours, and each byte from those around it."""
    return bytes((37 * n + i + (i >> 8)) & 0xFF for i in range(length))


def pages_of(gpa: int, length: int) -> set[int]:
    """Return the numbers of the pages that [gpa, gpa + length) touches."""
    return set(range(gpa >> 12, (gpa + length - 1 >> 12) + 1)) if length > 0 else set()


class Memory:
    """Guest memory in one window: low memory, two adjacent regions far above, and one that ends at 2**63.

    Holes lie before, between and behind them, and guards around the window; all hold CANARY.
    """

    def __init__(self, low: int = 1 << 20, high: int = 1 << 20) -> None:
        half = spec.align_up(high // 2, spec.PAGE_SIZE)
        self.low_end = LOW_GPA + low
        self.seam = HIGH_GPA + half  # where the two adjacent regions meet
        self.high_end = self.seam + half
        at = HOLE
        self.regions_given = []
        for gpa, length, hole in (
            (LOW_GPA, low, HOLE), (HIGH_GPA, half, 0), (self.seam, half, HOLE), (TOP_GPA, TOP_LEN, HOLE)
        ):  # fmt: skip
            self.regions_given.append((gpa, length, at))
            at += length + hole
        backing = np.full(at + 2 * HOLE + spec.PAGE_SIZE, CANARY, np.uint8)
        skip = -(backing.ctypes.data + HOLE) % spec.PAGE_SIZE
        self.backing = backing[skip:]
        self.mem: Bytes = self.backing[HOLE : HOLE + at]
        for _, length, offset in self.regions_given:
            self.mem[offset : offset + length] = 0
        self.regions: Words = np.array(list(self._runs()), np.int64)
        self.log: Bytes = np.zeros(0, np.uint8)
        self._low_free = LOW_GPA + spec.PAGE_SIZE
        self._high_free = HIGH_GPA

    def _runs(self) -> Iterator[tuple[int, int, int]]:
        start = length = at = -1
        for gpa, more, offset in self.regions_given:
            if gpa == start + length and offset == at + length:
                length += more
                continue
            if start >= 0:
                yield start, length, at
            start, length, at = gpa, more, offset
        yield start, length, at

    def log_on(self) -> None:
        """Start a dirty log with a bit for each page up to the end of the high regions."""
        self.log = np.zeros(((self.high_end >> 12) + 63) // 64 * 8, np.uint8)

    def dirty(self) -> set[int]:
        """Return the pages whose bit is set."""
        bits = np.unpackbits(self.log, bitorder="little")
        return {int(page) for page in np.flatnonzero(bits)}

    def intact(self) -> bool:
        """True if nothing but guest memory was written."""
        check = self.backing.copy()
        for _, length, offset in self.regions_given:
            check[HOLE + offset : HOLE + offset + length] = CANARY
        return bool((check == CANARY).all())

    def low(self, length: int, align: int = 1) -> int:
        """Return the guest address of fresh low memory, aligned to *align* and to nothing more."""
        at = spec.align_up(self._low_free, align)
        if align > 1 and at % (2 * align) == 0:
            at += align
        self._low_free = at + length
        assert self._low_free <= self.low_end
        return at

    def high(self, length: int) -> int:
        """Return the guest address of fresh high memory."""
        at = self._high_free
        self._high_free += length
        assert self._high_free <= self.high_end
        return at

    def at(self, gpa: int, length: int = 1) -> int:
        """Return the window offset of a range that lies in one run."""
        for start, run, offset in self._runs():
            if start <= gpa and gpa + length <= start + run:
                return offset + gpa - start
        raise ValueError(f"{gpa:#x}+{length} is not guest memory")

    def read(self, gpa: int, length: int) -> bytes:
        at = self.at(gpa, length)
        return self.mem[at : at + length].tobytes()

    def write(self, gpa: int, data: bytes) -> None:
        at = self.at(gpa, max(1, len(data)))
        self.mem[at : at + len(data)] = np.frombuffer(data, np.uint8)

    def u16(self, gpa: int) -> int:
        return int.from_bytes(self.read(gpa, 2), "little")

    def put_u16(self, gpa: int, value: int) -> None:
        self.write(gpa, struct.pack("<H", value & 0xFFFF))


class Field:
    """A u16 of a ring: *skip* bytes into its part, and *entry* bytes more for each entry of the ring."""

    def __init__(self, part: str, skip: int, entry: int) -> None:
        self.part, self.skip, self.entry = part, skip, entry

    def _gpa(self, queue: Queue) -> int:
        return int(getattr(queue, self.part)) + self.skip + self.entry * queue.num

    def __get__(self, queue: Queue, owner: type[Queue]) -> int:
        return queue.memory.u16(self._gpa(queue))

    def __set__(self, queue: Queue, value: int) -> None:
        queue.memory.put_u16(self._gpa(queue), value)


class Queue:
    """One virtqueue: its parts in low memory, a row for either side, and hands to write nonsense into it."""

    def __init__(self, memory: Memory, num: int, vq: Words, dvq: Words, state: Words, start: int) -> None:
        self.memory, self.num, self.vq, self.dvq, self.state = memory, num, vq, dvq, state
        self.desc_gpa = memory.low(16 * num, spec.VIRTQ_DESC_ALIGN)
        self.avail_gpa = memory.low(6 + 2 * num, spec.VIRTQ_AVAIL_ALIGN)
        self.used_gpa = memory.low(6 + 8 * num, spec.VIRTQ_USED_ALIGN)
        self.seen = start  # used elements the test has looked at
        offsets = [memory.at(gpa) for gpa in (self.desc_gpa, self.avail_gpa, self.used_gpa)]
        vq[r.VQ_NUM], dvq[r.DVQ_NUM] = num, num
        vq[r.VQ_DESC : r.VQ_USED + 1] = dvq[r.DVQ_DESC : r.DVQ_USED + 1] = offsets
        vq[r.VQ_DESC_GPA : r.VQ_USED_GPA + 1] = (self.desc_gpa, self.avail_gpa, self.used_gpa)
        vq[r.VQ_LOG_USED] = self.used_gpa
        vq[r.VQ_BOUND] = vq[r.VQ_ENABLED] = vq[r.VQ_KICKS_ON] = vq[r.VQ_INDIRECT] = 1
        dvq[r.DVQ_CALLS_ON] = 1
        split_driver.reset_driver(dvq, state)
        for slot in (r.VQ_LAST_AVAIL_IDX, r.VQ_LAST_USED_IDX, r.VQ_AVAIL_IDX, r.VQ_SIGNALLED_USED):
            vq[slot] = start
        for slot in (r.DVQ_AVAIL_IDX, r.DVQ_PUBLISHED_IDX, r.DVQ_KICKED_IDX):
            dvq[slot] = start
        dvq[r.DVQ_LAST_USED_IDX] = dvq[r.DVQ_USED_IDX] = start
        self.avail_idx = self.used_idx = self.avail_event = self.used_event = start

    avail_flags = Field("avail_gpa", 0, 0)
    avail_idx = Field("avail_gpa", 2, 0)
    used_event = Field("avail_gpa", 4, 2)
    used_flags = Field("used_gpa", 0, 0)
    used_idx = Field("used_gpa", 2, 0)
    avail_event = Field("used_gpa", 4, 8)

    def desc(self, i: int, gpa: int, length: int, flags: int = 0, following: int = 0, *, table: int = -1) -> None:
        """Write descriptor *i* of the queue's own table, or of the one at guest address *table*."""
        base = self.desc_gpa if table < 0 else table
        packed = struct.pack("<QIHH", gpa % (1 << 64), length, flags, following)
        self.memory.write(base + 16 * i, packed)

    def buffer(self, i: int) -> tuple[int, int]:
        """Return what descriptor *i* refers to: (guest address, length)."""
        gpa, length = struct.unpack("<QI", self.memory.read(self.desc_gpa + 16 * i, 12))
        return gpa, length

    def put(self, iov: Words, n_out: int, direct: int, table: Words, token: int) -> int:
        """Put a chain with the driver's kernels: *direct* buffers in the ring, the rest in *table*."""
        n = len(iov)
        mem = self.memory.mem
        if n == direct == 1:
            gpa, length = int(iov[0, r.IOV_GPA]), int(iov[0, r.IOV_LEN])
            return split_driver.put_single(mem, self.dvq, self.state, gpa, length, 1 - n_out, token)
        return split_driver.put_chain(mem, self.dvq, self.state, iov, n_out, direct, table, token)

    def offer(self, *heads: int) -> None:
        """Make chains available behind the driver kernels' back."""
        idx = self.avail_idx
        for k, head in enumerate(heads):
            self.memory.put_u16(self.avail_gpa + 4 + 2 * ((idx + k) % self.num), head)
        self.avail_idx = idx + len(heads)

    def use(self, *elements: tuple[int, int], idx: int | None = None) -> None:
        """Write used elements (id, len) behind the device kernels' back; *idx* overrides the index."""
        at = self.used_idx
        for k, element in enumerate(elements):
            self.memory.write(self.used_gpa + 4 + 8 * ((at + k) % self.num), struct.pack("<II", *element))
        self.used_idx = at + len(elements) if idx is None else idx

    def used(self) -> list[tuple[int, int]]:
        """Return the used elements (id, len) published since this was last asked."""
        n = (self.used_idx - self.seen) & 0xFFFF
        at = [self.used_gpa + 4 + 8 * ((self.seen + k) % self.num) for k in range(n)]
        self.seen = self.used_idx
        found = (struct.unpack("<II", self.memory.read(gpa, 8)) for gpa in at)
        return [(head, length) for head, length in found]

    def drivers_parts(self) -> bytes:
        """Return the bytes of the two parts that a device may only read."""
        read = self.memory.read
        return read(self.desc_gpa, 16 * self.num) + read(self.avail_gpa, 6 + 2 * self.num)


class Arena:
    """Slots for buffers and indirect tables, at any address; the seam of two regions lies in one of them."""

    SLOTS = 64
    SLOT = 8000
    HALF = SLOT // 2
    FILL = 0xEE

    def __init__(self, memory: Memory, base: int = -1) -> None:
        self.memory = memory
        self.base = base if base >= 0 else memory.seam - 10 * self.SLOT - 2000
        self.free = deque(range(self.SLOTS))

    def lay_out(
        self, lengths: list[int], start: int, table_at: int, table_first: bool
    ) -> tuple[int, list[tuple[int, int]], Words, Words]:
        """Lay buffers end to end into the next free slot; return (slot, [(gpa, length)], iov, table)."""
        slot = self.free[0]
        at = self.base + self.SLOT * slot
        self.memory.write(at, bytes([self.FILL]) * self.SLOT)
        gpa = at + start + (self.HALF if table_first else 0)
        table_gpa = at + table_at + (0 if table_first else self.HALF)
        assert start + sum(lengths) <= self.HALF >= table_at + 16 * len(lengths)
        segments = []
        for length in lengths:
            segments.append((gpa, length))
            gpa += length
        iov = np.array([(self.memory.at(*segment), segment[1], segment[0]) for segment in segments], np.int64)
        return slot, segments, iov, np.array([self.memory.at(table_gpa), table_gpa], np.int64)


class Side:
    """The endpoints of one side, its control words, and the scratch arrays that its kernels work in."""

    def __init__(self, pairs: int, num: int, kind: int, flow: int, slots: int) -> None:
        cap = max(num, r.MIN_CHAIN_CAP)
        self.eps: Words = np.zeros((pairs, r.EP_SLOTS), np.int64)
        self.eps[:, r.EP_KIND] = kind
        self.eps[:, r.EP_SIZE] = 60
        self.eps[:, r.EP_LIMIT] = -1
        self.eps[:, r.EP_CHECK] = 1
        self.eps[:, r.EP_FLOW] = flow + 2 * np.arange(pairs)
        self.fds: Words = np.full(pairs, -1, np.int64)
        self.pending: Bytes = np.zeros((pairs, r.FRAME_SLOT), np.uint8)
        self.in_frames: Bytes = np.zeros((pairs, slots * r.FRAME_SLOT), np.uint8)
        self.in_lengths: Words = np.zeros((pairs, slots), np.int64)
        self.out_frames: Bytes = np.zeros((pairs, slots * r.FRAME_SLOT), np.uint8)
        self.out_lengths: Words = np.zeros((pairs, slots), np.int64)
        self.ledger: Words = np.zeros((2 * pairs, r.LEDGER_SLOTS), np.int64)
        self.windows: Bytes = np.zeros((2 * pairs, r.LEDGER_WINDOW), np.uint8)
        self.ctl: Words = np.zeros(r.CTL_SLOTS, np.int64)
        self.ctl_fd = -1
        self.scratch = Scratch(
            iov=np.zeros((cap, r.IOV_SLOTS), np.int64),
            frame_iov=np.zeros((cap, r.IOV_SLOTS), np.int64),
            chains=np.zeros((num, 2), np.int64),
            hdr=np.zeros(HDR_SCRATCH, np.uint8),
            words=np.zeros(port.SCRATCH_WORDS, np.int64),
        )
        self.loop_scratch = LoopScratch(
            self.scratch, pollfds=np.zeros((2, 3 * pairs + 1), np.int64), one=peer.tell_words()
        )

    @property
    def wire(self) -> Wire:
        return Wire(
            self.eps, self.fds, self.pending, self.in_frames, self.in_lengths, self.out_frames, self.out_lengths,
            self.ledger, self.windows,
        )  # fmt: skip

    def source(self, pair: int) -> Source:
        return Source(
            self.eps[pair], int(self.fds[pair]), self.pending[pair], self.in_frames[pair], self.in_lengths[pair]
        )

    def sink(self, pair: int) -> Sink:
        return Sink(
            self.eps[pair],
            int(self.fds[pair]),
            self.out_frames[pair],
            self.out_lengths[pair],
            self.ledger,
            self.windows,
        )

    @property
    def control(self) -> Control:
        return Control(self.ctl, self.ctl_fd)

    def feed(self, *frames: bytes, pair: int = 0) -> None:
        """Lay frames, virtio_net_hdr first, into the slots of a Python endpoint, as from the wire."""
        assert self.eps[pair, r.EP_COUNT] == 0
        for slot, frame in enumerate(frames):
            at = slot * r.FRAME_SLOT
            self.in_frames[pair, at : at + len(frame)] = np.frombuffer(frame, np.uint8)
            self.in_lengths[pair, slot] = len(frame)
        self.eps[pair, r.EP_FIRST], self.eps[pair, r.EP_COUNT] = 0, len(frames)

    def collect(self, pair: int = 0) -> list[bytes]:
        """Take the frames, virtio_net_hdr first, that wait in the slots of a Python endpoint for the wire."""
        n = int(self.eps[pair, r.EP_OUT_COUNT])
        self.eps[pair, r.EP_OUT_COUNT] = 0
        slots = self.out_frames[pair].reshape(-1, r.FRAME_SLOT)
        return [slots[k, : self.out_lengths[pair, k]].tobytes() for k in range(n)]

    def ring_doorbell(self) -> None:
        """Call a loop back, out of its sleep too."""
        self.ctl[r.CTL_DOORBELL] = 1
        if self.ctl_fd >= 0:
            os.eventfd_write(self.ctl_fd, 1)


class Rig:
    """A guest and a device with *pairs* queue pairs of *num* descriptors: receiveq 2i, transmitq 2i + 1."""

    def __init__(
        self,
        num: int = 16,
        pairs: int = 1,
        *,
        event_idx: bool = False,
        in_order: bool = False,
        mergeable: bool = True,
        hdr_len: int = spec.NET_HDR_LEN,
        start: int = 0,
        buf_len: int = 2048,
        slots: int = 8,
        device: int = r.KIND_PYTHON,
        guest: int = r.KIND_PYTHON,
    ) -> None:
        rings = 2 * pairs * (26 * num + 256)
        self.memory = Memory(max(1 << 20, -(-rings >> 12) + 1 << 12), 2 * pairs * num * buf_len + (1 << 20))
        self.pairs, self.hdr_len = pairs, hdr_len
        self.vqs: Words = np.zeros((2 * pairs, r.VQ_SLOTS), np.int64)
        self.dvqs: Words = np.zeros((2 * pairs, r.DVQ_SLOTS), np.int64)
        self.states: Words = np.zeros((2 * pairs, num, r.DESC_STATE_SLOTS), np.int64)
        self.queues = []
        for q in range(2 * pairs):
            vq, dvq = self.vqs[q], self.dvqs[q]
            self.queues.append(Queue(self.memory, num, vq, dvq, self.states[q], start))
            vq[r.VQ_EVENT_IDX] = dvq[r.DVQ_EVENT_IDX] = event_idx
            vq[r.VQ_MRG_RXBUF] = dvq[r.DVQ_MRG_RXBUF] = mergeable
            vq[r.VQ_HDR_LEN] = dvq[r.DVQ_HDR_LEN] = hdr_len
            vq[r.VQ_OFFLOADS] = 127
            dvq[r.DVQ_IN_ORDER] = in_order
            dvq[r.DVQ_BUF_GPA] = self.memory.high(num * buf_len)
            dvq[r.DVQ_BUF_OFFSET] = self.memory.at(int(dvq[r.DVQ_BUF_GPA]), num * buf_len)
            dvq[r.DVQ_BUF_LEN] = buf_len
        self.notify: Words = np.full((2 * pairs, 2), -1, np.int64)
        self.device = Side(pairs, num, device, 1, slots)
        self.guest = Side(pairs, num, guest, 0, slots)
        self._fds: list[int] = []

    @property
    def rx(self) -> Queue:
        return self.queues[0]

    @property
    def tx(self) -> Queue:
        return self.queues[1]

    def open_eventfds(self) -> None:
        """Give each queue a kick and a call descriptor, and each side one to be called back with."""
        self._fds = [os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC) for _ in range(2 * len(self.queues) + 2)]
        self.notify[:] = np.array(self._fds[:-2]).reshape(-1, 2)
        self.device.ctl_fd, self.guest.ctl_fd = self._fds[-2:]

    def close(self) -> None:
        for fd in self._fds:
            os.close(fd)
        self._fds = []

    def post_receive(self, pair: int = 0) -> None:
        """Fill a receiveq with the driver's own buffers."""
        queue = self.queues[2 * pair]
        driver.post_receive(self.memory.mem, queue.dvq, queue.state)
        split_driver.publish_available(self.memory.mem, queue.dvq)

    @property
    def device_guest(self) -> Guest:
        return Guest(self.memory.mem, self.memory.regions, self.memory.log)

    @property
    def device_rings(self) -> Rings:
        return Rings(self.device_guest, self.vqs, self.notify)

    @property
    def driver_rings(self) -> DriverRings:
        return DriverRings(self.memory.mem, self.dvqs, self.states, self.notify)

    def drain(self, budget: int = 64, pair: int = 0) -> int:
        s = self.device
        return device.drain_transmitq(self.device_guest, self.vqs[2 * pair + 1], s.sink(pair), s.scratch, budget)

    def fill(self, budget: int = 64, pair: int = 0) -> int:
        s = self.device
        return device.fill_receiveq(self.device_guest, self.vqs[2 * pair], s.source(pair), s.scratch, budget)

    def forward(self, budget: int = 64, to: Rig | None = None) -> int:
        """Move frames from this guest's transmitq to its own receiveq, or to that of another guest."""
        s, other = self.device, to or self
        return device.forward(
            self.device_guest, self.vqs[1], other.device_guest, other.vqs[0], s.eps[0], s.pending[0], s.scratch, budget
        )

    def send(self, budget: int = 64, pair: int = 0) -> int:
        q, s = 2 * pair + 1, self.guest
        return driver.send(self.memory.mem, self.dvqs[q], self.states[q], s.source(pair), s.scratch.words, budget)

    def receive(self, budget: int = 64, pair: int = 0) -> int:
        q, s = 2 * pair, self.guest
        return driver.receive(
            self.memory.mem, self.dvqs[q], self.states[q], self.dvqs[q + 1], self.states[q + 1], s.sink(pair), s.scratch,
            budget,
        )  # fmt: skip

    def serve(self, budget: int = -1, poll_us: int = 0, timeout_ms: int = 0) -> tuple[int, int]:
        s = self.device
        return serve(self.device_rings, s.wire, s.control, s.loop_scratch, Limits(budget, poll_us, timeout_ms))

    def drive(self, budget: int = -1, poll_us: int = 0, timeout_ms: int = 0) -> tuple[int, int]:
        s = self.guest
        return drive(self.driver_rings, s.wire, s.control, s.loop_scratch, Limits(budget, poll_us, timeout_ms))
