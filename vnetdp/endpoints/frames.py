"""Endpoints in Python that queue frames for the ring; FrameEndpoint: plain Ethernet frames, one at a time."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from typing import Any

from vnetdp_kernels import rows as r
from vnetdp_kernels import spec

from ..errors import ConfigError
from ..system.owned import OwnedLock
from .base import Endpoint

NO_HEADER = bytes(spec.NET_HDR_LEN)


class QueuedEndpoint(Endpoint):
    """An endpoint in Python that keeps frames, which any thread gives, until the ring takes them."""

    def __init__(self, queues: int = 1, limit: int = 4096) -> None:
        super().__init__(queues)
        self.limit = limit
        """Frames kept, on each queue."""
        self._lock = OwnedLock(self)
        self._to_ring: list[deque[bytes]] = [deque() for _ in range(queues)]
        self._gives_others = type(self).receive_frames is not QueuedEndpoint.receive_frames

    def _keep(self, frame: bytes, header: bytes, queue: int) -> bool:
        """Keep a frame for the ring of queue pair *queue*, and wake its loop; False if `limit` frames wait already."""
        if not isinstance(frame, bytes | bytearray):
            raise TypeError(f"a frame is bytes, not {type(frame).__name__}")
        if not 0 <= queue < self.queues:
            raise ConfigError(f"queue pair {queue}: the last one is {self.queues - 1}")
        with self._lock:
            if len(self._to_ring[queue]) >= self.limit:
                return False
            self._to_ring[queue].append(header + frame)
        self._wake(queue)
        return True

    def may_give(self, queue: int) -> bool:
        return bool(self._to_ring[queue] or self._late or self._gives_others)

    def receive_frames(self, queue: int, limit: int) -> Sequence[bytes]:
        with self._lock:
            waiting = self._to_ring[queue]
            return [waiting.popleft() for _ in range(min(limit, len(waiting)))]

    @property
    def idle(self) -> bool:
        return not any(self._to_ring) and super().idle


class FrameEndpoint(QueuedEndpoint):
    """Plain Ethernet frames (no FCS, no virtio_net_hdr): the base of most endpoints of one's own.

    A subclass overrides `frame_received`. `send` gives a frame to the ring, at any moment. `Endpoint` is the base of an
    endpoint that needs batches or the virtio_net_hdr.

    `limit`: frames kept for the ring, on each queue. `send` refuses more.
    """

    def frame_received(self, frame: bytes, queue: int) -> bytes | Iterable[bytes] | None:
        """Take an Ethernet frame that came off the ring of queue pair *queue*, and return frames to send back, or None.

        It returns one frame, several frames or None. It is called in the thread that runs the rings, one call at a time,
        and must not block. An exception, or a return value of another type, drops this frame alone, and is counted
        (`errors`, `last_error`). Frames sent back while `limit` frames wait are dropped and counted.
        """
        return None

    def send(self, frame: bytes, queue: int = 0) -> bool:
        """Give an Ethernet frame to the ring of queue pair *queue*; False if `limit` frames wait. Any thread may call it.

        A frame of less than 14 bytes, or one that no buffer can hold, is taken, and then dropped and counted
        (`counters`). TypeError if *frame* is not bytes; ConfigError if there is no such queue pair.
        """
        return self._keep(frame, NO_HEADER, queue)

    def transmit_frames(self, queue: int, frames: Sequence[bytes]) -> None:
        for frame in frames:
            with self._guarded(queue, 1):  # an exception costs this frame alone
                for answer in _answers(self.frame_received(frame[spec.NET_HDR_LEN :], queue)):
                    if not self.send(answer, queue):
                        self.rows[queue, r.EP_DROP_ERROR] += 1


def _answers(answer: Any) -> Sequence[bytes]:
    """Return the frames that `frame_received` returned; TypeError if it returned anything else."""
    if answer is None:
        return ()
    one = isinstance(answer, bytes | bytearray | str) or not isinstance(answer, Iterable)
    several = [answer] if one else [*answer]
    for each in several:
        if not isinstance(each, bytes | bytearray):
            raise TypeError(f"frame_received returned {type(each).__name__}, not bytes, several bytes or None")
    return several
