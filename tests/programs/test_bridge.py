"""Two vhost-user guests joined: numbered packets both ways, one of them leaving and coming back."""

from __future__ import annotations

import errno
import os
import struct
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path

import pytest

from tests.support.by_hand import PATIENCE, frame, no_descriptor_leaks, scaled, wait_equal, wait_for
from tests.support.vhost_user import SPOKEN, UNTOLD, ByHand, u64
from tests.support.vhost_user import Guest as GuestByHand
from vnetdp.device.device import NetDevice
from vnetdp.endpoints.loopback import GenerateEndpoint, NullEndpoint
from vnetdp.errors import VnetdpError
from vnetdp.guest.driver import Driver, memory_for
from vnetdp.programs.bridge import Bridge
from vnetdp.vhost_user.front_end.front_end import VhostUserFrontEnd
from vnetdp.vhost_user.message import ProtocolFeature, Request
from vnetdp_kernels import rows as r
from vnetdp_kernels.platform import interrupt

NOT_OFFERED = ProtocolFeature.RARP | ProtocolFeature.DEVICE_STATE
COUNT = scaled(200_000, 200)


class Guest:
    """A driver on a vhost-user front end."""

    def __init__(self, path: str, size: int, queue_pairs: int = 1) -> None:
        self.generator = GenerateEndpoint(queue_pairs, size=size, count=COUNT)
        with ExitStack() as stack:
            front_end = VhostUserFrontEnd(path, queue_pairs)
            stack.callback(front_end.close)
            assert front_end.connect(PATIENCE)
            memory = stack.enter_context(memory_for(queue_pairs))
            nowhere = stack.enter_context(NullEndpoint(queue_pairs))
            device = NetDevice(
                memory, nowhere, queue_pairs=queue_pairs, offered=front_end.features, vhost=front_end.backends,
                fallback=False,
            )  # fmt: skip
            stack.callback(device.close)
            self.driver = Driver(device, memory, self.generator, queue_pairs=queue_pairs)
            stack.callback(self.driver.close)
            assert device.last_error is None
            self._stack = stack.pop_all()

    def received(self) -> int:
        return sum(queue["packets"] for queue in self.driver.counters()[0::2])

    def leave(self) -> None:
        self._stack.close()
        self.generator.close()


@contextmanager
def by_hand(*paths: str) -> Iterator[list[GuestByHand]]:
    """Give a guest by hand on each socket, the rings of its one pair started, and no receive buffers."""
    with ExitStack() as stack:
        ends = [stack.enter_context(ByHand.dial(path)) for path in paths]
        guests = [stack.enter_context(GuestByHand(end, pairs=1)) for end in ends]
        for guest in guests:
            guest.end.shake_hands(protocol=UNTOLD & ~ProtocolFeature.RARP)
            guest.share()
            guest.start(0, 1)
            guest.end.ask(Request.GET_QUEUE_NUM)  # they are started once this is answered
        yield guests
        for end in ends:
            end.leave()


def send(guest: GuestByHand, head: int) -> None:
    guest.rings[1].send(head, frame(head))
    guest.kicks[1].signal()


def run_bridge(tmp_path: Path, stack: ExitStack, queue_pairs: int = 1) -> tuple[Bridge, str, str]:
    left, right = str(tmp_path / "left"), str(tmp_path / "right")
    bridge = stack.enter_context(Bridge(left, right, queue_pairs=queue_pairs))
    stop = threading.Event()
    thread = threading.Thread(target=bridge.serve, args=(stop.is_set,))
    thread.start()
    stack.callback(thread.join)
    stack.callback(stop.set)
    return bridge, left, right


def test_numbered_packets_both_ways(tmp_path: Path) -> None:
    with ExitStack() as stack:
        bridge, left, right = run_bridge(tmp_path, stack, 2)
        guests = [Guest(left, 64, 2), Guest(right, 1500, 2)]
        for guest in guests:
            guest.driver.start()
        for guest, other in (guests, guests[::-1]):
            wait_equal(guest.received, 2 * COUNT)
            guest.driver.check()
            assert guest.generator.ledger_against(other.generator).clean
        report = bridge.report()
        assert report["left_to_right"]["packets"] == report["right_to_left"]["packets"] == 2 * COUNT
        for guest in guests:
            guest.leave()


def test_a_guest_leaves_and_comes_back(tmp_path: Path) -> None:
    with ExitStack() as stack:
        bridge, left, right = run_bridge(tmp_path, stack)
        stays = Guest(left, 64)
        stays.generator.rows[:, r.EP_LIMIT] = -1
        stays.driver.start()
        for turn in range(1, 4):
            other = Guest(right, 64)
            other.driver.start()
            wait_equal(stays.received, turn * COUNT)
            wait_for(partial(heard, other), "the one that came back hears the one that stayed")
            stays.driver.check()
            other.driver.check()
            other.leave()
            assert bridge.report()["served"] == [1, turn]
        assert bridge.report()["right_to_left"]["packets"] == 3 * COUNT
        assert bridge.report()["right_to_left"]["dropped_no_guest"] == 0
        wait_for(lambda: bridge.report()["left_to_right"]["dropped_no_guest"] > 0, "frames for nobody are counted")
        stays.leave()


def heard(guest: Guest) -> bool:
    return guest.received() >= COUNT


def test_each_guest_has_an_address_of_its_own_and_none_can_announce_it(tmp_path: Path) -> None:
    with ExitStack() as stack:
        _, *paths = run_bridge(tmp_path, stack)
        macs = set()
        for path in paths:
            end = stack.enter_context(ByHand.dial(path))
            end.shake_hands(protocol=SPOKEN & ~ProtocolFeature.RARP)
            macs.add(end.ask(Request.GET_CONFIG, struct.pack("<III", 0, 6, 0) + bytes(6))[12:])
            offered = struct.unpack("<Q", end.ask(Request.GET_PROTOCOL_FEATURES))[0]
            assert not offered & NOT_OFFERED
            end.leave()
        assert len(macs) == 2


def test_a_full_call_of_one_guest_costs_the_other_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No system call can be interrupted, and none has to be: a thread that waited in one would stay there."""
    monkeypatch.setattr(interrupt, "interrupt", lambda _ident: None)
    full = os.eventfd(0)
    os.eventfd_write(full, (1 << 64) - 2)
    with ExitStack() as stack:
        _, left, right = run_bridge(tmp_path, stack)
        receiver, sender = stack.enter_context(by_hand(left, right))
        for index in (0, 1):
            assert receiver.end.tell(Request.SET_VRING_CALL, u64(index), [full])
        receiver.rings[0].post(*range(8))
        for head in range(8):
            send(sender, head)
            wait_equal(lambda: receiver.rings[0].used_idx, head + 1)
            sender.end.ask(Request.GET_QUEUE_NUM)
    os.close(full)


def test_what_ends_a_side_ends_the_bridge_and_is_raised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Bridge(str(tmp_path / "left"), str(tmp_path / "right")) as bridge:

        def fails(*_: object) -> None:
            raise OSError(errno.EIO, "as asked")

        monkeypatch.setattr(bridge.servers[1], "run", fails)
        with pytest.raises(OSError, match="as asked"):
            bridge.serve(lambda: False)


def test_it_sleeps_while_neither_guest_sends(tmp_path: Path) -> None:
    """Receive buffers lie ready all the time: that is no reason to look again."""
    with ExitStack() as stack:
        bridge, left, right = run_bridge(tmp_path, stack)
        guests = stack.enter_context(by_hand(left, right))
        for guest in guests:
            guest.rings[0].post(*range(8))
            guest.kicks[0].signal()
        asleep(bridge, 0)
        passes = int(bridge.ctl[r.CTL_PASSES])
        for head in range(8):
            for guest, other in (guests, guests[::-1]):
                sleeps = int(bridge.ctl[r.CTL_SLEEPS])
                send(guest, head)
                wait_equal(lambda other=other: other.rings[0].used_idx, head + 1)  # type: ignore[misc]
                asleep(bridge, sleeps)
        # For each frame a pass that moves it, one that finds nothing, and perhaps one for an avail.idx that moved meanwhile.
        assert bridge.ctl[r.CTL_PASSES] - passes <= 3 * 16


def test_a_ring_just_started_calls_its_driver_once(tmp_path: Path) -> None:
    """Whoever served it before may have used chains, and ended before it called."""
    with ExitStack() as stack:
        _, left, right = run_bridge(tmp_path, stack)
        for guest in stack.enter_context(by_hand(left, right)):
            for call in guest.calls:
                wait_for(lambda call=call: call.clear() > 0, "a call")  # type: ignore[misc]


def asleep(bridge: Bridge, sleeps: int) -> None:
    """Wait until the bridge has slept more than *sleeps* times; it may look round a few thousand times until then."""
    passes = int(bridge.ctl[r.CTL_PASSES])
    wait_for(lambda: bridge.ctl[r.CTL_SLEEPS] > sleeps or bridge.ctl[r.CTL_PASSES] > passes + 5000, "it sleeps")
    assert bridge.ctl[r.CTL_SLEEPS] > sleeps


def test_frames_wait_for_receive_buffers_without_a_busy_loop(tmp_path: Path) -> None:
    with ExitStack() as stack:
        bridge, left, right = run_bridge(tmp_path, stack)
        sender, receiver = stack.enter_context(by_hand(left, right))
        sleeps = int(bridge.ctl[r.CTL_SLEEPS])
        for head in range(3):
            send(sender, head)
        for n in range(3):
            asleep(bridge, sleeps)
            assert receiver.rings[0].used_idx == n
            sleeps = int(bridge.ctl[r.CTL_SLEEPS])
            receiver.rings[0].post(n)
            receiver.kicks[0].signal()
            wait_equal(lambda: receiver.rings[0].used_idx, n + 1)
            assert receiver.memory.read(receiver.rings[0].buffer(n) + 12, 60) == frame(n)


class Mortal(Bridge):
    """One with a defect: asked to, it ends the thread that joins the guests."""

    deadly = False

    def run(self, budget: int = -1, poll_us: int = 0, timeout_ms: int = 0) -> tuple[int, int]:
        if self.deadly:
            raise RuntimeError("a defect")
        return super().run(budget, poll_us, timeout_ms)


def test_guests_are_left_when_what_joins_them_has_ended(tmp_path: Path) -> None:
    left, right = str(tmp_path / "left"), str(tmp_path / "right")
    with no_descriptor_leaks(), ThreadPoolExecutor(1) as pool, Mortal(left, right) as bridge:
        serving = pool.submit(bridge.serve, lambda: False)
        with ByHand.dial(left) as one, ByHand.dial(right) as other:
            for end in (one, other):
                assert end.ask(Request.GET_FEATURES)
            bridge.deadly = True
            with bridge._loop_thread.paused():
                pass
            assert one.left()
            assert other.left()
        with pytest.raises(VnetdpError, match="the worker has ended: RuntimeError: a defect"):
            serving.result(PATIENCE)
