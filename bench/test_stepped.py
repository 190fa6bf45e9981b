"""What does a stepped device with its driver cost: to make, to step while it is idle, and for one frame?

Its descriptors, and its address space beside guest memory, are in `extra_info`.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from vnetdp.device.device import NetDevice
from vnetdp.endpoints.loopback import NullEndpoint
from vnetdp.guest.driver import Driver, memory_for
from vnetdp.stepping import settle

NUM = 16
AT_ONCE = 50
FRAME = b"\2\0\0\0\0\1" + b"\2\0\0\0\0\2" + b"\x88\xb5" + bytes(50)


def make(stack: ExitStack) -> tuple[NetDevice, Driver]:
    memory = stack.enter_context(memory_for(num=NUM))
    wire = stack.enter_context(NullEndpoint())
    device = stack.enter_context(NetDevice(memory, wire, threaded=False))
    return device, stack.enter_context(Driver(device, memory, num=NUM))


def used() -> tuple[int, int]:
    """Return the open descriptors of this process, and its address space in bytes."""
    size = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmSize:"))
    return len(list(Path("/proc/self/fd").iterdir())), int(size.split()[1]) * 1024


def test_make_and_close(benchmark: BenchmarkFixture) -> None:
    with ExitStack() as stack:
        make(stack)
        before = used()
        for _ in range(AT_ONCE):
            device, _ = make(stack)
        descriptors, space = ((now - then) / AT_ONCE for now, then in zip(used(), before, strict=True))
        benchmark.extra_info["descriptors"] = descriptors
        benchmark.extra_info["KiB beside guest memory"] = round((space - device.memory.mem.size) / 1024)

        def one() -> None:
            with ExitStack() as this:
                make(this)

        benchmark(one)


def test_idle_step(benchmark: BenchmarkFixture) -> None:
    with ExitStack() as stack:
        device, guest = make(stack)
        assert benchmark(lambda: guest.step() + device.step()) == 0


@pytest.mark.parametrize("at_once", [1, AT_ONCE])
def test_idle_settle(benchmark: BenchmarkFixture, at_once: int) -> None:
    with ExitStack() as stack:
        guests = [make(stack)[1] for _ in range(at_once)]
        assert benchmark(lambda: settle(*guests)) == 0


def test_one_frame(benchmark: BenchmarkFixture, rate: Callable[[int], None]) -> None:
    with ExitStack() as stack:
        device, guest = make(stack)

        def one() -> int:
            guest.send(FRAME)
            return guest.step() + device.step()

        assert benchmark(one) == 2
    rate(1)


def test_one_frame_settled(benchmark: BenchmarkFixture, rate: Callable[[int], None]) -> None:
    with ExitStack() as stack:
        _, guest = make(stack)

        def one() -> int:
            guest.send(FRAME)
            return settle(guest)

        assert benchmark(one) == 2
    rate(1)
