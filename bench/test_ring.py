"""What does a packet cost the device alone: the rings, one copy, both queues, and the dirty log on top of a copy?

The driver and the device take turns in one thread; `ns_per_packet` is the device's part of it.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from vnetdp.bench.ring import OneCore
from vnetdp.endpoints.base import Endpoint
from vnetdp.endpoints.loopback import EchoEndpoint, GenerateEndpoint, NullEndpoint

TURNS = 200
ENDPOINTS: dict[str, Callable[[int], Endpoint]] = {
    "null": lambda _: NullEndpoint(),
    "generate": lambda size: GenerateEndpoint(size=size),
    "echo": lambda _: EchoEndpoint(),
}


@pytest.mark.parametrize("size", [64, 1500])
@pytest.mark.parametrize(("endpoint", "logged"), [*((name, False) for name in ENDPOINTS), ("generate", True)])
def test_device_alone(benchmark: BenchmarkFixture, endpoint: str, logged: bool, size: int) -> None:
    rig = OneCore(ENDPOINTS[endpoint](size), size, logged=logged)
    total = [0, 0]

    def turns() -> None:
        ns, frames = rig.alternate(TURNS)
        total[0] += ns
        total[1] += frames

    try:
        benchmark(turns)
    finally:
        rig.close()
    assert total[1] >= TURNS
    benchmark.extra_info["ns_per_packet"] = total[0] / total[1]
