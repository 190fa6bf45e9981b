"""Rings that start, stop and start again, in whatever order a front end says what they need."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from tests.support.by_hand import DRIVER_OK
from tests.support.vhost_user import (
    FEATURES,
    GPA,
    LOG_ALL,
    MEMORY_LEN,
    NUM,
    SPOKEN,
    UNTOLD,
    UVA,
    BackEnd,
    ByHand,
    Guest,
    costs_nothing,
    region,
    state,
    u64,
)
from vnetdp.testing import READY
from vnetdp.vhost_user.message import ProtocolFeature, Request

R = Request


@contextmanager
def attached(back_end: BackEnd, protocol: ProtocolFeature = UNTOLD, refusals: int | None = 0) -> Iterator[Guest]:
    """Give a guest whose memory is shared; it leaves at the end, and costs nothing but so many *refusals* (None = any)."""
    with costs_nothing(back_end, refusals), ByHand.dial(back_end.path) as end, Guest(end) as guest:
        end.shake_hands(protocol=protocol)
        guest.share()
        yield guest
        end.leave()


MESSAGES = ("features", "memory", "num", "base", "addr", "call", "kick", "enable")


def say(guest: Guest, name: str) -> None:
    """Send one of the messages that two rings need."""
    end = guest.end
    if name == "features":
        assert end.tell(R.SET_FEATURES, u64(FEATURES))
    elif name == "memory":
        assert end.tell(R.SET_MEM_TABLE, guest.table, [guest.fd])
    for index in range(2):
        payload, fds = {
            "num": (state(index, NUM), []),
            "base": (state(index, 3), []),
            "addr": (guest.addr(index), []),
            "call": (u64(index), [guest.calls[index].fd]),
            "kick": (u64(index), [guest.kicks[index].fd]),
            "enable": (state(index, 1), []),
        }.get(name, (b"", []))
        if payload:
            request = R.SET_VRING_ENABLE if name == "enable" else getattr(R, f"SET_VRING_{name.upper()}")
            assert end.tell(request, payload, fds)


@pytest.mark.parametrize("again", [False, True], ids=["once", "twice"])
@pytest.mark.parametrize("last", MESSAGES)
def test_whichever_message_comes_last_a_ring_starts_where_it_is_said_to(
    back_end: BackEnd, last: str, again: bool
) -> None:
    """Until its kick is readable nothing is taken, though the rings hold chains from before."""
    with costs_nothing(back_end, 0), ByHand.dial(back_end.path) as end, Guest(end) as guest:
        end.send(R.SET_OWNER)
        end.send(R.SET_PROTOCOL_FEATURES, u64(UNTOLD))
        for ring in guest.rings[:2]:
            ring.avail_idx = ring.used_idx = 3
        for name in MESSAGES:
            if again or name != last:
                say(guest, name)
        say(guest, last)
        guest.echo()
        assert [ring.used_idx for ring in guest.rings[:2]] == [4, 4]
        end.leave()


@pytest.mark.parametrize("name", ["num", "base"])
def test_a_ring_that_has_started_keeps_its_size_and_base(back_end: BackEnd, name: str) -> None:
    with attached(back_end, refusals=2) as guest:
        guest.start(0, 1)
        guest.echo()
        request = getattr(R, f"SET_VRING_{name.upper()}")
        for index in range(2):
            assert not guest.end.tell(request, state(index, 8))
        guest.echo(1)


def test_a_kicked_ring_that_is_nowhere_waits_for_a_better_address(back_end: BackEnd) -> None:
    with attached(back_end, refusals=None) as guest:
        end = guest.end
        elsewhere = bytes(8) + region(GPA + MEMORY_LEN, MEMORY_LEN, UVA + MEMORY_LEN)
        assert end.tell(R.ADD_MEM_REG, elsewhere, [guest.fd])
        for index in range(2):
            end.send(R.SET_VRING_NUM, state(index, NUM))
            end.send(R.SET_VRING_ADDR, guest.addr(index))
            end.send(R.SET_VRING_KICK, u64(index), [guest.kicks[index].fd])
        assert end.tell(R.REM_MEM_REG, bytes(8) + region(GPA, MEMORY_LEN, UVA))
        for index in range(2):
            assert end.tell(R.SET_VRING_ENABLE, state(index, 1))
            guest.kicks[index].signal()
        assert end.tell(R.ADD_MEM_REG, bytes(8) + region(GPA, MEMORY_LEN, UVA), [guest.fd])
        guest.echo()


def status(guest: Guest) -> int:
    return int(struct.unpack("<Q", guest.end.ask(R.GET_STATUS))[0])


def test_all_memory_is_unplugged_and_plugged_in_again(back_end: BackEnd) -> None:
    with attached(back_end) as guest:
        guest.start(0, 1)
        guest.echo()
        memory = bytes(8) + region(GPA, MEMORY_LEN, UVA)
        elsewhere = bytes(8) + region(GPA + MEMORY_LEN, MEMORY_LEN, UVA + MEMORY_LEN)
        for n in range(3):
            assert guest.end.tell(R.REM_MEM_REG, memory)
            assert guest.end.tell(R.ADD_MEM_REG, elsewhere, [guest.fd])  # of no use to the rings
            assert guest.end.tell(R.ADD_MEM_REG, memory, [guest.fd])
            guest.echo(n)
            assert guest.end.tell(R.REM_MEM_REG, elsewhere)


def test_a_migration_begins_while_no_ring_is_enabled(back_end: BackEnd) -> None:
    """Nothing else is said anew: the rings are where they were."""
    with attached(back_end) as guest:
        guest.start(0, 1)
        guest.echo()
        for features in (FEATURES | LOG_ALL, FEATURES):
            for index in (0, 1):
                assert guest.end.tell(R.SET_VRING_ENABLE, state(index, 0))
            assert guest.end.tell(R.SET_FEATURES, u64(features))
            for index in (0, 1):
                assert guest.end.tell(R.SET_VRING_ENABLE, state(index, 1))
            guest.echo(1)


def test_a_device_that_is_reset_by_its_status_says_how_far_its_rings_came(back_end: BackEnd) -> None:
    """QEMU passes the guest's reset on before it stops the rings."""
    with attached(back_end, SPOKEN) as guest:
        guest.start(0, 1)
        assert guest.end.tell(R.SET_STATUS, u64(READY))
        for n in range(3):
            guest.echo(n)
        assert guest.end.tell(R.SET_STATUS, u64(0))
        for index in (0, 1):
            assert guest.end.ask(R.GET_VRING_BASE, state(index, 0)) == state(index, 3)


def test_a_device_that_is_reset_has_no_status_and_begins_anew(back_end: BackEnd) -> None:
    with attached(back_end, SPOKEN) as guest:
        for _ in range(2):
            guest.start(0, 1)
            assert guest.end.tell(R.SET_STATUS, u64(READY))
            guest.echo()
            assert guest.end.tell(R.RESET_DEVICE)
            assert status(guest) == 0
            for index in (0, 1):
                assert guest.end.ask(R.GET_VRING_BASE, state(index, 0)) == state(index, 0)
                ring = guest.rings[index]
                ring.avail_idx = ring.used_idx = 0


@pytest.mark.parametrize("said", [None, 0, READY & ~DRIVER_OK])
def test_a_ring_starts_by_its_kick_before_the_front_end_tells_driver_ok_if_it_ever_does(
    back_end: BackEnd, said: int | None
) -> None:
    """QEMU's generic device takes STATUS, tells FEATURES_OK, and nothing after it."""
    with attached(back_end, SPOKEN) as guest:
        if said is not None:
            assert guest.end.tell(R.SET_STATUS, u64(said))
        guest.start(0, 1)
        for n in range(3):
            guest.echo(n)
        assert status(guest) == (said or 0)
        assert guest.end.tell(R.SET_STATUS, u64(READY))
        guest.echo(3)
        for index in (0, 1):
            assert guest.end.ask(R.GET_VRING_BASE, state(index, 0)) == state(index, 4)
