"""CaptureWriter: frames into a pcap or pcapng file, Ethernet, with times in ns.

Every batch is handed to the kernel at once: a process that is killed leaves whole records.
"""

from __future__ import annotations

import errno
import os
import select
import stat
import struct
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Final

from ..errors import EndpointError
from ..system.limits import of_path

_SNAPLEN: Final = 262144  # tcpdump's
_ETHERNET: Final = 1
_NS: Final = 1_000_000_000
_LAST_WORDS_MS: Final = 1000  # how long a reader may take none of the bytes kept when the file is closed

_PCAP_HEADER = struct.pack("<IHHIIII", 0xA1B23C4D, 2, 4, 0, 0, _SNAPLEN, _ETHERNET)


def _pcap_record(frame: bytes, ns: int) -> bytes:
    return struct.pack("<IIII", ns // _NS & 0xFFFF_FFFF, ns % _NS, len(frame), len(frame)) + frame


def _block(kind: int, body: bytes) -> bytes:
    body += bytes(-len(body) % 4)
    length = struct.pack("<I", len(body) + 12)
    return struct.pack("<I", kind) + length + body + length


_PCAPNG_HEADER = _block(0x0A0D0D0A, struct.pack("<IHHq", 0x1A2B3C4D, 1, 0, -1)) + _block(
    1, struct.pack("<HHIHHB3xHH", _ETHERNET, 0, _SNAPLEN, 9, 1, 9, 0, 0)  # if_tsresol: 10**-9 s; opt_endofopt
)  # fmt: skip


def _pcapng_record(frame: bytes, ns: int) -> bytes:
    return _block(6, struct.pack("<IIIII", 0, ns >> 32, ns & 0xFFFF_FFFF, len(frame), len(frame)) + frame)


class CaptureWriter:
    """A file to write frames to, overwritten: pcapng if its name ends so, else pcap.

    A FIFO or a pipe is never waited for: frames that its reader has not taken yet are kept (`waiting`).
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.waiting = 0  # frames of which the end is kept
        self._kept = memoryview(b"")
        self._record: Callable[[bytes, int], bytes]
        header, self._record = (
            (_PCAPNG_HEADER, _pcapng_record) if path.suffix == ".pcapng" else (_PCAP_HEADER, _pcap_record)
        )
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NONBLOCK
        fresh = not path.exists()
        try:
            self._fd = os.open(path, flags, 0o666)
        except (OSError, ValueError) as e:
            raise _cannot_write(path, e) from e
        try:
            self._regular = stat.S_ISREG(os.fstat(self._fd).st_mode)
            self._put(header, 0)
        except EndpointError:
            os.close(self._fd)
            if fresh:
                path.unlink(missing_ok=True)
            raise

    def fileno(self) -> int:
        return self._fd

    def write(self, frames: Sequence[bytes], now_ns: int | None = None) -> None:
        """Append Ethernet frames, stamped with *now_ns*; None: the time it is.

        EndpointError, and none is appended, if that fails.
        """
        stamps = (time.time_ns() if now_ns is None else now_ns for _ in frames)
        self._put(b"".join(map(self._record, frames, stamps)), len(frames))

    def _put(self, data: bytes, frames: int) -> None:
        self._kept = memoryview(b"".join((self._kept, data)))
        self.waiting += frames
        self.flush()

    def flush(self) -> None:
        """Write the bytes that wait, as far as the reader takes them. EndpointError, and none wait then, if that fails."""
        whole = len(self._kept)
        try:
            while self._kept:
                self._kept = self._kept[os.write(self._fd, self._kept) :]
        except BlockingIOError:
            return
        except OSError as e:
            if self._regular:  # of this batch nothing may stay: half a record would end the file for every reader
                with suppress(OSError):
                    at = os.lseek(self._fd, 0, os.SEEK_CUR) - (whole - len(self._kept))
                    os.ftruncate(self._fd, at)
                    os.lseek(self._fd, at, os.SEEK_SET)
            self._kept = memoryview(b"")
            self.waiting = 0
            raise _cannot_write(self.path, e) from e
        self.waiting = 0

    def abandon(self) -> None:
        """Close the file, and forget the bytes that wait."""
        fd, self._fd = self._fd, -1
        self._kept = memoryview(b"")
        os.close(fd)

    def close(self) -> None:
        """Close the file; EndpointError if that, or the last write, failed."""
        if self._fd < 0:
            return
        poll = select.poll()
        poll.register(self._fd, select.POLLOUT)
        try:
            while self._kept:
                if not poll.poll(_LAST_WORDS_MS):
                    raise EndpointError(
                        f"pcap: nobody reads {self.path} any more: the last {self.waiting} frames are lost"
                    )
                self.flush()
        finally:
            fd, self._fd = self._fd, -1
            try:
                os.close(fd)
            except OSError as e:
                raise _cannot_write(self.path, e) from e


def _cannot_write(path: Path, error: OSError | ValueError) -> EndpointError:
    if getattr(error, "errno", None) == errno.ENXIO and path.is_fifo():
        return EndpointError(f"pcap: nobody reads the FIFO {path}: start its reader first")
    return EndpointError(f"pcap: cannot write {path}: {of_path(path, error, to_make=True)}")
