"""System calls from compiled code: eventfds, TAP queues, sockets, poll and the clock. For a peer's descriptors: see `peer`.

Each returns the result of the call, or -errno. The Python bodies go through ctypes, with the same arguments.
Symbols are resolved by name when a kernel is loaded, so kernels that call them can be cached.
"""

from __future__ import annotations

import ctypes
from typing import Any

from numba import types

from .atomic import Words, address, compiled_as, peek_i32
from .jit import inlined

_libc = ctypes.CDLL(None, use_errno=True)
_libc.read.argtypes = _libc.write.argtypes = (ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t)
_libc.writev.argtypes = (ctypes.c_int, ctypes.c_void_p, ctypes.c_int)
_libc.poll.argtypes = (ctypes.c_void_p, ctypes.c_ulong, ctypes.c_int)
_libc.clock_gettime.argtypes = (ctypes.c_int, ctypes.c_void_p)
_libc.preadv2.argtypes = _libc.pwritev2.argtypes = (
    ctypes.c_int,
    ctypes.c_void_p,
    ctypes.c_int,
    ctypes.c_int64,
    ctypes.c_int,
)
_libc.recv.argtypes = _libc.send.argtypes = (ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
_libc.sendmsg.argtypes = (ctypes.c_int, ctypes.c_void_p, ctypes.c_int)
_libc.shutdown.argtypes = (ctypes.c_int, ctypes.c_int)
_libc.syscall.argtypes = (ctypes.c_long,) + (ctypes.c_long,) * 5
_libc.read.restype = _libc.write.restype = _libc.writev.restype = ctypes.c_ssize_t
_libc.preadv2.restype = _libc.pwritev2.restype = ctypes.c_ssize_t
_libc.recv.restype = _libc.send.restype = _libc.sendmsg.restype = ctypes.c_ssize_t
_libc.syscall.restype = ctypes.c_long

_errno_location = types.ExternalFunction("__errno_location", types.uintp())
_read = types.ExternalFunction("read", types.intp(types.int32, types.uintp, types.uintp))
_write = types.ExternalFunction("write", types.intp(types.int32, types.uintp, types.uintp))
_writev = types.ExternalFunction("writev", types.intp(types.int32, types.uintp, types.int32))
_preadv2 = types.ExternalFunction(
    "preadv2", types.intp(types.int32, types.uintp, types.int32, types.int64, types.int32)
)
_pwritev2 = types.ExternalFunction(
    "pwritev2", types.intp(types.int32, types.uintp, types.int32, types.int64, types.int32)
)
_recv = types.ExternalFunction("recv", types.intp(types.int32, types.uintp, types.uintp, types.int32))
_send = types.ExternalFunction("send", types.intp(types.int32, types.uintp, types.uintp, types.int32))
_sendmsg = types.ExternalFunction("sendmsg", types.intp(types.int32, types.uintp, types.int32))
_shutdown = types.ExternalFunction("shutdown", types.int32(types.int32, types.int32))
_syscall = types.ExternalFunction("syscall", types.intp(*[types.intp] * 6))
_poll = types.ExternalFunction("poll", types.int32(types.uintp, types.uintp, types.int32))
_clock_gettime = types.ExternalFunction("clock_gettime", types.int32(types.int32, types.uintp))

EAGAIN = 11
EINTR = 4
EIO = 5
EOPNOTSUPP = 95
_RWF_NOWAIT = 8
_MSG_TRUNC = 0x20
_MSG_DONTWAIT = 0x40
_MSG_NOSIGNAL = 0x4000
_SHUT_RDWR = 2
POLLIN = 1
POLLOUT = 4
POLLGONE = 8 | 16 | 32  # POLLERR, POLLHUP, POLLNVAL
CLOCK_MONOTONIC = 1


def read(fd: int, buffer: Any, offset: int, length: int) -> int:
    """Read up to *length* bytes into *buffer* at *offset* (an index, as in `atomic`)."""
    n = int(_libc.read(fd, address(buffer, offset), length))
    return n if n >= 0 else -ctypes.get_errno()


@compiled_as(read)
def _read_overload(fd: Any, buffer: Any, offset: Any, length: Any) -> Any:
    def compiled(fd: int, buffer: Any, offset: int, length: int) -> int:
        n = _read(fd, address(buffer, offset), length)
        if n < 0:
            return -peek_i32(_errno_location())
        return n

    return compiled


def write(fd: int, buffer: Any, offset: int, length: int) -> int:
    """Write *length* bytes of *buffer* from *offset*."""
    n = int(_libc.write(fd, address(buffer, offset), length))
    return n if n >= 0 else -ctypes.get_errno()


@compiled_as(write)
def _write_overload(fd: Any, buffer: Any, offset: Any, length: Any) -> Any:
    def compiled(fd: int, buffer: Any, offset: int, length: int) -> int:
        n = _write(fd, address(buffer, offset), length)
        if n < 0:
            return -peek_i32(_errno_location())
        return n

    return compiled


def writev(fd: int, iovecs: Words, count: int) -> int:
    """Gather-write *count* struct iovec, kept as pairs (address, length) in *iovecs*."""
    n = int(_libc.writev(fd, address(iovecs, 0), count))
    return n if n >= 0 else -ctypes.get_errno()


@compiled_as(writev)
def _writev_overload(fd: Any, iovecs: Any, count: Any) -> Any:
    def compiled(fd: int, iovecs: Words, count: int) -> int:
        n = _writev(fd, address(iovecs, 0), count)
        if n < 0:
            return -peek_i32(_errno_location())
        return n

    return compiled


def readv_nowait(fd: int, iovecs: Words, at: int) -> int:
    """Read into the one struct iovec at *iovecs*[at], -EAGAIN if that would wait, whatever the descriptor's flags.

    -EOPNOTSUPP if this kernel can't tell of such a descriptor.
    """
    n = int(_libc.preadv2(fd, address(iovecs, at), 1, -1, _RWF_NOWAIT))
    return n if n >= 0 else -ctypes.get_errno()


@compiled_as(readv_nowait)
def _readv_nowait_overload(fd: Any, iovecs: Any, at: Any) -> Any:
    def compiled(fd: int, iovecs: Words, at: int) -> int:
        n = _preadv2(fd, address(iovecs, at), 1, -1, _RWF_NOWAIT)
        if n < 0:
            return -peek_i32(_errno_location())
        return n

    return compiled


def writev_nowait(fd: int, iovecs: Words, at: int) -> int:
    """Write the bytes of the one struct iovec at *iovecs*[at]; otherwise as `readv_nowait`."""
    n = int(_libc.pwritev2(fd, address(iovecs, at), 1, -1, _RWF_NOWAIT))
    return n if n >= 0 else -ctypes.get_errno()


@compiled_as(writev_nowait)
def _writev_nowait_overload(fd: Any, iovecs: Any, at: Any) -> Any:
    def compiled(fd: int, iovecs: Words, at: int) -> int:
        n = _pwritev2(fd, address(iovecs, at), 1, -1, _RWF_NOWAIT)
        if n < 0:
            return -peek_i32(_errno_location())
        return n

    return compiled


def recv(fd: int, buffer: Any, offset: int, length: int) -> int:
    """Receive up to *length* bytes from a socket, -EAGAIN if that would wait, whatever the descriptor's flags."""
    n = int(_libc.recv(fd, address(buffer, offset), length, _MSG_DONTWAIT))
    return n if n >= 0 else -ctypes.get_errno()


@compiled_as(recv)
def _recv_overload(fd: Any, buffer: Any, offset: Any, length: Any) -> Any:
    def compiled(fd: int, buffer: Any, offset: int, length: int) -> int:
        n = _recv(fd, address(buffer, offset), length, _MSG_DONTWAIT)
        if n < 0:
            return -peek_i32(_errno_location())
        return n

    return compiled


def recv_datagram(fd: int, buffer: Any, offset: int, length: int) -> int:
    """`recv`, which returns the bytes of the whole datagram, even if those beyond *length* were cut off."""
    n = int(_libc.recv(fd, address(buffer, offset), length, _MSG_DONTWAIT | _MSG_TRUNC))
    return n if n >= 0 else -ctypes.get_errno()


@compiled_as(recv_datagram)
def _recv_datagram_overload(fd: Any, buffer: Any, offset: Any, length: Any) -> Any:
    def compiled(fd: int, buffer: Any, offset: int, length: int) -> int:
        n = _recv(fd, address(buffer, offset), length, _MSG_DONTWAIT | _MSG_TRUNC)
        if n < 0:
            return -peek_i32(_errno_location())
        return n

    return compiled


def send(fd: int, buffer: Any, offset: int, length: int) -> int:
    """Send up to *length* bytes to a socket, -EAGAIN if that would wait; without a SIGPIPE."""
    n = int(_libc.send(fd, address(buffer, offset), length, _MSG_DONTWAIT | _MSG_NOSIGNAL))
    return n if n >= 0 else -ctypes.get_errno()


@compiled_as(send)
def _send_overload(fd: Any, buffer: Any, offset: Any, length: Any) -> Any:
    def compiled(fd: int, buffer: Any, offset: int, length: int) -> int:
        n = _send(fd, address(buffer, offset), length, _MSG_DONTWAIT | _MSG_NOSIGNAL)
        if n < 0:
            return -peek_i32(_errno_location())
        return n

    return compiled


def sendmsg(fd: int, msghdr: Words) -> int:
    """Send the message of the struct msghdr at the beginning of *msghdr*; otherwise as `send`."""
    n = int(_libc.sendmsg(fd, address(msghdr, 0), _MSG_DONTWAIT | _MSG_NOSIGNAL))
    return n if n >= 0 else -ctypes.get_errno()


@compiled_as(sendmsg)
def _sendmsg_overload(fd: Any, msghdr: Any) -> Any:
    def compiled(fd: int, msghdr: Words) -> int:
        n = _sendmsg(fd, address(msghdr, 0), _MSG_DONTWAIT | _MSG_NOSIGNAL)
        if n < 0:
            return -peek_i32(_errno_location())
        return n

    return compiled


def shutdown(fd: int) -> int:
    """End a connection both ways: its peer, and each poll() on it, see that."""
    n = int(_libc.shutdown(fd, _SHUT_RDWR))
    return n if n >= 0 else -ctypes.get_errno()


@compiled_as(shutdown)
def _shutdown_overload(fd: Any) -> Any:
    def compiled(fd: int) -> int:
        n = _shutdown(fd, _SHUT_RDWR)
        if n < 0:
            return -peek_i32(_errno_location())
        return int(n)

    return compiled


def syscall(number: int, a: int, b: int, c: int, d: int, e: int) -> int:
    """Make a system call that the C library has no function for."""
    n = int(_libc.syscall(number, a, b, c, d, e))
    return n if n >= 0 else -ctypes.get_errno()


@compiled_as(syscall)
def _syscall_overload(number: Any, a: Any, b: Any, c: Any, d: Any, e: Any) -> Any:
    def compiled(number: int, a: int, b: int, c: int, d: int, e: int) -> int:
        n = _syscall(number, a, b, c, d, e)
        if n < 0:
            return -peek_i32(_errno_location())
        return n

    return compiled


def poll(pollfds: Words, count: int, timeout_ms: int) -> int:
    """Wait for *count* struct pollfd, each a word: fd | events << 32 | revents << 48."""
    n = int(_libc.poll(address(pollfds, 0), count, timeout_ms))
    return n if n >= 0 else -ctypes.get_errno()


@compiled_as(poll)
def _poll_overload(pollfds: Any, count: Any, timeout_ms: Any) -> Any:
    def compiled(pollfds: Words, count: int, timeout_ms: int) -> int:
        n = _poll(address(pollfds, 0), count, timeout_ms)
        if n < 0:
            return -peek_i32(_errno_location())
        return int(n)

    return compiled


def clock_ns(scratch: Words) -> int:
    """CLOCK_MONOTONIC in ns; *scratch* has room for a struct timespec (two words)."""
    _libc.clock_gettime(CLOCK_MONOTONIC, address(scratch, 0))
    return int(scratch[0]) * 1_000_000_000 + int(scratch[1])


@compiled_as(clock_ns)
def _clock_overload(scratch: Any) -> Any:
    def compiled(scratch: Words) -> int:
        _clock_gettime(CLOCK_MONOTONIC, address(scratch, 0))
        return scratch[0] * 1_000_000_000 + scratch[1]

    return compiled


@inlined
def time_ns(told: int, scratch: Words) -> int:
    """Return the time of a clock that was handed in, which is *told* less 1; if *told* is 0, CLOCK_MONOTONIC. Both in ns."""
    return told - 1 if told else clock_ns(scratch)


def signal(fd: int, one: Words) -> int:
    """Add 1 to an eventfd; *one* holds the word 1 in its first element. A full counter (EAGAIN) is signal enough."""
    return write(fd, one, 0, 8)


@compiled_as(signal)
def _signal_overload(fd: Any, one: Any) -> Any:
    return lambda fd, one: write(fd, one, 0, 8)
