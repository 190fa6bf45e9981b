"""VhostUserBackend: the vhost verbs of one queue pair, as vhost-user messages.

Binding is held back as everywhere: a back end may start a ring when it gets its kick, so the kick is sent when the ring is
bound, and not before. Unbinding is GET_VRING_BASE, the one message after which nothing touches the ring.
"""

from __future__ import annotations

import errno
from collections.abc import Callable
from typing import TYPE_CHECKING, ClassVar

from vnetdp_kernels import spec
from vnetdp_kernels.platform.atomic import load_u16_acquire

from ...backends.base import Backend
from ...backends.verbs import (
    GetVringBase,
    RingVerb,
    SetBackend,
    SetFeatures,
    SetLog,
    SetMemory,
    SetMtu,
    SetVringAddr,
    SetVringBase,
    SetVringCall,
    SetVringEnable,
    SetVringInflight,
    SetVringKick,
    SetVringNum,
    Verb,
    refusal,
)
from ...errors import BackendError, ConfigError, UnbindError
from ...shared.memory import GuestMemory
from ...shared.notify import EventFd
from ...system.owned import Owned
from ...virtio import features as f
from ...virtio.queue import VRINGS, queue_of
from ...virtio.state import (
    VIRTIO_CONFIG_S_ACKNOWLEDGE,
    VIRTIO_CONFIG_S_DRIVER,
    VIRTIO_CONFIG_S_DRIVER_OK,
    VIRTIO_CONFIG_S_FEATURES_OK,
)
from ..message import (
    MAX_FDS,
    NO_FD,
    U64,
    VHOST_VRING_F_LOG,
    Log,
    MemoryRegion,
    MemoryTable,
    ProtocolFeature,
    Request,
    SingleRegion,
    VringAddr,
    VringState,
)

if TYPE_CHECKING:
    from .front_end import VhostUserFrontEnd

_F = ProtocolFeature
_FEATURES_OK = VIRTIO_CONFIG_S_ACKNOWLEDGE | VIRTIO_CONFIG_S_DRIVER | VIRTIO_CONFIG_S_FEATURES_OK


class VhostUserBackend(Backend, Owned):
    """One queue pair of a remote back end (see `Backend`)."""

    def __init__(self, front_end: VhostUserFrontEnd, pair: int) -> None:
        self._fe = front_end
        self._pair = pair
        self._bound = [False] * VRINGS
        self._num = [0] * VRINGS
        self._base: list[int | None] = [0] * VRINGS  # None: where the back end stopped is not known here
        self._avail: list[int | None] = [None] * VRINGS
        self._used: list[int | None] = [None] * VRINGS
        self._kick: list[EventFd | None] = [None] * VRINGS
        self._call: list[EventFd | None] = [None] * VRINGS
        self.features = 0

    @property
    def bound(self) -> bool:
        """True if the back end may have a ring of this pair."""
        return any(self._bound)

    def forget(self) -> None:
        """Know that there is another back end now, which has none of the rings that were bound."""
        self._base = [None if bound else base for base, bound in zip(self._base, self._bound, strict=True)]
        self._bound = [False] * VRINGS

    def apply(self, verb: Verb) -> int:
        verb.check(self)
        return self._RUN[type(verb)](self, verb) or 0

    # --- `State`, which the rules of verbs look at ---

    @property
    def memory(self) -> GuestMemory | None:
        return self._fe.memory

    def is_bound(self, index: int) -> bool:
        return self._bound[index]

    def num(self, index: int) -> int:
        return self._num[index]

    def has_addresses(self, index: int) -> bool:
        return self._used[index] is not None

    # --- the verbs ---

    def _queue(self, verb: RingVerb) -> int:
        return queue_of(self._pair, verb.index)

    def _set_mtu(self, verb: SetMtu) -> None:
        if self._fe.has(_F.MTU) and self._pair == 0:
            self._fe.send(Request.NET_SET_MTU, U64(verb.mtu))

    def _set_features(self, verb: SetFeatures) -> None:
        features = verb.features
        if features & ~self._fe.features:
            missing = ", ".join(f.names(features & ~self._fe.features))
            raise refusal(verb, errno.EOPNOTSUPP, f"the back end lacks {missing}")
        self.features = features
        if self._pair == 0:
            self._fe.send(Request.SET_FEATURES, U64(features | self._fe.features & f.VHOST_USER_F_PROTOCOL_FEATURES))
            self._fe.set_status(_FEATURES_OK | self._fe.status)

    def _set_memory(self, verb: SetMemory) -> None:
        memory = verb.memory
        if memory is self._fe.memory:
            return
        verb.check_shared()
        n = len(memory.regions)
        if n > MAX_FDS:  # the most that one SET_MEM_TABLE holds
            slots = MAX_FDS
            if self._fe.has(_F.CONFIGURE_MEM_SLOTS):
                slots = self._fe.ask(Request.GET_MAX_MEM_SLOTS, U64).value
            if n > slots:
                raise refusal(verb, errno.E2BIG, f"{n} regions; the back end takes {slots}")
        regions = [MemoryRegion(r.gpa, r.length, _uva(memory, r.gpa), r.fd_offset) for r in memory.regions]
        fds = [r.fd for r in memory.regions]
        self._fe.memory = None  # until the back end has all of it
        self._fe.send(Request.SET_MEM_TABLE, MemoryTable(tuple(regions[:MAX_FDS])), fds[:MAX_FDS])
        for region, fd in zip(regions[MAX_FDS:], fds[MAX_FDS:], strict=True):
            self._fe.send(Request.ADD_MEM_REG, SingleRegion(region), [fd])
        self._fe.memory = memory

    def _set_log(self, verb: SetLog) -> None:
        if verb.log is not None and self._pair == 0:
            self._fe.send(Request.SET_LOG_BASE, Log(verb.log.length, 0), [verb.log.fd])

    def _set_vring_num(self, verb: SetVringNum) -> None:
        self._fe.send(Request.SET_VRING_NUM, VringState(self._queue(verb), verb.num))
        self._num[verb.index] = verb.num

    def _set_vring_base(self, verb: SetVringBase) -> None:
        self._fe.send(Request.SET_VRING_BASE, VringState(self._queue(verb), verb.base))
        self._base[verb.index] = verb.base

    def _get_vring_base(self, verb: GetVringBase) -> int:
        self._unbind(verb.index)
        base = self._base[verb.index]
        if base is None:
            raise refusal(verb, errno.ESRCH, "the avail index at which the back end stopped is not known")
        return base

    def _set_vring_addr(self, verb: SetVringAddr) -> None:
        memory = self._fe.memory
        assert memory is not None
        try:
            desc, used, avail = (_uva(memory, gpa) for gpa in (verb.desc, verb.used, verb.avail))
        except ConfigError as e:
            raise refusal(verb, errno.EFAULT, str(e)) from e
        self._avail[verb.index], self._used[verb.index] = verb.avail, verb.used
        flags = 0 if verb.log_used is None else VHOST_VRING_F_LOG
        self._fe.send(
            Request.SET_VRING_ADDR, VringAddr(self._queue(verb), flags, desc, used, avail, verb.log_used or 0)
        )

    def _set_vring_kick(self, verb: SetVringKick) -> None:
        self._kick[verb.index] = verb.kick
        if self._bound[verb.index]:
            self._send_event(Request.SET_VRING_KICK, verb, verb.kick)

    def _set_vring_call(self, verb: SetVringCall) -> None:
        self._call[verb.index] = verb.call
        calls_by_message = self._fe.has(_F.INBAND_NOTIFICATIONS)
        self._send_event(Request.SET_VRING_CALL, verb, None if calls_by_message else verb.call)

    def _send_event(self, request: Request, verb: RingVerb, event: EventFd | None) -> None:
        n = self._queue(verb)
        self._fe.send(request, U64(n if event else n | NO_FD), [event.fd] if event else [])

    def _set_vring_enable(self, verb: SetVringEnable) -> None:
        if self._fe.features & f.VHOST_USER_F_PROTOCOL_FEATURES:
            self._fe.send(Request.SET_VRING_ENABLE, VringState(self._queue(verb), int(verb.enabled)))

    def _set_vring_inflight(self, verb: SetVringInflight) -> None:
        """Nothing: the back end has the area itself."""

    def _set_backend(self, verb: SetBackend) -> None:
        if verb.endpoint is None:
            self._unbind(verb.index)
        else:
            self._bind(verb)

    def _bind(self, verb: SetBackend) -> None:
        kick, call = self._kick[verb.index], self._call[verb.index]
        self._bound[verb.index] = True  # from the first of these messages on, even if a later one fails
        try:
            self._send_event(Request.SET_VRING_KICK, verb, kick)
            self._set_vring_enable(SetVringEnable(verb.index, True))
            self._fe.set_status(_FEATURES_OK | VIRTIO_CONFIG_S_DRIVER_OK)
        except BackendError:
            self._unbind(verb.index)
            raise
        if kick is not None:
            kick.signal()  # not every back end looks at a ring by itself when it starts
        if call is not None:
            call.signal()  # the owner before may have left the decision about a call open

    _RUN: ClassVar[dict[type, Callable[..., int | None]]] = {
        SetMtu: _set_mtu,
        SetFeatures: _set_features,
        SetMemory: _set_memory,
        SetLog: _set_log,
        SetVringNum: _set_vring_num,
        SetVringBase: _set_vring_base,
        GetVringBase: _get_vring_base,
        SetVringAddr: _set_vring_addr,
        SetVringKick: _set_vring_kick,
        SetVringCall: _set_vring_call,
        SetVringEnable: _set_vring_enable,
        SetVringInflight: _set_vring_inflight,
        SetBackend: _set_backend,
    }

    # --- letting go of a ring ---

    def _unbind(self, index: int) -> None:
        """Stop a ring if it is bound, and learn where. UnbindError if the back end hangs: the ring stays bound."""
        if not self._bound[index]:
            return
        n = queue_of(self._pair, index)
        try:
            answer = self._fe.ask(Request.GET_VRING_BASE, VringState, VringState(n, 0))
            if answer.index != n:
                self._fe.disconnect()  # whether the ring was stopped can't be told
                raise BackendError(
                    "GET_VRING_BASE", errno.EPROTO, index, f"an answer about ring {answer.index}, not {n}"
                )
        except BackendError as e:
            if not self._fe.gone:
                raise UnbindError(SetBackend.name, errno.ETIMEDOUT, index, self._keeps(e)) from e
            self._bound[index] = False
            self._base[index] = self._recover(index, n)
            return
        self._bound[index] = False
        self._base[index] = answer.num if self._can_be(index, answer.num) else None
        self._fe.reset_if_idle()

    def _keeps(self, error: BackendError) -> str:
        """Return the error for a back end that did not stop a ring."""
        # ESRCH: nothing was asked, since the back end did not answer before.
        silent = error.errno in (errno.ETIMEDOUT, errno.ESRCH)
        how = f"hangs: it has not answered for {self._fe.timeout_s:g} s" if silent else f"did not stop a ring: {error}"
        step = "end it, or let it go on"
        return f"{self._fe.path}: the back end {how}; its rings are fenced, as it may still use them: {step}"

    def _can_be(self, index: int, base: int) -> bool:
        """True if a back end can have stopped at *base*: neither behind used.idx, nor ahead of avail.idx."""
        used, avail = self._idx(self._used[index]), self._idx(self._avail[index])
        if used is None or avail is None or base > 0xFFFF:
            return False
        return (base - used) & 0xFFFF <= (avail - used) & 0xFFFF <= self._num[index]

    def _idx(self, ring: int | None) -> int | None:
        """Return the idx of the avail or used ring at a guest address; None if it is not there."""
        if ring is None or self._fe.memory is None:
            return None
        return load_u16_acquire(self._fe.memory.mem, self._fe.memory.translate(ring + spec.VIRTQ_RING_IDX, 2))

    def _recover(self, index: int, n: int) -> int | None:
        """Return where a back end that is gone stopped, if it left an inflight area that says so."""
        avail, used = self._avail[index], self._used[index]
        if avail is None or used is None:
            return None
        return self._fe.recover(n, self._num[index], avail, used, self._used[1 - index])

    @property
    def worker(self) -> object:
        return self._fe

    def listen(self, on_broken: Callable[[], None], on_gone: Callable[[], None]) -> Callable[[], None]:
        """Call *on_gone* once the back end has closed the connection, or died; a `Watch` hears of a ring that broke."""
        return self._fe.listeners.add(on_broken, on_gone)

    def status(self, index: int) -> int:
        """0: a remote ring that broke stays silent."""
        return 0

    def counters(self, index: int) -> dict[str, int]:
        """Zeros: the back end counts for itself."""
        return dict.fromkeys(("packets", "bytes", "dropped", "calls", "kicks"), 0)


def _uva(memory: GuestMemory, gpa: int) -> int:
    """Return our own user address of a guest address, as messages to a back end have it."""
    return int(memory.mem.ctypes.data) + memory.translate(gpa, 1)
