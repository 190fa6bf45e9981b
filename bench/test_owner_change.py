"""How long does it take to hand the rings to vhost and back, with packets going both ways?"""

from __future__ import annotations

from contextlib import ExitStack

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from tests.by_hand import Traffic
from vnetdp.backends.worker import Worker
from vnetdp.device import NetDevice
from vnetdp.driver import Driver, memory_for


@pytest.mark.parametrize("queue_pairs", [1, 4])
def test_there_and_back(benchmark: BenchmarkFixture, queue_pairs: int) -> None:
    changes = 0
    with ExitStack() as stack:
        traffic = Traffic(queue_pairs, rate=20_000)
        stack.callback(traffic.close)
        memory = stack.enter_context(memory_for(queue_pairs))
        worker = Worker(queue_pairs)
        stack.callback(worker.close)
        device = stack.enter_context(NetDevice(memory, traffic.device, queue_pairs=queue_pairs, vhost=worker.backends))
        driver = stack.enter_context(Driver(device, memory, traffic.guest, queue_pairs=queue_pairs))
        driver.start()
        before = device.owners.handovers

        def there_and_back() -> None:
            nonlocal changes
            device.set_use_vhost(False)
            device.set_use_vhost(True)
            changes += 2

        benchmark(there_and_back)
        assert device.owners.handovers == before + changes
        traffic.wait_for_more()
        traffic.settle()
        traffic.check()
