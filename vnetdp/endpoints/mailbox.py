"""MailboxEndpoint: frames by hand. A test, a simulator or a socket puts frames for the ring, and takes the ring's."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from contextlib import ExitStack

from vnetdp_kernels import spec

from ..errors import ConfigError
from ..shared.notify import EventFd
from ..system.owned import OwnedLock
from .base import Endpoint

_NO_HEADER = bytes(spec.NET_HDR_LEN)


class MailboxEndpoint(Endpoint):
    """Frames by hand: `put` gives one to the ring, `take` returns those that came off it. Any thread may call them.

    `limit`: frames kept each way. `put` refuses more; of frames that come off the ring the oldest are dropped and
    counted.
    """

    name = "mailbox"
    ready: EventFd
    """It is readable while frames wait for `take`."""

    def __init__(self, queues: int = 1, limit: int = 4096) -> None:
        with ExitStack() as made:
            super().__init__(queues)
            made.callback(super().close)
            self.ready = made.enter_context(EventFd())
            made.pop_all()
        self.limit = limit
        """Frames kept each way."""
        self.dropped = 0
        """The number of frames that came off the ring, and were dropped since too many waited."""
        self._lock = OwnedLock(self)
        self._to_ring: list[deque[bytes]] = [deque() for _ in range(queues)]
        self._from_ring: deque[bytes] = deque()

    def put(self, frame: bytes, header: bytes = _NO_HEADER, queue: int = 0) -> bool:
        """Give an Ethernet frame (no FCS), with its virtio_net_hdr of 12 bytes, to the ring of queue pair *queue*.

        False if `limit` frames wait already. A frame of less than 14 bytes, or one that no buffer can hold, is taken,
        and then dropped and counted (`counters`). TypeError if *frame* is not bytes; ConfigError if there is no such
        queue pair.
        """
        if not isinstance(frame, bytes | bytearray):
            raise TypeError(f"a frame is bytes, not {type(frame).__name__}")
        if not 0 <= queue < self.queues:
            raise ConfigError(f"queue pair {queue}: the last one is {self.queues - 1}")
        with self._lock:
            if len(self._to_ring[queue]) >= self.limit:
                return False
            self._to_ring[queue].append(header + frame)
        self.wake(queue)
        return True

    def take(self) -> list[bytes]:
        """Return the Ethernet frames (no FCS, no virtio_net_hdr) that came off the rings, oldest first; maybe none."""
        return [frame[spec.NET_HDR_LEN :] for frame in self.take_raw()]

    def take_raw(self) -> list[bytes]:
        """Return the frames that came off the rings, as `take` does, each with its virtio_net_hdr of 12 bytes in front."""
        with self._lock:
            frames = list(self._from_ring)
            self._from_ring.clear()
            self.ready.clear()
        return frames

    def receive_frames(self, queue: int, limit: int) -> Sequence[bytes]:
        with self._lock:
            waiting = self._to_ring[queue]
            return [waiting.popleft() for _ in range(min(limit, len(waiting)))]

    def transmit_frames(self, queue: int, frames: Sequence[bytes]) -> None:
        with self._lock:
            self._from_ring.extend(frames)
            while len(self._from_ring) > self.limit:
                self._from_ring.popleft()
                self.dropped += 1
        self.ready.signal()

    @property
    def idle(self) -> bool:
        return not any(self._to_ring) and super().idle

    def close(self) -> None:
        self.ready.close()
        super().close()
