"""Guest memory in one window, the dirty log, and blocks shared between processes."""

from __future__ import annotations

import errno
import fcntl
import gc
import mmap
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support.by_hand import no_descriptor_leaks
from vnetdp.errors import ConfigError
from vnetdp.shared.mapping import create_memfd
from vnetdp.shared.memory import DirtyLog, GuestMemory, Region, SharedBlock, page_of
from vnetdp_kernels import spec
from vnetdp_kernels.virtq.memory import mark_dirty, translate

PAGE = spec.PAGE_SIZE
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
                assert translate(memory.table, gpa, length) < 0
                continue
            assert translate(memory.table, gpa, length) == memory.translate(gpa, length)
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
        ([(0, 32 * PAGE)], "extends past the end of its 65536-byte file"),
        ([(0, 2 * PAGE), (PAGE, PAGE)], "overlap"),
        ([(PAGE, PAGE), (0, 3 * PAGE)], "overlap"),
        ([(0, PAGE), (0, PAGE)], "overlap"),
    ],
)
def test_what_is_no_memory_is_refused(regions: list[tuple[int, int]], says: str) -> None:
    with no_descriptor_leaks(), memfd(16 * PAGE) as fd, pytest.raises(ConfigError, match=says):
        GuestMemory([Region(gpa, length, fd) for gpa, length in regions])


@pytest.mark.parametrize(
    ("offset", "says"), [(1, "aligned"), (-PAGE, "aligned"), (16 * PAGE, "extends past the end of its 65536-byte file")]
)
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
        assert memory.closed
        assert memory.regions == []


def test_closed_memory_says_so_and_an_array_that_was_kept_stays_usable() -> None:
    memory = GuestMemory.create([(0, PAGE)])
    kept = memory.mem[:4]
    memory.write(0, b"kept")
    memory.close()
    assert kept.tobytes() == b"kept"
    uses: list[Callable[[], object]] = [
        lambda: memory.mem,
        lambda: memory.read(0, 4),
        lambda: memory.write(0, b"x"),
        lambda: memory.translate(0, 1),
    ]
    for use in uses:
        with pytest.raises(ConfigError, match="the guest memory is closed"):
            use()


def mapped(name: str) -> int:
    """Return how many mappings of files with this in their name this process has."""
    return sum(name in line for line in Path("/proc/self/maps").read_text().splitlines())


def test_memory_is_unmapped_once_nobody_uses_it() -> None:
    before = mapped("vnetdp-guest")
    memory = GuestMemory.create([(0, PAGE), (HUGE, PAGE)])
    view = memory.mem[:1]
    assert mapped("vnetdp-guest") == before + 2
    memory.close()
    assert mapped("vnetdp-guest") == before + 2
    del view
    assert mapped("vnetdp-guest") == before


# --- pages of hugetlbfs ---


@contextmanager
def huge_pages(size: int, count: int) -> Iterator[int]:
    """Give a memfd of *count* pages of that size, of which the machine may have none to spare."""
    knob = Path(f"/sys/kernel/mm/hugepages/hugepages-{size >> 10}kB/nr_hugepages")
    if not knob.exists():
        pytest.skip(f"the kernel has no huge pages of {size >> 20} MiB")
    with knob.open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # who takes pages gives back as many, and another test may do so now
        reserved = int(knob.read_text())
        if os.access(knob, os.W_OK):
            knob.write_text(str(reserved + count))
        fd = os.memfd_create("huge", os.MFD_HUGETLB | (size.bit_length() - 1) << 26)
        try:
            os.ftruncate(fd, count * size)
            yield fd
        finally:
            os.close(fd)
            gc.collect()
            if os.access(knob, os.W_OK):
                knob.write_text(str(reserved))


@contextmanager
def pages_may_be_missing() -> Iterator[None]:
    """Take ENOMEM as well: the place would do, and only free pages are missing on this machine."""
    try:
        yield
    except OSError as e:
        if e.errno != errno.ENOMEM:
            raise


@pytest.mark.parametrize("size", [HUGE, 1 << 30])
def test_guest_memory_in_huge_pages_is_mapped_wherever_the_guest_has_it(size: int) -> None:
    with huge_pages(size, 1) as fd:
        for gpa in (0, 4 << 30, (7 << 29) + PAGE):
            for foreign in (False, True):
                with pages_may_be_missing(), GuestMemory([Region(gpa, size, fd)], foreign) as memory:
                    memory.write(gpa, b"first")
                    memory.write(gpa + size - 4, b"last")
                    with mmap.mmap(fd, size) as view:
                        assert (view[:5], view[-4:]) == (b"first", b"last")


@pytest.mark.parametrize("size", [HUGE, 1 << 30])
def test_a_part_of_a_huge_page_maps_nothing_over_its_neighbours(size: int) -> None:
    with huge_pages(size, 1) as fd, memfd(4 * PAGE) as small, pages_may_be_missing():
        # The kernel maps whole pages, whatever length it is asked for, and puts the next mapping below the one before.
        canary = mmap.mmap(-1, PAGE)
        canary[:] = b"c" * PAGE
        parts = [Region(PAGE, PAGE, fd, PAGE), Region(2 * PAGE, PAGE, small), Region(3 * PAGE, PAGE, fd, 5 * PAGE)]
        for region in parts:
            with GuestMemory([region]) as memory:
                memory.write(region.gpa, b"alone")
        with GuestMemory(parts, True, Region(0, PAGE, fd, 7 * PAGE)) as memory:
            for k, region in enumerate(parts):
                memory.write(region.gpa, b"part%d" % k)
            memory.mem[memory.beside_offset] = ord("b")
            with mmap.mmap(fd, size) as view:
                assert [view[at * PAGE : at * PAGE + 5] for at in (1, 5)] == [b"part0", b"part2"]
                assert view[7 * PAGE] == ord("b")
            assert os.pread(small, 5, 0) == b"part1"
            with pytest.raises(ConfigError, match="not inside"):
                memory.read(PAGE, 2 * PAGE)
        assert canary[:] == b"c" * PAGE


def test_huge_pages_that_are_adjacent_are_one_run() -> None:
    with huge_pages(HUGE, 2) as fd, memfd(HUGE) as small, pages_may_be_missing():
        regions = [Region(0, HUGE, small), Region(HUGE, HUGE, fd, HUGE), Region(2 * HUGE, HUGE, fd)]
        with GuestMemory(regions) as memory:
            assert len(memory.table) == 1
            memory.write(2 * HUGE - 4, b"crosses")
            with mmap.mmap(fd, 2 * HUGE) as view:
                assert (view[-4:], view[:3]) == (b"cros", b"ses")


@pytest.mark.parametrize("size", [HUGE, 1 << 30])
def test_a_huge_page_that_its_owner_takes_away_reads_as_zeros(size: int) -> None:
    with huge_pages(size, 1) as fd, pages_may_be_missing():
        memory = GuestMemory([Region(0, size, fd)], foreign=True)
        with memory:
            memory.write(0, b"there")
            os.ftruncate(fd, 0)
            assert memory.read(0, 5) == bytes(5)
            memory.write(0, b"again")
            assert memory.read(0, 5) == b"again"


def test_a_shared_block_in_huge_pages_is_unmapped() -> None:
    with huge_pages(HUGE, 1) as fd, pages_may_be_missing():
        before = mapped("memfd:huge")
        block = SharedBlock(3 * PAGE, os.dup(fd), PAGE)
        block.carve(np.uint8, PAGE)[:] = 7
        with mmap.mmap(fd, HUGE) as view:
            assert view[: 2 * PAGE] == bytes(PAGE) + b"\x07" * PAGE
        block.close()
        del block
        assert mapped("memfd:huge") == before


# --- an address that can't be had ---

_TAKEN = """
import ctypes, mmap, os
from pathlib import Path
from vnetdp.errors import ConfigError
from vnetdp.shared.mapping import create_memfd
from vnetdp.shared.memory import DirtyLog, GuestMemory, Region

libc = ctypes.CDLL(None)
libc.mmap.restype = ctypes.c_void_p
libc.mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, *([ctypes.c_int] * 3), ctypes.c_long)
TABLE = 0x5EED_0000_0000
assert libc.mmap(TABLE + 4096, 4096, 3, 0x32, -1, 0) == TABLE + 4096
ctypes.memset(TABLE + 4096, 0x55, 4096)
fd = create_memfd("guest", 1 << 20)
for _ in range(2):
    for make in (lambda: GuestMemory([Region(0, 1 << 20, fd)], foreign=True), lambda: DirtyLog.attach(fd, 4096, 0)):
        try:
            make()
        except ConfigError as e:
            print(e)
assert ctypes.string_at(TABLE + 4096, 4096) == b"\x55" * 4096
assert "memfd:guest" not in Path("/proc/self/maps").read_text()
GuestMemory([Region(0, 1 << 20, fd)]).close()
"""


def test_a_fixed_address_that_is_taken_is_an_error_and_stays_its_owners() -> None:
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", _TAKEN], env=env, check=True, capture_output=True, text=True)
    says = "65536 bytes at the fixed address 0x5eed00000000 can't be had: the address is taken"
    lines = done.stdout.splitlines()
    assert len(lines) == 4
    assert all(line.endswith(says) for line in lines), lines


# --- the dirty log ---


@given(st.sets(st.integers(0, 199)), st.sets(st.integers(0, 199)))
def test_pages_are_taken_once(first: set[int], second: set[int]) -> None:
    log = DirtyLog(200 * PAGE)
    for page in first:
        mark_dirty(log.log, page * PAGE + page, 1)
    assert log.pages() == sorted(first)
    assert log.pages() == sorted(first), "looking leaves them dirty"
    assert log.take() == sorted(first)
    assert log.take() == log.pages() == []
    for page in second:
        mark_dirty(log.log, page * PAGE, PAGE)
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
    mark_dirty(log.log, end - 1, 1)
    mark_dirty(log.log, (8 * length) * PAGE, PAGE)  # behind it: left out
    assert log.pages() == [page_of(end - 1)]
    log.close()


def test_a_log_is_shared_through_its_descriptor() -> None:
    with no_descriptor_leaks():
        log = DirtyLog(64 * PAGE)
        other = DirtyLog(64 * PAGE, os.dup(log.fd))
        mark_dirty(other.log, 5 * PAGE, 1)
        assert log.take() == [5]
        assert other.pages() == []
        log.close()
        other.close()
        log.close()


# --- shared blocks ---

_CHILD = """
import sys
import numpy as np
from vnetdp.shared.memory import SharedBlock
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
    with memfd(PAGE) as fd, pytest.raises(ConfigError, match="extends past the end of its 4096-byte file"):
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
