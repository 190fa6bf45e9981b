"""EventFd: signals add up, nobody blocks, and a descriptor is closed once."""

from __future__ import annotations

import fcntl
import os

import pytest

from tests.support.by_hand import many_descriptors, no_descriptor_leaks
from vnetdp.shared.notify import EventFd
from vnetdp.system.poll import readable


def test_signals_add_up_and_are_taken_once() -> None:
    with EventFd() as event:
        assert event.clear() == 0
        for _ in range(3):
            event.signal()
        assert event.clear() == 3
        assert event.clear() == 0


def test_a_full_counter_is_signal_enough() -> None:
    with EventFd() as event:
        os.eventfd_write(event.fd, 2**64 - 2)
        event.signal()
        assert event.clear() == 2**64 - 2


@pytest.mark.parametrize("lowest", [0, 1500])
def test_it_can_be_waited_for(lowest: int) -> None:
    """Whatever its number: select() ends at 1,023."""
    with (
        many_descriptors(),
        EventFd() as first,
        EventFd(fcntl.fcntl(first.fd, fcntl.F_DUPFD_CLOEXEC, lowest)) as event,
    ):
        assert not readable(event, 0)
        assert not readable(event, 0.001)
        event.signal()
        assert readable(event, 0)


def test_a_descriptor_is_closed_once_and_not_passed_on() -> None:
    with no_descriptor_leaks():
        event = EventFd()
        assert not os.get_inheritable(event.fd)
        with event:
            pass
        assert event.fd == -1
        event.close()
        event.signal()
        assert event.clear() == 0


def test_a_descriptor_that_is_given_is_owned() -> None:
    with no_descriptor_leaks():
        mine = EventFd()
        theirs = EventFd(os.dup(mine.fd))
        theirs.signal()
        assert mine.clear() == 1
        theirs.close()
        mine.close()
