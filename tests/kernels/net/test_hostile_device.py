"""What a hostile device can write into a used ring: a row for each lie, with the status that the driver gives it.

Whatever it is: what was good before it is received, the queue stops with that status, another pair goes on.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from tests.kernels.rig import Queue, Rig, pattern
from vnetdp_kernels import rows as r
from vnetdp_kernels import spec
from vnetdp_kernels.net import driver
from vnetdp_kernels.virtq import split_driver

NUM = 16
BUF = 256
FRAME = bytes(spec.NET_HDR_LEN) + pattern(1)

Lie = Callable[[Rig], None]


def deliver(rig: Rig, head: int, num_buffers: int = 1, length: int = len(FRAME)) -> None:
    """Write a frame into the driver's receive buffer *head*, and use it."""
    header = bytes(10) + num_buffers.to_bytes(2, "little")
    rig.memory.write(rig.rx.buffer(head)[0], (header + FRAME[12:])[: max(length, 12)])
    rig.rx.use((head, length))


def used(*elements: tuple[int, int]) -> Lie:
    return lambda rig: rig.rx.use(*elements)


def index(value: int) -> Lie:
    """used.idx moved by so many, without elements."""

    def lie(rig: Rig) -> None:
        rig.rx.used_idx += value

    return lie


def num_buffers(value: int, length: int = len(FRAME)) -> Lie:
    return lambda rig: deliver(rig, 2, value, length)


def second_of_two(head: int, length: int) -> Lie:
    """A frame of two buffers, the second of which is this."""

    def lie(rig: Rig) -> None:
        deliver(rig, 2, 2, BUF)
        rig.rx.use((head, length))

    return lie


ROWS: list[tuple[str, int, Lie]] = [
    ("id = num", r.E_USED_ID, used((NUM, 72))),
    ("id = 2**32 - 1", r.E_USED_ID, used((0xFFFF_FFFF, 72))),
    ("id that is num beyond one in flight", r.E_USED_ID, used((2 + NUM, 72))),
    ("more bytes than the buffer has", r.E_USED_LEN, used((2, BUF + 1))),
    ("2**32 - 1 bytes", r.E_USED_LEN, used((2, 0xFFFF_FFFF))),
    ("used.idx beyond what is in flight", r.E_USED_IDX, index(NUM + 1)),
    ("used.idx far ahead", r.E_USED_IDX, index(0x8000)),
    ("used.idx one back", r.E_USED_IDX, index(-1)),
    ("num_buffers 0", r.E_NUM_BUFFERS, num_buffers(0)),
    ("num_buffers more than were used", r.E_NUM_BUFFERS, num_buffers(2)),
    ("num_buffers more than the ring has", r.E_NUM_BUFFERS, num_buffers(NUM + 1)),
    ("num_buffers 0xffff", r.E_NUM_BUFFERS, num_buffers(0xFFFF)),
    ("no room for num_buffers", r.E_NUM_BUFFERS, num_buffers(1, 11)),
    ("no bytes at all", r.E_NUM_BUFFERS, num_buffers(1, 0)),
    ("second buffer: id = num", r.E_USED_ID, second_of_two(NUM, 20)),
    ("second buffer: the first once more", r.E_USED_ID, second_of_two(2, 20)),
    ("second buffer: more bytes than it has", r.E_USED_LEN, second_of_two(3, BUF + 1)),
]


@pytest.mark.parametrize("start", [0, 65534])
@pytest.mark.parametrize("in_order", [False, True])
@pytest.mark.parametrize(("status", "lie"), [row[1:] for row in ROWS], ids=[row[0] for row in ROWS])
def test_receiveq(status: int, lie: Lie, in_order: bool, start: int) -> None:
    rig = Rig(NUM, 2, buf_len=BUF, in_order=in_order, start=start)
    rig.vqs[:2, r.VQ_BOUND] = 0  # the device that lies is played by hand
    for pair in (0, 1):
        rig.post_receive(pair)
    deliver(rig, 0)
    deliver(rig, 1)
    assert rig.drive() == (r.LOOP_PYTHON, 2)
    assert rig.guest.collect() == [FRAME, FRAME]
    lie(rig)
    parts = rig.rx.drivers_parts()
    assert rig.drive() == (r.LOOP_BROKEN, 0)
    assert rig.rx.dvq[r.DVQ_STATUS] == status
    assert rig.rx.drivers_parts() == parts, "a buffer was posted again"
    check_other_pair(rig)
    assert rig.rx.dvq[r.DVQ_STATUS] == status
    assert rig.memory.intact()


def check_other_pair(rig: Rig) -> None:
    rig.guest.feed(FRAME, FRAME, pair=1)
    rig.device.feed(FRAME, pair=1)
    assert rig.drive() == (r.LOOP_IDLE, 2)
    assert rig.serve()[1] == 3
    assert rig.drive() == (r.LOOP_PYTHON, 1)
    assert len(rig.device.collect(pair=1)) == 2
    assert len(rig.guest.collect(pair=1)) == 1


def unknown(queue: Queue) -> None:
    queue.use((NUM, 0))


def free_one(queue: Queue) -> None:
    queue.use((9, 0))


def twice(queue: Queue) -> None:
    queue.use((2, 0), (2, 0))


def too_long(queue: Queue) -> None:
    queue.use((2, 1))


def beyond(queue: Queue) -> None:
    queue.use((2, 0), (3, 0), (4, 0), (5, 0))


@pytest.mark.parametrize(
    ("lie", "status", "taken"),
    [
        (unknown, r.E_USED_ID, 0),
        (free_one, r.E_USED_ID, 0),
        (twice, r.E_USED_ID, 1),
        (too_long, r.E_USED_LEN, 0),
        (beyond, r.E_USED_IDX, 0),
    ],
)  # fmt: skip
def test_transmitq(lie: Callable[[Queue], None], status: int, taken: int) -> None:
    """Two frames are used and reclaimed, three are in flight, and the device lies about these."""
    rig = Rig(NUM)
    rig.guest.feed(*[FRAME] * 5)
    assert rig.send() == 5
    rig.tx.use((0, 0), (1, 0))
    assert driver.reclaim(rig.memory.mem, rig.tx.dvq, rig.tx.state) == 2
    lie(rig.tx)
    reclaimed = driver.reclaim(rig.memory.mem, rig.tx.dvq, rig.tx.state)
    assert rig.tx.dvq[r.DVQ_STATUS] == status
    assert (max(reclaimed, 0), rig.tx.dvq[r.DVQ_NUM_FREE]) == (taken, NUM - 3 + taken)
    assert rig.drive() == (r.LOOP_IDLE, 0), "a queue that stopped is left alone"


def put_chains(rig: Rig, lengths: list[int]) -> list[int]:
    """Put a writable chain of so many descriptors each, one byte a descriptor, and publish; return the heads."""
    heads = []
    for n in lengths:
        gpa = rig.memory.low(n)
        iov = np.array([(rig.memory.at(gpa + k), 1, gpa + k) for k in range(n)], np.int64)
        heads.append(rig.tx.put(iov, 0, n, np.zeros(2, np.int64), 0))
    split_driver.publish_available(rig.memory.mem, rig.tx.dvq)
    return heads


def take_all(rig: Rig) -> tuple[list[tuple[int, int]], int]:
    """Take what is used; return it, and the status that ended it (0 = all taken)."""
    taken: list[tuple[int, int]] = []
    n = split_driver.used_ready(rig.memory.mem, rig.tx.dvq)
    for _ in range(n):
        head, length = split_driver.take_used(rig.memory.mem, rig.tx.dvq, rig.tx.state)
        if head < 0:
            return taken, head
        taken.append((head, length))
        split_driver.release(rig.tx.dvq, rig.tx.state, head)
    return taken, min(n, 0)


def test_a_descriptor_inside_a_chain_is_no_head() -> None:
    rig = Rig(NUM)
    assert put_chains(rig, [3, 2]) == [0, 3]
    rig.tx.use((1, 0))
    assert take_all(rig) == ([], r.E_USED_ID)


def test_a_chain_is_used_once() -> None:
    """Its head is free again, or serves another chain; used once more it is not in flight."""
    rig = Rig(NUM)
    put_chains(rig, [2, 2])
    rig.tx.use((2, 1), (2, 1))
    assert take_all(rig) == ([(2, 1)], r.E_USED_ID)


@pytest.mark.parametrize(
    ("elements", "skipped", "expected", "status"),
    [
        ([(0, 1), (2, 2)], 0, [(0, 1), (2, 2)], 0),
        ([(5, 1)], 2, [(0, 2), (2, 3), (5, 1)], 0),
        ([(0, 0), (5, 1)], 1, [(0, 0), (2, 3), (5, 1)], 0),
        ([(2, 1)], 2, [(0, 2), (2, 1)], r.E_USED_ID),  # the third element says nothing
        ([(2, 1)], 0, [], r.E_USED_ID),  # out of order
        ([(5, 1)], 1, [(0, 2)], r.E_USED_ID),  # stands for three, but used.idx moved by two
        ([(6, 1)], 2, [], r.E_USED_ID),  # no head
        ([(5, 2)], 2, [(0, 2), (2, 3)], r.E_USED_LEN),
        ([(5, 1)], 3, [], r.E_USED_IDX),
    ],
)
def test_in_order(elements: list[tuple[int, int]], skipped: int, expected: list[tuple[int, int]], status: int) -> None:
    """One element may stand for the chains before it (2.7.9), for no other and for no more than used.idx says."""
    rig = Rig(NUM, in_order=True)
    assert put_chains(rig, [2, 3, 1]) == [0, 2, 5]
    rig.memory.write(rig.tx.used_gpa + 4, b"\xff" * 8 * NUM)
    rig.tx.use(*elements, idx=len(elements) + skipped)
    assert take_all(rig) == (expected, status)
