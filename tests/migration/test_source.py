"""A source whose migration fails, by whatever: before the commit the machine goes on as if nothing had been."""

from __future__ import annotations

import fcntl
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import pytest

from tests.migration.rig import assert_runs, failing, move, wire_bytes
from tests.support.by_hand import many_descriptors
from vnetdp.device.owners import Owner
from vnetdp.errors import VnetdpError
from vnetdp.lab.couple import _answer
from vnetdp.migration import channel
from vnetdp.migration.channel import END, FAILED, POLICIES, Channel
from vnetdp.migration.machine import Machine
from vnetdp.migration.report import Report
from vnetdp.migration.source import Source

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


class Hasty(Channel):
    """A channel whose patience is short."""

    SECONDS = 0.5

    def set_deadline(self, seconds: float = SECONDS) -> None:
        super().set_deadline(min(seconds, self.SECONDS))


def answered(near: socket.socket, far: socket.socket, machine: Machine, answer: Callable[[], object]) -> Report:
    """Migrate *machine* to somebody who does what *answer* does, in a thread."""
    with near, far:
        thread = threading.Thread(target=answer)
        thread.start()
        report = Source(machine, Hasty(near), "delta").run()
        near.close()
        thread.join()
    return report


def test_an_answer_that_drips_does_not_hold_the_guest(machines: tuple[Machine, Machine]) -> None:
    machine = machines[0]
    near, far = socket.socketpair()

    def drip() -> None:
        end = Channel(far)
        while end.receive(POLICIES["delta"]).type is not END:
            pass
        with suppress(OSError):
            for byte in wire_bytes(FAILED, bytes(1000)):
                far.send(bytes([byte]))
                time.sleep(Hasty.SECONDS / 10)

    report = answered(near, far, machine, drip)
    assert (report.outcome, report.error) == ("source", "the other side is gone: it did not read or write in time")
    assert_runs(machine)


def test_a_reader_that_is_slow_does_not_hold_the_guest(machines: tuple[Machine, Machine]) -> None:
    machine = machines[0]
    near, far = socket.socketpair()
    near.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)

    def read() -> None:
        with suppress(OSError):
            while far.recv(1 << 16 if machine.device.running else 256):
                time.sleep(0 if machine.device.running else Hasty.SECONDS / 10)

    report = answered(near, far, machine, read)
    assert report.outcome == "source"
    assert_runs(machine)


def test_the_end_of_a_stream_is_not_waited_for_without_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(channel, "_DRAIN_S", Hasty.SECONDS)
    near, far = socket.socketpair()
    with near, Channel(far) as slow:
        ended = threading.Event()

        def drip() -> None:
            with suppress(OSError):
                while not ended.wait(Hasty.SECONDS / 10):
                    near.send(b"!")

        thread = threading.Thread(target=drip)
        thread.start()
        slow.drain()
        ended.set()
        thread.join()


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

    def wait(_other: object) -> Report:
        raise VnetdpError("it raised")

    report = _answer(host, wait, host)
    assert (report.outcome, report.error) == (outcome, "it raised")
