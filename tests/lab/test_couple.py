"""Two processes, and a machine that moves between them under traffic: no frame is lost, and no side keeps anything.

A slice by default. With VNETDP_CAMPAIGN=1 (`make campaign`) up to 128 queue pairs, 1,000 migrations in a row, each point
at which a side can be killed, and each pair of changes.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator

import numpy as np
import pytest

from tests.support.by_hand import no_descriptor_leaks, wait_for
from vnetdp.errors import VnetdpError
from vnetdp.lab.changes import CHANGES
from vnetdp.lab.couple import Couple, Result, Sampler, _answer, _errors, blackout_us
from vnetdp.lab.host import HostProcess, Orders
from vnetdp.lab.invariants import differences
from vnetdp.migration.machine import MachineConfig
from vnetdp.migration.source import Source
from vnetdp.migration.target import Target
from vnetdp.shared.memory import Words
from vnetdp_kernels import rows as r

CAMPAIGN = os.environ.get("VNETDP_CAMPAIGN") == "1"
QUEUE_PAIRS = (1, 4, 16, 64, 128) if CAMPAIGN else (1, 4)
BACK_AND_FORTH = 100 if CAMPAIGN else 4
IN_A_ROW = 1000 if CAMPAIGN else 12
POLICIES = ("none", "seed", "delta")
NUM = 64
BOTH_WAYS = (r.EP_TO_WIRE, r.EP_FROM_WIRE)

# Over TCP one position a policy and number of pairs in the slice, another each time.
MOVES = [
    (policy, pairs, first_idx, tcp)
    for n, (policy, pairs) in enumerate(itertools.product(POLICIES, QUEUE_PAIRS))
    for k, first_idx in enumerate((0, NUM - 1, 0xFFF0))
    for tcp in (False, True)
    if CAMPAIGN or tcp == (n % 3 == k)
]

RINGS = ("queue_reset", "ring_setup", "features")
CONTROL = tuple(name for name in CHANGES if name not in (*RINGS, "link"))

# In the slice each change at one point, the next at another; those of rings at each.
POINTS = ("early", "round", "stopping")
CHANGED = [
    (name, point)
    for n, name in enumerate((*RINGS, *CONTROL))
    for k, point in enumerate(POINTS)
    if CAMPAIGN or name in RINGS or n % 3 == k
]

# What a migration has to end with if a side is killed, or the migration is cancelled there: before the commit nothing but
# the source may run, after it nothing but the destination. A destination that dies at `ready` is gone before the
# source can know, or just after.
EARLY_ONLY = ("early", "prepared")  # points that policy none does not come to
SOURCE_DIES = {point: ("vhost",) if point == "committed" else ("lost",) for point in Source.POINTS}
TARGET_DIES = {
    point: {"ready": ("source", "lost"), "bound": ("lost",)}.get(point, ("source",)) for point in Target.POINTS
}
DEATHS = [
    (side, point, policy)
    for policy in ("delta", "none")
    for side, points in (("source", SOURCE_DIES), ("target", TARGET_DIES))
    for point in points
    if policy == "delta" or point not in EARLY_ONLY
]
if not CAMPAIGN:
    SOME = {("source", "round"), ("source", "committed"), ("target", "loaded"), ("target", "ready")}
    DEATHS = [death for death in DEATHS if death[:2] in SOME and death[2] == "delta"]

CANCELS = [("source", point, "delta") for point in Source.POINTS if point != "committed"]
CANCELS += [("target", point, "delta") for point in Target.POINTS if point != "bound"]
if CAMPAIGN:
    CANCELS += [(side, point, "none") for side, point, _ in CANCELS if point not in EARLY_ONLY]

PAIRS_OF_CHANGES = list(itertools.combinations((*CONTROL, *RINGS), 2))
if not CAMPAIGN:
    PAIRS_OF_CHANGES = list(itertools.pairwise((*CONTROL, *RINGS, CONTROL[0])))


@pytest.fixture(scope="module")
def two_hosts() -> Iterator[Couple]:
    with Couple(quiet=True) as couple:
        yield couple


@pytest.fixture
def couple(two_hosts: Couple) -> Iterator[Couple]:
    """Two hosts without a machine; when the test is done, nobody holds more than before."""
    with no_descriptor_leaks():
        yield two_hosts
        assert two_hosts.drop() == {}


def config_of(queue_pairs: int = 2, first_idx: int = 0) -> MachineConfig:
    return MachineConfig(queue_pairs, NUM, rate=min(2000.0, 64_000 / queue_pairs), first_idx=first_idx, faulty=True)


def wait_for_frames(couple: Couple, frames: int = 3) -> None:
    """Wait until so many more have gone each way, on each queue that is in use."""
    assert couple.wire is not None
    rows = couple.wire.rows[: couple.source.call("look")["control"].curr_queue_pairs]
    enough = rows[:, BOTH_WAYS] + frames
    wait_for(lambda: bool((rows[:, BOTH_WAYS] >= enough).all()), f"{frames} more frames both ways on each queue")


def assert_well(couple: Couple, result: Result) -> None:
    """Frames go both ways, and all that were ever sent have arrived, once and in order; nothing is violated."""
    wait_for_frames(couple)
    couple.settle(result)
    assert result.violations == []
    assert result.ledger.clean, result.ledger
    assert result.ledger.sent > 0


def assert_moved(result: Result, outcome: str = "vhost") -> None:
    assert (result.outcome, result.error) == (outcome, "")


def migrate_with(couple: Couple, policy: str, side: str, orders: Orders) -> Result:
    """Migrate, with orders for one of the two sides."""
    if side == "source":
        return couple.migrate(policy, source=orders)
    return couple.migrate(policy, target=orders)


# --- where it works ---


@pytest.mark.parametrize(("policy", "queue_pairs", "first_idx", "tcp"), MOVES)
def test_a_machine_moves_with_every_frame(
    couple: Couple, policy: str, queue_pairs: int, first_idx: int, tcp: bool
) -> None:
    couple.start(config_of(queue_pairs, first_idx))
    wait_for_frames(couple)
    result = couple.migrate(policy, tcp=tcp)
    assert_moved(result)
    wait_for_frames(couple, 2 * NUM if queue_pairs == 1 else 3)
    assert_well(couple, result)


@pytest.mark.parametrize("policy", POLICIES)
def test_back_and_forth(couple: Couple, policy: str) -> None:
    couple.start(config_of(first_idx=0xFFF0))
    for n in range(BACK_AND_FORTH):
        here, there = couple.source, couple.target
        result = couple.migrate(policy, tcp=n % 2 == 1)
        assert_moved(result)
        assert result.violations == []
        assert (couple.source, couple.target) == (there, here)
    assert_well(couple, result)


@pytest.mark.timeout(3600 if CAMPAIGN else 300)
def test_one_machine_moves_again_and_again(couple: Couple) -> None:
    """Policies take turns; all of guest memory is compared in every fifth migration, which is not a multiple of theirs."""
    couple.start(config_of(first_idx=0xFFF0))
    for n in range(IN_A_ROW):
        result = couple.migrate(POLICIES[n % 3], source=Orders(check=n % 5 == 0))
        assert_moved(result)
        assert result.violations == []
    assert_well(couple, result)
    assert result.ledger.sent > IN_A_ROW


def test_the_first_frames_are_seen_though_the_sampler_gets_no_core(
    couple: Couple, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Sampler, "_sample", lambda _sampler: None)
    couple.start(config_of())
    wait_for_frames(couple)
    result = couple.migrate("delta")
    assert result.spans_us.keys() >= {"first_tx", "first_rx"}
    assert_well(couple, result)


def test_the_longest_time_without_a_frame_goes_on_to_the_end() -> None:
    us = 1000

    def samples(*moved: int) -> Words:
        """Return a sample each µs up to the tenth; frames moved in those named."""
        return np.array([(n * us, sum(m <= n for m in moved), 0) for n in range(11)], np.int64)

    assert blackout_us(samples(1, 2, 5, 9), 3 * us) == 4
    assert blackout_us(samples(1, 2, 4), 3 * us) == 6  # and then nothing more
    assert blackout_us(samples(1, 2), 3 * us) is None
    assert blackout_us(samples(), 0) is None
    assert blackout_us(samples()[:0], 0) is None


# --- where a side dies ---


@pytest.mark.parametrize(("side", "point", "policy"), DEATHS)
def test_a_side_that_is_killed_leaves_one_machine_or_none(side: str, point: str, policy: str) -> None:
    """If the machine runs, it runs well, and moves to the next host; if it does not, nobody serves its rings."""
    expected = (SOURCE_DIES if side == "source" else TARGET_DIES)[point]
    with no_descriptor_leaks(), Couple(quiet=True) as couple:
        couple.start(config_of(queue_pairs=1))
        dead, alive = (couple.source, couple.target) if side == "source" else (couple.target, couple.source)
        result = migrate_with(couple, policy, side, Orders(die_at=point))
        assert result.outcome in expected
        assert (dead.alive, alive.alive) == (False, True)
        assert result.violations == []
        if result.outcome == "lost":
            assert alive.call("look")["owner"] == "nobody"
        else:
            assert couple.source is alive
            move_on(couple)
        assert alive.call("drop") == {}


def move_on(couple: Couple) -> None:
    """Put a new host in the dead one's place, and migrate there."""
    wait_for_frames(couple)
    couple.target.close()
    with HostProcess(quiet=True) as other:
        other.call("warm_up")
        here, couple.target = couple.source, other
        result = couple.migrate("delta")
        assert_moved(result)
        assert couple.source is other
        assert_well(couple, result)
        assert other.call("drop") == {}
        couple.source, couple.target = here, other


def test_a_host_that_is_gone_says_so() -> None:
    with no_descriptor_leaks(), Couple(quiet=True) as couple:
        couple.start(config_of(queue_pairs=1))
        couple.migrate(target=Orders(die_at="setup"))
        with pytest.raises(VnetdpError, match=f"the host of process {couple.target.pid} was killed by SIGKILL"):
            couple.migrate()


# --- where something else fails once the machine has arrived ---


def test_a_machine_that_arrived_is_not_lost_though_something_fails_there_afterwards(couple: Couple) -> None:
    couple.start(config_of())
    here, there = couple.source, couple.target
    result = couple.migrate(target=Orders(changes=(("no change", "bound"),)))
    assert (result.outcome, result.error) == ("vhost", "KeyError: 'no change'")
    assert (couple.source, couple.target) == (there, here)
    assert_well(couple, result)


def test_a_host_that_raises_in_place_of_its_report_has_the_machine_if_it_runs(couple: Couple) -> None:
    couple.start(config_of())
    here, there = couple.source, couple.target

    def report(host: HostProcess, receives: bool) -> str:
        raised = _answer(host, host.begin("no such thing"), there, receives)
        assert "no such thing" in raised.error
        return raised.outcome

    assert report(here, False) == "source"
    assert report(here, True) == "vhost"
    assert report(there, False) == report(there, True) == "lost"


def test_the_errors_of_both_sides_are_shown_unless_one_only_heard_of_the_other() -> None:
    assert _errors("", "") == ""
    assert _errors("its own", "") == _errors("", "its own") == "its own"
    assert _errors("the destination failed: its own", "its own") == "the destination failed: its own"
    assert _errors("it is gone", "no memory") == "it is gone; the destination: no memory"


# --- where it is cancelled ---


@pytest.mark.parametrize(("side", "point", "policy"), CANCELS)
def test_a_cancelled_migration_can_be_made_again(couple: Couple, side: str, point: str, policy: str) -> None:
    couple.start(config_of())
    for _ in range(2 if CAMPAIGN or point == "round" else 1):
        result = migrate_with(couple, policy, side, Orders(cancel_at=point))
        assert result.outcome == "source"
        assert f"cancelled at {point}" in result.error
        assert result.violations == []
        wait_for_frames(couple)
    result = couple.migrate(policy)
    assert_moved(result)
    assert_well(couple, result)


# --- where the guest changes something ---


def assert_carried_over(couple: Couple) -> None:
    """The destination has what the source had when it stopped, and still has."""
    here, there = couple.source.call("look"), couple.target.call("look")
    assert here["control"] == there["control"]
    assert here["features"] == there["features"]


@pytest.mark.parametrize(("name", "point"), CHANGED)
def test_a_change_arrives(couple: Couple, name: str, point: str) -> None:
    couple.start(config_of(queue_pairs=3))
    before = couple.source.call("look")
    result = couple.migrate(source=Orders(changes=((name, point),)))
    assert_moved(result)
    assert_carried_over(couple)
    after = couple.source.call("look")
    if name in CONTROL:
        assert after["control"] != before["control"]
    assert (after["features"] != before["features"]) is (name == "features")
    assert_well(couple, result)


def test_state_that_does_not_arrive_is_a_violation(couple: Couple) -> None:
    """Here it has arrived, and the destination has changed it since."""
    couple.start(config_of())
    result = couple.migrate(target=Orders(changes=(("mac", "bound"),)))
    assert result.violations == ["state: mac differs"]


@pytest.mark.parametrize("point", POINTS)
def test_a_link_that_goes_down_leaves_the_rings_to_nobody(couple: Couple, point: str) -> None:
    couple.start(config_of(queue_pairs=3))
    result = couple.migrate(source=Orders(changes=(("link", point),)))
    assert_moved(result, "userspace")
    assert couple.source.call("look")["owner"] == "nobody"
    couple.source.call("change", "link")
    assert couple.source.call("look")["owner"] == "vhost"
    assert_well(couple, result)


@pytest.mark.parametrize(("one", "other"), PAIRS_OF_CHANGES)
def test_two_changes_arrive(couple: Couple, one: str, other: str) -> None:
    couple.start(config_of(queue_pairs=3))
    for first, second in ((one, other), (other, one)):
        result = couple.migrate(source=Orders(changes=((first, "round"), (second, "stopping"))))
        assert_moved(result)
        assert_carried_over(couple)
        assert result.violations == []
    assert_well(couple, result)


@pytest.mark.parametrize("name", CHANGES)
def test_what_is_changed_and_changed_back_is_as_it_was(couple: Couple, name: str) -> None:
    couple.start(config_of(queue_pairs=3))
    before = couple.source.call("state")
    result = couple.migrate(source=Orders(changes=((name, "early"),), back_at="stopping"))
    assert_moved(result)
    assert_carried_over(couple)
    assert differences(before, couple.source.call("state")) == []
    if name != "queue_reset":  # of which a snapshot shows nothing: the queue is enabled again where it was
        assert result.counts["early"] > 1  # what it was in between was sent
    assert_well(couple, result)


def test_a_change_that_is_ordered_twice_is_made_twice(couple: Couple) -> None:
    couple.start(config_of())
    before = couple.source.call("look")["control"]
    result = couple.migrate(source=Orders(changes=(("announce", "stopping"),) * 2))
    assert_moved(result)
    assert couple.source.call("look")["control"] == before


@pytest.mark.parametrize("name", CONTROL)
def test_what_changes_a_thousand_times_a_second_arrives_as_it_was_last(couple: Couple, name: str) -> None:
    couple.start(config_of(queue_pairs=3))
    for _ in range(10 if CAMPAIGN else 1):
        result = couple.migrate(source=Orders(churn=name))
        assert_moved(result)
        assert_carried_over(couple)
        assert result.violations == []
    assert_well(couple, result)
