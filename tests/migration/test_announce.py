"""A guest that has moved is announced, five times in 0.8 s, by the machine that runs it and by no other."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator

import pytest

from tests.migration.rig import failing, move
from tests.support.by_hand import PATIENCE, wait_for
from vnetdp.endpoints import announce
from vnetdp.endpoints.announce import ROUNDS_S, rarp
from vnetdp.migration.channel import COMMIT, Channel
from vnetdp.migration.machine import Machine
from vnetdp.migration.source import Cancelled, Source
from vnetdp.migration.stream import SectionType, StreamError

Machines = tuple[Machine, Machine]


class Rounds:
    """The rounds of an announcement: one at once, and the rest when the test lets them be. over: how often all have been."""

    def __init__(self) -> None:
        self.rest = threading.Event()
        self.over = 0

    def __iter__(self) -> Iterator[float]:
        yield 0.0
        self.rest.wait(PATIENCE)
        yield from [0.0] * (len(ROUNDS_S) - 1)
        self.over += 1


@pytest.fixture
def rounds(monkeypatch: pytest.MonkeyPatch) -> Iterator[Rounds]:
    rounds = Rounds()
    monkeypatch.setattr(announce, "ROUNDS_S", rounds)
    yield rounds
    rounds.rest.set()  # a machine that ends waits for its announcer


def listen(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> list[bytes]:
    """Return what the machine announces."""
    heard: list[bytes] = []
    monkeypatch.setattr(machine.wire, "send_to_wire", heard.append)
    return heard


def assert_all_are_sent(heard: list[bytes], machine: Machine) -> None:
    wait_for(lambda: len(heard) >= len(ROUNDS_S), "all announcements")
    assert heard == [rarp(machine.device.control.mac)] * len(ROUNDS_S)


def test_a_guest_that_has_moved_is_announced(
    machines: Machines, rounds: Rounds, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, other = machines
    rounds.rest.set()
    heard = listen(other, monkeypatch)
    before = listen(one, monkeypatch)
    assert move(one, other)[0].outcome == "vhost"
    assert_all_are_sent(heard, other)
    assert before == []


@pytest.mark.parametrize("point", Source.POINTS[:-1])
def test_a_cancelled_migration_leaves_the_rest_to_be_sent(
    machines: Machines, rounds: Rounds, point: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, other = machines
    heard = listen(other, monkeypatch)
    assert move(one, other)[0].outcome == "vhost"
    assert move(other, one, failing(point, Cancelled("cancelled")))[0].outcome == "source"
    rounds.rest.set()
    assert_all_are_sent(heard, other)


def test_a_commit_that_cannot_be_sent_leaves_the_rest_to_be_sent(
    machines: Machines, rounds: Rounds, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Broken(Channel):
        def send(self, section: SectionType, payload: bytes = b"") -> int:
            if section is COMMIT:
                self.sock.shutdown(socket.SHUT_RDWR)
                raise StreamError("the other side is gone")
            return super().send(section, payload)

    one, other = machines
    heard = listen(other, monkeypatch)
    assert move(one, other)[0].outcome == "vhost"
    assert move(other, one, kind=Broken)[0].outcome == "source"
    rounds.rest.set()
    assert_all_are_sent(heard, other)


def test_a_machine_that_has_moved_on_announces_nothing(
    machines: Machines, rounds: Rounds, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither after the commit, nor from the moment on in which it is sent."""
    one, other = machines
    heard, there = listen(other, monkeypatch), listen(one, monkeypatch)
    at_the_commit = []

    def at(point: str) -> None:
        if point == "committed":
            at_the_commit.append(len(heard))
            rounds.rest.set()
            wait_for(lambda: rounds.over > 0, "the rest of the rounds has passed")

    assert move(one, other)[0].outcome == "vhost"
    assert move(other, one, at)[0].outcome == "vhost"
    assert other.announcer is None
    assert_all_are_sent(there, one)
    assert [len(heard)] == at_the_commit
