"""Flow: numbered frames one way, made at one end and looked at when they arrive at the other."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterable
from typing import Final

from ..endpoints.loopback import Ledger

_HEADER: Final = struct.Struct(">6s6sHBxHI")  # addresses, EtherType, way, pair, number
_TYPE: Final = 0x88B5  # for local experiments
_ADDRESSES: Final = (bytes.fromhex("020000000001"), bytes.fromhex("020000000002"))
_FILL: Final = bytes(range(256)) * 7


class Flow:
    """Numbered frames of *pairs* queue pairs, one way. name: the way, in words. way: a byte that tells it from the other.

    foreign: frames that may arrive and are not numbered, such as those that a step gave byte by byte.
    """

    def __init__(self, name: str, way: int, pairs: int) -> None:
        self.name, self._way = name, way
        self._lengths: list[list[int]] = [[] for _ in range(pairs)]  # of each frame sent
        self._due: list[set[int]] = [set() for _ in range(pairs)]  # sent, and not arrived
        self._excused: list[set[int]] = [set() for _ in range(pairs)]  # may be lost
        self._last = [-1] * pairs
        self._strange = 0
        self.foreign = 0
        self.crc = 0
        self._counts = {"delivered": 0, "duplicated": 0, "reordered": 0, "corrupted": 0}

    def frame(self, pair: int, length: int) -> bytes:
        """Return the next frame of a pair; `sent` counts it."""
        return self._frame(pair, len(self._lengths[pair]), length)

    def _frame(self, pair: int, number: int, length: int) -> bytes:
        head = _HEADER.pack(*_ADDRESSES, _TYPE, self._way, pair, number)
        at = number % 256
        return head + _FILL[at : at + length - len(head)]

    def sent(self, pair: int, length: int) -> None:
        """Count the frame that `frame` returned."""
        self._due[pair].add(len(self._lengths[pair]))
        self._lengths[pair].append(length)

    def excuse(self, pair: int | None = None) -> None:
        """Allow that frames under way are lost, of one pair or of all."""
        for n, due in enumerate(self._due):
            if pair in (None, n):
                self._excused[n] |= due

    def arrived(self, frames: Iterable[bytes]) -> None:
        for frame in frames:
            self.crc = zlib.crc32(frame, self.crc)
            self._look_at(frame)

    def _look_at(self, frame: bytes) -> None:
        counts = self._counts
        head = _HEADER.unpack_from(frame) if len(frame) >= _HEADER.size else (b"", b"", 0, 0, 0, 0)
        _, _, kind, way, pair, number = head
        if (kind, way) != (_TYPE, self._way) or pair >= len(self._due) or number >= len(self._lengths[pair]):
            self._strange += 1
            return
        if frame != self._frame(pair, number, self._lengths[pair][number]):
            counts["corrupted"] += 1
        elif number not in self._due[pair]:
            counts["duplicated"] += 1
        else:
            self._due[pair].remove(number)
            counts["delivered"] += 1
            counts["reordered"] += number < self._last[pair]
            self._last[pair] = max(number, self._last[pair])

    def ledger(self) -> Ledger:
        """Return the fate of all frames so far: those in flight, and those that a reset lost, count as lost."""
        sent = sum(map(len, self._lengths))
        counts = {**self._counts, "corrupted": self._counts["corrupted"] + max(0, self._strange - self.foreign)}
        return Ledger(sent=sent, lost=sent - counts["delivered"], **counts)

    def violations(self) -> list[str]:
        """Return what can't be put right any more: frames that arrived twice, late or damaged."""
        ledger = self.ledger()
        counts = (
            ("I1", "duplicated", ledger.duplicated),
            ("I10", "reordered", ledger.reordered),
            ("I8", "corrupted", ledger.corrupted),
        )
        return [f"{name}: {n} frames {self.name} {what}" for name, what, n in counts if n]

    def missing(self) -> list[str]:
        """Return which frames are lost without an excuse, once all have arrived that can."""
        found = []
        for pair, (due, excused) in enumerate(zip(self._due, self._excused, strict=True)):
            lost = sorted(due - excused)
            if lost:
                numbers = ", ".join(map(str, lost[:5])) + (f" and {len(lost) - 5} more" if len(lost) > 5 else "")
                found.append(f"I1: {len(lost)} frames {self.name} lost on pair {pair}: {numbers}")
        return found
