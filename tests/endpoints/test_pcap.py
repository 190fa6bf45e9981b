"""The endpoint of captures: what goes out comes back, tshark reads it, and a file that can't be used is named."""

from __future__ import annotations

import logging
import os
import stat
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.endpoints.joined import guest_of, receive_all, send_all
from tests.support.by_hand import frame, no_descriptor_leaks, wait_for
from tests.support.captures import PACKED, pcap, pcapng, taken, tshark, written
from vnetdp.endpoints.pcap import PcapEndpoint
from vnetdp.errors import EndpointError
from vnetdp_kernels import rows as r

FORMATS = ("pcap", "pcapng")
FRAMES = [frame(n, length) for n, length in enumerate([14, 60, 61, 62, 63, 1514, 9014, *[64] * 150])]
SENT = [one for one in FRAMES if len(one) < 2000]  # what fits a buffer of the guest's


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


def test_one_file_in_another_out(tmp_path: Path) -> None:
    source = written(tmp_path / "in.pcap", pcap(FRAMES))
    with PcapEndpoint(source, tmp_path / "out.pcapng", queues=2) as wire, guest_of(wire) as driver:
        assert receive_all(driver, len(FRAMES)) == FRAMES
        send_all(driver, SENT[:9])
        wait_for(lambda: wire.counters()["to_wire"] == 9, "all were written")
    with PcapEndpoint(tmp_path / "out.pcapng") as again:
        assert taken(again) == SENT[:9]
    assert source.read_bytes() == pcap(FRAMES)


def test_only_a_source_gives_and_finishes(tmp_path: Path) -> None:
    with PcapEndpoint(None, tmp_path / "out.pcap") as sink:
        assert not sink.gives
        assert not sink.finished


def test_a_longer_frame_than_any_is_dropped_and_counted(tmp_path: Path) -> None:
    frames = [frame(1), bytes(66_000), frame(2)]
    with PcapEndpoint(written(tmp_path / "in.pcap", pcap(frames))) as source, guest_of(source) as driver:
        assert receive_all(driver, 2) == [frame(1), frame(2)]
        assert source.counters()["dropped_long"] == 1


def test_files_that_cannot_be_used_are_named(tmp_path: Path) -> None:
    good = written(tmp_path / "good.pcap", pcap(FRAMES))
    content = good.read_bytes()
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "link.pcap").symlink_to(good)
    missing = tmp_path / "none" / "x.pcap"
    cases: list[tuple[Path | None, Path | None, str]] = [
        (None, None, "pcap: no capture is named: write pcap:IN[,OUT]"),
        (
            missing,
            None,
            f"pcap: cannot read {missing}: No such file or directory: there is no folder {missing.parent}: ",
        ),
        (tmp_path, None, f"pcap: {tmp_path} is a folder: name a capture file in it"),
        (tmp_path / "fifo", None, f"pcap: {tmp_path / 'fifo'} is not a regular file"),
        (good, missing, f"pcap: cannot write {missing}: No such file or directory"),
        (good, tmp_path, f"pcap: cannot write {tmp_path}: Is a directory"),
        (good, good, f"pcap: {good} is both read and written"),
        (good, tmp_path / "link.pcap", f"pcap: {tmp_path / 'link.pcap'} is both read and written"),
        (None, Path("/dev/full"), "pcap: cannot write /dev/full: No space left on device"),
        (None, tmp_path / "fifo", f"pcap: nobody reads the FIFO {tmp_path / 'fifo'}: start its reader first"),
        (Path("a\0b"), None, "pcap: cannot read a\0b: "),
        (None, Path("a\0b"), "pcap: cannot write a\0b: "),
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


@pytest.mark.parametrize("form", FORMATS)
def test_a_capture_reaches_the_guest(form: str, tmp_path: Path) -> None:
    path = written(tmp_path / "in", PACKED[form](FRAMES))
    with PcapEndpoint(path) as source, guest_of(source) as driver:
        assert receive_all(driver, len(FRAMES)) == FRAMES
        wait_for(lambda: source.finished, "the capture was read to its end")
        assert source.gives
        assert source.counters()["from_wire"] == len(FRAMES)
        assert source.errors == 0


def test_a_frame_shorter_than_its_header_is_dropped_and_counted(tmp_path: Path) -> None:
    content = pcap([b"", frame(1, 13), frame(2)])
    with PcapEndpoint(written(tmp_path / "in", content)) as source, guest_of(source) as driver:
        assert receive_all(driver, 1) == [frame(2)]
        assert source.counters()["dropped_short"] == 2


# --- a full disk, a FIFO, a signal ---


@contextmanager
def little_disk(folder: Path, size: int) -> Iterator[Path]:
    """Give a file system of so many bytes, in a namespace of nobody else's: only root may mount."""
    folder.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size}", "none", folder], capture_output=True, check=False
    )
    if done.returncode:
        pytest.skip("mounting needs rights that we do not have")
    try:
        yield folder
    finally:
        subprocess.run(["umount", folder], check=True)


@pytest.mark.parametrize("suffix", FORMATS)
def test_a_full_disk_costs_frames_not_the_datapath(
    suffix: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with little_disk(tmp_path / "disk", 1 << 16) as disk:
        out = disk / f"out.{suffix}"
        with caplog.at_level(logging.WARNING), PcapEndpoint(None, out) as sink, guest_of(sink) as driver:
            send_all(driver, [frame(n, 1500) for n in range(60)])
            wait_for(lambda: sink.counters()["to_wire"] == 60, "all were taken")
            wait_for(lambda: sink.counters()["dropped_error"] > 0, "some were refused")
            ballast = disk / "ballast"  # what frees room again lets it go on
            assert not ballast.exists()
            lost = sink.counters()["dropped_error"]
        with PcapEndpoint(out) as source:
            assert len(taken(source)) == 60 - lost
            assert source.errors == 0
    assert "No space left on device" in caplog.text
    assert len([r for r in caplog.records if r.name == "vnetdp.endpoints"]) == 1


def test_a_full_disk_that_has_room_again_is_written_on(tmp_path: Path) -> None:
    with little_disk(tmp_path / "disk", 1 << 16) as disk, PcapEndpoint(None, disk / "out.pcap") as sink:
        ballast = written(disk / "ballast", bytes(50_000))
        sink.transmit_frames(0, [bytes(12) + frame(1)])
        with pytest.raises(EndpointError, match="No space left"):
            sink.transmit_frames(0, [bytes(12) + frame(2, 1500)] * 40)
        ballast.unlink()
        sink.transmit_frames(0, [bytes(12) + frame(3)])
        with PcapEndpoint(disk / "out.pcap") as source:
            assert taken(source) == [frame(1), frame(3)]


def test_a_new_file_on_a_full_disk_is_not_left_behind(tmp_path: Path) -> None:
    with little_disk(tmp_path / "disk", 1 << 12) as disk:
        written(disk / "ballast", bytes(1 << 12))
        with pytest.raises(EndpointError, match="No space left on device"):
            PcapEndpoint(None, disk / "out.pcap")
        assert [path.name for path in disk.iterdir()] == ["ballast"]


def test_the_reader_of_a_fifo_gets_every_frame_at_its_own_pace(tmp_path: Path) -> None:
    fifo = tmp_path / "fifo.pcapng"
    os.mkfifo(fifo)
    reader = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK)
    os.set_blocking(reader, True)
    got: list[bytes] = []
    sent = [frame(n, 1500) for n in range(400)]  # ten times what a pipe holds

    def read_all() -> None:
        with open(reader, "rb") as file:
            got.append(file.read())

    thread = threading.Thread(target=read_all)
    with PcapEndpoint(None, fifo) as sink, guest_of(sink) as driver:
        send_all(driver, sent)
        wait_for(lambda: bool(sink.rows[0, r.EP_BLOCKED]), "frames wait in the ring, since nobody reads")
        thread.start()
        wait_for(lambda: sink.counters()["to_wire"] == len(sent), "all were taken")
        wait_for(lambda: not sink.rows[0, (r.EP_OUT_COUNT, r.EP_BLOCKED)].any(), "the last one is read, too")
    thread.join()
    with PcapEndpoint(written(tmp_path / "got", got[0])) as source:
        assert taken(source) == sent


def test_a_fifo_whose_reader_has_gone_costs_frames_not_the_datapath(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    os.mkfifo(tmp_path / "fifo")
    reader = os.open(tmp_path / "fifo", os.O_RDONLY | os.O_NONBLOCK)
    with PcapEndpoint(None, tmp_path / "fifo") as sink, guest_of(sink) as driver:
        os.close(reader)
        send_all(driver, [frame(n) for n in range(10)])
        wait_for(lambda: sink.counters()["dropped_error"] == 10, "all were refused")
    assert "Broken pipe" in caplog.text


def test_a_reader_that_reads_no_more_does_not_hold_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vnetdp.endpoints.capture_writer._LAST_WORDS_MS", 10)
    os.mkfifo(tmp_path / "fifo")
    reader = os.open(tmp_path / "fifo", os.O_RDONLY | os.O_NONBLOCK)
    with no_descriptor_leaks():
        with PcapEndpoint(None, tmp_path / "fifo") as sink:
            sink.transmit_frames(0, [bytes(12) + frame(n, 1500) for n in range(100)])
            assert not sink.takes_frames(0)
        assert sink.errors == 1
    os.close(reader)


def test_a_run_that_is_killed_leaves_a_capture(tmp_path: Path) -> None:
    out = tmp_path / "out.pcap"
    argv = [sys.executable, "-m", "vnetdp", "link", "generate:rate=2k", f"pcap:,{out}"]
    with subprocess.Popen(argv, stderr=subprocess.DEVNULL) as run:
        try:
            wait_for(lambda: out.exists() and out.stat().st_size > 1000, "frames were written")
        finally:
            run.kill()
    with PcapEndpoint(out) as source:
        assert len(taken(source)) > 10
        assert source.errors == 0


def test_the_file_is_made_as_the_umask_has_it(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        PcapEndpoint(None, tmp_path / "out.pcap").close()
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "out.pcap").stat().st_mode) == 0o640


def test_nothing_is_left_open(tmp_path: Path) -> None:
    source = written(tmp_path / "in.pcap", pcap(FRAMES))
    with no_descriptor_leaks():
        for path in (source, written(tmp_path / "in.pcapng", pcapng(FRAMES))):
            for out in ("out.pcap", "out.pcapng"):
                with PcapEndpoint(path, tmp_path / out) as endpoint:
                    taken(endpoint)
