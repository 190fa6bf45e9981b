"""What the tests of sockets share: the program at the other end of a stream, by hand."""

from __future__ import annotations

import socket
from contextlib import ExitStack
from pathlib import Path
from typing import Self

from tests.support.by_hand import PATIENCE, wait_for


def framed(*frames: bytes) -> bytes:
    """Return frames as a stream has them: each behind its length, 4 bytes, big endian."""
    return b"".join(len(frame).to_bytes(4, "big") + frame for frame in frames)


class Peer:
    """One connection of that program."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        sock.settimeout(PATIENCE)

    @classmethod
    def connect(cls, path: Path) -> Self:
        """Connect to *path*, once something listens there."""
        sock = socket.socket(socket.AF_UNIX)

        def connected() -> bool:
            try:
                sock.connect(str(path))
            except (FileNotFoundError, ConnectionRefusedError):
                return False
            return True

        with ExitStack() as made:
            made.enter_context(sock)
            wait_for(connected, f"something listens on {path}")
            made.pop_all()
        return cls(sock)

    def send(self, *frames: bytes) -> None:
        self.sock.sendall(framed(*frames))

    def receive(self, n: int = 1) -> list[bytes]:
        """Return the next *n* frames."""
        return [self._read(int.from_bytes(self._read(4), "big")) for _ in range(n)]

    def _read(self, length: int) -> bytes:
        data = b""
        while len(data) < length:
            more = self.sock.recv(length - len(data))
            assert more, "the connection ended"
            data += more
        return data

    def ended(self) -> bool:
        """Return whether the other end closed the connection, once it has sent something or closed it."""
        try:
            return self.sock.recv(1) == b""
        except ConnectionResetError:
            return True

    def close(self) -> None:
        self.sock.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


class Listening:
    """That program, listening on *path* for one connection after another."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._sock = socket.socket(socket.AF_UNIX)
        self._sock.bind(str(path))
        self._sock.listen()
        self._sock.settimeout(PATIENCE)

    def accept(self) -> Peer:
        return Peer(self._sock.accept()[0])

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self._sock.close()
        self._path.unlink()
