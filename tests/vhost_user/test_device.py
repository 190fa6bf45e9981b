"""What a front end tells of the device, and hears of it, besides its rings: announcements, MTU, log, messages in band."""

from __future__ import annotations

import os
import socket
import struct
import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from tests.programs.test_drive_serve import served
from tests.support.by_hand import PATIENCE, frame, no_descriptor_leaks, wait_equal, wait_for
from tests.support.vhost_user import FEATURES, UNTOLD, BackEnd, ByHand, Guest, InThread, state, u64
from vnetdp.endpoints.base import Endpoint
from vnetdp.endpoints.fault import FaultEndpoint
from vnetdp.endpoints.loopback import NullEndpoint
from vnetdp.endpoints.mailbox import MailboxEndpoint
from vnetdp.vhost_user.message import ProtocolFeature, Request
from vnetdp.virtio import features as f
from vnetdp_kernels import rows as r
from vnetdp_kernels import spec

R = Request
VRING_CALL, VRING_ERR = 4, 5
JUNK = b"\xff"


# --- announcements ---


class SlowEndpoint(Endpoint):
    """Takes a frame when it is let, and sees whether two threads are at it."""

    def __init__(self) -> None:
        super().__init__()
        self.taking = 0
        self.met = False
        self.taken: list[bytes] = []
        self.let = threading.Event()

    def transmit_frames(self, queue: int, frames: Sequence[bytes]) -> None:
        self.taking += 1
        self.met |= self.taking > 1
        self.let.wait(PATIENCE)
        self.taken += [frame[spec.NET_HDR_LEN :] for frame in frames]
        self.taking -= 1


def test_an_announcement_waits_for_the_worker(tmp_path: Path) -> None:
    """The endpoint is the worker's: a capture that two threads write is destroyed."""
    with ExitStack() as stack:
        stack.enter_context(no_descriptor_leaks())
        endpoint = stack.enter_context(SlowEndpoint())
        server = stack.enter_context(served(endpoint, tmp_path / "s"))
        with ByHand.dial(server.path) as end, Guest(end, pairs=1) as guest:
            end.shake_hands()
            guest.share()
            guest.start(0, 1)
            guest.rings[1].send(0, frame(1))
            guest.kicks[1].signal()
            wait_for(lambda: endpoint.taking == 1, "the worker is at it")
            end.send(R.SEND_RARP, bytes.fromhex("525400aabbcc0000"))
            ctl = server.worker.datapath.ctl
            wait_for(lambda: endpoint.met or bool(ctl[r.CTL_DOORBELL]), "the announcement is there")
            endpoint.let.set()
            end.ask(R.GET_QUEUE_NUM)
            assert not endpoint.met
            assert endpoint.taken[0] == frame(1)
            assert endpoint.taken[1][6:14] == bytes.fromhex("525400aabbcc 8035")
            end.leave()


# --- the MTU ---


class InterfaceEndpoint(NullEndpoint):
    """Has an MTU, as a TAP has."""

    _mtu = 1500

    @property
    def mtu(self) -> int | None:
        return self._mtu

    def set_mtu(self, mtu: int) -> None:
        self._mtu = mtu


def told_mtu(end: ByHand) -> int:
    (mtu,) = struct.unpack_from("<H", end.ask(R.GET_CONFIG, struct.pack("<III", 10, 2, 0) + bytes(2)), 12)
    return int(mtu)


def test_an_mtu_is_that_of_one_front_end(tmp_path: Path) -> None:
    interface = InterfaceEndpoint()
    with FaultEndpoint(interface) as endpoint, served(endpoint, tmp_path / "s", mtu=1400) as server:
        for _ in range(2):
            with ByHand.dial(server.path) as end:
                end.shake_hands()
                assert (told_mtu(end), interface.mtu) == (1400, 1400)
                for mtu in (9000, 2000):
                    assert end.tell(R.NET_SET_MTU, u64(mtu))
                    assert (told_mtu(end), interface.mtu) == (mtu, mtu)
                end.leave()
            assert interface.mtu == 1400


def tagged(frame: bytes) -> bytes:
    """Return a frame as long as *frame* with a VLAN tag."""
    return (frame[:12] + b"\x81\0\0\7" + frame[12:])[: len(frame)]


def test_frames_of_the_guest_are_held_to_the_mtu_it_negotiated(tmp_path: Path) -> None:
    """A segment may have any length, the driver's other frames not (5.1.6.2.1); a VLAN tag does not count."""
    with (
        MailboxEndpoint() as wire,
        served(wire, tmp_path / "s", mtu=1400) as server,
        ByHand.dial(server.path) as end,
        Guest(end) as guest,
    ):
        end.shake_hands(FEATURES | f.VIRTIO_NET_F_MTU)
        guest.share()
        guest.start(0, 1)
        for head, data in enumerate((frame(0, 1415), tagged(frame(1, 1419)), frame(2, 1414), tagged(frame(3, 1418)))):
            guest.rings[1].send(head, data)
        guest.kicks[1].signal()
        wait_equal(lambda: guest.rings[1].used_idx, 4)
        counters = wire.counters()
        assert (counters["to_wire"], counters["dropped_long"]) == (2, 2)
        end.leave()


def test_frames_to_the_guest_are_held_to_the_mtu_it_negotiated(tmp_path: Path) -> None:
    """Also to one that it negotiates after another front end did so with another (5.1.4.1)."""
    with MailboxEndpoint() as wire, served(wire, tmp_path / "s", mtu=1400) as server:
        for mtu, features in (
            (1400, FEATURES | f.VIRTIO_NET_F_MTU),
            (None, FEATURES),
            (1400, FEATURES | f.VIRTIO_NET_F_MTU),
        ):
            with ByHand.dial(server.path) as end, Guest(end) as guest:
                end.shake_hands(features)
                guest.share()
                guest.start(0, 1)
                guest.rings[0].post(0, 1, 2, 3)
                guest.kicks[0].signal()
                dropped = wire.counters()["dropped_long"]
                for length in (1415, 1414):
                    wire.put(frame(0, length))
                for length in (1419, 1418):
                    wire.put(tagged(frame(0, length)))
                wait_equal(lambda guest=guest: guest.rings[0].used_idx, 2 if mtu else 4)  # type: ignore[misc]
                assert wire.counters()["dropped_long"] - dropped == (2 if mtu else 0)
                end.leave()


# --- the dirty log ---


def test_a_log_is_answered_as_it_was_said(back_end: BackEnd) -> None:
    """rust-vmm reads the whole structure back, and hangs, or leaves, if it gets less."""
    log = os.memfd_create("log")
    os.ftruncate(log, 4096)
    with ByHand.dial(back_end.path) as end:
        end.shake_hands()
        assert end.ask(R.SET_LOG_BASE, struct.pack("<QQ", 4096, 0), [log]) == struct.pack("<QQ", 4096, 0)
        end.leave()
    os.close(log)


# --- messages in band ---


@contextmanager
def in_band(tmp_path: Path, full: bool = False) -> Iterator[tuple[socket.socket, Guest]]:
    """Give the socket on which the back end talks, and a guest whose rings have no descriptors to be called by."""
    with no_descriptor_leaks():
        back_end = InThread(tmp_path, inband=True)
        ours, theirs = socket.socketpair()
        with ours, ByHand.dial(back_end.path) as end, Guest(end) as guest:
            end.shake_hands(protocol=UNTOLD | ProtocolFeature.INBAND_NOTIFICATIONS)
            with theirs:
                with suppress(BlockingIOError):
                    while full:
                        theirs.send(JUNK, socket.MSG_DONTWAIT)
                assert end.tell(R.SET_BACKEND_REQ_FD, b"", [theirs.fileno()])
            guest.share()
            for index in (0, 1):
                guest.describe(index)
                end.send(R.SET_VRING_CALL, u64(index | 0x100))
                end.send(R.SET_VRING_KICK, u64(index), [guest.kicks[index].fd])
                assert end.tell(R.SET_VRING_ENABLE, state(index, 1))
            ours.settimeout(PATIENCE)
            yield ours, guest
            end.leave()
        back_end.close()


def heard(ours: socket.socket) -> tuple[int, int]:
    """Return the next message of the back end's: its number, and the ring it speaks of."""
    request, flags, size, index, _ = struct.unpack("<IIIII", ours.recv(20, socket.MSG_WAITALL))
    assert (flags, size) == (1, 8)
    return request, index


def test_a_ring_that_broke_is_told_of_in_band(tmp_path: Path) -> None:
    with in_band(tmp_path) as (ours, guest):
        guest.rings[1].offer(999)
        guest.kicks[1].signal()
        while (message := heard(ours))[0] == VRING_CALL:
            pass
        assert message == (VRING_ERR, 1)


def test_calls_that_find_the_socket_full_are_sent_once_there_is_room(tmp_path: Path) -> None:
    with in_band(tmp_path, full=True) as (ours, guest):
        for n in range(3):
            guest.echo(n)
            guest.end.ask(R.GET_QUEUE_NUM)
        while ours.recv(1, socket.MSG_PEEK) == JUNK:
            ours.recv(1)
        called: set[tuple[int, int]] = set()
        while called != {(VRING_CALL, 0), (VRING_CALL, 1)}:
            called.add(heard(ours))
