"""Rings at the edge of what is allowed: indices that jump, odd but good chains, a driver that writes as we read.

The rows of malformed chains are in test_hostile.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

import numba
import pytest

from tests.kernels.rig import (
    COMPILED,
    HIGH_GPA,
    INDIRECT,
    LOW_GPA,
    NEXT,
    TOP_GPA,
    TOP_LEN,
    WRITE,
    Queue,
    Rig,
    pattern,
    scaled,
)
from tests.support.by_hand import CAMPAIGN
from vnetdp_kernels import rows as r
from vnetdp_kernels import spec
from vnetdp_kernels.platform.atomic import Bytes, Words, load_i64_acquire, store_u64_unaligned
from vnetdp_kernels.virtq import split_device

NUM = 16
HEADER = bytes(spec.NET_HDR_LEN)
FRAME = HEADER + pattern(1)
LOW_END = LOW_GPA + (1 << 20)  # as Rig(16) lays it out

Segments = list[tuple[int, int]]  # (guest address, length)
Lay = Callable[[Queue, int], Segments]
"""Write a chain from descriptor 0 for (queue, WRITE or 0); return its buffers: bytes of a frame in this order."""


def buffer_at(gpa: int, length: int = len(FRAME), flags: int = 0, following: int = 0) -> Lay:
    def write_chain(queue: Queue, write: int) -> Segments:
        queue.desc(0, gpa, length, write | flags, following)
        return [(gpa, length)]

    return write_chain


def table_of_two(gpa: int, flags: int = INDIRECT) -> Lay:
    """An indirect table at that address."""

    def write_chain(queue: Queue, write: int) -> Segments:
        first, second = queue.memory.low(5), queue.memory.low(100)
        queue.desc(0, gpa, 32, flags, 0xFFFF)
        queue.desc(0, first, 5, write | NEXT, 1, table=gpa)
        queue.desc(1, second, 100, write, 0xFFFF, table=gpa)
        return [(first, 5), (second, 100)]

    return write_chain


def two_direct_then_table(queue: Queue, write: int) -> Segments:
    at = [queue.memory.high(40) for _ in range(4)]
    table = queue.memory.low(32) + 5
    queue.desc(0, at[0], 1, write | NEXT, 9)
    queue.desc(9, at[1], 30, write | NEXT, 3)
    queue.desc(3, table, 32, INDIRECT | write)
    queue.desc(0, at[2], 2, write | NEXT, 1, table=table)
    queue.desc(1, at[3], 40, write, table=table)
    return [(at[0], 1), (at[1], 30), (at[2], 2), (at[3], 40)]


def whole_ring(queue: Queue, write: int) -> Segments:
    gpa = queue.memory.high(5 * NUM)
    for k in range(NUM):
        queue.desc(k, gpa + 5 * k, 5, write | (NEXT if k < NUM - 1 else 0), k + 1)
    return [(gpa + 5 * k, 5) for k in range(NUM)]


def longest_table(queue: Queue, write: int) -> Segments:
    """More entries than the ring has, as many as a chain may have, a byte each and backwards through memory."""
    n = r.MIN_CHAIN_CAP
    gpa, table = queue.memory.high(n), queue.memory.low(16 * n)
    queue.desc(0, table, 16 * n, INDIRECT)
    for k in range(n):
        queue.desc(k, gpa + n - 1 - k, 1, write | (NEXT if k < n - 1 else 0), k + 1, table=table)
    return [(gpa + n - 1 - k, 1) for k in range(n)]


def table_in_any_order(queue: Queue, write: int) -> Segments:
    gpa, table = queue.memory.high(300), queue.memory.low(64)
    queue.desc(0, table, 64, INDIRECT)
    order = [0, 3, 1, 2]
    for here, there in zip(order, [*order[1:], 0], strict=True):
        queue.desc(here, gpa + 70 * here, 70, write | (NEXT if there else 0), there, table=table)
    return [(gpa + 70 * k, 70) for k in order]


def table_with_entries_left_over(queue: Queue, write: int) -> Segments:
    """The second entry is never reached, so it may hold anything."""
    table, gpa = queue.memory.low(32), queue.memory.high(100)
    queue.desc(0, table, 32, INDIRECT)
    queue.desc(0, gpa, 100, write, table=table)
    queue.desc(1, 1 << 63, 0, INDIRECT | NEXT, 0xFFFF, table=table)
    return [(gpa, 100)]


SEAM = HIGH_GPA + (1 << 20)  # as Rig(16, buf_len=1 << 15) lays it out
GOOD: dict[str, Lay] = {
    "first bytes of guest memory": buffer_at(LOW_GPA),
    "last bytes of a region": buffer_at(LOW_END - len(FRAME)),
    "last bytes below 2**63": buffer_at(TOP_GPA + TOP_LEN - len(FRAME)),
    "across the seam of two regions": buffer_at(SEAM - 17),
    "last byte before the seam is the first": buffer_at(SEAM - 1),
    "unknown flags, and a next without NEXT": buffer_at(HIGH_GPA + 3, flags=0xFFF8, following=0xFFFF),
    "more than a frame needs": buffer_at(HIGH_GPA, 60_000),
    "table aligned to 16": table_of_two(LOW_GPA + 0x1_0000),
    "table aligned to 8": table_of_two(LOW_GPA + 0x1_0008),
    "table aligned to nothing": table_of_two(LOW_GPA + 0x1_000D),
    "table in the last bytes of a region": table_of_two(LOW_END - 32),
    "table across the seam": table_of_two(SEAM - 20),
    "WRITE on the descriptor of a table": table_of_two(LOW_GPA + 0x1_0000, INDIRECT | WRITE),
    "direct descriptors, then a table": two_direct_then_table,
    "as many descriptors as the ring has": whole_ring,
    "as many descriptors as a chain may have": longest_table,
    "a table out of order": table_in_any_order,
    "a table longer than its chain": table_with_entries_left_over,
}


def rig_for_shapes(kind: int = r.KIND_PYTHON) -> Rig:
    rig = Rig(NUM, device=kind, buf_len=1 << 15, slots=4)
    assert rig.memory.seam == SEAM
    return rig


def spread(queue: Queue, segments: Segments, data: bytes) -> None:
    for gpa, length in segments:
        queue.memory.write(gpa, data[:length])
        data = data[length:]
    assert not data


def joined(queue: Queue, segments: Segments) -> bytes:
    return b"".join(queue.memory.read(*segment) for segment in segments)


@pytest.mark.parametrize("name", GOOD)
def test_good_transmit_chains(name: str) -> None:
    rig = rig_for_shapes()
    segments = GOOD[name](rig.tx, 0)
    data = HEADER + pattern(9, sum(length for _, length in segments) - len(HEADER))
    spread(rig.tx, segments, data)
    rig.tx.offer(0)
    assert rig.serve() == (r.LOOP_PYTHON, 1)
    assert rig.device.collect() == [data]
    assert rig.tx.used() == [(0, 0)]


@pytest.mark.parametrize("name", GOOD)
@pytest.mark.parametrize("mergeable", [False, True])
def test_good_receive_chains(name: str, mergeable: bool) -> None:
    rig = rig_for_shapes()
    rig.vqs[:, r.VQ_MRG_RXBUF] = mergeable
    segments = GOOD[name](rig.rx, WRITE)
    rig.rx.offer(0)
    rig.device.feed(FRAME)
    assert rig.serve() == (r.LOOP_IDLE, 1)
    assert rig.rx.used() == [(0, len(FRAME))]
    assert joined(rig.rx, segments)[: len(FRAME)] == HEADER[:10] + b"\1\0" + FRAME[12:]
    assert not any(joined(rig.rx, segments)[len(FRAME) :])
    assert rig.memory.intact()


@pytest.mark.parametrize("name", GOOD)
def test_good_chains_across(name: str) -> None:
    """From the transmitq of one guest to the receiveq of another, in this shape on both sides."""
    left, right = rig_for_shapes(r.KIND_ECHO), rig_for_shapes()
    segments = GOOD[name](left.tx, 0)
    spread(left.tx, segments, HEADER + pattern(9, sum(length for _, length in segments) - len(HEADER)))
    into = GOOD[name](right.rx, WRITE)
    left.tx.offer(0)
    right.rx.offer(0)
    assert left.forward(to=right) == 1
    data = joined(left.tx, segments)
    assert joined(right.rx, into) == HEADER[:10] + b"\1\0" + data[12:]
    assert (left.tx.used(), right.rx.used()) == ([(0, 0)], [(0, len(data))])
    assert left.memory.intact()
    assert right.memory.intact()


@pytest.mark.parametrize("last", [0, NUM - 1, NUM - 2])
@pytest.mark.parametrize("kind", ["tx", "rx"])
def test_whole_ring_in_a_loop(kind: str, last: int) -> None:
    """A chain of all descriptors is good; one more, whichever it is, is a loop."""
    rig = rig_for_shapes()
    queue, write = (rig.tx, 0) if kind == "tx" else (rig.rx, WRITE)
    gpa = whole_ring(queue, write)[-1][0]
    queue.desc(NUM - 1, gpa, 5, write | NEXT, last)
    queue.offer(0)
    rig.device.feed(FRAME)
    assert rig.serve()[0] == r.LOOP_BROKEN
    assert queue.vq[r.VQ_STATUS] == r.E_LOOP
    assert queue.used() == []


def test_exactly_4_gib_are_allowed() -> None:
    """1,024 descriptors of 4 MiB: as long as a chain may be. No frame is, so it is dropped and used."""
    rig = Rig(NUM, buf_len=1 << 17)
    table = rig.memory.low(16 * 1024)
    rig.tx.desc(0, table, 16 * 1024, INDIRECT)
    for k in range(1024):
        rig.tx.desc(k, HIGH_GPA + k, 1 << 22, NEXT if k < 1023 else 0, k + 1, table=table)
    rig.tx.offer(0)
    assert rig.serve() == (r.LOOP_IDLE, 1)
    assert rig.tx.used() == [(0, 0)]
    assert rig.device.eps[0, r.EP_DROP_LONG] == 1


@pytest.mark.parametrize("start", [0, 5, 65530])
@pytest.mark.parametrize("jump", [NUM + 1, 2 * NUM, 0x7FFF, 0x8000, 0xFFFF, -1, -NUM])
@pytest.mark.parametrize("kind", ["tx", "rx"])
def test_avail_idx_jumps(kind: str, jump: int, start: int) -> None:
    """More than the ring holds, or backwards: nothing is processed, not even once."""
    rig = Rig(NUM, start=start)
    queue = rig.tx if kind == "tx" else rig.rx
    for k in range(NUM):
        queue.desc(k, rig.memory.low(72), 72, WRITE if kind == "rx" else 0)
    queue.offer(0, 1)
    if kind == "rx":
        rig.device.feed(FRAME, FRAME)
    assert rig.serve()[1] == 2
    assert [head for head, _ in queue.used()] == [0, 1]
    rig.device.collect()
    rig.device.feed(FRAME)
    queue.avail_idx += jump
    assert rig.serve() == (r.LOOP_BROKEN, 0)
    assert queue.vq[r.VQ_STATUS] == r.E_AVAIL_IDX
    assert queue.used() == []


def test_a_full_ring_is_no_jump() -> None:
    rig = Rig(NUM, start=65530)
    for k in range(NUM):
        rig.tx.desc(k, rig.memory.low(72), 72)
    rig.tx.offer(*range(NUM))
    rig.device.eps[0, r.EP_KIND] = r.KIND_NULL
    assert rig.serve() == (r.LOOP_IDLE, NUM)


@pytest.mark.parametrize("back", [1, 3, NUM - 1])
def test_avail_idx_runs_back_into_what_was_seen(back: int) -> None:
    """Entries that were taken as available are taken back: the ring may not be gone through again for that."""
    rig = Rig(NUM)
    for k in range(NUM):
        rig.rx.desc(k, rig.memory.low(72), 72, WRITE)
    rig.rx.offer(*range(NUM))
    assert split_device.available(rig.memory.mem, rig.rx.vq) == NUM
    rig.rx.avail_idx -= back
    for _ in range(4):
        rig.device.feed(*[FRAME] * 8)
        rig.fill()
        rig.device.eps[0, r.EP_COUNT] = 0
    assert rig.rx.vq[r.VQ_STATUS] == r.E_AVAIL_IDX
    assert len(rig.rx.used()) <= NUM


@pytest.mark.parametrize("kind", ["tx", "rx"])
def test_the_same_head_twice(kind: str) -> None:
    """The second is used after the first is, so the head is never in hand twice."""
    rig = Rig(NUM)
    queue = rig.tx if kind == "tx" else rig.rx
    queue.desc(3, rig.memory.low(72), 72, WRITE if kind == "rx" else 0)
    queue.offer(3, 3, 3)
    rig.device.feed(FRAME, FRAME, FRAME)
    assert rig.serve()[1] == 3
    assert [head for head, _ in queue.used()] == [3, 3, 3]


def test_a_ring_without_descriptors_is_left_alone() -> None:
    """A queue that was never set up (num 0): no division by zero, nothing written."""
    rig = Rig(NUM)
    for queue in rig.queues:
        queue.vq[r.VQ_NUM] = 0
        queue.offer(0)
    before = rig.memory.mem.copy()
    rig.device.feed(FRAME)
    assert rig.serve()[0] == r.LOOP_BROKEN
    assert rig.serve() == (r.LOOP_IDLE, 0)
    assert rig.vqs[:, r.VQ_STATUS].tolist() == [r.E_AVAIL_IDX] * 2
    assert (before == rig.memory.mem).all()


def test_receive_buffers_on_the_ring_itself() -> None:
    """A frame written over avail ring, descriptors and used ring harms nobody but the guest."""
    rig = Rig(NUM)
    targets = (rig.rx.desc_gpa, rig.rx.avail_gpa, rig.rx.used_gpa, rig.tx.desc_gpa)
    for k, gpa in enumerate(targets):
        rig.rx.desc(k, gpa, 26 * NUM, WRITE)
    rig.rx.offer(0, 1, 2, 3)
    rig.device.feed(*[HEADER + pattern(k, 200) for k in range(8)])
    for _ in range(8):
        rig.serve()
    assert rig.memory.intact()


# --- a driver that changes a descriptor while the device reads it ---


@numba.njit(nogil=True)  # type: ignore[untyped-decorator]
def flip(mem: Bytes, at: int, one: int, other: int, stop: Words) -> int:
    """Write two values to the same word in turn until told to stop."""
    n = 0
    while load_i64_acquire(stop, 0) == 0:
        store_u64_unaligned(mem, at, one)
        store_u64_unaligned(mem, at, other)
        n += 1
    return n


@pytest.mark.parametrize("kind", ["tx", "rx"])
@pytest.mark.parametrize("large", [73, 4096, 1 << 20])
def test_length_grows_while_the_device_copies(kind: str, large: int) -> None:
    """The descriptor is read once: it is as long as it was when it was checked, or an error."""
    rig = Rig(NUM, slots=1)
    queue, write = (rig.tx, 0) if kind == "tx" else (rig.rx, WRITE)
    small = len(FRAME)
    gpa = LOW_END - small
    queue.desc(0, gpa, small, write)
    queue.memory.write(gpa, FRAME)
    at = rig.memory.at(queue.desc_gpa) + 8
    stop: Words = rig.guest.ctl
    first, second = small | write << 32, large | write << 32
    thread = threading.Thread(target=flip, args=(rig.memory.mem, at, first, second, stop))
    thread.start()
    outcomes = set()
    try:
        for _ in range(20_000 if CAMPAIGN else scaled(5_000, 500)):
            queue.offer(0)
            rig.device.eps[0, r.EP_PENDING] = 0
            rig.device.feed(FRAME)
            moved = rig.drain() if kind == "tx" else rig.fill()
            frames = rig.device.collect()
            outcomes.add((moved, int(queue.vq[r.VQ_STATUS])))
            if moved and kind == "tx":
                assert frames == [FRAME]
            if not moved:
                queue.vq[r.VQ_STATUS] = 0
                queue.avail_idx = int(queue.vq[r.VQ_LAST_AVAIL_IDX])
                queue.vq[r.VQ_AVAIL_IDX] = queue.avail_idx
            rig.device.eps[0, r.EP_COUNT] = 0
    finally:
        stop[0] = 1
        thread.join()
    assert outcomes <= {(1, 0), (0, r.E_ADDRESS)}
    assert rig.memory.intact()
    if COMPILED:
        assert outcomes
