"""Guest memory on its way: which pages to send, and their bytes (4 KiB each, numbered by guest address).

A device's writes are known from its dirty log alone: a write that is not logged does not arrive. A hypervisor learns
the guest's own writes from its page tables; here the guest's own pages are compared with the copies that were sent
last.
"""

from __future__ import annotations

import os
import struct
import threading
from collections.abc import Iterable, Iterator

import numpy as np

from vnetdp_kernels import rows as r
from vnetdp_kernels import spec

from ..errors import ConfigError
from ..shared.memory import Bytes, DirtyLog, GuestMemory, Words
from .stream import Cursor, StreamError

CHUNK_PAGES = 128  # of one section
_COUNT = struct.Struct("<I")
_WORDS = spec.PAGE_SIZE // 8


def pages_of(memory: GuestMemory) -> Bytes:
    """Return guest memory as uint8[pages, 4096], from guest address 0 on; it has to be one run of regions from there."""
    if len(memory.table) != 1 or memory.regions[0].gpa != 0:
        raise ConfigError("migration needs guest memory that begins at 0 and has no hole")
    row = memory.table[0]
    flat = memory.mem[int(row[r.REGION_OFFSET]) : int(row[r.REGION_OFFSET] + row[r.REGION_LEN])]
    return flat.reshape(-1, spec.PAGE_SIZE)


class RamSource:
    """Guest memory as its source sees it. private: (guest address, bytes) of ranges only the guest writes, whole pages.

    The guest may move its queues meanwhile: `add_private` and `wrote` may be called from any thread.
    """

    def __init__(self, memory: GuestMemory, private: Iterable[tuple[int, int]] = ()) -> None:
        self._memory = memory
        self._pages = pages_of(memory)
        self._lock = threading.Lock()
        self._copy_of: Words = np.full(len(self._pages), -1, np.int64)  # a private page's place among the copies
        self._runs: list[tuple[int, int]] = []  # of private pages, first and end: their copies lie side by side, too
        self._copies: Bytes = np.zeros((0, spec.PAGE_SIZE), np.uint8)
        self._wrote: set[int] = set()
        self.add_private(private)
        self.sent = 0  # pages

    def add_private(self, private: Iterable[tuple[int, int]]) -> None:
        """Compare the pages of *private* from now on, too: a queue has moved. New pages count as never sent."""
        with self._lock:
            n_copies = len(self._copies)
            for gpa, length in private:
                first = gpa // spec.PAGE_SIZE
                new = first + np.flatnonzero(self._copy_of[first : -(-(gpa + length) // spec.PAGE_SIZE)] < 0)
                for run in np.split(new, 1 + np.flatnonzero(np.diff(new) > 1)):
                    if len(run):
                        self._runs.append((int(run[0]), int(run[-1]) + 1))
                        self._copy_of[run] = np.arange(n_copies, n_copies + len(run))
                        n_copies += len(run)
            copies: Bytes = np.zeros((n_copies, spec.PAGE_SIZE), np.uint8)
            copies[: len(self._copies)] = self._copies
            self._copies = copies

    def wrote(self, pages: Iterable[int]) -> None:
        """Send *pages* once more: the guest itself has written them, though they are not private."""
        with self._lock:
            self._wrote.update(pages)

    def all_in_use(self) -> Words:
        """Return the numbers of the pages that hold anything: the others are zero on both sides."""
        numbers = []
        for region in self._memory.regions:
            at, end = region.fd_offset, region.fd_offset + region.length
            while at < end:
                try:
                    start = os.lseek(region.fd, at, os.SEEK_DATA)
                except OSError:
                    break  # ENXIO: nothing but hole from here on
                at = min(os.lseek(region.fd, start, os.SEEK_HOLE), end)
                into = region.gpa - region.fd_offset
                numbers.append(np.arange((start + into) // spec.PAGE_SIZE, -(-(at + into) // spec.PAGE_SIZE)))
        return np.concatenate(numbers) if numbers else np.zeros(0, np.int64)

    def changed(self, log: DirtyLog | None) -> Words:
        """Return the pages to send again: pages in the log, taken out of it, and the guest's own pages that differ."""
        logged = log.take() if log else []
        with self._lock:
            wrote, self._wrote = self._wrote, set()
            numbers = [np.array([p for p in (*logged, *wrote) if p < len(self._pages)], np.int64)]
            for first, end in self._runs:
                for at in range(first, end, 64):
                    to = min(at + 64, end)
                    now = self._pages[at:to].view(np.int64)
                    copy = int(self._copy_of[at])
                    numbers.append(
                        at + np.flatnonzero((now != self._copies[copy : copy + to - at].view(np.int64)).any(axis=1))
                    )
        return np.unique(np.concatenate(numbers))

    def payloads(self, numbers: Words) -> Iterator[bytes]:
        """Return *numbers*' pages as payloads of ram sections."""
        for at in range(0, len(numbers), CHUNK_PAGES):
            chunk = numbers[at : at + CHUNK_PAGES]
            with self._lock:
                data = self._pages[chunk]  # a copy: later looks compare with the bytes that were sent
                places = self._copy_of[chunk]
                self._copies[places[places >= 0]] = data[places >= 0]
            self.sent += len(chunk)
            yield b"".join((_COUNT.pack(len(chunk)), chunk.astype("<i8").tobytes(), data.tobytes()))


class RamTarget:
    """Guest memory as its destination sees it."""

    def __init__(self, memory: GuestMemory) -> None:
        self._pages = pages_of(memory)
        self.loaded = 0

    def load(self, payload: memoryview) -> None:
        """Write a ram section's pages to guest memory; StreamError, and no page written, if one lies outside of it."""
        cursor = Cursor(payload, "a ram section")
        (count,) = cursor.unpack(_COUNT)
        if count > CHUNK_PAGES:
            raise StreamError(f"a ram section of {count} pages; at most {CHUNK_PAGES} are taken")
        numbers = np.frombuffer(cursor.take(8 * count), "<i8")
        data = np.frombuffer(cursor.take(spec.PAGE_SIZE * count), np.uint8).reshape(-1, spec.PAGE_SIZE)
        cursor.end()
        if count and not 0 <= numbers.min() <= numbers.max() < len(self._pages):
            raise StreamError(f"page {numbers.max()} is not inside guest memory of {len(self._pages)} pages")
        self._pages[numbers] = data
        self.loaded += count
