"""Scapy on either side of the rings: an endpoint that asks a callable, and sockets for sniff() and sr1().

Scapy costs tens of microseconds a packet: it meets frames in batches, outside the kernels. Importing this file
imports Scapy, so it is imported only where it is needed.
"""

from __future__ import annotations

import math
import select
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from typing import Any, Protocol

from scapy.layers import inet, inet6  # Scapy parses only the layers that are imported
from scapy.layers.l2 import Ether
from scapy.packet import Packet
from scapy.supersocket import SuperSocket

from vnetdp_kernels import rows as r
from vnetdp_kernels import spec

from ..errors import EndpointError
from ..shared.notify import EventFd
from ..system import limits
from ..system.owned import Owned
from .mailbox import MailboxEndpoint

Answer = Packet | bytes | Iterable[Packet | bytes] | None

_SEND_TIMEOUT_S = 5.0


class ScapyEndpoint(MailboxEndpoint):
    """A Python function on the wire: it gets each frame from the ring as a Scapy packet, and answers it.

    - `function`: called with an `Ether`; returns None, a packet, bytes, or an iterable of packets and bytes to send.
    - `batch`: True calls it with a list of packets, which takes fewer calls, but an exception then drops all of them.
      None asks the function's attribute `batch`; without one it is False.
    - `limit`: frames kept, as in `MailboxEndpoint`.

    Frames that answer none are sent by `put`.
    """

    name = "scapy"

    def __init__(
        self, function: Callable[[Any], Answer], queues: int = 1, batch: bool | None = None, limit: int = 4096
    ) -> None:
        super().__init__(queues, limit)
        self.function = function
        self.batch = bool(getattr(function, "batch", False)) if batch is None else batch

    @property
    def gives(self) -> bool:
        return False  # it answers

    def transmit_frames(self, queue: int, frames: Sequence[bytes]) -> None:
        groups: list[Sequence[bytes]] = [frames] if self.batch else [[frame] for frame in frames]
        for group in groups:
            answers: list[bytes] = []
            with self._guarded(queue, len(group)):  # it may cost its own packets only
                packets = [Ether(frame[spec.NET_HDR_LEN :]) for frame in group]
                answers = _frames(self.function(packets if self.batch else packets[0]))
            for answer in answers:
                if not self.put(answer, queue=queue):
                    self.rows[queue, r.EP_DROP_ERROR] += 1


def _frames(answer: Answer) -> list[bytes]:
    if answer is None:
        return []
    several = [answer] if isinstance(answer, Packet | bytes) else list(answer)
    for one in several:
        if not isinstance(one, Packet | bytes):
            raise TypeError(
                f"the function returned {type(one).__name__}, not None, a packet, bytes, or a list of these"
            )
    return [_frame(one) for one in several]


def _frame(packet: Packet | bytes) -> bytes:
    if isinstance(packet, inet.IP | inet6.IPv6):
        raise EndpointError(f"{packet.summary()} has no Ethernet header: put Ether()/ before it")
    return bytes(packet)


class Port(Protocol):
    """Where frames are sent and received by hand: `vnetdp.guest.driver.Driver`, or a `SocketEndpoint`."""

    def send(self, frame: bytes) -> bool: ...
    def receive(self) -> list[bytes]: ...
    def fileno(self) -> int: ...


class SocketEndpoint(MailboxEndpoint):
    """A mailbox at the wire's side, for a `VnetdpSocket`. It sends on queue pair 0."""

    name = "socket"

    def send(self, frame: bytes) -> bool:
        """Send an Ethernet frame (no FCS, no virtio_net_hdr) on queue pair 0; False if `limit` frames wait already."""
        return self.put(frame)

    def receive(self) -> list[bytes]:
        """Return the Ethernet frames (no FCS, no virtio_net_hdr) that came off the rings, oldest first; maybe none."""
        return self.take()

    def fileno(self) -> int:
        """Return a descriptor that is readable while frames wait for `receive`, for select() and poll()."""
        return self.ready.fileno()


class VnetdpSocket(Owned, SuperSocket):
    """A Scapy socket: `sniff(opened_socket=s)`, `s.sr1(packet)`, `sendp(packet, socket=s)`. Packets begin with `Ether`.

    `port`: a `Driver`, to be the guest, or a `SocketEndpoint`, to be on the wire. Device and driver have to run
    meanwhile. The port stays the caller's.
    """

    desc = "frames of an emulated virtio-net device"

    def __init__(self, port: Port) -> None:
        self.closed = True  # until it is whole: SuperSocket.__del__ closes
        self._port = port
        self._received: deque[bytes] = deque()
        port_fd = port.fileno()
        with ExitStack() as made:
            self._more = made.enter_context(EventFd())  # readable while frames lie in _received
            self._poll = made.enter_context(limits.epoll())
            self._poll.register(port_fd, select.EPOLLIN)
            self._poll.register(self._more.fd, select.EPOLLIN)
            made.pop_all()
        self.closed = False

    @staticmethod
    def select(sockets: list[Any], remain: float | None = None) -> list[Any]:
        """Return the readable ones of *sockets*, after *remain* seconds at most; None waits without end.

        It uses poll(): select(), which Scapy would use, takes no descriptor above 1023.
        """
        poll = select.poll()
        by_fd = {socket.fileno(): socket for socket in sockets}
        for fd in by_fd:
            poll.register(fd, select.POLLIN)
        ready = poll.poll(None if remain is None else max(0, math.ceil(remain * 1000)))
        return [by_fd[fd] for fd, _ in ready]

    def fileno(self) -> int:
        """Return a descriptor that is readable while packets wait, for select() and poll()."""
        return self._poll.fileno()

    def recv_raw(self, x: int = r.FRAME_SLOT) -> tuple[type[Packet] | None, bytes | None, float | None]:
        """Return (Ether, *x* bytes of a frame at most, time.time()), or (None, None, None) if none waits. Never blocks."""
        if not self._received:
            self._received.extend(self._port.receive())
        if not self._received:
            return None, None, None
        frame = self._received.popleft()
        if self._received:
            self._more.signal()
        else:
            self._more.clear()
        return Ether, frame[:x], time.time()

    def send(self, x: Packet | bytes) -> int:
        """Send a packet, and return its length in bytes; EndpointError if the port had no room for 5 s."""
        frame = _frame(x)
        until = time.monotonic() + _SEND_TIMEOUT_S
        while not self._port.send(frame):
            if time.monotonic() > until:
                raise EndpointError(
                    f"the ring took no packet for {_SEND_TIMEOUT_S:g} s: start the device and its driver"
                )
            time.sleep(0.001)
        if isinstance(x, Packet):
            x.sent_time = time.time()
        return len(frame)

    def close(self) -> None:
        if not self.closed:
            self.closed = True
            self._poll.close()
            self._more.close()
