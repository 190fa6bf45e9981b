"""What does a packet cost the device alone: the rings, one copy, both queues, and the dirty log on top of each?

The driver and the device take turns in one thread; the clock runs for the device's part only.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from vnetdp.bench.ring import ENDPOINTS, SIZES, OneCore

TURNS = 500
PER_TURN = {"null": 256, "generate": 256, "echo": 128}  # packets; one that is echoed takes room in both queues


class DeviceClock:
    """How long devices have run by now."""

    ns = 0

    @classmethod
    def seconds(cls) -> float:
        return cls.ns / 1e9


@pytest.mark.benchmark(timer=DeviceClock.seconds)
@pytest.mark.parametrize("logged", [False, True], ids=["plain", "logged"])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("endpoint", ENDPOINTS)
def test_device_alone(
    endpoint: str, size: int, logged: bool, benchmark: BenchmarkFixture, rate: Callable[[int], None]
) -> None:
    packets = TURNS * PER_TURN[endpoint]
    core = OneCore(ENDPOINTS[endpoint](size), size, logged=logged)

    def alternate() -> None:
        ns, moved = core.alternate(TURNS)
        assert moved == packets
        DeviceClock.ns += ns

    try:
        core.alternate(50)
        benchmark.pedantic(alternate, rounds=30)  # type: ignore[no-untyped-call]
    finally:
        core.close()
    rate(packets)
