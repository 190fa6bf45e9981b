"""The socket: whole messages with their descriptors; and whatever goes wrong, none is left open."""

from __future__ import annotations

import array
import os
import resource
import socket
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from tests.support.by_hand import no_descriptor_leaks
from tests.support.vhost_user import descriptors, spare
from vnetdp.errors import ProtocolError, RemoteProtocolError
from vnetdp.vhost_user.connection import BackEndConnection
from vnetdp.vhost_user.message import MAX_PAYLOAD, Header, Request
from vnetdp.vhost_user.transport import Transport, close_fds


def head(request: int = Request.SET_VRING_KICK, size: int = 8, flags: int = 1) -> bytes:
    return struct.pack("<III", request, flags, size)


@contextmanager
def connected(timeout_s: float | None = 30.0) -> Iterator[tuple[socket.socket, Transport]]:
    """Give a peer's socket and our end of it, and check that not one descriptor stays open."""
    with no_descriptor_leaks():
        peer, ours = socket.socketpair()
        ours.settimeout(timeout_s)
        transport = Transport(ours)
        try:
            yield peer, transport
        finally:
            peer.close()
            transport.close()


def send(peer: socket.socket, data: bytes, n_fds: int = 0) -> None:
    with spare(n_fds) as fds:
        socket.send_fds(peer, [data], fds)


def refused(transport: Transport, match: str) -> None:
    before = len(descriptors())
    with pytest.raises(RemoteProtocolError, match=match):
        transport.receive()
    assert len(descriptors()) == before


@pytest.mark.parametrize("n_fds", [0, 1, 8])
def test_a_message_comes_whole_with_its_descriptors(n_fds: int) -> None:
    with connected() as (peer, transport):
        send(peer, head() + bytes(range(8)), n_fds)
        got = transport.receive()
        assert got is not None
        header, data, fds = got
        assert (header, data, len(fds)) == (Header(Request.SET_VRING_KICK, 1, 8), bytes(range(8)), n_fds)
        for fd in fds:
            assert not os.get_inheritable(fd)
        close_fds(fds)


def test_it_may_come_in_pieces_with_descriptors_on_any_of_them() -> None:
    with connected() as (peer, transport):
        whole = head() + bytes(range(8))

        def trickle() -> None:
            for n in range(len(whole)):
                send(peer, whole[n : n + 1], int(n in (0, 5, 12, 19)))

        thread = threading.Thread(target=trickle)
        thread.start()
        got = transport.receive()
        thread.join()
        assert got is not None
        assert (got[1], len(got[2])) == (bytes(range(8)), 4)
        close_fds(got[2])


def test_messages_back_to_back_keep_their_descriptors_apart() -> None:
    with connected() as (peer, transport):
        for n in range(4):
            send(peer, head(size=4) + bytes([n] * 4), n)
        for n in range(4):
            got = transport.receive()
            assert got is not None
            assert (got[1], len(got[2])) == (bytes([n] * 4), n)
            close_fds(got[2])


def test_a_peer_that_leaves_between_messages_has_left() -> None:
    with connected() as (peer, transport):
        send(peer, head(size=0))
        peer.close()
        assert transport.receive() is not None
        assert transport.receive() is None


@pytest.mark.parametrize("length", range(1, 20))
@pytest.mark.parametrize("n_fds", [0, 3])
def test_a_message_cut_short(length: int, n_fds: int) -> None:
    with connected() as (peer, transport):
        send(peer, (head() + bytes(8))[:length], n_fds)
        peer.close()
        refused(transport, "connection ended inside")


@pytest.mark.parametrize("n_fds", [9, 10, 63, 64])
def test_more_descriptors_than_a_message_may_have(n_fds: int) -> None:
    with connected() as (peer, transport):
        send(peer, head() + bytes(8), n_fds)
        refused(transport, "at most 8")


def test_a_message_that_comes_slowly_holds_no_more_descriptors_than_another() -> None:
    with connected(5.0) as (peer, transport):
        send(peer, head(size=MAX_PAYLOAD))
        for _ in range(9):
            send(peer, b"x", 1)
        refused(transport, "at most 8")  # and the rest of it is not waited for


@pytest.mark.parametrize("n_fds", [65, 253])
def test_more_descriptors_than_are_taken_off_the_socket(n_fds: int) -> None:
    with connected() as (peer, transport):
        send(peer, head() + bytes(8), n_fds)
        refused(transport, "more descriptors")


def test_no_descriptors_left_to_take_one() -> None:
    """MSG_CTRUNC of the other kind: the process may open no more."""
    with connected() as (peer, transport), spare(8) as fds:
        socket.send_fds(peer, [head() + bytes(8)], fds)
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        free = sorted(set(range(len(descriptors()) + 8)) - set(descriptors()))
        resource.setrlimit(resource.RLIMIT_NOFILE, (free[3], hard))  # three more, and no fourth
        try:
            with pytest.raises(RemoteProtocolError, match="more descriptors than the 8"):
                transport.receive()
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.parametrize("size", [MAX_PAYLOAD + 1, 0x7FFFFFFF, 2**32 - 1])
def test_a_giant_size_is_not_waited_for(size: int) -> None:
    with connected() as (peer, transport):
        send(peer, head(size=size), 2)
        refused(transport, "at most 4096")


@pytest.mark.parametrize("flags", [0, 2, 3, 4, 0xFFFFFFFC])
def test_another_version(flags: int) -> None:
    with connected() as (peer, transport):
        send(peer, head(flags=flags) + bytes(8), 1)
        refused(transport, "version")


def test_silence_in_the_middle_of_a_message() -> None:
    with connected(0.05) as (peer, transport):
        send(peer, head(), 2)
        with pytest.raises(TimeoutError):
            transport.receive()


def test_a_connection_that_breaks() -> None:
    with connected() as (peer, transport):
        send(peer, head(), 2)
        transport.sock.shutdown(socket.SHUT_RD)
        refused(transport, "connection ended inside")


@pytest.mark.parametrize("request_", [Request.GET_FEATURES, 0, 26, 27, 44, 2**32 - 1])
@pytest.mark.parametrize("n_fds", [1, 8])
def test_descriptors_of_a_message_that_may_not_have_them_are_the_callers(request_: int, n_fds: int) -> None:
    """They pass through here whole: whoever looks at the request closes them, whatever becomes of it."""
    with connected() as (peer, transport):
        send(peer, head(request_, 0), n_fds)
        got = transport.receive()
        assert got is not None
        header, data, fds = got
        assert len(fds) == n_fds
        with pytest.raises(ProtocolError, match="unknown request" if request_ != 1 else "descriptors"):
            BackEndConnection().receive(header, data, fds)
        close_fds(fds)


def test_what_is_sent_arrives_with_descriptors_that_stay_the_senders() -> None:
    with connected() as (peer, transport), spare(8) as fds:
        for n in (0, 1, 8):
            transport.send(head() + bytes(8), fds[:n])
            data, ancillary, _, _ = peer.recvmsg(100, socket.CMSG_SPACE(4 * 8))
            assert data == head() + bytes(8)
            got = [fd for _, _, content in ancillary for fd in array.array("i", content)]
            assert len(got) == n
            close_fds(got)
        assert all(os.fstat(fd) for fd in fds)


def test_more_than_a_socket_takes_at_once_is_sent_all_the_same() -> None:
    with connected() as (peer, transport), spare(1) as fds:
        transport.sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1)
        big = os.urandom(1 << 20)
        read = bytearray()
        got: list[int] = []

        def drain() -> None:
            while len(read) < len(big):
                data, ancillary, _, _ = peer.recvmsg(1 << 16, socket.CMSG_SPACE(4))
                read.extend(data)
                got.extend(fd for _, _, content in ancillary for fd in array.array("i", content))

        thread = threading.Thread(target=drain)
        thread.start()
        transport.send(big, fds)
        thread.join()
        assert bytes(read) == big
        assert len(got) == 1
        close_fds(got)
