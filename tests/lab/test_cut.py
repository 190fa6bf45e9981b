"""The connection between two processes is cut after each byte that follows the source's stop: one side runs, never both.

By default some 10 places, around each section's ends: every other is cut both ways, and the others one way. With
VNETDP_CAMPAIGN=1 (`make campaign`) each byte of policy delta's final sections and commit, and of policy none's, which are
32 KB long, those around each section's ends and every 101st.
"""

from __future__ import annotations

import os
import socket
import struct
import threading
from collections.abc import Iterator
from contextlib import suppress

import pytest

from tests.support.by_hand import PATIENCE, no_descriptor_leaks, wait_for
from vnetdp.lab.couple import Couple, socket_pair
from vnetdp.lab.host import Orders
from vnetdp.migration.machine import MachineConfig
from vnetdp.migration.report import Report
from vnetdp.migration.stream import Phase
from vnetdp_kernels import rows as r

CAMPAIGN = os.environ.get("VNETDP_CAMPAIGN") == "1"
CONFIG = MachineConfig(queue_pairs=2, num=16, rate=2000.0, first_idx=0xFFF0)
PLACES = 10
BOTH_WAYS = (r.EP_TO_WIRE, r.EP_FROM_WIRE)
_HEAD = struct.Struct("<HBBHHI")
_CRC_LEN = 4


class CutError(Exception):
    """The relay has sent as much as it was told to."""


class Relay:
    """Carries a migration's stream between two sockets, and cuts it *cut_after* bytes into its final phase; None: never.

    both_ways: nothing is heard of the other side, either way; else the destination's answers still arrive. near and
    far are for the source and the destination.
    """

    def __init__(self, cut_after: int | None = None, both_ways: bool = True, tcp: bool = False) -> None:
        self.near, self._in = socket_pair(tcp)
        self.far, self._out = socket_pair(tcp)
        self.ends: list[int] = []  # where each section of the final phase, and at last the commit, ends
        self._cut_after = cut_after
        self._both_ways = both_ways
        self._passed = -1  # bytes of the final phase; -1: it has not begun
        self._threads = [threading.Thread(target=each) for each in (self._there, self._back)]
        for thread in self._threads:
            thread.start()

    def _there(self) -> None:
        with suppress(EOFError, CutError):
            while True:
                self._carry_section()
        with suppress(OSError):
            self._out.shutdown(socket.SHUT_RDWR if self._both_ways else socket.SHUT_WR)
        with suppress(OSError):
            while self._in.recv(1 << 16):  # what is sent into the gap
                pass

    def _carry_section(self) -> None:
        head = self._take(_HEAD.size)
        _, name_len, phase, _, _, length = _HEAD.unpack(head)
        if phase == Phase.FINAL:
            self._passed = max(self._passed, 0)
        self._put(head)
        self._put(self._take(name_len + length + _CRC_LEN))
        if self._passed >= 0:
            self.ends.append(self._passed)

    def _take(self, length: int) -> bytes:
        data = b""
        while len(data) < length:
            part = self._in.recv(length - len(data))
            if not part:
                raise EOFError
            data += part
        return data

    def _put(self, data: bytes) -> None:
        if self._passed < 0:
            self._out.sendall(data)
            return
        if self._cut_after is not None and self._passed + len(data) >= self._cut_after:
            if self._both_ways:
                self._in.shutdown(socket.SHUT_RDWR)  # first: an answer to what follows does not arrive any more
            self._out.sendall(data[: self._cut_after - self._passed])
            raise CutError
        self._out.sendall(data)
        self._passed += len(data)

    def _back(self) -> None:
        with suppress(OSError):
            while data := self._out.recv(1 << 16):
                self._in.sendall(data)
        with suppress(OSError):
            self._in.shutdown(socket.SHUT_WR)

    def close(self) -> None:
        """Give the sockets up, once both sides have closed theirs."""
        for thread in self._threads:
            thread.join(PATIENCE)
            assert not thread.is_alive()
        for sock in (self._in, self._out):
            sock.close()


def migrate_through(couple: Couple, relay: Relay, policy: str) -> tuple[Report, Report]:
    """Migrate the machine through *relay*; return how it went on either side."""
    assert couple.wire is not None
    couple.target.call("make", couple.config, (), fds=(couple.wire.block.fd,))
    orders = Orders(policy=policy)
    with relay.near, relay.far:
        receive = couple.target.begin("receive", orders, fds=(relay.far.fileno(),))
        send = couple.source.begin("send", orders, fds=(relay.near.fileno(),))
    reports: tuple[Report, Report] = (send(), receive())
    relay.close()
    return reports


@pytest.fixture(scope="module")
def two_hosts() -> Iterator[Couple]:
    with Couple(quiet=True) as couple:
        yield couple


@pytest.fixture
def couple(two_hosts: Couple) -> Iterator[Couple]:
    """Two hosts, one with a machine; when the test is done, nobody holds more than before."""
    with no_descriptor_leaks():
        two_hosts.start(CONFIG)
        yield two_hosts
        assert two_hosts.drop() == {}


def section_ends(couple: Couple, policy: str) -> list[int]:
    """Return where each final section and the commit end, as a migration that nobody cuts has them."""
    relay = Relay()
    sent, received = migrate_through(couple, relay, policy)
    assert (sent.outcome, received.outcome) == ("vhost", "vhost")
    assert sent.bytes["final"] == relay.ends[-2]
    couple.source, couple.target = couple.target, couple.source
    return relay.ends


def places(ends: list[int], each_byte: bool, around: int = 1, every: int = 0) -> list[int]:
    """Return where to cut: both ends, the bytes *around* each section's end, and some between."""
    last = ends[-1]
    if each_byte:
        return list(range(last + 1))
    found = {end + k for end in (0, *ends) for k in range(-around, around + 1)}
    found |= set(range(0, last, every or last // max(PLACES - len(found), 4)))
    return sorted(n for n in found if 0 <= n <= last)


def owners(couple: Couple) -> tuple[str, str]:
    source, target = (host.call("look")["owner"] for host in (couple.source, couple.target))
    return source, target


def wait_for_frames(couple: Couple) -> None:
    """Wait until a frame has gone each way on each pair."""
    assert couple.wire is not None
    rows = couple.wire.rows
    before = rows[:, BOTH_WAYS]
    wait_for(lambda: bool((rows[:, BOTH_WAYS] > before).all()), "frames both ways on each pair")


def assert_every_frame(couple: Couple) -> None:
    """Stop traffic, look, and let it go on."""
    assert couple.source.call("drain")
    seen = couple.source.call("look")
    assert seen["violations"] == []
    assert all(ledger.clean and ledger.sent for ledger in seen["ledgers"]), seen["ledgers"]
    couple.source.call("allow", True)


def assert_cut(couple: Couple, policy: str, relay: Relay, place: int, ends: list[int], both_ways: bool) -> None:
    """Migrate through *relay*, which cuts at *place*; see who runs, and that all can be migrated afterwards."""
    sent, received = migrate_through(couple, relay, policy)
    if place == ends[-1]:  # the commit has arrived in whole
        expected, owner = ("lost" if both_ways else "vhost", "vhost"), ("nobody", "vhost")
    elif place > ends[-2] and both_ways:  # a part of it: the source can't resume, since it cannot know
        expected, owner = ("lost", "source"), ("nobody", "nobody")
    else:
        expected, owner = ("source", "source"), ("vhost", "nobody")
    assert (place, sent.outcome, received.outcome) == (place, *expected)
    assert (place, *owners(couple)) == (place, *owner)
    assert (place, sent.violations, received.violations) == (place, [], [])
    if owner[1] == "vhost":
        couple.source, couple.target = couple.target, couple.source
    if "vhost" in owner:
        wait_for_frames(couple)
        assert_every_frame(couple)
    result = couple.migrate(policy)  # over a fresh socket; a machine that runs nowhere is started by it
    assert (place, result.outcome, result.error, result.violations) == (place, "vhost", "", [])
    wait_for_frames(couple)
    assert_every_frame(couple)


@pytest.mark.timeout(3600 if CAMPAIGN else 300)
@pytest.mark.parametrize("both_ways", [True, False], ids=["both-ways", "one-way"])
@pytest.mark.parametrize("tcp", [False, True] if CAMPAIGN else [False], ids=lambda tcp: "tcp" if tcp else "unix")
def test_a_cut_leaves_one_machine_that_runs(couple: Couple, both_ways: bool, tcp: bool) -> None:
    ends = section_ends(couple, "delta")
    assert len(ends) == 4  # check, virtio-net-delta, end, commit
    chosen = places(ends, each_byte=CAMPAIGN)
    if not CAMPAIGN:
        chosen = sorted({*chosen[both_ways::2], *chosen[-2:]})  # both ways of the last two, which decide
    for place in chosen:
        assert_cut(couple, "delta", Relay(place, both_ways, tcp), place, ends, both_ways)


@pytest.mark.timeout(3600 if CAMPAIGN else 300)
@pytest.mark.parametrize("both_ways", [True, False] if CAMPAIGN else [True])
def test_a_cut_in_the_full_state_does_too(couple: Couple, both_ways: bool) -> None:
    ends = section_ends(couple, "none")
    assert len(ends) == 4  # check, virtio-net, end, commit
    chosen = places(ends, False, 16, 101) if CAMPAIGN else places(ends, False)[::3] + ends[-2:]
    for place in chosen:
        assert_cut(couple, "none", Relay(place, both_ways), place, ends, both_ways)


def test_a_cut_while_the_guest_still_runs_costs_nothing(couple: Couple) -> None:
    """The first byte of the final phase is missing in every one of these: the source hears of it, and starts again."""
    for n, policy in enumerate(("none", "seed", "delta")):
        for both_ways in (True, False) if CAMPAIGN else (n % 2 == 0,):
            sent, received = migrate_through(couple, Relay(0, both_ways), policy)
            assert (sent.outcome, received.outcome) == ("source", "source")
            assert owners(couple) == ("vhost", "nobody")
            wait_for_frames(couple)
            assert_every_frame(couple)
