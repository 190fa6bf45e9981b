"""Guest addresses and the dirty log, against a model in Python's own integers."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.kernels.rig import HIGH_GPA, LOW_GPA, TOP_GPA, TOP_LEN, Memory, pages_of, scaled
from vnetdp_kernels import rows as r
from vnetdp_kernels.platform.atomic import Words
from vnetdp_kernels.virtq import memory
from vnetdp_kernels.virtq.memory import (
    mark_behind_fence,
    mark_dirty,
    mark_noted,
    take_dirty,
    translate,
    write,
    write_header,
)

MEMORY = Memory()
EDGES = [LOW_GPA, MEMORY.low_end, HIGH_GPA, MEMORY.seam, MEMORY.high_end, TOP_GPA, TOP_GPA + TOP_LEN, 1 << 63, 1 << 64]
EXAMPLES = settings(max_examples=scaled(500, 200), deadline=None)


def signed(address: int) -> int:
    """Return a u64 as the kernels see it."""
    return (address + (1 << 63)) % (1 << 64) - (1 << 63)


@EXAMPLES
@given(
    edge=st.sampled_from(EDGES),
    before=st.integers(-70_000, 70_000) | st.integers(-2, 2),
    length=st.integers(0, 70_000) | st.integers(0, (1 << 32) - 1) | st.integers(0, 2),
)
def test_translate(edge: int, before: int, length: int) -> None:
    """A range is translated if a run of regions holds all of it, and to where that lies."""
    gpa = (edge + before) % (1 << 64)
    expected = r.E_ADDRESS
    for start, run, offset in MEMORY.regions.tolist():
        if start <= gpa < 1 << 63 and gpa + length <= start + run:
            expected = offset + gpa - start
    assert translate(MEMORY.regions, signed(gpa), length) == expected


@pytest.mark.parametrize("length", [-1, -(1 << 63), (1 << 63) - 1])
@pytest.mark.parametrize("gpa", [LOW_GPA, TOP_GPA, 0, (1 << 63) - 1, -1, -(1 << 63)])
def test_no_length_wraps(gpa: int, length: int) -> None:
    assert translate(MEMORY.regions, gpa, length) == r.E_ADDRESS


def test_no_regions_at_all() -> None:
    assert translate(np.zeros((0, r.REGION_SLOTS), np.int64), 0, 1) == r.E_ADDRESS


def test_regions_that_touch_only_in_the_window_are_two() -> None:
    """Rows that follow each other in the window, but not in the guest: no range crosses from one into the other."""
    regions: Words = np.array([[0, 4096, 0], [1 << 20, 4096, 4096]], np.int64)
    assert translate(regions, 4095, 1) == 4095
    assert translate(regions, 4095, 2) == r.E_ADDRESS
    assert translate(regions, 1 << 20, 4096) == 4096


@EXAMPLES
@given(
    ranges=st.lists(
        st.tuples(st.integers(-5000, 140 << 12) | st.integers(0, 140).map(lambda p: p << 12), st.integers(-1, 20_000)),
        max_size=6,
    ),
    words=st.integers(0, 2),
)
def test_mark_and_take(ranges: list[tuple[int, int]], words: int) -> None:
    """Exactly the pages that were touched and that the log knows, in order, each once, and then none."""
    log = np.zeros(8 * words, np.uint8)
    expected: set[int] = set()
    for gpa, length in ranges:
        mark_dirty(log, gpa, length)
        expected |= {page for page in pages_of(gpa, length) if 0 <= page < 64 * words}
    bits = np.unpackbits(log, bitorder="little")
    assert set(np.flatnonzero(bits).tolist()) == expected
    pages = np.zeros(128, np.int64)
    n, at = take_dirty(log, 0, pages)
    assert (pages[:n].tolist(), at) == (sorted(expected), log.size)
    assert take_dirty(log, 0, pages) == (0, log.size)


@pytest.mark.parametrize("room", [64, 65, 127, 128, 200, 1000])
def test_take_goes_on_where_it_stopped(room: int) -> None:
    """A full log through a small window: each call finds what fits, and says where to go on."""
    log = np.full(64, 0xFF, np.uint8)
    pages = np.zeros(room, np.int64)
    found: list[int] = []
    at = 0
    calls = 0
    while at < log.size:
        n, following = take_dirty(log, at, pages)
        assert n == 8 * (following - at) > 0
        found += pages[:n].tolist()
        at = following
        calls += 1
    assert found == list(range(512))
    assert calls == -(-8 // min(8, room // 64))
    assert not log.any()


def test_the_highest_bit_of_a_word() -> None:
    """Page 63 alone makes the word negative."""
    log = np.zeros(16, np.uint8)
    mark_dirty(log, 63 << 12, 1)
    mark_dirty(log, 127 << 12, 4096)
    pages = np.zeros(128, np.int64)
    n, _ = take_dirty(log, 0, pages)
    assert pages[:n].tolist() == [63, 127]


@EXAMPLES
@given(
    gpa=st.integers(HIGH_GPA + 8, HIGH_GPA + 9000) | st.just(MEMORY.seam - 5),
    length=st.integers(0, 9000),
    log=st.booleans(),
)
def test_writes_are_marked(gpa: int, length: int, log: bool) -> None:
    memory = MEMORY
    memory.log = np.zeros(0, np.uint8)
    if log:
        memory.log_on()
    data = np.arange(length + 7, dtype=np.uint8)
    around = [(gpa - 8, 8), (gpa + length, 8)]
    before = [memory.read(*range_) for range_ in around]
    vq = np.zeros(r.VQ_SLOTS, np.int64)
    write(memory.mem, vq, memory.log, memory.at(gpa, max(length, 1)), gpa, data, 7, length)
    assert memory.read(gpa, max(length, 1))[:length] == data[7:].tobytes()
    assert [memory.read(*range_) for range_ in around] == before
    mark_noted(vq, memory.log)
    assert not vq.any()
    assert memory.dirty() == (pages_of(gpa, length) if log else set())


@EXAMPLES
@given(
    st.lists(st.tuples(st.integers(0, 12 << 12), st.integers(0, 9000)), max_size=12),
    st.integers(0, 12),
)
def test_pages_of_many_writes_are_all_marked(ranges: list[tuple[int, int]], taken_at: int) -> None:
    """The log may be taken in between: a page that waits to be marked then is found the next time."""
    memory = MEMORY
    memory.log_on()
    vq = np.zeros(r.VQ_SLOTS, np.int64)
    data = np.zeros(9000, np.uint8)
    wanted: set[int] = set()
    for n, (at, length) in enumerate(ranges):
        if n == taken_at:
            wanted = (wanted - memory.dirty()) | ({int(vq[r.VQ_NOTED]) - 1} - {-1})
            memory.log[:] = 0
        gpa = HIGH_GPA + at
        write(memory.mem, vq, memory.log, memory.at(gpa, max(length, 1)), gpa, data, 0, length)
        wanted |= pages_of(gpa, length)
    mark_noted(vq, memory.log)
    assert memory.dirty() == wanted
    assert not vq.any()


@pytest.mark.parametrize("before", [0x00, 0x20, 0xFF])
def test_a_mark_behind_a_fence_sets_what_is_clear(before: int) -> None:
    log = np.full(8, before, np.uint8)
    mark_behind_fence(log, 4 << 12, 2 * 4096 + 1)
    mark_behind_fence(log, 63 << 12, 4096)
    mark_behind_fence(log, 64 << 12, 1)  # behind the log
    mark_behind_fence(log, 0, 0)
    assert log.tolist() == [before | 0x70, *[before] * 6, before | 0x80]


def test_a_header_is_written() -> None:
    """Twelve bytes across a page boundary, num_buffers from the argument, the source as it was."""
    memory = Memory()
    source = np.arange(32, dtype=np.uint8)
    gpa = HIGH_GPA + 4096 - 5
    write_header(memory.mem, memory.at(gpa, 12), source, 3, 0x12345)
    assert memory.read(gpa - 1, 14) == b"\0" + bytes(range(3, 13)) + b"\x45\x23" + b"\0"
    assert source.tolist() == list(range(32))


@pytest.mark.parametrize(("length", "lines"), [(0, 0), (1, 1), (64, 1), (65, 2), (2048, 32), (1 << 32, 32)])
def test_no_more_is_fetched_ahead_than_is_soon_written(
    monkeypatch: pytest.MonkeyPatch, length: int, lines: int
) -> None:
    """Whatever a guest offers: a chain of 4 GiB is 64 million cache lines."""
    asked: list[int] = []
    monkeypatch.setattr(memory, "prefetch_to_write", lambda _mem, offset: asked.append(offset))
    plain = getattr(memory.prefetch_write, "py_func", memory.prefetch_write)
    plain(Memory().mem, 7, length)
    assert asked == [7 + 64 * k for k in range(lines)]
