"""Faults: as often as they were asked for, the same for the same seed, and nothing else than what was asked for."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from scapy.layers.inet import ICMP, IP
from scapy.layers.l2 import ARP, Ether
from scapy.utils import wrpcap

from tests.endpoints.joined import Stepped, frame, guest_of, receive_all, send_all
from tests.support.by_hand import no_descriptor_leaks, scaled, wait_for
from vnetdp.bench.netns import NetnsPair
from vnetdp.datapath.loop_thread import Runnable
from vnetdp.device.device import NetDevice
from vnetdp.endpoints.base import Endpoint
from vnetdp.endpoints.fault import FaultEndpoint
from vnetdp.endpoints.loopback import EchoEndpoint, GenerateEndpoint, MacswapEndpoint, NullEndpoint, ReflectEndpoint
from vnetdp.endpoints.mailbox import MailboxEndpoint
from vnetdp.endpoints.pcap import PcapEndpoint
from vnetdp.endpoints.tap import TapEndpoint
from vnetdp.errors import EndpointError
from vnetdp.guest.driver import Driver, memory_for
from vnetdp_kernels import rows as r
from vnetdp_kernels import spec

HEADER = bytes(spec.NET_HDR_LEN)


def through(fault: FaultEndpoint, frames: list[bytes], budget: int = 64) -> list[bytes]:
    """Send frames from a guest, step by step, and return what reached the inner mailbox."""
    assert isinstance(fault.inner, MailboxEndpoint)
    with Stepped(fault) as bed:
        bed.send(frames, budget)
    return fault.inner.take()


def mailbox() -> MailboxEndpoint:
    return MailboxEndpoint(limit=1 << 20)


# --- how often ---


KINDS = ("drop", "corrupt", "eio", "eagain", "duplicate", "reorder")


@pytest.mark.parametrize(
    ("kind", "chance"),
    [(kind, chance) for kind in KINDS for chance in (0.0, 0.01, 0.3, 1.0) if (kind, chance) != ("eagain", 1.0)],
)
def test_a_fault_strikes_as_often_as_asked(kind: str, chance: float) -> None:
    n = scaled(1_000 if kind == "eagain" else 10_000, 300)
    with FaultEndpoint(mailbox(), **{kind: chance}) as fault:  # type: ignore[arg-type]
        got = through(fault, [frame(k) for k in range(n)])
        struck = fault.struck[kind]
        expected = n * (chance / (1 - chance) if kind == "eagain" else chance / (1 + chance * (kind == "reorder")))
        assert abs(struck - expected) <= 6 * (expected + 1) ** 0.5
        assert {name for name, times in fault.struck.items() if times} <= {kind}
        assert len(got) == n - {"drop": struck, "eio": struck, "duplicate": -struck}.get(kind, 0)
        assert fault.counters()[f"fault_{kind}"] == struck


def test_corruption_is_one_bit_of_the_frame() -> None:
    frames = [frame(k, 14 + k % 100) for k in range(scaled(1000, 200))]
    with FaultEndpoint(mailbox(), corrupt=0.5) as fault:
        assert isinstance(fault.inner, MailboxEndpoint)
        with Stepped(fault) as bed:
            bed.send(frames)
        after = fault.inner.take_raw()
        differing = 0
        for before, now in zip(frames, after, strict=True):
            assert now[: spec.NET_HDR_LEN] == HEADER
            bits = int.from_bytes(before, "big") ^ int.from_bytes(now[spec.NET_HDR_LEN :], "big")
            assert bits.bit_count() <= 1
            differing += bits != 0
        assert differing == fault.struck["corrupt"]


def test_eio_costs_its_frames_and_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    frames = [frame(k) for k in range(scaled(1000, 200))]
    with caplog.at_level(logging.WARNING), FaultEndpoint(mailbox(), eio=0.1) as fault:
        got = through(fault, frames)
        lost = fault.struck["eio"]
        assert len(got) == len(frames) - lost
        assert got == [one for one in frames if one in set(got)]
        assert fault.errors == fault.counters()["dropped_error"] == lost > 0
    assert [r.getMessage() for r in caplog.records] == [
        "fault:mailbox: OSError: [Errno 5] Input/output error (logged once; counted from now on)"
    ]


# --- the same again ---


@pytest.mark.parametrize("seed", [0, 1, 77])
def test_a_seed_decides_whatever_the_batches(seed: int) -> None:
    frames = [frame(k) for k in range(scaled(800, 100))]

    def run(budget: int) -> tuple[list[bytes], dict[str, int]]:
        faults = FaultEndpoint(
            mailbox(), 0.1, 0.1, eio=0.1, eagain=0.1, seed=seed, duplicate=0.1, reorder=0.1, burst=(0.02, 0.3)
        )
        with faults:
            return through(faults, frames, budget), dict(faults.struck)

    first = run(64)
    assert run(64) == first
    assert run(1) == first
    assert run(7) == first


def test_seeds_queues_and_ways_differ() -> None:
    frames = [frame(k) for k in range(64)]
    seen = []
    for seed in (1, 2):
        with FaultEndpoint(MailboxEndpoint(queues=2), drop=0.5, seed=seed) as fault, Stepped(fault) as bed:
            assert isinstance(fault.inner, MailboxEndpoint)
            for queue in (0, 1):
                bed.send(frames, queue=queue)
                seen.append(tuple(fault.inner.take()))
                for one in frames:
                    fault.inner.put(one, queue=queue)
                bed.run()
                seen.append(tuple(bed.guest.take()))
    assert len(set(seen)) == len(seen) == 8


def test_one_chance_leaves_the_other_faults_alone() -> None:
    """What corrupt does to the frames left is the same with and without eio."""
    frames = [frame(k) for k in range(scaled(500, 100))]
    with FaultEndpoint(mailbox(), corrupt=0.2, seed=5) as only:
        corrupted = through(only, frames)
    with FaultEndpoint(mailbox(), corrupt=0.2, eio=0.3, seed=5) as more:
        assert set(through(more, frames)) <= set(corrupted)


# --- nothing else: frames put off or delayed arrive, in order, over real rings ---


@pytest.mark.parametrize(
    "faults", [{}, {"eagain": 0.2}, {"eagain": 0.9}, {"delay_ms": 3}, {"eagain": 0.1, "delay_ms": 1.5}]
)
@pytest.mark.parametrize("kind", [EchoEndpoint, mailbox])
def test_nothing_is_lost_that_was_not_to_be(kind: Callable[[], Endpoint], faults: dict[str, float]) -> None:
    n = scaled(100, 30)
    frames = [frame(k, 60 + 3 * k) for k in range(n)]
    with FaultEndpoint(kind(), **faults) as fault, guest_of(fault) as driver:  # type: ignore[arg-type]
        send_all(driver, frames)
        if isinstance(fault.inner, MailboxEndpoint):
            taken: list[bytes] = []
            inner = fault.inner

            def all_taken() -> bool:
                taken.extend(inner.take())
                return len(taken) == n

            wait_for(all_taken, "all went through")
            assert taken == frames
            for one in frames:
                fault.inner.put(one)
        assert receive_all(driver, n) == frames
        if "delay_ms" in faults:
            assert fault.struck["delay"] == 2 * n


@pytest.mark.parametrize(
    "faults", [{}, {"eagain": 0.3}, {"delay_ms": 2}, {"delay_ms": 1, "jitter_ms": 2}, {"rate": 100e6}]
)
def test_numbered_frames_stay_in_order_both_ways(faults: dict[str, float]) -> None:
    n = scaled(2000, 200)
    inner = GenerateEndpoint(count=n)
    with FaultEndpoint(inner, **faults) as fault, GenerateEndpoint(count=n) as guest:  # type: ignore[arg-type]

        def arrived() -> bool:
            return all(end.ledger[0, r.LEDGER_DELIVERED] == n for end in (inner, guest))

        with guest_of(fault, guest):
            wait_for(arrived, "every frame arrived")
            wait_for(lambda: fault.finished, "nothing is under way")
        assert inner.ledger_against(guest).clean
        assert guest.ledger_against(inner).clean


def test_a_wire_that_never_takes_a_frame_fills_up_and_loses_none() -> None:
    with GenerateEndpoint() as guest, FaultEndpoint(NullEndpoint(), eagain=1.0) as fault:
        with guest_of(fault, guest):
            wait_for(lambda: fault.held > 4000, "it takes no more")
            wait_for(lambda: int(guest.rows[0, r.EP_SEQ]) == fault.held + 64, "frames stay in the ring")
        assert fault.counters()["to_wire"] == fault.held < 4096 + 64
        assert fault.inner.counters()["to_wire"] == fault.errors == 0


def rests(target: Runnable, seconds: float) -> bool:
    """Return whether a loop passes over its rings no more often than a loop that looks each ms would."""
    began, before = time.monotonic(), int(target.ctl[r.CTL_PASSES])
    time.sleep(seconds)
    return int(target.ctl[r.CTL_PASSES]) - before < 2 * 1000 * (time.monotonic() - began) + 10


def device_loop(driver: Driver) -> Runnable:
    assert isinstance(driver.device, NetDevice)
    worker = driver.device.userspace.worker
    assert worker is not None
    return worker.datapath


@pytest.mark.parametrize("side", ["device", "guest"])
def test_a_full_line_is_waited_for_and_not_spun_on(side: str) -> None:
    with GenerateEndpoint() as source, FaultEndpoint(NullEndpoint(), delay_ms=60_000) as fault:
        ends = (fault, source) if side == "device" else (source, fault)
        with guest_of(*ends) as driver:
            wait_for(lambda: fault.held > 4000, "the line is full")
            wait_for(lambda: int(source.rows[0, r.EP_SEQ]) >= fault.held + 64, "frames stay in the ring")
            assert rests(device_loop(driver) if side == "device" else driver, 0.3)
            delayed = fault.struck["delay"]
            assert isinstance(driver.device, NetDevice)
            with driver.device.paused(), driver.paused():
                table = fault.out_lengths[0, : r.LINE_TABLE].reshape(-1, r.ENTRY_SLOTS)
                table[:100, r.ENTRY_DUE_NS] = fault.rows[0, r.EP_SLOTS + r.LINE_DUE_NS] = 1
            wait_for(lambda: fault.struck["delay"] > delayed + 64, "it goes on once the first are due")


def test_a_step_ends_while_a_line_is_full() -> None:
    with (
        GenerateEndpoint() as guest,
        FaultEndpoint(NullEndpoint(), delay_ms=60_000) as fault,
        memory_for() as memory,
        NetDevice(memory, fault, threaded=False) as device,
        Driver(device, memory, guest) as driver,
    ):
        while driver.step(256) + device.step(256):
            pass
        assert 4000 < fault.held <= 4096
        assert guest.rows[0, r.EP_SEQ] == fault.held + 256


def test_frames_of_our_own_may_come_from_any_thread() -> None:
    """As an announcement does, while the datapath's thread sends on: it meets no fault."""
    n = scaled(2000, 200)
    with FaultEndpoint(mailbox(), drop=1) as fault:

        def announce() -> None:
            for k in range(n):
                fault.send_to_wire(frame(k))

        announcers = [threading.Thread(target=announce) for _ in range(4)]
        for thread in announcers:
            thread.start()
        for thread in announcers:
            thread.join()
        assert isinstance(fault.inner, MailboxEndpoint)
        assert len(fault.inner.take()) == 4 * n
        assert fault.errors == 0


class Mistaken(Endpoint):
    """An endpoint whose code has a mistake."""

    def receive_frames(self, queue: int, limit: int) -> list[bytes]:
        raise ZeroDivisionError("a mistake")


def test_an_error_and_a_wake_up_pass_the_wire() -> None:
    with Stepped(FaultEndpoint(Mistaken(), drop=0.5)) as both:
        both.run()
        assert isinstance(both.endpoint.last_error, ZeroDivisionError)
        both.endpoint.wake()
        before = both.endpoint.counters()["errors"]
        both.run()
        assert both.endpoint.counters()["errors"] > before


def test_a_delayed_frame_is_under_way() -> None:
    with FaultEndpoint(EchoEndpoint(), delay_ms=60_000) as fault, guest_of(fault) as driver:
        send_all(driver, [frame(1)])
        wait_for(lambda: fault.struck["delay"] == 1, "it is held back")
        assert not fault.finished
        assert driver.receive() == []
        assert fault.inner.counters()["to_wire"] == 0


# --- every kind of endpoint behind it is as without it ---


@pytest.mark.parametrize("kind", [EchoEndpoint, MacswapEndpoint, ReflectEndpoint, NullEndpoint])
@pytest.mark.parametrize("depth", [1, 2])
def test_without_faults_it_is_not_there(kind: Callable[[], Endpoint], depth: int) -> None:
    ping = bytes(Ether(src="02:00:00:00:00:01", dst="02:02:02:02:02:02") / IP(dst="10.0.0.9") / ICMP())
    arp = bytes(Ether(src="02:00:00:00:00:01", dst="ff:ff:ff:ff:ff:ff") / ARP(pdst="10.0.0.9"))
    frames = [ping, arp, *(frame(k) for k in range(20))]
    answers = []
    for wrapped in range(2):
        endpoint = kind()
        for _ in range(wrapped * depth):
            endpoint = FaultEndpoint(endpoint)
        with endpoint, guest_of(endpoint) as driver:
            inner = endpoint
            while isinstance(inner, FaultEndpoint):
                inner = inner.inner
            send_all(driver, frames)
            n = 2 if kind is ReflectEndpoint else 0 if kind is NullEndpoint else len(frames)
            answers.append(receive_all(driver, n))
            taken = 0 if kind is ReflectEndpoint else len(frames)  # by itself, it counts what it answers only
            wait_for(lambda e=inner, t=taken: e.counters()["to_wire"] >= t, "all were taken")  # type: ignore[misc]
            assert inner.counters()["from_wire"] == n
    assert answers[0] == answers[1]
    assert len(answers[0]) == n


def test_a_capture_behind_it(tmp_path: Path) -> None:
    frames = [frame(k, 100) for k in range(500)]
    wrpcap(str(tmp_path / "in.pcap"), [Ether(one) for one in frames])
    pcap = PcapEndpoint(tmp_path / "in.pcap", tmp_path / "out.pcap")
    with FaultEndpoint(pcap, drop=0.2) as fault, guest_of(fault) as driver:
        wait_for(lambda: fault.finished, "the capture was read to its end")
        kept = 500 - fault.struck["drop"]
        got = receive_all(driver, kept)
        assert len(got) == kept < 500
        assert got == [one for one in frames if one in set(got)]
        send_all(driver, frames[:50])
        wait_for(lambda: fault.counters()["to_wire"] == 50, "all were taken")
    with PcapEndpoint(tmp_path / "out.pcap") as written:
        assert len(written.receive_frames(0, 64)) == 500 + 50 - fault.struck["drop"] - kept


def test_a_tap_behind_it(spaces: NetnsPair) -> None:
    names = spaces.names
    tap = TapEndpoint("left", netns=names["a"])
    with FaultEndpoint(tap, eagain=0.2, delay_ms=1) as fault, TapEndpoint("right", netns=names["b"]) as right:
        assert fault.vnet_hdr
        with guest_of(fault, right):
            spaces.ip("a", "address add 10.9.9.1/24 dev left")
            spaces.ip("b", "address add 10.9.9.2/24 dev right")
            spaces.run("a", ["ping", "-c", "5", "-i", "0.05", "-w", "20", "10.9.9.2"])
            assert fault.counters()["to_wire"] >= 5


def test_a_tap_that_is_deleted_behind_it(spaces: NetnsPair) -> None:
    tap = TapEndpoint("left", netns=spaces.names["a"])
    with FaultEndpoint(tap, drop=0.01) as fault, guest_of(fault) as driver:
        spaces.ip("a", "link delete left")
        wait_for(lambda: bool(fault.rows[0, r.EP_GONE]), "it is noticed")
        assert rests(device_loop(driver), 0.3)
        send_all(driver, [frame(n) for n in range(50)])
        wait_for(lambda: tap.counters()["dropped_error"] >= 50 - fault.struck["drop"], "all were refused")
        assert fault.counters()["dropped_error"] == tap.counters()["dropped_error"]


def test_a_queue_is_put_to_rest_behind_it_and_woken(spaces: NetnsPair) -> None:
    tap = TapEndpoint("left", 2, spaces.names["a"])
    with FaultEndpoint(tap) as fault, guest_of(fault) as driver:
        device = driver.device
        assert isinstance(device, NetDevice)
        device.set_control(curr_queue_pairs=1)
        assert "numdisabled 1" in spaces.ip("a", "-details link show dev left")
        fault.rows[1, r.EP_GONE] = 1  # as once its descriptor was looked at meanwhile
        assert rests(device_loop(driver), 0.3)
        device.set_control(curr_queue_pairs=2)
        assert not fault.rows[1, r.EP_GONE]
        assert "numdisabled 0" in spaces.ip("a", "-details link show dev left")


# --- what cannot be ---


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("chance", [-0.1, 1.01, float("nan"), float("inf")])
def test_a_chance_is_a_probability(kind: str, chance: float) -> None:
    says = f"fault: {kind} .* is not a probability between 0 and 1"
    with NullEndpoint() as inner, no_descriptor_leaks(), pytest.raises(EndpointError, match=says):
        FaultEndpoint(inner, **{kind: chance})  # type: ignore[arg-type]


@pytest.mark.parametrize("delay", [-1, 60_001, float("nan")])
def test_a_delay_has_limits(delay: float) -> None:
    with NullEndpoint() as inner, pytest.raises(EndpointError, match=r"delay_ms .* is not between 0 and 60000"):
        FaultEndpoint(inner, delay_ms=delay)


def test_it_closes_what_it_wraps() -> None:
    def once() -> None:
        with FaultEndpoint(FaultEndpoint(MailboxEndpoint(queues=3)), delay_ms=1) as fault, guest_of(fault):
            pass
        fault.close()

    once()
    with no_descriptor_leaks():
        once()
