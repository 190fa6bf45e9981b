"""Announcing a guest that has moved: switches learn its new port from a frame that it seems to have sent (RFC 903)."""

from __future__ import annotations

import struct
import threading
import time
from collections.abc import Callable
from typing import Final

from vnetdp_kernels import spec

from ..system import limits
from ..system.owned import Owned
from .clock import Clock

# When to announce, in s after the machine runs: QEMU's 50 ms first, 100 ms more each time, five rounds.
ROUNDS_S: Final = (0.0, 0.05, 0.2, 0.45, 0.8)
_BROADCAST = b"\xff" * 6
_RARP = 0x8035
_REVERSE_REQUEST = 3


def rarp(mac: bytes) -> bytes:
    """Return the RARP broadcast that tells the network's switches where *mac* is: an Ethernet frame, no FCS."""
    body = struct.pack("!HHBBH", 1, 0x0800, 6, 4, _REVERSE_REQUEST) + mac + bytes(4) + mac + bytes(4)
    return (_BROADCAST + mac + struct.pack("!H", _RARP) + body).ljust(spec.ETH_ZLEN, b"\0")


class Announcer(Owned):
    """Announces the address that *mac* returns through *send*, five times in 0.8 s, as QEMU does after a migration.

    With `clock`, that of the device, `Clock.advance_to` sends each announcement at its time; None: a thread does. `close`
    ends it early. While it is held (`hold`) nothing is sent, and rounds that fall into that time are left out.
    """

    def __init__(self, send: Callable[[bytes], None], mac: Callable[[], bytes], clock: Clock | None = None) -> None:
        self.sent = 0
        """The number of announcements sent so far."""
        self._send = send
        self._mac = mac
        self._held = False
        self._turn = threading.Lock()
        self._end = threading.Event()
        self._thread: threading.Thread | None = None
        if clock is None:
            self._thread = threading.Thread(target=self._announce, name="announce", daemon=True)
            limits.start(self._thread)
        else:
            for at in ROUNDS_S:
                clock.call_at(clock.now_ns + round(at * 1e9), self._round)

    def _announce(self) -> None:
        began = time.monotonic()
        for at in ROUNDS_S:
            if self._end.wait(max(0.0, began + at - time.monotonic())):
                return
            self._round()

    def _round(self) -> None:
        with self._turn:
            if not (self._held or self._end.is_set()):
                self._send(rarp(self._mac()))
                self.sent += 1

    def hold(self, held: bool) -> None:
        """Send nothing from now on, or go on; an announcement under way has been sent when this returns."""
        with self._turn:
            self._held = held

    def close(self) -> None:
        if not self.inherited:
            self._end.set()
            if self._thread is not None:
                self._thread.join()
