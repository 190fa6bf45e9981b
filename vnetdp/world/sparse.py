"""Memory as its lines of 64 bytes in use: the number and the bytes of each line that is not all zero."""

from __future__ import annotations

import os
from typing import Any, Final

import numpy as np

from vnetdp_kernels import spec

from ..errors import ConfigError
from ..shared.memory import NO_FILE, Bytes, GuestMemory, SharedBlock, Words

_LINE: Final = 64
_IN_USE: Final = 3 << 62  # of an entry of /proc/self/pagemap: the page is in memory, or in swap
_NUMBERS: Final = np.dtype("<u4")


def pack(flat: Bytes, pages: Words) -> list[bytes]:
    """Return the lines in use of *flat*, whose bytes outside of *pages* are zeros: their numbers, and their bytes."""
    numbers, lines = _in_use(flat, pages)
    return [numbers.astype(_NUMBERS).tobytes(), lines.tobytes()]


def unpack(saved: Any, flat: Bytes, pages: Words) -> None:
    """Give *flat* the lines of *saved*, and zeros elsewhere. ConfigError, and no change, if they are not lines of it."""
    numbers, data = np.frombuffer(saved[0], _NUMBERS).astype(np.int64), np.frombuffer(saved[1], np.uint8)
    lines = flat.reshape(-1, _LINE)
    if data.size != _LINE * numbers.size or (np.diff(numbers) <= 0).any() or (numbers >= len(lines)).any():
        raise ConfigError(f"{numbers.size} lines and {data.size} bytes are not lines of {flat.size} bytes in order")
    lines[_in_use(flat, pages)[0]] = 0
    lines[numbers] = data.reshape(-1, _LINE)


def _in_use(flat: Bytes, pages: Words) -> tuple[Words, Bytes]:
    """Return numbers and bytes of the lines within *pages* that are not all zero."""
    lines = flat.reshape(-1, spec.PAGE_SIZE)[pages].reshape(-1, _LINE)
    used = np.flatnonzero(lines.view(np.int64).any(axis=1))
    per_page = spec.PAGE_SIZE // _LINE
    return pages[used // per_page] * per_page + used % per_page, lines[used]


def pages_of_block(block: SharedBlock) -> tuple[Bytes, Words]:
    """Return the bytes of a block without a file, and the pages of them that were ever touched."""
    flat: Bytes = np.frombuffer(memoryview(block._map), np.uint8)
    return flat, _touched(flat)


def _touched(flat: Bytes) -> Words:
    first, count = flat.ctypes.data // spec.PAGE_SIZE, flat.size // spec.PAGE_SIZE
    try:
        fd = os.open("/proc/self/pagemap", os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return np.arange(count)
    try:
        entries = np.frombuffer(os.pread(fd, 8 * count, 8 * first), np.uint64)
    finally:
        os.close(fd)
    return np.flatnonzero(entries & np.uint64(_IN_USE)) if entries.size == count else np.arange(count)


def pages_of_memory(memory: GuestMemory) -> list[tuple[Bytes, Words]]:
    """Return the bytes of each region of guest memory, and the pages of them that were ever touched.

    A look at any other page of a file would give the file that page.
    """
    found = []
    for region in memory.regions:
        at = memory.translate(region.gpa, region.length)
        flat = memory.mem[at : at + region.length]
        private = region.fd == NO_FILE
        pages = _touched(flat) if private else _pages_of_file(region.fd, region.fd_offset, region.length)
        found.append((flat, pages))
    return found


def _pages_of_file(fd: int, offset: int, length: int) -> Words:
    at, end, found = offset, offset + length, []
    while at < end:
        try:
            at = os.lseek(fd, at, os.SEEK_DATA)
            hole = min(end, os.lseek(fd, at, os.SEEK_HOLE))
        except OSError:  # ENXIO: no more data
            break
        found.append(np.arange((at - offset) // spec.PAGE_SIZE, -(-(hole - offset) // spec.PAGE_SIZE)))
        at = hole
    return np.concatenate(found) if found else np.zeros(0, np.int64)
