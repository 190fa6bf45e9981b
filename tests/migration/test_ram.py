"""Guest memory on its way: which pages are sent, that they arrive, and which sections are refused."""

from __future__ import annotations

import struct
import threading
from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support.by_hand import scaled
from vnetdp.errors import ConfigError
from vnetdp.migration.ram import CHUNK_PAGES, RamSource, RamTarget, pages_of
from vnetdp.migration.stream import MAX_PAYLOAD, StreamError
from vnetdp.shared.memory import DirtyLog, GuestMemory, Words
from vnetdp_kernels import spec

PAGES = 512
SPLIT = 300  # where the second region begins
PRIVATE = [(100, 80), (400, 3)]  # first page, pages


def make() -> GuestMemory:
    return GuestMemory.create([(0, SPLIT * spec.PAGE_SIZE), (SPLIT * spec.PAGE_SIZE, (PAGES - SPLIT) * spec.PAGE_SIZE)])


@pytest.fixture
def memory() -> Iterator[GuestMemory]:
    with make() as memory:
        yield memory


@pytest.fixture
def source(memory: GuestMemory) -> RamSource:
    return RamSource(memory, [(first * spec.PAGE_SIZE, n * spec.PAGE_SIZE) for first, n in PRIVATE])


def put(memory: GuestMemory, page: int, text: bytes = b"here") -> None:
    memory.write(page * spec.PAGE_SIZE + 8 * (page % 500), text)


def mark(log: DirtyLog, *pages: int) -> None:
    for page in pages:
        log.log[page // 8] |= 1 << page % 8


def send(source: RamSource, numbers: Words | list[int]) -> list[bytes]:
    return list(source.payloads(np.array(numbers, np.int64)))


def section(numbers: list[int], count: int | None = None, data: bytes | None = None) -> memoryview:
    """Return a ram section's payload, right or wrong."""
    count = len(numbers) if count is None else count
    data = bytes(spec.PAGE_SIZE * len(numbers)) if data is None else data
    return memoryview(struct.pack("<I", count & 0xFFFF_FFFF) + struct.pack(f"<{len(numbers)}q", *numbers) + data)


# --- which pages ---


def test_pages_that_hold_nothing_are_not_sent(memory: GuestMemory, source: RamSource) -> None:
    assert list(source.all_in_use()) == []
    for page in (0, 17, SPLIT - 1, SPLIT, PAGES - 1):
        put(memory, page)
    assert {0, 17, SPLIT - 1, SPLIT, PAGES - 1} <= set(source.all_in_use())
    assert len(source.all_in_use()) < PAGES // 2


def test_the_guests_own_pages_are_compared(memory: GuestMemory, source: RamSource) -> None:
    """What is not private and not in the log has not changed, whatever it holds."""
    put(memory, 5)
    for first, n in PRIVATE:
        for page in (first - 1, first, first + n - 1, first + n):
            put(memory, page)
    assert list(source.changed(None)) == [100, 179, 400, 402]
    assert list(source.changed(None)) == [100, 179, 400, 402]  # not until they are sent
    send(source, [100, 402])
    assert list(source.changed(None)) == [179, 400]
    send(source, [179, 400])
    put(memory, 100, b"HERE")
    assert list(source.changed(None)) == [100]
    put(memory, 100)
    assert list(source.changed(None)) == []  # it is again what it was when it was sent


def test_other_pages_are_known_from_the_log_alone(memory: GuestMemory, source: RamSource) -> None:
    log = DirtyLog(memory.end)
    put(memory, 5)
    mark(log, 6, 101, SPLIT, PAGES - 1)
    assert list(source.changed(log)) == [6, 101, SPLIT, PAGES - 1]
    assert list(source.changed(log)) == []  # taken out of it
    log.close()


def test_a_log_may_name_pages_behind_the_memory() -> None:
    with GuestMemory.create([(0, 3 * spec.PAGE_SIZE)]) as memory:
        log = DirtyLog(memory.end)  # has whole words
        mark(log, 2, 3, 63)
        assert list(RamSource(memory, []).changed(log)) == [2]
        log.close()


def test_pages_that_the_guest_says_it_wrote_are_sent_once(source: RamSource) -> None:
    source.wrote([7, PAGES])
    assert list(source.changed(None)) == [7]
    assert list(source.changed(None)) == []


def test_ranges_that_become_private_later(memory: GuestMemory, source: RamSource) -> None:
    put(memory, 50)
    put(memory, 120)
    send(source, [120])
    source.add_private(
        [
            (50 * spec.PAGE_SIZE + 100, 10),
            (100 * spec.PAGE_SIZE, spec.PAGE_SIZE),
            (490 * spec.PAGE_SIZE, 2 * spec.PAGE_SIZE),
        ]
    )
    assert list(source.changed(None)) == [50]  # nothing of it counts as sent; what was compared before goes on
    put(memory, 491)
    assert list(source.changed(None)) == [50, 491]


def test_ranges_of_which_a_part_was_private_already(memory: GuestMemory, source: RamSource) -> None:
    """On either side of it, around it, and across the end of guest memory; what was sent of it stays sent."""
    for page in (95, 100, 179, 185, 399, 401, 403, PAGES - 1):
        put(memory, page)
    send(source, [100, 179, 401])
    ranges = [(90, 20), (150, 100), (398, 7), (PAGES - 2, 5)]
    source.add_private([(first * spec.PAGE_SIZE, n * spec.PAGE_SIZE) for first, n in ranges])
    assert list(source.changed(None)) == [95, 185, 399, 403, PAGES - 1]
    send(source, [95, 185, 399, 403, PAGES - 1])
    assert list(source.changed(None)) == []
    for page in (95, 100, 179, 185, 399, 401, 403, PAGES - 1):
        put(memory, page, b"anew")
        assert list(source.changed(None)) == [page]
        send(source, [page])


def test_a_guest_that_writes_and_moves_while_its_pages_are_sent(memory: GuestMemory, source: RamSource) -> None:
    """Every page that a thread writes and tells of arrives as it was last, whatever is sent meanwhile."""
    rnd = np.random.default_rng(1)
    done = threading.Event()

    def write() -> None:
        for n in range(scaled(4000, 400)):
            page = int(rnd.integers(200, PAGES))
            put(memory, page, n.to_bytes(4, "little"))
            if n % 2:
                source.wrote([page])
            else:
                source.add_private([(page * spec.PAGE_SIZE, spec.PAGE_SIZE)])
        done.set()

    with make() as there:
        target = RamTarget(there)
        thread = threading.Thread(target=write)
        thread.start()
        while True:
            last = done.is_set()
            for payload in source.payloads(source.changed(None)):
                target.load(memoryview(payload))
            if last:
                break
        thread.join()
        assert (pages_of(there) == pages_of(memory)).all()


# --- on their way ---


@given(st.sets(st.integers(0, PAGES - 1), max_size=300), st.integers(0, 1 << 32))
def test_what_is_sent_arrives(numbers: set[int], seed: int) -> None:
    with make() as here, make() as there:
        pages_of(here)[:] = np.random.default_rng(seed).integers(0, 256, (PAGES, spec.PAGE_SIZE), np.uint8)
        source, target = RamSource(here, [(0, 100 * spec.PAGE_SIZE)]), RamTarget(there)
        payloads = send(source, sorted(numbers))
        assert len(payloads) == -(-len(numbers) // CHUNK_PAGES)
        assert all(len(payload) <= MAX_PAYLOAD for payload in payloads)
        for payload in payloads:
            target.load(memoryview(payload))
        assert source.sent == target.loaded == len(numbers)
        wanted = np.zeros((PAGES, spec.PAGE_SIZE), np.uint8)
        chosen = sorted(numbers)
        wanted[chosen] = pages_of(here)[chosen]
        assert (pages_of(there) == wanted).all()


def test_a_page_that_changes_after_it_was_sent_is_sent_again(memory: GuestMemory, source: RamSource) -> None:
    with make() as there:
        target = RamTarget(there)
        put(memory, 100)
        payloads = source.payloads(source.changed(None))
        first = next(payloads)
        put(memory, 100, b"anew")
        target.load(memoryview(first))
        assert list(source.changed(None)) == [100]
        for payload in send(source, source.changed(None)):
            target.load(memoryview(payload))
        assert (pages_of(there) == pages_of(memory)).all()


# --- what is refused ---


@pytest.mark.parametrize("number", [-1, -PAGES, PAGES, PAGES + 1, 1 << 40, (1 << 63) - 1, -(1 << 63)])
def test_a_page_that_is_not_in_guest_memory(memory: GuestMemory, number: int) -> None:
    target = RamTarget(memory)
    with pytest.raises(StreamError, match="not inside guest memory of 512 pages"):
        target.load(section([3, number, 4], data=b"x" * 3 * spec.PAGE_SIZE))
    assert target.loaded == 0
    assert not pages_of(memory).any()  # nor did the pages beside it


@pytest.mark.parametrize(
    ("payload", "says"),
    [
        (memoryview(b""), "cut off"),
        (memoryview(b"\1\0\0"), "cut off"),
        (section([], count=1), "cut off"),
        (section([1], count=2), "cut off"),
        (section([1], data=bytes(spec.PAGE_SIZE - 1)), "cut off"),
        (section([1], data=bytes(spec.PAGE_SIZE + 1)), "1 bytes too many"),
        (section([1], count=0), "bytes too many"),
        (section([1] * CHUNK_PAGES, count=CHUNK_PAGES + 1), "a ram section of 129 pages"),
        (section([1], count=-1), "a ram section of 4294967295 pages"),
    ],
    ids=range(9),
)
def test_a_section_whose_count_is_wrong(memory: GuestMemory, payload: memoryview, says: str) -> None:
    with pytest.raises(StreamError, match=says):
        RamTarget(memory).load(payload)
    assert not pages_of(memory).any()


def test_a_section_of_no_page_and_of_as_many_as_there_may_be(memory: GuestMemory) -> None:
    target = RamTarget(memory)
    target.load(section([]))
    target.load(section(list(range(CHUNK_PAGES)), data=b"x" * CHUNK_PAGES * spec.PAGE_SIZE))
    assert target.loaded == CHUNK_PAGES
    assert pages_of(memory)[:CHUNK_PAGES].all()


def test_memory_that_cannot_be_migrated() -> None:
    for parts in ([(spec.PAGE_SIZE, spec.PAGE_SIZE)], [(0, spec.PAGE_SIZE), (2 * spec.PAGE_SIZE, spec.PAGE_SIZE)]):
        with GuestMemory.create(parts) as memory, pytest.raises(ConfigError, match="begins at 0 and has no hole"):
            pages_of(memory)
