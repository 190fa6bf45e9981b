"""The vhost verbs, and the rules that every backend enforces.

A `Backend` is one vhost device: the two queues of one queue pair, vring 0 the receiveq and 1 the transmitq, as
the kernel's vhost-net has them. Configured, based and bound are three different things:

* a size or a base can't be set on a bound ring (EBUSY); a size must be a power of two up to 32768, a base a u16 (EINVAL);
* binding needs size, addresses and memory (EFAULT); it reads used.idx from guest memory *at that moment*, and looks
  at the ring once by itself, kick or not;
* unbinding can be repeated, and fails only with UnbindError: a back end that hangs elsewhere may still have the ring. After
  it, and after `get_vring_base`, nothing touches the ring;
* `get_vring_base` gives the next index to take, and keeps it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Final, Protocol

from ..endpoints.base import Endpoint
from ..memory import DirtyLog, GuestMemory
from ..notify import EventFd

RECEIVEQ: Final = 0
TRANSMITQ: Final = 1
VRINGS: Final = 2

# The verbs by name, in the order in which a start calls them.
VERBS: Final = (
    "set_mtu",
    "set_features",
    "set_memory",
    "set_log",
    "set_vring_num",
    "set_vring_base",
    "set_vring_addr",
    "set_vring_kick",
    "set_vring_call",
    "set_backend",
    "get_vring_base",
)


class Backend(Protocol):
    """Where one queue pair runs. Every verb raises BackendError, with the kernel's errno, and then changed nothing."""

    def set_mtu(self, mtu: int) -> None:
        """Tell the endpoint which MTU the driver was told (VIRTIO_NET_F_MTU)."""

    def set_features(self, features: int) -> None:
        """Set the negotiated features, VHOST_F_LOG_ALL among them. Only that one may change while a ring is bound."""

    def set_memory(self, memory: GuestMemory) -> None:
        """Set the memory table. Addresses of rings are translated anew when they are set or bound."""

    def set_log(self, log: DirtyLog | None) -> None:
        """Set the dirty log, or take it away; it is written while VHOST_F_LOG_ALL is set."""

    def set_vring_num(self, index: int, num: int) -> None:
        """Set a queue's size."""

    def set_vring_base(self, index: int, base: int) -> None:
        """Set the next avail index to take."""

    def get_vring_base(self, index: int) -> int:
        """Unbind the ring if it is bound, and return the next avail index to take."""

    def set_vring_addr(self, index: int, desc: int, avail: int, used: int, log_used: int | None = None) -> None:
        """Set a ring's guest addresses; log_used: under which address its used ring is logged, None = not at all."""

    def set_vring_kick(self, index: int, kick: EventFd | None) -> None:
        """Set the eventfd that the driver kicks; without one the ring is polled. The caller keeps it open."""

    def set_vring_call(self, index: int, call: EventFd | None) -> None:
        """Set the eventfd that calls the driver; without one nobody is called."""

    def set_vring_enable(self, index: int, enabled: bool) -> None:
        """Enable or disable a ring (vhost-user); one that is bound and disabled uses what is sent, and does nothing."""

    def set_vring_inflight(self, index: int, area: int, journal: int) -> None:
        """Set where in the memory's window the ring's inflight area and journal lie; 0 = there is none."""

    def set_backend(self, index: int, endpoint: Endpoint | None) -> None:
        """Bind a ring to an endpoint, or unbind it."""

    def bind_rings(self, bases: Sequence[tuple[int, int]], endpoint: Endpoint) -> bool:
        """Set the base and the backend of many rings of the site at once, (queue, base) each, base a u16.

        False, and nothing done, if that can't be: the verbs themselves are tried then, and say what is wrong.
        """

    @property
    def site(self) -> object:
        """What stands still while the backend is held: to hold one of those that share it holds them all."""

    def hold(self) -> AbstractContextManager[None]:
        """Stand still for several verbs in one go; each verb by itself is safe without."""

    def park(self, parked: bool) -> None:
        """Stand still from now until told otherwise, with everything that shares the site; each True needs a False."""

    def listen(self, on_broken: Callable[[], None], on_gone: Callable[[], None]) -> Callable[[], None]:
        """Have *on_broken* called when a ring of the site broke, and *on_gone* once nothing runs its rings any more.

        Both are called in a thread of the backend's. Return the function that takes this back. A backend that runs in the
        caller's thread calls neither. ConfigError if the backend's worker has another device already.
        """

    def status(self, index: int) -> int:
        """Return 0, or the layout.E_* that broke the ring."""

    def counters(self, index: int) -> dict[str, int]:
        """Return packets, bytes, dropped, calls and kicks of a ring since it was made."""
