"""Endpoints on UNIX sockets of other programs: StreamEndpoint and DgramEndpoint.

They need no right, and speak as QEMU's `-netdev stream` and `-netdev dgram` and as passt do. Kernels move the frames
(`vnetdp_kernels.wire.sock`); a thread of the endpoint connects again. The descriptor of the queue stays the same number:
each connection is put behind it, while EP_LOST keeps kernels away from it.
"""

from __future__ import annotations

import ctypes
import errno
import logging
import math
import os
import select
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from typing import Final, Protocol, runtime_checkable

from vnetdp_kernels import rows as r
from vnetdp_kernels.wire import sock as kernels

from ..errors import ConfigError, EndpointError
from ..shared.notify import EventFd
from ..system import limits
from ..system.dial import NobodyYetError, dial, why_not_there
from ..system.listener import Listener
from ..system.socket_path import check_path
from .base import Endpoint

_log = logging.getLogger("vnetdp.endpoints")

RECONNECT_S: Final = 1.0
_LONGEST_S: Final = 86_400.0
_ET: Final = select.EPOLLET
_HANG_UP: Final = select.EPOLLRDHUP | _ET
_libc = ctypes.CDLL(None, use_errno=True)


@runtime_checkable
class _Elsewhere(Protocol):
    """An owner in another process, which has its own copies of an endpoint's descriptors."""

    def renew(self, endpoint: Endpoint) -> None:
        """Put the endpoint's files behind the copies."""


class SocketBase(Endpoint):
    """The base of endpoints whose one queue is a socket, connected while EP_LOST is 0."""

    def __init__(self, name: str, queues: int) -> None:
        if queues != 1:
            raise EndpointError(f"{name}: {queues} queues: a socket has one: take one queue pair")
        super().__init__()
        self.name = name
        self.connections = 0
        """The number of peers that it was connected to so far."""
        row = self.rows[0]
        row[r.EP_GONE] = row[r.EP_BLOCKED] = 1
        row[r.EP_LOST] = r.LOST_END

    @property
    def connected(self) -> bool:
        """True while there is a peer. Without one, frames for the wire are dropped and counted (`dropped_error`)."""
        return not self.rows[0, r.EP_LOST]

    def _use(self) -> None:
        """Let the kernels have the descriptor: a peer is behind it now."""
        self.connections += 1
        row = self.rows[0]
        row[r.EP_GONE] = 0
        row[r.EP_LOST] = 0

    def _why_lost(self) -> str:
        """Return why there is no peer any more, for the log."""
        reason = int(self.rows[0, r.EP_LOST])
        if reason >= r.LOST_LENGTH:
            length = reason - r.LOST_LENGTH
            return f"the peer announced a frame of {length} bytes, and 1 to {kernels.LONGEST} can be: connection closed"
        if reason < 0 and -reason not in (errno.EPIPE, errno.ECONNRESET, errno.ECONNREFUSED, errno.ENOTCONN):
            return f"the connection broke: {os.strerror(-reason)}"
        return "the peer is gone"

    def service(self) -> int:
        """Send the frames that kernels left, for a caller of theirs other than a loop. @private"""
        if self.rows[0, r.EP_OUT_COUNT] and self.fds[0] >= 0:
            kernels.flush(self.sink(0))
        return 0

    @property
    def idle(self) -> bool:
        if self.kind != r.KIND_STREAM:
            return super().idle
        row = self.rows[0]
        first, count = int(row[r.EP_FIRST]), int(row[r.EP_COUNT])
        head = self.in_frames[0, first : first + kernels.LENGTH_LEN].tobytes()
        begun = count < kernels.LENGTH_LEN or count < kernels.LENGTH_LEN + int.from_bytes(head, "big")
        return begun and not (row[r.EP_OUT_COUNT] or row[r.EP_PENDING])

    def _hang_up(self) -> None:
        fd = int(self.fds[0])
        self.fds[0] = -1
        if fd >= 0:
            os.close(fd)

    def leave_to_parent(self) -> None:
        """Give up the socket: its peer has to see when the parent closes it. @private"""
        self._hang_up()
        super().leave_to_parent()

    def close(self) -> None:
        self._hang_up()
        super().close()


class _Reconnecting(SocketBase):
    """The base of endpoints that a thread connects again."""

    def __init__(self, name: str, queues: int, reconnect: float) -> None:
        if not 0 <= reconnect <= _LONGEST_S:
            raise EndpointError(f"{name}: reconnect {reconnect:g} is not between 0 and {_LONGEST_S:g} s")
        self.reconnect = reconnect
        """Seconds between two tries to connect; 0 = the first peer is the only one."""
        self._failures: list[str] = []
        self._said: list[str] = []  # reasons that the log has, of this loss
        self._tried = -math.inf
        self._listener: Listener | None = None
        self._thread: threading.Thread | None = None
        self._closing = False
        with ExitStack() as made:
            self._look_now = made.enter_context(EventFd())
            self._poll = made.enter_context(limits.epoll())
            self._poll.register(self._look_now.fd, select.EPOLLIN)
            super().__init__(name, queues)
            made.pop_all()

    @contextmanager
    def _opened(self) -> Iterator[None]:
        """Close the endpoint if what opens it within the block fails; a ConfigError becomes an EndpointError."""
        try:
            yield
        except BaseException as e:
            self.close()
            if isinstance(e, ConfigError):
                raise EndpointError(f"{self.name}: {e}") from e
            raise

    def _start(self, first: NobodyYetError | None) -> None:
        """Start the thread; *first*: why there is no peer yet. EndpointError if there has to be one."""
        if first is not None:
            if not self.reconnect:
                raise EndpointError(f"{self.name}: {first}: start that program first, or take reconnect=1")
            self._say(logging.WARNING, f"{first}; trying again every {self.reconnect:g} s")
        self._thread = threading.Thread(target=self._keep, name=self.name, daemon=True)
        limits.start(self._thread)

    def _keep(self) -> None:
        """Look after the connection until the endpoint is closed."""
        while not self._closing:
            timeout_s = self._look()
            self._poll.poll(-1 if timeout_s is None else timeout_s)
            self._look_now.clear()

    def _look(self) -> float | None:
        """Connect, if there is no peer and it is time to; return the seconds until the next look, None = at an event."""
        if self.connected:
            self._said.clear()
            return self._look_at_peer()
        if self._failures:
            return None
        if self.connections and not self._said:
            again = f"trying again every {self.reconnect:g} s" if self._dials else "waiting for the next one"
            self._say(logging.WARNING, f"{self._why_lost()}; {again if self.reconnect else 'no other is taken'}")
            self.errors += int(self.rows[0, r.EP_LOST]) >= r.LOST_LENGTH
            if not self.reconnect:
                self._failures.append(f"{self.name}: {self._why_lost()}")
                return None
        due_s = self._tried + self.reconnect - time.monotonic() if self._dials else 0
        if due_s > 0:
            return due_s
        self._tried = time.monotonic()
        try:
            if not self._try():
                return self.reconnect if self._dials else None
        except (NobodyYetError, ConfigError, OSError) as e:
            self._say(logging.INFO if isinstance(e, NobodyYetError) else logging.WARNING, str(e))
            return self.reconnect or RECONNECT_S
        self._said.clear()
        if self.connections > 1:
            _log.info("%s: connected to peer %d", self.name, self.connections)
        return self._look_at_peer()

    def _say(self, level: int, text: str) -> None:
        if text not in self._said:
            self._said.append(text)
            _log.log(level, "%s: %s", self.name, text)

    @property
    def _dials(self) -> bool:
        """True if a peer has to be looked for; False if it comes by itself."""
        return self._listener is None

    def _try(self) -> bool:
        """Connect to a peer if there is one; NobodyYetError or ConfigError says why there is none."""
        raise NotImplementedError

    def _look_at_peer(self) -> float | None:
        """Return the seconds until the peer has to be looked at, None if an event tells of its end."""
        return None

    @property
    def gone(self) -> bool:
        """True once its only peer, of `reconnect=0`, is gone."""
        return bool(self._failures)

    @property
    def failures(self) -> Sequence[str]:
        return self._failures

    def close(self) -> None:
        if self._thread is not None and not self.inherited:
            self._closing = True
            self._look_now.signal()
            self._thread.join()
        self._thread = None
        super().close()
        if self._listener is not None:
            self._listener.close()

    def leave_to_parent(self) -> None:
        super().leave_to_parent()
        self._poll.close()
        self._look_now.close()


class StreamEndpoint(_Reconnecting):
    """A UNIX stream socket, each frame after its length (4 bytes, big endian): QEMU's `-netdev stream`, or passt.

    - `path`: of the socket, 1 to 107 bytes.
    - `listen`: True listens there, for one peer after another; False connects to a program that listens.
    - `reconnect`: seconds between two tries to connect, as in QEMU; a peer that listens may come later. 0 takes one peer:
      EndpointError if it is not there, and once it is gone, so is the endpoint (`gone`).
    - `queues`: 1.

    Frames have no virtio_net_hdr, and so no offloads. A peer that announces a frame of 0 bytes, or of more than 65588,
    breaks the protocol: its connection is closed. Frames that a closed connection takes along count as `dropped_error`.
    EndpointError if the path can't be used.
    """

    kind = r.KIND_STREAM

    def __init__(self, path: str, listen: bool = False, reconnect: float = RECONNECT_S, queues: int = 1) -> None:
        super().__init__(f"stream:{path}", queues, reconnect)
        self._path = path
        with self._opened():
            ended, other = limits.socket_pair(socket.SOCK_STREAM)
            other.close()
            self.fds[0] = ended.detach()  # until there is a peer: its peer is gone
            first = None
            if listen:
                self._listener = Listener(path, 1)
                os.set_blocking(self._listener.fileno(), False)
                self._poll.register(self._listener.fileno(), select.EPOLLIN | _ET)
            else:
                try:
                    self._try()
                    self._tried = time.monotonic()
                except NobodyYetError as e:
                    first = e
            self._start(first)

    def _try(self) -> bool:
        if self._listener is None:
            connection = dial(self._path)
        else:
            try:
                connection = self._listener.accept()
            except (BlockingIOError, ConnectionError):
                return False
        fd = int(self.fds[0])
        with connection:
            with suppress(OSError):  # the first time, there was no connection
                self._poll.unregister(fd)
            os.dup2(connection.fileno(), fd, inheritable=False)
        self._poll.register(fd, _HANG_UP)
        for owner in list(self.polled_by.values()):
            if isinstance(owner, _Elsewhere):
                owner.renew(self)
        self._use()
        return True

    def send_to_wire(self, frame: bytes) -> None:
        """Send nothing: the frame would come between two halves of another one."""


class DgramEndpoint(_Reconnecting):
    """A UNIX datagram socket, a frame a datagram: QEMU's `-netdev dgram`.

    - `path`: of its own socket, 1 to 107 bytes.
    - `remote`: the path of the peer's. None takes the first program for the peer that sends a datagram from a socket with
      a path, and the next one once that is gone.
    - `reconnect`: seconds between two looks whether the peer is there, and tries to connect to it; 0 takes one peer.
    - `queues`: 1.

    Frames have no virtio_net_hdr, and so no offloads. A peer that takes no datagrams holds frames back in the ring.
    EndpointError if a path can't be used.
    """

    kind = r.KIND_DGRAM

    def __init__(self, path: str, remote: str | None = None, reconnect: float = RECONNECT_S, queues: int = 1) -> None:
        self._remote = remote
        self._peer: str | bytes = ""
        self._sock: socket.socket | None = None
        self._watched = False
        super().__init__(f"dgram:{path}", queues, reconnect)
        with self._opened():
            if remote is not None:
                check_path(remote, "cannot send to")
            self._listener = Listener(path, None, socket.SOCK_DGRAM)
            self.fds[0] = limits.dup(self._listener.fileno())
            self._sock = socket.socket(fileno=limits.dup(self._listener.fileno()))
            self._sock.setblocking(False)
            first = None
            if remote is not None:
                try:
                    self._try()
                except NobodyYetError as e:
                    first = e
            self._start(first)

    @property
    def _dials(self) -> bool:
        return self._remote is not None

    def _try(self) -> bool:
        peer = self._remote or self._first_sender()
        if not peer:
            return False
        try:
            self._dial(peer)
        except BaseException:
            if self._remote is None:
                self._open_sock.recv(1)  # a sender that can't be answered: the next one may be another
            raise
        self._watch(False)
        self._peer = peer
        self._use()
        return True

    @property
    def _open_sock(self) -> socket.socket:
        assert self._sock is not None
        return self._sock

    def _first_sender(self) -> str | bytes:
        """Return the address of the oldest datagram's sender; "" if there is none. One without an address is dropped."""
        self._watch(True)
        while True:
            try:
                sender: str | bytes | None = self._open_sock.recvfrom(1, socket.MSG_PEEK)[1]
                if sender:
                    return sender
                self._open_sock.recv(1)
            except BlockingIOError:
                return ""
            self.errors += 1
            self._say(logging.WARNING, "a datagram came from a socket without a path: bind it; such frames are dropped")

    def _watch(self, watched: bool) -> None:
        """Have the thread look when a datagram comes, or not."""
        if watched != self._watched:
            if watched:
                self._poll.register(self._open_sock, select.EPOLLIN | _ET)
            else:
                self._poll.unregister(self._open_sock)
            self._watched = watched

    def _dial(self, peer: str | bytes) -> None:
        try:
            self._open_sock.connect(peer)
        except (FileNotFoundError, ConnectionRefusedError) as e:
            why = "" if isinstance(peer, bytes) else why_not_there(peer)
            raise NobodyYetError(f"{why or 'no program has the socket'}: {os.fsdecode(peer)!r}") from e
        except OSError as e:
            raise ConfigError(f"cannot send to {peer!r}: {limits.of_path(os.fsdecode(peer), e)}") from e

    def _look_at_peer(self) -> float | None:
        """Find out whether the peer is there: connecting to it once more changes nothing."""
        if self.reconnect:
            try:
                self._dial(self._peer)
            except (NobodyYetError, ConfigError):
                # Without a peer the kernels find none (ENOTCONN), and the next one may send.
                _libc.connect(self._open_sock.fileno(), bytes(16), 16)
        return self.reconnect or RECONNECT_S

    def send_to_wire(self, frame: bytes) -> None:
        with suppress(OSError):
            self._open_sock.send(frame)

    def _hang_up(self) -> None:
        super()._hang_up()
        if self._sock is not None:
            self._sock.close()
