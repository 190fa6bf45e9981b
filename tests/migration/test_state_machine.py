"""Two machines in one process, and a guest that moves between them while everything else happens, in any order.

A migration runs in two threads, joined by a socket; at each of its points the source waits until the destination has
loaded all that was sent, and what has to hold (I1 to I10) is looked at on both sides. Where it is told to, it waits there
for the test's own thread, which then changes, breaks or cancels something. A guest that has moved can move again.
"""

from __future__ import annotations

import gc
import logging
import os
import socket
import sys
import threading
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from tests.by_hand import PATIENCE, scaled, wait_for
from vnetdp import vhost_net
from vnetdp.backends.base import VERBS
from vnetdp.backends.faulty import Fault, Faults
from vnetdp.endpoints.base import Endpoint
from vnetdp.errors import BackendError
from vnetdp.memory import Words
from vnetdp.migration.changes import CHANGES, HALVES
from vnetdp.migration.channel import Channel
from vnetdp.migration.invariants import resources, violations
from vnetdp.migration.machine import Machine, MachineConfig, make_wire
from vnetdp.migration.snapshot import decode_early, delta_between, encode_early
from vnetdp.migration.source import Cancelled, Report, Source
from vnetdp.migration.stream import Section, SectionType
from vnetdp.migration.target import Target
from vnetdp.owners import Owner
from vnetdp.state import DeviceState
from vnetdp.warmup import warm_up
from vnetdp_kernels import layout as lay

CAMPAIGN = os.environ.get("VNETDP_CAMPAIGN") == "1"
RATE = scaled(1000, 100)
END = "end"
RANK = {point: n for n, point in enumerate((*Source.POINTS, END))}
CONTROL = ("mac", "mac_table", "vlans", "rx_mode", "queue_pairs", "mtu", "offloads", "rss", "announce")
TAKING = ("unbind", "get_vring_base")  # if both failed for ever, no ring could be taken from its owner
UNDOING = (*TAKING, "unset_guest_notifiers")  # a failure of these stops no start
VERBS_AND_POINTS = (*VERBS, "unbind", "grab_ioeventfd", "set_host_notifier", "set_guest_notifiers", UNDOING[2])
NUMBERS = st.integers(0, 200)
PHASES = st.sampled_from(("", "early", "final", "retry"))
CANCEL = "cancel"
WHERE_TO = st.sampled_from((*Source.POINTS[1:], END, END, CANCEL))


@st.composite
def faults(draw: st.DrawFn, phases: st.SearchStrategy[str] | None = None) -> Fault:
    """A verb that fails once or always, at one pair or ring, or at all of them."""
    verb = draw(st.sampled_from(VERBS_AND_POINTS))
    pair = draw(st.none() | st.integers(0, 2))
    ring = draw(st.none() | st.integers(0, 1)) if "vring" in verb or verb in ("set_backend", "unbind") else None
    phase = draw(phases) if phases is not None else ""
    return Fault(verb, pair, ring, draw(st.sampled_from((1, -1))), phase=phase)


@st.composite
def broken(draw: st.DrawFn) -> list[Fault]:
    """Nothing, faults, or one that strikes in the end and then strikes the retry, too."""
    kind = draw(st.integers(0, 3))
    if kind == 0:
        return []
    fault = draw(faults(PHASES))
    if kind == 1:
        verb = draw(st.sampled_from(("set_backend", "set_vring_base")))
        fault = Fault(verb, fault.pair, draw(st.none() | st.integers(0, 1)), phase="final")
    if kind == 2:
        return [fault]
    return [fault, Fault(fault.verb, fault.pair, fault.index, phase="retry")]


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
        columns = [lay.EP_SEQ, lay.EP_TO_WIRE, lay.EP_FROM_WIRE]
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


class MovingGuest(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.wire: Endpoint | None = None
        self.one: FaultyMachine | None = None
        self.other: FaultyMachine | None = None
        self.moving: Migration | None = None
        self.off = False  # the first transmitq is reset, and not yet set up again
        self.fell = False  # vhost was refused, and not tried again
        self.seen = 0  # strikes
        self.outside = sys.exc_info()[1]
        self.resources: dict[str, int] = {}

    @initialize(
        pairs=st.integers(1, 3), num=st.sampled_from((4, 16, 64)), first_idx=st.sampled_from((0, 3, 0xFFF0, 0xFFFF)),
        use_vhost=st.sampled_from((True, True, True, False)),
    )  # fmt: skip
    def boot(self, pairs: int, num: int, first_idx: int, use_vhost: bool) -> None:
        gc.collect()
        self.resources = resources()
        self.config = MachineConfig(pairs, num, rate=RATE, first_idx=first_idx, faulty=True)
        self.wire = make_wire(self.config)
        self.one = FaultyMachine(self.config, self.wire)
        self.one.device.set_use_vhost(use_vhost)
        self.one.boot()
        self.one.run()

    # --- where things stand ---

    @property
    def machine(self) -> FaultyMachine:
        assert self.one is not None
        return self.one

    @property
    def link_up(self) -> bool:
        return self.machine.device.control.link_up

    @property
    def runs(self) -> bool:
        """True if the guest runs."""
        return self.moving is None or self.moving.rank <= RANK["stopping"]

    @property
    def flows(self) -> bool:
        """True if it does, and frames go both ways on each queue."""
        return self.runs and self.link_up and not self.off

    @property
    def may_fail(self) -> bool:
        return self.moving is not None and self.moving.rank < RANK["committed"]

    # --- what guest and host change ---

    @precondition(lambda self: self.runs)
    @rule(name=st.sampled_from(CONTROL), n=NUMBERS)
    def change(self, name: str, n: int) -> None:
        before = self.machine.device.control
        CHANGES[name](self.machine, n)
        if name in ("rx_mode", "announce") and (name, n & 0x3F) != ("rx_mode", 0x3F):
            assert self.machine.device.control != before

    @precondition(lambda self: self.flows)
    @rule(name=st.sampled_from(("queue_reset", "ring_setup")), n=st.integers(0, 5))
    def set_a_queue_up_again(self, name: str, n: int) -> None:
        machine, driver = self.machine, self.machine.driver
        assert driver is not None
        n %= len(machine.device.queues)
        ends = [sum(driver.place_of(index)) for index in range(len(machine.device.queues))]
        room = machine.memory.regions[1].gpa - max(ends) - lay.PAGE_SIZE
        where = machine.device.queues[n].desc
        moves = name == "ring_setup" and room >= driver.place_of(n)[1] + lay.PAGE_SIZE
        CHANGES["ring_setup" if moves else "queue_reset"](machine, n)
        assert (machine.device.queues[n].desc != where) is moves
        assert machine.device.queues[n].enabled

    @precondition(lambda self: self.flows)
    @rule()
    def reset_the_device(self) -> None:
        before = self.machine.device.driver_features
        assert self.machine.driver is not None
        self.machine.driver._first_idx = 0  # where a device's indices begin after a reset
        CHANGES["features"](self.machine, 0)
        self.wake()
        assert self.machine.device.driver_features != before

    @precondition(lambda self: (self.off and self.runs) or self.flows)
    @rule()
    def reset_a_queue_or_set_it_up(self) -> None:
        HALVES["queue_on" if self.off else "queue_off"](self.machine, 0)
        self.off = not self.off
        self.wake()
        assert self.machine.device.queues[1].enabled is not self.off

    @precondition(lambda self: self.runs)
    @rule()
    def toggle_the_link(self) -> None:
        CHANGES["link"](self.machine, 0)
        self.tried()

    # --- owners ---

    def tried(self) -> None:
        """The machine's owner was chosen anew: vhost was refused if and only if something struck."""
        struck = len(self.machine.struck.struck)
        self.fell, self.seen = struck > self.seen, struck

    @precondition(lambda self: self.moving is None or self.moving.rank < RANK["committed"])
    @rule(use_vhost=st.booleans())
    def change_owner(self, use_vhost: bool) -> None:
        self.machine.device.set_use_vhost(use_vhost)
        self.tried()

    @precondition(lambda self: self.runs)
    @rule()
    def set_the_status_again(self) -> None:
        device = self.machine.device
        device.set_status(device.status)
        self.tried()

    @precondition(lambda self: self.moving is None)
    @rule()
    def stand_still(self) -> None:
        device = self.machine.device
        device.set_running(False)
        assert_exact(self.machine)
        assert violations(self.machine) == []
        device.set_running(True)
        self.tried()

    @precondition(lambda self: self.may_fail)
    @rule(use_vhost=st.booleans())
    def choose_the_owner_at_the_destination(self, use_vhost: bool) -> None:
        assert self.other is not None
        self.other.device.set_use_vhost(use_vhost)

    # --- traffic ---

    @precondition(lambda self: self.flows)
    @rule(frames=st.integers(1, 20))
    def traffic(self, frames: int) -> None:
        wire = self.machine.wire
        enough = wire.rows[:, (lay.EP_TO_WIRE, lay.EP_FROM_WIRE)] + frames
        wait_for(
            lambda: bool((wire.rows[:, (lay.EP_TO_WIRE, lay.EP_FROM_WIRE)] >= enough).all()),
            f"{frames} more frames both ways on each queue (I9)",
        )

    @precondition(lambda self: self.flows)
    @rule()
    def settle(self) -> None:
        self.let_all_arrive()
        self.machine.allow(True)
        self.wake()

    def let_all_arrive(self) -> None:
        """Every frame arrives, and nobody comes to wake a queue (I4, I9)."""
        assert self.machine.drain(), "I9"
        for ledger in self.machine.ledgers():
            assert ledger.clean, ledger

    def wake(self) -> None:
        """Have both ends learn that they may make frames again: they sleep, since nothing was due."""
        for event in (*self.machine.device.kicks, *self.machine.device.calls):
            event.signal()

    # --- faults ---

    @rule(fault=faults())
    def break_a_verb(self, fault: Fault) -> None:
        self.machine.struck.add(fault)

    @precondition(lambda self: self.may_fail)
    @rule(fault=faults(PHASES))
    def break_a_verb_at_the_destination(self, fault: Fault) -> None:
        assert self.other is not None
        self.other.struck.add(fault)

    def mend(self) -> None:
        for machine in (self.one, self.other):
            if machine is not None:
                machine.struck.clear()

    # --- migrations ---

    @rule()
    def save_early(self) -> None:
        """A state that is saved while the guest runs is whole."""
        state = self.machine.device.save_state()
        loaded = decode_early(memoryview(encode_early(state)))
        assert delta_between(state, loaded).empty
        assert (loaded.status, loaded.features, loaded.control) == (state.status, state.features, state.control)

    @precondition(lambda self: self.moving is None)
    @rule(
        policy=st.sampled_from(("delta", "delta", "delta", "none")), faults=broken(), to=st.sampled_from(Source.POINTS[:4]),
        cancel_at=st.sampled_from(("",) * 14 + Target.POINTS[:-1]), use_vhost=st.sampled_from((True, True, True, False)),
    )  # fmt: skip
    def begin(self, policy: str, faults: list[Fault], cancel_at: str, use_vhost: bool, to: str) -> None:
        assert self.wire is not None
        self.other = FaultyMachine(self.config, self.wire)
        self.other.device.set_use_vhost(use_vhost)
        for fault in faults:
            self.other.struck.add(fault)
        self.moving = Migration(self.machine, self.other, policy, cancel_at)
        self.go_on(to)

    @precondition(lambda self: self.moving is not None)
    @rule(to=WHERE_TO)
    def go_on(self, to: str) -> None:
        """To that point, if it is not there, or past it; or cancel it where it is, if it can be."""
        moving = self.moving
        assert moving is not None
        if to == CANCEL and self.may_fail:
            moving.cancel()
        elif RANK.get(to, 0) > moving.rank:
            moving.go_to(to)
        if moving.at == END:
            self.end()

    @precondition(lambda self: self.moving is None)
    @rule(faults=broken())
    def move(self, faults: list[Fault]) -> None:
        self.begin("delta", faults, "", True, END)

    @precondition(lambda self: self.one is not None and bool(self.machine.struck))
    @rule()
    def mend_and_try_again(self) -> None:
        self.mend()
        if self.runs:
            self.set_the_status_again()
            assert not self.fell

    def end(self) -> None:
        """The migration is over: one of the two machines runs, and it is the right one."""
        moving, self.moving = self.moving, None
        assert moving is not None
        moving.join()
        source, target, report = moving.source, moving.target, moving.report
        received = moving.destination.report
        unlogged = not moving.passed  # the log could not be started
        if unlogged:
            assert source.struck.struck
        if moving.cancelled or moving.target_cancelled or unlogged:
            assert (report.outcome, received.outcome) == ("source", "source"), report.error
            assert target.device.owner is Owner.NOBODY
            assert target.device.owners.prepared is None
            assert violations(target, final=False) == []
            self.tried()
            target.close()
        else:
            owner = moving.expected_owner()
            assert target.device.owner is owner, report.error
            outcome = "vhost" if owner is Owner.VHOST else "userspace"
            assert (report.outcome, received.outcome, report.error) == (outcome, outcome, "")
            assert_exact(source)
            self.one = target
            target.struck.phase = ""
            self.seen = len(target.struck.struck)
            self.fell = target.device.use_vhost and owner is not Owner.VHOST and self.link_up
            source.close()
        self.other = None
        assert report.violations + received.violations == []

    # --- what always holds ---

    @invariant()
    def nothing_is_violated(self) -> None:
        if self.one is None:
            return
        if self.moving is not None:
            self.moving.check()
        if self.moving is None or self.moving.rank < RANK["committed"]:
            assert_nothing_wrong(self.machine)
            self.look_at_the_owner()

    def look_at_the_owner(self) -> None:
        device = self.machine.device
        struck = len(self.machine.struck.struck)
        self.fell, self.seen = self.fell or struck > self.seen, struck
        if not self.runs or not self.link_up:
            assert_exact(self.machine)
        elif not device.use_vhost:
            assert device.owner is Owner.USERSPACE
        else:
            assert device.owner in ((Owner.VHOST, Owner.USERSPACE) if self.fell else (Owner.VHOST,))

    # --- the end ---

    def teardown(self) -> None:
        fine = self.one is not None and sys.exc_info()[1] is self.outside
        try:
            if fine:
                self.finish()
        finally:
            self.give_up()
        if fine:
            gc.collect()
            assert resources() == self.resources

    def finish(self) -> None:
        """Whatever was left open is closed, the guest moves once more, and all frames ever sent have arrived."""
        if self.moving is not None:
            self.go_on(END)
        self.mend()
        if self.off:
            self.reset_a_queue_or_set_it_up()
        if not self.link_up:
            self.toggle_the_link()
        self.begin("delta", [], "", True, END)
        self.nothing_is_violated()
        assert self.machine.device.owner is Owner.VHOST
        self.traffic(3)
        self.let_all_arrive()
        self.machine.stop()
        assert_exact(self.machine)

    def give_up(self) -> None:
        if self.moving is not None:
            with suppress(BaseException):
                self.moving.cancel()
        for machine in (self.one, self.other):
            if machine is not None:
                machine.close()
        if self.wire is not None:
            self.wire.close()
        self.one = self.other = self.moving = self.wire = None


@pytest.fixture(scope="module", autouse=True)
def warm_and_quiet() -> Iterator[None]:
    """A record of an error that was logged would keep the machine that it came from, and its mappings."""
    warm_up()
    logging.disable()
    yield
    logging.disable(logging.NOTSET)


TestMovingGuest = MovingGuest.TestCase
TestMovingGuest.settings = settings(
    max_examples=600 if CAMPAIGN else scaled(20, 2),
    stateful_step_count=60 if CAMPAIGN else 25,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much, HealthCheck.data_too_large],
)
