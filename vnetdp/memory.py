"""Guest memory: memfd regions mapped into one flat window, the dirty log, and blocks shared between processes.

The window is reserved once for all regions; each is mapped into it with MAP_FIXED, and a run of regions that are adjacent
in guest addresses is adjacent in the window. So kernels see one uint8 array and a table with a row for each run, and
a range may cross from one region into the next. Holes stay without access, and no translation leads there.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import itertools
import mmap
import os
import weakref
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from vnetdp_kernels.layout import PAGE_SHIFT, PAGE_SIZE, REGION_GPA, REGION_LEN, REGION_OFFSET, REGION_SLOTS

from .errors import ConfigError
from .limits import fault, giving

Bytes = npt.NDArray[np.uint8]
Words = npt.NDArray[np.int64]

_HUGE_ALIGN = 1 << 21  # runs keep their guest address modulo this, so that 2 MiB pages can back them
_MAP_FIXED = 0x10
_MAP_NORESERVE = 0x4000
_MAP_FAILED = ctypes.c_void_p(-1).value
ADDRESS_LIMIT = 1 << 52  # of a guest physical address

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = (
    ctypes.c_void_p,
    ctypes.c_size_t,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_long,
)
_libc.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)


def _map(address: int | None, length: int, prot: int, flags: int, fd: int, offset: int) -> int:
    with giving(f"a mapping of {length} bytes"):
        got = _libc.mmap(address, length, prot, flags, fd, offset)
        if got == _MAP_FAILED:
            code = ctypes.get_errno()
            raise OSError(code, os.strerror(code))
    return int(got)


@dataclass(frozen=True)
class Region:
    """One region of guest memory: [gpa, gpa + length) is backed by *fd* from *fd_offset* on; all multiples of 4096."""

    gpa: int
    length: int
    fd: int
    fd_offset: int = 0

    def check(self) -> None:
        """Raise ConfigError for what no mapping could be: zero, unaligned, wrapping, or past the file's end."""
        if self.length <= 0 or self.gpa < 0 or self.gpa + self.length > ADDRESS_LIMIT:
            raise ConfigError(f"memory region {self.gpa:#x}+{self.length:#x} is empty or out of the address space")
        if (self.gpa | self.length | self.fd_offset) & (PAGE_SIZE - 1) or self.fd_offset < 0:
            raise ConfigError(f"memory region {self.gpa:#x}+{self.length:#x} is not aligned to {PAGE_SIZE} bytes")
        size = os.fstat(self.fd).st_size
        if self.fd_offset + self.length > -(-size // PAGE_SIZE) * PAGE_SIZE:  # its last page can be mapped whole
            raise ConfigError(f"memory region {self.gpa:#x}+{self.length:#x} ends behind its file of {size} bytes")


class GuestMemory:
    """Guest memory as kernels see it.

    mem uint8[window]; table int64[runs, 3] (guest address, length, window offset), sorted by guest address.
    The descriptors in *regions* are duplicated, and the caller keeps its own; but not those of *foreign* memory, of which
    there may be hundreds: they are the caller's, to be closed after this.
    """

    def __init__(self, regions: Sequence[Region], foreign: bool = False, beside: Region | None = None) -> None:
        """foreign: the files are another process's, which may shrink them; pages lost to that then read as zeros.

        beside: memory that kernels need and the guest has no address for (its gpa means nothing); it is mapped
        behind the regions, at window offset `beside_offset`.
        """
        ordered = sorted(regions, key=lambda r: r.gpa)
        if not ordered:
            raise ConfigError("guest memory needs at least one region")
        for region in ordered:
            region.check()
        for before, after in itertools.pairwise(ordered):
            if before.gpa + before.length > after.gpa:
                raise ConfigError(
                    f"memory regions {before.gpa:#x}+{before.length:#x} and {after.gpa:#x}+{after.length:#x} overlap"
                )
        runs: list[list[Region]] = []
        for region in ordered:
            if runs and runs[-1][-1].gpa + runs[-1][-1].length == region.gpa:
                runs[-1].append(region)
            else:
                runs.append([region])
        self.table: Words = np.zeros((len(runs), REGION_SLOTS), np.int64)
        at = 0
        for row, run in zip(self.table, runs, strict=True):
            gpa, length = run[0].gpa, sum(r.length for r in run)
            at = -(-at // _HUGE_ALIGN) * _HUGE_ALIGN + gpa % _HUGE_ALIGN
            row[REGION_GPA], row[REGION_LEN], row[REGION_OFFSET] = gpa, length, at
            at += length
        self.beside_offset = -1
        if beside is not None:
            beside.check()
            self.beside_offset = at = -(-at // PAGE_SIZE) * PAGE_SIZE
            at += beside.length
        self._window_len = at + _HUGE_ALIGN
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE
        self._window = _map(None, self._window_len, 0, flags, -1, 0)
        base = -(-self._window // _HUGE_ALIGN) * _HUGE_ALIGN
        self.regions: list[Region] = []
        self._foreign = foreign
        self._protected = 0
        if foreign:
            from vnetdp_kernels import sigbus

            sigbus.protect(base, at)
            self._protected = base
        try:
            for row, run in zip(self.table, runs, strict=True):
                for region in run:
                    where = base + int(row[REGION_OFFSET]) + region.gpa - run[0].gpa
                    prot = mmap.PROT_READ | mmap.PROT_WRITE
                    _map(where, region.length, prot, mmap.MAP_SHARED | _MAP_FIXED, region.fd, region.fd_offset)
                    if not foreign:
                        region = replace(region, fd=fcntl.fcntl(region.fd, fcntl.F_DUPFD_CLOEXEC, 0))
                    self.regions.append(region)
            if beside is not None:
                prot = mmap.PROT_READ | mmap.PROT_WRITE
                where = base + self.beside_offset
                _map(where, beside.length, prot, mmap.MAP_SHARED | _MAP_FIXED, beside.fd, beside.fd_offset)
        except OSError:
            self.close()
            raise
        self.mem: Bytes = np.ctypeslib.as_array((ctypes.c_uint8 * at).from_address(base))

    @classmethod
    def create(cls, parts: Iterable[tuple[int, int]]) -> GuestMemory:
        """Make guest memory of our own: one sealed memfd for each (guest address, bytes)."""
        fds: list[int] = []
        regions = []
        try:
            for gpa, length in parts:
                fd = create_memfd("vnetdp-guest", length)
                fds.append(fd)
                regions.append(Region(gpa, length, fd))
            return cls(regions)
        finally:
            for fd in fds:
                os.close(fd)

    @property
    def end(self) -> int:
        """The guest address behind the last region."""
        last = self.table[-1]
        return int(last[REGION_GPA] + last[REGION_LEN])

    def translate(self, gpa: int, length: int) -> int:
        """Return the window offset of a guest range; ConfigError if it is not wholly inside guest memory."""
        for row in self.table:
            into = gpa - int(row[REGION_GPA])
            if length >= 0 and 0 <= into <= int(row[REGION_LEN]) - length:
                return int(row[REGION_OFFSET]) + into
        raise ConfigError(f"guest range {gpa:#x}+{length:#x} is not inside guest memory")

    def read(self, gpa: int, length: int) -> bytes:
        """Return a copy of guest memory."""
        at = self.translate(gpa, length)
        return self.mem[at : at + length].tobytes()

    def write(self, gpa: int, data: bytes) -> None:
        """Write into guest memory as the guest itself would: the device's dirty log does not see it."""
        at = self.translate(gpa, len(data))
        self.mem[at : at + len(data)] = np.frombuffer(data, np.uint8)

    def close(self) -> None:
        """Unmap everything. No kernel may run on it any more, and `mem` may not be touched."""
        if not self._foreign:
            for region in self.regions:
                os.close(region.fd)
        self.regions = []
        if self._protected:
            from vnetdp_kernels import sigbus

            sigbus.unprotect(self._protected)
            self._protected = 0
        if self._window:
            _libc.munmap(self._window, self._window_len)
            self._window = 0
            self.mem = np.zeros(0, np.uint8)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def create_memfd(name: str, length: int) -> int:
    """Return a memfd of *length* bytes that nobody can shrink: a mapping of it never faults."""
    with giving("shared memory"):
        fd = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.ftruncate(fd, length)
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK)
    except (OSError, OverflowError) as e:
        os.close(fd)
        if isinstance(e, OverflowError) or e.errno in (errno.EINVAL, errno.EFBIG, errno.ENOSPC, errno.ENOMEM):
            raise ConfigError(f"cannot make {length} bytes of shared memory: {fault(e) or e}") from e
        raise
    return fd


class SharedBlock:
    """A memfd mapped here, and in every process that is handed its descriptor; carved into arrays in order.

    The mapping lives as long as an array of it does; `close` gives up the descriptor only.
    """

    def __init__(self, length: int, fd: int | None = None, offset: int = 0) -> None:
        """*offset*: where in the file of *fd* the block begins, a multiple of 4096."""
        self.length = -(-length // PAGE_SIZE) * PAGE_SIZE
        self.fd = create_memfd("vnetdp-block", self.length) if fd is None else fd
        try:
            if os.fstat(self.fd).st_size < offset + length:
                raise ConfigError(f"a shared block of {length} bytes at {offset} ends behind its file")
            # Not the mmap module: it would keep a second descriptor until the last array is gone.
            at = _map(None, self.length, mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_SHARED, self.fd, offset)
        except (OSError, ConfigError):
            if fd is None:
                os.close(self.fd)  # one that was given stays the caller's
            raise
        self._map = (ctypes.c_uint8 * self.length).from_address(at)
        weakref.finalize(self._map, _libc.munmap, at, self.length).atexit = False
        self._at = 0

    def carve(self, dtype: Any, *shape: int) -> npt.NDArray[Any]:
        """Return the next array, at a 64-byte boundary. Every process carves the same arrays in the same order."""
        count = int(np.prod(shape))
        flat: npt.NDArray[Any] = np.frombuffer(memoryview(self._map), dtype, count, self._at)
        array = flat.reshape(shape)
        self._at += -(-array.nbytes // 64) * 64
        return array

    def close(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


class DirtyLog:
    """One bit a 4 KiB page of guest addresses from 0 on, set atomically by kernels (`VHOST_SET_LOG_BASE`).

    log uint8[n], n a multiple of 8 if it is ours to take from: bit p % 8 of byte p // 8 stands for page p.
    """

    def __init__(self, end: int, fd: int | None = None) -> None:
        """*end*: the first guest address that needs no bit (`GuestMemory.end`)."""
        pages = -(-end // PAGE_SIZE)
        self._attach(SharedBlock(-(-pages // 64) * 8, fd), -(-pages // 64) * 8)

    @classmethod
    def attach(cls, fd: int, length: int, offset: int) -> DirtyLog:
        """Use a log that another process made: *length* bytes at *offset* of *fd*, which becomes ours.

        ConfigError, and *fd* is still the caller's, if the file is not that long, or nothing that can be mapped.
        """
        from vnetdp_kernels import sigbus

        if length <= 0 or offset < 0 or offset % PAGE_SIZE:
            raise ConfigError(f"a log of {length} bytes at offset {offset} cannot be mapped")
        if offset + length > os.fstat(fd).st_size:
            raise ConfigError(f"a log of {length} bytes at offset {offset} ends behind its file")
        self = cls.__new__(cls)
        try:
            self._attach(SharedBlock(length, fd, offset), length)
        except (OSError, ValueError) as e:
            raise ConfigError(f"a log of {length} bytes cannot be mapped: {e}") from e
        self._protected = self.log.ctypes.data
        sigbus.protect(self._protected, self._block.length)
        return self

    def _attach(self, block: SharedBlock, length: int) -> None:
        self.length = length
        self._block = block
        self._protected = 0
        self.log: Bytes = block.carve(np.uint8, length)

    @property
    def fd(self) -> int:
        return self._block.fd

    def pages(self) -> list[int]:
        """Return the numbers of all dirty pages, and leave them dirty."""
        bits = np.unpackbits(self.log, bitorder="little")
        return [int(p) for p in np.flatnonzero(bits)]

    def take(self) -> list[int]:
        """Return the numbers of all dirty pages, each swapped to clean atomically."""
        from vnetdp_kernels.guest import take_dirty

        found = np.zeros(4096, np.int64)
        pages: list[int] = []
        at = 0
        while at < self.length:
            n, at = take_dirty(self.log, at, found)
            pages.extend(int(p) for p in found[:n])
        return pages

    def close(self) -> None:
        if self._protected:
            from vnetdp_kernels import sigbus

            sigbus.unprotect(self._protected)
            self._protected = 0
        self._block.close()


def page_of(gpa: int) -> int:
    """Return the number of the dirty log's page that holds a guest address."""
    return gpa >> PAGE_SHIFT
