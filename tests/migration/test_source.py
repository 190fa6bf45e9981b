"""A source whose migration fails, by whatever: before the commit the machine goes on as if nothing had been."""

from __future__ import annotations

import fcntl
import socket
from typing import Any

import pytest

from tests.by_hand import many_descriptors
from tests.migration.rig import assert_runs, failing, move
from vnetdp.errors import VnetdpError
from vnetdp.migration.channel import Channel
from vnetdp.migration.machine import Machine
from vnetdp.migration.run import _answer
from vnetdp.migration.source import Report, Source
from vnetdp.owners import Owner

BEFORE_THE_COMMIT = Source.POINTS[: Source.POINTS.index("committed")]


@pytest.mark.parametrize("point", BEFORE_THE_COMMIT)
def test_an_error_of_any_kind_lets_it_go_on(machines: tuple[Machine, Machine], point: str) -> None:
    report, _ = move(*machines, failing(point, ZeroDivisionError("by zero")))
    assert (report.outcome, report.error) == ("source", "ZeroDivisionError: by zero")
    assert_runs(machines[0])
    assert move(*machines)[0].outcome == "vhost"
    assert_runs(machines[1])


@pytest.mark.parametrize("point", BEFORE_THE_COMMIT)
def test_an_interrupt_lets_it_go_on_and_is_passed_on(machines: tuple[Machine, Machine], point: str) -> None:
    with pytest.raises(KeyboardInterrupt):
        move(*machines, failing(point, KeyboardInterrupt()))
    assert_runs(machines[0])


def test_an_error_after_the_commit_leaves_it_stopped(machines: tuple[Machine, Machine]) -> None:
    report, _ = move(*machines, failing("committed", ZeroDivisionError("by zero")))
    assert (report.outcome, report.error) == ("lost", "ZeroDivisionError: by zero")
    assert machines[0].device.owner is Owner.NOBODY
    assert machines[0].device.log is None
    assert_runs(machines[1])


def test_a_channel_whose_descriptor_is_beyond_select() -> None:
    near, far = socket.socketpair()
    with (
        near,
        far,
        many_descriptors(),
        Channel(socket.socket(fileno=fcntl.fcntl(near, fcntl.F_DUPFD_CLOEXEC, 1500))) as channel,
    ):
        assert not channel.has_more()
        far.send(b"!")
        assert channel.has_more()


@pytest.mark.parametrize(
    ("alive", "running", "outcome"), [(True, True, "source"), (True, False, "lost"), (False, True, "lost")]
)
def test_a_host_that_raised_may_still_have_its_machine(alive: bool, running: bool, outcome: str) -> None:
    class Host:
        alive = False

        def call(self, what: str) -> dict[str, Any]:
            assert (what, self.alive) == ("look", True)
            return {"running": running}

    host: Any = Host()
    host.alive = alive

    def wait() -> Report:
        raise VnetdpError("it raised")

    report = _answer(host, wait)
    assert (report.outcome, report.error) == (outcome, "it raised")
