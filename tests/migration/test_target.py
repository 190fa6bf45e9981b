"""A destination that fails before the commit undoes all and says so; after it, it says who serves the machine."""

from __future__ import annotations

import struct

import pytest

from tests.migration.rig import SMALL, Tape, assert_runs, failing, move, record, section_bytes
from vnetdp.device.owners import Owner
from vnetdp.lab.invariants import violations
from vnetdp.migration.channel import COMMIT, EARLY, FAILED, POLICIES
from vnetdp.migration.machine import Machine
from vnetdp.migration.source import MAX_EARLY
from vnetdp.migration.target import Target
from vnetdp.virtio.queue import ring_len
from vnetdp_kernels import rows as r

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
    assert not machine.device.vhost_prepared
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


def fed(machine: Machine, parts: list[tuple[bytes, int, int, bytes]]) -> tuple[Target, Tape]:
    """Have *machine* take sections, and a commit behind them."""
    parts = [*parts, (COMMIT.name.encode(), COMMIT.phase, COMMIT.version, b"")]
    tape = Tape(b"".join(section_bytes(*part) for part in parts))
    target = Target(machine, tape, "delta")
    target.run()
    return target, tape


def recorded(machine: Machine) -> list[tuple[bytes, int, int, bytes]]:
    parts = [(kind.name.encode(), int(kind.phase), kind.version, p) for kind, p in record(machine, "delta")]
    machine.stop()
    return parts


@pytest.mark.parametrize("part", range(3), ids=["desc", "avail", "used"])
@pytest.mark.parametrize("inside", [0, 1], ids=["outside", "across the end"])
def test_a_ring_that_is_not_wholly_in_guest_memory(machines: Machines, part: int, inside: int) -> None:
    """Each of its parts, to its last byte."""
    one, other = machines
    parts = recorded(one)
    queue = one.device.queues[1]
    was = struct.pack("<q", (queue.desc, queue.avail, queue.used)[part])
    at = (other.memory.end - inside * ring_len(queue.num)[part] // 2) & ~15
    wrong = [(*p[:3], p[3].replace(was, struct.pack("<q", at)) if p[0] == EARLY.name.encode() else p[3]) for p in parts]
    assert wrong != parts
    target, tape = fed(other, wrong)
    assert target.report.error == "queue 1: a ring lies outside guest memory"
    assert tape.sections == [(FAILED, target.report.error.encode())]
    assert_untouched(other)


def test_a_driver_that_cannot_be(machines: Machines) -> None:
    """What the guest knows comes with its memory, and is checked before anybody commits to it."""
    one, other = machines

    def at(point: str) -> None:
        if point == "stopped" and one.driver is not None:
            one.driver.dvqs[1, r.DVQ_KICKED_IDX] = 1 << 16

    sent, received = move(one, other, at)
    assert received.error == "queue 1: the driver's state of its descriptors contradicts the ring"
    assert (sent.outcome, sent.error) == ("source", f"the destination failed: {received.error}")
    assert_untouched(other)


def test_early_states_without_end(machines: Machines) -> None:
    one, other = machines
    parts = recorded(one)
    early = next(part for part in parts if part[0] == EARLY.name.encode())
    target, _ = fed(other, [parts[0], *[early] * 10_000])
    assert target.report.error == f"the early state comes more than {MAX_EARLY} times"
    assert len(target.report.spans.spans) <= 2 * MAX_EARLY
    assert_untouched(other)


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


def test_a_device_that_nobody_can_serve_is_reported(machines: Machines) -> None:
    one, other = machines

    def at(point: str) -> None:
        if point == "stopped":
            queue = one.device.queues[1]
            one.memory.write(queue.avail + 2, struct.pack("<H", queue.last_avail_idx + 2 * SMALL.num & 0xFFFF))

    sent, received = move(one, other, at)
    assert sent.outcome == received.outcome == "userspace"
    assert received.violations == sent.target["violations"] == ["I4: nobody serves the rings, the device needs a reset"]
    assert_untouched(other)
