"""Why a socket can't be connected to: said at once where waiting is in vain, and waited for where it is not."""

from __future__ import annotations

import os
import socket
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.support.by_hand import PATIENCE, no_descriptor_leaks, wait_for
from vnetdp.endpoints.loopback import EchoEndpoint, GenerateEndpoint
from vnetdp.errors import ConfigError
from vnetdp.programs.drive import drive
from vnetdp.shared.notify import EventFd
from vnetdp.system.dial import NobodyYetError, dial, why_not_there
from vnetdp.vhost_user.back_end.server import Server
from vnetdp.vhost_user.front_end.front_end import VhostUserFrontEnd


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.chdir(tmp_path)
    with no_descriptor_leaks():
        yield tmp_path


def _bound(kind: int) -> Callable[[], object]:
    def make() -> None:
        with socket.socket(socket.AF_UNIX, kind) as sock:
            sock.bind("s")
            if kind != socket.SOCK_DGRAM:
                sock.listen()
            _kept.append(socket.socket(fileno=os.dup(sock.fileno())))

    return make


_kept: list[socket.socket] = []


@pytest.fixture(autouse=True)
def kept() -> Iterator[None]:
    yield
    while _kept:
        _kept.pop().close()


def _loop() -> None:
    Path("s").symlink_to("s")


def _below_a_file() -> None:
    Path("file").touch()
    Path("s").symlink_to("file/s")


IN_VAIN: dict[str, tuple[Callable[[], object], str]] = {
    "file": (lambda: Path("s").touch(), "it is a file, not a socket"),
    "fifo": (lambda: os.mkfifo("s"), "it is a file, not a socket"),
    "directory": (lambda: Path("s").mkdir(), "it is a directory, not a socket"),
    "datagram": (_bound(socket.SOCK_DGRAM), "wrong type for socket: it is not a stream socket"),
    "packets": (_bound(socket.SOCK_SEQPACKET), "wrong type for socket: it is not a stream socket"),
    "loop": (_loop, "Too many levels of symbolic links"),
    "below a file": (_below_a_file, "Not a directory"),
}


@pytest.mark.parametrize("kind", IN_VAIN)
def test_what_no_waiting_heals_is_said_at_once(kind: str) -> None:
    make, words = IN_VAIN[kind]
    make()
    front_end = VhostUserFrontEnd("s")
    with EchoEndpoint() as endpoint, Server(endpoint, "s", connect=True) as server, EventFd() as wake:
        for call in (
            lambda: dial("s"),
            lambda: front_end.connect(PATIENCE),
            lambda: server.run(lambda: False, wake.fd),
        ):
            with pytest.raises(ConfigError, match=f"(?i)cannot connect to s: .*{words}"):
                call()
    front_end.close()


@pytest.mark.parametrize("length", [108, 120, 5000])
def test_a_path_that_is_too_long_is_said_at_once(length: int) -> None:
    with pytest.raises(ConfigError, match=f"too long for a socket: {length} bytes, of at most 107: take a shorter"):
        dial("x" * length)


@pytest.mark.skipif(os.geteuid() != 0, reason="another user has to be become")
@pytest.mark.parametrize("what", ["socket", "folder"])
def test_who_has_no_right_to_connect_is_told_so_at_once(what: str) -> None:
    # Not in pytest's own folder: it is closed to others whenever another run begins.
    with tempfile.TemporaryDirectory() as open_to_all, socket.socket(socket.AF_UNIX) as sock:
        Path(open_to_all).chmod(0o755)
        here = Path(open_to_all) / "here"
        here.mkdir()
        sock.bind(str(here / "s"))
        sock.listen()
        ours, theirs = os.pipe()
        (here / "s" if what == "socket" else here).chmod(0o700)
        if (child := os.fork()) == 0:
            os.setgid(65534)
            os.setuid(65534)
            try:
                dial(str(here / "s"))
            except ConfigError as e:
                os.write(theirs, str(e).encode())
            finally:
                os._exit(0)
        os.close(theirs)
        os.waitpid(child, 0)
        with open(ours) as said:
            told = said.read()
        mode = "with mode 0700, and this is user 65534: take another path, or have the right given"
        assert f"Permission denied: {here / 's' if what == 'socket' else here} belongs to user 0, {mode}" in told


def test_what_waiting_heals_is_named() -> None:
    def trouble() -> str:
        with pytest.raises(NobodyYetError) as caught:
            dial("s")
        return str(caught.value)

    assert trouble() == "the socket does not exist"
    with pytest.raises(NobodyYetError, match="its folder none/at/all does not exist"):
        dial("none/at/all/s")
    Path("s").symlink_to("there")
    assert trouble() == "the path is a link to there, which does not exist"
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind("there")
        assert trouble() == "no program listens on the socket"
        sock.listen(0)
        first = dial("s")
        assert trouble() == "the program that listens is busy: its backlog is full"
        first.close()


def test_a_guest_says_what_it_waits_for_and_goes_on_when_it_comes() -> None:
    said: list[str] = []
    wakes: list[EventFd] = []
    ended = threading.Event()

    def serve() -> None:
        wait_for(lambda: bool(said), "what is waited for is said")
        with EchoEndpoint() as endpoint, EventFd() as wake, Server(endpoint, "s") as server:
            wakes.append(wake)
            server.run(ended.is_set, wake.fd)

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        with GenerateEndpoint(count=10) as endpoint:
            report = drive(endpoint, "s", lambda: False, said.append, wait_s=PATIENCE)
    finally:
        ended.set()
        wakes[0].signal()
        thread.join()
    assert said[0] == "s: the socket does not exist; waiting"
    assert said[-1] == "driving s: 1 queue pair of 256"
    assert report["rx_packets"] == 10


def test_a_back_end_that_connects_says_what_it_waits_for_and_that_it_serves_once_it_is_connected() -> None:
    said: list[str] = []
    ended = threading.Event()
    with EchoEndpoint() as endpoint, EventFd() as wake, Server(endpoint, "s", connect=True) as server:
        thread = threading.Thread(target=server.run, args=(ended.is_set, wake.fd, said.append))
        thread.start()
        try:
            wait_for(lambda: bool(said), "what is waited for is said")
            with socket.socket(socket.AF_UNIX) as sock:
                sock.bind("s")
                wait_for(lambda: len(said) == 2, "that nobody listens is said")
                sock.listen()
                with sock.accept()[0]:
                    wait_for(lambda: len(said) == 3, "that it serves is said")
            wait_for(lambda: len(said) == 4, "that the front end is gone is said")
        finally:
            ended.set()
            wake.signal()
            thread.join()
    assert said == [
        "s: no front end: the socket does not exist; trying again",
        "s: no front end: no program listens on the socket; trying again",
        "serving echo to s",
        "s: no front end: no program listens on the socket; trying again",
    ]


_END_ONE = "end that front end, or restart the back end"
NO_BACK_END = {
    "none": "the socket does not exist: start one: vnetdp serve macswap --socket s",
    "silent": f"the back end does not answer: it serves another front end, or hangs: {_END_ONE}",
    "full": f"the program that listens is busy: its backlog is full: {_END_ONE}",
    "none connects": "no back end has connected: start one: vnetdp serve macswap --connect --socket s",
}


@pytest.mark.parametrize("kind", NO_BACK_END)
def test_a_guest_without_a_back_end_is_told_the_step_that_helps(kind: str) -> None:
    """Where there is one, that is not to start another."""
    with ExitStack() as stack:
        sock = stack.enter_context(socket.socket(socket.AF_UNIX))
        if kind in ("silent", "full"):
            sock.bind("s")
            sock.listen(0)
        if kind == "full":
            stack.enter_context(dial("s"))
        endpoint = stack.enter_context(GenerateEndpoint(count=1))
        with pytest.raises(ConfigError, match=f"^s: no back end within 0.2 s: {NO_BACK_END[kind]}$"):
            drive(endpoint, "s", lambda: False, lambda _: None, wait_s=0.2, listen=kind == "none connects")


def test_a_socket_file_that_vanishes_while_it_is_looked_at_may_come_back(monkeypatch: pytest.MonkeyPatch) -> None:
    access = os.access

    def vanishing(path: str, mode: int) -> bool:
        Path(path).unlink()
        return access(path, mode)

    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind("s")
    monkeypatch.setattr(os, "access", vanishing)
    assert why_not_there("s") == "the socket does not exist"
