"""What the tests share: traffic in numbered frames, and ways to wait and to count. Rings by hand are `HandRing`."""

from __future__ import annotations

import os
import resource
import signal
import struct
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
from numba import config

from vnetdp.device.device import NetDevice
from vnetdp.endpoints.loopback import GenerateEndpoint
from vnetdp.guest.driver import Driver
from vnetdp.virtio.queue import ring_len
from vnetdp_kernels import rows as r
from vnetdp_kernels import spec
from vnetdp_kernels.net import driver as kernels
from vnetdp_kernels.virtq import split_driver

COMPILED = not config.DISABLE_JIT
CAMPAIGN = os.environ.get("VNETDP_CAMPAIGN") == "1"  # `make campaign`: everything at length
PATIENCE = 60.0  # seconds until a wait is given up: far more than anything here takes

ACKNOWLEDGE, DRIVER, DRIVER_OK, FEATURES_OK, NEEDS_RESET = 1, 2, 4, 8, 0x40

NEXT = spec.VIRTQ_DESC_F_NEXT
WRITE = spec.VIRTQ_DESC_F_WRITE
INDIRECT = spec.VIRTQ_DESC_F_INDIRECT


def scaled(compiled: int, plain: int) -> int:
    """Return how much to do: plain Python runs the kernels some hundred times slower."""
    return compiled if COMPILED else plain


def wait_for(done: Callable[[], bool], what: str, patience_s: float = PATIENCE) -> None:
    """Return once *done* says so. It is looked at, not slept for: how long it takes is no part of any test."""
    deadline = time.monotonic() + patience_s
    while not done():
        if time.monotonic() > deadline:
            raise AssertionError(f"never happened: {what}")
        time.sleep(0.0002)


def wait_equal(read: Callable[[], object], expected: object) -> None:
    """Return once what *read* gives equals *expected*."""
    last: list[object] = [None]

    def equal() -> bool:
        last[0] = read()
        return last[0] == expected

    try:
        wait_for(equal, "")
    except AssertionError:
        raise AssertionError(f"expected {expected!r}, and it stayed {last[0]!r}") from None


@contextmanager
def no_descriptor_leaks() -> Iterator[None]:
    """Check that the block leaves as many descriptors open as it found."""
    before = _descriptors()
    yield
    after = _descriptors()
    left = {fd: name for fd, name in after.items() if before.get(fd) != name}
    assert len(after) == len(before), f"descriptors left open, or closed once too often: {left}"


@contextmanager
def many_descriptors() -> Iterator[None]:
    """Allow this process as many descriptors as it may have for the length of the block."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def _descriptors() -> dict[str, str]:
    names = {}
    for entry in os.scandir("/proc/self/fd"):
        try:
            names[entry.name] = str(Path(entry.path).readlink())
        except FileNotFoundError:
            continue  # the descriptor of the listing itself
    return names


def frame(n: int, length: int = 60) -> bytes:
    """Return an Ethernet frame that tells its number, and each byte from those around it."""
    return bytes((37 * n + i + (i >> 8)) & 0xFF for i in range(length))


def rebase(driver: Driver, start: int, queues: Sequence[int] | None = None) -> None:
    """Lay a driver's rings (or some) out anew with every index at *start*. Nobody may own them meanwhile."""
    mem = driver.memory.mem
    for index in range(2 * driver.queue_pairs) if queues is None else queues:
        row, state = driver.dvqs[index], driver.states[index]
        num = int(row[r.DVQ_NUM])
        for slot, length in zip((r.DVQ_DESC, r.DVQ_AVAIL, r.DVQ_USED), ring_len(num), strict=True):
            mem[int(row[slot]) : int(row[slot]) + length] = 0
        split_driver.reset_driver(row, state)
        for slot in (r.DVQ_AVAIL_IDX, r.DVQ_PUBLISHED_IDX, r.DVQ_KICKED_IDX, r.DVQ_LAST_USED_IDX):
            row[slot] = start
        row[r.DVQ_USED_IDX] = start
        at = int(row[r.DVQ_USED]) + spec.VIRTQ_RING_IDX
        mem[at : at + 2] = np.frombuffer(struct.pack("<H", start), np.uint8)
        if index % 2 == 0:
            kernels.post_receive(mem, row, state)
        split_driver.publish_available(mem, row)


class Traffic:
    """Numbered frames both ways between the device's endpoint and the guest's, and the ledger of each direction."""

    def __init__(self, pairs: int = 1, size: int = 64, rate: float = 0.0, count: int = -1) -> None:
        self.device = GenerateEndpoint(pairs, size, rate, count)
        self.guest = GenerateEndpoint(pairs, size, rate, count)

    def arrived(self, pair: int | None = None) -> tuple[int, int]:
        """Return the frames that arrived at the device's end, and at the guest's: of one pair, or of all."""
        pairs = slice(None) if pair is None else slice(pair, pair + 1)
        ends = (self.device, self.guest)
        to_device, to_guest = (int(end.ledger[pairs, r.LEDGER_DELIVERED].sum()) for end in ends)
        return to_device, to_guest

    def wait_for_more(self, frames: int = 1) -> None:
        """Wait until *frames* more have arrived on each pair, each way."""
        for pair in range(self.device.queues):
            self.wait_for_pair(pair, frames)

    def wait_for_pair(self, pair: int, frames: int = 1, to_device: bool = True) -> None:
        """As `wait_for_more`, for one pair; to_device=False: only those to the guest."""
        before = self.arrived(pair)

        def more() -> bool:
            now = self.arrived(pair)
            return (now[0] >= before[0] + frames or not to_device) and now[1] >= before[1] + frames

        wait_for(more, f"{frames} frames on pair {pair}")

    def allow(self, count: int) -> None:
        """Have each queue of either end make so many frames in all, and no more."""
        for end in (self.device, self.guest):
            end.rows[:, r.EP_LIMIT] = count

    def wait_until_finished(self) -> None:
        """Wait until all frames that are allowed have been made, and have arrived."""
        wait_for(lambda: self.device.finished and self.guest.finished, "every frame is sent")
        wait_for(lambda: self.arrived() == (self.guest.sent, self.device.sent), "every frame arrived")

    def settle(self, device: NetDevice, driver: Driver) -> None:
        """Make no more frames, and wait until those that were made have arrived."""
        with device.paused(), driver.paused():  # or a frame that is just being made comes after the last was seen
            self.guest.stop()
            self.device.stop()
        wait_for(lambda: self.arrived() == (self.guest.sent, self.device.sent), "every frame arrived")

    def check(self) -> None:
        """Every frame arrived once, whole and in order."""
        to_device, to_guest = self.device.ledger_against(self.guest), self.guest.ledger_against(self.device)
        assert to_device.clean, to_device
        assert to_guest.clean, to_guest
        assert not self.device.ledger[:, r.LEDGER_FOREIGN].any()
        assert not self.guest.ledger[:, r.LEDGER_FOREIGN].any()

    def close(self) -> None:
        self.device.close()
        self.guest.close()


def stand_still(pid: int) -> None:
    """Stop a process, and wait until none of its threads runs any more: the signal alone leaves them a moment."""
    os.kill(pid, signal.SIGSTOP)
    wait_for(lambda: set(_states(pid)) == {"T"}, "every thread stands still")


def _states(pid: int) -> Iterator[str]:
    for path in Path(f"/proc/{pid}/task").glob("*/stat"):
        with suppress(FileNotFoundError, ProcessLookupError):  # a thread that has just ended
            yield path.read_text().rpartition(") ")[2][0]
