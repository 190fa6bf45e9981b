"""Loads and stores: the Python body and the compiled one do the same, and what is atomic stays whole under threads."""

from __future__ import annotations

import fcntl
import mmap
import os
import struct
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numba
import numpy as np
import pytest

from tests.kernels.rig import CANARY, COMPILED, scaled
from tests.support.by_hand import PATIENCE, wait_for
from vnetdp_kernels.platform import atomic
from vnetdp_kernels.platform.atomic import (
    Bytes,
    Words,
    address,
    copy,
    exchange_u64,
    fence,
    fetch_or_u8,
    load_i64_acquire,
    load_u8,
    load_u16,
    load_u16_acquire,
    load_u16_unaligned,
    load_u32,
    load_u32_unaligned,
    load_u64,
    load_u64_unaligned,
    store_i64_release,
    store_u8,
    store_u16,
    store_u16_release,
    store_u16_unaligned,
    store_u32,
    store_u32_unaligned,
    store_u64,
    store_u64_unaligned,
)
from vnetdp_kernels.virtq.memory import mark_dirty, take_dirty

N_LOADS = 9
N_STORES = 9


def load_all(mem: Bytes, at: int, odd: int, out: Words) -> None:
    """Every load: the aligned ones at *at*, the others at *odd*."""
    out[0] = load_u8(mem, odd)
    out[1] = load_u16(mem, at)
    out[2] = load_u32(mem, at)
    out[3] = load_u64(mem, at)
    out[4] = load_u16_acquire(mem, at)
    out[5] = load_i64_acquire(mem, at)
    out[6] = load_u16_unaligned(mem, odd)
    out[7] = load_u32_unaligned(mem, odd)
    out[8] = load_u64_unaligned(mem, odd)


def store_all(mem: Bytes, step: int, value: int) -> None:
    """Every store, *step* bytes apart (a multiple of 8), the unaligned ones a byte off."""
    store_u8(mem, 0, value)
    store_u16(mem, step, value)
    store_u32(mem, 2 * step, value)
    store_u64(mem, 3 * step, value)
    store_u16_release(mem, 4 * step, value)
    store_i64_release(mem, 5 * step, value)
    store_u16_unaligned(mem, 6 * step + 1, value)
    store_u32_unaligned(mem, 7 * step + 1, value)
    store_u64_unaligned(mem, 8 * step + 1, value)


def words(array: Words, index: int, value: int, out: Words) -> None:
    """The same on an array of words, where an offset is an index."""
    store_i64_release(array, index, value)
    fence()
    out[0] = load_i64_acquire(array, index)
    out[1] = load_u64(array, index)
    store_u64(array, index + 1, value)
    out[2] = address(array, index) - address(array, 0)


def modify(mem: Bytes, value: int, out: Words) -> None:
    out[0] = fetch_or_u8(mem, 3, value & 0xFF)
    out[1] = fetch_or_u8(mem, 3, 0)
    out[2] = exchange_u64(mem, 8, value)
    out[3] = exchange_u64(mem, 8, -1)
    copy(mem, 33, mem, 1, 13)
    copy(mem, 50, mem, 1, 0)
    out[4] = address(mem, 7) - address(mem, 0)


def copy_all(dst: Bytes, src: Bytes) -> None:
    """Copy 0, 1, 2, ... bytes, each into a row of 512 of its own."""
    for length in range(300):
        copy(dst, 512 * length + 7, src, length & 63, length)


def both(function: Callable[..., None]) -> pytest.MarkDecorator:
    """Run a test with the plain body, and with the compiled one where there is a compiler."""
    bodies = [pytest.param(function, id="plain")]
    if COMPILED:
        bodies.append(pytest.param(numba.njit(nogil=True)(function), id="compiled"))
    return pytest.mark.parametrize("body", bodies)


VALUES = [
    0, 1, -1, 0x7F, 0x80, 0xFF, 0x7FFF, 0x8000, 0xFFFF, 0x1_0000, 0x7FFF_FFFF, 0x8000_0000, 0xFFFF_FFFF,
    0x1234_5678_9ABC_DEF0, (1 << 63) - 1, -(1 << 63), -2,
]  # fmt: skip


@both(load_all)
@pytest.mark.parametrize("value", VALUES)
def test_loads_extend_with_zeros(body: Callable[..., None], value: int) -> None:
    """All but those of 8 bytes, which read 2**63 and more as negative."""
    mem = np.full(64, 0xEE, np.uint8)
    packed = struct.pack("<q", value)
    mem[16:24] = mem[33:41] = np.frombuffer(packed, np.uint8)
    out = np.zeros(N_LOADS, np.int64)
    body(mem, 16, 33, out)
    small = [int.from_bytes(packed[:n], "little") for n in (1, 2, 4)]
    assert out.tolist() == [*small, value, small[1], value, small[1], small[2], value]


@both(store_all)
@pytest.mark.parametrize("value", VALUES)
def test_stores_mask_and_touch_no_neighbour(body: Callable[..., None], value: int) -> None:
    mem = np.full(16 * N_STORES, 0xEE, np.uint8)
    body(mem, 16, value)
    packed = struct.pack("<q", value)
    expected = bytearray(b"\xee" * mem.size)
    for k, (n, skew) in enumerate([(1, 0), (2, 0), (4, 0), (8, 0), (2, 0), (8, 0), (2, 1), (4, 1), (8, 1)]):
        expected[16 * k + skew : 16 * k + skew + n] = packed[:n]
    assert mem.tobytes() == bytes(expected)


@both(copy_all)
def test_a_copy_of_any_length_writes_that_and_no_more(body: Callable[..., None]) -> None:
    src = np.random.default_rng(1).integers(0, 256, 512, np.uint8)
    dst = np.full((300, 512), 0xEE, np.uint8)
    body(dst.reshape(-1), src)
    for length, row in enumerate(dst):
        at = length & 63
        assert row.tobytes() == b"\xee" * 7 + src[at : at + length].tobytes() + b"\xee" * (505 - length)


@both(words)
@pytest.mark.parametrize("value", VALUES)
def test_words_are_addressed_by_index(body: Callable[..., None], value: int) -> None:
    array, out = np.zeros(5, np.int64), np.zeros(3, np.int64)
    body(array, 2, value, out)
    assert array.tolist() == [0, 0, value, value, 0]
    assert out.tolist() == [value, value, 16]


@both(modify)
@pytest.mark.parametrize("value", VALUES)
def test_read_and_modify(body: Callable[..., None], value: int) -> None:
    mem = (np.arange(64) + 128).astype(np.uint8)
    before = mem.tobytes()
    out = np.zeros(5, np.int64)
    body(mem, value, out)
    bits = before[3] | value & 0xFF
    assert out.tolist() == [before[3], bits, struct.unpack("<q", before[8:16])[0], value, 7]
    expected = bytearray(before)
    expected[3] = bits
    expected[8:16] = b"\xff" * 8
    expected[33:46] = expected[1:14]
    assert mem.tobytes() == bytes(expected)


@pytest.mark.parametrize("body", [atomic.load_u16, atomic.load_u64_unaligned, atomic.load_u8])
def test_plain_loads_stay_in_the_array(body: Callable[[Bytes, int], int]) -> None:
    mem = np.zeros(16, np.uint8)
    for offset in (-1, -8, 16, 1 << 40):
        with pytest.raises((IndexError, struct.error)):
            body(mem, offset)


@pytest.mark.parametrize("body", [atomic.store_u16, atomic.store_u64_unaligned, atomic.store_u8])
def test_plain_stores_stay_in_the_array(body: Callable[[Bytes, int, int], None]) -> None:
    backing = np.full(48, CANARY, np.uint8)
    mem = backing[16:32]
    for offset in (-1, -8, 16, 1 << 40):
        with pytest.raises((IndexError, struct.error)):
            body(mem, offset, 0)
    assert (backing == CANARY).all()


if COMPILED and os.environ.get("NUMBA_BOUNDSCHECK") == "1":

    @pytest.mark.parametrize(("at", "odd"), [(-8, 0), (64, 0), (57, 0), (0, -1), (0, 57), (0, 1 << 40)])
    def test_checked_builds_stay_in_the_array(at: int, odd: int) -> None:
        """In a build with bounds checks, loads and stores raise rather than leave their array."""
        mem, out = np.zeros(64, np.uint8), np.zeros(N_LOADS, np.int64)
        with pytest.raises(IndexError):
            numba.njit(load_all)(mem, at, odd, out)


# --- threads ---


@numba.njit(nogil=True)  # type: ignore[untyped-decorator]
def dirty_pages(data: Words, row: int, log: Bytes, rounds: int) -> None:
    """Write pages in a scattered order, each through a word of ours, and mark each after it was written."""
    n_pages = data.shape[1]
    page = 7 * row
    for _ in range(rounds):
        page = (page * 5 + 1) % n_pages
        store_u64(data[row], page, load_u64(data[row], page) + 1)
        mark_dirty(log, page << 12, 1)


@numba.njit(nogil=True)  # type: ignore[untyped-decorator]
def copy_dirty(data: Words, copied: Words, log: Bytes, pages: Words) -> int:
    """Take all dirty pages once and copy them, as a migration does; return how many there were."""
    at = 0
    total = 0
    while at < log.size:
        n, at = take_dirty(log, at, pages)
        for k in range(n):
            for row in range(data.shape[0]):
                store_u64(copied[row], pages[k], load_u64(data[row], pages[k]))
        total += n
    return total


@pytest.mark.parametrize("writers", [1, 2])
def test_no_dirty_page_is_lost(writers: int) -> None:
    """What is marked while the log is taken is found now or next time: a last pass leaves no difference."""
    n_pages = 1024
    log = np.zeros(n_pages // 8, np.uint8)
    data, copied = np.zeros((2, writers, n_pages), np.int64)
    pages = np.zeros(128, np.int64)
    rounds = scaled(1_000_000, 20_000)
    threads = [threading.Thread(target=dirty_pages, args=(data, k, log, rounds)) for k in range(writers)]
    for thread in threads:
        thread.start()
    found = 0
    while any(thread.is_alive() for thread in threads):
        found += copy_dirty(data, copied, log, pages)
    for thread in threads:
        thread.join()
    found += copy_dirty(data, copied, log, pages)
    assert not log.any()
    assert found >= n_pages
    assert data.sum() == writers * rounds
    assert (data == copied).all()


# --- processes ---

# What another process does to the first page of the memory that it shares, in plain Python, until its parent ends it.
_BEGIN = """
import mmap, sys
import numpy as np
from vnetdp_kernels.platform.atomic import *
mem = np.frombuffer(mmap.mmap(int(sys.argv[1]), 4096), np.uint8)
"""


@contextmanager
def another_process(mem_fd: int, code: str) -> Iterator[subprocess.Popen[bytes]]:
    command = [sys.executable, "-c", _BEGIN + code, str(mem_fd)]
    path = os.pathsep.join(filter(None, sys.path))
    environ = {**os.environ, "PYTHONPATH": path, "NUMBA_DISABLE_JIT": "1"}
    with subprocess.Popen(command, pass_fds=(mem_fd,), env=environ, stdin=subprocess.PIPE) as process:
        try:
            yield process
        finally:
            process.kill()


@contextmanager
def one_page() -> Iterator[tuple[int, Bytes]]:
    """Have a page of memory that other processes can have too: its descriptor, and it."""
    fd = os.memfd_create("vnetdp-test")
    os.ftruncate(fd, mmap.PAGESIZE)
    yield fd, np.frombuffer(mmap.mmap(fd, mmap.PAGESIZE), np.uint8)
    os.close(fd)


@pytest.fixture
def shared() -> Iterator[tuple[int, Bytes]]:
    with one_page() as page:
        yield page


WRITES = {"store_u16": load_u16, "store_u16_release": load_u16_acquire, "store_u32": load_u32, "store_u64": load_u64}
_REST = 255  # in place of a store's number: none


@pytest.fixture(scope="module")
def writer() -> Iterator[tuple[subprocess.Popen[bytes], Bytes]]:
    """A process that writes with the store whose number is at 0, which it repeats at 1; and the page."""
    code = f"""
import time
while True:
    n = int(mem[0])
    mem[1] = n
    while n == {_REST} and mem[0] == n:
        time.sleep(0.001)
    store = [{", ".join(WRITES)}, None][min(n, {len(WRITES)})]
    while store is not None and mem[0] == n:
        store(mem, 64, 0x1234)
        store(mem, 64, 0x5678)
"""
    with one_page() as (fd, mem):
        mem[0] = _REST
        with another_process(fd, code) as process:
            yield process, mem


@pytest.mark.parametrize("store", WRITES)
def test_a_store_of_another_process_is_seen_as_a_whole(
    writer: tuple[subprocess.Popen[bytes], Bytes], store: str
) -> None:
    """It has no moment in which something else is there, such as an index of 0."""
    process, mem = writer
    load, number = WRITES[store], list(WRITES).index(store)
    mem[0] = number
    wait_for(lambda: process.poll() is not None or mem[1] == number, "the process has turned to this store")
    seen: set[int] = set()
    while len(seen - {0}) < 2:
        assert process.poll() is None
        seen.add(load(mem, 64))
    seen = {load(mem, 64) for _ in range(200_000)}
    mem[0] = _REST
    assert seen <= {0x1234, 0x5678}


def test_no_bit_is_lost_that_another_process_sets_in_plain_python(shared: tuple[int, Bytes]) -> None:
    """Two set bits of one word, each once it is found clear; a third takes them all, again and again, and counts."""
    fd, mem = shared
    bits = 200
    setter = f"""
at = int(sys.stdin.readline())
for n in range({bits}):
    while fetch_or_u8(mem, at, 1 << n % 4) & 1 << n % 4:
        pass
"""
    taker = """
taken = passes = 0
while True:
    taken += exchange_u64(mem, 0, 0).bit_count()
    passes += 1
    store_u64(mem, 8, taken)
    store_u64(mem, 16, passes)
"""
    with another_process(fd, taker) as third, another_process(fd, setter) as one, another_process(fd, setter) as two:
        for process, word in ((one, b"1\n"), (two, b"4\n")):
            assert process.stdin is not None
            process.stdin.write(word)
            process.stdin.close()
        assert [one.wait(PATIENCE), two.wait(PATIENCE)] == [0, 0]
        passes = load_u64(mem, 16)
        wait_for(lambda: load_u64(mem, 16) > passes + 1, "the word is taken once more")
        assert third.poll() is None
        assert load_u64(mem, 8) == 2 * bits


def test_who_is_interrupted_while_it_waits_leaves_no_lock_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(_fd: int, _kind: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(atomic, "_LOCK_FILE", 0)
    monkeypatch.setattr(fcntl, "flock", interrupted)
    with pytest.raises(KeyboardInterrupt), atomic._ALONE:
        raise AssertionError
    assert atomic._LOCK.acquire(blocking=False)
    atomic._LOCK.release()
