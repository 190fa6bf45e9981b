"""Guest memory in one window, the dirty log, and blocks shared between processes."""

from __future__ import annotations

import fcntl
import gc
import mmap
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.by_hand import no_descriptor_leaks
from vnetdp.errors import ConfigError
from vnetdp.memory import DirtyLog, GuestMemory, Region, SharedBlock, create_memfd, page_of
from vnetdp_kernels import guest
from vnetdp_kernels.layout import PAGE_SIZE

PAGE = PAGE_SIZE
HUGE = 1 << 21

# Regions as (pages of hole before, pages): a hole of no pages makes two regions adjacent.
LAYOUTS = st.lists(st.tuples(st.sampled_from((0, 0, 1, 7, 513)), st.integers(1, 6)), min_size=1, max_size=6)


def spread(layout: list[tuple[int, int]], base: int) -> list[tuple[int, int]]:
    """Return (guest address, bytes) of each region of a layout."""
    regions = []
    at = base
    for hole, pages in layout:
        at += hole * PAGE
        regions.append((at, pages * PAGE))
        at += pages * PAGE
    return regions


@contextmanager
def memfd(length: int) -> Iterator[int]:
    fd = create_memfd("test", length)
    try:
        yield fd
    finally:
        os.close(fd)


# --- GuestMemory ---


@given(LAYOUTS, st.sampled_from((0, PAGE, HUGE - PAGE, 1 << 32, (1 << 51) - PAGE)), st.data())
def test_ranges_are_inside_or_refused(layout: list[tuple[int, int]], base: int, data: st.DataObject) -> None:
    regions = spread(layout, base)
    inside = {gpa + k * PAGE for gpa, length in regions for k in range(length // PAGE)}
    order = data.draw(st.permutations(regions))
    edges = [edge for gpa, length in regions for edge in (gpa, gpa + length)]
    with GuestMemory.create(order) as memory:
        assert memory.end == max(edges)
        assert memory.table[:, 0].tolist() == sorted(memory.table[:, 0].tolist())
        for _ in range(20):
            gpa = data.draw(st.sampled_from(edges)) + data.draw(st.integers(-2 * PAGE, 2 * PAGE))
            length = data.draw(st.sampled_from((1, 2, 4095, PAGE, 3 * PAGE, 1 << 40)))
            pages = range(gpa // PAGE, (gpa + length - 1) // PAGE + 1)
            valid = gpa >= 0 and len(pages) < 20 and all(page * PAGE in inside for page in pages)
            if not valid:
                with pytest.raises(ConfigError, match="not inside"):
                    memory.translate(gpa, length)
                assert guest.translate(memory.table, gpa, length) < 0
                continue
            assert guest.translate(memory.table, gpa, length) == memory.translate(gpa, length)
            content = os.urandom(length)
            memory.write(gpa, content)
            assert memory.read(gpa, length) == content
            at = memory.translate(gpa, length)
            assert memory.mem[at : at + length].tobytes() == content


def test_each_region_is_its_file() -> None:
    with no_descriptor_leaks(), memfd(16 * PAGE) as fd:
        # Out of order, one file three times, and the last two adjacent.
        regions = [Region(HUGE, PAGE, fd, 3 * PAGE), Region(2 * PAGE, 2 * PAGE, fd, 8 * PAGE), Region(PAGE, PAGE, fd)]
        with GuestMemory(regions) as memory:
            assert memory.table.shape == (2, 3)
            memory.write(2 * PAGE - 4, b"abcdefgh")
            memory.write(HUGE, b"high")
            assert os.pread(fd, 4, PAGE - 4) == b"abcd"
            assert os.pread(fd, 4, 8 * PAGE) == b"efgh"
            assert os.pread(fd, 4, 3 * PAGE) == b"high"
            os.pwrite(fd, b"from outside", 9 * PAGE)
            assert memory.read(3 * PAGE, 12) == b"from outside"
            assert [region.gpa for region in memory.regions] == [PAGE, 2 * PAGE, HUGE]
            assert all(region.fd != fd for region in memory.regions)
        assert os.pread(fd, 4, 3 * PAGE) == b"high"


def test_two_mappings_of_the_same_files_are_one_memory() -> None:
    with no_descriptor_leaks(), GuestMemory.create([(0, PAGE), (HUGE, PAGE)]) as first:
        with GuestMemory(first.regions) as second:
            first.write(HUGE + 5, b"shared")
            assert second.read(HUGE + 5, 6) == b"shared"
        first.write(0, b"still there")


def test_runs_keep_their_place_in_a_huge_page() -> None:
    with GuestMemory.create([(3 * HUGE + 5 * PAGE, HUGE), (9 * HUGE + PAGE, PAGE)]) as memory:
        for gpa, _, offset in memory.table.tolist():
            assert offset % HUGE == gpa % HUGE


@pytest.mark.parametrize(
    ("regions", "says"),
    [
        ([], "at least one"),
        ([(0, 0)], "empty"),
        ([(0, -PAGE)], "empty"),
        ([(-PAGE, PAGE)], "empty"),
        ([(1 << 52, PAGE)], "empty"),
        ([((1 << 52) - PAGE, 2 * PAGE)], "empty"),
        ([(1, PAGE)], "aligned"),
        ([(0, PAGE + 1)], "aligned"),
        ([(0, 32 * PAGE)], "ends behind its file"),
        ([(0, 2 * PAGE), (PAGE, PAGE)], "overlap"),
        ([(PAGE, PAGE), (0, 3 * PAGE)], "overlap"),
        ([(0, PAGE), (0, PAGE)], "overlap"),
    ],
)
def test_what_is_no_memory_is_refused(regions: list[tuple[int, int]], says: str) -> None:
    with no_descriptor_leaks(), memfd(16 * PAGE) as fd, pytest.raises(ConfigError, match=says):
        GuestMemory([Region(gpa, length, fd) for gpa, length in regions])


@pytest.mark.parametrize(("offset", "says"), [(1, "aligned"), (-PAGE, "aligned"), (16 * PAGE, "ends behind")])
def test_offsets_into_the_file_are_checked(offset: int, says: str) -> None:
    with no_descriptor_leaks(), memfd(16 * PAGE) as fd, pytest.raises(ConfigError, match=says):
        GuestMemory([Region(0, PAGE, fd, offset)])


def test_a_file_that_can_not_be_mapped_leaks_nothing() -> None:
    with no_descriptor_leaks(), memfd(16 * PAGE) as fd:
        readonly = os.open(f"/proc/self/fd/{fd}", os.O_RDONLY)
        with pytest.raises(OSError, match="mapping of 4096 bytes: Permission denied"):
            GuestMemory([Region(0, PAGE, fd), Region(PAGE, PAGE, readonly)])
        os.close(readonly)


def test_our_own_memory_can_not_shrink() -> None:
    with GuestMemory.create([(0, PAGE)]) as memory:
        fd = memory.regions[0].fd
        assert fcntl.fcntl(fd, fcntl.F_GET_SEALS) & fcntl.F_SEAL_SHRINK
        with pytest.raises(PermissionError):
            os.ftruncate(fd, 0)


def test_memory_that_can_not_be_had_is_a_clear_error() -> None:
    for length in (-PAGE, 1 << 63):
        with no_descriptor_leaks(), pytest.raises(ConfigError, match="shared memory"):
            GuestMemory.create([(0, PAGE), (1 << 40, length)])


def test_closing_twice_is_closing_once() -> None:
    with no_descriptor_leaks():
        memory = GuestMemory.create([(0, PAGE)])
        memory.close()
        memory.close()
        assert memory.mem.size == 0
        assert memory.regions == []


# --- the dirty log ---


@given(st.sets(st.integers(0, 199)), st.sets(st.integers(0, 199)))
def test_pages_are_taken_once(first: set[int], second: set[int]) -> None:
    log = DirtyLog(200 * PAGE)
    for page in first:
        guest.mark_dirty(log.log, page * PAGE + page, 1)
    assert log.pages() == sorted(first)
    assert log.pages() == sorted(first), "looking leaves them dirty"
    assert log.take() == sorted(first)
    assert log.take() == log.pages() == []
    for page in second:
        guest.mark_dirty(log.log, page * PAGE, PAGE)
    assert log.take() == sorted(second)
    log.close()


def test_more_pages_than_one_kernel_call_finds() -> None:
    log = DirtyLog(20_000 * PAGE)
    log.log[:] = 0xFF
    assert log.take() == list(range(8 * log.length))
    assert log.take() == []
    log.close()


@pytest.mark.parametrize(("end", "length"), [(1, 8), (PAGE, 8), (64 * PAGE, 8), (64 * PAGE + 1, 16)])
def test_the_log_has_a_bit_for_every_page(end: int, length: int) -> None:
    log = DirtyLog(end)
    assert (log.length, log.log.size) == (length, length)
    guest.mark_dirty(log.log, end - 1, 1)
    guest.mark_dirty(log.log, (8 * length) * PAGE, PAGE)  # behind it: left out
    assert log.pages() == [page_of(end - 1)]
    log.close()


def test_a_log_is_shared_through_its_descriptor() -> None:
    with no_descriptor_leaks():
        log = DirtyLog(64 * PAGE)
        other = DirtyLog(64 * PAGE, os.dup(log.fd))
        guest.mark_dirty(other.log, 5 * PAGE, 1)
        assert log.take() == [5]
        assert other.pages() == []
        log.close()
        other.close()
        log.close()


# --- shared blocks ---

_CHILD = """
import sys
import numpy as np
from vnetdp.memory import SharedBlock
block = SharedBlock(int(sys.argv[2]), int(sys.argv[1]))
words, small, last = block.carve(np.int64, 3, 5), block.carve(np.uint8, 7), block.carve(np.int64, 2)
assert words.tolist() == [[10 * i + j for j in range(5)] for i in range(3)], words
assert bytes(small) == b"parent!"
words[2, 4], last[:] = -1, (7, 8)
"""


def test_a_second_process_carves_the_same_arrays() -> None:
    with no_descriptor_leaks():
        block = SharedBlock(5000)
        assert block.length == 2 * PAGE
        words, small, last = block.carve(np.int64, 3, 5), block.carve(np.uint8, 7), block.carve(np.int64, 2)
        for array in (words, small, last):
            assert array.ctypes.data % 64 == 0
            assert array.flags.c_contiguous
            assert not array.any()
        words[:] = [[10 * i + j for j in range(5)] for i in range(3)]
        small[:] = np.frombuffer(b"parent!", np.uint8)
        subprocess.run(
            [sys.executable, "-c", _CHILD, str(block.fd), str(block.length)],
            pass_fds=[block.fd],
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
            check=True,
        )
        assert words[2, 4] == -1
        assert last.tolist() == [7, 8]
        block.close()


def test_a_block_gives_its_descriptor_up_and_lives_as_long_as_its_arrays() -> None:
    with no_descriptor_leaks():
        block = SharedBlock(PAGE)
        view = block.carve(np.int64, 4)[1:]
        block.close()
        block.close()
        assert block.fd == -1
        del block
        gc.collect()
        view[:] = 5
        assert view.tolist() == [5, 5, 5]


def test_a_block_is_no_longer_than_its_file() -> None:
    with memfd(PAGE) as fd, pytest.raises(ConfigError, match="ends behind"):
        SharedBlock(PAGE + 1, fd)
    block = SharedBlock(PAGE)
    block.carve(np.uint8, PAGE - 1)
    with pytest.raises(ValueError, match=r"smaller|offset"):
        block.carve(np.int64, 1)
    block.close()


def test_page_size_is_the_machines() -> None:
    assert PAGE == mmap.PAGESIZE
    assert page_of(PAGE - 1) == 0
    assert page_of(PAGE) == 1
