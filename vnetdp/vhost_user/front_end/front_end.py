"""VhostUserFrontEnd: a remote back end, as the backends that a device can hand its rings to."""

from __future__ import annotations

import errno
import logging
import os
import select
import socket
import struct
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import NamedTuple, TypeVar

from ...datapath.loop_thread import Listeners
from ...errors import BackendError, ConfigError, RemoteProtocolError, RequestRefused
from ...shared.memory import GuestMemory
from ...system.dial import NobodyYetError, dial
from ...system.listener import Listener
from ...system.owned import Owned
from ...virtio import features as f
from ...virtio.queue import VRINGS, queues_of
from ..inflight import InflightArea
from ..message import MAX_VRINGS, U64, BackendRequest, Config, Inflight, Payload, ProtocolFeature, Request
from ..transport import close_fds
from . import device_state
from .backend_requests import BackendRequests
from .conversation import Conversation, never, wait_readable
from .hang_up import HangUp
from .pair import VhostUserBackend

_NET_CONFIG = struct.Struct("<6sHHH")

_log = logging.getLogger("vnetdp.vhost_user")

P = TypeVar("P", bound=Payload)

_F = ProtocolFeature
_WANTED = (
    _F.MQ | _F.LOG_SHMFD | _F.RARP | _F.REPLY_ACK | _F.MTU | _F.INFLIGHT_SHMFD | _F.CONFIG | _F.STATUS | _F.RESET_DEVICE
    | _F.CONFIGURE_MEM_SLOTS | _F.DEVICE_STATE
)  # fmt: skip
MAX_QUEUE_PAIRS = MAX_VRINGS // VRINGS


class NetConfig(NamedTuple):
    """The configuration space of a network device, as a back end tells it (Virtio 1.2, 5.1.4)."""

    mac: bytes
    """The card's address, 6 bytes."""
    status: int
    """VIRTIO_NET_S_* bits: 1 link up, 2 announce."""
    max_virtqueue_pairs: int
    """The most queue pairs that a driver may use."""
    mtu: int
    """The MTU in bytes; 0 if there is none."""


class VhostUserFrontEnd(Owned):
    """A vhost-user front end: the connection to a remote back end. After `connect`, give it to `NetDevice`.

    - `path`: of the Unix socket.
    - `queue_pairs`: 1 to 128.
    - `listen`: True makes the socket and has the back end connect; False connects to it.
    - `queue_size`: descriptors of the largest queue, for the inflight area.
    - `timeout_s`: seconds to wait for each answer.
    - `watched`: True offers BACKEND_REQ: the back end may ask by itself, and a `Watch` answers.
    - `inband`: True takes the back end's calls as messages, if it offers that, in place of eventfds. Needs `watched`.

    If the back end dies, the device takes its rings back by itself; `connect` again for the next one, or use a `Watch`.
    ConfigError if *path* can't be listened on.
    """

    def __init__(
        self,
        path: str,
        queue_pairs: int = 1,
        *,
        listen: bool = False,
        queue_size: int = 256,
        timeout_s: float = 10.0,
        watched: bool = False,
        inband: bool = False,
    ) -> None:
        if not 1 <= queue_pairs <= MAX_QUEUE_PAIRS:
            raise ConfigError(f"{queue_pairs} queue pairs: vhost-user has 1 to {MAX_QUEUE_PAIRS}")
        self.path = path
        """The path of the socket."""
        self.queue_pairs = queue_pairs
        self.queue_size = queue_size
        self.timeout_s = timeout_s
        self._wanted = _WANTED
        if watched:
            self._wanted |= _F.BACKEND_REQ | (_F.INBAND_NOTIFICATIONS if inband else _F(0))
        self.features = 0
        """The feature bits that the back end offers, once `connect` returned True: `NetDevice(offered=…)`."""
        self.config: NetConfig | None = None
        """The back end's configuration space, once `connect` returned True; None if it tells none."""
        self.memory: GuestMemory | None = None
        self.connections = 0
        """The number of back ends that were connected to so far."""
        self.trouble = ""
        """Why `connect` has found no back end, or takes long, in one line."""
        self.silent = False  # there is one, and it does not answer
        self._conversation: Conversation | None = None
        self.listeners = Listeners()
        self._hang_up_thread: HangUp | None = None
        self._requests: BackendRequests | None = None
        self._inflight: tuple[Inflight, int] | None = None
        self._inflight_is_over = False  # another owner went on from it, and did not keep it up to date
        self._status = 0
        self._listener = Listener(path, 1) if listen else None
        self.backends = [VhostUserBackend(self, pair) for pair in range(queue_pairs)]
        """A `Backend` for each queue pair."""

    # --- the connection ---

    def connect(self, timeout_s: float, stop: Callable[[], bool] = never) -> bool:
        """Connect to the back end, within *timeout_s* seconds and until *stop* returns True. False if there is none yet.

        `trouble` then says why. BackendError or ConfigError if the back end can't be worked with, or waiting is of no
        use.
        """
        self.check_maker()
        until = time.monotonic() + timeout_s
        self.disconnect()
        if self._has_rings and not self.gone:
            self.trouble = "the previous back end hangs, and may still use the rings"
            return False  # it hangs, and may go on with the rings that another one would get
        self._hang_up()
        self.silent = False
        if self._listener is not None:
            self.trouble = "no back end has connected"
        try:
            sock = self._accept(until, stop) if self._listener is not None else dial(self.path)
        except NobodyYetError as e:
            self.trouble = str(e)
            self.silent = isinstance(e.__cause__, OSError) and e.__cause__.errno == errno.EAGAIN  # its backlog is full
            return False
        self.silent, self.trouble = True, "the back end does not answer: it serves another front end, or hangs"
        conversation = Conversation(sock, until, stop, self.timeout_s)
        try:
            self._shake_hands(conversation)
        except (BackendError, ConfigError) as e:
            conversation.close()
            self._hang_up()
            if not isinstance(e, BackendError) or e.errno not in (errno.ESRCH, errno.ETIMEDOUT):
                raise
            if e.errno == errno.ESRCH:  # a back end that is just dying takes a connection, too
                self.trouble, self.silent = "the back end closed the connection", False
            return False
        conversation.established()
        for backend in self.backends:
            backend.forget()
        self._status = 0
        self.memory = None
        self.trouble, self.silent = "", False
        self._conversation = conversation
        self._hang_up_thread = HangUp(conversation.fileno(), self.listeners.tell_gone)
        self.connections += 1
        return True

    def _accept(self, until: float, stop: Callable[[], bool]) -> socket.socket:
        assert self._listener is not None
        if not wait_readable(self._listener, until, stop):
            raise NobodyYetError(self.trouble)
        return self._listener.accept()

    def _shake_hands(self, conversation: Conversation) -> None:
        conn = conversation.connection
        conversation.send(Request.SET_OWNER)
        self.features = conn.offered_features = conversation.ask(Request.GET_FEATURES, U64).value
        if self.features & f.VHOST_USER_F_PROTOCOL_FEATURES:
            offered = conversation.ask(Request.GET_PROTOCOL_FEATURES, U64).value
            wanted = self._wanted & offered
            if not (wanted & _F.BACKEND_REQ and wanted & _F.REPLY_ACK):
                wanted &= ~_F.INBAND_NOTIFICATIONS
            conversation.send(Request.SET_PROTOCOL_FEATURES, U64(int(wanted)))
            conn.protocol_features = wanted
        limit = conversation.ask(Request.GET_QUEUE_NUM, U64).value if conn.has(_F.MQ) else 1
        if limit < self.queue_pairs:
            raise ConfigError(
                f"{self.path}: the back end has {limit} queue pairs, and {self.queue_pairs} are asked for: ask for {limit}"
            )
        self.config = _ask_config(conversation)
        if conn.has(_F.BACKEND_REQ):
            self._requests = BackendRequests()
            conversation.send(Request.SET_BACKEND_REQ_FD, None, [self._requests.theirs.fileno()])
            self._requests.theirs.close()
        if self._inflight_is_over:
            self._close_inflight()
        if conn.has(_F.INFLIGHT_SHMFD):
            self._share_inflight(conversation)

    @property
    def connected(self) -> bool:
        """True while there is a connection."""
        conversation = self._conversation
        return conversation is not None and conversation.open

    @property
    def hung(self) -> bool:
        """True if the connection was closed since the back end did not answer, and there is no other yet."""
        return self._conversation is not None and self._conversation.hung

    @property
    def listening(self) -> bool:
        """True if the back end connects to the socket (`listen`)."""
        return self._listener is not None

    @property
    def _has_rings(self) -> bool:
        return any(backend.bound for backend in self.backends)

    @property
    def gone(self) -> bool:
        """True if no back end can have a ring: there was none, or the last one has closed its end, or died."""
        return self._conversation is None or self._conversation.gone()

    def wait(self, wake_fd: int, timeout_s: float | None = None) -> bool:
        """Wait until the back end asks something, which is True, or has gone, *wake_fd* is readable, or time is up.

        @private
        """
        conversation, requests = self._conversation, self._requests
        poll = select.poll()
        poll.register(wake_fd, select.POLLIN)
        if conversation is not None:
            poll.register(conversation.fileno(), select.POLLRDHUP)
        if requests is not None:
            poll.register(requests.fileno(), select.POLLIN)
        ready = {fd for fd, _ in poll.poll(None if timeout_s is None else timeout_s * 1000)}
        return requests is not None and requests.fileno() in ready

    def take_request(self) -> tuple[BackendRequest, Payload] | None:
        """Return the back end's request (see `wait`); None if it is not known here. Disconnect if it is no message.

        @private
        """
        try:
            return self._requests.take() if self._requests is not None else None
        except EOFError:
            self._close_requests()
            return None
        except RemoteProtocolError as e:
            _log.warning("%s: %s; the connection is closed", self.path, e)
            self.disconnect()
            return None

    def disconnect(self) -> None:
        """Close the connection. The back end stops its rings once it notices that: then `gone` is True."""
        if self._conversation is not None:
            self._conversation.leave()

    def _hang_up(self) -> None:
        if self._hang_up_thread is not None:
            self._hang_up_thread.stop()
            self._hang_up_thread = None
        if self._conversation is not None:
            self._conversation.close()
            self._conversation = None
        self._close_requests()

    def _close_requests(self) -> None:
        if self._requests is not None:
            self._requests.close()
            self._requests = None

    def close(self) -> None:
        """Disconnect, and give up socket and inflight area. A device whose rings the back end has goes on in userspace."""
        if self._listener is not None:
            # First of all: a back end that is left would come straight back.
            self._listener.close()
        if self.inherited:
            return  # the connection is its parent's
        self.disconnect()
        if self._conversation is not None and self._has_rings:
            self._conversation.gone()
            self.listeners.tell_gone()
        self._hang_up()
        self._close_inflight()

    # --- the inflight area ---

    def _share_inflight(self, conversation: Conversation) -> None:
        """Give the back end the inflight area that its predecessor made, or get one from it."""
        if self._inflight is not None:
            said, fd = self._inflight
            conversation.send(Request.SET_INFLIGHT_FD, said, [fd])
            return
        num = queues_of(self.queue_pairs)
        answer, fds = conversation.exchange(Request.GET_INFLIGHT_FD, Inflight(0, 0, num, self.queue_size), ())
        if isinstance(answer, Inflight) and answer.size and len(fds) == 1:
            self._inflight = (answer, fds[0])
            conversation.send(Request.SET_INFLIGHT_FD, answer, [fds[0]])
        else:
            close_fds(fds)

    def recover(self, n: int, num: int, avail: int, used: int, other_used: int | None) -> int | None:
        """Return the index where a lost back end stopped ring *n*, completing work cut off; None = not known.

        avail, used: guest addresses of its rings; other_used: of the used ring of its pair's other one. An owner that
        goes on from there does not keep the area, so the next back end is not given it. @private
        """
        if self._inflight is None or self.memory is None:
            return None
        self._inflight_is_over = True
        said, fd = self._inflight
        fd = os.dup(fd)
        try:
            area = InflightArea.attach(said, fd, queues_of(self.queue_pairs))
            with GuestMemory(self.memory.regions, foreign=True, beside=area.region()) as memory:
                return area.recover(n, memory, num, avail, used, other_used)
        except (RequestRefused, ConfigError, OSError) as e:
            _log.warning("%s: the inflight area of the lost back end can't be used: %s", self.path, e)
            return None
        finally:
            os.close(fd)

    def _close_inflight(self) -> None:
        inflight, self._inflight = self._inflight, None
        if inflight is not None:
            os.close(inflight[1])
        self._inflight_is_over = False

    # --- messages ---

    def has(self, feature: ProtocolFeature) -> bool:
        return self._conversation is not None and self._conversation.has(feature)

    def _talk(self, request: Request) -> Conversation:
        conversation = self._conversation
        if conversation is None:
            raise BackendError(request.name, errno.ESRCH, None, "the back end is gone")
        return conversation

    def send(self, request: Request, payload: Payload | None = None, fds: Iterable[int] = ()) -> None:
        """Send a request; BackendError if the back end refuses it, or is gone. @private"""
        self._talk(request).send(request, payload, fds)

    def ask(self, request: Request, kind: type[P], payload: Payload | None = None) -> P:
        """Send a request and return its answer; BackendError if there is none. @private"""
        return self._talk(request).ask(request, kind, payload)

    def set_status(self, status: int) -> None:
        """Tell the device status, where the back end wants to know it. @private"""
        if self.has(_F.STATUS) and status != self._status:
            self.send(Request.SET_STATUS, U64(status))
        self._status = status

    @property
    def status(self) -> int:
        return self._status

    def reset_if_idle(self) -> None:
        """Reset the device, once it has no ring any more: the next driver may be another, with other features.

        @private
        """
        if self._has_rings:
            return
        with suppress(BackendError):  # the rings are unbound, even if this fails
            if self.has(_F.STATUS):
                self.set_status(0)
            elif self.has(_F.RESET_DEVICE) and not self.has(_F.DEVICE_STATE):  # whose state may be asked for next
                self.memory = None  # that, too, is told anew
                self.send(Request.RESET_DEVICE)

    def read_config(self) -> NetConfig | None:
        """Ask the back end for its configuration space, set `config` to it, and return it; None if it tells none.

        BackendError if the back end is gone or does not answer.
        """
        self.config = _ask_config(self._talk(Request.GET_CONFIG))
        return self.config

    def save_device_state(self) -> bytes:
        """Return the back end's own state, for another back end (VHOST_USER_SET_DEVICE_STATE_FD).

        BackendError if that fails, with EBUSY while a ring is bound.
        """
        return device_state.save(self._without_rings(), self.timeout_s)

    def load_device_state(self, state: bytes) -> None:
        """Give the back end the state that another one saved (VHOST_USER_SET_DEVICE_STATE_FD).

        BackendError if that fails, with EBUSY while a ring is bound.
        """
        device_state.load(self._without_rings(), state, self.timeout_s)

    def _without_rings(self) -> Conversation:
        if self._has_rings:
            raise BackendError(Request.SET_DEVICE_STATE_FD.name, errno.EBUSY, None, "a ring is bound")
        return self._talk(Request.SET_DEVICE_STATE_FD)


def _ask_config(conversation: Conversation) -> NetConfig | None:
    if not conversation.has(_F.CONFIG):
        return None
    size = _NET_CONFIG.size
    answer = conversation.ask(Request.GET_CONFIG, Config, Config(0, size, 0, bytes(size)))
    return NetConfig(*_NET_CONFIG.unpack(answer.data)) if len(answer.data) == size else None
