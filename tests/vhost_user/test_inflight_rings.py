"""The inflight area of rings that run: started in another order, in another size, and moved to other guests."""

from __future__ import annotations

import os
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.support.by_hand import frame, no_descriptor_leaks, wait_equal, wait_for
from tests.support.vhost_user import GPA, NUM, SPOKEN, UNTOLD, ByHand, Guest, InThread, inflight, state, u64
from vnetdp.programs.bridge import Bridge
from vnetdp.shared.notify import EventFd
from vnetdp.testing import READY, HandRing
from vnetdp.vhost_user.message import Inflight, ProtocolFeature, Request
from vnetdp_kernels import rows as r
from vnetdp_kernels import spec

R = Request


# --- rings that come in another order, or another size ---


@contextmanager
def attached(tmp_path: Path, protocol: ProtocolFeature = UNTOLD) -> Iterator[Guest]:
    """Give a guest whose memory is shared, and whose rings are not started."""
    with no_descriptor_leaks():
        back_end = InThread(tmp_path)
        with ByHand.dial(back_end.path) as end, Guest(end) as guest:
            end.shake_hands(protocol=protocol)
            guest.share()
            yield guest
            end.leave()
        back_end.close()


@pytest.mark.parametrize("order", [(0, 1), (1, 0)], ids=str)
def test_a_move_that_was_cut_off_is_finished_whichever_ring_is_started_first(
    tmp_path: Path, order: tuple[int, int]
) -> None:
    with attached(tmp_path) as guest:
        fds: list[int] = []
        guest.end.send(R.GET_INFLIGHT_FD, inflight(0, 0, 2, NUM))
        guest.end.answer(R.GET_INFLIGHT_FD, fds)
        journal = 2 * 320 + r.JOURNAL_LEN
        os.pwrite(fds[0], struct.pack("<HHH", 1, 1, 1), journal)
        for index in (0, 1):
            os.pwrite(fds[0], struct.pack("<QHH", 0, 1, NUM), index * 320)
        receiveq, transmitq = guest.rings[:2]
        receiveq.post(0, 1, 2)
        receiveq.used_idx = 1  # and the transmitq's is still 0
        transmitq.send(0, frame(0))
        transmitq.send(1, frame(1))
        for index in order:
            guest.start(index)
            guest.end.ask(R.GET_QUEUE_NUM)
        wait_equal(lambda: transmitq.used_idx, 2)
        wait_equal(lambda: receiveq.used_idx, 2)
        assert guest.memory.read(receiveq.buffer(1) + spec.NET_HDR_LEN, 60) == frame(1)
        os.close(fds[0])


@pytest.mark.parametrize("how", [(R.GET_VRING_BASE,), (R.SET_STATUS,), (R.SET_STATUS, R.GET_VRING_BASE)], ids=str)
def test_a_guest_that_comes_back_with_smaller_rings(tmp_path: Path, how: tuple[Request, ...]) -> None:
    with attached(tmp_path, SPOKEN) as guest:
        guest.end.ask(R.GET_INFLIGHT_FD, inflight(0, 0, 4, NUM))
        guest.start(0, 1)
        assert guest.end.tell(R.SET_STATUS, u64(READY))
        guest.echo()
        for request in how:
            if request is R.SET_STATUS:
                assert guest.end.tell(R.SET_STATUS, u64(0))
            else:
                for index in (0, 1):
                    guest.end.ask(R.GET_VRING_BASE, state(index, 0))
        at = GPA
        for index in (0, 1):
            guest.rings[index] = HandRing(guest.memory, at, NUM // 2)
            at = guest.rings[index].end
            assert guest.end.tell(R.SET_VRING_NUM, state(index, NUM // 2))
            assert guest.end.tell(R.SET_VRING_BASE, state(index, 0))
            assert guest.end.tell(R.SET_VRING_ADDR, guest.addr(index))
            assert guest.end.tell(R.SET_VRING_KICK, u64(index), [guest.kicks[index].fd])
        assert guest.end.tell(R.SET_STATUS, u64(READY))
        guest.rings[0].post(0)
        guest.rings[1].send(0, frame(1))
        guest.kicks[1].signal()
        wait_equal(lambda: guest.rings[0].used_idx, 1)


# --- who keeps a journal ---


def journal_after_traffic(end: ByHand, guest: Guest, send: Callable[[], None]) -> bytes:
    """Return what the journals of an area hold after *send*."""
    end.send(R.GET_INFLIGHT_FD, inflight(0, 0, 2, NUM))
    fds: list[int] = []
    said = Inflight.decode(end.answer(R.GET_INFLIGHT_FD, fds))
    guest.share()
    guest.start(0, 1)
    send()
    content = os.pread(fds[0], said.size, 0)
    os.close(fds[0])
    return content[2 * 320 :]


def test_an_echo_keeps_one(tmp_path: Path) -> None:
    with no_descriptor_leaks():
        back_end = InThread(tmp_path)
        with ByHand.dial(back_end.path) as end, Guest(end) as guest:
            end.shake_hands()
            journal = journal_after_traffic(end, guest, guest.echo)
            assert journal.rstrip(b"\0") == bytes(64) + struct.pack("<HH", 1, 1).rstrip(b"\0")
            end.leave()
        back_end.close()


def test_a_bridge_keeps_none(tmp_path: Path) -> None:
    """What it moves goes into another guest's ring: how far that one is says nothing about ours."""
    paths = [str(tmp_path / name) for name in ("left", "right")]
    with no_descriptor_leaks(), ExitStack() as stack, Bridge(*paths) as bridge, EventFd() as wake:
        stop: list[bool] = []
        thread = _serving(bridge, stop)
        ends = [stack.enter_context(ByHand.dial(path)) for path in paths]
        guests = [stack.enter_context(Guest(end, pairs=1)) for end in ends]
        for end in ends:
            end.shake_hands(protocol=UNTOLD & ~ProtocolFeature.RARP)
        guests[1].share()
        guests[1].start(0, 1)
        guests[1].rings[0].post(0)
        ends[1].send(R.GET_FEATURES)
        ends[1].answer(R.GET_FEATURES)  # its rings run: a frame for a guest that has none yet is dropped

        def send() -> None:
            guests[0].rings[1].send(0, frame(1))
            guests[0].kicks[1].signal()
            wait_for(lambda: guests[0].rings[1].used_idx == 1, "the frame was taken")
            wait_for(lambda: guests[1].rings[0].used_idx == 1, "the frame arrived")

        assert not journal_after_traffic(ends[0], guests[0], send).strip(b"\0")
        for end in ends:
            end.leave()
        stop.append(True)
        wake.signal()
        thread.join()


def _serving(bridge: Bridge, stop: list[bool]) -> Any:
    thread = threading.Thread(target=bridge.serve, args=(lambda: bool(stop),))
    thread.start()
    return thread
