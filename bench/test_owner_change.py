"""How long does it take to hand the rings to the other owner, with as many packets going both ways as pass?"""

from __future__ import annotations

import itertools
import time
from contextlib import ExitStack

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from tests.support.by_hand import Traffic
from vnetdp.backends.worker import Worker
from vnetdp.device.device import NetDevice
from vnetdp.guest.driver import Driver, memory_for

CHANGES = 500
BETWEEN = 100  # packets, at least, of each queue before each change


@pytest.mark.parametrize("queue_pairs", [1, 4])
def test_change(benchmark: BenchmarkFixture, queue_pairs: int) -> None:
    with ExitStack() as stack:
        traffic = Traffic(queue_pairs)
        stack.callback(traffic.close)
        memory = stack.enter_context(memory_for(queue_pairs))
        worker = Worker(queue_pairs)
        stack.callback(worker.close)
        device = stack.enter_context(NetDevice(memory, traffic.device, queue_pairs=queue_pairs, vhost=worker.backends))
        driver = stack.enter_context(Driver(device, memory, traffic.guest, queue_pairs=queue_pairs))
        driver.start()
        to_vhost = itertools.cycle((False, True))

        def let_packets_pass() -> tuple[tuple[bool], dict[str, object]]:
            traffic.wait_for_more(BETWEEN)
            return (next(to_vhost),), {}

        before, arrived, began = device.handovers, sum(traffic.arrived()), time.perf_counter()
        benchmark.pedantic(  # type: ignore[no-untyped-call]
            device.set_use_vhost, setup=let_packets_pass, rounds=CHANGES
        )
        changes = device.handovers - before
        traffic.wait_for_more(BETWEEN)
        arrived, took = sum(traffic.arrived()) - arrived, time.perf_counter() - began
        assert changes == (CHANGES if benchmark.enabled else 1)
        assert arrived >= 2 * queue_pairs * BETWEEN * (changes + 1)
        assert device.fallbacks == 0
        traffic.settle(device, driver)
        traffic.check()
    benchmark.extra_info |= {"packets": arrived, "packets_per_s": round(arrived / took)}
