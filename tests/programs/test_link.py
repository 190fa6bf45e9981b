"""A link in a process: what its report says of trouble."""

from __future__ import annotations

import threading
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests.interop.peers import write_pcap
from tests.support.by_hand import PATIENCE, frame, wait_equal, wait_for
from vnetdp.endpoints.fault import FaultEndpoint
from vnetdp.endpoints.loopback import EchoEndpoint, GenerateEndpoint
from vnetdp.endpoints.mailbox import MailboxEndpoint
from vnetdp.endpoints.pcap import PcapEndpoint
from vnetdp.endpoints.scapy import ScapyEndpoint
from vnetdp.programs import link as link_module
from vnetdp.programs.link import Link


def _fails() -> None:
    raise RuntimeError("a defect")


@pytest.mark.parametrize(
    ("side", "says"),
    [
        (
            "left",
            "nobody runs the rings: set_backend (vring 0): ESRCH: the worker's thread has ended: RuntimeError: a defect",
        ),
        ("right", "the driver's thread ended: RuntimeError: a defect"),
    ],
)
def test_a_thread_that_ended_is_an_error(side: str, says: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with MailboxEndpoint() as left, MailboxEndpoint() as right, Link(left, right) as link:
        assert link.report()["errors"] == []
        end = {"left": left, "right": right}[side]
        monkeypatch.setattr(end, "service", _fails)
        end.put(bytes(60))
        wait_equal(lambda: link.report()["errors"], [says.format("RuntimeError: a defect")])


class Watched(GenerateEndpoint):
    """Counts how often somebody looked at its counters."""

    looks = 0

    def counters(self) -> dict[str, int]:
        self.looks += 1
        return super().counters()


def test_frames_on_their_way_are_waited_for_however_slow_a_thread_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """That nothing moves between two looks is no reason to give it up."""
    monkeypatch.setattr(link_module, "_QUIET_S", 0.0)
    monkeypatch.setattr(link_module, "_PATIENCE_S", 2 * PATIENCE)
    with GenerateEndpoint() as left, Watched() as right, Link(left, right) as link:
        wait_for(lambda: right.counters()["to_wire"] > 1000, "traffic")
        assert link.driver._thread is not None
        link.driver._thread.park(True)
        try:
            wait_for(lambda: right.ledger_against(left).lost > 0, "frames are on their way to the driver")
            looks = right.looks
            drain = threading.Thread(target=link.drain)
            drain.start()
            wait_for(lambda: right.looks > looks + 5, "it looks again and again")
        finally:
            link.driver._thread.park(False)
        drain.join()
        ledger = link.report()["ledger"]
        assert ledger["sent"] == ledger["delivered"] > 0


def test_what_comes_from_elsewhere_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(link_module, "_QUIET_S", 2 * PATIENCE)
    monkeypatch.setattr(link_module, "_PATIENCE_S", 2 * PATIENCE)
    with MailboxEndpoint() as left, MailboxEndpoint() as right, Link(left, right) as link:
        began = time.monotonic()
        link.drain()
        assert time.monotonic() - began < PATIENCE


def test_an_end_that_only_answers_is_no_source(tmp_path: Path) -> None:
    frames = [frame(n) for n in range(500)]
    write_pcap(tmp_path / "in.pcap", frames)
    for answering in (EchoEndpoint(), FaultEndpoint(EchoEndpoint(), delay_ms=300)):
        with (
            PcapEndpoint(tmp_path / "in.pcap", tmp_path / "out.pcap") as left,
            answering as right,
            Link(left, right) as link,
        ):
            wait_for(partial(getattr, link, "done"), "every frame was given")
            link.drain()
            assert left.counters()["to_wire"] == len(frames)


def test_answers_of_a_slow_function_are_waited_for() -> None:
    entered, go_on = threading.Event(), threading.Event()

    def answer(packet: Any) -> Any:
        entered.set()
        go_on.wait()
        return packet

    with ScapyEndpoint(answer) as left, GenerateEndpoint(count=3) as right, Link(left, right) as link:
        wait_for(lambda: link.done, "every frame was given")
        drain = threading.Thread(target=link.drain)
        drain.start()
        assert entered.wait(60)
        assert not left.idle
        go_on.set()
        drain.join()
        assert right.counters()["to_wire"] == 3


def test_a_drain_that_is_asked_to_end_does_not_wait_for_a_function_that_does_not_return() -> None:
    go_on = threading.Event()

    def hang(_packet: Any) -> None:
        go_on.wait()

    with (
        ScapyEndpoint(hang) as left,
        GenerateEndpoint(count=3) as right,
        Link(left, right) as link,
    ):
        wait_for(lambda: link.done and not left.idle, "the function was called")
        link.drain(lambda: True)
        assert not left.idle
        go_on.set()


def test_the_rate_is_that_from_the_first_frame_to_the_last() -> None:
    with MailboxEndpoint() as left, MailboxEndpoint() as right, Link(left, right) as link:
        made = time.monotonic()
        wait_for(lambda: time.monotonic() - made > 0.1, "time has passed without a frame")
        link.look()
        looked = time.monotonic()
        left.put(bytes(60))
        wait_for(lambda: right.counters()["to_wire"] == 1, "a frame arrives")
        report = link.report()
        after = time.monotonic()
        assert 0 < report["left"]["seconds"] == report["seconds"] <= after - made - 0.1
        assert report["left"]["mpps"] == 1 / report["left"]["seconds"] / 1e6
        assert report["right"]["seconds"] == report["right"]["mpps"] == 0
        wait_for(lambda: time.monotonic() > after + (after - looked), "more time has passed")
        assert link.report()["seconds"] == report["seconds"]
