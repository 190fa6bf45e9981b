"""PcapEndpoint: a capture is the wire. Frames come from one file, and those from the ring go to another.

Scapy's raw readers and writers know the formats, pcap and pcapng; here is only what they let pass: a file cut
short, and nanoseconds in pcapng.
"""

from __future__ import annotations

import struct
import time
import zlib
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from fractions import Fraction
from pathlib import Path
from typing import Any

from scapy.data import DLT_EN10MB
from scapy.error import Scapy_Exception
from scapy.utils import RawPcapNgReader, RawPcapNgWriter, RawPcapReader, RawPcapWriter

from vnetdp_kernels import layout

from ..errors import EndpointError
from ..notify import EventFd
from .base import Endpoint

_NO_HEADER = bytes(layout.NET_HDR_LEN)
_SNAPLEN = 262144  # tcpdump's
_NS = 1_000_000_000


class PcapEndpoint(Endpoint):
    """Frames of *source*, as fast as the ring takes them, on queue pair 0; frames from the ring go to *sink*.

    Either file may be None. source: pcap or pcapng, also gzipped. sink: pcapng if its name ends so, else pcap;
    it is overwritten; timestamps in ns. A frame that was captured only in part is sent as far as it goes.
    sink_later: the sink is left alone until `open_sink`, so that all else can be opened, and found wrong, before.
    """

    def __init__(
        self, source: str | Path | None, sink: str | Path | None = None, queues: int = 1, *, sink_later: bool = False
    ) -> None:
        if source is None and sink is None:
            raise EndpointError("pcap: neither a capture to read nor one to write: pcap:IN[,OUT]")
        self.name = f"pcap:{source or ''}{f',{sink}' if sink else ''}"
        self._source = None if source is None else Path(source)
        self._sink = None if sink is None else Path(sink)
        self._reader: Any = None  # _PcapReader or _PcapNgReader
        self._writer: RawPcapWriter | RawPcapNgWriter | None = None
        self._next: bytes | None = None  # one frame ahead of the ring
        self._read = 0
        self._gone = False  # the kernels have taken every frame
        with ExitStack() as made:
            super().__init__(queues)
            made.callback(super().close)
            self._wake = EventFd()
            made.pop_all()
        self.fds[0] = self._wake.fd
        try:
            if self._source is not None:
                self._reader = _open_source(self._source)
                self._next = self._read_frame()
            if not sink_later:
                self.open_sink()
        except BaseException:
            self.close()
            raise
        if source is not None:
            self._wake.signal()

    @property
    def files(self) -> Sequence[Path]:
        return [path for path in (self._source, self._sink) if path is not None]

    def open_sink(self, others: Sequence[Path] = ()) -> None:
        if self._sink is not None and self._writer is None:
            taken = others if self._source is None else (*others, self._source)
            self._writer = _open_sink(self._sink, taken)

    def _read_frame(self) -> bytes | None:
        """Return the next frame, None at the end; EndpointError if the file can't be sent from here on."""
        frame, metadata = next(self._reader, (None, None))
        for linktype in self._reader.linktypes(metadata):
            if linktype != DLT_EN10MB:
                raise EndpointError(f"{self.name}: link type {linktype}, but only Ethernet (1) can be sent")
        if frame is None and self._reader.cut_short():
            raise EndpointError(f"{self.name}: the capture is cut short or damaged after {self._read} frames")
        self._read += 1
        return frame

    def receive_frames(self, queue: int, limit: int) -> Sequence[bytes]:
        frames: list[bytes] = []
        if queue != 0 or self._reader is None:
            return frames
        while self._next is not None and len(frames) < limit:
            frames.append(_NO_HEADER + self._next)
            try:
                self._next = self._read_frame()
            except EndpointError as e:
                self._next = None
                self._failed(queue, 0, e)
        if not frames:
            # Only now: this is called again when what it returned last has been taken.
            self._gone = True
            self._wake.clear()
        return frames

    def transmit_frames(self, queue: int, frames: Sequence[bytes]) -> None:
        if self._writer is None:
            return
        for frame in frames:
            sec, ns = divmod(time.time_ns(), _NS)
            stamp: Any = Fraction(sec * _NS + ns, _NS) if isinstance(self._writer, _PcapNgWriter) else sec
            self._writer.write_packet(frame[layout.NET_HDR_LEN :], sec=stamp, usec=ns)
        self._writer.flush()

    @property
    def longest_frame(self) -> int:
        return layout.MAX_FRAME_LEN if self.gives else super().longest_frame

    @property
    def gives(self) -> bool:
        return self._reader is not None

    @property
    def finished(self) -> bool:
        """True once the last frame of the source has gone to the ring; never, without a source."""
        return self._gone and not self.rows[0, layout.EP_HELD]

    def close(self) -> None:
        if self._reader is not None:
            self._reader.close()
        if self._writer is not None:
            try:
                self._writer.close()
            except OSError as e:
                self._failed(0, 0, e)
            self._writer = None
        self._wake.close()
        super().close()


class _PcapReader(RawPcapReader):
    """As Scapy's, but it gives no frame of which the file lacks the end."""

    _at = 0  # where the record begins that was read last

    def _read_packet(self, size: int = _SNAPLEN) -> tuple[bytes, Any]:
        self._at = self.f.tell()
        frame, metadata = super()._read_packet(size)
        if len(frame) < metadata.caplen:
            raise EOFError
        return frame, metadata

    def linktypes(self, metadata: Any) -> Sequence[int]:
        return [self.linktype]

    def cut_short(self) -> bool:
        return _holds_more(self.f, self._at)


class _PcapNgReader(RawPcapNgReader):
    """As Scapy's; knows whether it ended between two blocks."""

    _at = 0

    def _read_packet(self, size: int = _SNAPLEN) -> tuple[bytes, Any]:
        return super()._read_packet(size)

    def _read_block(self, size: int = _SNAPLEN) -> Any:
        self._at = self.f.tell()
        return super()._read_block(size)

    def linktypes(self, metadata: Any) -> Sequence[int]:
        return [metadata.linktype] if metadata else []

    def cut_short(self) -> bool:
        return _holds_more(self.f, self._at)


def _holds_more(file: Any, at: int) -> bool:
    try:
        file.seek(at)
        return bool(file.read(1))
    except (OSError, EOFError, zlib.error):
        return True  # gzip, damaged


def _open_source(path: Path) -> Any:
    if path.exists() and not path.is_file():
        raise EndpointError(f"pcap: {path} is not a regular file")
    try:
        file = path.open("rb")
    except OSError as e:
        raise EndpointError(f"pcap: cannot read {path}: {e.strerror}") from e
    kinds: tuple[Any, ...] = (_PcapReader, _PcapNgReader)
    for kind in kinds:
        file.seek(0)
        with suppress(Scapy_Exception, EOFError):
            return kind(file)
    file.close()
    raise EndpointError(f"pcap: {path} is not a pcap or pcapng capture")


class _PcapNgWriter(RawPcapNgWriter):
    """As Scapy's, with timestamps in ns."""

    def __init__(self, filename: str) -> None:
        super().__init__(filename)
        self.linktype = DLT_EN10MB
        self.tsresol = _NS

    def _write_block_idb(self, linktype: int, ifname: bytes | None = None) -> None:
        body = struct.pack("<HHI", linktype, 0, _SNAPLEN)
        options = struct.pack("<HHB3xHH", 9, 1, 9, 0, 0)  # if_tsresol: 10**-9 s; opt_endofopt
        self.f.write(self.build_block(struct.pack("<I", 1), body, options))


def _is_same_file(path: Path, other: Path) -> bool:
    """True if what one writes the other would overwrite; /dev/null takes any number."""
    if not path.exists():
        return path.resolve() == other.resolve()
    return path.is_file() and other.exists() and path.samefile(other)


def _open_sink(path: Path, taken: Sequence[Path]) -> RawPcapWriter | RawPcapNgWriter:
    if any(_is_same_file(path, other) for other in taken):
        raise EndpointError(f"pcap: {path} is both read and written, or written twice: name another file to write")
    writer: RawPcapWriter | RawPcapNgWriter
    try:
        if path.suffix == ".pcapng":
            writer = _PcapNgWriter(str(path))
        else:
            writer = RawPcapWriter(str(path), linktype=DLT_EN10MB, nano=True, snaplen=_SNAPLEN)
    except OSError as e:
        raise EndpointError(f"pcap: cannot write {path}: {e.strerror}") from e
    try:
        writer.write_header(None)
        writer.flush()
    except OSError as e:
        with suppress(OSError):
            writer.close()
        raise EndpointError(f"pcap: cannot write {path}: {e.strerror}") from e
    return writer
