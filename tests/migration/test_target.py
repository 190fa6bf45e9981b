"""A destination that fails before the commit undoes all and says so; after it, it says who serves the machine."""

from __future__ import annotations

import pytest

from tests.migration.rig import assert_runs, failing, move
from vnetdp.migration.channel import POLICIES
from vnetdp.migration.invariants import violations
from vnetdp.migration.machine import Machine
from vnetdp.migration.target import Target
from vnetdp.owners import Owner

Machines = tuple[Machine, Machine]
BEFORE_THE_COMMIT = [
    (policy, point)
    for policy in POLICIES
    for point in Target.POINTS
    if point != "bound" and (policy != "none" or point not in ("early", "prepared"))
]


def assert_untouched(machine: Machine) -> None:
    notifiers = machine.notifiers
    assert machine.device.owner is Owner.NOBODY
    assert machine.device.owners.prepared is None
    assert (notifiers.grabs, notifiers.host, notifiers.guest) == (0, 0, 0)
    assert violations(machine, final=False) == []


@pytest.mark.parametrize(("policy", "point"), BEFORE_THE_COMMIT)
def test_an_error_of_any_kind_is_undone_and_told(machines: Machines, policy: str, point: str) -> None:
    one, other = machines
    sent, received = move(one, other, at_target=failing(point, ZeroDivisionError("by zero")), policy=policy)
    assert (received.outcome, received.error) == ("source", "ZeroDivisionError: by zero")
    assert sent.outcome == "source"
    assert "ZeroDivisionError: by zero" in sent.error
    assert_untouched(other)
    if policy != "seed":  # which sends what is pending before the commit
        assert_runs(one)


def test_a_link_that_goes_down_when_all_is_loaded(machines: Machines) -> None:
    """Nobody gets the rings, and vhost has nothing of them: it gets them when the link is up."""
    one, other = machines

    def at(point: str) -> None:
        if point == "ready":
            other.device.set_link(False)

    sent, received = move(one, other, at_target=at)
    assert (sent.outcome, received.outcome, received.violations) == ("userspace", "userspace", [])
    assert_untouched(other)
    other.device.set_link(True)
    assert_runs(other)
