"""The invariants of a machine after each change of owner. Each violation begins with the invariant's name.

The ledger checks I1, I4 and I10 (each frame once, in order); the comparison of guest memory at the stream's end checks
I8 (every page sent again); the rest can be seen on the machine itself.
"""

from __future__ import annotations

import threading
from pathlib import Path

from vnetdp_kernels import rows as r

from ..device import vhost_net
from ..device.owners import Owner
from ..migration.machine import Machine
from ..migration.snapshot import FIELDS, value_of
from ..virtio.queue import pair_of
from ..virtio.state import DeviceState


def violations(machine: Machine, final: bool = True) -> list[str]:
    """Return the invariants that *machine*, running or stopped, violates. final: False if it has but an early state."""
    device = machine.device
    owner = device.owner
    found: list[str] = []
    if owner is Owner.NOBODY and final:
        for n, queue in enumerate(device.queues):
            if not queue.enabled:
                continue
            used = vhost_net.used_idx(machine.memory, queue)
            if (queue.last_avail_idx - used) & 0xFFFF > queue.num:
                found.append(f"I2: queue {n} goes on at {queue.last_avail_idx}, and used.idx is {used}")
    bound = {
        Owner.USERSPACE: device.userspace.rows[:, r.VQ_BOUND] != 0,
        Owner.VHOST: machine.worker.datapath.vqs[:, r.VQ_BOUND] != 0 if machine.worker else None,
    }
    for who, rows in bound.items():
        if rows is None:
            continue
        for n, queue in enumerate(device.queues):
            if who is not owner and rows[n]:
                found.append(f"I5: {who.value} has queue {n}, which belongs to {owner.value}")
            if who is owner and queue.enabled and not rows[n]:
                found.append(f"I4: queue {n} is enabled, and {who.value}, which has the rings, does not serve it")
    endpoint = device.endpoint
    pollers = (
        len({pair_of(n) for n, queue in enumerate(device.queues) if queue.enabled}) if owner is not Owner.NOBODY else 0
    )
    if len(endpoint.polled_by) != pollers:
        found.append(f"I6: {len(endpoint.polled_by)} queues of the endpoint are polled, not {pollers}")
    if endpoint.polls_refused:
        found.append(f"I6: polling was started {endpoint.polls_refused} times for a queue that another owner polled")
    if endpoint.polls_started - endpoint.polls_stopped != len(endpoint.polled_by):
        found.append(
            f"I7: polling was started {endpoint.polls_started} times, stopped {endpoint.polls_stopped} times, "
            f"and goes on for {len(endpoint.polled_by)} queues"
        )
    notifiers = machine.notifiers
    expected = owner is Owner.VHOST or (device.vhost_prepared and not device.running)
    if not notifiers.balanced or notifiers.with_vhost != expected:
        counts = (notifiers.grabs, notifiers.host, notifiers.guest)
        found.append(f"I7: notifiers (grabs, host, guest) {counts} while {owner.value} has the rings")
    found += [f"I2: {error}" for error in device.ring_errors()]
    return found


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
