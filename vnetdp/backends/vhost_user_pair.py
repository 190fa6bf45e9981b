"""VhostUserBackend: the vhost verbs of one queue pair, as vhost-user messages.

Binding is held back as everywhere: a back end may start a ring when it gets its kick, so the kick is sent when the ring is
bound, and not before. Unbinding is GET_VRING_BASE, the one message after which nothing touches the ring.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from vnetdp_kernels import spec
from vnetdp_kernels.platform.atomic import load_u16_acquire

from .. import features as f
from ..endpoints.base import Endpoint
from ..errors import BackendError, ConfigError, UnbindError
from ..memory import DirtyLog, GuestMemory
from ..notify import EventFd
from ..owned import Owned
from ..state import (
    VIRTIO_CONFIG_S_ACKNOWLEDGE,
    VIRTIO_CONFIG_S_DRIVER,
    VIRTIO_CONFIG_S_DRIVER_OK,
    VIRTIO_CONFIG_S_FEATURES_OK,
)
from ..vhost_user.message import (
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
from ..virtqueue import VRINGS, queue_of

if TYPE_CHECKING:
    from .vhost_user import VhostUserFrontEnd

_F = ProtocolFeature
_FEATURES_OK = VIRTIO_CONFIG_S_ACKNOWLEDGE | VIRTIO_CONFIG_S_DRIVER | VIRTIO_CONFIG_S_FEATURES_OK


class VhostUserBackend(Owned):
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
        self._features: int | None = None

    @property
    def bound(self) -> bool:
        """True if the back end may have a ring of this pair."""
        return any(self._bound)

    def forget(self) -> None:
        """Know that there is another back end now, which has none of the rings that were bound."""
        self._base = [None if bound else base for base, bound in zip(self._base, self._bound, strict=True)]
        self._bound = [False] * VRINGS

    def _index(self, verb: str, index: int) -> int:
        if not 0 <= index < VRINGS:
            raise BackendError(verb, errno.ENOBUFS, index, f"vring {index} is neither 0 nor 1")
        return queue_of(self._pair, index)

    def _not_bound(self, verb: str, index: int) -> int:
        n = self._index(verb, index)
        if self._bound[index]:
            raise BackendError(verb, errno.EBUSY, index, "the ring is bound")
        return n

    def set_mtu(self, mtu: int) -> None:
        if wrong := f.mtu_error(mtu):
            raise BackendError("set_mtu", errno.EINVAL, None, wrong)
        if self._fe.has(_F.MTU) and self._pair == 0:
            self._fe.send(Request.NET_SET_MTU, U64(mtu))

    def set_features(self, features: int) -> None:
        if self.bound and (features ^ (self._features or 0)) & ~f.VHOST_F_LOG_ALL:
            raise BackendError("set_features", errno.EBUSY, None, "a ring is bound")
        if features & ~self._fe.features:
            missing = ", ".join(f.names(features & ~self._fe.features))
            raise BackendError("set_features", errno.EOPNOTSUPP, None, f"the back end lacks {missing}")
        self._features = features
        if self._pair == 0:
            self._fe.send(Request.SET_FEATURES, U64(features | self._fe.features & f.VHOST_USER_F_PROTOCOL_FEATURES))
            self._fe.set_status(_FEATURES_OK | self._fe.status)

    def set_memory(self, memory: GuestMemory) -> None:
        if memory.closed:
            raise BackendError("set_memory", errno.EFAULT, None, "the guest memory is closed")
        if memory is self._fe.memory:
            return
        n = len(memory.regions)
        if n > MAX_FDS:  # what one SET_MEM_TABLE holds
            slots = MAX_FDS
            if self._fe.has(_F.CONFIGURE_MEM_SLOTS):
                slots = self._fe.ask(Request.GET_MAX_MEM_SLOTS, U64).value
            if n > slots:
                raise BackendError("set_memory", errno.E2BIG, None, f"{n} regions; the back end takes {slots}")
        regions = [MemoryRegion(r.gpa, r.length, _uva(memory, r.gpa), r.fd_offset) for r in memory.regions]
        fds = [r.fd for r in memory.regions]
        self._fe.memory = None  # until the back end has all of it
        self._fe.send(Request.SET_MEM_TABLE, MemoryTable(tuple(regions[:MAX_FDS])), fds[:MAX_FDS])
        for region, fd in zip(regions[MAX_FDS:], fds[MAX_FDS:], strict=True):
            self._fe.send(Request.ADD_MEM_REG, SingleRegion(region), [fd])
        self._fe.memory = memory

    def set_log(self, log: DirtyLog | None) -> None:
        if log is not None and self._pair == 0:
            self._fe.send(Request.SET_LOG_BASE, Log(log.length, 0), [log.fd])

    def set_vring_num(self, index: int, num: int) -> None:
        n = self._not_bound("set_vring_num", index)
        if not 0 < num <= spec.VIRTQ_MAX_NUM or num & (num - 1):
            raise BackendError(
                "set_vring_num", errno.EINVAL, index, f"queue size {num} is not a power of two between 1 and 32768"
            )
        self._fe.send(Request.SET_VRING_NUM, VringState(n, num))
        self._num[index] = num

    def set_vring_base(self, index: int, base: int) -> None:
        n = self._not_bound("set_vring_base", index)
        if not 0 <= base <= 0xFFFF:
            raise BackendError("set_vring_base", errno.EINVAL, index, f"base {base} is not between 0 and 65535")
        self._fe.send(Request.SET_VRING_BASE, VringState(n, base))
        self._base[index] = base

    def get_vring_base(self, index: int) -> int:
        self._index("get_vring_base", index)
        if self._bound[index]:
            self._unbind(index)
        base = self._base[index]
        if base is None:
            raise BackendError(
                "get_vring_base", errno.ESRCH, index, "the avail index at which the back end stopped is not known"
            )
        return base

    def _unbind(self, index: int) -> None:
        """Stop a bound ring, and learn where. UnbindError if the back end hangs: the ring stays bound."""
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
                raise UnbindError("set_backend", errno.ETIMEDOUT, index, self._keeps(e)) from e
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
        """True if a back end can have stopped at *base*: neither behind what it used, nor ahead of what is available."""
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

    def set_vring_addr(self, index: int, desc: int, avail: int, used: int, log_used: int | None = None) -> None:
        n = self._index("set_vring_addr", index)
        memory = self._fe.memory
        if memory is None or not self._num[index]:
            raise BackendError("set_vring_addr", errno.EFAULT, index, "set_memory and set_vring_num come first")
        if desc % 16 or avail % 2 or used % 4:
            raise BackendError(
                "set_vring_addr",
                errno.EINVAL,
                index,
                f"desc {desc:#x}, avail {avail:#x}, used {used:#x}: not all are aligned to 16, 2 and 4 bytes",
            )
        try:
            desc_uva, used_uva, avail_uva = (_uva(memory, gpa) for gpa in (desc, used, avail))
        except ConfigError as e:
            raise BackendError("set_vring_addr", errno.EFAULT, index, str(e)) from e
        self._avail[index], self._used[index] = avail, used
        flags = 0 if log_used is None else VHOST_VRING_F_LOG
        self._fe.send(Request.SET_VRING_ADDR, VringAddr(n, flags, desc_uva, used_uva, avail_uva, log_used or 0))

    def set_vring_kick(self, index: int, kick: EventFd | None) -> None:
        self._index("set_vring_kick", index)
        self._kick[index] = kick
        if self._bound[index]:
            self._send_kick(index)

    def _send_kick(self, index: int) -> None:
        kick = self._kick[index]
        n = queue_of(self._pair, index)
        self._fe.send(Request.SET_VRING_KICK, U64(n if kick else n | NO_FD), [kick.fd] if kick else [])

    def set_vring_call(self, index: int, call: EventFd | None) -> None:
        n = self._index("set_vring_call", index)
        self._call[index] = call
        if self._fe.has(_F.INBAND_NOTIFICATIONS):
            call = None  # it calls by message
        self._fe.send(Request.SET_VRING_CALL, U64(n if call else n | NO_FD), [call.fd] if call else [])

    def set_vring_enable(self, index: int, enabled: bool) -> None:
        n = self._index("set_vring_enable", index)
        if self._fe.features & f.VHOST_USER_F_PROTOCOL_FEATURES:
            self._fe.send(Request.SET_VRING_ENABLE, VringState(n, int(enabled)))

    def set_vring_inflight(self, index: int, area: int, journal: int) -> None:
        """Nothing: the back end has the area itself."""

    def set_backend(self, index: int, endpoint: Endpoint | None) -> None:
        self._index("set_backend", index)
        if endpoint is None:
            if self._bound[index]:
                self._unbind(index)
            return
        if not self._num[index] or self._fe.memory is None:
            raise BackendError(
                "set_backend", errno.EFAULT, index, "set_memory, set_vring_num and set_vring_addr come first"
            )
        self._bound[index] = True  # from the first of these messages on, whatever becomes of the others
        try:
            self._send_kick(index)
            self.set_vring_enable(index, True)
            self._fe.set_status(_FEATURES_OK | VIRTIO_CONFIG_S_DRIVER_OK)
        except BackendError:
            self._unbind(index)
            raise
        kick = self._kick[index]
        if kick is not None:
            kick.signal()  # not every back end looks at a ring by itself when it starts
        call = self._call[index]
        if call is not None:
            call.signal()  # whoever had the ring before may have left a decision open

    def bind_rings(self, bases: Sequence[tuple[int, int]], endpoint: Endpoint) -> bool:
        """No: the protocol has no such message."""
        return False

    @property
    def site(self) -> object:
        return self._fe

    @contextmanager
    def hold(self) -> Iterator[None]:
        yield

    def park(self, parked: bool) -> None:
        """A back end elsewhere does nothing with rings that are not enabled."""

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
    """Return our own address of a guest address, which is what a back end is told."""
    return int(memory.mem.ctypes.data) + memory.translate(gpa, 1)
