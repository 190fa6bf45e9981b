"""How many packets a second does a simulator get that steps a device, and what does Scapy on the wire take of it?"""

from __future__ import annotations

from collections.abc import Callable

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from vnetdp.device.device import NetDevice
from vnetdp.endpoints.base import Endpoint
from vnetdp.endpoints.loopback import EchoEndpoint
from vnetdp.endpoints.mailbox import MailboxEndpoint
from vnetdp.endpoints.scapy import ScapyEndpoint
from vnetdp.guest.driver import Driver, memory_for

FRAMES = [n.to_bytes(6, "big") * 2 + b"\x88\xb5" + bytes(50) for n in range(64)]
WIRES: dict[str, Callable[[], Endpoint]] = {
    "echo": EchoEndpoint,
    "mailbox": MailboxEndpoint,
    "scapy": lambda: ScapyEndpoint(lambda packet: packet),
    "scapy, in batches": lambda: ScapyEndpoint(lambda packets: packets, batch=True),
}


@pytest.mark.parametrize("wire", WIRES)
def test_there_and_back(benchmark: BenchmarkFixture, rate: Callable[[int], None], wire: str) -> None:
    with (
        memory_for() as memory,
        WIRES[wire]() as endpoint,
        NetDevice(memory, endpoint, threaded=False) as device,
        Driver(device, memory) as guest,
    ):

        def there_and_back() -> list[bytes]:
            for frame in FRAMES:
                guest.send(frame)
            back: list[bytes] = []
            while guest.step() + device.step():
                if isinstance(endpoint, MailboxEndpoint) and not isinstance(endpoint, ScapyEndpoint):
                    for frame in endpoint.take():
                        endpoint.put(frame)
            back += guest.receive()
            return back

        assert benchmark(there_and_back) == FRAMES
    rate(len(FRAMES))
