"""PcapEndpoint: a capture is the wire. Frames come from one file, and those from the ring go to another."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from vnetdp_kernels import rows as r
from vnetdp_kernels import spec
from vnetdp_kernels.wire import capture as cap

from ..errors import EndpointError, reason
from ..shared.notify import EventFd
from ..system.output import is_same_file
from .base import PYTHON_SLOTS, Endpoint
from .capture_reader import CaptureReader, foreign, frame_at
from .capture_writer import CaptureWriter

_log = logging.getLogger("vnetdp.endpoints")


class PcapEndpoint(Endpoint):
    """A capture as the wire: the frames of file *source* go to the ring, those from the ring go to file *sink*.

    - `source`: a pcap or pcapng file, gzipped or not, sent on queue pair 0 as fast as the ring takes frames. A frame
      that was captured in part is sent as far as it goes. One of another link type than Ethernet, or that no buffer can
      hold, is dropped and counted. None sends nothing.
    - `sink`: the file to overwrite, pcapng if its name ends in .pcapng, else pcap; timestamps in ns. None writes
      nothing.
    - `sink_later`: True overwrites the sink in `open_sink` only, once all else was opened.

    EndpointError if a file can't be opened, or is none of these formats.
    """

    def __init__(
        self, source: str | Path | None, sink: str | Path | None = None, queues: int = 1, *, sink_later: bool = False
    ) -> None:
        if source is None and sink is None:
            raise EndpointError("pcap: no capture is named: write pcap:IN[,OUT]")
        self.name = f"pcap:{source or ''}{f',{sink}' if sink else ''}"
        self._source = None if source is None else Path(source)
        self._sink = None if sink is None else Path(sink)
        self._reader: CaptureReader | None = None
        self._writer: CaptureWriter | None = None
        self._first = self._found = 0  # rows of the reader's index that the ring has not got yet
        self._foreign_said = False
        self._failures: list[str] = []
        self._gone = False  # the kernels have taken every frame
        with ExitStack() as made:
            super().__init__(queues)
            made.callback(super().close)
            self._more = EventFd()  # readable until the last frame was taken
            made.pop_all()
        self.fds[0] = self._more.fd
        try:
            if self._source is not None:
                self._reader = CaptureReader(self._source, PYTHON_SLOTS)
                self._begin(self._reader)
            if not sink_later:
                self.open_sink()
        except BaseException:
            self.close()
            raise
        if source is not None:
            self._more.signal()

    @property
    def files(self) -> Sequence[Path]:
        return [path for path in (self._source, self._sink) if path is not None]

    def open_sink(self, others: Sequence[Path] = ()) -> None:
        if self._sink is None or self._writer is not None:
            return
        if any(is_same_file(self._sink, other) for other in (*others, *([self._source] if self._source else []))):
            raise EndpointError(
                f"pcap: {self._sink} is both read and written, or written twice: name another file to write"
            )
        self._writer = CaptureWriter(self._sink)

    def _begin(self, reader: CaptureReader) -> None:
        """Find the first frames; EndpointError if there are none but of another link type."""
        self._found = reader.read()
        if reader.ended and reader.state[cap.FOREIGN]:
            raise foreign(reader.path, int(reader.state[cap.FOREIGN_TYPE]))
        self._count(reader)

    def _count(self, reader: CaptureReader) -> None:
        """Count the frames that the reader left out."""
        state, row = reader.state, self.rows[0]
        row[r.EP_DROP_LONG] += state[cap.LONG]
        row[r.EP_DROP_ERROR] += state[cap.FOREIGN]
        if state[cap.FOREIGN] and not self._foreign_said:
            self._foreign_said = True
            what = f"link type {state[cap.FOREIGN_TYPE]}, but only Ethernet (1) can be sent"
            _log.warning("%s: some frames are of %s: they are dropped and counted", self.name, what)
        state[cap.LONG] = state[cap.FOREIGN] = 0

    def _take(self, queue: int, limit: int) -> range:
        """Return rows of the reader's index, *limit* of them at most, that go to the ring now."""
        reader = self._reader
        if queue != 0 or reader is None:
            return range(0)
        if self._first == self._found:
            self._first = self._found = 0
            try:
                self._found = reader.read()
            except EndpointError as e:
                self._failed(queue, 0, e)
            self._count(reader)
        rows = range(self._first, min(self._first + limit, self._found))
        self._first = rows.stop
        if not rows and reader.ended:
            # Only now: this is called again once the rows that it returned last have been taken.
            self._gone = True
            self._more.clear()
        return rows

    def _failed(self, queue: int, frames: int, error: BaseException) -> None:
        super()._failed(queue, frames, error)
        if not self._failures:
            self._failures.append(reason(error))

    @property
    def failures(self) -> Sequence[str]:
        return self._failures

    def fill_slots(self, queue: int) -> bool:
        stopped = self.polls_stopped
        rows = self._take(queue, PYTHON_SLOTS)
        if self.polls_stopped != stopped:
            self._first = rows.start  # for the next owner, which has the slots by now
        elif rows and (reader := self._reader) is not None:
            frames, lengths = self.in_frames[queue], self.in_lengths[queue]
            cap.take(reader.data, reader.index, rows.start, len(rows), frames, lengths)
            self.rows[queue, r.EP_COUNT] = len(rows)
        return False  # its descriptor is readable until the end

    def receive_frames(self, queue: int, limit: int) -> Sequence[bytes]:
        rows = self._take(queue, limit)
        return [] if self._reader is None else [frame_at(self._reader, row) for row in rows]

    def service(self) -> int:
        done = super().service()
        if self._writer is not None and self._writer.waiting and not self.takes_frames(0):
            self.rows[:, r.EP_BLOCKED] = 1  # have it called again soon, frames or none: a record's end is kept
        return done

    def takes_frames(self, queue: int) -> bool:
        """False while the reader of a FIFO has not taken the frames written before."""
        writer = self._writer
        if writer is None or not writer.waiting:
            return True
        with self._guarded(queue, writer.waiting):
            writer.flush()
        return not writer.waiting

    def transmit_frames(self, queue: int, frames: Sequence[bytes]) -> None:
        if self._writer is not None:
            now_ns = None if self.clock is None else self.clock.now_ns
            self._writer.write([frame[spec.NET_HDR_LEN :] for frame in frames], now_ns)

    @property
    def longest_frame(self) -> int:
        return spec.MAX_FRAME_LEN if self.gives else super().longest_frame

    @property
    def gives(self) -> bool:
        return self._reader is not None

    @property
    def finished(self) -> bool:
        """True once the last frame of the source has gone to the ring; never, without a source."""
        return self._gone and not self.rows[0, r.EP_PENDING]

    def close(self) -> None:
        if self._reader is not None:
            self._reader.close()
        if self._writer is not None:
            waiting = self._writer.waiting
            try:
                self._writer.close()
            except EndpointError as e:
                self._failed(0, waiting, e)
            self._writer = None
        self._more.close()
        super().close()

    def leave_to_parent(self) -> None:
        """Write nothing any more: frames that wait for the reader of a FIFO are written by the parent, once. @private"""
        if self._writer is not None and self.inherited:
            self._writer.abandon()
            self._writer = None
        super().leave_to_parent()
