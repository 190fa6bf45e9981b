"""Faults one by one: the ledger counts those that struck, at the frame that was asked for, and as they are set just then."""

from __future__ import annotations

import threading
import time
from typing import Any

import pytest

from tests.endpoints.joined import Stepped, frame, guest_of, receive_all, send_all
from tests.support.by_hand import no_descriptor_leaks, scaled, wait_for
from vnetdp.backends.process import WorkerProcess
from vnetdp.device.device import NetDevice
from vnetdp.endpoints.fault import FaultEndpoint
from vnetdp.endpoints.loopback import EchoEndpoint, GenerateEndpoint, Ledger, NullEndpoint
from vnetdp.endpoints.mailbox import MailboxEndpoint
from vnetdp.errors import EndpointError
from vnetdp.guest.driver import Driver, memory_for
from vnetdp_kernels import rows as r


def fates(fault: FaultEndpoint, guest: GenerateEndpoint) -> Ledger:
    """Return the ledger of the frames of both ends."""
    inner = fault.innermost
    assert isinstance(inner, GenerateEndpoint)
    return inner.ledger_against(guest) + guest.ledger_against(inner)


def passed(frames: list[bytes], **faults: Any) -> list[bytes]:
    """Return the frames that come through a wire with these faults."""
    with FaultEndpoint(MailboxEndpoint(limit=1 << 20), **faults) as fault, Stepped(fault) as bed:
        assert isinstance(fault.inner, MailboxEndpoint)
        bed.send(frames)
        return fault.inner.take()


# --- the ledger ---

FAULTS: dict[str, tuple[dict[str, Any], str]] = {
    "drop": ({"drop": 0.1}, "lost"),
    "burst": ({"burst": (0.05, 0.3)}, "lost"),
    "eio": ({"eio": 0.1}, "lost"),
    "corrupt": ({"corrupt": 0.1}, "corrupted"),
    "duplicate": ({"duplicate": 0.1}, "duplicated"),
    "reorder": ({"reorder": 0.1}, "reordered"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_the_ledger_has_as_many_as_were_struck_whatever_the_budget(fault: str) -> None:
    settings, counted = FAULTS[fault]
    n = scaled(2_000, 100)
    seen = []
    for budget in (1, 7, 64):
        with (
            GenerateEndpoint(count=n) as guest,
            FaultEndpoint(GenerateEndpoint(count=n), seed=3, **settings) as wire,
            Stepped(wire, guest) as bed,
        ):
            bed.run(budget)
            ledger, struck = fates(wire, guest), wire.struck
            # A damaged mark makes a frame one of nobody's.
            foreign = sum(int(end.ledger[0, r.LEDGER_FOREIGN]) for end in (wire, guest))
        assert {name for name, times in struck.items() if times} == {fault}
        assert ledger.sent == 2 * n
        assert ledger.lost == (struck[fault] if counted in ("lost", "corrupted") else 0)
        assert ledger.duplicated == (struck[fault] if counted == "duplicated" else 0)
        assert ledger.reordered == (struck[fault] if counted == "reordered" else 0)
        assert ledger.corrupted + foreign == (struck[fault] if counted == "corrupted" else 0)
        seen.append((ledger, struck))
    assert seen[0] == seen[1] == seen[2]


def test_bursts_are_as_long_and_as_frequent_as_asked() -> None:
    n, to_bad, to_good = scaled(20_000, 1_500), 0.02, 0.25
    frames = [frame(k) for k in range(n)]
    got = set(passed(frames, burst=(to_bad, to_good)))
    lost = "".join("_" if one in got else "x" for one in frames)
    runs = [len(run) for run in lost.split("_") if run]
    bursts = n / (1 / to_bad + 1 / to_good)
    assert abs(len(runs) - bursts) < 6 * bursts**0.5
    assert abs(sum(runs) / len(runs) - 1 / to_good) < 6 / to_good / len(runs) ** 0.5


@pytest.mark.parametrize(
    ("burst", "left"),
    [((1, 0), [0]), ((0, 1), [0, 1, 2, 3]), ((1, 1), [0, 2]), ((0, 0, 0, 1), []), ((1, 0, 0), [0, 1, 2, 3])],
)
def test_a_burst_goes_by_the_state_before_the_frame(burst: tuple[float, ...], left: list[int]) -> None:
    frames = [frame(k) for k in range(4)]
    assert passed(frames, burst=burst) == [frames[k] for k in left]


# --- one frame ---


@pytest.mark.parametrize(
    ("fault", "order"),
    [
        ("drop", [0, 1, 3, 4]),
        ("eio", [0, 1, 3, 4]),
        ("eagain", [0, 1, 2, 3, 4]),
        ("duplicate", [0, 1, 2, 2, 3, 4]),
        ("reorder", [0, 1, 3, 2, 4]),
    ],
)
def test_a_fault_strikes_the_one_frame_that_was_asked_for(fault: str, order: list[int]) -> None:
    frames = [frame(k) for k in range(5)]
    with FaultEndpoint(MailboxEndpoint(), at=3, **{fault: 1}) as wire, Stepped(wire) as bed:  # type: ignore[arg-type]
        assert isinstance(wire.inner, MailboxEndpoint)
        bed.send(frames)
        assert wire.inner.take() == [frames[k] for k in order]
        assert wire.struck[fault] == wire.struck.total() == 1


def test_a_frame_is_overtaken_by_the_next_one_that_is_not_lost() -> None:
    frames = [frame(k) for k in range(6)]
    outer = FaultEndpoint(MailboxEndpoint(), reorder=1, at=2)
    with FaultEndpoint(outer, drop=1, at=3) as wire, Stepped(wire) as bed:
        bed.send(frames)
        assert isinstance(outer.inner, MailboxEndpoint)
        assert outer.inner.take() == [frames[k] for k in (0, 3, 1, 4, 5)]
    assert passed(frames, reorder=1, duplicate=1, at=2) == [frames[k] for k in (0, 2, 1, 1, 3, 4, 5)]


def test_a_frame_that_none_follows_goes_on_and_was_not_reordered() -> None:
    with FaultEndpoint(EchoEndpoint(), reorder=1) as wire, guest_of(wire) as driver:
        send_all(driver, [frame(1)])
        assert receive_all(driver, 1) == [frame(1)]
        assert wire.struck["reorder"] == 0
        assert wire.idle


def test_wires_one_behind_the_other_count_their_own_frames() -> None:
    frames = [frame(k) for k in range(4)]
    inner = FaultEndpoint(MailboxEndpoint(), duplicate=1, at=2)
    with FaultEndpoint(inner, drop=1, at=2) as outer, Stepped(outer) as bed:
        assert isinstance(inner.inner, MailboxEndpoint)
        bed.send(frames)
        assert inner.inner.take() == [frames[k] for k in (0, 2, 2, 3)]
        for one in frames:
            inner.inner.put(one)
        bed.run()
        assert bed.guest.take() == [frames[k] for k in (0, 1, 2, 3)]  # the copy was the outer wire's second frame
        counts = [end.counters() for end in (outer, inner, inner.inner)]
        assert [each["to_wire"] for each in counts] == [4, 3, 4]
        assert [each["from_wire"] for each in counts] == [4, 5, 4]
        assert (outer.struck["drop"], inner.struck["duplicate"]) == (2, 2)


# --- while frames pass ---


def test_faults_change_from_the_next_frame_on() -> None:
    frames = [frame(k) for k in range(6)]
    with FaultEndpoint(MailboxEndpoint()) as wire, Stepped(wire) as bed:
        assert isinstance(wire.inner, MailboxEndpoint)
        bed.send(frames[:2])
        wire.set(drop=1, seed=7)
        bed.send(frames[2:4])
        with pytest.raises(EndpointError, match="drop 2 is not a probability"):
            wire.set(drop=2)
        assert (wire.faults.drop, wire.faults.seed) == (1, 7)
        wire.set(drop=0, duplicate=1)
        bed.send(frames[4:])
        assert wire.inner.take() == [frames[k] for k in (0, 1, 4, 4, 5, 5)]


def test_faults_change_under_traffic() -> None:
    with GenerateEndpoint() as guest, FaultEndpoint(GenerateEndpoint()) as wire, guest_of(wire, guest):
        for name in ("drop", "corrupt", "duplicate", "reorder"):
            wire.set(**{name: 0.2})
            wait_for(lambda name=name: wire.struck[name] > 10, f"{name} strikes")  # type: ignore[misc]
            wire.set(**{name: 0})
        wire.set(delay_ms=1, jitter_ms=1)
        wait_for(lambda: wire.struck["delay"] > 10, "frames are delayed")
        wire.set(delay_ms=0, jitter_ms=0, rate=1e5)
        wait_for(lambda: wire.struck["rate"] > 10, "frames wait for those before them")


def test_a_wire_that_loses_all_keeps_no_loop() -> None:
    with (
        GenerateEndpoint() as guest,
        FaultEndpoint(GenerateEndpoint(), drop=1) as wire,
        guest_of(wire, guest) as driver,
    ):
        wait_for(lambda: wire.struck["drop"] > 1000, "frames are lost")
        assert isinstance(driver.device, NetDevice)
        with driver.device.paused():  # its loop leaves the kernel
            struck = wire.struck["drop"]
            assert wire.struck["drop"] == struck
        wire.set(drop=0)
        wait_for(lambda: int(guest.ledger[0, r.LEDGER_DELIVERED]) > 100, "frames arrive again")


# --- the clock ---


def test_a_rate_is_kept_and_few_frames_wait_on_the_wire() -> None:
    n = 40
    with FaultEndpoint(MailboxEndpoint(), rate=1e6) as wire, Stepped(wire) as bed:
        began = time.monotonic()
        for k in range(n):
            bed.guest.put(frame(k, 125))  # 1 ms each
        while wire.counters()["to_wire"] != n:
            bed.driver.step()
            bed.device.step()
            assert wire.held <= 12
        bed.run()
        assert time.monotonic() - began >= n * 0.001
        assert isinstance(wire.inner, MailboxEndpoint)
        assert wire.inner.take() == [frame(k, 125) for k in range(n)]


@pytest.mark.parametrize("delay_ms", [0, 20])
def test_a_delay_is_at_least_as_long_as_asked(delay_ms: float) -> None:
    with FaultEndpoint(EchoEndpoint(), delay_ms=delay_ms, jitter_ms=5) as wire, guest_of(wire) as driver:
        for k in range(5):
            began = time.monotonic()
            send_all(driver, [frame(k)])
            assert receive_all(driver, 1) == [frame(k)]
            assert time.monotonic() - began >= 2 * max(delay_ms - 5, 0) / 1000


# --- a process ---


def test_a_worker_process_injects_them_too() -> None:
    n = scaled(20_000, 300)
    with (
        GenerateEndpoint(count=n) as guest,
        FaultEndpoint(FaultEndpoint(GenerateEndpoint(count=n), drop=0.1), duplicate=0.1) as wire,
        WorkerProcess(1) as worker,
        memory_for() as memory,
        NetDevice(memory, wire, vhost=worker.backends) as device,
        Driver(device, memory, guest) as driver,
    ):
        device.set_use_vhost(True)
        driver.start()
        inner = wire.inner
        assert isinstance(inner, FaultEndpoint)

        def all_sent() -> bool:
            ledger = fates(wire, guest)
            return ledger.sent == 2 * n and ledger.lost == inner.struck["drop"] - copies_lost(ledger) and wire.idle

        def copies_lost(ledger: Ledger) -> int:
            """Return how many frames were dropped of which another copy arrived."""
            return wire.struck["duplicate"] - ledger.duplicated

        wait_for(lambda: wire.finished and guest.finished and wire.idle, "all frames met their fate")
        wait_for(all_sent, "those that were not dropped arrived")
        assert device.owner_error is None
        wire.set(drop=0.5)
        assert wire.struck["drop"] == wire.struck["eio"] == 0 < inner.struck["drop"]


# --- what cannot be ---


@pytest.mark.parametrize(
    ("faults", "says"),
    [
        ({"jitter_ms": -1}, "jitter_ms -1 is not between 0 and 60000"),
        ({"rate": 999}, "rate 999 is not between 1e3 and 1e12 bits a second, nor 0"),
        ({"rate": float("nan")}, "rate nan is not between"),
        ({"burst": (0.1,)}, "burst 0.1 is not 2 to 4 probabilities"),
        ({"burst": (0.1, 0.2, 0.3, 0.4, 0.5)}, "burst 0.1/0.2/0.3/0.4/0.5 is not 2 to 4 probabilities"),
        ({"burst": (0.1, 1.5)}, "burst 0.1/1.5 is not 2 to 4 probabilities"),
        ({"at": -1}, "at -1 is not between 1, the first frame, and 2\\^62, nor 0"),
    ],
)
def test_a_value_outside_its_range_is_refused(faults: dict[str, Any], says: str) -> None:
    with NullEndpoint() as inner, no_descriptor_leaks(), pytest.raises(EndpointError, match=f"fault: {says}"):
        FaultEndpoint(inner, **faults)


def test_an_endpoint_that_a_device_has_gets_no_faults_around_it() -> None:
    with NullEndpoint() as inner, guest_of(inner):
        with (
            no_descriptor_leaks(),
            pytest.raises(EndpointError, match="null is in use: put the faults around it before"),
        ):
            FaultEndpoint(inner)
        assert inner.rows[0, r.EP_KIND] == r.KIND_NULL


def test_nothing_is_left_of_a_fault_endpoint_whose_frames_are_on_the_wire() -> None:
    def once() -> None:
        with FaultEndpoint(EchoEndpoint(), delay_ms=60_000) as wire, guest_of(wire) as driver:
            send_all(driver, [frame(k) for k in range(10)])
            wait_for(lambda: wire.held == 10, "they are held")

    once()
    before = threading.active_count()
    with no_descriptor_leaks():
        once()
    assert threading.active_count() == before
