"""What Linux does as a front end (User Mode Linux), and no other: each of these once cost a guest its network."""

from __future__ import annotations

import os
import socket
import struct
from pathlib import Path

from tests.support.by_hand import frame, wait_for
from tests.support.vhost_user import FEATURES, NUM, UNTOLD, BackEnd, ByHand, Guest, InThread, costs_nothing, state, u64
from vnetdp.vhost_user.message import ProtocolFeature, Request

R = Request
P = ProtocolFeature


def test_the_message_that_takes_acknowledgements_is_acknowledged(back_end: BackEnd) -> None:
    with ByHand.dial(back_end.path) as end:
        end.ask(R.GET_PROTOCOL_FEATURES)
        assert end.tell(R.SET_PROTOCOL_FEATURES, u64(P.REPLY_ACK | P.CONFIG))
        assert end.tell(R.SET_FEATURES, u64(FEATURES))


def test_a_memory_table_with_room_to_spare(back_end: BackEnd) -> None:
    with ByHand.dial(back_end.path) as end, Guest(end) as guest:
        end.shake_hands()
        assert end.tell(R.SET_MEM_TABLE, guest.table + bytes(32), [guest.fd])
        guest.start(0, 1)
        guest.echo()
        end.leave()


def test_a_ring_waits_until_it_is_enabled(back_end: BackEnd) -> None:
    """What is in it by then is not thrown away, as a disabled ring's is."""
    with ByHand.dial(back_end.path) as end, Guest(end) as guest:
        end.shake_hands()
        guest.share()
        receiveq, transmitq = guest.rings[:2]
        receiveq.post(0)
        transmitq.send(0, frame(7))
        for index in (0, 1):
            guest.describe(index)
            assert end.tell(R.SET_VRING_KICK, u64(index), [guest.kicks[index].fd])
        guest.kicks[1].signal()
        assert end.tell(R.SET_OWNER)
        assert transmitq.used_idx == 0
        for index in (0, 1):
            assert end.tell(R.SET_VRING_ENABLE, state(index, 1))
        wait_for(lambda: receiveq.used_idx == 1, "the frame came back")
        assert guest.memory.read(receiveq.buffer(0) + 12, len(frame(7))) == frame(7)
        end.leave()


def test_rings_that_are_disabled_and_set_up_anew(back_end: BackEnd) -> None:
    """No GET_VRING_BASE between: the driver was unloaded, and its memory is somebody else's.

    A transmitq that is disabled is still emptied, and may meet what the memory holds now: then it says so, and stands still.
    """
    with costs_nothing(back_end, None), ByHand.dial(back_end.path) as end:
        end.shake_hands()
        with Guest(end) as guest:
            guest.share()
            guest.start(0, 1)
            guest.echo()
            for index in (1, 0):
                assert end.tell(R.SET_VRING_ENABLE, state(index, 0))
            for ring in guest.rings[:2]:
                guest.memory.write(ring.avail, os.urandom(4 + 2 * NUM))
            assert end.tell(R.SET_FEATURES, u64(FEATURES))
            with Guest(end) as following:
                following.share()
                following.start(0, 1)
                following.echo()
                end.leave()


def test_calls_through_pipes_that_nobody_reads_any_more(back_end: BackEnd) -> None:
    with costs_nothing(back_end, 0), ByHand.dial(back_end.path) as end, Guest(end) as guest:
        end.shake_hands()
        guest.share()
        guest.start(0, 1)
        for index in (0, 1):
            reader, writer = os.pipe()
            end.send(R.SET_VRING_CALL, u64(index), [writer])
            os.close(writer)
            assert end.tell(R.SET_OWNER)
            os.close(reader)
        guest.echo()
        assert end.tell(R.SET_MEM_TABLE, guest.table, [guest.fd])
        guest.echo(1)
        end.leave()


def test_in_band_calls_without_set_vring_call(tmp_path: Path) -> None:
    back_end = InThread(tmp_path, inband=True)
    ours, theirs = socket.socketpair()
    with ours, ByHand.dial(back_end.path) as end, Guest(end) as guest:
        end.shake_hands(protocol=UNTOLD | P.INBAND_NOTIFICATIONS)
        with theirs:
            assert end.tell(R.SET_BACKEND_REQ_FD, fds=[theirs.fileno()])
        guest.share()
        guest.rings[0].post(0)
        guest.rings[1].send(0, frame(3))
        for index in (0, 1):
            end.send(R.SET_VRING_NUM, state(index, NUM))
            end.send(R.SET_VRING_BASE, state(index, 0))
            end.send(R.SET_VRING_ADDR, guest.addr(index))
            assert end.tell(R.SET_VRING_ENABLE, state(index, 1))
        for index in (0, 1):
            assert end.tell(R.VRING_KICK, state(index, 0))
        ours.settimeout(10)
        called: set[int] = set()
        while called != {0, 1}:
            request, _, size = struct.unpack("<III", ours.recv(12, socket.MSG_WAITALL))
            assert (request, size) == (4, 8)
            called.add(struct.unpack("<II", ours.recv(8, socket.MSG_WAITALL))[0])
        wait_for(lambda: guest.rings[0].used_idx == 1, "the frame came back")
        end.leave()
    back_end.close()
