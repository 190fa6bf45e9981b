"""The invariants of a machine after each change of owner. Each violation begins with the invariant's name.

The ledger checks I1, I4 and I10 (each frame once, in order); the comparison of guest memory at the stream's end checks
I8 (every page sent again); the rest can be seen on the machine itself.
"""

from __future__ import annotations

import threading
from pathlib import Path

from vnetdp_kernels import rows as r

from ..datapath.datapath import Datapath
from ..device import vhost_net
from ..device.device import NetDevice
from ..device.owners import Owner
from ..migration.machine import Machine
from ..migration.snapshot import FIELDS, value_of
from ..shared.memory import Words
from ..virtio.queue import pair_of
from ..virtio.state import DeviceState


def violations(machine: Machine, final: bool = True) -> list[str]:
    """Return the invariants that *machine*, running or stopped, violates. final: False if it has but an early state."""
    worker = machine.worker
    return device_violations(machine.device, worker.datapath if worker else None, final)


def device_violations(device: NetDevice, vhost: Datapath | None = None, final: bool = True) -> list[str]:
    """Return the invariants that *device*, running or stopped, violates: I2, I4 to I7, and each queue that broke.

    vhost: the datapath of its vhost, if that is in this process. final: False if the device has but an early state.
    """
    found = _inexact(device) if device.owner is Owner.NOBODY and final else []
    found += _served(device, Owner.USERSPACE, device.userspace.rows)
    if vhost is not None:
        found += _served(device, Owner.VHOST, vhost.vqs)
    found += _polled(device)
    notifiers = device.notifiers
    expected = device.owner is Owner.VHOST or (device.vhost_prepared and not device.running)
    if not notifiers.balanced or notifiers.with_vhost != expected:
        counts = (notifiers.grabs, notifiers.host, notifiers.guest)
        found.append(f"I7: notifiers (grabs, host, guest) {counts} while {device.owner.value} has the rings")
    found += [f"I2: {error}" for error in device.ring_errors()]
    return found


def _inexact(device: NetDevice) -> list[str]:
    """Return each queue of a device without an owner whose index can't be that of its used ring."""
    found = []
    for n, queue in enumerate(device.queues):
        if queue.enabled:
            used = vhost_net.used_idx(device.memory, queue)
            if (queue.last_avail_idx - used) & 0xFFFF > queue.num:
                found.append(f"I2: queue {n} goes on at {queue.last_avail_idx}, and used.idx is {used}")
    return found


def _served(device: NetDevice, who: Owner, rows: Words) -> list[str]:
    """Return each queue that *who*, whose queue rows are *rows*, serves without having it, or has without serving it."""
    owner = device.owner
    found = []
    for n, queue in enumerate(device.queues):
        bound = rows[n, r.VQ_BOUND]
        if who is not owner and bound:
            found.append(f"I5: {who.value} has queue {n}, which belongs to {owner.value}")
        if who is owner and queue.enabled and not bound:
            found.append(f"I4: queue {n} is enabled, and {who.value}, which has the rings, does not serve it")
    return found


def _polled(device: NetDevice) -> list[str]:
    """Return what is wrong with the polling of the device's endpoint."""
    endpoint = device.endpoint
    enabled = {pair_of(n) for n, queue in enumerate(device.queues) if queue.enabled}
    pollers = 0 if device.owner is Owner.NOBODY else len(enabled)
    found = []
    if len(endpoint.polled_by) != pollers:
        found.append(f"I6: {len(endpoint.polled_by)} queues of the endpoint are polled, not {pollers}")
    if endpoint.polls_refused:
        found.append(f"I6: polling was started {endpoint.polls_refused} times for a queue that another owner polled")
    if endpoint.polls_started - endpoint.polls_stopped != len(endpoint.polled_by):
        found.append(
            f"I7: polling was started {endpoint.polls_started} times, stopped {endpoint.polls_stopped} times, "
            f"and goes on for {len(endpoint.polled_by)} queues"
        )
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
