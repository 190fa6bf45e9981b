"""StreamEndpoint: frames pass between a guest and another program, which may be late, leave, stall or lie."""

from __future__ import annotations

import logging
import os
import socket
import warnings
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.endpoints.joined import guest_of, receive_all, send_all
from tests.endpoints.wired import Listening, Peer, framed
from tests.support.by_hand import frame, no_descriptor_leaks, scaled, wait_equal, wait_for
from vnetdp.backends.process import WorkerProcess
from vnetdp.backends.worker import Worker
from vnetdp.device.device import NetDevice
from vnetdp.endpoints.fault import FaultEndpoint
from vnetdp.endpoints.loopback import GenerateEndpoint
from vnetdp.endpoints.sock import StreamEndpoint
from vnetdp.endpoints.spec import parse_endpoint
from vnetdp.errors import EndpointError, VnetdpError
from vnetdp.guest.driver import Driver, memory_for
from vnetdp.programs.link import Link
from vnetdp_kernels import rows as r

SOON = 0.01  # seconds between two tries to connect: no test is to wait for them


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "wire"


def exchange(driver: Driver, peer: Peer, n: int = 0) -> None:
    """Send a few frames each way, and compare them."""
    frames = [frame(n + k, 60 + 300 * k) for k in range(5)]
    send_all(driver, frames)
    assert peer.receive(5) == frames
    peer.send(*frames)
    assert receive_all(driver, 5) == frames


def test_a_program_that_listens_is_connected_to(path: Path) -> None:
    with Listening(path) as program, StreamEndpoint(str(path)) as endpoint, ExitStack() as stack:
        peer = stack.enter_context(program.accept())
        driver = stack.enter_context(guest_of(endpoint))
        assert endpoint.connected
        exchange(driver, peer)
        assert endpoint.counters()["to_wire"] == endpoint.counters()["from_wire"] == 5
        assert endpoint.name == f"stream:{path}"
        assert endpoint.vnet_hdr is False


def test_a_program_that_connects_is_accepted_and_so_is_the_next_one(path: Path) -> None:
    with StreamEndpoint(str(path), listen=True) as endpoint, guest_of(endpoint) as driver:
        for n in range(3):
            with Peer.connect(path) as peer:
                wait_equal(lambda: endpoint.connections, n + 1)
                exchange(driver, peer, n)
            wait_for(lambda: not endpoint.connected, "its end was seen")
        assert endpoint.errors == 0
    assert not path.exists()


def test_the_next_peer_waits_while_there_is_one(path: Path) -> None:
    with StreamEndpoint(str(path), listen=True) as endpoint, guest_of(endpoint) as driver:
        first = Peer.connect(path)
        wait_for(lambda: endpoint.connected, "it is accepted")
        with Peer.connect(path) as second:
            exchange(driver, first)
            second.send(frame(7))
            first.send(frame(8))
            assert receive_all(driver, 1) == [frame(8)]
            first.close()
            assert receive_all(driver, 1) == [frame(7)]
            exchange(driver, second)


def test_a_program_may_come_later(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING), StreamEndpoint(str(path), reconnect=SOON) as endpoint:
        with guest_of(endpoint) as driver:
            send_all(driver, [frame(1), frame(2)])
            wait_equal(lambda: endpoint.counters()["dropped_error"], 2)
            with Listening(path) as program, program.accept() as peer:
                wait_for(lambda: endpoint.connected, "it is connected")
                exchange(driver, peer)
        assert endpoint.counters()["dropped_error"] == 2
    assert caplog.messages[0] == f"stream:{path}: the socket does not exist; trying again every 0.01 s"


def test_a_program_that_leaves_is_connected_to_again(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    gone = f"stream:{path}: the peer is gone; trying again every 0.01 s"
    with caplog.at_level(logging.WARNING), StreamEndpoint(str(path), reconnect=SOON) as endpoint, ExitStack() as stack:
        driver = stack.enter_context(guest_of(endpoint))
        for n in range(3):
            with Listening(path) as program:
                peer = program.accept()
            with peer:
                wait_equal(lambda: endpoint.connections, n + 1)
                exchange(driver, peer, n)
                peer.send(frame(99))
            assert receive_all(driver, 1) == [frame(99)]  # sent before it left
            wait_equal(lambda: caplog.messages.count(gone), n + 1)
            before = endpoint.counters()
            send_all(driver, [frame(1), frame(2)])
            wait_equal(lambda: endpoint.counters()["dropped_error"], before["dropped_error"] + 2)
            assert endpoint.counters()["to_wire"] == before["to_wire"]
        assert endpoint.errors == 0


@pytest.mark.parametrize("length", [0, 65589, (1 << 32) - 1])
def test_a_peer_that_announces_no_frame_is_let_go_with_one_line(
    path: Path, length: int, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING), Listening(path) as program, ExitStack() as stack:
        endpoint = stack.enter_context(StreamEndpoint(str(path), reconnect=SOON))
        driver = stack.enter_context(guest_of(endpoint))
        with program.accept() as liar:
            liar.send(frame(1))
            liar.sock.sendall(length.to_bytes(4, "big") + framed(frame(2)))
            assert liar.ended()
        assert receive_all(driver, 1) == [frame(1)]
        with program.accept() as peer:
            wait_equal(lambda: endpoint.connections, 2)
            exchange(driver, peer)
        assert endpoint.errors == 1
    (said,) = [line for line in caplog.messages if "announced" in line]
    assert said == (
        f"stream:{path}: the peer announced a frame of {length} bytes, and 1 to 65588 can be: connection closed; "
        "trying again every 0.01 s"
    )


def test_a_peer_that_takes_nothing_holds_up_its_own_way_alone(path: Path) -> None:
    with Listening(path) as program, StreamEndpoint(str(path)) as endpoint, ExitStack() as stack:
        peer = stack.enter_context(program.accept())
        driver = stack.enter_context(guest_of(endpoint))
        sent = 0
        while not endpoint.rows[0, r.EP_OUT_COUNT]:
            sent += driver.send(frame(sent, 1500))
        peer.send(frame(1))
        assert receive_all(driver, 1) == [frame(1)]
        assert not endpoint.idle
        assert peer.receive(1) == [frame(0, 1500)]


def test_half_a_frame_is_no_frame_in_hand(path: Path) -> None:
    with Listening(path) as program, StreamEndpoint(str(path)) as endpoint, ExitStack() as stack:
        peer = stack.enter_context(program.accept())
        driver = stack.enter_context(guest_of(endpoint))
        peer.sock.sendall(framed(frame(1)) + framed(frame(2))[:30])
        assert receive_all(driver, 1) == [frame(1)]
        wait_for(lambda: endpoint.idle, "nothing is in hand")
        peer.sock.sendall(framed(frame(2))[30:])
        assert receive_all(driver, 1) == [frame(2)]


def test_a_worker_goes_on_in_the_middle_of_a_frame(path: Path) -> None:
    """Half a frame that one owner of the rings has received is there for the next."""
    worker = Worker(1)
    with Listening(path) as program, StreamEndpoint(str(path)) as endpoint, ExitStack() as stack:
        stack.callback(worker.close)
        memory = stack.enter_context(memory_for(num=64))
        device = stack.enter_context(NetDevice(memory, endpoint, vhost=worker.backends))
        driver = stack.enter_context(Driver(device, memory, num=64))
        peer = stack.enter_context(program.accept())
        driver.start()
        for n in range(20):
            data = framed(frame(n))
            peer.sock.sendall(data[: 3 * n + 1])
            wait_equal(lambda: int(endpoint.rows[0, r.EP_COUNT]), 3 * n + 1)
            device.set_use_vhost(n % 2 == 0)
            peer.sock.sendall(data[3 * n + 1 :])
            assert receive_all(driver, 1) == [frame(n)]


def test_a_reconnect_reaches_a_worker_process(path: Path) -> None:
    """Also one that has the rings for a second time, and was without them while the connection changed."""
    with ExitStack() as stack:
        endpoint = stack.enter_context(StreamEndpoint(str(path), listen=True))
        worker = WorkerProcess(1)
        stack.callback(worker.close)
        memory = stack.enter_context(memory_for(num=64))
        device = stack.enter_context(NetDevice(memory, endpoint, vhost=worker.backends))
        driver = stack.enter_context(Driver(device, memory, num=64))
        driver.start()
        for n, vhost in enumerate((True, True, False, True)):
            device.set_use_vhost(vhost)
            with Peer.connect(path) as peer:
                wait_equal(lambda: endpoint.connections, n + 1)
                exchange(driver, peer, n)
                device.set_use_vhost(not vhost)
                exchange(driver, peer, n + 50)
                device.set_use_vhost(vhost)
            wait_for(lambda: not endpoint.connected, "its end was seen")
        assert device.fallbacks == 0


def test_no_faults_are_put_around_a_socket(path: Path) -> None:
    with (
        StreamEndpoint(str(path), listen=True) as wire,
        pytest.raises(EndpointError, match="is a socket: put the faults"),
    ):
        FaultEndpoint(wire, drop=0.5)


def test_two_links_over_a_stream_lose_no_frame(path: Path) -> None:
    count = scaled(100_000, 500)
    with (
        GenerateEndpoint(size=1514, count=count) as a,
        GenerateEndpoint(count=count) as b,
        StreamEndpoint(str(path), listen=True) as one,
        StreamEndpoint(str(path)) as other,
    ):
        wait_for(lambda: one.connected, "it is accepted")
        with Link(one, a), Link(other, b, "vhost"):
            wait_equal(lambda: [a.ledger_against(b).delivered, b.ledger_against(a).delivered], [count, count])
            assert (a.ledger_against(b) + b.ledger_against(a)).as_dict()["corrupted"] == 0


def test_one_peer_only(path: Path) -> None:
    with pytest.raises(EndpointError, match="the socket does not exist: start that program first, or take reconnect=1"):
        StreamEndpoint(str(path), reconnect=0)
    with Listening(path) as program, StreamEndpoint(str(path), reconnect=0) as endpoint, guest_of(endpoint) as driver:
        with program.accept() as peer:
            exchange(driver, peer)
            assert not endpoint.gone
        wait_for(lambda: endpoint.gone, "it is gone")
        assert endpoint.failures == [f"stream:{path}: the peer is gone"]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("stream:{folder}", "stream:{folder}: cannot connect to {folder}: it is a directory, not a socket"),
        ("stream:{folder}/file", "stream:{folder}/file: cannot connect to {folder}/file: it is a file, not a socket"),
        ("stream:{folder}/file,listen", "stream:{folder}/file: {folder}/file exists and is not a socket: take"),
        ("stream:{folder}/" + "x" * 107, "stream:{folder}/"),
        ("stream:{folder}/none/wire,listen", "stream:{folder}/none/wire: cannot listen on {folder}/none/wire: No such"),
        ("stream:{folder}/wire,reconnect=1M", "stream:{folder}/wire: reconnect 1e+06 is not between 0 and 86400 s"),
        ("stream:{folder}/wire,listening", "stream: unknown option 'listening'; known are reconnect="),
        ("stream:", "stream: no socket is named: write stream:PATH[,listen][,reconnect=1]"),
    ],
)
def test_a_path_that_cannot_be_is_said_in_one_line(tmp_path: Path, text: str, says: str) -> None:
    (tmp_path / "file").touch()
    with no_descriptor_leaks(), pytest.raises(VnetdpError) as raised:
        parse_endpoint(text.format(folder=tmp_path))
    assert str(raised.value).startswith(says.format(folder=tmp_path))
    assert "\n" not in str(raised.value)


def test_a_socket_has_one_queue(path: Path) -> None:
    with no_descriptor_leaks(), pytest.raises(EndpointError, match="2 queues: a socket has one: take one queue pair"):
        parse_endpoint(f"stream:{path}", 2)


def test_a_forked_child_leaves_the_connection_to_its_parent(path: Path) -> None:
    with StreamEndpoint(str(path), listen=True) as endpoint, Peer.connect(path) as peer:
        wait_for(lambda: endpoint.connected, "it is accepted")
        end, child_end = socket.socketpair()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # from Python 3.12 on, if threads run
            pid = os.fork()
        if pid == 0:
            child_end.recv(1)  # until the test has seen the parent's end
            os._exit(0)
        endpoint.close()
        try:
            assert peer.ended()
        finally:
            end.send(b"x")
            os.waitpid(pid, 0)
        end.close()
        child_end.close()
        assert not path.exists()


def test_nothing_is_left_open(path: Path) -> None:
    def once() -> None:
        with StreamEndpoint(str(path), listen=True) as one, StreamEndpoint(str(path)) as other:
            wait_for(lambda: one.connected and other.connected, "they are connected")
        one.close()
        assert one.fds.tolist() == other.fds.tolist() == [-1]

    once()
    with no_descriptor_leaks():
        once()
