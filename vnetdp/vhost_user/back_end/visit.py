"""Visit: how long one connection may hold a socket at which others knock. And a wait on descriptors."""

from __future__ import annotations

import logging
import os
import select
import socket
import struct
import time
from contextlib import suppress

from vnetdp_kernels import rows as r

from ...system.listener import Listener
from .vrings import Served

_log = logging.getLogger("vnetdp.server")

_FIRST_WORD_S = 2.0  # of a connection that keeps another out
_LOOK_S = 0.25  # between two looks at the served connection while another waits
_QUIET_S = 2.0  # without a message or a kick, after its process has ended


def ready_of(events: dict[int, int], timeout_s: float | None = None) -> set[int]:
    """Wait until some descriptors have the events asked for, or are broken, and return those.

    Not select: numbers may pass 1023.
    """
    poll = select.poll()
    for fd, wanted in events.items():
        poll.register(fd, wanted)
    return {fd for fd, _ in poll.poll(None if timeout_s is None else timeout_s * 1000)}


class Visit:
    """A connection, *sock*, and the signs of life of its other end; *listener*: where others connect, None if nowhere.

    A served front end may be silent for years. But while another waits, it has to send its first message in time; and a
    connection whose process has ended and whose rings stand still counts as dead, though a copy of its descriptor may
    lie unread in another socket.
    """

    def __init__(self, sock: socket.socket, worker: Served, listener: Listener | None) -> None:
        self.spoke = False
        self._worker = worker
        self._listener = listener
        self._process = -1 if listener is None else _process_of(sock)
        self._began = self._alive = time.monotonic()
        self._moved = -1
        self._knocked = False

    def descriptors(self) -> dict[int, int]:
        """Return the descriptor that `in_vain` waits for, with its events."""
        if self._listener is None or self._knocked:
            return {}
        return {self._listener.fileno(): select.POLLIN}

    @property
    def patience_s(self) -> float | None:
        """Seconds to wait at most before the next look; None while no other front end waits."""
        return _LOOK_S if self._knocked else None

    def speaks(self) -> None:
        """A message came."""
        self.spoke = True
        self._alive = time.monotonic()

    def in_vain(self, ready: set[int]) -> str | None:
        """Return why the connection has to make room for another one; None while it need not."""
        if self._listener is None:
            return None
        now = time.monotonic()
        if not self._knocked:
            self._knocked = self._listener.fileno() in ready
            self._alive = now
            if self._knocked:
                _log.info("another front end waits until the present one leaves")
        if not self._knocked or not ready_of({self._listener.fileno(): select.POLLIN}, 0):
            self._knocked = False  # a front end that knocked may have left again
            return None
        if not self.spoke:
            silent = now - self._began >= _FIRST_WORD_S
            return f"a connection said nothing for {_FIRST_WORD_S:g} s, and another waits" if silent else None
        moved = int(self._worker.datapath.vqs[:, (r.VQ_KICKS, r.VQ_CHAINS)].sum())
        if moved != self._moved:
            self._moved, self._alive = moved, now
        if now - self._alive < _QUIET_S or self._process < 0 or not ready_of({self._process: select.POLLIN}, 0):
            return None
        return "the front end's process has ended, and another waits"

    def close(self) -> None:
        fd, self._process = self._process, -1
        if fd >= 0:
            os.close(fd)


def _process_of(sock: socket.socket) -> int:
    """Return a descriptor of the process that made a connection; -1 if it can't be known."""
    credentials = struct.Struct("iII")
    pid, _, _ = credentials.unpack(sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, credentials.size))
    with suppress(OSError):
        if pid > 0:  # else it is in another PID namespace
            return os.pidfd_open(pid)
    return -1
