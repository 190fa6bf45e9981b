"""A vhost-user back end: messages in, the verbs of a vhost worker out. A second way in, not a second worker.

One front end is served at a time; others wait in the socket's backlog. A front end's message is hostile until checked:
a malformed message ends its connection, a request that can't be granted is refused (REPLY_ACK) or ends it too, and
either costs nothing but itself.
"""

from __future__ import annotations

import logging
import select
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

from vnetdp_kernels import rows as r

from ...backends.faulty import Faults
from ...backends.worker import Worker
from ...endpoints.base import Endpoint
from ...errors import BackendError, ConfigError, ProtocolError, VnetdpError, reason
from ...shared.notify import EventFd
from ...system.dial import NobodyYetError, dial
from ...system.listener import Listener
from ...system.owned import Owned
from ...virtio.queue import VRINGS, queues_of
from ...virtio.state import DEFAULT_MAC
from ..message import MAX_VRINGS, ProtocolFeature
from ..transport import Transport
from .session import USUAL_PROTOCOL_FEATURES, Session
from .visit import Visit, ready_of
from .vrings import Served

_log = logging.getLogger("vnetdp.server")

_MESSAGE_TIMEOUT_S = 5.0  # for the rest of a message that has begun
_BACKOFF_S = (0.05, 2.0)  # first and longest wait after an attempt that came to nothing
_ANSWER_S = 1.0  # until the log says that a front end is awaited, and why
_ENDPOINT_S = 0.25  # between two looks whether a TAP is still there, of which no descriptor tells by itself
_SHORT_S = 1.0  # a session that ends sooner came to nothing too


def check_queue_pairs(queue_pairs: int) -> None:
    """Raise ConfigError for more queue pairs than a vhost-user device can have."""
    if queues_of(queue_pairs) > MAX_VRINGS:
        raise ConfigError(f"{queue_pairs} queue pairs: vhost-user has 1 to {MAX_VRINGS // VRINGS}")


class _Faulty:
    """A worker whose verbs fail as *faults* say."""

    def __init__(self, worker: Served, faults: Faults) -> None:
        self.loop_thread = worker.loop_thread
        self.datapath = worker.datapath
        self.backends = faults.wrap(worker)


class Server(Owned):
    """A vhost-user back end: it serves *endpoint* to one front end after another, on the Unix socket *path*.

    - `connect`: True connects to a front end that listens, again and again; False listens, and owns the socket's file.
    - `queue_pairs`: 1 to 128, at most the endpoint's queues.
    - `features`: feature bits that may be offered; None offers all that can be.
    - `protocol_features`: `ProtocolFeature` bits that may be offered. None offers all but DEVICE_STATE: QEMU migrates a
      guest that has it only to a back end that has it, too.
    - `mtu`, `mac`: as in `NetDevice`.
    - `worker`: internal; None makes a `Worker`, with `poll_us` and, as its `timeout_s`, `worker_timeout_s`.
    - `inband`: True offers notifications as messages. Linux takes them wherever it can, and is slower then.
    - `faults`: verbs of the worker that are to fail, for tests. The request that a verb is a part of is then refused.

    ConfigError if *path* can't be listened on or an argument cannot be. The endpoint stays the caller's.
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
        mac: bytes = DEFAULT_MAC,
        poll_us: int = 0,
        worker: Served | None = None,
        inband: bool = False,
        worker_timeout_s: float = 10.0,
        faults: Faults | None = None,
    ) -> None:
        if endpoint.queues < queue_pairs:
            raise ConfigError(f"{endpoint.name} has {endpoint.queues} queues, {queue_pairs} pairs are asked for")
        check_queue_pairs(queue_pairs)
        self.endpoint = endpoint
        self.path = path
        self.connect = connect
        self.features = features
        self.protocol_features = protocol_features
        self.mtu = mtu
        self.mac = mac
        self.inband = inband
        self.faults = faults
        self.served = 0
        """The number of front ends served so far, the present one included."""
        self.refused = 0
        """The number of front ends that were hung up on since they broke the protocol."""
        if mtu is not None:
            endpoint.set_mtu(mtu)
        self._own_worker: Worker | None = None
        self._queue_pairs = queue_pairs
        self._poll_us = poll_us
        self._worker_timeout_s = worker_timeout_s
        with ExitStack() as made:
            self._listener = None if connect else Listener(path, 8)
            if self._listener is not None:
                made.callback(self._listener.close)
            self._worker_ended = made.enter_context(EventFd())
            if worker is None:
                worker = self._own_worker = self._make_worker()
            made.pop_all()
        self.worker: Served = worker

    def _make_worker(self) -> Worker:
        return Worker(self._queue_pairs, self._poll_us, "vhost-worker", self._worker_timeout_s)

    def _renew_worker(self) -> None:
        """Put another in the place of a worker that ended by itself; VnetdpError if it was not ours to make."""
        error = self.worker.loop_thread.error
        if error is None:
            return
        if self._own_worker is None:
            raise VnetdpError(f"{self.path}: the worker has ended: {reason(error)}")
        before, self._own_worker = self._own_worker, self._make_worker()
        self.worker = self._own_worker
        before.close()

    def run(self, stop: Callable[[], bool], wake_fd: int, say: Callable[[str], None] | None = None) -> None:
        """Serve, in this thread, until *stop* returns True. It is asked whenever *wake_fd* is readable.

        `say`: with `connect`, it is called with one line for each reason that there is no front end, and for each front
        end; None logs them. ConfigError if no front end was served, and waiting for one at *path* is of no use.
        """
        self.check_maker()
        backoff = _BACKOFF_S[0]
        said, serving, alone_since = "", False, time.monotonic()
        while not stop():
            began = time.monotonic()
            failed = False
            try:
                self._renew_worker()
                transport = self._accept(wake_fd) if self._listener is not None else Transport(dial(self.path))
                if transport is not None:
                    if self.connect and not serving:
                        (say or _log.info)(f"serving {self.endpoint.name} to {self.path}")
                    said, serving = "", True
                    self._serve(transport, stop, wake_fd)
                    alone_since = time.monotonic()
            except (NobodyYetError, ConfigError, OSError) as e:
                if isinstance(e, ConfigError) and not (self.connect and self.served):
                    raise
                failed = True
                patient = isinstance(e, NobodyYetError) and time.monotonic() - alone_since < _ANSWER_S
                if not patient and str(e) != said:
                    said, serving = str(e), False
                    (say or _log.warning)(f"{self.path}: no front end: {said}; trying again")
            if failed or (self.connect and time.monotonic() - began < _SHORT_S):
                ready_of({wake_fd: select.POLLIN}, backoff)
                backoff = min(backoff * 2, _BACKOFF_S[1])
            else:
                backoff = _BACKOFF_S[0]

    def _patience_s(self, visit: Visit | None = None) -> float | None:
        """Return how long to wait before the next look at the endpoint, or at a visit; None = as long as it takes.

        The endpoint says by itself that it is gone. A guest keeps its card, and may be shut down in its own time.
        """
        looks = [] if visit is None or visit.patience_s is None else [visit.patience_s]
        if r.KIND_TAP <= self.endpoint.innermost.kind < r.KIND_PYTHON and not self.endpoint.gone:
            looks.append(_ENDPOINT_S)
        return min(looks, default=None)

    def _accept(self, wake_fd: int) -> Transport | None:
        """Wait for a front end; None if *wake_fd* became readable."""
        assert self._listener is not None
        events = dict.fromkeys((self._listener.fileno(), wake_fd), select.POLLIN)
        if self._listener.fileno() not in ready_of(events, self._patience_s()):
            return None
        return Transport(self._listener.accept())

    def _serve(self, transport: Transport, stop: Callable[[], bool], wake_fd: int) -> None:
        """Serve one front end until it leaves, breaks the rules, or we are stopped."""
        transport.sock.settimeout(_MESSAGE_TIMEOUT_S)
        usual = USUAL_PROTOCOL_FEATURES if self.protocol_features is None else ProtocolFeature(self.protocol_features)
        offer = usual | (ProtocolFeature.INBAND_NOTIFICATIONS if self.inband else 0)
        worker = self.worker if self.faults is None else _Faulty(self.worker, self.faults)
        session = Session(transport, worker, self.endpoint, self.features, self.mtu, self.mac, offer)
        self._worker_ended.clear()
        forget = self.worker.loop_thread.listeners.add(session.ring_broke, self._worker_ended.signal)
        visit = Visit(transport.sock, self.worker, self._listener)
        try:
            while not stop():
                if self._worker_has_ended():
                    return
                events = dict.fromkeys((transport.fileno(), wake_fd, self._worker_ended.fd), select.POLLIN)
                ready = ready_of(events | session.descriptors() | visit.descriptors(), self._patience_s(visit))
                session.look_at(ready)
                if transport.fileno() not in ready:
                    if (in_vain := visit.in_vain(ready)) is not None:
                        _log.warning("%s: %s; the connection is closed", self.path, in_vain)
                        return
                    continue
                if not visit.spoke:
                    if not transport.sock.recv(1, socket.MSG_PEEK):
                        return  # a program that only probes the socket is no front end
                    self.served += 1
                    _log.info("%s: front end %d attached", self.path, self.served)
                visit.speaks()
                if not session.handle_one():
                    _log.info("%s: front end %d closed the connection", self.path, self.served)
                    return
        except (ProtocolError, BackendError) as e:
            if self._worker_has_ended():
                return  # it ended while a request was handled, which is no fault of the front end's
            self.refused += 1
            _log.warning("%s: refused: %s; the connection is closed", self.path, e)
        except OSError as e:
            _log.warning("%s: the connection broke: %s", self.path, e)
        finally:
            forget()
            visit.close()
            with self._unarmed():
                session.close()
            transport.close()

    @contextmanager
    def _unarmed(self) -> Iterator[None]:
        """Have no fault strike for the length of the block: the next session needs the rings that this one gives back."""
        if self.faults is None:
            yield
            return
        armed, self.faults.armed = self.faults.armed, False
        try:
            yield
        finally:
            self.faults.armed = armed

    def _worker_has_ended(self) -> bool:
        """Say so if the worker has ended: no ring moves any more.

        The front end may come back: the next worker goes on with the rings where they are.
        """
        error = self.worker.loop_thread.error
        if error is not None:
            _log.error("%s: the worker has ended: %s; the connection is closed", self.path, reason(error))
        return error is not None

    def close(self) -> None:
        """Stop the worker, and remove the socket's file if the server made it."""
        if self._own_worker is not None:
            self._own_worker.close()
        self._worker_ended.close()
        if self._listener is not None:
            self._listener.close()
