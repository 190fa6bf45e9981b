"""A socket serves the next front end, whatever the one before left behind, passed on, or never said."""

from __future__ import annotations

import os
import select
import signal
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.support.by_hand import PATIENCE, no_descriptor_leaks, wait_for
from tests.support.vhost_user import MOVABLE, ByHand, Guest, InThread, Left, u64
from vnetdp.backends.worker import Worker
from vnetdp.errors import RequestRefused
from vnetdp.system.listener import Listener
from vnetdp.vhost_user.back_end import server as server_module
from vnetdp.vhost_user.back_end import visit
from vnetdp.vhost_user.back_end.descriptors import check_event, check_socket
from vnetdp.vhost_user.message import Request
from vnetdp.vhost_user.transport import close_fds

R = Request
LOAD = struct.pack("<II", 1, 0)


@pytest.fixture
def back_end(tmp_path: Path) -> Iterator[InThread]:
    with no_descriptor_leaks():
        back_end = InThread(tmp_path)
        yield back_end
        back_end.close()


def is_served(back_end: InThread) -> None:
    with ByHand.dial(back_end.path) as end:
        assert end.ask(R.GET_FEATURES)
        end.leave()


def _within(fd: int, how: str) -> int:
    """Return the end of a socketpair in which *fd* lies unread; "deep": in another one that lies there."""
    inner, outer = socket.socketpair()
    with outer:
        socket.send_fds(outer, [b"x"], [fd])
    held = inner.detach()
    if how != "deep":
        return held
    deeper = _within(held, "unread")
    os.close(held)
    return deeper


PASSED: dict[str, Callable[[ByHand, int], object]] = {
    "kick": lambda end, fd: end.send(R.SET_VRING_KICK, u64(0), [fd]),
    "call": lambda end, fd: end.send(R.SET_VRING_CALL, u64(0), [fd]),
    "err": lambda end, fd: end.send(R.SET_VRING_ERR, u64(0), [fd]),
    "log": lambda end, fd: end.send(R.SET_LOG_FD, b"", [fd]),
    "log base": lambda end, fd: end.send(R.SET_LOG_BASE, struct.pack("<QQ", 4096, 0), [fd]),
    "memory": lambda end, fd: end.send(R.SET_MEM_TABLE, struct.pack("<IIQQQQ", 1, 0, 0, 4096, 0, 0), [fd]),
    "requests": lambda end, fd: end.send(R.SET_BACKEND_REQ_FD, b"", [fd]),
    "inflight": lambda end, fd: end.send(R.SET_INFLIGHT_FD, struct.pack("<QQHHI", 4096, 0, 2, 16, 0), [fd]),
    "state": lambda end, fd: end.send(R.SET_DEVICE_STATE_FD, LOAD, [fd]),
    "no message": lambda end, fd: socket.send_fds(end.sock, [b"abc"], [fd]),
}


@pytest.mark.parametrize("how", ["itself", "unread", "deep"])
@pytest.mark.parametrize("where", PASSED)
def test_a_front_end_that_leaves_its_own_end_with_us_is_not_served_for_ever(
    where: str, how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server_module, "_MESSAGE_TIMEOUT_S", 0.5)
    with no_descriptor_leaks():
        back_end = InThread(tmp_path)
        end = ByHand.dial(back_end.path)
        end.shake_hands(protocol=MOVABLE)
        fd = os.dup(end.sock.fileno()) if how == "itself" else _within(end.sock.fileno(), how)
        PASSED[where](end, fd)
        end.close()
        os.close(fd)
        is_served(back_end)
        back_end.close()


def test_the_socket_for_requests_takes_nothing_that_comes_later(back_end: InThread) -> None:
    ours, theirs = socket.socketpair()
    with ByHand.dial(back_end.path) as end, ours:
        end.shake_hands()
        assert end.tell(R.SET_BACKEND_REQ_FD, b"", [theirs.fileno()])
        theirs.close()
        with pytest.raises(BrokenPipeError):
            socket.send_fds(ours, [b"x"], [end.sock.fileno()])
    is_served(back_end)


def test_user_mode_linux_is_called_through_a_socket_and_kicks_with_a_blocking_eventfd(back_end: InThread) -> None:
    ours, theirs = socket.socketpair()
    with ByHand.dial(back_end.path) as end, Guest(end) as guest, ours, theirs:
        for event in guest.kicks:
            os.set_blocking(event.fd, True)
        end.shake_hands()
        guest.share()
        guest.start(0, 1)
        assert end.tell(R.SET_VRING_CALL, u64(0), [theirs.fileno()])
        guest.echo()
        ours.settimeout(PATIENCE)
        assert ours.recv(8) == struct.pack("<Q", 1)
        end.leave()


def _epoll() -> int:
    with select.epoll() as epoll:
        return os.dup(epoll.fileno())


@pytest.mark.parametrize(
    "made",
    [
        lambda: _epoll(),
        lambda: os.memfd_create("no event"),
        lambda: os.open("/dev/null", os.O_RDWR),
        lambda: os.open("/", os.O_RDONLY),
        lambda: os.pidfd_open(os.getpid()),
        lambda: socket.socket(socket.AF_UNIX).detach(),
    ],
    ids=["epoll", "memfd", "device", "directory", "process", "socket"],
)
def test_what_is_no_eventfd_does_not_kick(made: Callable[[], int]) -> None:
    fd = made()
    try:
        with pytest.raises(RequestRefused, match="where an eventfd is due"):
            check_event(fd)
    finally:
        os.close(fd)


def test_a_pipe_is_taken_by_the_end_that_can_be_used() -> None:
    reader, writer = os.pipe()
    connection, other = socket.socketpair()
    with connection, other:
        check_event(reader)
        check_event(writer, connection)
        with pytest.raises(RequestRefused, match="can't be read from"):
            check_event(writer)
        with pytest.raises(RequestRefused, match="can't be written to"):
            check_event(reader, connection)
    os.close(reader)
    os.close(writer)


@pytest.mark.parametrize("kind", ["datagram", "internet", "listens", "alone"])
def test_a_socket_that_requests_can_not_go_out_on_is_refused(kind: str, tmp_path: Path) -> None:
    sock = {
        "datagram": lambda: socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM),
        "internet": lambda: socket.socket(socket.AF_INET),
    }.get(kind, lambda: socket.socket(socket.AF_UNIX))()
    if kind == "listens":
        sock.bind(str(tmp_path / "s"))
        sock.listen(1)
    one, other = socket.socketpair()
    with sock, one, other, pytest.raises(RequestRefused):
        check_socket(sock.fileno(), one)


def test_a_socket_that_is_to_linger_is_closed_without_waiting() -> None:
    """Its other end takes nothing more: closed as it is, it would hold us up for an hour."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        sock = socket.create_connection(listener.getsockname())
        other = listener.accept()[0]
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 3600))
        sock.setblocking(False)
        try:
            while True:
                sock.send(bytes(1 << 16))
        except BlockingIOError:
            pass
        sock.setblocking(True)
        close_fds([sock.detach()])
        other.close()


# --- who says nothing ---


def test_a_connection_that_says_nothing_makes_room_for_one_that_speaks(back_end: InThread) -> None:
    with socket.socket(socket.AF_UNIX) as silent:
        silent.connect(back_end.path)
        is_served(back_end)
        silent.settimeout(PATIENCE)
        assert silent.recv(1) == b""


def test_a_connection_may_be_silent_while_nobody_else_comes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """QEMU connects first, and then takes its time for the guest's memory."""
    monkeypatch.setattr(visit, "_FIRST_WORD_S", 0.0)
    listener = Listener(str(tmp_path / "s"), 8)
    first, other = socket.socketpair()
    worker = Worker(1)
    with first, other, socket.socket(socket.AF_UNIX) as knocking:
        silent = visit.Visit(first, worker, listener)
        assert silent.in_vain(set()) is None
        assert silent.patience_s is None
        knocking.connect(str(tmp_path / "s"))
        assert silent.in_vain(visit.ready_of(silent.descriptors())) is not None
        silent.speaks()
        assert silent.in_vain(set()) is None
        silent.close()
    worker.close()
    listener.close()


def test_a_front_end_with_half_a_message_makes_room(back_end: InThread, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_module, "_MESSAGE_TIMEOUT_S", 0.5)
    for part in (b"\1", struct.pack("<III", R.SET_FEATURES, 1, 8) + b"1234"):
        with socket.socket(socket.AF_UNIX) as half:
            half.connect(back_end.path)
            half.send(part)
            is_served(back_end)


def test_a_message_that_drips_has_no_more_time_than_another(
    back_end: InThread, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server_module, "_MESSAGE_TIMEOUT_S", 0.5)
    with ByHand.dial(back_end.path) as end:
        end.sock.send(struct.pack("<III", R.SET_CONFIG, 1, 256))
        began = time.monotonic()
        with pytest.raises((Left, OSError)):
            while time.monotonic() - began < PATIENCE:
                end.sock.send(b"x")
                end.sock.settimeout(0.05)
                try:
                    end.sock.recv(1)
                except TimeoutError:
                    continue
                raise Left
        assert time.monotonic() - began < PATIENCE
    is_served(back_end)


# --- whose process has ended ---

_CHILD = """
import socket, sys
end = socket.socket(socket.AF_UNIX)
end.connect(sys.argv[1])
end.send(bytes.fromhex("010000000100000000000000"))
end.recv(20)
socket.send_fds(socket.socket(fileno=int(sys.argv[2])), [b"x"], [end.fileno()])
print("passed", flush=True)
sys.stdin.read()
"""


def test_a_connection_whose_process_has_ended_makes_room(back_end: InThread) -> None:
    """Its other end lies in a queue of somebody else's, who never looks."""
    ours, theirs = socket.socketpair()
    with ours, theirs, ByHand.dial(back_end.path) as last:
        # Not this process: it lives on.
        last.leave()
        command = [sys.executable, "-c", _CHILD, back_end.path, str(theirs.fileno())]
        with subprocess.Popen(
            command, pass_fds=[theirs.fileno()], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        ) as child:
            assert child.stdout is not None
            assert child.stdout.readline() == b"passed\n"
            with ByHand.dial(back_end.path) as end:
                end.send(R.GET_FEATURES)
                child.send_signal(signal.SIGKILL)
                child.wait()
                assert end.answer(R.GET_FEATURES)
                end.leave()
    wait_for(lambda: any("process has ended" in line for line in back_end.lines()), "it is said why")
