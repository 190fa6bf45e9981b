"""How many packets a second does a Scapy function answer, with threads for guest and device as in `vnetdp link scapy:…`?"""

from __future__ import annotations

from collections.abc import Callable

import pytest
from pytest_benchmark.fixture import BenchmarkFixture
from scapy.layers.inet import IP, UDP
from scapy.layers.l2 import Ether
from scapy.packet import Packet, Raw

from tests.support.by_hand import wait_for
from vnetdp.device.device import NetDevice
from vnetdp.endpoints.scapy import ScapyEndpoint
from vnetdp.guest.driver import Driver, memory_for

PACKETS = 200
_HEAD = Ether(src="02:00:00:00:00:01", dst="02:00:00:00:00:02") / IP(src="10.0.0.1", dst="10.0.0.2")
FRAMES = [bytes(_HEAD / UDP(sport=7, dport=1000 + n) / Raw(bytes(22))) for n in range(PACKETS)]


def swap(packet: Packet) -> Packet:
    """Answer a datagram: its ports change places, and its checksum stays right."""
    packet[UDP].sport, packet[UDP].dport = packet[UDP].dport, packet[UDP].sport
    return packet


def swap_all(packets: list[Packet]) -> list[Packet]:
    return [swap(packet) for packet in packets]


@pytest.mark.parametrize("batch", [False, True], ids=["one by one", "in batches"])
def test_answers(benchmark: BenchmarkFixture, rate: Callable[[int], None], batch: bool) -> None:
    with (
        memory_for() as memory,
        ScapyEndpoint(swap_all if batch else swap, batch=batch) as wire,
        NetDevice(memory, wire) as device,
        Driver(device, memory) as guest,
    ):
        guest.start()

        def there_and_back() -> list[bytes]:
            for frame in FRAMES:
                assert guest.send(frame)
            back: list[bytes] = []

            def answered() -> bool:
                back.extend(guest.receive())
                return len(back) >= PACKETS

            wait_for(answered, "each was answered")
            return back

        back = benchmark(there_and_back)
    assert [Ether(frame)[UDP].sport for frame in back] == [1000 + n for n in range(PACKETS)]
    rate(PACKETS)
