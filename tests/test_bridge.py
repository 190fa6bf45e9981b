"""Two vhost-user guests joined: numbered packets both ways, one of them leaving and coming back."""

from __future__ import annotations

import threading
import time
from contextlib import ExitStack
from pathlib import Path

from numba.core import config

from vnetdp.backends.vhost_user import VhostUserFrontEnd
from vnetdp.bridge import Bridge
from vnetdp.device import NetDevice
from vnetdp.driver import Driver, memory_for
from vnetdp.endpoints.loopback import GenerateEndpoint, NullEndpoint

COUNT = 200 if config.DISABLE_JIT else 200_000


class Guest:
    """A driver on a vhost-user front end."""

    def __init__(self, path: str, size: int, queue_pairs: int = 1) -> None:
        self.generator = GenerateEndpoint(queue_pairs, size=size, count=COUNT)
        with ExitStack() as stack:
            front_end = VhostUserFrontEnd(path, queue_pairs)
            stack.callback(front_end.close)
            assert front_end.connect(1.0)
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


def run_bridge(tmp_path: Path, stack: ExitStack, queue_pairs: int = 1) -> tuple[Bridge, str, str]:
    left, right = str(tmp_path / "left"), str(tmp_path / "right")
    bridge = stack.enter_context(Bridge(left, right, queue_pairs=queue_pairs))
    stop = threading.Event()
    thread = threading.Thread(target=bridge.serve, args=(stop.is_set,))
    thread.start()
    stack.callback(thread.join)
    stack.callback(stop.set)
    return bridge, left, right


def wait_for(guest: Guest, packets: int) -> None:
    until = time.monotonic() + 60
    while guest.received() < packets and time.monotonic() < until:
        time.sleep(0.01)


def test_numbered_packets_both_ways(tmp_path: Path) -> None:
    with ExitStack() as stack:
        bridge, left, right = run_bridge(tmp_path, stack, 2)
        guests = [Guest(left, 64, 2), Guest(right, 1500, 2)]
        for guest in guests:
            guest.driver.start()
        for guest, other in (guests, guests[::-1]):
            wait_for(guest, 2 * COUNT)
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
        for turn in range(3):
            other = Guest(right, 64)
            other.driver.start()
            if turn == 0:
                wait_for(stays, 1)
            wait_for_quiet(stays)
            other.leave()
        stays.driver.start()
        time.sleep(0.1)
        stays.driver.check()
        assert bridge.report()["served"] == [1, 3]
        stays.leave()


def wait_for_quiet(guest: Guest) -> None:
    before = -1
    while (now := guest.received()) != before:
        before = now
        time.sleep(0.05)
