"""MailboxEndpoint: frames by hand. A test, a simulator or a socket puts frames for the ring, and takes the ring's."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from contextlib import ExitStack

from vnetdp_kernels import spec

from ..shared.notify import EventFd
from .frames import NO_HEADER, QueuedEndpoint


class MailboxEndpoint(QueuedEndpoint):
    """Frames by hand: `put` gives one to the ring, `take` returns those that came off it. Any thread may call them.

    `limit`: frames kept each way. `put` refuses more; of frames that come off the ring the oldest are dropped and
    counted.
    """

    name = "mailbox"
    ready: EventFd
    """It is readable while frames wait for `take`."""

    def __init__(self, queues: int = 1, limit: int = 4096) -> None:
        with ExitStack() as made:
            super().__init__(queues, limit)
            made.callback(super().close)
            self.ready = made.enter_context(EventFd(later=True))
            made.pop_all()
        self.dropped = 0
        """The number of frames that came off the ring, and were dropped since too many waited."""
        self._from_ring: deque[bytes] = deque()

    def put(self, frame: bytes, header: bytes = NO_HEADER, queue: int = 0) -> bool:
        """Give an Ethernet frame (no FCS), with its virtio_net_hdr of 12 bytes, to the ring of queue pair *queue*.

        False if `limit` frames wait already. A frame of less than 14 bytes, or one that no buffer can hold, is taken,
        and then dropped and counted (`counters`). TypeError if *frame* is not bytes; ConfigError if there is no such
        queue pair.
        """
        return self._keep(frame, header, queue)

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

    def transmit_frames(self, queue: int, frames: Sequence[bytes]) -> None:
        with self._lock:
            self._from_ring.extend(frames)
            while len(self._from_ring) > self.limit:
                self._from_ring.popleft()
                self.dropped += 1
        self.ready.signal()

    def close(self) -> None:
        self.ready.close()
        super().close()
