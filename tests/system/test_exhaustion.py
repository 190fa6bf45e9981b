"""A process out of descriptors can't make what it wants, and nothing is left of what it began to make."""

from __future__ import annotations

import errno
import os
import resource
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.support.by_hand import no_descriptor_leaks
from vnetdp.backends.process import WorkerProcess
from vnetdp.backends.worker import Worker
from vnetdp.datapath.datapath import Datapath
from vnetdp.datapath.notifiers import Notifiers
from vnetdp.device.device import NetDevice
from vnetdp.endpoints.fault import FaultEndpoint
from vnetdp.endpoints.mailbox import MailboxEndpoint
from vnetdp.endpoints.pcap import PcapEndpoint
from vnetdp.endpoints.scapy import SocketEndpoint, VnetdpSocket
from vnetdp.errors import ConfigError, EndpointError, MachineError
from vnetdp.guest.driver import Driver, driver_block, memory_for
from vnetdp.lab.host import HostProcess
from vnetdp.migration.machine import Machine, MachineConfig, make_wire
from vnetdp.programs.bridge import Bridge
from vnetdp.programs.link import Link
from vnetdp.shared.memory import GuestMemory
from vnetdp.vhost_user.back_end.server import Server
from vnetdp.vhost_user.front_end.front_end import VhostUserFrontEnd


@dataclass
class Given:
    """What is there before, and may be used."""

    memory: GuestMemory
    endpoint: SocketEndpoint
    device: NetDevice
    folder: Path

    def path(self, name: str) -> str:
        return str(self.folder / name)


KINDS: dict[str, Callable[[Given], Any]] = {
    "notifiers": lambda _: Notifiers(2),
    "datapath": lambda _: Datapath(2),
    "worker": lambda _: Worker(2),
    "process": lambda _: WorkerProcess(1),
    "device": lambda given: NetDevice(given.memory, given.endpoint, queue_pairs=2),
    "pcap": lambda _: PcapEndpoint(None, "/dev/null"),
    "socket": lambda given: VnetdpSocket(given.endpoint),
    "link": lambda given: Link(given.endpoint, given.endpoint, "vhost"),
    "server": lambda given: Server(given.endpoint, given.path("served")),
    "front end": lambda given: VhostUserFrontEnd(given.path("listens"), listen=True),
    "bridge": lambda given: Bridge(given.path("left"), given.path("right")),
    "machine": lambda given: Machine(MachineConfig(), given.device.endpoint.block.fd),
    "host process": lambda _: HostProcess(quiet=True),
}

# They need no descriptor until somebody asks for it.
LATER: dict[str, Callable[[Given], Any]] = {
    "stepped device": lambda given: NetDevice(given.memory, given.endpoint, queue_pairs=2, threaded=False),
    "mailbox": lambda _: MailboxEndpoint(3),
    "fault": lambda given: FaultEndpoint(given.endpoint),
    "driver": lambda given: Driver(given.device, given.memory),
    "driver of a block": lambda given: Driver(given.device, given.memory, given.endpoint, block=driver_block(1, 256)),
}


class Shared(SocketEndpoint):
    """One that whoever wraps it does not close."""

    def close(self) -> None:
        pass


@contextmanager
def descriptors(more: int) -> Iterator[None]:
    """Allow so many descriptors more than are open, by number: those below that are taken first."""
    taken = [os.open(os.devnull, os.O_RDONLY)]
    highest = max(int(path.name) for path in Path("/proc/self/fd").iterdir())
    while taken[-1] < highest:
        taken.append(os.open(os.devnull, os.O_RDONLY))
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (taken[-1] + 1 + more, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
        for fd in taken:
            os.close(fd)


@pytest.mark.parametrize("kind", KINDS)
def test_what_can_t_be_made_leaves_nothing(kind: str, tmp_path: Path) -> None:
    with (
        memory_for(2) as memory,
        Shared(2) as endpoint,
        make_wire(MachineConfig()) as wire,
        NetDevice(memory, wire, threaded=False) as device,
    ):
        given = Given(memory, endpoint, device, tmp_path)
        KINDS[kind](given).close()  # what is opened once for all is opened by the first of a kind
        threads = threading.active_count()
        made = None
        for more in range(100):
            with no_descriptor_leaks():
                try:
                    with descriptors(more):
                        made = KINDS[kind](given)
                except (MachineError, EndpointError, ConfigError) as e:
                    assert getattr(e, "errno", errno.EMFILE) == errno.EMFILE
                    assert threading.active_count() == threads
                    assert not list(tmp_path.iterdir())
                else:
                    made.close()
            if made is not None:
                break
        assert made is not None
        assert more > 0
        SocketEndpoint.close(endpoint)
