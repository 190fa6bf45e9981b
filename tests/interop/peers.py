"""What tests with real peers share: capture files, and our own commands as a user runs them."""

from __future__ import annotations

import json
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final, Self

from vnetdp.endpoints.base import Endpoint
from vnetdp.programs.drive import drive
from vnetdp.virtio.features import parse

ALL: Final = (1 << 64) - 1
# Lengths around everything that cuts frames: buffers of 2048 bytes with and without headers, cache lines, MTUs.
SIZES = (60, 64, 65, 127, 128, 512, 1500, 1514, 1515, 2036, 2037, 2048, 2049, 4096, 8191, 8999, 9000)
_PATIENCE = 240.0  # seconds: the first command of a cold cache compiles


def write_pcap(path: Path, frames: Sequence[bytes]) -> None:
    """Write a capture file: little endian, microseconds, Ethernet."""
    records = b"".join(struct.pack("<IIII", k, 0, len(f), len(f)) + f for k, f in enumerate(frames))
    path.write_bytes(struct.pack("<IHHiIII", 0xA1B2C3D4, 2, 4, 0, 0, 65535, 1) + records)


def read_pcap(path: Path) -> list[bytes]:
    """Return the frames of a little-endian capture file; none may be cut short."""
    data = path.read_bytes()
    assert struct.unpack_from("<I", data)[0] in (0xA1B2C3D4, 0xA1B23C4D), path
    frames = []
    at = 24
    while at < len(data):
        captured, length = struct.unpack_from("<II", data, at + 8)
        assert captured == length <= len(data) - at - 16, path
        frames.append(data[at + 16 : at + 16 + length])
        at += 16 + length
    return frames


def exchanged(frame: bytes) -> bytes:
    """Return *frame* with its addresses exchanged, as macswap sends it back."""
    return frame[6:12] + frame[:6] + frame[12:]


def driven(endpoint: Endpoint, path: Path, features: str = "", **options: Any) -> dict[str, Any]:
    """Drive *endpoint* on the socket *path* until it is done, in this process; *features* as --features has them."""
    return drive(endpoint, str(path), lambda: False, lambda _: None, features=parse(features), **options)


class Command:
    """A `vnetdp` command, running; *folder* is for its report and for what it prints."""

    def __init__(self, folder: Path, name: str, *args: str) -> None:
        self._report = folder / f"{name}.json"
        self._log = folder / f"{name}.log"
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "vnetdp", "-v", *args, "--json", str(self._report)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
            )

    @property
    def log(self) -> str:
        return self._log.read_text()

    def wait_until_it_says(self, text: str) -> None:
        until = time.monotonic() + _PATIENCE
        while text not in self.log:
            assert self._process.poll() is None, self.log
            assert time.monotonic() < until, self.log
            time.sleep(0.01)

    def finish(self) -> dict[str, Any]:
        """Wait for its end, which must be a good one, and return its report."""
        status = self._process.wait(_PATIENCE)
        assert status == 0, self.log
        report: dict[str, Any] = json.loads(self._report.read_text())
        return report

    def stop(self) -> dict[str, Any]:
        """Ask it to end, and return its report."""
        self._process.send_signal(signal.SIGTERM)
        return self.finish()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        if self._process.poll() is None:
            self._process.kill()
            self._process.wait()
