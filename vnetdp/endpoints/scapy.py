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

from scapy.layers import inet, inet6  # what lies in a frame is parsed only once its layers are known
from scapy.layers.l2 import Ether
from scapy.packet import Packet
from scapy.supersocket import SuperSocket

from vnetdp_kernels import layout

from ..errors import EndpointError
from ..notify import EventFd
from ..owned import Owned
from .mailbox import MailboxEndpoint

Answer = Packet | bytes | Iterable[Packet | bytes] | None

_SEND_TIMEOUT_S = 5.0


class ScapyEndpoint(MailboxEndpoint):
    """Gives each frame from the ring to *function*, as a Scapy packet, and what it returns to the ring.

    function(packet) returns None, a packet (or bytes), or several. With batch, or a true attribute `batch` of
    the function's, it is given a list of packets at once: fewer calls, but one that raises costs them all. What
    is no answer to anything is sent by `put`.
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
                packets = [Ether(frame[layout.NET_HDR_LEN :]) for frame in group]
                answers = _frames(self.function(packets if self.batch else packets[0]))
            for answer in answers:
                if not self.put(answer, queue=queue):
                    self.rows[queue, layout.EP_DROP_ERROR] += 1


def _frames(answer: Answer) -> list[bytes]:
    if answer is None:
        return []
    several = [answer] if isinstance(answer, Packet | bytes) else list(answer)
    for one in several:
        if not isinstance(one, Packet | bytes):
            raise TypeError(f"it returned {type(one).__name__}, not None, a packet, bytes, or a list of these")
    return [_frame(one) for one in several]


def _frame(packet: Packet | bytes) -> bytes:
    if isinstance(packet, inet.IP | inet6.IPv6):
        raise EndpointError(f"{packet.summary()} has no Ethernet header: put Ether()/ before it")
    return bytes(packet)


class Port(Protocol):
    """Where frames are sent and received by hand: `vnetdp.driver.Driver`, or a `SocketEndpoint`."""

    def send(self, frame: bytes) -> bool: ...
    def receive(self) -> list[bytes]: ...
    def fileno(self) -> int: ...


class SocketEndpoint(MailboxEndpoint):
    """The wire's side, for a `VnetdpSocket`: it receives what the ring gives, and sends to queue pair 0."""

    name = "socket"

    def send(self, frame: bytes) -> bool:
        """Send an Ethernet frame (no FCS); False if too many wait already."""
        return self.put(frame)

    def receive(self) -> list[bytes]:
        """Return the Ethernet frames that came off the rings since the last call, oldest first."""
        return self.take()

    def fileno(self) -> int:
        """A descriptor that is readable when `receive` has something."""
        return self.ready.fd


class VnetdpSocket(Owned, SuperSocket):
    """A Scapy socket over a `Port`: sniff(opened_socket=s), s.sr1(packet), sendp(packet, socket=s).

    Packets are Ether/..., on the guest's side (over a `Driver`) as on the wire's (over a `SocketEndpoint`).
    Whatever moves the rings has to run meanwhile. The port stays the caller's.
    """

    desc = "frames of an emulated virtio-net device"

    def __init__(self, port: Port) -> None:
        self.closed = True  # until it is whole: SuperSocket.__del__ closes
        self._port = port
        self._received: deque[bytes] = deque()
        port_fd = port.fileno()
        with ExitStack() as made:
            self._more = made.enter_context(EventFd())  # readable while frames lie in _received
            self._poll = made.enter_context(select.epoll())
            self._poll.register(port_fd, select.EPOLLIN)
            self._poll.register(self._more.fd, select.EPOLLIN)
            made.pop_all()
        self.closed = False

    @staticmethod
    def select(sockets: list[Any], remain: float | None = None) -> list[Any]:
        """Return those of *sockets* that may be read, after *remain* seconds at most: Scapy's is select(), which knows
        no descriptor above 1,023.
        """
        poll = select.poll()
        by_fd = {socket.fileno(): socket for socket in sockets}
        for fd in by_fd:
            poll.register(fd, select.POLLIN)
        ready = poll.poll(None if remain is None else max(0, math.ceil(remain * 1000)))
        return [by_fd[fd] for fd, _ in ready]

    def fileno(self) -> int:
        """A descriptor that is readable when a packet may be there."""
        return self._poll.fileno()

    def recv_raw(self, x: int = layout.FRAME_SLOT) -> tuple[type[Packet] | None, bytes | None, float | None]:
        """Return (Ether, frame, time), or Nones if there is no frame now. Never blocks."""
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
        """Send a packet, and return its bytes; EndpointError if nothing has made room for it in 5 s."""
        frame = _frame(x)
        until = time.monotonic() + _SEND_TIMEOUT_S
        while not self._port.send(frame):
            if time.monotonic() > until:
                raise EndpointError("nobody takes the packets sent: is the device running, with its driver?")
            time.sleep(0.001)
        if isinstance(x, Packet):
            x.sent_time = time.time()
        return len(frame)

    def close(self) -> None:
        if not self.closed:
            self.closed = True
            self._poll.close()
            self._more.close()
