"""One queue is reset and enabled anew under traffic, and the others go on (Virtio 1.2, 2.6.1)."""

from __future__ import annotations

import pytest

from tests.support.by_hand import Traffic, no_descriptor_leaks, rebase, scaled
from vnetdp.backends.faulty import Fault, Faults, FaultyBackend
from vnetdp.backends.worker import Worker
from vnetdp.device.device import NetDevice
from vnetdp.device.owners import Owner
from vnetdp.guest.driver import Driver, memory_for
from vnetdp.testing import READY
from vnetdp_kernels import rows as r


@pytest.mark.parametrize("verb", [None, "set_vring_num", "set_vring_base", "set_vring_call", "set_backend"])
@pytest.mark.parametrize("index", range(4))
def test_a_queue_is_reset_while_the_others_go_on(index: int, verb: str | None) -> None:
    pair, vring = divmod(index, 2)
    with no_descriptor_leaks():
        traffic = Traffic(2, rate=scaled(20_000, 300))
        worker = Worker(2)
        faults = Faults()
        backends = [FaultyBackend(inner, n, faults) for n, inner in enumerate(worker.backends)]
        memory = memory_for(2, 64)
        with (
            NetDevice(memory, traffic.device, queue_pairs=2, vhost=backends) as device,
            Driver(device, memory, traffic.guest, queue_pairs=2, num=64) as driver,
        ):
            driver.start()
            traffic.wait_for_more(20)
            used_at = int(driver.dvqs[index, r.DVQ_USED])
            device.reset_queue(index)
            ring = memory.mem[used_at : used_at + 6 + 8 * 64].copy()
            traffic.wait_for_pair(1 - pair, 20)
            assert (memory.mem[used_at : used_at + ring.size] == ring).all(), "a queue that is reset was written to"
            driver.stop()
            addresses = [driver.dvqs[index, slot] for slot in (r.DVQ_DESC, r.DVQ_AVAIL, r.DVQ_USED)]
            gpas = [int(at) - memory.translate(0, 1) for at in addresses]
            rebase(driver, 0, [index])
            device.set_queue(index, 64, *gpas)
            if verb is not None:
                faults.append(Fault(verb, pair, vring))
            device.enable_queue(index)
            assert device.owner is Owner.VHOST
            assert device.fallbacks == 0
            driver.start()
            traffic.wait_for_more(20)
            assert device.status == READY, device.ring_errors()
            assert [fault.hits for fault in faults] == [1] * len(faults)
        assert traffic.device.polls_started == traffic.device.polls_stopped
        worker.close()
        memory.close()
        for end in (traffic.device, traffic.guest):
            assert not end.ledger[:, r.LEDGER_DUPLICATED].any()
            assert not end.ledger[:, r.LEDGER_REORDERED].any()
            # What was in the queue when it was reset is gone; the three others lost nothing.
            missing = end.ledger[:, r.LEDGER_MISSING]
            if end is (traffic.device if vring else traffic.guest):
                missing = missing[1 - pair]
            assert not missing.any()
        traffic.close()
