"""The fault matrix ends as it has to, shows what the patch gets wrong, and would show more: what checks it can fail.

Every 40th case with one queue pair by default; all, with one pair and four, idle and under traffic, with
VNETDP_CAMPAIGN=1 (`make campaign`).
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from scapy.utils import rdpcap

from tests.migration.rig import migrate
from tests.support.by_hand import wait_for
from vnetdp.endpoints.announce import ROUNDS_S, rarp
from vnetdp.lab.host import Host, Orders
from vnetdp.lab.matrix import DEFECTS, RATE, Case, Matrix, can_run, cases, chosen
from vnetdp.lab.taps import why_no_taps
from vnetdp.migration.machine import Machine, MachineConfig, make_wire
from vnetdp.shared.notify import EventFd

CAMPAIGN = os.environ.get("VNETDP_CAMPAIGN") == "1"
EVERY = 40
QUIET = MachineConfig(queue_pairs=2, num=16, traffic="idle", faulty=True)
TRIES = 3  # a defect that needs packets at the right moment


def config_of(pairs: int, traffic: str = "both") -> MachineConfig:
    return MachineConfig(queue_pairs=pairs, traffic=traffic, rate=RATE, faulty=True)


def a_slice() -> Iterator[tuple[int, str, Case]]:
    """Return the cases to run: pairs, traffic, case."""
    for pairs, traffic in itertools.product((1, 4), ("idle", "both")) if CAMPAIGN else [(1, "both")]:
        for case in list(cases(pairs))[:: 1 if CAMPAIGN else EVERY]:
            if can_run(case):
                yield pairs, traffic, case


def case_of(case_id: str, pairs: int = 4) -> Case:
    return next(case for case in cases(pairs) if case.id == case_id)


@pytest.fixture(scope="module")
def delta() -> Iterator[Matrix]:
    matrix = Matrix("delta")
    yield matrix
    matrix.close()


@pytest.fixture(scope="module")
def seed() -> Iterator[Matrix]:
    matrix = Matrix("seed")
    yield matrix
    matrix.close()


# --- it ends as it has to ---


@pytest.mark.parametrize(
    ("pairs", "traffic", "case"), [pytest.param(*each, id=f"{each[2].id}-{each[0]}-{each[1]}") for each in a_slice()]
)
def test_a_case_ends_as_it_has_to(delta: Matrix, pairs: int, traffic: str, case: Case) -> None:
    row = delta.run(case, config_of(pairs, traffic))
    assert row.ok, row.as_dict()


def test_every_case_has_an_id_of_its_own() -> None:
    for pairs in (1, 2, 4):
        ids = [case.id for case in cases(pairs)]
        assert len(set(ids)) == len(ids)


def test_a_change_that_is_not_made_back_is_found(delta: Matrix) -> None:
    case = case_of("A6/mac/back")
    row = delta.run(replace(case, source=replace(case.source, back_at="")), config_of(1))
    assert row.violations == ["A6: changed back, and not as before: state: mac differs"]


def test_a_fault_that_does_not_strike_is_found(delta: Matrix) -> None:
    row = delta.run(Case("X", "nobody asks for an index", target=Orders(faults=("get_vring_base",))), config_of(1))
    assert (row.hits, row.violations, row.ok) == (0, ["faults: none of them struck"], False)


def test_a_fault_that_strikes_where_it_should_not_is_found(delta: Matrix) -> None:
    row = delta.run(replace(case_of("D2/0,0/once"), strikes=("seed",)), config_of(1))
    assert (row.hits, row.violations, row.ok) == (1, ["faults: they strike, and should not"], False)


def test_a_state_that_is_damaged_fails_in_its_load(delta: Matrix, seed: Matrix) -> None:
    for matrix, error in ((delta, "the delta"), (seed, "the device's state")):
        row = matrix.run(case_of("C3"), config_of(1))
        assert row.ok
        assert f"the destination failed: {error}" in row.error
    row = delta.run(case_of("B14/version"), config_of(1))
    assert "version 2" in row.error


def test_a_guest_is_announced_where_it_comes_in(tmp_path: Path) -> None:
    here, there = (replace(QUIET, endpoint=f"pcap:,{tmp_path / side}") for side in ("source", "target"))
    with make_wire(here) as wire, Machine(here, wire.block.fd) as source, Machine(there, wire.block.fd) as target:
        source.boot()
        source.run()
        source.device.set_control(mac=b"\x02\0\0\0\0\x07")
        report, _ = migrate(source, target, "delta")
        assert report.outcome == "vhost"
        announcer = target.announcer
        assert announcer is not None
        wait_for(lambda: announcer.sent == len(ROUNDS_S), "the guest is announced")
    assert [bytes(frame) for frame in rdpcap(str(tmp_path / "target"))] == [rarp(b"\x02\0\0\0\0\x07")] * len(ROUNDS_S)
    assert len(rdpcap(str(tmp_path / "source"))) == 0


def test_a_false_delta_is_counted(delta: Matrix) -> None:
    assert delta.run(case_of("A7"), config_of(1)).false_deltas == 5


@pytest.mark.skipif(why_no_taps() is not None, reason=str(why_no_taps()))
@pytest.mark.parametrize("case_id", ["T/vhost", "T/userspace", "T/source"])
def test_taps_are_given_back_and_the_guest_is_announced(delta: Matrix, case_id: str) -> None:
    row = delta.run(case_of(case_id), config_of(4))
    assert row.ok, row.as_dict()


def test_cases_with_taps_are_for_root_where_there_is_ip(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert why_no_taps()
    assert not [case for _, case in chosen((1,), ("idle",), "T")]


def test_vhost_in_another_process_starts_nothing_early(delta: Matrix) -> None:
    row = delta.run(case_of("E7"), config_of(1))
    assert row.ok, row.as_dict()


def test_what_is_started_early_is_found(seed: Matrix) -> None:
    """The patch binds in the load of its last section: looked at then, it has what is not its own yet."""
    case = replace(case_of("E7"), target=Orders(look_at=("prepared", "loaded")), process=False)
    row = seed.run(case, config_of(1))
    assert "target: at loaded: I5: vhost has the rings, which nobody gave up" in row.violations
    assert not any("at prepared" in text for text in row.violations)


@pytest.mark.parametrize(
    "case_id", [f"I9/{what}/{owner}" for what in ("kick", "call") for owner in ("vhost", "userspace")]
)
def test_no_kick_and_no_call_is_lost(delta: Matrix, case_id: str) -> None:
    row = delta.run(case_of(case_id), config_of(4, "idle"))
    assert row.ok, row.as_dict()


# --- what the patch gets wrong ---

# Row, traffic, and what it predicts: a violation for each, or the frames that were lost or came twice; "a|b": either, as an
# early index is behind by less than the queue's size, or by more.
PREDICTED = {
    "D1": ("D1/2,1/once", "both", ["duplicated|avail.idx moved by more than the queue's size"]),
    "D2": ("D2/2,0/always", "idle", ["I4: queue 6 is enabled, and userspace"]),
    "D6": ("D6", "idle", [f"I4: queue {n} is enabled, and userspace" for n in (1, 3, 5, 7)]),
    "E4": ("E4", "idle", [f"I4: queue {n} is enabled, and vhost" for n in range(8)]),
    "E9": ("E9", "idle", ["I1: 12 frames to the wire duplicated"]),
}


@pytest.mark.parametrize("name", PREDICTED)
def test_seed_shows_the_defect_and_delta_does_not(seed: Matrix, delta: Matrix, name: str) -> None:
    assert name in DEFECTS
    case_id, traffic, predicted = PREDICTED[name]
    case, config = case_of(case_id), config_of(4, traffic)
    for _ in range(TRIES):
        row = seed.run(case, config)
        if not row.ok:
            break
    assert not row.ok
    for text in predicted:
        assert any(one in found for found in row.violations for one in text.split("|")), (text, row.violations)
    better = delta.run(case, config)
    assert better.ok, better.as_dict()
    assert (better.violations, better.lost, better.duplicated) == ([], 0, 0)


# --- the matrix can fail ---


def test_a_case_that_ends_elsewhere_is_not_ok(delta: Matrix) -> None:
    wrong = replace(case_of("B1"), expected=("vhost",))
    row = delta.run(wrong, config_of(1))
    assert (row.outcome, row.violations, row.ok) == ("userspace", [], False)


@pytest.mark.parametrize("detects", ["I8", ""] if CAMPAIGN else ["I8"])
@pytest.mark.parametrize("case_id", ["A5/nothing", "A5/used"])
def test_a_write_that_is_not_sent_again_is_found(delta: Matrix, case_id: str, detects: str) -> None:
    """Where A5 has to find it, all is well; where nobody expects it, it is not."""
    row = delta.run(replace(case_of(case_id), detects=detects), config_of(1, "idle"))
    assert any("I8: guest memory differs" in text for text in row.violations)
    assert row.ok is bool(detects)


def test_a_case_that_finds_nothing_to_detect_is_not_ok(delta: Matrix) -> None:
    row = delta.run(replace(case_of("A5/nothing"), source=Orders()), config_of(1))
    assert (row.outcome, row.violations, row.ok) == ("vhost", [], False)


def test_a_host_that_dies_unasked_is_not_ok(delta: Matrix) -> None:
    """The dead hosts are replaced: the next case is as good as ever."""
    row = delta.run(
        Case("X", "the source is killed, and expected to live", source=Orders(die_at="round")), config_of(1)
    )
    assert (row.outcome, row.ok) == ("lost", False)
    assert delta.run(case_of("B1"), config_of(1)).ok


def test_what_a_host_keeps_is_counted() -> None:
    host = Host()
    host.warm_up()
    assert host.drop() == {}
    with EventFd():
        assert host.drop() == {"descriptors": 1}
    assert host.drop() == {}
