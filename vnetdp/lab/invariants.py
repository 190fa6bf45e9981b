"""The invariants of a machine, and of any device, after each change of owner. A violation begins with the invariant's name.

The ledger checks I1, I4 and I10 (each frame once, in order); the comparison of guest memory at the stream's end checks
I8 (every page sent again); the rest can be seen on the machine itself.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

from vnetdp_kernels import rows as r

from ..backends.base import Backend
from ..device import vhost_net
from ..device.device import NetDevice
from ..device.owners import Owner
from ..migration.machine import Machine
from ..migration.snapshot import FIELDS, value_of
from ..shared.memory import Words
from ..virtio.queue import VRINGS, pair_of
from ..virtio.state import DeviceState


def violations(machine: Machine, final: bool = True) -> list[str]:
    """Return the invariants that *machine*, running or stopped, violates. final: False if it has but an early state."""
    return device_violations(machine.device, final)


def device_violations(device: NetDevice, final: bool = True, still: bool = False) -> list[str]:
    """Return the invariants that *device*, running or stopped, violates.

    final: False if it has but an early state, still: True if its owner is paused, so that indices can be compared.
    """
    owner = device.owner
    found: list[str] = []
    rows = {Owner.USERSPACE: _rows(device.userspace.backends), Owner.VHOST: _rows(device.vhost or ())}
    for n, queue in enumerate(device.queues):
        if owner is Owner.NOBODY and final and queue.enabled:
            used = vhost_net.used_idx(device.memory, queue)
            if (queue.last_avail_idx - used) & 0xFFFF > queue.num:
                found.append(f"I2: queue {n} goes on at {queue.last_avail_idx}, and used.idx is {used}")
        for who, row in ((who, rows[who][n]) for who in rows if n < len(rows[who])):
            if row is None:
                continue
            if who is not owner and row[r.VQ_BOUND]:
                found.append(f"I5: {who.value} has queue {n}, which belongs to {owner.value}")
            if who is owner and queue.enabled and not row[r.VQ_BOUND]:
                found.append(f"I4: queue {n} is enabled, and {who.value}, which has the rings, does not serve it")
            if who is owner and still and row[r.VQ_BOUND] and not row[r.VQ_STATUS]:
                found += _index_violations(device, n, row)
    found += _polling_violations(device, remote=owner is Owner.VHOST and all(row is None for row in rows[owner]))
    found += _notifier_violations(device)
    found += [f"I2: {error}" for error in device.ring_errors()]
    return found


def _rows(backends: Sequence[Backend]) -> list[Words | None]:
    """Return the row of each queue of *backends*; None where it can't be seen from here."""
    return [backend.row(vring) for backend in backends for vring in range(VRINGS)]


def _index_violations(device: NetDevice, n: int, row: Words) -> Iterator[str]:
    """Compare the indices of queue *n*, bound to an owner that is paused, with those in guest memory."""
    used = vhost_net.used_idx(device.memory, device.queues[n])
    last_avail, last_used = int(row[r.VQ_LAST_AVAIL_IDX]), int(row[r.VQ_LAST_USED_IDX])
    if (last_avail - used) & 0xFFFF > device.queues[n].num:
        yield f"I2: queue {n} is at avail index {last_avail}, and used.idx is {used}"
    if last_used != used:
        yield f"I3: queue {n} is at used index {last_used} for its owner, and used.idx is {used}"


def _polling_violations(device: NetDevice, remote: bool) -> Iterator[str]:
    """remote: the rings' owner is elsewhere, with an endpoint of its own."""
    endpoint = device.endpoint
    polled = {pair_of(n) for n, queue in enumerate(device.queues) if queue.enabled}
    pollers = 0 if remote or device.owner is Owner.NOBODY else len(polled)
    if len(endpoint.polled_by) != pollers:
        yield f"I6: {len(endpoint.polled_by)} queues of the endpoint are polled, not {pollers}"
    if endpoint.polls_refused:
        yield f"I6: polling was started {endpoint.polls_refused} times for a queue that another owner polled"
    if endpoint.polls_started - endpoint.polls_stopped != len(endpoint.polled_by):
        yield (
            f"I7: polling was started {endpoint.polls_started} times, stopped {endpoint.polls_stopped} times, "
            f"and goes on for {len(endpoint.polled_by)} queues"
        )


def _notifier_violations(device: NetDevice) -> Iterator[str]:
    notifiers = device.notifiers
    expected = device.owner is Owner.VHOST or (device.vhost_prepared and not device.running)
    if not notifiers.balanced or notifiers.with_vhost != expected:
        counts = (notifiers.grabs, notifiers.host, notifiers.guest)
        yield f"I7: notifiers (grabs, host, guest) {counts} while {device.owner.value} has the rings"


def differences(source: DeviceState, target: DeviceState) -> list[str]:
    """Return the differences of *target* from *source* at its stop, indices aside: indices go on moving."""
    found = [f"state: {f.name} differs" for f in FIELDS if value_of(source, f.name) != value_of(target, f.name)]
    for n, (theirs, ours) in enumerate(zip(source.queues, target.queues, strict=True)):
        if (theirs.enabled, theirs.enabled and theirs.setup) != (ours.enabled, ours.enabled and ours.setup):
            found.append(f"state: queue {n} differs")
    return found


def resources() -> dict[str, int]:
    """Return the descriptors, mappings and threads of this process: a migration leaves as many as it found."""
    return {
        "descriptors": sum(1 for _ in Path("/proc/self/fd").iterdir()) - 1,
        "mappings": sum("vnetdp" in line for line in Path("/proc/self/maps").read_text().splitlines()),
        "threads": threading.active_count(),
    }
