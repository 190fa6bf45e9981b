"""What does a device's state cost to encode and decode, and how many bytes is it: early, changed, and whole as QEMU's?"""

from __future__ import annotations

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from vnetdp.migration import snapshot
from vnetdp.virtio.queue import Virtqueue
from vnetdp.virtio.state import DeviceState, StateDelta

KINDS = {
    "early": (snapshot.encode_early, snapshot.decode_early),
    "full": (snapshot.encode_full, snapshot.decode_full),
}


def state_of(pairs: int) -> DeviceState:
    queues = [Virtqueue(256, n << 16, (n << 16) + 0x1000, (n << 16) + 0x2000, True, n) for n in range(2 * pairs)]
    return DeviceState(queues=queues)


@pytest.mark.parametrize("pairs", [1, 16, 128])
@pytest.mark.parametrize("kind", KINDS)
def test_state(benchmark: BenchmarkFixture, kind: str, pairs: int) -> None:
    encode, decode = KINDS[kind]
    state = state_of(pairs)
    assert benchmark(lambda: decode(memoryview(encode(state)))) == state
    benchmark.extra_info["bytes"] = len(encode(state))


@pytest.mark.parametrize("pairs", [1, 16, 128])
def test_delta_without_a_change(benchmark: BenchmarkFixture, pairs: int) -> None:
    state = state_of(pairs)
    payload = snapshot.encode_delta(snapshot.delta_between(state, state))

    def there() -> StateDelta:
        delta = snapshot.delta_between(state, state)
        return snapshot.decode_delta(memoryview(snapshot.encode_delta(delta)), 2 * pairs)

    delta = benchmark(there)
    assert not delta.control and not delta.registers and not delta.queues
    assert delta.bases == [(n, queue.last_avail_idx) for n, queue in enumerate(state.queues)]
    benchmark.extra_info["bytes"] = len(payload)
