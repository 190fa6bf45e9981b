"""Guest memory: memfd regions mapped into one flat window, the dirty log, and blocks shared between processes.

The window is reserved once for all regions; each is mapped into it with MAP_FIXED, and a run of regions that are
adjacent in guest addresses is adjacent in the window. So kernels see one uint8 array and a table with a row for each
run, and a range may cross from one region into the next. Holes stay without access, and no translation leads there.

A mapping lasts as long as an array over it: `close` takes it from the object, and an array that a caller kept stays
usable.
"""

from __future__ import annotations

import ctypes
import itertools
import math
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from vnetdp_kernels import rows as r
from vnetdp_kernels import spec

from ..errors import ConfigError
from ..system.limits import dup
from ..system.owned import Owned
from .mapping import create_memfd, map_file, map_private, own, page_size, reserve

Bytes = npt.NDArray[np.uint8]
Words = npt.NDArray[np.int64]

_HUGE_ALIGN = 1 << 21  # runs keep their guest address modulo this, so that 2 MiB pages can back them
NO_FILE = -1  # in place of a region's descriptor: memory of this process alone
ADDRESS_LIMIT = 1 << 52  # of a guest physical address


@dataclass(frozen=True)
class Region:
    """One region of guest memory: guest addresses from *gpa* up to *gpa* + *length*, backed by a file."""

    gpa: int
    """The guest physical address, a multiple of 4096."""
    length: int
    """Bytes, a multiple of 4096."""
    fd: int
    """The descriptor of a file that can be mapped shared, such as a memfd; -1 in `regions` of private memory."""
    fd_offset: int = 0
    """Where in the file the region begins, in bytes, a multiple of 4096."""

    def check(self) -> None:
        """Raise ConfigError unless the region can be mapped: not empty, aligned, and within address space and file."""
        if self.length <= 0 or self.gpa < 0 or self.gpa + self.length > ADDRESS_LIMIT:
            raise ConfigError(f"memory region {self.gpa:#x}+{self.length:#x} is empty or out of the address space")
        if (self.gpa | self.length | self.fd_offset) & (spec.PAGE_SIZE - 1) or self.fd_offset < 0:
            raise ConfigError(f"memory region {self.gpa:#x}+{self.length:#x} is not aligned to {spec.PAGE_SIZE} bytes")
        size = self.fd_offset + self.length if self.fd == NO_FILE else os.fstat(self.fd).st_size
        if self.fd_offset + self.length > spec.align_up(size, spec.PAGE_SIZE):  # its last page can be mapped whole
            raise ConfigError(
                f"memory region {self.gpa:#x}+{self.length:#x} extends past the end of its {size}-byte file"
            )


@dataclass
class _Run:
    """Regions that are adjacent in guest addresses, and can be in the window: its offset is *residue* modulo *modulus*.

    A page of hugetlbfs is mapped whole: `head` bytes before the first region, and `tail` bytes behind the last.
    """

    regions: list[Region]
    page: int  # of the last region
    head: int
    modulus: int
    residue: int

    @classmethod
    def of(cls, region: Region) -> _Run:
        page = spec.PAGE_SIZE if region.fd == NO_FILE else page_size(region.fd)
        head = region.fd_offset % page
        return cls([region], page, head, page, head)

    @property
    def length(self) -> int:
        return self.end - self.regions[0].gpa

    @property
    def end(self) -> int:
        return self.regions[-1].gpa + self.regions[-1].length

    @property
    def tail(self) -> int:
        last = self.regions[-1]
        return -(last.fd_offset + last.length) % self.page

    def join(self, region: Region) -> bool:
        """Add *region*; False if it is not adjacent, or its pages can't follow those of the run."""
        other = _Run.of(region)
        wanted = (other.residue - self.length) % other.modulus  # of this run's offset
        smaller = min(self.modulus, other.modulus)
        if self.end != region.gpa or self.tail or other.head or (wanted - self.residue) % smaller:
            return False
        if other.modulus > self.modulus:
            self.modulus, self.residue = other.modulus, wanted
        self.regions.append(region)
        self.page = other.page
        return True

    def keep_place(self) -> None:
        """Have it keep its guest address modulo 2 MiB, or its page size, where its pages allow that."""
        modulus = max(self.modulus, _HUGE_ALIGN)
        gpa = self.regions[0].gpa
        if (gpa - self.residue) % self.modulus == 0:
            self.residue = gpa % modulus
        self.modulus = modulus

    def place(self, behind: int) -> int:
        """Return the first window offset at which nothing of it is mapped before *behind*."""
        at = behind + self.head
        return at + (self.residue - at) % self.modulus


def _runs(regions: Sequence[Region]) -> list[_Run]:
    """Return the runs of *regions*, which are sorted; ConfigError if one can't be, or two overlap."""
    for region in regions:
        region.check()
    for before, after in itertools.pairwise(regions):
        if before.gpa + before.length > after.gpa:
            raise ConfigError(
                f"memory regions {before.gpa:#x}+{before.length:#x} and {after.gpa:#x}+{after.length:#x} overlap"
            )
    runs: list[_Run] = []
    for region in regions:
        if not (runs and runs[-1].join(region)):
            runs.append(_Run.of(region))
    for run in runs:
        run.keep_place()
    return runs


class GuestMemory(Owned):
    """Guest memory: *regions* of guest physical addresses, mapped here into one window that kernels work on.

    The kernels' `table` is int64[runs, 3], (guest address, length, window offset) of each run of adjacent regions,
    sorted by guest address.
    """

    def __init__(
        self, regions: Sequence[Region], foreign: bool = False, beside: Region | None = None, private: bool = False
    ) -> None:
        """Map *regions*, in any order. ConfigError if one cannot be mapped, or two overlap; OSError if the kernel refuses.

        - `foreign`: False duplicates the descriptors, and the caller keeps its own. True is for files of another
          process, which may shrink them: pages lost to that read as zeros. There may be hundreds, so they are not
          duplicated; the caller closes them after this.
        - `beside`, `private`: internal.
        """
        if not regions:
            raise ConfigError("guest memory needs at least one region")
        if not private and any(region.fd == NO_FILE for region in regions):
            raise ConfigError("regions of private memory have no descriptor: make the memory without private=True")
        runs = _runs(sorted(regions, key=lambda r: r.gpa))
        self.table: Words = np.zeros((len(runs), r.REGION_SLOTS), np.int64)
        self.regions: list[Region] = []
        self._foreign = foreign
        self._mem: Bytes | None = None
        places: list[tuple[int, Region]] = []
        at = 0
        for row, run in zip(self.table, runs, strict=True):
            gpa, length, start = run.regions[0].gpa, run.length, run.place(at)
            row[r.REGION_GPA], row[r.REGION_LEN], row[r.REGION_OFFSET] = gpa, length, start
            places += [(start + region.gpa - gpa, region) for region in run.regions]
            at = start + length + run.tail
        self.beside_offset = -1
        if beside is not None:
            beside.check()
            extra = _Run.of(beside)
            self.beside_offset = extra.place(at)
            places.append((self.beside_offset, beside))
            at = self.beside_offset + beside.length + extra.tail
            runs.append(extra)
        align = max(run.modulus for run in runs)
        length = spec.align_up(at, align)
        base = reserve(length, align)
        window = own(base, length, foreign)
        try:
            for offset, region in places:
                _map_over(base + offset, region)
                if region is beside:
                    continue
                if not foreign and region.fd != NO_FILE:
                    region = replace(region, fd=dup(region.fd))
                self.regions.append(region)
        except OSError:
            self.close()
            del window  # the error's traceback would keep it mapped
            raise
        self._mem = np.frombuffer(memoryview(window), np.uint8, at)

    @classmethod
    def create(cls, parts: Iterable[tuple[int, int]], private: bool = False) -> GuestMemory:
        """Make guest memory: a new memfd, which cannot shrink, for each (guest address, bytes) of *parts*.

        `private`: True makes memory of this process alone, without descriptors: a forked child has a copy
        (`World.adopt`), and no worker or back end in another process can have it.
        """
        if private:
            return cls([Region(gpa, length, NO_FILE) for gpa, length in parts], private=True)
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
    def mem(self) -> Bytes:
        """The window: uint8[n], indexed by the offsets that `translate` returns. ConfigError once it is closed."""
        if self._mem is None:
            raise ConfigError("the guest memory is closed")
        return self._mem

    @property
    def closed(self) -> bool:
        """True once `close` was called."""
        return self._mem is None

    @property
    def private(self) -> bool:
        """True if it has no descriptors: no other process can have it, and a forked child has a copy."""
        return any(region.fd == NO_FILE for region in self.regions)

    @property
    def end(self) -> int:
        """The first guest address behind the last region."""
        last = self.table[-1]
        return int(last[r.REGION_GPA] + last[r.REGION_LEN])

    def translate(self, gpa: int, length: int) -> int:
        """Return the offset in `mem` of *length* bytes at *gpa*; ConfigError unless all of them are guest memory."""
        if self._mem is None:
            raise ConfigError("the guest memory is closed")
        for row in self.table:
            into = gpa - int(row[r.REGION_GPA])
            if length >= 0 and 0 <= into <= int(row[r.REGION_LEN]) - length:
                return int(row[r.REGION_OFFSET]) + into
        raise ConfigError(f"guest range {gpa:#x}+{length:#x} is not inside guest memory")

    def read(self, gpa: int, length: int) -> bytes:
        """Return a copy of *length* bytes at *gpa*; ConfigError unless all of them are guest memory."""
        at = self.translate(gpa, length)
        return self.mem[at : at + length].tobytes()

    def write(self, gpa: int, data: bytes) -> None:
        """Write *data* at *gpa*, as the guest does: no dirty log gets it. ConfigError unless all of it is guest memory."""
        at = self.translate(gpa, len(data))
        self.mem[at : at + len(data)] = np.frombuffer(data, np.uint8)

    def close(self) -> None:
        """Give up the descriptors and the mapping. Arrays over it stay usable, and keep it mapped as long as they live."""
        regions, self.regions = self.regions, []
        self._mem = None
        if not self._foreign:
            for region in regions:
                if region.fd != NO_FILE:
                    os.close(region.fd)


def _map_over(address: int, region: Region) -> None:
    """Map *region* into the window, whole pages of its file, so that it begins at *address*."""
    if region.fd == NO_FILE:
        map_private(address, region.length)
        return
    page = page_size(region.fd)
    head = region.fd_offset % page
    length = spec.align_up(head + region.length, page)  # the kernel maps whole pages in any case
    map_file(address - head, length, region.fd, region.fd_offset - head)


class SharedBlock(Owned):
    """Memory that processes share: a memfd, mapped here, and carved into arrays in order.

    Arrays stay usable after `close`, and keep the mapping as long as they live.
    """

    on_shared: Callable[[], None] | None = None
    """It is called when a block that was made *later* got its file."""

    def __init__(
        self, length: int, fd: int | None = None, offset: int = 0, foreign: bool = False, later: bool = False
    ) -> None:
        """Map *length* bytes, rounded up to 4096. ConfigError if the file is too short; OSError if the kernel refuses.

        - `fd`: the descriptor of an existing block, which becomes this one's; None makes a new memfd.
        - `offset`: where in that file the block begins, in bytes, a multiple of 4096.
        - `foreign`: True if the file is another process's, which may shrink it: pages lost to that read as zeros.
        - `later`: True makes a new block without a file, this process's alone, until `fd` is asked for.
        """
        self.length = spec.align_up(length, spec.PAGE_SIZE)
        """Bytes, a multiple of 4096."""
        self._at = 0
        self._fd = -1
        self.shared = not later or fd is not None
        """False while the block has no file, and is this process's alone; a forked child has a copy."""
        if self.shared:
            self._map_file(length, fd, offset, foreign)
        else:
            self._map = own(map_private(None, self.length), self.length, False)
        self._end = self._at + self.length

    def _map_file(self, length: int, fd: int | None, offset: int, foreign: bool) -> None:
        self._fd = create_memfd("vnetdp-block", self.length) if fd is None else fd
        try:
            if (size := os.fstat(self._fd).st_size) < offset + length:
                raise ConfigError(
                    f"a shared block of {length} bytes at {offset} extends past the end of its {size}-byte file"
                )
            page = page_size(self._fd)
            self._at = offset % page
            mapped = spec.align_up(self._at + self.length, page)
            # Not the mmap module: it would keep a second descriptor until the last array is gone.
            self._map = own(map_file(None, mapped, self._fd, offset - self._at), mapped, foreign)
        except (OSError, ConfigError):
            if fd is None:
                os.close(self._fd)  # a descriptor that was passed in stays the caller's
            raise

    @property
    def fd(self) -> int:
        """The descriptor, to hand to another process; -1 once the block is closed.

        A block that was made *later* gets its file now, at the same addresses: no kernel may run on it meanwhile.
        MachineError if there are no more descriptors.
        """
        if not self.shared:
            self._share()
        return self._fd

    def _share(self) -> None:
        fd = create_memfd("vnetdp-block", self.length)
        try:
            pages = np.frombuffer(memoryview(self._map), np.uint8).reshape(-1, spec.PAGE_SIZE)
            for page in np.flatnonzero(pages.any(axis=1)).tolist():
                os.pwrite(fd, pages[page].data, page * spec.PAGE_SIZE)
            map_file(ctypes.addressof(self._map), self.length, fd, 0)
        except OSError:
            os.close(fd)
            raise
        self._fd, self.shared = fd, True
        if self.on_shared is not None:
            self.on_shared()

    def carve(self, dtype: Any, *shape: int) -> npt.NDArray[Any]:
        """Return the next array, of *dtype* and *shape*, 64-byte aligned. Processes that share the block carve alike."""
        count = math.prod(shape)
        flat: npt.NDArray[Any] = np.frombuffer(memoryview(self._map)[: self._end], dtype, count, self._at)
        array = flat.reshape(shape)
        self._at += spec.align_up(array.nbytes, 64)
        return array

    def close(self) -> None:
        """Give up the descriptor; arrays stay usable."""
        self.shared = True
        fd, self._fd = self._fd, -1  # first: another thread that closes it, too, finds none
        if fd >= 0:
            os.close(fd)


class DirtyLog(Owned):
    """A dirty log: one bit for each 4096-byte page of guest addresses from 0 on, as VHOST_SET_LOG_BASE has it.

    The device sets the bit of each page that it writes, atomically.
    """

    log: Bytes
    """uint8[n]: bit p % 8 of byte p // 8 stands for page p."""

    def __init__(self, end: int, fd: int | None = None) -> None:
        """Make a log for guest addresses below *end*, such as `GuestMemory.end`.

        `fd`: the descriptor of an existing log, which becomes this one's; None makes a new memfd.
        """
        pages = -(-end // spec.PAGE_SIZE)
        self._attach(SharedBlock(-(-pages // 64) * 8, fd), -(-pages // 64) * 8)

    @classmethod
    def attach(cls, fd: int, length: int, offset: int) -> DirtyLog:
        """Return a log over *length* bytes at *offset* of *fd*, which another process made. *fd* becomes the log's.

        ConfigError, and *fd* stays the caller's, if the file is too short or cannot be mapped.
        """
        if length <= 0 or offset < 0 or offset % spec.PAGE_SIZE:
            raise ConfigError(
                f"a log of {length} bytes at offset {offset} can't be mapped: 1 byte or more, at whole pages, can"
            )
        if offset + length > (size := os.fstat(fd).st_size):
            raise ConfigError(
                f"a log of {length} bytes at offset {offset} extends past the end of its {size}-byte file"
            )
        self = cls.__new__(cls)
        try:
            self._attach(SharedBlock(length, fd, offset, foreign=True), length)
        except (OSError, ValueError) as e:
            raise ConfigError(f"a log of {length} bytes cannot be mapped: {e}") from e
        return self

    def _attach(self, block: SharedBlock, length: int) -> None:
        self.length = length
        self._block = block
        self.log = block.carve(np.uint8, length)

    @property
    def fd(self) -> int:
        """The descriptor, to hand to another process; -1 once the log is closed."""
        return self._block.fd

    def pages(self) -> list[int]:
        """Return the numbers (guest address // 4096) of all dirty pages, and leave them dirty."""
        bits = np.unpackbits(self.log, bitorder="little")
        return [int(p) for p in np.flatnonzero(bits)]

    def take(self) -> list[int]:
        """Return the numbers (guest address // 4096) of all dirty pages, and clear them atomically."""
        from vnetdp_kernels.virtq.memory import take_dirty

        self.check_maker()
        found = np.zeros(4096, np.int64)
        pages: list[int] = []
        at = 0
        while at < self.length:
            n, at = take_dirty(self.log, at, found)
            pages.extend(int(p) for p in found[:n])
        return pages

    def close(self) -> None:
        """Give up the descriptor; `log` stays usable."""
        self._block.close()


def page_of(gpa: int) -> int:
    """Return the number of the dirty log's page that holds a guest address."""
    return gpa >> spec.PAGE_SHIFT
