"""A link in a process: what its report says of trouble."""

from __future__ import annotations

import threading
import time

import pytest

from tests.by_hand import PATIENCE, wait_equal, wait_for
from vnetdp import link as link_module
from vnetdp.endpoints.loopback import GenerateEndpoint
from vnetdp.endpoints.mailbox import MailboxEndpoint
from vnetdp.link import Link


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
        with link.driver._thread.paused():
            wait_for(lambda: right.ledger_against(left).lost > 0, "frames are on their way to the driver")
            looks = right.looks
            drain = threading.Thread(target=link.drain)
            drain.start()
            wait_for(lambda: right.looks > looks + 5, "it looks again and again")
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
