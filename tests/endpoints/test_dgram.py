"""DgramEndpoint: a frame is a datagram, and a peer may be named, or found, late, lost and back."""

from __future__ import annotations

import logging
import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from tests.endpoints.joined import guest_of, receive_all, send_all
from tests.support.by_hand import PATIENCE, frame, no_descriptor_leaks, scaled, wait_equal, wait_for
from vnetdp.backends.process import WorkerProcess
from vnetdp.device.device import NetDevice
from vnetdp.endpoints.loopback import GenerateEndpoint
from vnetdp.endpoints.sock import DgramEndpoint
from vnetdp.endpoints.spec import parse_endpoint
from vnetdp.errors import EndpointError, VnetdpError
from vnetdp.guest.driver import Driver, memory_for
from vnetdp.programs.link import Link
from vnetdp_kernels import rows as r

SOON = 0.01


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "wire"


@contextmanager
def program(mine: Path, yours: Path) -> Iterator[socket.socket]:
    """Give the socket of another program, at *mine*, which sends to *yours*."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.bind(str(mine))
        sock.connect(str(yours))
        sock.settimeout(PATIENCE)
        yield sock
    mine.unlink()


def exchange(driver: Driver, sock: socket.socket, n: int = 0) -> None:
    frames = [frame(n + k, 60 + 300 * k) for k in range(5)]
    for one in frames:
        sock.send(one)
    assert receive_all(driver, 5) == frames
    send_all(driver, frames)
    assert [sock.recv(4096) for _ in frames] == frames


def find_gone(driver: Driver, endpoint: DgramEndpoint) -> None:
    """Have the guest send frames until the endpoint has found that its peer is gone; none is on its way any more then."""

    def settled() -> bool:
        guest, counters = driver.endpoint, endpoint.counters()
        return guest.idle and guest.counters()["from_wire"] == counters["to_wire"] + counters["dropped_error"]

    while endpoint.connected:
        send_all(driver, [frame(9)])
        wait_for(settled, "the frame is done with")
    wait_for(settled, "all frames are done with")


def test_a_named_peer_may_come_late_and_go_and_come_back(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    peer = path.with_name("peer")
    with ExitStack() as stack:
        stack.enter_context(caplog.at_level(logging.WARNING))
        endpoint = stack.enter_context(DgramEndpoint(str(path), str(peer), SOON))
        driver = stack.enter_context(guest_of(endpoint))
        for n in range(3):
            find_gone(driver, endpoint)
            before = endpoint.counters()["dropped_error"]
            send_all(driver, [frame(1), frame(2)])
            wait_equal(lambda: endpoint.counters()["dropped_error"], before + 2)
            with program(peer, path) as sock:
                wait_for(lambda: endpoint.connected, "it is connected")
                exchange(driver, sock, n)
    assert f"dgram:{path}: the socket does not exist: '{peer}'; trying again every 0.01 s" in caplog.text


def test_without_a_name_the_first_sender_is_the_peer_and_then_the_next(path: Path) -> None:
    with DgramEndpoint(str(path), reconnect=SOON) as endpoint, guest_of(endpoint) as driver:
        send_all(driver, [frame(1)])
        wait_equal(lambda: endpoint.counters()["dropped_error"], 1)
        for n in range(3):
            with program(path.with_name(f"peer{n}"), path) as sock:
                exchange(driver, sock, n)
                assert endpoint.connections == n + 1
            find_gone(driver, endpoint)


def test_a_sender_without_a_path_can_be_no_peer(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING), DgramEndpoint(str(path)) as endpoint, guest_of(endpoint) as driver:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as nameless:
            for n in range(3):
                nameless.sendto(frame(n), str(path))
            wait_equal(lambda: endpoint.errors, 3)
        with program(path.with_name("peer"), path) as sock:
            exchange(driver, sock)
    assert caplog.messages == [
        f"dgram:{path}: a datagram came from a socket without a path: bind it; such frames are dropped"
    ]


def test_a_peer_that_takes_nothing_holds_frames_back(path: Path) -> None:
    with DgramEndpoint(str(path)) as endpoint, guest_of(endpoint) as driver:
        with program(path.with_name("peer"), path) as sock:
            exchange(driver, sock)
            sent = 0
            while driver.send(frame(sent)):
                sent += 1
            assert sent >= 64
            sock.send(frame(1))
            assert receive_all(driver, 1) == [frame(1)]
            assert [sock.recv(4096) for _ in range(sent)] == [frame(n) for n in range(sent)]
        assert endpoint.counters()["dropped_error"] == 0


def test_a_worker_process_follows_the_peer(path: Path) -> None:
    with ExitStack() as stack:
        endpoint = stack.enter_context(DgramEndpoint(str(path), reconnect=SOON))
        worker = WorkerProcess(1)
        stack.callback(worker.close)
        memory = stack.enter_context(memory_for(num=64))
        device = stack.enter_context(NetDevice(memory, endpoint, vhost=worker.backends))
        driver = stack.enter_context(Driver(device, memory, num=64))
        driver.start()
        device.set_use_vhost(True)
        for n in range(3):
            with program(path.with_name(f"peer{n}"), path) as sock:
                exchange(driver, sock, n)
            find_gone(driver, endpoint)
        assert device.fallbacks == 0


def test_two_links_over_datagrams_lose_no_frame(path: Path) -> None:
    count = scaled(50_000, 500)
    other_path = path.with_name("other")
    with (
        GenerateEndpoint(size=1514, count=count) as a,
        GenerateEndpoint(count=count) as b,
        DgramEndpoint(str(path), str(other_path), SOON) as one,
        DgramEndpoint(str(other_path), str(path), SOON) as other,
    ):
        wait_for(lambda: one.connected and other.connected, "they are connected")
        with Link(one, a), Link(other, b, "vhost"):
            wait_equal(lambda: [a.ledger_against(b).delivered, b.ledger_against(a).delivered], [count, count])


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("dgram:{folder}/file", "dgram:{folder}/file: {folder}/file exists and is not a socket"),
        ("dgram:{folder}/wire,remote=", "dgram:{folder}/wire: cannot send to a socket with an empty path"),
        ("dgram:{folder}/wire,remote={folder}/file", "dgram:{folder}/wire: cannot"),
        ("dgram:{folder}/wire,listen", "dgram: unknown option 'listen'; known are remote=, reconnect="),
        ("dgram:", "dgram: no socket is named: write dgram:PATH[,remote=PATH][,reconnect=1]"),
    ],
)
def test_a_path_that_cannot_be_is_said_in_one_line(tmp_path: Path, text: str, says: str) -> None:
    (tmp_path / "file").touch()
    with no_descriptor_leaks(), pytest.raises(VnetdpError) as raised:
        parse_endpoint(text.format(folder=tmp_path))
    assert str(raised.value).startswith(says.format(folder=tmp_path))
    assert "\n" not in str(raised.value)


def test_one_peer_only(path: Path) -> None:
    peer = path.with_name("peer")
    with pytest.raises(EndpointError, match="start that program first, or take reconnect=1"):
        DgramEndpoint(str(path), str(peer), reconnect=0)
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.bind(str(peer))
        with DgramEndpoint(str(path), str(peer), reconnect=0) as endpoint, guest_of(endpoint) as driver:
            send_all(driver, [frame(1)])
            assert sock.recv(4096) == frame(1)
            sock.close()
            send_all(driver, [frame(2)])
            wait_for(lambda: endpoint.gone, "it is gone")
            assert endpoint.failures == [f"dgram:{path}: the peer is gone"]
    assert not path.exists()


def test_nothing_is_left_open(path: Path) -> None:
    def once() -> None:
        with DgramEndpoint(str(path)) as endpoint:
            assert endpoint.rows[0, r.EP_LOST] == r.LOST_END
        endpoint.close()

    once()
    with no_descriptor_leaks():
        once()
