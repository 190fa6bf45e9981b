"""A front end that lies about its memory: tables that can't be, files that shrink, logs and inflight areas of nonsense."""

from __future__ import annotations

import fcntl
import os
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.support.by_hand import wait_for
from tests.support.vhost_user import (
    FEATURES,
    GPA,
    LOG_ALL,
    MEMORY_LEN,
    NUM,
    UVA,
    BackEnd,
    ByHand,
    Guest,
    costs_nothing,
    inflight,
    open_files,
    region,
    state,
    table,
    u64,
)
from vnetdp.vhost_user.message import Request

R = Request
PAGE = 4096
TOP = 1 << 64
_F_SEAL_FUTURE_WRITE = 0x10


@contextmanager
def running(back_end: BackEnd, features: int = FEATURES, sealed: bool = True) -> Iterator[Guest]:
    """Give a guest whose rings all run; it leaves at the end."""
    with ByHand.dial(back_end.path) as end, Guest(end, sealed=sealed) as guest:
        end.shake_hands(features)
        guest.share()
        guest.start(0, 1, 2, 3)
        guest.echo()
        yield guest
        end.leave()


@contextmanager
def memfd(length: int, seals: int = 0) -> Iterator[int]:
    fd = os.memfd_create("by hand", os.MFD_ALLOW_SEALING)
    try:
        os.ftruncate(fd, length)
        if seals:
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seals)
        yield fd
    finally:
        os.close(fd)


# --- memory tables ---

TABLES = {
    "no size": [region(GPA, 0, UVA)],
    "a size of less than a page": [region(GPA, 1, UVA)],
    "a size of no whole pages": [region(GPA, PAGE + 1, UVA)],
    "an unaligned guest address": [region(GPA + 8, PAGE, UVA)],
    "an unaligned offset": [region(GPA, PAGE, UVA, 512)],
    "longer than the file": [region(GPA, MEMORY_LEN + PAGE, UVA)],
    "behind the file": [region(GPA, PAGE, UVA, MEMORY_LEN)],
    "an offset that wraps": [region(GPA, 2 * PAGE, UVA, TOP - PAGE)],
    "a size that wraps": [region(GPA, TOP - PAGE, UVA, 2 * PAGE)],
    "the largest size": [region(GPA, TOP - 1, UVA)],
    "a size of 2**63": [region(GPA, 1 << 63, UVA)],
    "guest addresses that wrap": [region(TOP - PAGE, 2 * PAGE, UVA)],
    "a guest address no machine has": [region(1 << 63, PAGE, UVA)],
    "user addresses that wrap": [region(GPA, 2 * PAGE, TOP - PAGE)],
    "guest addresses that overlap": [region(GPA, 2 * PAGE, UVA), region(GPA + PAGE, PAGE, UVA + MEMORY_LEN)],
    "guest addresses twice": [region(GPA, PAGE, UVA), region(GPA, PAGE, UVA + MEMORY_LEN)],
    "user addresses that overlap": [region(GPA, 2 * PAGE, UVA), region(GPA + MEMORY_LEN, PAGE, UVA + PAGE)],
    "a bad one behind seven good": [
        *(region(GPA + n * MEMORY_LEN, PAGE, UVA + n * MEMORY_LEN) for n in range(7)),
        region(GPA, 0, 0),
    ],
}  # fmt: skip


@pytest.mark.parametrize("regions", TABLES.values(), ids=TABLES)
def test_a_memory_table_that_cannot_be_leaves_the_old_one_in_force(back_end: BackEnd, regions: list[bytes]) -> None:
    with costs_nothing(back_end, 3), memfd(MEMORY_LEN) as fd, running(back_end) as guest:
        assert not guest.end.tell(R.SET_MEM_TABLE, table(*regions), [fd] * len(regions))
        guest.echo(1)
        guest.echo(2, pair=1)
        if len(regions) == 1:
            assert not guest.end.tell(R.ADD_MEM_REG, bytes(8) + regions[0], [fd])
            guest.echo(3)
        else:
            guest.end.tell(R.REM_MEM_REG, bytes(8) + region(GPA, 1, 1))
        guest.end.send(R.SET_MEM_TABLE, table(*regions), [fd] * len(regions))
        assert guest.end.left()


def test_a_table_that_leaves_the_rings_out_is_refused_and_they_run_on(back_end: BackEnd) -> None:
    with costs_nothing(back_end, 3), memfd(MEMORY_LEN) as fd, running(back_end) as guest:
        elsewhere = region(GPA + MEMORY_LEN, MEMORY_LEN, UVA + MEMORY_LEN)
        assert not guest.end.tell(R.SET_MEM_TABLE, table(elsewhere), [fd])
        guest.echo(1)
        # The rings' first page only: they begin in it and end outside.
        assert not guest.end.tell(R.SET_MEM_TABLE, table(region(GPA, PAGE, UVA)), [fd])
        guest.echo(2, pair=1)
        assert guest.end.tell(R.ADD_MEM_REG, bytes(8) + elsewhere, [fd])
        assert not guest.end.tell(R.REM_MEM_REG, bytes(8) + region(GPA, MEMORY_LEN, UVA))
        guest.echo(3)
        assert guest.end.tell(R.REM_MEM_REG, bytes(8) + elsewhere)
        guest.echo(4, pair=1)


def test_more_regions_than_there_are_slots(back_end: BackEnd) -> None:
    with costs_nothing(back_end, 1), open_files(1024), memfd(MEMORY_LEN) as fd, running(back_end) as guest:
        (slots,) = struct.unpack("<Q", guest.end.ask(R.GET_MAX_MEM_SLOTS))
        more = [region(GPA + n * MEMORY_LEN, PAGE, UVA + n * MEMORY_LEN) for n in range(1, slots + 1)]
        for one in more[:-1]:
            assert guest.end.tell(R.ADD_MEM_REG, bytes(8) + one, [fd])
        guest.echo(1)
        assert not guest.end.tell(R.ADD_MEM_REG, bytes(8) + more[-1], [fd])
        guest.echo(2)
        for one in more[:10]:
            assert guest.end.tell(R.REM_MEM_REG, bytes(8) + one)
        guest.echo(3)


UNMAPPABLE: dict[str, Callable[[Path], int]] = {
    "a directory": lambda folder: os.open(folder, os.O_RDONLY),
    "/dev/zero": lambda _: os.open("/dev/zero", os.O_RDWR),
    "/dev/null": lambda _: os.open("/dev/null", os.O_RDWR),
    "an O_PATH": lambda folder: os.open(_file(folder), os.O_PATH),
    "a file to read": lambda folder: os.open(_file(folder), os.O_RDONLY),
    "a file to write": lambda folder: os.open(_file(folder), os.O_WRONLY),
    "a file to append to": lambda folder: os.open(_file(folder), os.O_WRONLY | os.O_APPEND),
    "an eventfd": lambda _: os.eventfd(0),
    "a fifo": lambda folder: _fifo(folder),
    "a memfd sealed against writes": lambda _: _sealed(),
}


def _file(folder: Path) -> Path:
    path = folder / "file"
    path.write_bytes(bytes(MEMORY_LEN))
    return path


def _fifo(folder: Path) -> int:
    os.mkfifo(folder / "fifo")
    return os.open(folder / "fifo", os.O_RDWR)


def _sealed() -> int:
    with memfd(MEMORY_LEN, _F_SEAL_FUTURE_WRITE) as fd:
        return os.dup(fd)


@pytest.mark.parametrize("kind", UNMAPPABLE)
def test_a_descriptor_that_is_no_memory(back_end: BackEnd, tmp_path: Path, kind: str) -> None:
    with costs_nothing(back_end, 4):
        fd = UNMAPPABLE[kind](tmp_path)
        try:
            with running(back_end) as guest:
                # PAGE: the size that a directory of few files claims to have.
                assert not guest.end.tell(R.SET_MEM_TABLE, table(region(GPA, PAGE, UVA)), [fd])
                other = region(GPA + MEMORY_LEN, PAGE, UVA + MEMORY_LEN)
                assert not guest.end.tell(R.ADD_MEM_REG, bytes(8) + other, [fd])
                assert not guest.end.tell(R.SET_INFLIGHT_FD, inflight(PAGE, 0, 4, NUM), [fd])
                guest.echo(1)
                guest.end.send(R.SET_LOG_BASE, struct.pack("<QQ", PAGE, 0), [fd])
                assert guest.end.left()
        finally:
            os.close(fd)


# --- files that shrink ---


@pytest.mark.parametrize("keep", [0, PAGE, MEMORY_LEN // 2, 100])
@pytest.mark.parametrize("refill", [False, True])
def test_memory_that_shrinks_under_running_rings(back_end: BackEnd, keep: int, refill: bool) -> None:
    with costs_nothing(back_end, None), running(back_end, sealed=False) as guest:
        os.ftruncate(guest.fd, keep)
        if refill:
            os.ftruncate(guest.fd, MEMORY_LEN)
        for kick in guest.kicks:
            kick.signal()
        # An answer says that the rings were looked at: they stand still for the verb.
        for index in range(4):
            guest.end.ask(R.GET_VRING_BASE, state(index, 0))


def test_memory_that_shrinks_between_the_table_and_the_rings(back_end: BackEnd) -> None:
    with costs_nothing(back_end, None), ByHand.dial(back_end.path) as end, Guest(end, sealed=False) as guest:
        end.shake_hands()
        guest.share()
        assert end.tell(R.SET_VRING_NUM, state(0, NUM))
        os.ftruncate(guest.fd, 0)
        guest.start(0, 1, 2, 3)
        for kick in guest.kicks:
            kick.signal()
        assert not end.tell(R.SET_MEM_TABLE, guest.table, [guest.fd])
        end.leave()


# --- the dirty log ---


def dirty(fd: int) -> set[int]:
    data = os.pread(fd, 1 << 20, 0)
    return {n for n in range(8 * len(data)) if data[n // 8] >> n % 8 & 1}


def test_a_log_is_written(back_end: BackEnd) -> None:
    """The control of the tests below: what is written is found in the log."""
    with costs_nothing(back_end, 0), memfd(PAGE) as log, running(back_end) as guest:
        guest.end.ask(R.SET_LOG_BASE, struct.pack("<QQ", PAGE, 0), [log])
        assert guest.end.tell(R.SET_FEATURES, u64(FEATURES | LOG_ALL))
        assert guest.end.tell(R.SET_VRING_ADDR, guest.addr(0, 1, guest.rings[0].used))
        guest.echo(1)
        ring = guest.rings[0]
        wait_for(lambda: {ring.used >> 12, ring.buffer(1) >> 12} <= dirty(log), "both pages are marked")


def test_a_log_of_just_enough_bytes(back_end: BackEnd) -> None:
    """Their number is no multiple of 8, and the last of them counts too."""
    pages = (GPA + MEMORY_LEN) // PAGE
    with costs_nothing(back_end, 0), memfd(PAGE) as log, running(back_end, FEATURES | LOG_ALL) as guest:
        guest.end.ask(R.SET_LOG_BASE, struct.pack("<QQ", -(-pages // 8), 0), [log])
        receiveq, transmitq = guest.rings[:2]
        receiveq.put_desc(1, (pages - 1) * PAGE, 2048, 2)
        receiveq.offer(1)
        transmitq.send(1, bytes(60))
        guest.kicks[1].signal()
        wait_for(lambda: receiveq.used_idx == 2, "the frame came back")
        assert pages - 1 in dirty(log)


LOGS = {
    "no size": (0, 0, PAGE),
    "longer than its file": (2 * PAGE, 0, PAGE),
    "behind its file": (PAGE, PAGE, PAGE),
    "an offset of no whole pages": (PAGE, 8, 2 * PAGE),
    "size and offset that wrap": (TOP - PAGE, 2 * PAGE, PAGE),
    "an offset of nearly 2**64": (PAGE, TOP - PAGE, PAGE),
    "a size of 2**63": (1 << 63, 0, PAGE),
    "both as large as can be": (TOP - 1, TOP - PAGE, PAGE),
    "no file at all": (PAGE, 0, 0),
}


@pytest.mark.parametrize(("size", "offset", "length"), LOGS.values(), ids=LOGS)
def test_a_log_that_cannot_be(back_end: BackEnd, size: int, offset: int, length: int) -> None:
    with costs_nothing(back_end), memfd(length) as log, running(back_end) as guest:
        guest.end.send(R.SET_LOG_BASE, struct.pack("<QQ", size, offset), [log])
        assert guest.end.left()


@pytest.mark.parametrize("shrinks", [False, True])
@pytest.mark.parametrize("size", [1, 7, 8, PAGE - 1, PAGE])
def test_a_log_too_small_for_what_is_written(back_end: BackEnd, size: int, shrinks: bool) -> None:
    """What has no bit is left out; the log's file may lose its pages, and the used ring be logged anywhere."""
    with costs_nothing(back_end, 3), memfd(PAGE) as log, running(back_end) as guest:
        guest.end.ask(R.SET_LOG_BASE, struct.pack("<QQ", size, 0), [log])
        assert guest.end.tell(R.SET_FEATURES, u64(FEATURES | LOG_ALL))
        if shrinks:
            os.ftruncate(log, 0)
        for used in (0, GPA, MEMORY_LEN, 1 << 40, (1 << 52) - 2):
            assert guest.end.tell(R.SET_VRING_ADDR, guest.addr(0, 1, used))
            guest.echo(1)
        for used in ((1 << 63) - 1, 1 << 63, TOP - 1):
            assert not guest.end.tell(R.SET_VRING_ADDR, guest.addr(0, 1, used))
            guest.echo(2)
        guest.echo(9, pair=1)


def test_one_log_after_another(back_end: BackEnd) -> None:
    with costs_nothing(back_end, 0), running(back_end) as guest:
        assert guest.end.tell(R.SET_FEATURES, u64(FEATURES | LOG_ALL))
        for n in range(100):
            with memfd(2 * PAGE) as log:
                guest.end.ask(R.SET_LOG_BASE, struct.pack("<QQ", PAGE, PAGE * (n % 2)), [log])
                if n % 10 == 0:
                    guest.echo(n)


# --- the inflight area ---

AREA = 4 * (-(-(16 + 16 * NUM) // 64) * 64)
AREAS = {
    "no queues": (PAGE, 0, 0, NUM),
    "more queues than the device": (1 << 20, 0, 5, NUM),
    "as many queues as can be said": (1 << 20, 0, 0xFFFF, NUM),
    "no descriptors": (PAGE, 0, 4, 0),
    "more descriptors than a queue can have": (1 << 20, 0, 4, 0x8001),
    "as many descriptors as can be said": (1 << 20, 0, 4, 0xFFFF),
    "too small for its queues": (AREA - 1, 0, 4, NUM),
    "no size": (0, 0, 4, NUM),
    "longer than its file": (2 << 20, 0, 4, NUM),
    "behind its file": (PAGE, 1 << 20, 4, NUM),
    "an offset of no whole pages": (PAGE, 8, 4, NUM),
    "size and offset that wrap": (TOP - PAGE, 2 * PAGE, 4, NUM),
    "an offset of nearly 2**64": (PAGE, TOP - PAGE, 4, NUM),
    "smaller queues than ours": (PAGE, 0, 4, NUM // 2),
    "fewer queues than ours": (PAGE, 0, 1, NUM),
}


@pytest.mark.parametrize("another", [False, True], ids=["the first", "a second"])
@pytest.mark.parametrize("said", AREAS.values(), ids=AREAS)
def test_an_inflight_area_that_cannot_be(back_end: BackEnd, said: tuple[int, int, int, int], another: bool) -> None:
    with costs_nothing(back_end, 2), memfd(1 << 20) as fd, running(back_end) as guest:
        if another:
            guest.end.ask(R.GET_INFLIGHT_FD, inflight(0, 0, 4, NUM))
        assert not guest.end.tell(R.SET_INFLIGHT_FD, inflight(*said), [fd])
        guest.echo(1)
        guest.echo(2, pair=1)
        guest.end.send(R.SET_INFLIGHT_FD, inflight(*said), [fd])
        assert guest.end.left()


@pytest.mark.parametrize("said", [(0, NUM), (5, NUM), (0xFFFF, NUM), (4, 0), (4, 0x8001), (4, 0xFFFF)], ids=str)
def test_an_inflight_area_is_not_made_for_absurd_counts(back_end: BackEnd, said: tuple[int, int]) -> None:
    with costs_nothing(back_end), running(back_end) as guest:
        guest.end.send(R.GET_INFLIGHT_FD, inflight(0, 0, *said))
        assert guest.end.left()


def test_one_inflight_area_after_another(back_end: BackEnd) -> None:
    with costs_nothing(back_end, 0), running(back_end) as guest:
        for n in range(100):
            guest.end.send(R.GET_INFLIGHT_FD, inflight(0, 0, 4, NUM))
            fds: list[int] = []
            said = guest.end.answer(R.GET_INFLIGHT_FD, fds)
            (fd,) = fds
            if n % 2:
                assert guest.end.tell(R.SET_INFLIGHT_FD, said, [fd])
            os.close(fd)
            if n % 10 == 0:
                guest.echo(n)


CONTENTS: dict[str, Callable[[bytearray], None]] = {
    "all ones": lambda area: area.__setitem__(slice(None), b"\xff" * len(area)),
    "a version to come": lambda area: struct.pack_into("<HH", area, 8, 2, NUM),
    "another number of descriptors": lambda area: struct.pack_into("<HH", area, 8, 1, 0xFFFF),
    "a last batch behind the table": lambda area: struct.pack_into("<HHHH", area, 8, 1, NUM, 0xFFFF, 0xFFFF),
    "a table of loops": lambda area: _loops(area),
    "journals of nonsense": lambda area: _journals(area),
}


def _loops(area: bytearray) -> None:
    for queue in range(4):
        at = queue * AREA // 4
        struct.pack_into("<HHHH", area, at + 8, 1, NUM, 3, 7)
        for n in range(NUM):
            struct.pack_into("<B5xHQ", area, at + 16 + 16 * n, 1, n, TOP - 1)


def _journals(area: bytearray) -> None:
    for at in range(AREA, PAGE, 64):
        struct.pack_into("<HHH", area, at, 0, 0xFFFF, 0xFFFF)


@pytest.mark.parametrize("content", CONTENTS.values(), ids=CONTENTS)
@pytest.mark.parametrize("shrinks", [False, True])
def test_an_inflight_area_full_of_nonsense(
    back_end: BackEnd, content: Callable[[bytearray], None], shrinks: bool
) -> None:
    with costs_nothing(back_end, None), memfd(PAGE) as fd:
        area = bytearray(PAGE)
        content(area)
        os.pwrite(fd, area, 0)
        with ByHand.dial(back_end.path) as end, Guest(end) as guest:
            end.shake_hands()
            assert end.tell(R.SET_INFLIGHT_FD, inflight(PAGE, 0, 4, NUM), [fd])
            guest.share()
            for index in range(4):
                guest.describe(index)
                assert end.tell(R.SET_VRING_KICK, u64(index), [guest.kicks[index].fd])
            if shrinks:
                os.ftruncate(fd, 0)
            taken = [end.tell(R.SET_VRING_ENABLE, state(n, 1)) for n in range(4)]
            os.ftruncate(fd, 0)
            for pair in range(2):
                if taken[2 * pair] and taken[2 * pair + 1]:
                    guest.echo(pair, pair)
            end.leave()
