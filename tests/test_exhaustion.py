"""A process out of descriptors can't make what it wants, and nothing is left of what it began to make."""

from __future__ import annotations

import errno
import os
import resource
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.by_hand import no_descriptor_leaks
from vnetdp.backends.process import WorkerProcess
from vnetdp.backends.worker import Worker
from vnetdp.datapath import Datapath
from vnetdp.device import NetDevice
from vnetdp.driver import memory_for
from vnetdp.endpoints.fault import FaultEndpoint
from vnetdp.endpoints.mailbox import MailboxEndpoint
from vnetdp.endpoints.pcap import PcapEndpoint
from vnetdp.endpoints.scapy import SocketEndpoint, VnetdpSocket
from vnetdp.errors import EndpointError
from vnetdp.memory import GuestMemory
from vnetdp.notifiers import Notifiers

KINDS: dict[str, Callable[[GuestMemory, SocketEndpoint], Any]] = {
    "notifiers": lambda _m, _e: Notifiers(2),
    "datapath": lambda _m, _e: Datapath(2),
    "worker": lambda _m, _e: Worker(2),
    "process": lambda _m, _e: WorkerProcess(1),
    "device": lambda memory, endpoint: NetDevice(memory, endpoint, queue_pairs=2),
    "stepped device": lambda memory, endpoint: NetDevice(memory, endpoint, queue_pairs=2, threaded=False),
    "mailbox": lambda _m, _e: MailboxEndpoint(3),
    "fault": lambda _m, endpoint: FaultEndpoint(endpoint),
    "pcap": lambda _m, _e: PcapEndpoint(None, "/dev/null"),
    "socket": lambda _m, endpoint: VnetdpSocket(endpoint),
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
def test_what_can_t_be_made_leaves_nothing(kind: str) -> None:
    with memory_for(2) as memory, Shared(2) as endpoint:
        KINDS[kind](memory, endpoint).close()  # what is opened once for all is opened by the first of a kind
        threads = threading.active_count()
        made = None
        for more in range(100):
            with no_descriptor_leaks():
                try:
                    with descriptors(more):
                        made = KINDS[kind](memory, endpoint)
                except (OSError, EndpointError) as e:
                    assert getattr(e, "errno", errno.EMFILE) == errno.EMFILE
                    assert threading.active_count() == threads
                else:
                    made.close()
            if made is not None:
                break
        assert made is not None
        assert more > 0
        SocketEndpoint.close(endpoint)
