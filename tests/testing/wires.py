"""Wires that are broken on purpose, for schedules to find out."""

from __future__ import annotations

from collections.abc import Sequence

from vnetdp import MailboxEndpoint

LOST = 20  # each so-many-th frame


class LosesFrames(MailboxEndpoint):
    """Loses each LOSTth frame that comes off the rings."""

    name = "loses-frames"
    _seen = 0

    def transmit_frames(self, queue: int, frames: Sequence[bytes]) -> None:
        kept = []
        for frame in frames:
            self._seen += 1
            if self._seen % LOST:
                kept.append(frame)
        super().transmit_frames(queue, kept)


class Repeats(MailboxEndpoint):
    """Gives each frame to the ring twice."""

    name = "repeats"

    def receive_frames(self, queue: int, limit: int) -> Sequence[bytes]:
        frames = super().receive_frames(queue, limit // 2)
        return [frame for frame in frames for _ in range(2)]


class Turns(MailboxEndpoint):
    """Turns the order of the frames of a batch around."""

    name = "turns"

    def receive_frames(self, queue: int, limit: int) -> Sequence[bytes]:
        return super().receive_frames(queue, limit)[::-1]


class Damages(MailboxEndpoint):
    """Changes the last byte of each frame that comes off the rings."""

    name = "damages"

    def transmit_frames(self, queue: int, frames: Sequence[bytes]) -> None:
        super().transmit_frames(queue, [frame[:-1] + bytes([frame[-1] ^ 1]) for frame in frames])


class Raises(MailboxEndpoint):
    """Raises when it is asked whether it takes frames, which nothing catches."""

    name = "raises"

    def takes_frames(self, queue: int) -> bool:
        raise ZeroDivisionError("the wire's own mistake")


class NoMailbox:
    """No endpoint at all."""
