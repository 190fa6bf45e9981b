"""check: the invariants of a device, now and at each change of owner; a violation is named with its time and owner."""

from __future__ import annotations

import re

import pytest

from vnetdp import Fault, NullEndpoint
from vnetdp.testing import Vnet, check
from vnetdp_kernels import rows as r


@pytest.mark.vnet(owner=["userspace", "thread", "process", "vhost-user"], pairs=2)
def test_a_device_under_traffic_violates_no_invariant(vnet: Vnet) -> None:
    with check(vnet.device) as checked:
        for _ in range(10):
            vnet.wait_for(10)
            check(vnet.device)
            if vnet.owner != "userspace":
                vnet.change_owner(1)
    assert checked.violations == []


def test_a_violation_is_named_with_its_time_and_owner() -> None:
    with Vnet() as vnet:
        vnet.endpoint.polls_refused += 1
        with pytest.raises(AssertionError) as caught:
            check(vnet.device)
        vnet.endpoint.polls_refused -= 1
    said = r"\d+\.\d{3} s, at the start, owner vhost: I6: polling was started 1 times for a queue that another owner polled"
    assert re.search(said, str(caught.value))


def test_a_violation_at_a_change_of_owner_is_found_though_it_is_gone_at_the_end() -> None:
    with Vnet() as vnet:
        with (
            pytest.raises(AssertionError, match="as vhost lost the rings, owner nobody: I7: notifiers"),
            check(vnet.device),
        ):
            vnet.device.notifiers.grabs += 1
            vnet.device.set_running(False)
            vnet.device.notifiers.grabs -= 1
            vnet.device.set_running(True)
        vnet._check.violations.clear()


def test_an_index_that_is_not_the_one_in_memory_is_found() -> None:
    with Vnet(NullEndpoint) as vnet:
        vnet.stop()
        vnet.wait_until(vnet._taken, "the ring is empty")
        row = vnet.device.vhost[0].row(1) if vnet.device.vhost else None
        assert row is not None
        row[r.VQ_LAST_USED_IDX] ^= 1
        with pytest.raises(AssertionError, match="I3: queue 1 is at used index"):
            check(vnet.device)
        row[r.VQ_LAST_USED_IDX] ^= 1


def test_an_error_in_the_block_is_kept() -> None:
    with Vnet() as vnet, pytest.raises(KeyError), check(vnet.device):
        vnet.faults.append(Fault("set_backend"))
        vnet.change_owner()
        raise KeyError("mine")
