"""How a server comes by its front ends: what it waits for, how long, and what it gives up for."""

from __future__ import annotations

import logging
import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.support.by_hand import PATIENCE, frame, no_descriptor_leaks, wait_equal, wait_for
from tests.support.vhost_user import MOVABLE, SPOKEN, UNTOLD, ByHand, Guest, InProcess, InThread, open_files, ping
from vnetdp.cli.parser import main
from vnetdp.endpoints.base import Endpoint
from vnetdp.endpoints.loopback import EchoEndpoint
from vnetdp.errors import ConfigError
from vnetdp.shared.notify import EventFd
from vnetdp.vhost_user.back_end import server as server_module
from vnetdp.vhost_user.back_end import visit as visit_module
from vnetdp.vhost_user.back_end.server import Server
from vnetdp.vhost_user.back_end.session import Session
from vnetdp.vhost_user.message import ProtocolFeature, Request, VringState

EVERY = MOVABLE | ProtocolFeature.INBAND_NOTIFICATIONS


@contextmanager
def connecting(path: Path) -> Iterator[Server]:
    """Give a server that connects, run in a thread, and stopped at the end."""
    stop = threading.Event()
    with ExitStack() as stack:
        wake = stack.enter_context(EventFd())
        endpoint = stack.enter_context(EchoEndpoint())
        server = stack.enter_context(Server(endpoint, str(path), connect=True))
        thread = threading.Thread(target=server.run, args=(stop.is_set, wake.fd), daemon=True)
        thread.start()
        try:
            yield server
        finally:
            stop.set()
            wake.signal()
            thread.join(PATIENCE)
            assert not thread.is_alive()


@contextmanager
def listening(path: Path, kind: int = socket.SOCK_STREAM) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX, kind) as sock:
        sock.bind(str(path))
        if kind == socket.SOCK_STREAM:
            sock.listen(64)
        sock.settimeout(PATIENCE)
        yield sock
    path.unlink()


def answers(sock: socket.socket) -> bool:
    """Accept the back end, and have it answer."""
    with ByHand(sock.accept()[0]) as end:
        return bool(end.ask(Request.GET_FEATURES))


def test_more_queue_pairs_than_a_message_can_name(tmp_path: Path) -> None:
    with (
        EchoEndpoint(129) as endpoint,
        pytest.raises(ConfigError, match="129 queue pairs: vhost-user has 1 to 128"),
    ):
        Server(endpoint, str(tmp_path / "socket"), queue_pairs=129)


# --- what is offered ---


def offered(path: str) -> ProtocolFeature:
    with ByHand.dial(path) as end:
        said = int.from_bytes(end.ask(Request.GET_PROTOCOL_FEATURES), "little")
        end.leave()
    return ProtocolFeature(said)


def test_a_devices_state_is_offered_by_the_library_only_if_it_is_asked_for(tmp_path: Path) -> None:
    """QEMU migrates a guest whose back end has DEVICE_STATE to none without, such as DPDK's."""
    back_end = InThread(tmp_path)
    for asked, got in ((None, SPOKEN), (int(MOVABLE), MOVABLE), (-1, EVERY)):
        back_end.server.protocol_features = asked
        assert offered(back_end.path) == got
    back_end.server.protocol_features = None
    back_end.server.inband = True
    assert offered(back_end.path) == SPOKEN | ProtocolFeature.INBAND_NOTIFICATIONS
    back_end.close()


@pytest.mark.parametrize(
    ("option", "got"),
    [
        ("", SPOKEN),
        ("-status", UNTOLD),
        ("+device_state", MOVABLE),
        ("-status,+device_state", UNTOLD | ProtocolFeature.DEVICE_STATE),
        ("mq,device_state", ProtocolFeature.MQ | ProtocolFeature.DEVICE_STATE),
        ("+inband_notifications", SPOKEN | ProtocolFeature.INBAND_NOTIFICATIONS),
    ],
)
def test_a_command_offers_what_its_option_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, option: str, got: ProtocolFeature
) -> None:
    ran: list[ProtocolFeature] = []

    def run(self: Server, stop: Callable[[], bool], wake_fd: int, _say: object) -> None:
        def look() -> None:
            ran.append(offered(self.path))
            os.kill(os.getpid(), signal.SIGTERM)

        thread = threading.Thread(target=look)
        thread.start()
        serve(self, stop, wake_fd)
        thread.join()

    serve = Server.run
    monkeypatch.setattr(Server, "run", run)
    assert main(["serve", "echo", "--socket", str(tmp_path / "socket"), "--protocol-features", option]) == 0
    assert ran == [got]


# --- who hangs up at once ---


@contextmanager
def hanging_up(path: Path) -> Iterator[list[int]]:
    """Be a front end that accepts whoever comes, and hangs up; give the list of those who came."""
    came: list[int] = []
    with listening(path) as listener:
        listener.settimeout(None)

        def run() -> None:
            with pytest.raises(OSError, match="Invalid argument"):  # once it is shut down
                while True:
                    sock = listener.accept()[0]
                    came.append(sock.fileno())
                    sock.close()

        thread = threading.Thread(target=run)
        thread.start()
        yield came
        listener.shutdown(socket.SHUT_RDWR)
        thread.join()


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Have no wait between two attempts take any time; give the list of them."""
    told: list[float] = []
    ready_of = visit_module.ready_of

    def recorded(events: dict[int, int], timeout_s: float | None = None) -> set[int]:
        if timeout_s is None:
            return ready_of(events)
        told.append(round(timeout_s, 3))
        return set()

    monkeypatch.setattr(server_module, "ready_of", recorded)
    return told


def run_until(path: Path, ended: Callable[[], bool]) -> Server:
    with EchoEndpoint() as endpoint, Server(endpoint, str(path), connect=True) as server, EventFd() as wake:
        server.run(ended, wake.fd)
    return server


def test_a_front_end_that_hangs_up_is_asked_less_and_less_often(tmp_path: Path, waits: list[float]) -> None:
    with hanging_up(tmp_path / "socket"):
        server = run_until(tmp_path / "socket", lambda: len(waits) >= 8)
    assert server.served == 0  # nobody said a word
    assert waits == [0.05, 0.1, 0.2, 0.4, 0.8, 1.6, 2.0, 2.0]


def test_one_that_stayed_for_a_while_is_asked_again_at_once(
    tmp_path: Path, waits: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server_module, "_SHORT_S", 0.0)
    with hanging_up(tmp_path / "socket") as came:
        run_until(tmp_path / "socket", lambda: len(came) >= 8)
    assert not waits


# --- what is in the way ---


def test_whatever_is_in_the_way_of_a_second_front_end_it_is_waited_for(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "socket"
    with no_descriptor_leaks(), connecting(path) as server:
        with listening(path) as listener:
            assert answers(listener)
        with listening(path, socket.SOCK_DGRAM), caplog.at_level(logging.WARNING, "vnetdp.server"):
            wait_for(lambda: bool(caplog.messages), "it says what is in the way")
            (line,) = caplog.messages
            assert "wrong type" in line
        with listening(path) as listener:
            assert answers(listener)
        assert server.served == 2


def _of_a_wrong_kind(folder: Path, stack: ExitStack) -> Path:
    stack.enter_context(listening(folder / "datagrams", socket.SOCK_DGRAM))
    return folder / "datagrams"


def _behind_a_file(folder: Path, _stack: ExitStack) -> Path:
    (folder / "file").touch()
    return folder / "file" / "socket"


def _too_long(folder: Path, _stack: ExitStack) -> Path:
    return folder / ("x" * 200)


@pytest.mark.parametrize("make", [_of_a_wrong_kind, _behind_a_file, _too_long])
def test_a_path_where_no_front_end_can_ever_be(tmp_path: Path, make: Any) -> None:
    with no_descriptor_leaks(), ExitStack() as stack:
        path = make(tmp_path, stack)
        endpoint = stack.enter_context(EchoEndpoint())
        server = stack.enter_context(Server(endpoint, str(path), connect=True))
        with EventFd() as wake, pytest.raises(ConfigError, match="cannot connect"):
            server.run(lambda: False, wake.fd)


def test_it_ends_while_the_front_ends_backlog_is_full(tmp_path: Path) -> None:
    path = tmp_path / "socket"
    with listening(path), ExitStack() as stack:
        with pytest.raises(BlockingIOError):
            while True:
                sock = stack.enter_context(socket.socket(socket.AF_UNIX))
                sock.setblocking(False)
                sock.connect(str(path))
        with connecting(path) as server:
            assert server.served == 0


# --- a worker that ends ---


class Mortal(Endpoint):
    """Takes every frame, and counts them. It has a defect: asked to, it ends the thread that serves it."""

    deadly = False
    taken = 0

    def service(self) -> int:
        if self.deadly:
            self.deadly = False
            raise RuntimeError("a defect")
        return super().service()

    def transmit_frames(self, queue: int, frames: Sequence[bytes]) -> None:
        self.taken += len(frames)


@contextmanager
def running(server: Server) -> Iterator[None]:
    """Run a server in a thread, and stop it at the end."""
    stop = threading.Event()
    with EventFd() as wake:
        thread = threading.Thread(target=server.run, args=(stop.is_set, wake.fd), daemon=True)
        thread.start()
        try:
            yield
        finally:
            stop.set()
            wake.signal()
            thread.join(PATIENCE)
            assert not thread.is_alive()


def test_a_front_end_whose_worker_has_ended_is_told_so_and_may_come_back(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = str(tmp_path / "socket")
    with no_descriptor_leaks(), Mortal() as endpoint, Server(endpoint, path) as server, running(server):
        for n in range(3):
            caplog.clear()
            with ByHand.dial(path) as end, Guest(end, 1) as guest:
                end.shake_hands()
                guest.share()
                guest.start(0, 1)
                guest.rings[1].send(0, frame(n))
                guest.kicks[1].signal()
                wait_for(lambda n=n: endpoint.taken == n + 1, "the frame is taken")  # type: ignore[misc]
                endpoint.deadly = True
                guest.rings[1].send(1, frame(n))
                guest.kicks[1].signal()
                assert end.left()
            endpoint.taken = n + 1  # the other may have been taken, too
            lines = [record.getMessage() for record in caplog.records if record.name == "vnetdp.server"]
            assert lines == [f"{path}: the worker has ended: RuntimeError: a defect; the connection is closed"]
        assert server.served == 3


def test_a_worker_that_ends_while_a_request_is_handled_is_no_fault_of_the_front_end(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = str(tmp_path / "socket")
    enable = Session._on_set_vring_enable
    with no_descriptor_leaks(), Mortal() as endpoint, Server(endpoint, path) as server, running(server):
        with ByHand.dial(path) as end, Guest(end, 1) as guest:

            def enable_late(session: Session, payload: VringState, fds: list[int]) -> None:
                if payload.index == 0:
                    endpoint.deadly = True
                    guest.rings[1].send(0, frame(0))
                    guest.kicks[1].signal()
                    wait_for(lambda: server.worker.loop_thread.error is not None, "the worker has ended")
                enable(session, payload, fds)

            monkeypatch.setattr(Session, "_on_set_vring_enable", enable_late)
            end.shake_hands()
            guest.share()
            guest.start(1, 0)
            assert end.left()
        lines = [record.getMessage() for record in caplog.records if record.name == "vnetdp.server"]
        assert lines == [f"{path}: the worker has ended: RuntimeError: a defect; the connection is closed"]
    assert (server.served, server.refused) == (1, 0)


# --- no descriptors left ---


def test_it_takes_as_many_descriptors_as_it_may(tmp_path: Path) -> None:
    with open_files(512):
        process = InProcess(tmp_path)
    limits = Path(f"/proc/{process.process.pid}/limits").read_text()
    (line,) = (line for line in limits.splitlines() if line.startswith("Max open files"))
    soft, hard = line.split()[3:5]
    assert soft == hard
    process.close()


def test_it_waits_for_a_descriptor_to_accept_with(tmp_path: Path) -> None:
    with no_descriptor_leaks():
        back_end = InThread(tmp_path)
        ping(back_end)
        sock = socket.socket(socket.AF_UNIX)
        free = os.dup(0)
        os.close(free)
        with open_files(free):
            sock.connect(back_end.path)
            wait_for(lambda: any("Too many open files" in line for line in back_end.lines()), "it says so")
        with ByHand(sock) as end:
            assert end.ask(Request.GET_FEATURES)
            end.leave()
        wait_equal(back_end.lines, [])
        ping(back_end)
        back_end.close()
