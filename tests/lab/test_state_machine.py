"""Two machines in one process, and a guest that moves between them while everything else happens, in any order.

A migration runs in two threads, joined by a socket; at each of its points the source waits until the destination has
loaded all that was sent, and what has to hold (I1 to I10) is looked at on both sides. Where it is told to, it waits there
for the test's own thread, which then changes, breaks or cancels something. A guest that has moved can move again.
"""

from __future__ import annotations

import gc
import logging
import os
import sys
from collections.abc import Iterator
from contextlib import suppress

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from tests.lab.stepwise import END, RANK, FaultyMachine, Migration, assert_exact, assert_nothing_wrong
from tests.support.by_hand import scaled, wait_for
from vnetdp.backends.faulty import Fault
from vnetdp.device.owners import Owner
from vnetdp.endpoints.base import Endpoint
from vnetdp.lab.changes import CHANGES, EVENTS
from vnetdp.lab.invariants import resources, violations
from vnetdp.migration.machine import MachineConfig, make_wire
from vnetdp.migration.snapshot import decode_early, delta_between, encode_early
from vnetdp.migration.source import Source
from vnetdp.migration.target import Target
from vnetdp.testing.strategies import faults
from vnetdp.warmup import warm_up
from vnetdp_kernels import rows as r

CAMPAIGN = os.environ.get("VNETDP_CAMPAIGN") == "1"
RATE = scaled(1000, 100)
CONTROL = ("mac", "mac_table", "vlans", "rx_mode", "queue_pairs", "mtu", "offloads", "rss", "announce")
NUMBERS = st.integers(0, 200)
PHASES = st.sampled_from(("", "early", "final", "retry"))
CANCEL = "cancel"
WHERE_TO = st.sampled_from((*Source.POINTS[1:], END, END, CANCEL))


@st.composite
def broken(draw: st.DrawFn) -> list[Fault]:
    """Nothing, faults, or one that strikes in the end and then strikes the retry, too."""
    kind = draw(st.integers(0, 3))
    if kind == 0:
        return []
    fault = draw(faults(phases=PHASES))
    if kind == 1:
        verb = draw(st.sampled_from(("set_backend", "set_vring_base")))
        fault = Fault(verb, fault.pair, draw(st.none() | st.integers(0, 1)), phase="final")
    if kind == 2:
        return [fault]
    return [fault, Fault(fault.verb, fault.pair, fault.index, phase="retry")]


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
        machine = self.machine
        n %= len(machine.device.queues)
        where = machine.device.queues[n].desc
        CHANGES[name](machine, n)
        assert (machine.device.queues[n].desc != where) is (name == "ring_setup")
        assert machine.device.queues[n].enabled

    @precondition(lambda self: self.flows)
    @rule()
    def reset_the_device(self) -> None:
        before = self.machine.device.driver_features
        CHANGES["features"](self.machine, 0)
        self.wake()
        assert self.machine.device.driver_features != before

    @precondition(lambda self: (self.off and self.runs) or self.flows)
    @rule()
    def reset_a_queue_or_set_it_up(self) -> None:
        EVENTS["queue_on" if self.off else "queue_off"](self.machine, 0)
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
        enough = wire.rows[:, (r.EP_TO_WIRE, r.EP_FROM_WIRE)] + frames
        wait_for(
            lambda: bool((wire.rows[:, (r.EP_TO_WIRE, r.EP_FROM_WIRE)] >= enough).all()),
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
    @rule(fault=faults(phases=PHASES))
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
            assert not target.device.vhost_prepared
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
    max_examples=600 if CAMPAIGN else scaled(12, 2),
    stateful_step_count=60 if CAMPAIGN else 25,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much, HealthCheck.data_too_large],
)
