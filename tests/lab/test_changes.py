"""What a guest changes costs no frame, whatever its driver has in hand; and traffic that was stopped has stopped."""

from __future__ import annotations

import random
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace

import pytest

from tests.support.by_hand import scaled, wait_for
from vnetdp.backends.worker import Worker
from vnetdp.lab.changes import CHANGES
from vnetdp.migration.machine import Machine, MachineConfig, make_wire
from vnetdp_kernels import rows as r

BUSY = MachineConfig(num=16)  # as many frames as pass, both ways


@pytest.fixture
def busy() -> Iterator[Machine]:
    with make_wire(BUSY) as wire, Machine(BUSY, wire.block.fd) as machine:
        machine.boot()
        machine.run()
        yield machine


def test_no_frame_is_made_once_traffic_has_stopped(busy: Machine) -> None:
    """One that was begun before would be counted after all were seen to have arrived: the ledger would call it lost."""
    for _ in range(50):
        busy.allow(True)
        enough = [int(end.rows[0, r.EP_SEQ]) + 10 for end in (busy.guest, busy.wire)]
        wait_for(
            lambda enough=enough: all(  # type: ignore[misc]
                end.rows[0, r.EP_SEQ] >= n for end, n in zip((busy.guest, busy.wire), enough, strict=True)
            ),
            "frames go both ways",
        )
        busy.allow(False)
        made = [end.rows[0, r.EP_SEQ] for end in (busy.guest, busy.wire)]
        assert made == [end.rows[0, r.EP_LIMIT] for end in (busy.guest, busy.wire)]
        assert busy.drain()
        assert made == [end.rows[0, r.EP_SEQ] for end in (busy.guest, busy.wire)]


@pytest.fixture
def turns() -> Iterator[None]:
    """Threads in plain Python take turns in the midst of a frame, as they do in a host."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(0.0001)
    yield
    sys.setswitchinterval(before)


@pytest.mark.usefixtures("turns")
@pytest.mark.parametrize("index", [0, 1])
def test_a_queue_that_is_reset_again_and_again_loses_no_frame(index: int) -> None:
    """Frames are long, and come one by one: for much of the time the driver has one in hand, and the ring is empty.

    The device is slow to come to what is in it.
    """
    one_by_one = replace(BUSY, size=scaled(60_000, 6_000), mtu=65_535, rate=scaled(10_000, 100))
    moments = random.Random(1)
    with make_wire(one_by_one) as wire, Machine(one_by_one, wire.block.fd) as machine:
        machine.boot()
        machine.run()
        assert isinstance(machine.worker, Worker)
        for _ in range(100):
            time.sleep(moments.random() / 200)
            goes_on = threading.Timer(0.01, machine.worker.loop_thread.park, (False,))
            goes_on.start()
            machine.worker.loop_thread.park(True)
            CHANGES["queue_reset"](machine, index)
            goes_on.join()
        assert machine.drain()
        assert all(ledger.clean and ledger.sent for ledger in machine.ledgers()), machine.ledgers()
