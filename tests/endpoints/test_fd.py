"""FdEndpoint: an open descriptor is told apart by its kind, used as a copy, and refused in one line if it is no wire."""

from __future__ import annotations

import fcntl
import os
import socket
import struct
from pathlib import Path

import pytest
import pytun

from tests.endpoints.joined import guest_of, receive_all, send_all
from tests.endpoints.wired import Peer
from tests.support.by_hand import frame, no_descriptor_leaks, wait_for
from vnetdp.bench.netns import NetnsPair
from vnetdp.endpoints.fd import FdEndpoint
from vnetdp.endpoints.netns import run_in
from vnetdp.endpoints.spec import parse_endpoint
from vnetdp.endpoints.tap import TapEndpoint
from vnetdp.errors import EndpointError, VnetdpError
from vnetdp_kernels import rows as r


def test_a_stream_socket_carries_frames_behind_their_lengths() -> None:
    ours, theirs = socket.socketpair()
    with theirs, Peer(theirs) as peer, parse_endpoint(f"fd:{ours.fileno()}") as endpoint, guest_of(endpoint) as driver:
        ours.close()  # the endpoint has a copy
        assert isinstance(endpoint, FdEndpoint)
        assert (endpoint.kind, endpoint.vnet_hdr) == (r.KIND_STREAM, False)
        send_all(driver, [frame(1), frame(2, 1500)])
        assert peer.receive(2) == [frame(1), frame(2, 1500)]
        peer.send(frame(3))
        assert receive_all(driver, 1) == [frame(3)]
        assert not endpoint.gone
        peer.close()
        wait_for(lambda: endpoint.gone, "its end was seen")
        assert [failure.partition(": ")[2] for failure in endpoint.failures] == ["the peer is gone"]


def test_a_tcp_connection_does_too() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        theirs = socket.create_connection(server.getsockname())
        ours, _ = server.accept()
    with ours, Peer(theirs) as peer, FdEndpoint(ours.fileno()) as endpoint, guest_of(endpoint) as driver:
        frames = [frame(k, 1500) for k in range(200)]
        send_all(driver, frames)
        assert peer.receive(200) == frames


def test_a_datagram_socket_carries_a_frame_each() -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    with ours, theirs, FdEndpoint(ours.fileno()) as endpoint, guest_of(endpoint) as driver:
        assert endpoint.kind == r.KIND_DGRAM
        send_all(driver, [frame(1)])
        assert theirs.recv(4096) == frame(1)
        theirs.send(frame(2))
        assert receive_all(driver, 1) == [frame(2)]
        theirs.close()
        send_all(driver, [frame(3)])
        wait_for(lambda: endpoint.gone, "its end was seen")


def test_a_tap_passes_its_header(spaces: NetnsPair) -> None:
    """And has the length of header that it was found with, when the endpoint is closed."""
    get_header_len = 0x800454D7
    flags = pytun.IFF_TAP | pytun.IFF_NO_PI | pytun.IFF_VNET_HDR
    device = run_in(spaces.names["a"], lambda: pytun.TunTapDevice("vtap", flags))
    try:
        before = fcntl.ioctl(device.fileno(), get_header_len, bytes(4))
        run_in(spaces.names["a"], device.up)
        with FdEndpoint(device.fileno()) as endpoint:
            assert isinstance(endpoint, TapEndpoint)
            assert (endpoint.kind, endpoint.vnet_hdr, endpoint.mtu) == (r.KIND_TAP, True, 1500)
            assert struct.unpack("i", fcntl.ioctl(device.fileno(), get_header_len, bytes(4))) == (12,)
            spaces.run("a", ["ip", "addr", "add", "10.9.0.1/24", "dev", "vtap"])
            with guest_of(endpoint) as driver:
                request = bytes.fromhex("ffffffffffff 020000000002 0806 0001 0800 06 04 0001 020000000002 0a090002")
                request += bytes(6) + bytes([10, 9, 0, 1])
                send_all(driver, [request])
                wait_for(lambda: any(f[12:14] == b"\x08\x06" and f[21] == 2 for f in driver.receive()), "ARP's answer")
        assert fcntl.ioctl(device.fileno(), get_header_len, bytes(4)) == before
    finally:
        device.close()


def test_a_descriptor_that_is_no_wire_is_refused(tmp_path: Path) -> None:
    file = os.open(tmp_path, os.O_RDONLY)
    packets, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    alone = socket.socket(socket.AF_UNIX)
    with packets, other, alone:
        for text, says in (
            (f"fd:{file}", "it is neither a socket nor a TAP"),
            (f"fd:{packets.fileno()}", "it is a socket of type 5: take a stream (1) or datagram (2) socket"),
            (f"fd:{alone.fileno()}", "the socket has no peer: connect it first"),
            ("fd:123456", "it is not open: have the program that starts this one leave it open"),
            ("fd:", "'' is not the number of a descriptor: write fd:3"),
            ("fd:-1", "'-1' is not the number of a descriptor: write fd:3"),
        ):
            with no_descriptor_leaks(), pytest.raises(VnetdpError) as raised:
                parse_endpoint(text)
            assert str(raised.value).partition(": ")[2] == says
    os.close(file)


def test_a_descriptor_is_one_queue() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs, pytest.raises(EndpointError, match="2 queues: a socket has one"):
        FdEndpoint(ours.fileno(), 2)
