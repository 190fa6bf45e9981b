"""A machine by itself: what is left in its rings at a stop, and its invariants, each of which can fail."""

from __future__ import annotations

import logging
import os
import signal
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest

from tests.migration.rig import Tape
from tests.support.by_hand import wait_for
from vnetdp.backends.faulty import Fault
from vnetdp.device.owners import Owner
from vnetdp.errors import BackendError, EndpointError
from vnetdp.lab.changes import LEFT, leaving
from vnetdp.lab.host import HostProcess
from vnetdp.lab.invariants import differences, violations
from vnetdp.migration import machine as machine_module
from vnetdp.migration.machine import Machine, MachineConfig, make_wire
from vnetdp.migration.ram import RamSource
from vnetdp.migration.snapshot import FIELDS
from vnetdp.migration.source import MAX_EARLY, MAX_ROUNDS, Source
from vnetdp.shared.memory import DirtyLog, Words
from vnetdp.virtio.state import Control
from vnetdp_kernels import rows as r
from vnetdp_kernels import spec

QUIET = MachineConfig(queue_pairs=2, num=16, traffic="idle", faulty=True)


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


# --- what is left in the rings at a stop ---


def stop_leaving(machine: Machine, what: str) -> list[int]:
    """Stop a machine; return how many chains of each queue are available and not used."""
    with leaving(machine, what):
        machine.stop()
    queues = machine.device.queues
    avail_idx = [
        int.from_bytes(machine.memory.read(queue.avail + spec.VIRTQ_RING_IDX, 2), "little") for queue in queues
    ]
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
    assert machine.driver.dvqs[::2, r.DVQ_LAST_USED_IDX].tolist() == [0] * QUIET.queue_pairs


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


# --- the invariants can fail ---


def unbind_a_ring(machine: Machine) -> None:
    assert machine.worker is not None
    machine.worker.backends[1].set_backend(0, None)


def unbind_a_pair(machine: Machine) -> None:
    assert machine.worker is not None
    for index in range(2):
        machine.worker.backends[1].set_backend(index, None)


def leave_a_ring_bound(machine: Machine) -> None:
    machine.stop()
    machine.device.userspace.rows[1, r.VQ_BOUND] = 1


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
    count_a_poll_too_many: ["I7: polling was started 3 times, stopped 0 times, and goes on for 2 queues"],
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
    assert violations(machine) == ["I6: polling was started 1 times for a queue that another owner polled"]


def test_a_second_machine_on_the_same_wire_is_refused(machine: Machine) -> None:
    """Two endpoints over one block, as two processes have them: neither knows of the other's books."""
    with Machine(QUIET, machine.wire.block.fd) as second:
        second.boot()
        second.run()
        assert second.device.owner is Owner.NOBODY
        assert any(text.startswith("I6: polling was started") for text in violations(second))
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
            machine.wire.rows[:, r.EP_SEQ] += 1

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
    machine.memory.write(queue.avail + spec.VIRTQ_RING_IDX, (QUIET.num + 1).to_bytes(2, "little"))
    machine.device.kicks[1].signal()
    wait_for(lambda: violations(machine) != [], "the device finds avail.idx out of reach")
    assert violations(machine) == ["I2: queue 1: avail.idx moved by more than the queue's size"]
