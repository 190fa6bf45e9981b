"""Captures packed by hand, and what a reader makes of them: ours, and tshark."""

from __future__ import annotations

import shutil
import struct
import subprocess
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import pytest

from tests.support.by_hand import frame
from vnetdp.endpoints.pcap import PcapEndpoint

Record = bytes | tuple[bytes, int]  # what was captured, and how long the frame was if that is more


def _split(record: Record) -> tuple[bytes, int]:
    return (record, len(record)) if isinstance(record, bytes) else record


def pcap(
    records: Iterable[Record],
    order: str = "<",
    *,
    magic: int = 0xA1B2C3D4,
    version: tuple[int, int] = (2, 4),
    network: int = 1,
    extra: bytes = b"",
    behind_header: bytes = b"",
) -> bytes:
    """Pack a pcap file; *extra* stands behind each record's header, *behind_header* behind the file's."""
    out = [struct.pack(order + "IHHIIII", magic, *version, 0, 0, 262144, network) + behind_header]
    for n, record in enumerate(records):
        data, length = _split(record)
        out.append(struct.pack(order + "IIII", 1_000_000 + n, n, len(data), length) + extra + data)
    return b"".join(out)


def block(order: str, kind: int, body: bytes) -> bytes:
    body += bytes(-len(body) % 4)
    length = struct.pack(order + "I", len(body) + 12)
    return struct.pack(order + "I", kind) + length + body + length


def options(order: str, *given: tuple[int, bytes]) -> bytes:
    return b"".join(
        struct.pack(order + "HH", code, len(value)) + value + bytes(-len(value) % 4)
        for code, value in (*given, (0, b""))
    )


def section(order: str = "<", version: tuple[int, int] = (1, 0)) -> bytes:
    return block(order, 0x0A0D0D0A, struct.pack(order + "IHHq", 0x1A2B3C4D, *version, -1))


def interface(order: str = "<", link_type: int = 1, snaplen: int = 0, *given: tuple[int, bytes]) -> bytes:
    return block(
        order, 1, struct.pack(order + "HHI", link_type, 0, snaplen) + (options(order, *given) if given else b"")
    )


def enhanced(record: Record, order: str = "<", number: int = 0, *given: tuple[int, bytes]) -> bytes:
    data, length = _split(record)
    head = struct.pack(order + "IIIII", number, 0, 1, len(data), length)
    tail = options(order, *given) if given else b""
    return block(order, 6, head + data + bytes(-len(data) % 4) + tail)


def simple(data: bytes, length: int | None = None, order: str = "<") -> bytes:
    return block(order, 3, struct.pack(order + "I", len(data) if length is None else length) + data)


def obsolete(data: bytes, order: str = "<", number: int = 0, *given: tuple[int, bytes]) -> bytes:
    """Pack a packet block of type 2, that drops were counted before."""
    head = struct.pack(order + "HHIIII", number, 7, 0, 1, len(data), len(data))
    tail = options(order, *given) if given else b""
    return block(order, 2, head + data + bytes(-len(data) % 4) + tail)


def pcapng(records: Iterable[Record], order: str = "<", link_type: int = 1) -> bytes:
    return section(order) + interface(order, link_type) + b"".join(enhanced(record, order) for record in records)


PACKED: dict[str, Callable[[Iterable[Record]], bytes]] = {"pcap": pcap, "pcapng": pcapng}


def written(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def taken(endpoint: PcapEndpoint) -> list[bytes]:
    """Return the frames that the endpoint gives, without their headers."""
    got: list[bytes] = []
    while frames := endpoint.receive_frames(0, 3):
        assert len(frames) <= 3
        assert all(one[:12] == bytes(12) for one in frames)
        got.extend(one[12:] for one in frames)
    return got


def tshark(path: Path, *fields: str) -> list[list[str]]:
    if shutil.which("tshark") is None:
        pytest.skip("tshark isn't installed")
    names = [part for field in fields for part in ("-e", field)]
    argv = ["tshark", "-n", "-r", str(path), "-T", "fields", *names]
    out = subprocess.run(argv, check=True, capture_output=True, text=True, timeout=120).stdout
    return [line.split("\t") for line in out.splitlines()]


def lengths_by_tshark(path: Path) -> list[int]:
    """Return what tshark captured of each Ethernet frame, in bytes without the FCS."""
    rows = tshark(path, "frame.encap_type", "frame.cap_len", "eth.fcs")
    return [int(length) - 4 * bool(fcs) for encapsulation, length, fcs in rows if encapsulation == "1"]


def frames(*numbers: int) -> Sequence[bytes]:
    """Return frames of odd and even lengths, that tell their number."""
    return [frame(n, 60 + n) for n in numbers]
