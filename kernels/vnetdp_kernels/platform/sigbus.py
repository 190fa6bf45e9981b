"""Surviving a peer that shrinks a file which is mapped here: SIGBUS gives the lost page zeros, in windows that ask for it.

The handler is compiled code, since the thread it interrupts may be in a kernel. It finds the windows in a table at a fixed
address (a compiled function can be cached only if it holds no address of this process's own). A SIGBUS outside of all
windows ends the process, as ever.
"""

from __future__ import annotations

import ctypes
import errno
import os
from typing import Final

import numpy as np
import numpy.typing as npt
from numba import types

from .atomic import peek_i64, poke_i64
from .interrupt import SA_ONSTACK, SigAction
from .jit import callback

_TABLE: Final = 0x5EED_0000_0000
_TABLE_LEN: Final = 1 << 16
_WINDOWS: Final = 1024
_COUNT_AT: Final = _TABLE  # faults survived
_WINDOWS_AT: Final = _TABLE + 64  # pairs (address, end); 0 = free

_SIGBUS: Final = 7
_SA_SIGINFO: Final = 4
_SI_ADDR_AT: Final = 16  # in siginfo_t, on every 64-bit Linux
_PROT_RW: Final = 3
_MAP_PRIVATE_ANONYMOUS_FIXED: Final = 0x02 | 0x20 | 0x10 | 0x4000  # and MAP_NORESERVE
_MAP_FIXED_NOREPLACE: Final = 0x10_0000
_MAP_FAILED: Final = ctypes.c_void_p(-1).value
_PAGE_SHIFTS: Final = (12, 16, 21, 25, 29, 30)  # of all that hugetlbfs has on x86-64 and arm64, up to 1 GiB

_mmap = types.ExternalFunction(
    "mmap", types.intp(types.uintp, types.uintp, types.int32, types.int32, types.int32, types.intp)
)
_signal = types.ExternalFunction("signal", types.uintp(types.int32, types.uintp))


@callback(types.void(types.int32, types.uintp, types.uintp))
def _on_sigbus(number: int, info: int, context: int) -> None:  # noqa: ARG001
    address = peek_i64(info + _SI_ADDR_AT)
    for i in range(_WINDOWS):
        start = peek_i64(_WINDOWS_AT + 16 * i)
        end = peek_i64(_WINDOWS_AT + 16 * i + 8)
        if start != 0 and start <= address < end:
            for shift in _PAGE_SHIFTS:
                # A page of hugetlbfs can't be replaced in part. Nothing outside of the window is ever replaced.
                page = address >> shift << shift
                if page < start or page + (1 << shift) > end:
                    break
                if _mmap(page, 1 << shift, _PROT_RW, _MAP_PRIVATE_ANONYMOUS_FIXED, -1, 0) != -1:
                    poke_i64(_COUNT_AT, peek_i64(_COUNT_AT) + 1)
                    return
    _signal(_SIGBUS, 0)


_table: npt.NDArray[np.int64] | None = None
_free = list(
    range(8, 8 + 2 * _WINDOWS, 2)
)  # a list's pop and append need no lock, which a forked child might find taken
_places: dict[int, int] = {}  # of the windows in the table, by address


def _install() -> npt.NDArray[np.int64]:
    """Map the table and install the handler, once a process; return the table's words."""
    global _table
    if _table is None:
        libc = ctypes.CDLL(None, use_errno=True)
        libc.mmap.restype = ctypes.c_void_p
        libc.mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, *([ctypes.c_int] * 3), ctypes.c_long)
        flags = 0x02 | 0x20 | _MAP_FIXED_NOREPLACE
        got = libc.mmap(_TABLE, _TABLE_LEN, _PROT_RW, flags, -1, 0)
        if got != _TABLE:
            code = ctypes.get_errno()
            if got != _MAP_FAILED:  # a kernel before 4.17 takes the address for a wish
                libc.munmap(ctypes.c_void_p(got), ctypes.c_size_t(_TABLE_LEN))
                code = errno.EEXIST
            reason = "the address is taken" if code == errno.EEXIST else os.strerror(code)
            raise OSError(code, f"{_TABLE_LEN} bytes at the fixed address {_TABLE:#x} can't be had: {reason}")
        _table = np.ctypeslib.as_array((ctypes.c_int64 * (_TABLE_LEN // 8)).from_address(_TABLE))
        action = SigAction(handler=_on_sigbus.address, flags=_SA_SIGINFO | SA_ONSTACK)
        if libc.sigaction(_SIGBUS, ctypes.byref(action), None):
            raise OSError(ctypes.get_errno(), "sigaction")
    return _table


def protect(address: int, length: int) -> None:
    """Let the pages of [address, address + length) read as zeros, private to us, once their file has lost them."""
    table = _install()
    try:
        i = _free.pop()
    except IndexError:
        raise OSError(errno.ENOSPC, f"more than {_WINDOWS} windows of other processes' memory") from None
    table[i + 1] = address + length
    table[i] = address
    _places[address] = i


def unprotect(address: int) -> None:
    """Forget the window that begins at *address*; nothing if there is none. Comes before it is unmapped."""
    i = _places.pop(address, None)
    if i is not None:
        _install()[i] = 0
        _free.append(i)


def survived() -> int:
    """Return how many faults were survived since the process began."""
    return int(_table[0]) if _table is not None else 0
