"""The socket: whole messages with their descriptors, and no descriptor ever left behind.

Every descriptor that arrives is closed here, unless the message that carried it was returned to the caller, which
then owns it.
"""

from __future__ import annotations

import array
import os
import socket
import time
from collections.abc import Iterable
from contextlib import suppress

from ..errors import RemoteProtocolError
from ..system.owned import Owned
from .message import HEADER, MAX_FDS, Header

MSG_CMSG_CLOEXEC = 0x40000000
_ROOM_FOR = 64  # descriptors taken off the socket at once, so that too many are seen, and closed


def close_fds(fds: Iterable[int]) -> None:
    """Close descriptors that no handler took. A socket may be set to linger, and would hold us up for that time."""
    for fd in fds:
        try:
            sock = socket.socket(fileno=fd)
        except OSError:  # no socket
            os.close(fd)
            continue
        with sock, suppress(OSError):
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, bytes(8))


def fds_in(ancillary: Iterable[tuple[int, int, bytes]]) -> list[int]:
    """Return the descriptors that came with a message (`socket.recvmsg`)."""
    fds = array.array("i")
    for level, kind, content in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            fds.frombytes(content[: len(content) // fds.itemsize * fds.itemsize])
    return fds.tolist()


class Transport(Owned):
    """A connected Unix stream socket, owned."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self._deadline: float | None = None
        self.close_on_fork()

    def fileno(self) -> int:
        return self.sock.fileno()

    def receive(self) -> tuple[Header, bytes, tuple[int, ...]] | None:
        """Return the next message whole, with its descriptors; None if the peer has closed.

        RemoteProtocolError if it is no message; OSError if the connection broke. A peer may take as long as the
        socket's timeout for any part of a message, and no longer for all of them.
        """
        fds: list[int] = []
        patience = self.sock.gettimeout()
        self._deadline = None
        try:
            head = self._read(HEADER.size, fds)
            if head is None:
                return None
            header = Header.decode(head)
            data = self._read(header.size, fds) if header.size else b""
            if data is None:
                raise RemoteProtocolError(f"request {header.request}: the connection ended inside the message")
        except BaseException:
            close_fds(fds)
            raise
        finally:
            self.sock.settimeout(patience)
        return header, data, tuple(fds)

    def _read(self, length: int, fds: list[int]) -> bytes | None:
        """Read exactly *length* bytes; None if the peer closed before the first."""
        parts = b""
        while len(parts) < length:
            room = socket.CMSG_SPACE(_ROOM_FOR * 4)
            data, ancillary, flags, _ = self.sock.recvmsg(length - len(parts), room, MSG_CMSG_CLOEXEC)
            fds.extend(fds_in(ancillary))
            if flags & socket.MSG_CTRUNC:
                raise RemoteProtocolError(f"more descriptors than the {MAX_FDS} that a message may have")
            if len(fds) > MAX_FDS:  # now, not when the message is whole: a slow one would hold ever more of them
                raise RemoteProtocolError(f"a message with {len(fds)} descriptors; at most {MAX_FDS} are taken")
            if not data:
                if parts:
                    raise RemoteProtocolError("the connection ended inside a message")
                return None
            parts += data
            self._hurry()
        return parts

    def _hurry(self) -> None:
        """Limit the next read of a message that has begun to the time it has left; TimeoutError if it has none."""
        patience = self.sock.gettimeout()
        if patience is None:
            return
        self._deadline = self._deadline or time.monotonic() + patience
        left = self._deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError("a message did not come whole in time")
        self.sock.settimeout(left)

    def send(self, data: bytes, fds: Iterable[int] = ()) -> None:
        """Send a message; the descriptors stay the caller's."""
        sent = socket.send_fds(self.sock, [data], list(fds))
        if sent < len(data):
            self.sock.sendall(data[sent:])

    def close(self) -> None:
        self.sock.close()

    def leave_to_parent(self) -> None:
        """Leave the connection to the parent: the peer is to see it if the parent closes it, or dies."""
        self.sock.close()
