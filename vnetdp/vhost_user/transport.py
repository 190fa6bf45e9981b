"""The socket: whole messages with their descriptors, and no descriptor ever left behind.

Every descriptor that arrives is closed here, unless the message that carried it was returned to the caller, whose
it then is.
"""

from __future__ import annotations

import array
import os
import socket
import time
from collections.abc import Iterable

from ..errors import RemoteProtocolError
from .message import HEADER, MAX_FDS, Header

_MSG_CMSG_CLOEXEC = 0x40000000
_ROOM_FOR = 64  # descriptors taken off the socket at once, so that too many are seen, and closed


def close_fds(fds: Iterable[int]) -> None:
    """Close descriptors that nobody claimed."""
    for fd in fds:
        os.close(fd)


class Transport:
    """A connected Unix stream socket, owned."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self._deadline: float | None = None

    def fileno(self) -> int:
        return self.sock.fileno()

    def receive(self) -> tuple[Header, bytes, tuple[int, ...]] | None:
        """Return the next message whole, with its descriptors; None if the peer has closed.

        RemoteProtocolError for what is no message; OSError if the connection broke. A peer may take as long as the
        socket's timeout for any part of a message, and no longer for all of them.
        """
        fds: list[int] = []
        patience = self.sock.gettimeout()
        self._deadline = None if patience is None else time.monotonic() + patience
        try:
            head = self._read(HEADER.size, fds)
            if head is None:
                return None
            header = Header.decode(head)
            data = self._read(header.size, fds) if header.size else b""
            if data is None:
                raise RemoteProtocolError(f"request {header.request}: the connection ended in its middle")
        except BaseException:
            close_fds(fds)
            raise
        return header, data, tuple(fds)

    def _read(self, length: int, fds: list[int]) -> bytes | None:
        """Read exactly *length* bytes; None if the peer closed before the first."""
        parts = b""
        while len(parts) < length:
            room = socket.CMSG_SPACE(_ROOM_FOR * 4)
            data, ancillary, flags, _ = self.sock.recvmsg(length - len(parts), room, _MSG_CMSG_CLOEXEC)
            for level, kind, content in ancillary:
                if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                    fds.extend(array.array("i", content[: len(content) // 4 * 4]))
            if flags & socket.MSG_CTRUNC:
                raise RemoteProtocolError("more descriptors than a message may have")
            if len(fds) > MAX_FDS:  # now, not when the message is whole: a slow one would hold ever more of them
                raise RemoteProtocolError(f"a message with {len(fds)} descriptors; at most {MAX_FDS} are taken")
            if not data:
                if parts:
                    raise RemoteProtocolError("the connection ended in the middle of a message")
                return None
            parts += data
            if len(parts) < length and self._deadline is not None and time.monotonic() > self._deadline:
                raise TimeoutError("a message takes too long to come")
        return parts

    def send(self, data: bytes, fds: Iterable[int] = ()) -> None:
        """Send a message; the descriptors stay the caller's."""
        sent = socket.send_fds(self.sock, [data], list(fds))
        if sent < len(data):
            self.sock.sendall(data[sent:])

    def close(self) -> None:
        self.sock.close()
