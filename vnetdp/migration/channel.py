"""The sections of each policy, and a socket that carries them."""

from __future__ import annotations

import socket
import time
from collections.abc import Mapping
from typing import Final

from ..system.owned import Owned
from ..system.poll import readable
from .stream import Phase, Section, SectionType, StreamError, decode, encode

_DRAIN_S = 5.0
PATIENCE_S = 30.0  # without a byte from the other side; and for all that comes once the source's guest stands still

# Priorities as QEMU's: the section with the lowest is loaded last.
PRIORITY_LOW, PRIORITY_DEFAULT = 0, 1

SETUP = SectionType("setup", Phase.SETUP, longest=256)
RAM = SectionType("ram", Phase.ITERATE)
EARLY = SectionType("virtio-net-early", Phase.EARLY, longest=1 << 18)
CHECK = SectionType("check", Phase.FINAL, priority=PRIORITY_DEFAULT + 1, longest=1 << 12)  # CRC-32 of each region
DEVICE = SectionType("virtio-net", Phase.FINAL, version=11, minimum_version=11, longest=1 << 18)
DELTA = SectionType("virtio-net-delta", Phase.FINAL, longest=1 << 18)
INDICES = SectionType("virtio-delta", Phase.FINAL, longest=1 << 18)
VHOST = SectionType("virtio-net-vhost", Phase.FINAL, priority=PRIORITY_LOW, longest=0)
END = SectionType("end", Phase.FINAL, priority=PRIORITY_LOW - 1, longest=0)
# Control sections: the destination is READY, the source gives the machine up (COMMIT), the destination RUNS.
READY = SectionType("ready", Phase.CONTROL, longest=0)
FAILED = SectionType("failed", Phase.CONTROL, longest=1 << 10)
COMMIT = SectionType("commit", Phase.CONTROL, longest=0)
RUNNING = SectionType("running", Phase.CONTROL, longest=1 << 16)


def _by_name(*sections: SectionType) -> dict[str, SectionType]:
    return {section.name: section for section in sections}


POLICIES: Final[dict[str, dict[str, SectionType]]] = {
    "none": _by_name(SETUP, RAM, CHECK, DEVICE, END, COMMIT),
    "seed": _by_name(SETUP, RAM, EARLY, CHECK, DEVICE, INDICES, VHOST, END, COMMIT),
    "delta": _by_name(SETUP, RAM, EARLY, CHECK, DELTA, END, COMMIT),
}
ANSWERS: Final = _by_name(READY, FAILED, RUNNING)


def _gone(error: OSError) -> StreamError:
    why = "it did not read or write in time" if isinstance(error, TimeoutError) else str(error)
    return StreamError(f"the other side is gone: {why}")


class Channel(Owned):
    """A connected stream socket, which becomes the channel's. Every wait has an end; every failure is a StreamError."""

    _deadline: float | None = None  # CLOCK_MONOTONIC, s

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.sent = 0
        sock.settimeout(PATIENCE_S)

    def set_deadline(self, seconds: float = PATIENCE_S) -> None:
        """Have everything from now on end within so many seconds, however slowly the other side reads or writes."""
        self._deadline = time.monotonic() + seconds

    def _limit_wait(self) -> None:
        """Limit the next wait to the time left until the deadline."""
        if self._deadline is None:
            return
        left = self._deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError
        self.sock.settimeout(left)

    def send(self, section: SectionType, payload: bytes = b"") -> int:
        """Send a section; return its bytes on the wire."""
        parts = [memoryview(part) for part in encode(section, payload) if part]
        total = sum(len(part) for part in parts)
        left = total
        try:
            while left:
                self._limit_wait()
                n = self.sock.sendmsg(parts)
                left -= n
                while parts and n >= len(parts[0]):
                    n -= len(parts.pop(0))
                if n:
                    parts[0] = parts[0][n:]
        except OSError as e:
            raise _gone(e) from e
        self.sent += total
        return total

    def read(self, length: int) -> memoryview:
        """Return exactly *length* bytes."""
        data = memoryview(bytearray(length))
        at = 0
        try:
            while at < length:
                self._limit_wait()
                n = self.sock.recv_into(data[at:])
                if n == 0:
                    raise StreamError("the stream ends inside a section" if at else "the other side is gone")
                at += n
        except OSError as e:
            raise _gone(e) from e
        return data

    def has_more(self) -> bool:
        """Return whether the other side has said something, or hung up."""
        return readable(self.sock, 0)

    def drain(self) -> None:
        """Send no more, and read the other side's bytes to their end, so that it receives the last section."""
        try:
            self.sock.shutdown(socket.SHUT_WR)
            self.set_deadline(_DRAIN_S)
            self._limit_wait()
            while self.sock.recv(1 << 20):
                self._limit_wait()
        except OSError:
            return

    def receive(self, known: Mapping[str, SectionType]) -> Section:
        return decode(self.read, known)

    def close(self) -> None:
        self.sock.close()
