"""What these tests share: a guest in front of an endpoint, in threads or step by step."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Self

from tests.support.by_hand import PATIENCE, wait_for
from vnetdp.device.device import NetDevice
from vnetdp.endpoints.base import Endpoint
from vnetdp.endpoints.mailbox import MailboxEndpoint
from vnetdp.guest.driver import Driver, memory_for


def frame(n: int, length: int = 60) -> bytes:
    """Return an Ethernet frame that no other number has."""
    return bytes(6) + n.to_bytes(8, "big") + bytes((n + i) & 0xFF for i in range(length - 14))


@contextmanager
def guest_of(endpoint: Endpoint, own: Endpoint | None = None) -> Iterator[Driver]:
    """Give the running driver of a running device over *endpoint*; its own endpoint is a mailbox, unless *own*."""
    with ExitStack() as stack:
        memory = stack.enter_context(memory_for(endpoint.queues, 64))
        device = NetDevice(memory, endpoint, queue_pairs=endpoint.queues)
        stack.callback(device.close)
        driver = stack.enter_context(Driver(device, memory, own, queue_pairs=endpoint.queues, num=64))
        driver.start()
        yield driver


def send_all(driver: Driver, frames: list[bytes]) -> None:
    """Send frames from the guest, waiting for room where there is none."""
    for one in frames:
        wait_for(lambda one=one: driver.send(one), "room to send")  # type: ignore[misc]


def receive_all(driver: Driver, n: int) -> list[bytes]:
    """Return the next *n* frames that the guest receives (more, if they came together)."""
    got: list[bytes] = []

    def enough() -> bool:
        got.extend(driver.receive())
        return len(got) >= n

    wait_for(enough, f"{n} frames received, not {len(got)}")
    return got


class Stepped:
    """A device over an endpoint, and its guest, in this thread: frames move when they are told to. The guest has *own*."""

    def __init__(self, endpoint: Endpoint, own: Endpoint | None = None) -> None:
        with ExitStack() as stack:
            self.endpoint = endpoint
            self.guest = MailboxEndpoint(endpoint.queues, 1 << 20)
            stack.callback(self.guest.close)
            self.own = own or self.guest
            memory = stack.enter_context(memory_for(endpoint.queues, 64))
            self.device = NetDevice(memory, endpoint, queue_pairs=endpoint.queues, threaded=False)
            stack.callback(self.device.close)
            self.driver = Driver(self.device, memory, self.own, queue_pairs=endpoint.queues, num=64)
            stack.callback(self.driver.close)
            self._stack = stack.pop_all()

    def run(self, budget: int = 64) -> None:
        """Step either side, *budget* frames at a time, until nothing moves and no frame is held anywhere."""
        deadline = time.monotonic() + PATIENCE
        while self.driver.step(budget) + self.device.step(budget) or not (self.endpoint.idle and self.own.idle):
            assert time.monotonic() < deadline, "frames never arrive"

    def send(self, frames: list[bytes], budget: int = 64, queue: int = 0) -> None:
        """Have the guest send frames, and run until all have met their fate."""
        for one in frames:
            assert self.guest.put(one, queue=queue)
        self.run(budget)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self._stack.close()
