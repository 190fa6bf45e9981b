"""Mappings: address space that is reserved, filled with pages of files or of this process alone, and given up.

A mapping lasts as long as an array over it.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import mmap
import os
import weakref

from vnetdp_kernels import spec

from ..errors import ConfigError
from ..system.limits import fault, giving

_HUGETLBFS_MAGIC = 0x958458F6
_MAP_FIXED = 0x10
_MAP_NORESERVE = 0x4000
_MAP_FAILED = ctypes.c_void_p(-1).value

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


def page_size(fd: int) -> int:
    """Return the size of the pages that a mapping of *fd* is made of: 4096, or the page size of its hugetlbfs."""
    stat = (ctypes.c_long * 16)()  # struct statfs: f_type, f_bsize, ...
    if _libc.fstatfs(fd, stat):
        code = ctypes.get_errno()
        raise OSError(code, f"fstatfs: {os.strerror(code)}")
    return int(stat[1]) if stat[0] == _HUGETLBFS_MAGIC else spec.PAGE_SIZE


def _map(address: int | None, length: int, prot: int, flags: int, fd: int, offset: int) -> int:
    with giving(f"a mapping of {length} bytes"):
        got = _libc.mmap(address, length, prot, flags, fd, offset)
        if got == _MAP_FAILED:
            code = ctypes.get_errno()
            raise OSError(code, os.strerror(code))
    return int(got)


def reserve(length: int, align: int) -> int:
    """Return the address, a multiple of *align*, of *length* bytes without access."""
    size = length + align - spec.PAGE_SIZE
    got = _map(None, size, 0, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE, -1, 0)
    start = spec.align_up(got, align)
    for at, end in ((got, start), (start + length, got + size)):
        if at < end:
            _libc.munmap(at, end - at)
    return start


def own(at: int, length: int, foreign: bool) -> ctypes.Array[ctypes.c_uint8]:
    """Return the bytes of a mapping, which is unmapped when the last array over them is gone.

    foreign: its file may be shrunk by another process, and lost pages read as zeros. ConfigError, and it is unmapped,
    if that can't be had.
    """
    if foreign:
        from vnetdp_kernels.platform import sigbus

        try:
            sigbus.protect(at, length)
        except OSError as e:
            _libc.munmap(at, length)
            raise ConfigError(f"memory of another process can't be mapped safely: {e.strerror or e}") from e
    owned = (ctypes.c_uint8 * length).from_address(at)
    weakref.finalize(owned, _unmap, at, length, foreign).atexit = False
    return owned


def _unmap(at: int, length: int, foreign: bool) -> None:
    if foreign:
        from vnetdp_kernels.platform import sigbus

        sigbus.unprotect(at)
    _libc.munmap(at, length)


def map_file(address: int | None, length: int, fd: int, offset: int) -> int:
    """Map *length* bytes of a file from *offset* on, shared, over *address* or, with None, anywhere; return the address."""
    flags = mmap.MAP_SHARED | (0 if address is None else _MAP_FIXED)
    return _map(address, length, mmap.PROT_READ | mmap.PROT_WRITE, flags, fd, offset)


def map_private(address: int | None, length: int) -> int:
    """Map *length* bytes of zeros, over *address* or, with None, anywhere; return the address.

    They are this process's: a forked child has a copy.
    """
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE | (0 if address is None else _MAP_FIXED)
    return _map(address, length, mmap.PROT_READ | mmap.PROT_WRITE, flags, -1, 0)


def create_memfd(name: str, length: int) -> int:
    """Return a memfd of *length* bytes, sealed against shrinking: a mapping of it never faults."""
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
