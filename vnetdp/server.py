"""A vhost-user back end: messages in, the verbs of a vhost worker out. A second way in, not a second worker.

One front end is served at a time; others wait in the socket's backlog. What a front end sends is hostile until checked:
a malformed message ends its connection, a request that can't be granted is refused (REPLY_ACK) or ends it too, and
either costs nothing but itself.
"""

from __future__ import annotations

import errno
import logging
import select
import socket
import time
from collections.abc import Callable
from typing import Self

from .backends.worker import Worker
from .endpoints.base import Endpoint
from .errors import BackendError, ConfigError, ProtocolError
from .session import Session
from .vhost_user.listener import Listener
from .vhost_user.transport import Transport
from .vrings import Served

_log = logging.getLogger("vnetdp.server")

_MESSAGE_TIMEOUT_S = 5.0  # for the rest of a message that has begun
_BACKOFF_S = (0.05, 2.0)  # first and longest wait between two attempts to connect


class Server:
    """Serves *endpoint* to one front end after another, on the Unix socket *path*.

    connect: the front end listens, and we connect, again and again; else we listen, and own the socket's file.
    features, protocol_features: what may be offered of what can be; None = all. worker: who serves the rings; None makes
    a `Worker`, with *poll_us*. inband: offer notifications as messages, which Linux takes wherever it can, and which cost
    it speed. The endpoint, and a worker that was given, stay the caller's.
    """

    def __init__(
        self,
        endpoint: Endpoint,
        path: str,
        *,
        connect: bool = False,
        queue_pairs: int = 1,
        features: int | None = None,
        protocol_features: int | None = None,
        mtu: int | None = None,
        mac: bytes = b"\x52\x54\x00\x12\x34\x56",
        poll_us: int = 0,
        worker: Served | None = None,
        inband: bool = False,
    ) -> None:
        if endpoint.queues < queue_pairs:
            raise ConfigError(f"{endpoint.name} has {endpoint.queues} queues, {queue_pairs} pairs are asked for")
        self.endpoint = endpoint
        self.path = path
        self.connect = connect
        self.features = features
        self.protocol_features = protocol_features
        self.mtu = mtu
        self.mac = mac
        self.inband = inband
        self.served = 0
        self.refused = 0
        if mtu is not None:
            endpoint.set_mtu(mtu)
        self._listener = None if connect else Listener(path, 8)
        self._own_worker: Worker | None = None
        if worker is None:
            worker = self._own_worker = Worker(queue_pairs, poll_us, "vhost-worker")
        self.worker: Served = worker

    def run(self, stop: Callable[[], bool], wake_fd: int) -> None:
        """Serve until *stop* says so; *wake_fd* is readable whenever that should be asked."""
        backoff = _BACKOFF_S[0]
        while not stop():
            transport = self._next_front_end(wake_fd)
            if transport is None:
                if self.connect:
                    _readable(wake_fd, timeout_s=backoff)
                    backoff = min(backoff * 2, _BACKOFF_S[1])
                continue
            began = time.monotonic()
            self._serve(transport, stop, wake_fd)
            if time.monotonic() - began > 1:
                backoff = _BACKOFF_S[0]

    def _next_front_end(self, wake_fd: int) -> Transport | None:
        if self._listener is not None:
            if self._listener.fileno() not in _readable(self._listener.fileno(), wake_fd):
                return None
            return Transport(self._listener.accept())
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            sock.connect(self.path)
        except OSError as e:
            sock.close()
            if e.errno not in (errno.ENOENT, errno.ECONNREFUSED, errno.EAGAIN):
                raise ConfigError(f"cannot connect to {self.path}: {e.strerror or e}") from e
            return None
        return Transport(sock)

    def _serve(self, transport: Transport, stop: Callable[[], bool], wake_fd: int) -> None:
        """Serve one front end until it leaves, breaks the rules, or we are stopped."""
        transport.sock.settimeout(_MESSAGE_TIMEOUT_S)
        session = Session(
            transport, self.worker, self.endpoint, self.features, self.mtu, self.mac, self.inband, self.protocol_features
        )  # fmt: skip
        self.worker.on_broken = session.ring_broke
        self.served += 1
        _log.info("%s: front end %d attached", self.path, self.served)
        try:
            while not stop():
                calls = session.descriptors()
                ready = _readable(transport.fileno(), wake_fd, *calls)
                for fd in ready & set(calls):
                    session.on_readable(fd)
                if transport.fileno() in ready and not session.handle_one():
                    _log.info("%s: front end %d left", self.path, self.served)
                    return
        except (ProtocolError, BackendError) as e:
            self.refused += 1
            _log.warning("%s: refused: %s; the connection is closed", self.path, e)
        except OSError as e:
            _log.warning("%s: the connection broke: %s", self.path, e)
        finally:
            self.worker.on_broken = None
            session.close()
            transport.close()

    def close(self) -> None:
        """Stop the worker, and remove the socket if it is ours."""
        if self._own_worker is not None:
            self._own_worker.close()
        if self._listener is not None:
            self._listener.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def _readable(*fds: int, timeout_s: float | None = None) -> set[int]:
    """Wait until some of *fds* are readable, or broken, and return those. Not select: numbers may pass 1023."""
    poll = select.poll()
    for fd in fds:
        poll.register(fd, select.POLLIN)
    return {fd for fd, _ in poll.poll(None if timeout_s is None else timeout_s * 1000)}
