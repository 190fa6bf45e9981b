"""FdEndpoint: a descriptor that is open already, such as one that a supervisor or a test left to this process."""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import socket
import stat
import struct
from collections.abc import Sequence
from contextlib import suppress
from typing import Final

from vnetdp_kernels import rows as r

from ..errors import EndpointError
from ..system import limits
from .base import Endpoint
from .sock import SocketBase
from .tap import TapEndpoint

_log = logging.getLogger("vnetdp.endpoints")

_TUNGETIFF: Final = 0x800454D2
_IFREQ: Final = struct.Struct("16sH22x")
_IFF_TAP: Final = 2
_IFF_NO_PI: Final = 0x1000
_IFF_VNET_HDR: Final = 0x4000
_WANTED: Final = _IFF_TAP | _IFF_NO_PI | _IFF_VNET_HDR


class FdEndpoint(Endpoint):
    """An open descriptor, such as one that a supervisor or a test left to this process: a socket or a TAP.

    `fd`: its number. A copy of it is used: the number stays the caller's, to close.

    - A stream socket carries frames as `StreamEndpoint` does, a datagram socket as `DgramEndpoint` does; either has to be
      connected. Once the peer is gone, so is the endpoint (`gone`).
    - A TAP was opened with IFF_TAP, IFF_NO_PI and IFF_VNET_HDR. It gets the length of virtio_net_hdr, and on `close` that
      which it had, back.

    EndpointError if the descriptor is none of these.
    """

    def __new__(cls, fd: int, queues: int = 1) -> FdEndpoint:  # noqa: PYI034, ARG004 - a subclass, which takes both
        """Return an instance of the class for the kind of descriptor. @private"""
        return super().__new__(cls if cls is not FdEndpoint else _kind_of(fd))


class _FdSocket(FdEndpoint, SocketBase):
    def __init__(self, fd: int, queues: int = 1) -> None:
        self.kind = r.KIND_STREAM if _socket_type(fd) == socket.SOCK_STREAM else r.KIND_DGRAM
        self._failures: list[str] = []
        SocketBase.__init__(self, f"fd:{fd}", queues)
        try:
            self.fds[0] = limits.dup(fd)
            with socket.socket(fileno=limits.dup(fd)) as sock:
                sock.getpeername()
        except BaseException as e:
            self.close()
            if isinstance(e, OSError) and e.errno == errno.ENOTCONN:
                raise EndpointError(f"{self.name}: the socket has no peer: connect it first") from e
            raise
        self._use()

    @property
    def gone(self) -> bool:
        if not self.connected and not self._failures:
            self._failures.append(f"{self.name}: {self._why_lost()}")
            _log.error("%s", self._failures[0])
        return bool(self._failures)

    @property
    def failures(self) -> Sequence[str]:
        return self._failures if self.gone else ()

    def send_to_wire(self, frame: bytes) -> None:
        if self.kind == r.KIND_DGRAM and self.connected:
            with suppress(OSError), socket.socket(fileno=os.dup(int(self.fds[0]))) as sock:
                sock.send(frame, socket.MSG_DONTWAIT)


class _FdTap(FdEndpoint, TapEndpoint):
    def __init__(self, fd: int, queues: int = 1) -> None:
        if queues != 1:
            raise EndpointError(f"fd:{fd}: {queues} queues: a descriptor is one: take one queue pair")
        Endpoint.__init__(self)
        self._begin(f"fd:{fd}")
        try:
            self._devices.append(_Copy(fd))
            self.fds[0] = self._devices[0].fileno()
            os.set_blocking(int(self.fds[0]), False)
            self._set_up()
        except BaseException:
            self.close()
            raise


class _Copy:
    """A copy of a TAP's descriptor."""

    def __init__(self, fd: int) -> None:
        self._fd = limits.dup(fd)

    def fileno(self) -> int:
        return self._fd

    def close(self) -> None:
        os.close(self._fd)


def _socket_type(fd: int) -> int:
    with socket.socket(fileno=limits.dup(fd)) as sock:
        return sock.getsockopt(socket.SOL_SOCKET, socket.SO_TYPE)


def _kind_of(fd: int) -> type[FdEndpoint]:
    """Return the class for a descriptor; EndpointError if there is none."""
    try:
        mode = os.fstat(fd).st_mode
    except (OSError, OverflowError) as e:
        raise EndpointError(f"fd:{fd}: it is not open: have the program that starts this one leave it open") from e
    if stat.S_ISSOCK(mode):
        if (kind := _socket_type(fd)) in (socket.SOCK_STREAM, socket.SOCK_DGRAM):
            return _FdSocket
        raise EndpointError(f"fd:{fd}: it is a socket of type {kind}: take a stream (1) or datagram (2) socket")
    if stat.S_ISCHR(mode):
        with suppress(OSError):
            flags = _IFREQ.unpack(fcntl.ioctl(fd, _TUNGETIFF, bytes(_IFREQ.size)))[1]
            if flags & _WANTED == _WANTED:
                return _FdTap
            raise EndpointError(
                f"fd:{fd}: it is a TUN or TAP with flags {flags:#x}: open it with IFF_TAP, IFF_NO_PI and IFF_VNET_HDR"
            )
    raise EndpointError(f"fd:{fd}: it is neither a socket nor a TAP")
