"""CaptureReader: a pcap or pcapng file, mapped or unzipped piece by piece, and the frames that kernels find in it."""

from __future__ import annotations

import gzip
import mmap
import os
import stat
import struct
import zlib
from collections.abc import Iterator
from io import BufferedReader
from pathlib import Path
from typing import Final, Protocol

import numpy as np

from vnetdp_kernels import spec
from vnetdp_kernels.wire import capture as cap

from ..errors import EndpointError
from ..shared.memory import Bytes, Words
from ..system.limits import of_path

_PIECE: Final = 1 << 16  # bytes that are unzipped at once
_TURNS: Final = 1024  # how often one `read` goes on without having found a frame
_MAX_INTERFACES: Final = 1 << 16  # of a section; a file of nothing else would take all memory

# magic: bytes of the file's header, bytes of a record's header. All time resolutions and writers that Wireshark knows.
_PCAP: Final = {
    0xA1B2C3D4: (24, 16),
    0xA1B23C4D: (24, 16),  # times in ns
    0xA1B2CD34: (24, 24),  # "modified": interface, protocol and packet type in each record
    0x1C0001AB: (28, 16),  # Ixia
    0x1C0001AC: (28, 16),
}
_PCAP_HEADER_MIN: Final = 24
_FCS_LEN_GIVEN: Final = 0x0400_0000  # in the link type of a pcap header: the upper four bits count 16-bit words of FCS

_SECTION_HEADER: Final = b"\n\r\r\n"
_SECTION_HEADER_LEN: Final = 28  # without options
_BYTE_ORDER_MAGIC: Final = 0x1A2B3C4D
_IF_FCSLEN: Final = 13

_DAMAGE: Final = {
    cap.SCAN_BAD_LENGTH: "a block's length is wrong",
    cap.SCAN_BAD_INTERFACE: "a packet is of an interface that its section does not describe",
    cap.SCAN_BAD_PACKET: "a packet is longer than its block",
}


class _Input(Protocol):
    """Where the bytes of a capture come from. data: read-only, valid from state[AT] to state[END]."""

    data: Bytes

    def look(self, state: Words) -> None:
        """Update the state after a change of the file's length."""
        ...

    def more(self, state: Words) -> bool:
        """Make more than state[AT] to state[END] available, and update both; False if there is no more."""
        ...

    def close(self) -> None: ...


class _Mapped:
    """A regular file in memory. While it grows, it is read on; where it was cut off meanwhile, it ends."""

    def __init__(self, file: BufferedReader) -> None:
        self._file = file
        self._map: mmap.mmap | None = None
        self._protected = 0
        self.data: Bytes = _read_only(np.zeros(0, np.uint8))

    def look(self, state: Words) -> None:
        state[cap.END] = min(int(state[cap.END]), os.fstat(self._file.fileno()).st_size)

    def more(self, state: Words) -> bool:
        from vnetdp_kernels.platform import sigbus

        size = os.fstat(self._file.fileno()).st_size
        if size <= self.data.size:
            return False
        self._unmap()
        self._map = mmap.mmap(self._file.fileno(), size, access=mmap.ACCESS_READ)
        self.data = np.frombuffer(self._map, np.uint8)
        # Between two looks it may lose pages to `truncate`: they read as zeros then.
        sigbus.protect(self.data.ctypes.data, spec.align_up(size, mmap.PAGESIZE))
        self._protected = self.data.ctypes.data
        state[cap.END] = size
        return True

    def _unmap(self) -> None:
        if self._protected:
            from vnetdp_kernels.platform import sigbus

            sigbus.unprotect(self._protected)
            self._protected = 0
        self.data = _read_only(np.zeros(0, np.uint8))
        if self._map is not None:
            self._map.close()
            self._map = None

    def close(self) -> None:
        self._unmap()
        self._file.close()


class _Stream:
    """A file that can't be mapped, or has to be unzipped: the part of it that is looked at, in a buffer."""

    def __init__(self, file: BufferedReader | gzip.GzipFile, below: BufferedReader) -> None:
        self._file = file
        self._below = below
        self._buffer: Bytes = np.zeros(4 * _PIECE, np.uint8)
        self.data = _read_only(self._buffer)

    def look(self, state: Words) -> None:
        pass

    def more(self, state: Words) -> bool:
        at, end = int(state[cap.AT]), int(state[cap.END])
        kept = end - at
        buffer = self._buffer
        if kept + _PIECE > buffer.size:
            self._buffer = np.zeros(2 * buffer.size, np.uint8)
            self.data = _read_only(self._buffer)
        self._buffer[:kept] = buffer[at:end]
        piece = self._file.read1(_PIECE)
        self._buffer[kept : kept + len(piece)] = np.frombuffer(piece, np.uint8)
        state[cap.AT], state[cap.END] = 0, kept + len(piece)
        return bool(piece)

    def close(self) -> None:
        self._file.close()
        self._below.close()


class CaptureReader:
    """The frames of a capture. After `read`, rows of `index` say where the next ones lie in `data`.

    state[LONG] and state[FOREIGN] count frames left out: too long for a frame slot, or of another link type.
    ended: no frame will come any more.
    """

    def __init__(self, path: Path, rows: int) -> None:
        self.path = path
        self.index: Words = np.zeros((rows, 2), np.int64)
        self.state: Words = np.zeros(cap.STATE_SLOTS, np.int64)
        self.ended = False
        self._interfaces: Words = np.zeros((4, cap.IF_SLOTS), np.int64)
        self._order = "<"
        self._input = _open(path, self.state)
        try:
            self._ng = self._begin()
        except BaseException:
            self.close()
            raise

    @property
    def data(self) -> Bytes:
        return self._input.data

    def read(self) -> int:
        """Find the next frames, as many as `index` has rows at most; return how many.

        0 if there are none any more (`ended`), or if so much was left out that it is better to be called again.
        EndpointError, and it has ended, if the file can't be read from here on.
        """
        try:
            return self._read()
        except (OSError, EOFError, zlib.error) as e:  # gzip, damaged; a disk
            self.ended = True
            strerror = (
                e.strerror if isinstance(e, OSError) and e.strerror else "its compressed data is cut short or damaged"
            )
            raise self._damaged(strerror) from e
        except EndpointError:
            self.ended = True
            raise

    def _read(self) -> int:
        if not self.ended:
            self._input.look(self.state)
        for _ in range(0 if self.ended else _TURNS):
            if self.state[cap.SKIP]:
                self._skip()
                continue
            if self._ng:
                n, why = cap.scan_pcapng(self.data, self.state, self._interfaces, self.index)
            else:
                n, why = cap.scan_pcap(self.data, self.state, self.index)
            if n:
                return n
            if why == cap.SCAN_SECTION:
                self._read_section()
            elif why == cap.SCAN_INTERFACE:
                self._read_interface()
            elif why in _DAMAGE:
                raise self._damaged(_DAMAGE[why])
            elif why == cap.SCAN_MORE and not self._input.more(self.state):
                if self.state[cap.AT] != self.state[cap.END]:
                    raise self._damaged("it ends inside a record")
                self.ended = True
                break
        return 0

    def _damaged(self, why: str) -> EndpointError:
        n = int(self.state[cap.PACKETS])
        return EndpointError(
            f"pcap: {self.path}: the capture is cut short or damaged after {n} frame{'s' * (n != 1)}: {why}"
        )

    def _skip(self) -> None:
        state = self.state
        here = min(int(state[cap.SKIP]), int(state[cap.END] - state[cap.AT]))
        state[cap.AT] += here
        state[cap.SKIP] -= here
        if not state[cap.SKIP]:
            state[cap.LONG] += state[cap.SKIP_PACKET]
            state[cap.PACKETS] += state[cap.SKIP_PACKET]
        elif not self._input.more(state):
            raise self._damaged("it ends inside a record")

    def _has(self, length: int) -> bool:
        """True once *length* bytes from AT on are there; False if the file ends before."""
        while self.state[cap.END] - self.state[cap.AT] < length:
            if not self._input.more(self.state):
                return False
        return True

    def _unpack(self, layout: str, at: int) -> tuple[int, ...]:
        return struct.unpack_from(self._order + layout, self.data.data, int(self.state[cap.AT]) + at)

    # --- the headers before the frames ---

    def _begin(self) -> bool:
        """Read the file's header; True if it is a pcapng."""
        none = EndpointError(f"pcap: {self.path} is not a pcap or pcapng capture")
        try:
            self._has(_SECTION_HEADER_LEN)
        except (OSError, EOFError, zlib.error) as e:
            if isinstance(e, OSError) and e.errno:
                raise EndpointError(f"pcap: cannot read {self.path}: {of_path(self.path, e)}") from e
            raise none from e
        start = self.data[: int(self.state[cap.END])][:_SECTION_HEADER_LEN].tobytes()
        if start[:4] == _SECTION_HEADER and len(start) == _SECTION_HEADER_LEN:
            if _BYTE_ORDER_MAGIC not in (int.from_bytes(start[8:12], order) for order in ("little", "big")):
                raise none
            return True
        for self._order in "<>":
            if len(start) >= _PCAP_HEADER_MIN and (magic := self._unpack("I", 0)[0]) in _PCAP:
                self._read_pcap_header(*_PCAP[magic])
                return False
        raise none

    def _read_pcap_header(self, header_len: int, record_len: int) -> None:
        major, minor, _zone, _accuracy, _snaplen, network = self._unpack("HHIIII", 4)
        link_type = network & 0xFFFF
        if link_type != cap.LINKTYPE_ETHERNET:
            raise foreign(self.path, link_type)
        if not self._has(header_len):
            raise self._damaged("it ends inside its header")
        self.state[cap.AT] += header_len
        self.state[cap.BIG] = self._order == ">"
        self.state[cap.RECORD_LEN] = record_len
        self.state[cap.FCS_LEN] = (network >> 28) * 2 if network & _FCS_LEN_GIVEN else 0
        self.state[cap.OLD] = (major, minor) < (2, 4)

    def _read_section(self) -> None:
        """Begin the section whose header block lies at AT, with interfaces and a byte order of its own."""
        if not self._has(_SECTION_HEADER_LEN):
            raise self._damaged("it ends inside a section header")
        for self._order in "<>":
            if self._unpack("I", 8)[0] == _BYTE_ORDER_MAGIC:
                break
        else:
            raise self._damaged("a section header without a byte order")
        length, _magic, major = self._unpack("IIH", 4)
        block_len = spec.align_up(length, 4)
        if major != 1:
            raise self._damaged(f"a section of version {major}, not 1")
        if not _SECTION_HEADER_LEN <= block_len <= cap.MAX_WHOLE:
            raise self._damaged(_DAMAGE[cap.SCAN_BAD_LENGTH])
        if not self._has(block_len):
            raise self._damaged("it ends inside a section header")
        if spec.align_up(self._unpack("I", block_len - 4)[0], 4) != block_len:
            raise self._damaged(_DAMAGE[cap.SCAN_BAD_LENGTH])
        self.state[cap.BIG] = self._order == ">"
        self.state[cap.INTERFACES] = 0
        self.state[cap.AT] += block_len

    def _read_interface(self) -> None:
        """Add the interface whose description block lies, whole, at AT."""
        n = int(self.state[cap.INTERFACES])
        block_len = spec.align_up(self._unpack("I", 4)[0], 4)
        if block_len < 20:
            raise self._damaged(_DAMAGE[cap.SCAN_BAD_LENGTH])
        if n == _MAX_INTERFACES:
            raise self._damaged(f"a section of more than {_MAX_INTERFACES} interfaces")
        if n == len(self._interfaces):
            self._interfaces = np.concatenate([self._interfaces, np.zeros_like(self._interfaces)])
        link_type, _reserved, snaplen = self._unpack("HHI", 8)
        fcs_len = 0
        for code, at, length in self._options(16, block_len - 4):
            if code == _IF_FCSLEN and length == 1:
                fcs_len = self._unpack("B", at)[0]
        # The specification has said bits, and has said bytes; writers did both, and no FCS has 16 bytes.
        self._interfaces[n] = link_type, snaplen, fcs_len // 8 if fcs_len >= 16 else fcs_len
        self.state[cap.INTERFACES] += 1
        self.state[cap.AT] += block_len

    def _options(self, at: int, end: int) -> Iterator[tuple[int, int, int]]:
        """Yield code, place and length of each option from *at* to *end*, as far as they are whole."""
        while end - at >= 4:
            code, length = self._unpack("HH", at)
            if code == 0 or length > end - at - 4:
                return
            yield code, at + 4, length
            at += 4 + spec.align_up(length, 4)

    def close(self) -> None:
        self._input.close()


def foreign(path: Path, link_type: int) -> EndpointError:
    return EndpointError(f"pcap: {path}: link type {link_type}, but only Ethernet (1) can be sent")


def frame_at(reader: CaptureReader, row: int) -> bytes:
    """Return the frame that a row of the reader's index tells of, behind a virtio_net_hdr of zeros."""
    at, length = (int(value) for value in reader.index[row])
    return bytes(spec.NET_HDR_LEN) + reader.data[at : at + length].tobytes()


def _read_only(array: Bytes) -> Bytes:
    """Return a view of *array* as a mapped file has it: a kernel is compiled for one kind of array only."""
    view = array.view()
    view.flags.writeable = False
    return view


def _open(path: Path, state: Words) -> _Input:
    """Open a capture; state[AT] and state[END] give the range of its bytes that is mapped already."""
    try:
        mode = path.stat().st_mode
        if stat.S_ISDIR(mode):
            raise EndpointError(f"pcap: {path} is a folder: name a capture file in it")
        if not stat.S_ISREG(mode):
            raise EndpointError(
                f"pcap: {path} is not a regular file: read from a copy of it, as `cat {path} >capture` makes one"
            )
        # Should a FIFO have taken its place since, it is not waited for.
        file = os.fdopen(os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK), "rb")
    except (OSError, ValueError) as e:
        raise EndpointError(f"pcap: cannot read {path}: {of_path(path, e)}") from e
    try:
        if file.peek(2)[:2] == b"\x1f\x8b":
            return _Stream(gzip.GzipFile(fileobj=file), file)
        mapped = _Mapped(file)
        try:
            mapped.more(state)
        except (OSError, ValueError):  # no address space for it, or a file system without
            state[cap.END] = 0
            return _Stream(file, file)
        return mapped
    except OSError as e:
        file.close()
        raise EndpointError(f"pcap: cannot read {path}: {of_path(path, e)}") from e
