"""Captures of every kind: each frame whole and once, as tshark has it; and bytes that are no capture, or no more.

tshark is asked for every fourth capture by default; for all with VNETDP_CAMPAIGN=1 (`make campaign`).
"""

from __future__ import annotations

import gzip
import logging
import os
import struct
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest

from tests.support.by_hand import CAMPAIGN, frame, no_descriptor_leaks
from tests.support.capture_cases import CASES, COOKED, MORE_CASES, A, B, C
from tests.support.captures import (
    PACKED,
    block,
    enhanced,
    interface,
    lengths_by_tshark,
    pcap,
    pcapng,
    section,
    simple,
    taken,
    written,
)
from vnetdp.endpoints.capture_reader import CaptureReader, frame_at
from vnetdp.endpoints.pcap import PcapEndpoint
from vnetdp.errors import EndpointError


def plain(path: Path) -> Path:
    return path


def zipped(path: Path) -> Path:
    return written(Path(f"{path}.gz"), gzip.compress(path.read_bytes(), 1))


@pytest.mark.parametrize("wrap", [plain, zipped])
@pytest.mark.parametrize(("content", "expected"), (CASES | MORE_CASES).values(), ids=CASES | MORE_CASES)
def test_each_frame_comes_whole(
    content: bytes, expected: list[bytes], wrap: Callable[[Path], Path], tmp_path: Path
) -> None:
    with PcapEndpoint(wrap(written(tmp_path / "in", content))) as source:
        assert taken(source) == expected
        assert source.finished
        assert source.errors == 0


SHOWN = list(CASES) if CAMPAIGN else list(CASES)[::4]  # to tshark, which takes 0.3 s to start


@pytest.mark.parametrize(("content", "expected"), [CASES[name] for name in SHOWN], ids=SHOWN)
def test_tshark_has_the_same_frames(content: bytes, expected: list[bytes], tmp_path: Path) -> None:
    assert lengths_by_tshark(written(tmp_path / "in", content)) == [len(one) for one in expected]


@pytest.mark.parametrize("form", PACKED)
def test_kernels_and_python_give_the_same_frames(form: str, tmp_path: Path) -> None:
    several = [frame(n, n % 1500) for n in range(0, 3000, 7)]
    with PcapEndpoint(written(tmp_path / "in", PACKED[form](several))) as source:
        got = []
        while not source.finished:
            source.service()
            n = int(source.rows[0, 8])
            slots = source.in_frames[0].reshape(-1, source.in_frames.shape[1] // source.in_lengths.shape[1])
            got += [slots[k, : source.in_lengths[0, k]].tobytes() for k in range(n)]
            source.rows[0, 8] = 0
    assert got == [bytes(12) + one for one in several]


def test_frames_of_another_link_type_are_said_and_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    content = pcapng([A]) + pcapng([COOKED] * 200, link_type=113) + pcapng([b"IP"], link_type=101) + pcapng([B])
    with caplog.at_level(logging.WARNING), PcapEndpoint(written(tmp_path / "in", content)) as source:
        assert taken(source) == [A, B]
        assert source.counters()["dropped_error"] == 201
        assert source.errors == 0
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == 1
    assert "some frames are of link type 113, but only Ethernet (1) can be sent" in said[0]


@pytest.mark.parametrize("content", [pcap([A], network=101), pcap([], network=101), pcapng([A], link_type=101)])
def test_a_capture_without_ethernet_is_refused(content: bytes, tmp_path: Path) -> None:
    path = written(tmp_path / "in", content)
    with no_descriptor_leaks(), pytest.raises(EndpointError, match=r"link type 101, but only Ethernet \(1\)"):
        PcapEndpoint(path)


def test_interfaces_that_captured_nothing_are_nothing_wrong(tmp_path: Path) -> None:
    with PcapEndpoint(written(tmp_path / "in", pcapng([], link_type=101))) as source:
        assert taken(source) == []
        assert source.finished


BAD = {
    "an interface that is not described": (enhanced(C, "<", 7), "a packet is of an interface that its section does not"),
    "a packet longer than its block": (
        block("<", 6, struct.pack("<IIIII", 0, 0, 1, 6000, 6000) + C), "a packet is longer than its block"
    ),
    "a packet block without room for its header": (block("<", 6, bytes(8)), "a block's length is wrong"),
    "an interface block without room for it": (block("<", 1, b""), "a block's length is wrong"),
    "a block of no length": (struct.pack("<III", 6, 0, 0), "a block's length is wrong"),
    "a block of four gigabytes": (struct.pack("<II", 6, 0xFFFF_FFFC) + C, "it ends inside a record"),
    "a length that does not come again": (enhanced(C)[:-4] + struct.pack("<I", 13), "a block's length is wrong"),
    "a section of version 2": (section(version=(2, 0)), "a section of version 2, not 1"),
    "a section without a byte order": (section().replace(b"M<+\x1a", bytes(4)), "a section header without a byte order"),
    "a section header of no length": (section()[:4] + bytes(4) + section()[8:], "a block's length is wrong"),
    "a section header of four gigabytes": (section()[:4] + b"\xfc\xff\xff\xff" + section()[8:], "a block's length is wrong"),
    "a section header that ends early": (section()[:20], "it ends inside a section header"),
    "a packet in a section of no interface": (section() + simple(C), "a packet is of an interface that its section"),
    "half a block": (enhanced(C)[:50], "it ends inside a record"),
}  # fmt: skip


@pytest.mark.parametrize("wrap", [plain, zipped])
@pytest.mark.parametrize(("tail", "says"), BAD.values(), ids=BAD)
def test_what_is_damaged_is_sent_as_far_as_it_is_good(
    tail: bytes, says: str, wrap: Callable[[Path], Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = wrap(written(tmp_path / "in", pcapng([A, B]) + tail))
    with PcapEndpoint(path) as source:
        assert taken(source) == [A, B]
        assert source.finished
        assert source.errors == 1
    assert f"pcap: {path}: the capture is cut short or damaged after 2 frames: {says}" in caplog.text


@pytest.mark.parametrize("form", PACKED)
def test_cut_anywhere_the_whole_frames_count(form: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    some = [frame(n, 20 + n) for n in range(3)]
    # A file of k frames is a file of three, cut between two records.
    ends = [len(PACKED[form](some[:k])) for k in range(4)]
    whole = PACKED[form](some)
    between = {*ends, 28} if form == "pcapng" else set(ends)  # or behind the section header block
    cut = tmp_path / "cut"
    with no_descriptor_leaks():
        for length in range(len(whole) + 1):
            cut.write_bytes(whole[:length])
            caplog.clear()
            n = sum(end <= length for end in ends[1:])
            if n == 0 and length not in between:
                with pytest.raises(EndpointError) as raised:
                    PcapEndpoint(cut)
                assert any(words in str(raised.value) for words in ("cut short", "is not a pcap"))
                continue
            with PcapEndpoint(cut) as source:
                assert taken(source) == some[:n], length
                assert source.finished
                assert source.errors == (length not in between), length
                said = [r.getMessage() for r in caplog.records if r.name == "vnetdp.endpoints"]
                expected = f"pcap: {cut}: the capture is cut short or damaged after {n} frame"
                assert [expected in line for line in said] == [True] * source.errors


def test_a_damaged_gzip_gives_its_good_frames(tmp_path: Path) -> None:
    path = zipped(written(tmp_path / "in", pcap([os.urandom(1000) for _ in range(300)])))
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with PcapEndpoint(path) as source:
        assert 0 < len(taken(source)) < 300
        assert source.finished
        assert source.errors == 1


def test_what_is_compressed_in_several_parts_is_one(tmp_path: Path) -> None:
    content = pcap([frame(n) for n in range(5000)])
    path = written(tmp_path / "in", gzip.compress(content[:100_001]) + gzip.compress(content[100_001:]))
    with PcapEndpoint(path) as source:
        assert taken(source) == [frame(n) for n in range(5000)]


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\xd4",
        b"hello, world",
        b"\x1f\x8b no gzip",
        gzip.compress(b"hello", mtime=0)[:-9],
        gzip.compress(b"", mtime=0),
        b"\n\r\r\n" + bytes(40),
    ],
)
def test_what_is_no_capture_is_said_to_be_none(content: bytes, tmp_path: Path) -> None:
    path = written(tmp_path / "in.pcap", content)
    with no_descriptor_leaks(), pytest.raises(EndpointError) as raised:
        PcapEndpoint(path)
    assert str(raised.value) == f"pcap: {path} is not a pcap or pcapng capture"


def test_frames_that_are_written_while_it_is_read_are_read_too(tmp_path: Path) -> None:
    path = written(tmp_path / "in", pcap([A]))
    with PcapEndpoint(path) as source:
        with path.open("ab") as growing:
            growing.write(pcap([B] * 5000)[24:])
        assert taken(source) == [A, *[B] * 5000]
        assert source.errors == 0


def test_a_capture_that_is_cut_off_while_it_is_read_ends_there(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = written(tmp_path / "in", pcap([frame(n, 1500) for n in range(2000)]))
    with PcapEndpoint(path) as source:
        first = source.receive_frames(0, 64)
        os.truncate(path, 10_000)
        assert len(first) == 64
        assert taken(source) == []
        assert source.finished
        assert "cut short or damaged after 64 frames" in caplog.text


def test_pages_that_vanish_while_they_are_read_are_zeros(tmp_path: Path) -> None:
    path = written(tmp_path / "in", pcap([frame(n, 1500) for n in range(64)]))
    with closing(CaptureReader(path, 64)) as reader:
        assert reader.read() == 64
        os.truncate(path, 0)
        assert frame_at(reader, 63) == bytes(12 + 1500)


def test_a_capture_that_cannot_be_mapped_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_room(*_args: object, **_options: object) -> None:
        raise OSError(12, "Cannot allocate memory")

    monkeypatch.setattr("vnetdp.endpoints.capture_reader.mmap.mmap", no_room)
    content = pcap([frame(n, 1500) for n in range(3000)])
    with PcapEndpoint(written(tmp_path / "in", content)) as source:
        assert taken(source) == [frame(n, 1500) for n in range(3000)]


def test_a_bomb_takes_neither_memory_nor_the_datapaths_time(tmp_path: Path) -> None:
    """Many interfaces, zipped, are refused; a long block is passed over piece by piece, in several calls."""
    many = gzip.compress(section() + interface() * 100_000, 1)
    with (
        closing(CaptureReader(written(tmp_path / "many", many), 64)) as reader,
        pytest.raises(EndpointError, match="a section of more than 65536 interfaces"),
    ):
        while not reader.ended:
            reader.read()
    with gzip.open(tmp_path / "long", "wb", 1) as out:
        out.write(pcapng([A]) + struct.pack("<II", 0x1234, 1 << 30))
        for _ in range(150):
            out.write(bytes(1 << 20))
    with closing(CaptureReader(tmp_path / "long", 64)) as reader:
        counts = []
        with pytest.raises(EndpointError, match="after 1 frame: it ends inside a record"):
            while not reader.ended:
                counts.append(reader.read())
        assert counts[0] == 1
        assert len(counts) > 2
        assert reader.data.size < 1 << 20
