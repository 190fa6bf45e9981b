"""A front end whose descriptors are not what they are said to be, or that nobody reads: kicks, calls, sockets, pipes."""

from __future__ import annotations

import fcntl
import os
import pty
import select
import socket
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from tests.support.by_hand import no_descriptor_leaks, wait_for
from tests.support.vhost_user import (
    MOVABLE,
    SPOKEN,
    UNTOLD,
    BackEnd,
    ByHand,
    Guest,
    InThread,
    Left,
    costs_nothing,
    state,
    u64,
)
from vnetdp.vhost_user.message import ProtocolFeature, Request
from vnetdp_kernels.platform import interrupt

R = Request
_MANY = (1 << 64) - 2  # as much as an eventfd can hold


def _closed_reader() -> int:
    reader, writer = os.pipe()
    os.close(reader)
    return writer


def _closed_writer() -> int:
    reader, writer = os.pipe()
    os.close(writer)
    return reader


def _terminal() -> int:
    leader, follower = pty.openpty()
    os.close(leader)
    return follower


def _full_eventfd() -> int:
    fd = os.eventfd(0)
    os.eventfd_write(fd, _MANY)
    return fd


def _full_pipe() -> int:
    reader, writer = os.pipe2(os.O_NONBLOCK)
    with suppress(BlockingIOError):
        while True:
            os.write(writer, bytes(4096))
    fd = os.open(f"/proc/self/fd/{writer}", os.O_RDWR)
    os.close(reader)
    os.close(writer)
    return fd


def _half_a_socket() -> int:
    ours, theirs = socket.socketpair()
    ours.close()
    return theirs.detach()


def _listener() -> int:
    sock = socket.socket()
    sock.bind(("127.0.0.1", 0))
    sock.listen(1)
    return sock.detach()


def _fifo(folder: Path, flags: int) -> int:
    path = folder / "fifo"
    if not path.exists():
        os.mkfifo(path)
    return os.open(path, flags)


def _regular(folder: Path, flags: int) -> int:
    path = folder / "file"
    path.write_bytes(bytes(4096))
    return os.open(path, flags)


def _socket_file(folder: Path) -> int:
    path = folder / "socket"
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(path))
        return os.open(path, os.O_PATH)


KINDS: dict[str, Callable[[Path], int]] = {
    "a file": lambda folder: _regular(folder, os.O_RDWR),
    "a file by its path alone": lambda folder: _regular(folder, os.O_PATH),
    "a directory": lambda folder: os.open(folder, os.O_RDONLY),
    "/dev/zero": lambda _: os.open("/dev/zero", os.O_RDWR),
    "/dev/full": lambda _: os.open("/dev/full", os.O_RDWR),
    "a terminal": lambda _: _terminal(),
    "a fifo": lambda folder: _fifo(folder, os.O_RDWR),
    "a fifo to read": lambda folder: _fifo(folder, os.O_RDONLY | os.O_NONBLOCK),
    "a fifo by its path alone": lambda folder: _fifo(folder, os.O_PATH),
    "a pipe that nobody reads": lambda _: _closed_reader(),
    "a pipe that nobody writes": lambda _: _closed_writer(),
    "a pipe that is full": lambda _: _full_pipe(),
    "an eventfd that is full": lambda _: _full_eventfd(),
    "an eventfd that counts down": lambda _: os.eventfd(1 << 20, os.EFD_SEMAPHORE),
    "an epoll": lambda _: _epoll(),
    "a socket": lambda _: socket.socket(socket.AF_UNIX, socket.SOCK_STREAM).detach(),
    "a socket whose other end is closed": lambda _: _half_a_socket(),
    "a datagram socket": lambda _: socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM).detach(),
    "a socket that listens": lambda _: _listener(),
    "a socket by its path alone": lambda folder: _socket_file(folder),
    "a memfd": lambda _: os.memfd_create("no eventfd"),
}


def _epoll() -> int:
    epoll = select.epoll()
    fd = os.dup(epoll.fileno())
    epoll.close()
    return fd


@contextmanager
def odd(kind: str, folder: Path) -> Iterator[int]:
    """Give a descriptor of a kind."""
    fd = KINDS[kind](folder)
    try:
        yield fd
    finally:
        os.close(fd)


@contextmanager
def attached(back_end: BackEnd, protocol: ProtocolFeature = UNTOLD) -> Iterator[Guest]:
    """Give a guest whose rings are described, and not started."""
    with ByHand.dial(back_end.path) as end, Guest(end) as guest:
        end.shake_hands(protocol=protocol)
        guest.share()
        for index in range(4):
            guest.describe(index)
        yield guest
        end.leave()


def go(guest: Guest, *indices: int) -> None:
    """Start rings that are described."""
    for index in indices:
        assert guest.end.tell(R.SET_VRING_KICK, u64(index), [guest.kicks[index].fd])
        assert guest.end.tell(R.SET_VRING_ENABLE, state(index, 1))


def spoil(guest: Guest, index: int) -> None:
    """Break a ring: its driver claims more chains than it has descriptors."""
    ring = guest.rings[index]
    ring.avail_idx = ring.avail_idx + ring.num + 1
    guest.kicks[index].signal()


@pytest.mark.parametrize("kind", KINDS)
def test_a_call_that_is_no_eventfd(back_end: BackEnd, tmp_path: Path, kind: str) -> None:
    with costs_nothing(back_end, None), odd(kind, tmp_path) as fd, attached(back_end) as guest:
        for index in range(4):
            guest.end.tell(R.SET_VRING_CALL, u64(index), [fd])
        go(guest, 0, 1, 2, 3)
        for n in range(4):
            guest.echo(n, n % 2)
        guest.end.tell(R.SET_VRING_CALL, u64(0), [fd])
        guest.echo(4)


@pytest.mark.parametrize("kind", KINDS)
def test_a_kick_that_is_no_eventfd(back_end: BackEnd, tmp_path: Path, kind: str) -> None:
    """The ring may stand still; the others don't."""
    with costs_nothing(back_end, None), odd(kind, tmp_path) as fd, attached(back_end) as guest:
        for index in range(2):
            guest.end.tell(R.SET_VRING_KICK, u64(index), [fd])
            assert guest.end.tell(R.SET_VRING_ENABLE, state(index, 1))
        go(guest, 2, 3)
        for n in range(4):
            guest.echo(n, pair=1)
        for index in range(4):
            assert guest.end.ask(R.GET_VRING_BASE, state(index, 0))[:4] == struct.pack("<I", index)


@pytest.mark.parametrize("kind", KINDS)
def test_a_broken_ring_tells_an_err_that_is_no_eventfd(back_end: BackEnd, tmp_path: Path, kind: str) -> None:
    with costs_nothing(back_end, None), odd(kind, tmp_path) as fd, attached(back_end) as guest:
        taken = [guest.end.tell(R.SET_VRING_ERR, u64(index), [fd]) for index in range(4)]
        assert len(set(taken)) == 1
        go(guest, 0, 1, 2, 3)
        guest.echo()
        spoil(guest, 1)
        guest.echo(1, pair=1)
        spoil(guest, 2)
        # Started anew, a ring is whole again.
        for index in (0, 1):
            guest.end.ask(R.GET_VRING_BASE, state(index, 0))
            ring = guest.rings[index]
            ring.avail_idx = ring.used_idx
            guest.describe(index, ring.used_idx)
        go(guest, 0, 1)
        guest.echo(2)


def test_a_broken_ring_is_told_and_the_others_run_on(back_end: BackEnd) -> None:
    with costs_nothing(back_end, 1), attached(back_end) as guest:
        err = os.eventfd(0)
        assert guest.end.tell(R.SET_VRING_ERR, u64(1), [err])
        go(guest, 0, 1, 2, 3)
        guest.echo()
        spoil(guest, 1)
        wait_for(lambda: bool(select.select([err], [], [], 0)[0]), "the error is told")
        os.close(err)
        guest.echo(1, pair=1)


@pytest.mark.parametrize("request_", [R.SET_VRING_CALL, R.SET_VRING_KICK], ids=lambda r: r.name)
@pytest.mark.parametrize("kind", ["an eventfd that is full", "a pipe that is full", "an empty eventfd"])
def test_a_descriptor_that_blocks(back_end: BackEnd, tmp_path: Path, kind: str, request_: Request) -> None:
    """Its flags are shared with the front end: nobody may wait on it for ever."""
    with costs_nothing(back_end, None), attached(back_end) as guest:
        fd = os.eventfd(0) if kind == "an empty eventfd" else KINDS[kind](tmp_path)
        try:
            for index in range(2):
                guest.end.tell(R.SET_VRING_CALL, u64(index), [guest.calls[index].fd])
            guest.end.tell(request_, u64(1), [fd])
            for index in range(2):
                if (request_, index) != (R.SET_VRING_KICK, 1):
                    guest.end.tell(R.SET_VRING_KICK, u64(index), [guest.kicks[index].fd])
            os.set_blocking(fd, True)
            for index in range(2):
                guest.end.tell(R.SET_VRING_ENABLE, state(index, 1))
            ring, other = guest.rings[:2]
            ring.post(*range(8))
            for head in range(8):
                other.send(head, bytes(60))
                guest.kicks[0].signal()
                guest.kicks[1].signal()
            for index in range(4):
                guest.end.ask(R.GET_VRING_BASE, state(index, 0))
        finally:
            os.close(fd)


def test_the_flags_of_a_descriptor_stay_the_front_ends_affair(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It may read its calls blocking. Nor does one that is full hold anybody up: no system call has to be interrupted.

    None can be, here: a thread that waited in one would stay there.
    """
    monkeypatch.setattr(interrupt, "interrupt", lambda _ident: None)
    full = os.eventfd(0)
    os.eventfd_write(full, _MANY)
    with no_descriptor_leaks():
        back_end = InThread(tmp_path)
        with ByHand.dial(back_end.path) as end, Guest(end) as guest:
            end.shake_hands()
            guest.share()
            events = (*guest.kicks, *guest.calls)
            for event in events:
                os.set_blocking(event.fd, True)
            guest.start(0, 1, 2)
            guest.describe(3)
            assert end.tell(R.SET_VRING_ERR, u64(0), [guest.calls[0].fd])
            assert end.tell(R.SET_VRING_CALL, u64(3), [full])
            assert end.tell(R.SET_VRING_KICK, u64(3), [guest.kicks[3].fd])
            assert end.tell(R.SET_VRING_ENABLE, state(3, 1))
            for n in range(8):
                guest.echo(n, 1)
            assert all(os.get_blocking(event.fd) for event in events)
            assert os.eventfd_read(guest.calls[2].fd) > 0
            end.leave()
        back_end.close()
    os.close(full)


@pytest.mark.parametrize("request_", [R.SET_VRING_CALL, R.SET_VRING_KICK, R.SET_VRING_ERR], ids=lambda r: r.name)
def test_a_descriptor_given_again_and_again(back_end: BackEnd, request_: Request) -> None:
    with costs_nothing(back_end, 0), attached(back_end) as guest:
        go(guest, 0, 1, 2, 3)
        events = {R.SET_VRING_CALL: guest.calls, R.SET_VRING_KICK: guest.kicks}.get(request_, guest.calls)
        for n in range(200):
            assert guest.end.tell(request_, u64(n % 4), [events[n % 4].fd])
            if n % 20 == 0:
                guest.echo(n, n % 2)
        assert guest.end.tell(request_, u64(1 | 0x100))
        guest.echo(1)


# --- the socket for what the back end has to say ---


@pytest.mark.parametrize("kind", KINDS)
def test_a_back_end_socket_that_is_none(back_end: BackEnd, tmp_path: Path, kind: str) -> None:
    with costs_nothing(back_end, None), odd(kind, tmp_path) as fd, attached(back_end) as guest:
        for _ in range(3):
            guest.end.tell(R.SET_BACKEND_REQ_FD, b"", [fd])
        go(guest, 0, 1)
        guest.echo()


@pytest.fixture
def in_band(tmp_path: Path) -> Iterator[InThread]:
    with no_descriptor_leaks():
        back_end = InThread(tmp_path, inband=True)
        yield back_end
        back_end.close()


@contextmanager
def joined() -> Iterator[tuple[socket.socket, socket.socket]]:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        yield ours, theirs


IN_BAND = SPOKEN & ~ProtocolFeature.STATUS | ProtocolFeature.INBAND_NOTIFICATIONS


@pytest.mark.parametrize("blocking", [False, True])
def test_calls_in_band_that_nobody_reads(in_band: InThread, blocking: bool) -> None:
    with costs_nothing(in_band, 0), joined() as (ours, theirs), ByHand.dial(in_band.path) as end, Guest(end) as guest:
        end.shake_hands(protocol=IN_BAND)
        assert end.tell(R.SET_BACKEND_REQ_FD, b"", [theirs.fileno()])
        theirs.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1)
        theirs.setblocking(blocking)
        guest.share()
        for index in range(2):
            guest.describe(index)
            assert end.tell(R.SET_VRING_CALL, u64(index | 0x100))
            assert end.tell(R.SET_VRING_KICK, u64(index), [guest.kicks[index].fd])
            assert end.tell(R.SET_VRING_ENABLE, state(index, 1))
        for n in range(400):
            guest.echo(n)
        assert ours.recv(12 + 8) == struct.pack("<IIIII", 4, 1, 8, 0, 0)
        end.leave()


def test_calls_in_band_leave_alone_what_the_front_end_calls_with(in_band: InThread) -> None:
    """A ring that was given a descriptor is called by it, and nobody but the guest takes that call away."""
    with costs_nothing(in_band, 0), joined() as (ours, theirs), ByHand.dial(in_band.path) as end, Guest(end) as guest:
        end.shake_hands(protocol=IN_BAND)
        assert end.tell(R.SET_BACKEND_REQ_FD, b"", [theirs.fileno()])
        guest.share()
        guest.start(0, 1)
        for n in range(20):
            guest.echo(n)
            wait_for(lambda: guest.calls[0].clear() > 0, "the guest is called")
        assert not select.select([ours], [], [], 0)[0]
        end.leave()


def test_kicks_in_band(in_band: InThread) -> None:
    with costs_nothing(in_band, None), ByHand.dial(in_band.path) as end, Guest(end) as guest:
        end.shake_hands(protocol=IN_BAND)
        guest.share()
        for index in range(2):
            guest.describe(index)
            for _ in range(3):
                assert end.tell(R.VRING_KICK, state(index, 0))
            assert end.tell(R.SET_VRING_ENABLE, state(index, 1))
        assert not end.tell(R.VRING_KICK, state(4, 0))
        assert not end.tell(R.VRING_KICK, state(2**32 - 1, 0))
        guest.rings[0].post(0)
        guest.rings[1].send(0, bytes(60))
        assert end.tell(R.VRING_KICK, state(1, 0))
        wait_for(lambda: guest.rings[0].used_idx == 1, "the frame came back")
        end.leave()


# --- the device's state ---

SAVE, LOAD = struct.pack("<II", 0, 0), struct.pack("<II", 1, 0)
NOT_OK, NO_DESCRIPTOR = u64(0x101), u64(0x100)


def save(end: ByHand) -> bytes:
    reader, writer = os.pipe()
    assert end.ask(R.SET_DEVICE_STATE_FD, SAVE, [writer]) == NO_DESCRIPTOR
    os.close(writer)
    with os.fdopen(reader, "rb") as pipe:
        state_ = pipe.read()
    assert end.ask(R.CHECK_DEVICE_STATE) == u64(0)
    return state_


def load(end: ByHand, blob: bytes) -> bool:
    reader, writer = os.pipe()
    try:
        assert end.ask(R.SET_DEVICE_STATE_FD, LOAD, [reader]) == NO_DESCRIPTOR
    finally:
        os.close(reader)
    os.set_blocking(writer, False)
    with suppress(BlockingIOError, BrokenPipeError):
        os.write(writer, blob)
    os.close(writer)
    return end.ask(R.CHECK_DEVICE_STATE) == u64(0)


BLOBS = {
    "nothing": b"",
    "zeros": bytes(1000),
    "no text": b"\xff\xfe\x80",
    "half of it": b'{"magic": "vnetdp-net", "ma',
    "another kind": b'{"magic": "vnetdp-blk", "mac": "525400123456", "mtu": null}',
    "no object": b'["magic", "mac"]',
    "no MAC": b'{"magic": "vnetdp-net"}',
    "a short MAC": b'{"magic": "vnetdp-net", "mac": "5254", "mtu": null}',
    "a MAC that is none": b'{"magic": "vnetdp-net", "mac": "no hex here!", "mtu": null}',
    "a MAC that is a number": b'{"magic": "vnetdp-net", "mac": 5, "mtu": null}',
    "an MTU that is none": b'{"magic": "vnetdp-net", "mac": "525400123456", "mtu": "1500"}',
    "an MTU and a half": b'{"magic": "vnetdp-net", "mac": "525400123456", "mtu": 1500.5}',
    "an MTU that is true": b'{"magic": "vnetdp-net", "mac": "525400123456", "mtu": true}',
    "an MTU of a million": b'{"magic": "vnetdp-net", "mac": "525400123456", "mtu": 1000000}',
    "lists in lists in lists": b"[" * 60000,
    "objects in objects": b'{"a":' * 12000,
    "a number of 60,000 digits": b"9" * 60000,
    "a number larger than any": b'{"magic": "vnetdp-net", "mac": "525400123456", "mtu": 1e999}',
    "more than anyone saves": b" " * 65536,
}


@pytest.mark.parametrize("blob", BLOBS.values(), ids=BLOBS)
def test_a_state_that_is_none(back_end: BackEnd, blob: bytes) -> None:
    with costs_nothing(back_end, 1), ByHand.dial(back_end.path) as end:
        end.shake_hands(protocol=MOVABLE)
        good = save(end)
        assert not load(end, blob)
        assert load(end, good)
        assert save(end) == good
        end.leave()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("direction", [SAVE, LOAD], ids=["save", "load"])
def test_a_pipe_that_is_none(back_end: BackEnd, tmp_path: Path, kind: str, direction: bytes) -> None:
    with costs_nothing(back_end, None), odd(kind, tmp_path) as fd, ByHand.dial(back_end.path) as end:
        end.shake_hands(protocol=MOVABLE)
        try:
            for _ in range(3):
                end.ask(R.SET_DEVICE_STATE_FD, direction, [fd])
            assert end.ask(R.CHECK_DEVICE_STATE)
            assert save(end)
        except Left:
            pass
        end.leave()


@pytest.mark.parametrize("direction", [SAVE, LOAD], ids=["save", "load"])
def test_a_pipe_made_blocking_again(back_end: BackEnd, tmp_path: Path, direction: bytes) -> None:
    kind = "a pipe that is full" if direction == SAVE else "a fifo"
    with costs_nothing(back_end, None), odd(kind, tmp_path) as fd, ByHand.dial(back_end.path) as end:
        end.shake_hands(protocol=MOVABLE)
        end.send(R.SET_DEVICE_STATE_FD, direction, [fd])
        fcntl.fcntl(fd, fcntl.F_SETFL, os.O_RDWR)
        end.answer(R.SET_DEVICE_STATE_FD)
        fcntl.fcntl(fd, fcntl.F_SETFL, os.O_RDWR)
        end.ask(R.CHECK_DEVICE_STATE)
        end.leave()


@pytest.mark.parametrize(("direction", "phase"), [(2, 0), (0, 1), (2**32 - 1, 0), (0, 2**32 - 1)])
def test_a_state_of_another_kind(back_end: BackEnd, direction: int, phase: int) -> None:
    with costs_nothing(back_end, None), ByHand.dial(back_end.path) as end:
        end.shake_hands(protocol=MOVABLE)
        reader, writer = os.pipe()
        assert end.ask(R.SET_DEVICE_STATE_FD, struct.pack("<II", direction, phase), [writer]) == NOT_OK
        os.close(writer)
        os.close(reader)
        assert save(end)
        end.leave()


def test_no_state_is_saved_or_loaded_while_rings_run(back_end: BackEnd) -> None:
    with costs_nothing(back_end, None), attached(back_end, MOVABLE) as guest:
        go(guest, 0, 1)
        for direction in (SAVE, LOAD):
            reader, writer = os.pipe()
            assert guest.end.ask(R.SET_DEVICE_STATE_FD, direction, [writer]) == NOT_OK
            os.close(writer)
            os.close(reader)
        guest.echo()
        for index in (0, 1):
            guest.end.ask(R.GET_VRING_BASE, state(index, 0))
        assert save(guest.end)
