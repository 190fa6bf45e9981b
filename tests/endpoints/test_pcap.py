"""Captures: what goes out comes back, tshark reads it, and a bad file is called by its fault."""

from __future__ import annotations

import gzip
import logging
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from scapy.utils import RawPcapNgWriter, RawPcapWriter

from tests.by_hand import frame, no_descriptor_leaks, wait_for
from tests.endpoints.joined import guest_of, receive_all, send_all
from vnetdp.endpoints.pcap import PcapEndpoint
from vnetdp.errors import EndpointError

FORMATS = ("pcap", "pcapng")
FRAMES = [frame(n, length) for n, length in enumerate([14, 60, 61, 62, 63, 1514, 9014, *[64] * 150])]
SENT = [one for one in FRAMES if len(one) < 2000]  # what fits a buffer of the guest's


def capture(path: Path, frames: list[bytes], linktype: int = 1, **options: Any) -> Path:
    """Write a capture with Scapy's own writers, not with ours."""
    writer: RawPcapWriter | RawPcapNgWriter
    if path.suffix == ".pcapng":
        writer = RawPcapNgWriter(str(path))
        writer.linktype = linktype
    else:
        writer = RawPcapWriter(str(path), linktype=linktype, **options)
    writer.write_header(None)
    for n, one in enumerate(frames):
        writer.write_packet(one, sec=1_000_000 + n, usec=n)
    writer.close()
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
    argv = ["tshark", "-r", str(path), "-T", "fields", *names]
    out = subprocess.run(argv, check=True, capture_output=True, text=True, timeout=120).stdout
    return [line.split("\t") for line in out.splitlines()]


@pytest.mark.parametrize("suffix", FORMATS)
def test_what_the_guest_sends_can_be_read_back(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"out.{suffix}"
    with PcapEndpoint(None, path) as sink, guest_of(sink) as driver:
        send_all(driver, SENT)
        wait_for(lambda: sink.counters()["to_wire"] == len(SENT), "all were written")
    with PcapEndpoint(path) as source:
        assert taken(source) == SENT
        assert source.errors == 0


@pytest.mark.parametrize("suffix", FORMATS)
def test_tshark_reads_what_we_write(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"out.{suffix}"
    with PcapEndpoint(None, path) as sink:
        sink.transmit_frames(0, [bytes(12) + one for one in FRAMES])
        # Whoever reads along sees each batch at once, not when the file is closed.
        rows = tshark(path, "frame.len", "frame.cap_len", "frame.time_epoch", "eth.dst")
    assert [(int(row[0]), int(row[1])) for row in rows] == [(len(one), len(one)) for one in FRAMES]
    assert [row[3].replace(":", "") for row in rows] == [one[:6].hex() for one in FRAMES]
    times = [row[2] for row in rows]
    assert times == sorted(times)
    assert any(not time.endswith("000") for time in times), "timestamps have microseconds only"


@pytest.mark.parametrize("suffix", FORMATS)
def test_an_empty_capture_is_a_capture(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"out.{suffix}"
    PcapEndpoint(None, path).close()
    assert tshark(path, "frame.len") == []
    with PcapEndpoint(path) as source:
        assert taken(source) == []
        assert source.finished
        assert source.errors == 0


def plain(path: Path) -> Path:
    return path


def zipped(path: Path) -> Path:
    with gzip.open(f"{path}.gz", "wb") as out:
        out.write(path.read_bytes())
    return Path(f"{path}.gz")


@pytest.mark.parametrize("wrap", [plain, zipped])
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("in.pcap", {}),
        ("in.pcap", {"endianness": ">"}),
        ("in.pcap", {"nano": True}),
        ("in.pcapng", {}),
        ("in.cap", {"endianness": ">", "nano": True}),
    ],
)
def test_every_format_reaches_the_guest(
    name: str, options: dict[str, Any], wrap: Callable[[Path], Path], tmp_path: Path
) -> None:
    path = wrap(capture(tmp_path / name, FRAMES, **options))
    with PcapEndpoint(path) as source, guest_of(source) as driver:
        assert receive_all(driver, len(FRAMES)) == FRAMES
        wait_for(lambda: source.finished, "the capture was read to its end")
        assert source.gives
        assert source.counters()["from_wire"] == len(FRAMES)
        assert source.errors == 0


def test_a_capture_of_several_interfaces(tmp_path: Path) -> None:
    path = tmp_path / "in.pcapng"
    writer = RawPcapNgWriter(str(path))
    writer.linktype = 1
    writer.write_header(None)
    for n, one in enumerate(FRAMES[:20]):
        writer._write_packet(one, linktype=1, sec=n, ifname=f"eth{n % 3}".encode())
    writer.close()
    with PcapEndpoint(path) as source:
        assert taken(source) == FRAMES[:20]


def test_one_file_in_another_out(tmp_path: Path) -> None:
    source = capture(tmp_path / "in.pcap", FRAMES)
    with PcapEndpoint(source, tmp_path / "out.pcapng", queues=2) as wire, guest_of(wire) as driver:
        assert receive_all(driver, len(FRAMES)) == FRAMES
        send_all(driver, SENT[:9])
        wait_for(lambda: wire.counters()["to_wire"] == 9, "all were written")
    with PcapEndpoint(tmp_path / "out.pcapng") as written:
        assert taken(written) == SENT[:9]
    assert source.read_bytes() == capture(tmp_path / "again.pcap", FRAMES).read_bytes()


def test_only_a_source_gives_and_finishes(tmp_path: Path) -> None:
    with PcapEndpoint(None, tmp_path / "out.pcap") as sink:
        assert not sink.gives
        assert not sink.finished


def test_a_longer_frame_than_any_is_dropped_and_counted(tmp_path: Path) -> None:
    frames = [frame(1), bytes(66_000), frame(2)]
    with PcapEndpoint(capture(tmp_path / "in.pcap", frames)) as source, guest_of(source) as driver:
        assert receive_all(driver, 2) == [frame(1), frame(2)]
        assert source.counters()["dropped_long"] == 1


@pytest.mark.parametrize("suffix", FORMATS)
def test_cut_anywhere_the_whole_frames_count(suffix: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    frames = [frame(n, 20 + n) for n in range(3)]
    # A file of k frames is a file of three, cut between two records.
    ends = [capture(tmp_path / f"{k}.{suffix}", frames[:k]).stat().st_size for k in range(4)]
    whole = capture(tmp_path / f"whole.{suffix}", frames).read_bytes()
    between = {*ends, 28} if suffix == "pcapng" else set(ends)  # or behind the section header block
    cut = tmp_path / f"cut.{suffix}"
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
                assert taken(source) == frames[:n], length
                assert source.finished
                assert source.errors == (length not in between), length
                said = [r.getMessage() for r in caplog.records if r.name == "vnetdp.endpoints"]
                expected = f"pcap:{cut}: the capture is cut short or damaged after {n} frames"
                assert [expected in line for line in said] == [True] * source.errors


def test_a_damaged_gzip_gives_its_good_frames(tmp_path: Path) -> None:
    path = zipped(capture(tmp_path / "in.pcap", [os.urandom(1000) for _ in range(300)]))
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])
    with PcapEndpoint(path) as source:
        assert 0 < len(taken(source)) < 300
        assert source.finished
        assert source.errors == 1


@pytest.mark.parametrize("suffix", FORMATS)
@pytest.mark.parametrize("frames", [[], [frame(1)]])
def test_only_ethernet_can_be_sent(suffix: str, frames: list[bytes], tmp_path: Path) -> None:
    path = capture(tmp_path / f"in.{suffix}", frames, linktype=101)
    if suffix == "pcapng" and not frames:
        PcapEndpoint(path).close()  # nothing to send, nothing wrong
        return
    with no_descriptor_leaks(), pytest.raises(EndpointError, match=r"link type 101, but only Ethernet \(1\)"):
        PcapEndpoint(path)


@pytest.mark.parametrize("content", [b"", b"\xd4", b"hello, world", b"\x1f\x8b no gzip", b"\n\r\r\n" + bytes(40)])
def test_what_is_no_capture_is_said_to_be_none(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "in.pcap"
    path.write_bytes(content)
    with no_descriptor_leaks(), pytest.raises(EndpointError) as raised:
        PcapEndpoint(path)
    assert str(raised.value) == f"pcap: {path} is not a pcap or pcapng capture"


def test_files_that_cannot_be_used_are_named(tmp_path: Path) -> None:
    good = capture(tmp_path / "good.pcap", FRAMES)
    content = good.read_bytes()
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "link.pcap").symlink_to(good)
    missing = tmp_path / "none" / "x.pcap"
    cases: list[tuple[Path | None, Path | None, str]] = [
        (None, None, "pcap: neither a capture to read nor one to write"),
        (missing, None, f"pcap: cannot read {missing}: No such file or directory"),
        (tmp_path, None, f"pcap: {tmp_path} is not a regular file"),
        (tmp_path / "fifo", None, f"pcap: {tmp_path / 'fifo'} is not a regular file"),
        (good, missing, f"pcap: cannot write {missing}: No such file or directory"),
        (good, tmp_path, f"pcap: cannot write {tmp_path}: Is a directory"),
        (good, good, f"pcap: {good} is both read and written"),
        (good, tmp_path / "link.pcap", f"pcap: {tmp_path / 'link.pcap'} is both read and written"),
        (None, Path("/dev/full"), "pcap: cannot write /dev/full: No space left on device"),
    ]
    for source, sink, says in cases:
        with no_descriptor_leaks(), pytest.raises(EndpointError) as raised:
            PcapEndpoint(source, sink)
        assert str(raised.value).startswith(says)
        assert "\n" not in str(raised.value)
    assert good.read_bytes() == content


def test_a_bad_source_leaves_the_sink_alone(tmp_path: Path) -> None:
    out = tmp_path / "out.pcap"
    out.write_bytes(b"precious")
    with pytest.raises(EndpointError):
        PcapEndpoint(tmp_path / "missing.pcap", out)
    assert out.read_bytes() == b"precious"


def test_a_full_disk_costs_frames_not_the_datapath(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    out = tmp_path / "out.pcap"
    with caplog.at_level(logging.WARNING), PcapEndpoint(None, out) as sink:
        full = os.open("/dev/full", os.O_WRONLY)
        os.dup2(full, sink._writer.fileno())  # type: ignore[union-attr]
        os.close(full)
        with guest_of(sink) as driver:
            send_all(driver, [frame(n) for n in range(10)])
            wait_for(lambda: sink.counters()["dropped_error"] == 10, "all were refused")
    assert "No space left on device" in caplog.text
    assert len([r for r in caplog.records if r.name == "vnetdp.endpoints"]) == 1


def test_nothing_is_left_open(tmp_path: Path) -> None:
    source = capture(tmp_path / "in.pcap", FRAMES)
    zip_source = zipped(source)
    with no_descriptor_leaks():
        for path in (source, zip_source, capture(tmp_path / "in.pcapng", FRAMES)):
            for out in ("out.pcap", "out.pcapng"):
                with PcapEndpoint(path, tmp_path / out) as endpoint:
                    taken(endpoint)
