"""A migration that stops at each of its points until it is told to go on, and what has to hold there (I1 to I10)."""

import socket
import threading
from contextlib import suppress
from typing import Any

import pytest

from tests.support.by_hand import PATIENCE, wait_for
from vnetdp.backends.faulty import Fault, Faults
from vnetdp.device import vhost_net
from vnetdp.device.owners import Owner
from vnetdp.endpoints.base import Endpoint
from vnetdp.errors import BackendError
from vnetdp.lab.host import enter_phase
from vnetdp.lab.invariants import violations
from vnetdp.migration.channel import Channel
from vnetdp.migration.machine import Machine, MachineConfig
from vnetdp.migration.report import Report
from vnetdp.migration.source import Cancelled, Source
from vnetdp.migration.stream import Section, SectionType
from vnetdp.migration.target import Target
from vnetdp.shared.memory import Words
from vnetdp.virtio.state import DeviceState
from vnetdp_kernels import rows as r

END = "end"
RANK = {point: n for n, point in enumerate((*Source.POINTS, END))}
TAKING = ("unbind", "get_vring_base")  # if both failed for ever, no ring could be taken from its owner
UNDOING = (*TAKING, "unset_guest_notifiers")  # a failure of these stops no start


class Struck(Faults):
    """Faults that remember the phase and the verb of each that struck."""

    def __init__(self) -> None:
        super().__init__()
        self.struck: list[tuple[str, str]] = []

    def strike(self, verb: str, pair: int, index: int | None) -> None:
        try:
            super().strike(verb, pair, index)
        except BackendError:
            self.struck.append((self.phase, verb))
            raise

    def add(self, fault: Fault) -> None:
        if fault.verb in TAKING:
            self[:] = [other for other in self if other.verb not in TAKING]
        self.append(fault)


class FaultyMachine(Machine):
    """A machine that knows what struck it."""

    def __init__(self, config: MachineConfig, wire: Endpoint) -> None:
        self.struck = Struck()
        super().__init__(config, wire.block.fd, self.struck)


class Counting(Channel):
    """A channel that tells when its reader has taken all that was sent, and waits for more, or has failed."""

    def __init__(self, sock: socket.socket) -> None:
        super().__init__(sock)
        self.got = 0
        self.waits = False
        self.failed = False

    def receive(self, known: Any) -> Section:
        self.waits = True
        return super().receive(known)

    def read(self, length: int) -> memoryview:
        data = super().read(length)
        self.waits = False
        self.got += length
        return data

    def send(self, section: SectionType, payload: bytes = b"") -> int:
        self.waits = False
        return super().send(section, payload)

    def drain(self) -> None:
        self.failed = True
        super().drain()


def in_use(state: DeviceState) -> dict[int, Any]:
    return {n: queue for n, queue in enumerate(state.queues) if queue.enabled or queue.has_addresses}


def assert_exact(machine: Machine) -> None:
    """I3: while nobody owns the rings, each index is the one in memory, since chains are used in order."""
    assert machine.device.owner is Owner.NOBODY
    queues = {n: queue for n, queue in enumerate(machine.device.queues) if queue.enabled}
    indices = {n: queue.last_avail_idx for n, queue in queues.items()}
    assert indices == {n: vhost_net.used_idx(machine.memory, queue) for n, queue in queues.items()}, "I3"


def assert_nothing_wrong(machine: Machine) -> None:
    """What holds at every moment of a machine that is, or was, the one that runs."""
    assert violations(machine) == []
    assert machine.driver is not None
    machine.driver.check()  # I1: no used element that the driver did not wait for
    for ledger in machine.ledgers():
        assert (ledger.duplicated, ledger.reordered, ledger.corrupted) == (0, 0, 0), ledger  # I1, I10, I8


class Migration:
    """One migration under way. at: the point where the source waits to be told to go on, or END."""

    def __init__(self, source: FaultyMachine, target: FaultyMachine, policy: str, cancel_at: str) -> None:
        self.source, self.target, self.policy = source, target, policy
        self.at = ""
        self.passed = ""
        self.cancelled = False
        self.target_cancelled = False
        self.report = Report()
        self._cancel_at = cancel_at
        self._goal = RANK["logging"]
        self._errors: list[BaseException] = []
        self._turn = threading.Condition()
        self._stopped_at: Words | None = None
        self._near, self._far = socket.socketpair()
        self._channel, self._counting = Channel(self._near), Counting(self._far)
        self.destination = Target(target, self._counting, policy, self._at_target)
        self._origin = Source(source, self._channel, policy, self._at_source, check=True)
        self._threads = [threading.Thread(target=run, daemon=True) for run in (self._receive, self._send)]
        for thread in self._threads:
            thread.start()
        self._wait_for_turn()

    # --- in the threads of the two sides ---

    def _receive(self) -> None:
        try:
            self.destination.run()
            self._far.settimeout(None)
            while self._far.recv(1 << 16):  # a source that still sends reads the answer when it is done
                pass
        except OSError:
            pass
        except BaseException as e:  # noqa: BLE001 - told by the test's own thread
            self._errors.append(e)
        finally:
            self._counting.failed = True

    def _send(self) -> None:
        try:
            self.report = self._origin.run()
        except BaseException as e:  # noqa: BLE001 - as above
            self._errors.append(e)
        with suppress(OSError):
            self._near.shutdown(socket.SHUT_WR)
        self._threads[0].join(PATIENCE)
        self._near.close()
        self._far.close()
        with self._turn:
            self.at = END
            self._turn.notify_all()

    def _at_target(self, point: str) -> None:
        enter_phase(self.target.struck, point, self.policy)
        if point == self._cancel_at:
            self.target_cancelled = True
            raise Cancelled(f"cancelled at {point}")

    def _at_source(self, point: str) -> None:
        wait_for(lambda: self._quiet(point), f"the destination is done with what was sent by {point}")
        self.passed = point
        self._check(point)
        with self._turn:
            if RANK[point] >= self._goal:
                self.at = point
                self._turn.notify_all()
                assert self._turn.wait_for(lambda: not self.at, PATIENCE)
        if self.cancelled:
            raise Cancelled(f"cancelled at {point}")

    def _quiet(self, point: str) -> bool:
        far = self._counting
        if point == "committed":
            return far.failed or (self.destination.report.outcome != "source" and self._channel.has_more())
        return far.failed or (far.waits and far.got == self._channel.sent)

    # --- what holds at each point ---

    @property
    def failed(self) -> bool:
        """True if the destination has given up."""
        return self.target_cancelled

    def check(self) -> None:
        """Look at both sides while the source waits."""
        self._check(self.at)

    def _check(self, point: str) -> None:
        source, target, rank = self.source, self.target, RANK[point]
        assert_nothing_wrong(source if rank < RANK["committed"] else target)
        assert violations(source) == []
        assert violations(target, final=rank >= RANK["saved"] and not self.failed) == []
        polled = set(source.wire.polled_by), set(target.wire.polled_by)
        assert not polled[0] & polled[1], "I6"
        if rank >= RANK["stopped"]:
            assert_exact(source)
            assert not polled[0], "I6"
        if rank < RANK["committed"]:
            self._check_nothing_to_be_seen(point)
        if RANK["saved"] <= rank < RANK["committed"] and not self.failed:
            ours, theirs = source.device.save_state(), target.device.save_state()
            assert (ours.status, ours.features, ours.control) == (theirs.status, theirs.features, theirs.control)
            assert in_use(ours) == in_use(theirs)
            assert_exact(target)
            assert source.memory_sums() == target.memory_sums(), "I8"

    def _check_nothing_to_be_seen(self, point: str) -> None:
        """Before the commit the destination does nothing (I5), and from the stop on nobody does."""
        target = self.target
        assert target.device.owner is Owner.NOBODY, "I5"
        assert not target.wire.polled_by, "I6"
        assert target.announcer is None
        if target.driver is not None:
            with pytest.raises(Exception, match="no thread"):
                _ = target.driver.native_id
        if RANK[point] < RANK["stopped"]:
            return
        columns = [r.EP_SEQ, r.EP_TO_WIRE, r.EP_FROM_WIRE]
        now = self.source.wire.rows[:, columns].copy()
        if self._stopped_at is None:
            self._stopped_at = now
        assert (now == self._stopped_at).all(), "a frame moved while nobody had the rings"

    # --- in the test's own thread ---

    @property
    def rank(self) -> int:
        return RANK[self.at]

    def go_to(self, point: str) -> None:
        """Go on to the first point that is not before *point*."""
        with self._turn:
            self._goal = RANK[point]
            self.at = ""
            self._turn.notify_all()
        self._wait_for_turn()

    def cancel(self) -> None:
        """Cancel it where the source waits."""
        self.cancelled = True
        self.go_to(END)

    def join(self) -> None:
        """Wait until both sides have ended, once it is over."""
        for thread in self._threads:
            thread.join(PATIENCE)
            assert not thread.is_alive()

    def _wait_for_turn(self) -> None:
        with self._turn:
            assert self._turn.wait_for(lambda: bool(self.at), 2 * PATIENCE)
        if self._errors:
            if self.at != END:
                self.at = ""
            raise self._errors[0]

    def expected_owner(self) -> Owner:
        """Return who has the rings at the destination if the machine has moved."""
        device = self.target.device
        if not device.control.link_up:
            return Owner.NOBODY
        last = ("retry",) if self.policy == "delta" else ("retry", "final")
        struck = any(phase in last and verb not in UNDOING for phase, verb in self.target.struck.struck)
        return Owner.USERSPACE if struck or not device.use_vhost else Owner.VHOST
