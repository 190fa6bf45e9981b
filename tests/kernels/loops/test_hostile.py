"""What a hostile driver can write into a ring: a row for each malformed chain, with the status that it earns.

Whatever it is: the good chains before it are used, the queue breaks with that status, another queue pair goes
on, the driver's part of the ring and all that is not guest memory stay untouched.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest

from tests.kernels.rig import HIGH_GPA, INDIRECT, LOW_GPA, NEXT, TOP_GPA, TOP_LEN, WRITE, Queue, Rig, pattern
from vnetdp_kernels import rows as r
from vnetdp_kernels import spec

NUM = 16
BAD = 2  # the first descriptor that a bad chain may use; the last is NUM - 2
LAST = NUM - 1
FRAME = bytes(spec.NET_HDR_LEN) + pattern(1)
U64 = 1 << 64


@dataclass
class Place:
    """Where a bad chain goes: the queue, WRITE or 0 as that wants it, and the guest address of 64 good bytes."""

    queue: Queue
    write: int
    good: int


Build = Callable[[Place], int | None]  # writes a bad chain; returns its head, if that is not BAD


def single(gpa: int, length: int) -> Build:
    """One descriptor of these, with the queue's own direction."""

    def build(at: Place) -> None:
        at.queue.desc(BAD, gpa, length, at.write)

    return build


def in_second(gpa: int, length: int) -> Build:
    """A good descriptor, then one of these."""

    def build(at: Place) -> None:
        at.queue.desc(BAD, at.good, 64, at.write | NEXT, 7)
        at.queue.desc(7, gpa, length, at.write)

    return build


def in_table(gpa: int, length: int) -> Build:
    """One of these as the second of an indirect table."""

    def build(at: Place) -> None:
        table = indirect(at.queue, 2)
        at.queue.desc(0, at.good, 64, at.write | NEXT, 1, table=table)
        at.queue.desc(1, gpa, length, at.write, table=table)

    return build


def table_at(gpa: int, length: int) -> Build:
    """An indirect table there, of so many bytes."""

    def build(at: Place) -> None:
        at.queue.desc(BAD, gpa, length, INDIRECT)

    return build


def head(number: int) -> Build:
    return lambda _: number


def indirect(queue: Queue, n: int, number: int = BAD, flags: int = INDIRECT, skew: int = 0) -> int:
    """Refer descriptor *number* to a table of *n* entries; return the table's guest address."""
    table = queue.memory.low(16 * n + 16, 16) + skew
    queue.desc(number, table, 16 * n, flags)
    return table


def following(number: int) -> Build:
    def build(at: Place) -> None:
        at.queue.desc(BAD, at.good, 64, at.write | NEXT, number)

    return build


def following_in_table(number: int, n: int = 3) -> Build:
    """A table whose first entry is followed by that one."""

    def build(at: Place) -> None:
        table = indirect(at.queue, n)
        for k in range(n):
            at.queue.desc(k, at.good, 64, at.write | NEXT, number, table=table)

    return build


def cycle(*numbers: int) -> Build:
    def build(at: Place) -> int:
        for here, there in zip(numbers, numbers[1:] + numbers[:1], strict=True):
            at.queue.desc(here, at.good, 1, at.write | NEXT, there)
        return numbers[0]

    return build


def longer_than_any_chain(at: Place) -> None:
    """Three direct descriptors, and a table with as many entries as a chain may have."""
    cap = r.MIN_CHAIN_CAP
    for k in range(3):
        at.queue.desc(BAD + k, at.good, 1, at.write | NEXT, BAD + k + 1)
    table = indirect(at.queue, cap, BAD + 3)
    for k in range(cap):
        at.queue.desc(k, at.good, 1, at.write | (NEXT if k + 1 < cap else 0), k + 1, table=table)


def wrong_order(at: Place) -> None:
    at.queue.desc(BAD, at.good, 64, WRITE | NEXT, BAD + 1)
    at.queue.desc(BAD + 1, at.good, 64, 0)


def wrong_order_in_table(at: Place) -> None:
    at.queue.desc(BAD, at.good, 64, WRITE | NEXT, BAD + 1)
    table = indirect(at.queue, 2, BAD + 1)
    at.queue.desc(0, at.good, 64, WRITE | NEXT, 1, table=table)
    at.queue.desc(1, at.good, 64, 0, table=table)


def wrong_direction(at: Place) -> None:
    at.queue.desc(BAD, at.good, 64, WRITE ^ at.write)


def readable_first(at: Place) -> None:
    at.queue.desc(BAD, at.good, 12, NEXT, BAD + 1)
    at.queue.desc(BAD + 1, at.good, 64, WRITE)


def more_than_4_gib(at: Place) -> None:
    """1,024 descriptors of 4 MiB and one byte: more than 2**32 bytes, all of them mapped."""
    cap = r.MIN_CHAIN_CAP
    table = indirect(at.queue, cap)
    for k in range(cap):
        more = NEXT if k + 1 < cap else 0
        at.queue.desc(k, HIGH_GPA, (4 << 20) + 1, at.write | more, k + 1, table=table)


def without_the_feature(at: Place) -> None:
    at.queue.vq[r.VQ_INDIRECT] = 0
    at.queue.desc(0, at.good, 64, at.write, table=indirect(at.queue, 1))


def nested(at: Place) -> None:
    table = indirect(at.queue, 2)
    at.queue.desc(0, at.good, 64, at.write | NEXT, 1, table=table)
    at.queue.desc(1, table, 16, INDIRECT, table=table)


def nested_in_itself(at: Place) -> None:
    table = indirect(at.queue, 1)
    at.queue.desc(0, table, 16, INDIRECT, table=table)


def indirect_with_next(at: Place) -> None:
    table = indirect(at.queue, 1, flags=INDIRECT | NEXT)
    at.queue.desc(0, at.good, 64, at.write, table=table)


LOW_END = LOW_GPA + (1 << 20)  # as Rig(16) lays it out
ACROSS = HIGH_GPA - LOW_END + 128
TOO_MANY = 16 * (r.MIN_CHAIN_CAP + 1)

ROWS: list[tuple[str, int, Build]] = [
    ("address 0, below all regions", r.E_ADDRESS, single(0, 64)),
    ("last byte before a region", r.E_ADDRESS, single(LOW_GPA - 1, 64)),
    ("first byte behind a region", r.E_ADDRESS, single(LOW_END, 1)),
    ("in a hole", r.E_ADDRESS, single(LOW_END + 100, 64)),
    ("one byte across the end", r.E_ADDRESS, single(LOW_END - 63, 64)),
    ("from a region across a hole into another", r.E_ADDRESS, single(LOW_END - 64, ACROSS)),
    ("good address, length 2**32 - 1", r.E_ADDRESS, single(LOW_GPA, 0xFFFF_FFFF)),
    ("across 2**63", r.E_ADDRESS, single(TOP_GPA + TOP_LEN - 1, 2)),
    ("at 2**63", r.E_ADDRESS, single(1 << 63, 64)),
    ("a good address with bit 63 set", r.E_ADDRESS, single(1 << 63 | LOW_GPA, 64)),
    ("highest page of u64", r.E_ADDRESS, single(U64 - 4096, 64)),
    ("address + length wraps to 0", r.E_ADDRESS, single(U64 - 64, 64)),
    ("address + length wraps into a region", r.E_ADDRESS, single(U64 - 64, LOW_GPA + 128)),
    ("second descriptor in a hole", r.E_ADDRESS, in_second(LOW_END, 64)),
    ("second of a table in a hole", r.E_ADDRESS, in_table(LOW_END, 64)),
    ("second of a table at 2**63", r.E_ADDRESS, in_table(1 << 63, 64)),
    ("table in a hole", r.E_ADDRESS, table_at(LOW_END + 16, 16)),
    ("table across the end of a region", r.E_ADDRESS, table_at(LOW_END - 16, 32)),
    ("table above 2**63", r.E_ADDRESS, table_at(U64 - 16, 16)),
    ("head = num", r.E_HEAD, head(NUM)),
    ("head = 0xffff", r.E_HEAD, head(0xFFFF)),
    ("next = num", r.E_NEXT, following(NUM)),
    ("next = 0xffff", r.E_NEXT, following(0xFFFF)),
    ("next in a table = its length", r.E_NEXT, following_in_table(3)),
    ("next in a table = 0xffff", r.E_NEXT, following_in_table(0xFFFF)),
    ("next in a table is good only in the ring", r.E_NEXT, following_in_table(NUM - 1)),
    ("chain of one descriptor bites its tail", r.E_LOOP, cycle(BAD)),
    ("chain of two", r.E_LOOP, cycle(BAD, 9)),
    ("chain of seven", r.E_LOOP, cycle(4, 8, 3, 10, 5, 6, 2)),
    ("loop in a table", r.E_LOOP, following_in_table(0)),
    ("loop in a table of one", r.E_LOOP, following_in_table(0, 1)),
    ("more descriptors than a chain may have", r.E_LOOP, longer_than_any_chain),
    ("zero length", r.E_ZERO_LEN, single(LOW_GPA, 0)),
    ("zero length in a hole", r.E_ZERO_LEN, single(LOW_END + 64, 0)),
    ("zero length second", r.E_ZERO_LEN, in_second(LOW_GPA, 0)),
    ("zero length in a table", r.E_ZERO_LEN, in_table(LOW_GPA, 0)),
    ("indirect without the feature", r.E_INDIRECT_FEATURE, without_the_feature),
    ("table of 0 bytes", r.E_INDIRECT_LEN, table_at(LOW_GPA, 0)),
    ("table of 8 bytes", r.E_INDIRECT_LEN, table_at(LOW_GPA, 8)),
    ("table of 17 bytes", r.E_INDIRECT_LEN, table_at(LOW_GPA, 17)),
    ("table with more entries than a chain may have", r.E_INDIRECT_LEN, table_at(LOW_GPA, TOO_MANY)),
    ("table of 2**32 - 16 bytes", r.E_INDIRECT_LEN, table_at(LOW_GPA, 0xFFFF_FFF0)),
    ("table in a table", r.E_INDIRECT_NESTED, nested),
    ("table refers to itself", r.E_INDIRECT_NESTED, nested_in_itself),
    ("indirect and next", r.E_INDIRECT_NEXT, indirect_with_next),
    ("more than 2**32 bytes", r.E_TOTAL_LEN, more_than_4_gib),
    ("readable after writable", r.E_ORDER, wrong_order),
    ("readable after writable in a table", r.E_ORDER, wrong_order_in_table),
    ("only the other direction", r.E_DIRECTION, wrong_direction),
]  # fmt: skip
RX_ROWS = [*ROWS, ("a readable one before the writable", r.E_DIRECTION, readable_first)]


def named(rows: list[tuple[str, int, Build]]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize(("status", "build"), [row[1:] for row in rows], ids=[row[0] for row in rows])


def setup(device: int) -> Rig:
    """Two pairs: the first with two good chains in either queue, the second with the driver's own buffers."""
    rig = Rig(NUM, 2, device=device, buf_len=1 << 16, slots=8)
    rig.device.eps[1, r.EP_KIND] = r.KIND_PYTHON
    for queue, write in ((rig.rx, WRITE), (rig.tx, 0)):
        for k in (0, 1, LAST):
            gpa = rig.memory.low(len(FRAME))
            if not write:
                rig.memory.write(gpa, FRAME)
            queue.desc(k, gpa, len(FRAME), write)
        queue.offer(0, 1)
    rig.post_receive(pair=1)
    return rig


def offer_bad(queue: Queue, build: Build, write: int) -> None:
    """Let *build* write its chain and offer it, with a good one behind it."""
    number = build(Place(queue, write, queue.memory.low(64)))
    queue.offer(BAD if number is None else number, LAST)


def check_other_pair(rig: Rig) -> None:
    """Frames go both ways through the second pair, whatever the first has come to."""
    rig.guest.feed(*[FRAME] * 5, pair=1)
    assert rig.send(pair=1) == 5
    rig.device.feed(*[FRAME] * 3, pair=1)
    assert rig.serve() == (r.LOOP_PYTHON, 8)
    assert rig.device.collect(pair=1) == [FRAME] * 5
    assert rig.receive(pair=1) == 3
    assert [frame[12:] for frame in rig.guest.collect(pair=1)] == [FRAME[12:]] * 3


def check_broken(rig: Rig, queue: Queue, status: int, used: list[int]) -> None:
    """Those chains were used and no more, the queue says what broke it, and is left alone from now on."""
    assert [number for number, _ in queue.used()] == used
    assert queue.vq[r.VQ_STATUS] == status
    rig.device.collect()
    check_other_pair(rig)
    assert queue.used() == []
    assert queue.vq[r.VQ_STATUS] == status
    assert rig.memory.intact()


def serve_until_broken(rig: Rig, may_write: list[tuple[int, int]]) -> int:
    """Serve; nothing but the used rings and *may_write*, (guest address, length) each, may change."""
    before = rig.memory.mem.copy()
    outcome, moved = rig.serve()
    assert outcome == r.LOOP_BROKEN
    changed = before != rig.memory.mem
    for gpa, length in [(q.used_gpa, 6 + 8 * NUM) for q in rig.queues] + may_write:
        at = rig.memory.at(gpa, length)
        changed[at : at + length] = False
    assert not changed.any()
    return moved


@named(ROWS)
@pytest.mark.parametrize("device", [r.KIND_PYTHON, r.KIND_ECHO], ids=["drain", "forward"])
def test_transmitq(status: int, build: Build, device: int) -> None:
    rig = setup(device)
    offer_bad(rig.tx, build, 0)
    echoed = [rig.rx.buffer(0), rig.rx.buffer(1)] if device == r.KIND_ECHO else []
    assert serve_until_broken(rig, echoed) == 2
    check_broken(rig, rig.tx, status, [0, 1])


@named(RX_ROWS)
@pytest.mark.parametrize("device", [r.KIND_PYTHON, r.KIND_ECHO], ids=["fill", "forward"])
def test_receiveq(status: int, build: Build, device: int) -> None:
    rig = setup(device)
    offer_bad(rig.rx, build, WRITE)
    if device == r.KIND_ECHO:
        rig.tx.offer(LAST, LAST)
    else:
        rig.device.feed(*[FRAME] * 4)
    assert serve_until_broken(rig, [rig.rx.buffer(0), rig.rx.buffer(1)]) == (2 if device == r.KIND_ECHO else 4)
    if device == r.KIND_ECHO:
        assert rig.tx.used() == [(0, 0), (1, 0)], "what found no buffer stays in the transmitq"
    else:
        assert (rig.device.eps[0, r.EP_PENDING], rig.device.eps[0, r.EP_COUNT]) == (len(FRAME), 1)
    check_broken(rig, rig.rx, status, [0, 1])


@named(RX_ROWS)
def test_receiveq_in_the_middle_of_a_frame(status: int, build: Build) -> None:
    """The bad chain is the second that a frame needs: the first is taken back, and the status is the same."""
    rig = setup(r.KIND_PYTHON)
    offer_bad(rig.rx, build, WRITE)
    rig.device.feed(FRAME, FRAME + bytes(60))
    serve_until_broken(rig, [rig.rx.buffer(0)])
    check_broken(rig, rig.rx, status, [0])
