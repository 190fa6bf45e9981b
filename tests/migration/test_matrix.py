"""The fault matrix ends as it has to, shows what the patch gets wrong, and would show more: what checks it can fail.

Every 25th case with one queue pair by default; all, with one pair and four, idle and under traffic, with
VNETDP_CAMPAIGN=1 (`make campaign`).
"""

from __future__ import annotations

import itertools
import logging
import os
import signal
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from scapy.utils import rdpcap

from tests.by_hand import no_descriptor_leaks, wait_for
from tests.migration.rig import Tape, migrate
from vnetdp.announce import ROUNDS_S, rarp
from vnetdp.backends.faulty import Fault
from vnetdp.errors import BackendError, EndpointError
from vnetdp.memory import DirtyLog, Words
from vnetdp.migration import machine as machine_module
from vnetdp.migration.changes import LEFT, leaving
from vnetdp.migration.host import Host, HostProcess, Orders
from vnetdp.migration.invariants import differences, violations
from vnetdp.migration.machine import Machine, MachineConfig, make_wire
from vnetdp.migration.matrix import DEFECTS, RATE, Case, Matrix, Row, can_run, cases, chosen, run_all
from vnetdp.migration.ram import RamSource
from vnetdp.migration.snapshot import FIELDS
from vnetdp.migration.source import MAX_EARLY, MAX_ROUNDS, Source
from vnetdp.migration.taps import why_no_taps
from vnetdp.notify import EventFd
from vnetdp.owners import Owner
from vnetdp.state import Control
from vnetdp_kernels import layout as lay

CAMPAIGN = os.environ.get("VNETDP_CAMPAIGN") == "1"
EVERY = 25
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


@pytest.mark.parametrize("verb", ["set_log", "set_features", "set_vring_addr"])
def test_logging_that_cannot_be_started_is_off(machine: Machine, verb: str) -> None:
    assert machine.worker is not None
    log = DirtyLog(machine.memory.end)
    machine.faults[:] = [Fault(verb, pair=1)]
    with pytest.raises(BackendError):
        machine.device.set_log(log)
    log.close()
    assert machine.device.log is None
    assert machine.worker.datapath.log is None
    assert not machine.worker.datapath.logging
    assert (machine.device.owner, machine.device.handovers) == (Owner.VHOST, 1)


def test_a_guest_that_changes_for_ever_is_saved_so_often_and_no_more(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The rounds go on, and before each early state there is another MAC address."""

    class Changing(Source):
        def _changed(self, ram: RamSource, log: DirtyLog) -> Words:
            return ram.all_in_use()

        def _send_early(self) -> None:
            machine.device.set_control(mac=(int.from_bytes(machine.device.control.mac, "big") + 1).to_bytes(6, "big"))
            super()._send_early()

    monkeypatch.setattr("vnetdp.migration.source._FEW_PAGES", 0)
    monkeypatch.setattr("vnetdp.migration.source._SHRINKS", 2.0)
    tape = Tape()
    report = Changing(machine, tape, "delta").run()
    assert report.counts["early"] == MAX_EARLY < MAX_ROUNDS
    assert [section.name for section, _ in tape.sections].count("virtio-net-early") == MAX_EARLY


def test_cases_are_run_one_by_one_and_told() -> None:
    told: list[tuple[Row, MachineConfig]] = []
    with no_descriptor_leaks():
        rows = run_all("delta", chosen((1,), ("idle", "both"), "E"), lambda row, config: told.append((row, config)))
    assert rows == [(config, row) for row, config in told]
    found = [(config.traffic, row.case.id) for config, row in rows]
    assert found == [(traffic, f"E{n}") for traffic in ("idle", "both") for n in (3, 4, 5, 6, 7, 8, 9)]
    assert all(row.ok for _, row in rows)


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


# --- what is left in the rings at a stop ---


def stop_leaving(machine: Machine, what: str) -> list[int]:
    """Stop a machine; return how many chains of each queue are available and not used."""
    with leaving(machine, what):
        machine.stop()
    queues = machine.device.queues
    avail_idx = [int.from_bytes(machine.memory.read(queue.avail + lay.VIRTQ_RING_IDX, 2), "little") for queue in queues]
    return [(idx - queue.last_avail_idx) & 0xFFFF for idx, queue in zip(avail_idx, queues, strict=True)]


@pytest.mark.parametrize("what", ["sent", "kick"])
def test_a_stop_finishes_nothing_first(machine: Machine, what: str) -> None:
    assert stop_leaving(machine, what)[1::2] == [LEFT] * QUIET.queue_pairs


def test_the_guest_goes_on_until_its_device_has_stopped(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    driver = machine.driver
    assert driver is not None
    owners = []
    stop = driver.stop

    def look_and_stop() -> None:
        owners.append(machine.device.owner)
        stop()

    monkeypatch.setattr(driver, "stop", look_and_stop)
    machine.stop()
    monkeypatch.undo()
    assert owners == [Owner.NOBODY]


def test_a_guest_that_does_not_look_leaves_what_it_was_called_for(machine: Machine) -> None:
    assert machine.driver is not None
    assert stop_leaving(machine, "call")[::2] == [QUIET.num - LEFT] * QUIET.queue_pairs
    assert machine.driver.dvqs[::2, lay.DVQ_LAST_USED_IDX].tolist() == [0] * QUIET.queue_pairs


def test_a_guest_that_is_asleep_wakes_when_it_is_called(machine: Machine) -> None:
    with leaving(machine, "call"):
        machine.stop()
    for call in machine.device.calls:
        call.clear()
    machine.asleep = True
    machine.start_guest()
    assert not machine.drain(0.1)
    machine.device.set_running(True)  # binds, which calls
    machine.start_guest()
    assert machine.drain()


@pytest.mark.parametrize(
    "case_id", [f"I9/{what}/{owner}" for what in ("kick", "call") for owner in ("vhost", "userspace")]
)
def test_no_kick_and_no_call_is_lost(delta: Matrix, case_id: str) -> None:
    row = delta.run(case_of(case_id), config_of(4, "idle"))
    assert row.ok, row.as_dict()


# --- the invariants can fail ---


@pytest.fixture
def machine() -> Iterator[Machine]:
    """A machine that runs, with vhost, and without traffic: nothing is wrong with it."""
    logging.disable(logging.CRITICAL)
    with make_wire(QUIET) as wire, Machine(QUIET, wire.block.fd) as machine:
        machine.boot()
        machine.run()
        assert machine.device.owner is Owner.VHOST
        assert violations(machine) == []
        yield machine
    logging.disable(logging.NOTSET)


def unbind_a_ring(machine: Machine) -> None:
    assert machine.worker is not None
    machine.worker.backends[1].set_backend(0, None)


def unbind_a_pair(machine: Machine) -> None:
    assert machine.worker is not None
    for index in range(2):
        machine.worker.backends[1].set_backend(index, None)


def leave_a_ring_bound(machine: Machine) -> None:
    machine.stop()
    machine.device.userspace_rows[1, lay.VQ_BOUND] = 1


def poll_without_queues(machine: Machine) -> None:
    machine.device.endpoint.stop_polling(0, machine.device.endpoint.polled_by[0])


def count_a_poll_too_many(machine: Machine) -> None:
    machine.device.endpoint.polls_started += 1


def give_notifiers_back(machine: Machine) -> None:
    machine.notifiers.release()


def give_one_notifier_back(machine: Machine) -> None:
    machine.notifiers.host -= 1


def run_ahead(machine: Machine) -> None:
    machine.stop()
    machine.device.queues[2].last_avail_idx += QUIET.num + 1


def fall_behind(machine: Machine) -> None:
    machine.stop()
    machine.device.queues[2].last_avail_idx -= 1


BROKEN: dict[Callable[[Machine], None], list[str]] = {
    unbind_a_ring: ["I4: queue 2 is enabled, and vhost"],
    unbind_a_pair: [*(f"I4: queue {n} is enabled, and vhost" for n in (2, 3)), "I6: 1 queues of the endpoint"],
    leave_a_ring_bound: ["I5: userspace has queue 1, which belongs to nobody"],
    poll_without_queues: ["I6: 1 queues of the endpoint are polled, not 2"],
    count_a_poll_too_many: ["I7: polling was started and stopped unequally often"],
    give_notifiers_back: ["I7: notifiers (grabs, host, guest) (0, 0, 0) while vhost has the rings"],
    give_one_notifier_back: ["I7: notifiers (grabs, host, guest) (2, 3, 1) while vhost has the rings"],
    run_ahead: [f"I2: queue 2 goes on at {QUIET.num + 1}, and used.idx is 0"],
    fall_behind: ["I2: queue 2 goes on at -1, and used.idx is 0"],
}


@pytest.mark.parametrize("break_it", BROKEN, ids=lambda each: each.__name__)
def test_what_is_broken_is_reported(machine: Machine, break_it: Callable[[Machine], None]) -> None:
    break_it(machine)
    found = violations(machine)
    assert len(found) == len(BROKEN[break_it]), found
    for text, begins in zip(found, BROKEN[break_it], strict=True):
        assert text.startswith(begins)


def test_state_that_does_not_arrive_is_reported(machine: Machine) -> None:
    source = machine.device.save_state()
    moved = source.copy()
    moved.queues[1].last_avail_idx += 1
    assert differences(source, moved) == []
    others = Control(
        bytes(6), 1, 2, 3, 4, (bytes(6),), 1, 1, bytes([1]) * 512, 1, True, True, True, 1, 1, (1,), bytes([1]) * 40
    )
    for field in FIELDS:
        target = source.copy()
        if field.name in ("status", "features"):
            setattr(target, field.name, 0)
        else:
            target.control = replace(target.control, **{field.name: getattr(others, field.name)})
        assert differences(source, target) == [f"state: {field.name} differs"]
    for change in ({"enabled": False}, {"used": 0}, {"num": 2 * QUIET.num}):
        target = source.copy()
        target.queues[2] = replace(target.queues[2], **change)
        assert differences(source, target) == ["state: queue 2 differs"]


def test_a_second_poller_is_refused(machine: Machine) -> None:
    with pytest.raises(EndpointError, match="queue 0 is polled by another owner"):
        machine.device.endpoint.start_polling(0, object())
    assert violations(machine) == ["I6: a queue that somebody else polled was to be polled 1 times"]


def test_a_second_machine_on_the_same_wire_is_refused(machine: Machine) -> None:
    """Two endpoints over one block, as two processes have them: neither knows of the other's books."""
    with Machine(QUIET, machine.wire.block.fd) as second:
        second.boot()
        second.run()
        assert second.device.owner is Owner.NOBODY
        assert any(text.startswith("I6: a queue that somebody else polled") for text in violations(second))
        assert violations(machine) == []
        machine.stop()
        third = Machine(QUIET, machine.wire.block.fd)
        with third:
            third.boot()
            third.run()
            assert third.device.owner is Owner.VHOST


def test_a_poller_that_was_killed_is_in_nobodys_way(machine: Machine) -> None:
    machine.stop()
    with HostProcess(quiet=True) as host:
        host.call("make", QUIET, (), fds=(machine.wire.block.fd,))
        host.call("boot")
        assert host.call("look")["owner"] == "vhost"
        with pytest.raises(EndpointError, match="queue 1 is polled by another owner"):
            machine.device.endpoint.start_polling(1, machine)
        os.kill(host.pid, signal.SIGKILL)
        wait_for(lambda: not host.alive, "the host is dead")
    machine.device.endpoint.start_polling(1, machine)
    machine.device.endpoint.stop_polling(1, machine)


def test_draining_ends_though_frames_are_made_for_ever(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    """As by another machine on the same wire, which nobody told to make no more."""
    monkeypatch.setattr(machine_module, "_DRAIN_S", 0.2)
    over = threading.Event()

    def make_frames() -> None:
        while not over.wait(0.0001):
            machine.wire.rows[:, lay.EP_SEQ] += 1

    other = threading.Thread(target=make_frames)
    other.start()
    try:
        wait_for(
            lambda: any(ledger.sent > ledger.delivered for ledger in machine.ledgers()), "the other has made frames"
        )
        assert not machine.drain()
    finally:
        over.set()
        other.join()


def test_a_ring_that_breaks_is_reported(machine: Machine) -> None:
    queue = machine.device.queues[1]
    machine.memory.write(queue.avail + lay.VIRTQ_RING_IDX, (QUIET.num + 1).to_bytes(2, "little"))
    machine.device.kicks[1].signal()
    wait_for(lambda: violations(machine) != [], "the device finds avail.idx out of reach")
    assert violations(machine) == ["I2: queue 1: avail.idx moved by more than the queue's size"]
