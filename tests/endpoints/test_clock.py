"""With a clock that is handed in, rates, delays and announcements keep simulated time; the machine's is never read."""

from __future__ import annotations

import hashlib
import os
import struct
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.support.by_hand import CAMPAIGN
from vnetdp import (
    Announcer,
    Clock,
    ConfigError,
    Datapath,
    Driver,
    Endpoint,
    FaultEndpoint,
    GenerateEndpoint,
    MailboxEndpoint,
    NetDevice,
    PcapEndpoint,
    ReflectEndpoint,
    UserspaceBackend,
    Worker,
    memory_for,
)
from vnetdp.endpoints.announce import ROUNDS_S, rarp

MS = 1_000_000
S = 1000 * MS
HOUR_S = 3600 if CAMPAIGN else 600
FRAME = bytes.fromhex("02000000000102000000000288b5") + bytes(46)
ROOT = Path(__file__).parents[2]


@dataclass
class Host:
    clock: Clock
    device: NetDevice
    guest: Driver
    budget: int = 64

    def settle(self) -> None:
        while self.guest.step(self.budget) + self.device.step(self.budget):
            pass

    def until(self, end_ns: int) -> Iterator[int]:
        """Go from one due time to the next, and yield each once all frames that were due have moved."""
        self.settle()
        yield self.clock.now_ns
        while (due := self.clock.next_due_ns()) is not None and due <= end_ns:
            self.clock.advance_to(due)
            self.settle()
            yield due


@contextmanager
def host(wire: Endpoint, guest: Endpoint | None = None, clock: Clock | None = None, budget: int = 64) -> Iterator[Host]:
    clock = clock or Clock()
    with (
        memory_for(num=64) as memory,
        wire,
        NetDevice(memory, wire, clock=clock, threaded=False) as device,
        Driver(device, memory, guest, num=64) as driver,
    ):
        yield Host(clock, device, driver, budget)


def ping(number: int) -> bytes:
    """Return an Ethernet frame with an ICMP echo request (IPv4, checksums left 0)."""
    icmp = struct.pack("!BBHHH", 8, 0, 0, 1, number & 0xFFFF) + bytes(32)
    ip = struct.pack(
        "!BBHHHBBH4s4s", 0x45, 0, 20 + len(icmp), 0, 0, 64, 1, 0, bytes([10, 0, 0, 1]), bytes([10, 0, 0, 2])
    )
    return bytes.fromhex("0200000000010200000000020800") + ip + icmp


def digest_of_rates_and_delays(budget: int) -> tuple[str, int]:
    """Return a digest of each frame that arrives at either end with its time, and how many arrived."""
    seen, arrived = hashlib.sha256(), 0
    box = MailboxEndpoint()
    wire = FaultEndpoint(box, delay_ms=3, jitter_ms=2, rate=2e6, drop=0.1, reorder=0.05, eagain=0.1, seed=7)
    with GenerateEndpoint(size=200, rate=1000) as source, host(wire, source, budget=budget) as it:
        for now in it.until(300 * MS):
            for frame in box.take():
                seen.update(f"{now} ".encode() + frame)
                arrived += 1
    return seen.hexdigest(), arrived


def test_two_runs_with_rates_and_delays_give_the_same_frames_at_the_same_times() -> None:
    first = digest_of_rates_and_delays(budget=64)
    assert first == digest_of_rates_and_delays(budget=64)
    assert 240 < first[1] < 300


@pytest.mark.parametrize("budget", [1, 7])
def test_the_budget_of_a_step_changes_no_frame_and_no_time(budget: int) -> None:
    assert digest_of_rates_and_delays(budget) == digest_of_rates_and_delays(64)


def test_a_generator_on_the_wire_sends_at_its_rate_in_simulated_time() -> None:
    with host(GenerateEndpoint(rate=100, count=300)) as it:
        times = [now for now in it.until(10 * S) for _ in it.guest.receive()]
    assert times == [number * 10 * MS for number in range(300)]


def test_a_wire_with_two_stages_of_delay_holds_a_frame_for_both() -> None:
    box = MailboxEndpoint()
    wire = FaultEndpoint(FaultEndpoint(box, delay_ms=30), delay_ms=12)
    with host(wire, clock=Clock(5 * S)) as it:
        it.guest.send(FRAME)
        box.put(FRAME)
        came = [(now, len(it.guest.receive()), len(box.take())) for now in it.until(10 * S)]
    # From the wire 30 ms and then 12; to the wire 12 ms and then 30.
    assert came == [
        (5 * S, 0, 0),
        (5 * S + 12 * MS, 0, 0),
        (5 * S + 30 * MS, 0, 0),
        (5 * S + 42 * MS, 1, 1),
    ]


def test_an_hour_of_ping_is_answered_in_simulated_time() -> None:
    wire = FaultEndpoint(ReflectEndpoint(), delay_ms=20)
    answers = []
    with host(wire) as it:
        for number in range(HOUR_S):
            it.clock.advance_to(number * S)
            assert it.guest.send(ping(number))
            for now in it.until((number + 1) * S - 1):
                answers += [now - number * S for frame in it.guest.receive() if frame[34] == 0]
        assert it.clock.now_ns == (HOUR_S - 1) * S + 40 * MS
    assert answers == [40 * MS] * HOUR_S


def test_time_that_stands_still_brings_no_frame() -> None:
    box = MailboxEndpoint()
    with host(FaultEndpoint(box, delay_ms=1)) as it:
        it.guest.send(FRAME)
        for _ in range(1000):
            it.settle()
        assert box.take() == []
        assert it.clock.next_due_ns() == it.device.endpoint.next_due_ns() == MS
        it.clock.advance_to(MS - 1)
        it.settle()
        assert box.take() == []
        it.clock.advance_to(MS)
        it.settle()
        assert box.take() == [FRAME]
        assert it.clock.next_due_ns() is None


def test_frames_that_wait_for_a_buffer_are_not_due_by_time() -> None:
    with host(GenerateEndpoint(rate=1000)) as it:
        it.settle()
        it.device.set_link(False)
        it.clock.advance_to(S)
        it.settle()
        assert it.clock.next_due_ns() is None
        it.device.set_link(True)
        it.settle()
        assert it.guest.receive()


def test_a_clock_never_goes_back() -> None:
    clock = Clock(5)
    clock.advance_to(5)
    with pytest.raises(ConfigError, match="4 ns is not between the present time, 5 ns, and"):
        clock.advance_to(4)
    with pytest.raises(ConfigError, match="only goes forward"):
        clock.advance_to(1 << 63)
    with pytest.raises(ConfigError, match="-1 ns is not between"):
        Clock(-1)
    assert clock.now_ns == 5


def test_a_forked_child_leaves_the_clock_to_its_parent() -> None:
    clock = Clock()
    child = os.fork()
    if child == 0:
        try:
            clock.advance_to(1)
        except ConfigError:
            os._exit(7)
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7


def test_threads_are_refused_beside_a_clock() -> None:
    clock = Clock()
    with memory_for(num=16) as memory, MailboxEndpoint() as wire, Worker(1) as worker:
        with pytest.raises(ConfigError, match="threaded=False"):
            NetDevice(memory, wire, clock=clock)
        with pytest.raises(ConfigError, match="a vhost worker sleeps by the machine's clock"):
            NetDevice(memory, wire, vhost=worker, clock=clock, threaded=False)
        with (
            NetDevice(memory, wire, clock=clock, threaded=False) as device,
            Driver(device, memory, num=16) as guest,
            pytest.raises(ConfigError, match="step the driver"),
        ):
            guest.start()


def test_an_endpoint_keeps_the_clock_that_it_has_read() -> None:
    with memory_for(num=16) as memory, MailboxEndpoint() as wire:
        with NetDevice(memory, wire, threaded=False) as device, Driver(device, memory, num=16):
            pass
        with pytest.raises(ConfigError, match="it has read another clock before"):
            NetDevice(memory, wire, clock=Clock(), threaded=False)
    with memory_for(num=16) as memory, GenerateEndpoint(rate=1) as guest:
        with (
            MailboxEndpoint() as wire,
            NetDevice(memory, wire, threaded=False) as device,
            Driver(device, memory, guest, num=16) as driver,
        ):
            driver.step()
        with (
            MailboxEndpoint() as wire,
            NetDevice(memory, wire, clock=Clock(), threaded=False) as device,
            pytest.raises(ConfigError, match="generate: it has read another clock before"),
        ):
            Driver(device, memory, guest, num=16)
    with memory_for(num=16) as memory, MailboxEndpoint() as wire:
        clock = Clock()
        for _ in range(2):
            NetDevice(memory, wire, clock=clock, threaded=False).close()
        with pytest.raises(ConfigError, match="give the device the same one"):
            NetDevice(memory, wire, threaded=False)
        with pytest.raises(ConfigError, match="it has read another clock before"):
            NetDevice(memory, wire, clock=Clock(), threaded=False)


def test_a_hand_over_leaves_due_times_as_they_are() -> None:
    box, clock, vhost = MailboxEndpoint(), Clock(), Datapath(1)
    with (
        memory_for(num=16) as memory,
        FaultEndpoint(box, delay_ms=10) as wire,
        NetDevice(memory, wire, vhost=[UserspaceBackend(vhost, 0)], clock=clock, threaded=False) as device,
        Driver(device, memory, num=16) as guest,
    ):
        guest.send(FRAME)
        guest.step()
        vhost.run()
        device.set_use_vhost(False)
        assert clock.next_due_ns() == 10 * MS
        clock.advance_to(10 * MS)
        device.step()
        assert box.take() == [FRAME]
    vhost.close()


def test_a_guest_is_announced_in_simulated_time() -> None:
    clock, mac = Clock(2 * S), bytes([2, 0, 0, 0, 0, 9])
    heard: list[tuple[int, bytes]] = []
    announcer = Announcer(lambda frame: heard.append((clock.now_ns, frame)), lambda: mac, clock)
    assert heard == []
    clock.advance_to(2 * S)
    assert [at for at, _ in heard] == [2 * S]
    assert clock.next_due_ns() == 2 * S + 50 * MS
    clock.advance_to(10 * S)
    assert heard == [(2 * S + round(at * S), rarp(mac)) for at in ROUNDS_S]
    assert announcer.sent == len(ROUNDS_S)
    ended = Announcer(lambda frame: heard.append((clock.now_ns, frame)), lambda: mac, clock)
    ended.close()
    clock.advance_to(20 * S)
    assert ended.sent == 0
    assert len(heard) == len(ROUNDS_S)


def test_a_capture_has_simulated_times(tmp_path: Path) -> None:
    path = tmp_path / "out.pcapng"
    with host(FaultEndpoint(PcapEndpoint(None, path), delay_ms=250), clock=Clock(7 * S)) as it:
        it.guest.send(FRAME)
        assert list(it.until(10 * S)) == [7 * S, 7 * S + 250 * MS]
    record = path.read_bytes()[-(32 + len(FRAME)) :]
    high, low = struct.unpack_from("<II", record, 12)
    assert (high << 32 | low) == 7 * S + 250 * MS


WITHOUT_A_CLOCK = """
import time
from vnetdp_kernels.loops import wait
from vnetdp_kernels.platform import io
from tests.endpoints.test_clock import digest_of_rates_and_delays

def looked(*_):
    raise AssertionError("the machine's clock was looked at")

io.clock_ns = wait.clock_ns = looked
time.monotonic = time.monotonic_ns = time.time = time.time_ns = time.sleep = looked
print(*digest_of_rates_and_delays(64))
"""


def test_nothing_looks_at_the_clock_of_the_machine() -> None:
    plain = subprocess.run(
        [sys.executable, "-c", WITHOUT_A_CLOCK],
        env=os.environ | {"NUMBA_DISABLE_JIT": "1", "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}"},
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert plain.returncode == 0, plain.stderr
    digest, arrived = plain.stdout.split()
    assert (digest, int(arrived)) == digest_of_rates_and_delays(64)
