"""What these tests share: a guest in front of an endpoint, and namespaces for real TAPs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from tests.support.by_hand import wait_for
from vnetdp.device.device import NetDevice
from vnetdp.endpoints.base import Endpoint
from vnetdp.guest.driver import Driver, memory_for


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
