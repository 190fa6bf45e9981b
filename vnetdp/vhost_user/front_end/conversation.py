"""A front end's conversation with one back end: requests out, their answers in, one at a time, from any thread."""

from __future__ import annotations

import errno
import select
import socket
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import TypeVar

from ...errors import BackendError, LocalProtocolError, RemoteProtocolError
from ...system.owned import Owned, OwnedLock
from ...system.poll import HasFileno, readable
from ..connection import FrontEndConnection
from ..message import U64, Payload, ProtocolFeature, Request
from ..transport import Transport, close_fds

P = TypeVar("P", bound=Payload)

_SLICE_S = 0.02  # how often a wait asks whether it shall stop
_LETS_GO_S = 1.0  # how long a back end that was left may take to close its end


def never() -> bool:
    """Say that nothing is to be stopped."""
    return False


def wait_readable(file: HasFileno | int, until: float, stop: Callable[[], bool] = never) -> bool:
    """Wait for *file*, until time.monotonic() is *until* or *stop* says so; True if it is readable, or broken."""
    while not stop():
        left = until - time.monotonic()
        if readable(file, max(0.0, min(left, _SLICE_S))):
            return True
        if left <= 0:
            break
    return False


class Conversation(Owned):
    """The front end's end of a connection; *sock* becomes its own.

    until: when the handshake has to be over (time.monotonic()), or *stop* says so; `established` ends it, and gives each
    answer from then on *timeout_s*. Any error ends the conversation.
    """

    def __init__(self, sock: socket.socket, until: float, stop: Callable[[], bool], timeout_s: float) -> None:
        self.connection = FrontEndConnection()
        self._transport = Transport(sock)
        self._timeout_s = timeout_s
        self._handshake: tuple[float, Callable[[], bool]] | None = (until, stop)
        self._lock = OwnedLock(self)
        self._left_until: float | None = None  # we have left, and until when to wait for the other to do so
        self._gone = False
        self.hung = False  # no answer came in time
        sock.settimeout(min(timeout_s, max(until - time.monotonic(), _SLICE_S)))

    def established(self) -> None:
        self._handshake = None
        self._transport.sock.settimeout(self._timeout_s)

    def has(self, feature: ProtocolFeature) -> bool:
        return self.connection.has(feature)

    def exchange(
        self, request: Request, payload: Payload | None, fds: Iterable[int]
    ) -> tuple[Payload | None, tuple[int, ...]]:
        """Send a request; return its answer, None if there is none, and the descriptors that came with it.

        BackendError: ESRCH if the back end is gone, ETIMEDOUT if it keeps silent, EPROTO if it breaks the protocol.
        """
        with self._lock:
            if self._left_until is not None:
                raise BackendError(request.name, errno.ESRCH, None, "the back end is gone")
            fds = list(fds)
            try:
                data, answered = self.connection.send(request, payload, len(fds))
            except LocalProtocolError as e:
                raise BackendError(request.name, errno.EOPNOTSUPP, None, str(e)) from e
            began = time.monotonic()
            try:
                self._transport.send(data, fds)
                if not answered:
                    return None, ()
                until, stop = self._handshake or (began + self._timeout_s, never)
                if not wait_readable(self._transport, until, stop):
                    raise TimeoutError
                got = self._transport.receive()
            except TimeoutError as e:
                self.hung = True
                self.leave()
                waited = time.monotonic() - began
                raise BackendError(
                    request.name, errno.ETIMEDOUT, None, f"no answer from the back end for {waited:.1f} s"
                ) from e
            except OSError as e:
                self.leave()
                raise BackendError(request.name, errno.ESRCH, None, f"the back end is gone: {e}") from e
            except RemoteProtocolError as e:
                self.leave()
                raise BackendError(request.name, errno.EPROTO, None, str(e)) from e
            if got is None:
                self.leave()
                raise BackendError(request.name, errno.ESRCH, None, "the back end closed the connection")
            header, content, got_fds = got
            try:
                return self.connection.receive(request, header, content), got_fds
            except RemoteProtocolError as e:
                close_fds(got_fds)
                self.leave()
                raise BackendError(request.name, errno.EPROTO, None, str(e)) from e

    def send(self, request: Request, payload: Payload | None = None, fds: Iterable[int] = ()) -> None:
        """Send a request; BackendError as `exchange`, and EINVAL if the back end refuses it."""
        answer, got_fds = self.exchange(request, payload, fds)
        close_fds(got_fds)
        if isinstance(answer, U64) and answer.value:
            raise BackendError(request.name, errno.EINVAL, None, "the back end refuses the request")

    def ask(self, request: Request, kind: type[P], payload: Payload | None = None) -> P:
        """Send a request and return its answer; BackendError as `exchange`."""
        answer, got_fds = self.exchange(request, payload, ())
        close_fds(got_fds)
        if not isinstance(answer, kind):
            raise BackendError(request.name, errno.EPROTO, None, f"the answer is no {kind.__name__}")
        return answer

    def fileno(self) -> int:
        return self._transport.fileno()

    @property
    def open(self) -> bool:
        """False once either side has left."""
        with self._lock:
            if self._left_until is not None:
                return False
            poll = select.poll()
            poll.register(self._transport.fileno(), select.POLLRDHUP)
            return not poll.poll(0)

    def leave(self) -> None:
        """Say no more. The rings that the back end has are not stopped by this, but by its noticing: see `gone`."""
        with self._lock:
            if self._left_until is None:
                self._left_until = time.monotonic() + _LETS_GO_S
                with suppress(OSError):
                    self._transport.sock.shutdown(socket.SHUT_WR)

    def gone(self) -> bool:
        """True once a back end that was left has closed its end, or died: then it has no ring any more.

        The first calls wait for it a little. A back end that hangs does neither.
        """
        with self._lock:
            while not self._gone and self._left_until is not None:
                if not wait_readable(self._transport, self._left_until):
                    break
                try:
                    self._gone = not self._transport.sock.recv(4096)  # an answer that came too late is thrown away
                except OSError:
                    self._gone = True
            return self._gone

    def close(self) -> None:
        """Leave, without waiting for the back end to close its end."""
        with self._lock:
            self.leave()
            self._gone = True
            self._transport.close()
