"""`drive` against `serve`: our front end, our back end, and between them a socket and real rings in shared memory."""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.interop.peers import SIZES, driven, exchanged, read_pcap, write_pcap
from tests.support.by_hand import PATIENCE, frame, no_descriptor_leaks, scaled, wait_for
from vnetdp.endpoints.base import Endpoint
from vnetdp.endpoints.loopback import EchoEndpoint, GenerateEndpoint, MacswapEndpoint, NullEndpoint
from vnetdp.endpoints.pcap import PcapEndpoint
from vnetdp.errors import ConfigError
from vnetdp.programs import drive as drive_module
from vnetdp.programs.drive import drive
from vnetdp.vhost_user.back_end.server import Server
from vnetdp.vhost_user.front_end.front_end import VhostUserFrontEnd
from vnetdp.virtio.features import parse

PLAIN = "-mrg_rxbuf,-in_order,-event_idx,-indirect_desc"


@contextmanager
def served(endpoint: Endpoint, path: Path, **options: Any) -> Iterator[Server]:
    """Serve *endpoint* on *path*, in a thread."""
    stop = threading.Event()
    reader, writer = os.pipe()
    with ExitStack() as stack:
        stack.callback(os.close, reader)
        stack.callback(os.close, writer)
        server = stack.enter_context(Server(endpoint, str(path), **options))
        thread = threading.Thread(target=server.run, args=(stop.is_set, reader), name="server")
        thread.start()
        try:
            yield server
        finally:
            stop.set()
            os.write(writer, b"x")
            thread.join()


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A socket. Frames on their way are waited for as long as it takes."""
    for name in ("_LOSS_S", "_SETTLE_S"):
        monkeypatch.setattr(drive_module, name, PATIENCE)
    with no_descriptor_leaks():
        yield tmp_path / "s"


# Each value of each setting meets both loops, and each size every kind of buffer.
@pytest.mark.parametrize(
    ("loop", "features", "ring", "pairs", "size", "listen"),
    [
        (EchoEndpoint, "", 256, 1, 64, False),
        (MacswapEndpoint, "", 1024, 2, 1500, False),
        (EchoEndpoint, "-in_order", 64, 2, 9000, True),
        (MacswapEndpoint, "-in_order", 256, 1, 9000, False),
        (EchoEndpoint, "-mrg_rxbuf", 1024, 1, 9000, False),
        (MacswapEndpoint, "-mrg_rxbuf", 64, 2, 64, True),
        (EchoEndpoint, PLAIN, 256, 2, 1500, True),
        (MacswapEndpoint, PLAIN, 64, 1, 9000, False),
        (EchoEndpoint, f"{PLAIN},-version_1", 256, 1, 64, False),
        (MacswapEndpoint, f"{PLAIN},-version_1", 256, 1, 9000, True),
        (MacswapEndpoint, "-version_1", 256, 1, 1500, False),
    ],
)  # fmt: skip
def test_every_frame_comes_back(
    path: Path, loop: type[Endpoint], features: str, ring: int, pairs: int, size: int, listen: bool
) -> None:
    count = scaled(20_000, 200)
    with loop(pairs) as endpoint, GenerateEndpoint(pairs, size, count=count) as guest:
        with served(endpoint, path, queue_pairs=pairs, connect=listen) as server:
            report = driven(guest, path, features, listen=listen, queue_pairs=pairs, num=ring)
        assert (server.served, server.refused) == (1, 0)
    assert report["tx_packets"] == report["rx_packets"] == count * pairs
    assert report["bad_packets"] == 0
    assert report["ledger"] == {
        "sent": count * pairs, "delivered": count * pairs, "lost": 0, "duplicated": 0, "reordered": 0, "corrupted": 0,
    }  # fmt: skip


@pytest.mark.parametrize("features", ["", "-mrg_rxbuf", PLAIN])
@pytest.mark.parametrize("loop", [EchoEndpoint, MacswapEndpoint])
def test_a_capture_comes_back_byte_for_byte(path: Path, tmp_path: Path, loop: type[Endpoint], features: str) -> None:
    frames = [frame(n, SIZES[n % len(SIZES)]) for n in range(scaled(1000, 100))]
    write_pcap(tmp_path / "in.pcap", frames)
    capture = PcapEndpoint(tmp_path / "in.pcap", tmp_path / "out.pcap")
    with loop() as endpoint, capture as guest, served(endpoint, path):
        report = driven(guest, path, features)
    assert report["tx_packets"] == report["rx_packets"] == len(frames)
    wanted = [exchanged(f) for f in frames] if loop is MacswapEndpoint else frames
    assert read_pcap(tmp_path / "out.pcap") == wanted


@pytest.mark.parametrize("features", ["", "-mrg_rxbuf"])
def test_a_guest_sends_a_capture_of_the_back_ends_back(path: Path, tmp_path: Path, features: str) -> None:
    frames = [frame(n, SIZES[n % len(SIZES)]) for n in range(scaled(1000, 100))]
    write_pcap(tmp_path / "in.pcap", frames)
    capture = PcapEndpoint(tmp_path / "in.pcap", tmp_path / "out.pcap")
    enough = threading.Event()
    with capture as endpoint, EchoEndpoint() as guest, served(endpoint, path):
        thread = threading.Thread(
            target=drive, args=(guest, str(path), enough.is_set, lambda _: None),
            kwargs={"mtu": 9000, "features": parse(features)},
        )  # fmt: skip
        thread.start()
        wait_for(lambda: endpoint.counters()["to_wire"] == len(frames), "all frames are back")
        enough.set()
        thread.join()
    assert read_pcap(tmp_path / "out.pcap") == frames


@pytest.mark.parametrize(("features", "mtu", "fits"), [("", 1500, True), ("-mrg_rxbuf", 1500, False),
                                                      ("-mrg_rxbuf", 8986, True)])  # fmt: skip
def test_a_long_frame_needs_buffers_that_merge_or_are_long_enough(
    path: Path, features: str, mtu: int, fits: bool
) -> None:
    count = scaled(2000, 50)
    with GenerateEndpoint(size=9000, count=count) as endpoint, NullEndpoint() as guest:

        def all_came() -> bool:
            return guest.counters()["to_wire"] + endpoint.counters()["dropped_no_buffer"] >= count

        with served(endpoint, path):
            report = drive(guest, str(path), all_came, lambda _: None, features=parse(features), mtu=mtu)
        dropped = endpoint.counters()["dropped_no_buffer"]
    assert (report["rx_packets"], dropped) == ((count, 0) if fits else (0, count))


def test_a_back_end_with_fewer_queue_pairs_is_told_at_once(path: Path) -> None:
    with (
        EchoEndpoint() as endpoint,
        GenerateEndpoint(2, count=1) as guest,
        served(endpoint, path),
        pytest.raises(ConfigError, match="the back end has 1 queue pairs, and 2 are asked for: ask for 1"),
    ):
        driven(guest, path, queue_pairs=2, wait_s=600.0)


def test_the_rate_is_of_the_time_between_the_first_and_the_last_frame(path: Path) -> None:
    count = scaled(200, 50)
    with EchoEndpoint() as endpoint, GenerateEndpoint(rate=1000.0, count=count) as guest, served(endpoint, path):
        began = time.monotonic()
        report = driven(guest, path)
        took = time.monotonic() - began
    assert 0.9 * count / 1000 < report["seconds"] < took - 0.4
    assert report["mpps"] == report["rx_packets"] / report["seconds"] / 1e6


def test_a_front_end_takes_over_the_socket_file_of_one_that_died_and_leaves_that_of_another(path: Path) -> None:
    dead = socket.socket(socket.AF_UNIX)
    dead.bind(str(path))
    dead.close()  # as after SIGKILL: the file is there still
    front_end = VhostUserFrontEnd(str(path), listen=True)
    with pytest.raises(ConfigError, match="another program listens"):
        VhostUserFrontEnd(str(path), listen=True)
    path.unlink()
    successor = VhostUserFrontEnd(str(path), listen=True)
    front_end.close()
    assert path.exists()
    successor.close()
    assert not path.exists()
