"""`settle`: steps drivers with their devices until no frame moves, in compiled code but for endpoints in Python."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from vnetdp_kernels import rows as r
from vnetdp_kernels.loops import side as kernels

from .datapath.datapath import Datapath
from .device.device import NetDevice
from .endpoints.base import GO_ON, Endpoint
from .errors import ConfigError
from .guest.driver import Driver

_MOST = 4096  # frames of a device between two looks at Python's endpoints, and at ^C


class _Host(NamedTuple):
    """A driver, its device, and the datapath that has the rings; the device's own while none has."""

    driver: Driver
    device: NetDevice
    datapath: Datapath


def _host_of(driver: Driver) -> _Host:
    device = driver.device
    if not isinstance(device, NetDevice):
        raise ConfigError(f"settle: {type(device).__name__} is no NetDevice")
    own = device.userspace.stepped
    if own.bound:
        return _Host(driver, device, own)
    for backend in device.vhost or ():
        datapath = backend.worker
        if not isinstance(datapath, Datapath):
            raise ConfigError("settle: the device's worker runs by itself: step a UserspaceBackend of a Datapath")
        if datapath.bound:
            return _Host(driver, device, datapath)
    return _Host(driver, device, own)


def _look(drivers: Sequence[Driver]) -> tuple[list[_Host], list[Endpoint]]:
    """Return the hosts, and those of their endpoints that kernels alone can't serve."""
    hosts = [_host_of(driver) for driver in drivers]
    ends = (end for host in hosts for end in (host.driver.endpoint, host.datapath.endpoint))
    return hosts, [end for end in ends if end.kind >= r.KIND_STREAM]


def _service(ends: Sequence[Endpoint]) -> bool:
    """Serve the endpoints until kernels can go on, which returns True, or none of them has anything to do."""
    while True:
        done = 0
        for end in ends:
            done |= end.service()
        if done & GO_ON or not done:
            return bool(done)


def settle(*drivers: Driver) -> int:
    """Step drivers and their devices, in this thread, until no frame moves; return the frames moved. It never waits.

    A device steps under its present owner, vhost's `Datapath` too. Frames that an endpoint in Python gives meanwhile, to
    any of the devices, move as well. Two generators without a limit never come to an end, but by ^C.

    GuestError if a device broke the specification on a queue; ConfigError if a driver, a device or its vhost has a thread,
    or in a forked child.
    """
    for driver in drivers:
        driver.check_stepped()
    moved = 0
    hosts, ends = _look(drivers)
    _service(ends)
    while True:
        sides = [side.address for host in hosts for side in (host.driver.side, host.datapath.side)]
        n, found = kernels.settle(np.array(sides, np.int64), _MOST)
        moved += n
        if found & r.SETTLE_BROKEN:
            for host in hosts:
                host.device.check_rings()
                host.driver.check()
        if not _service(ends) and not found & r.SETTLE_MORE:
            return moved
        hosts, ends = _look(drivers)  # the user's code may have changed an owner
