"""Backend: a place where the two rings of one queue pair run.

A `Backend` is one vhost device: the two queues of one queue pair, vring 0 the receiveq and 1 the transmitq, as
the kernel's vhost-net has them. The rules are those of `verbs`. Configured, based and bound are three different things:

* a size or a base can't be set on a bound ring (EBUSY); a size must be a power of two up to 32768, a base a u16 (EINVAL);
* binding needs size, addresses and memory (EFAULT); it reads used.idx from guest memory *at that moment*, and looks
  at the ring once by itself, kick or not;
* unbinding can be repeated, and fails only with UnbindError: a back end that hangs elsewhere may still have the ring. After
  it, and after `get_vring_base`, nothing touches the ring;
* `get_vring_base` gives the next index to take, and keeps it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

from ..endpoints.base import Endpoint
from ..errors import ConfigError
from ..shared.memory import DirtyLog, GuestMemory, Words
from ..shared.notify import EventFd
from . import verbs
from .verbs import Verb


class HasBackends(Protocol):
    """A worker, or another object that has a backend for each queue pair."""

    @property
    def backends(self) -> Sequence[Backend]: ...


def backends_of(vhost: HasBackends | Sequence[Backend], needed: int | None = None) -> Sequence[Backend]:
    """Return the backends of a worker; a sequence of backends as it is. ConfigError if they are not as many as *needed*."""
    anything: Any = vhost
    found: Sequence[Backend] = getattr(anything, "backends", anything)
    if needed is not None and len(found) != needed:
        raise ConfigError(f"{len(found)} vhost backends for {needed} queue pairs: one for each is needed")
    return found


class Backend(ABC):
    """A vhost device: where the two rings of one queue pair run, vring 0 the receiveq and 1 the transmitq.

    A user makes none: `Worker.backends` and the like are handed to a `NetDevice` as they are. The methods, vhost's
    verbs, are shown for reading, and may change in any version. Each raises BackendError, with the errno of the
    kernel's vhost, and then changed nothing.
    """

    @abstractmethod
    def apply(self, verb: Verb) -> int:
        """Run a verb. Return the avail index that `get_vring_base` asks for, and 0 for every other verb."""

    def set_mtu(self, mtu: int) -> None:
        """Set the MTU that the driver was told (VIRTIO_NET_F_MTU), in bytes: longer frames are dropped."""
        self.apply(verbs.SetMtu(mtu))

    def set_features(self, features: int) -> None:
        """Set the negotiated feature bits. While a ring is bound only VHOST_F_LOG_ALL may change."""
        self.apply(verbs.SetFeatures(features))

    def set_memory(self, memory: GuestMemory) -> None:
        """Set guest memory. Ring addresses are translated anew when they are set or bound."""
        self.apply(verbs.SetMemory(memory))

    def set_log(self, log: DirtyLog | None) -> None:
        """Set the dirty log, or none. It is written while VHOST_F_LOG_ALL is set."""
        self.apply(verbs.SetLog(log))

    def set_vring_num(self, index: int, num: int) -> None:
        """Set a ring's size, in descriptors."""
        self.apply(verbs.SetVringNum(index, num))

    def set_vring_base(self, index: int, base: int) -> None:
        """Set the next avail index to take, 0 to 65535."""
        self.apply(verbs.SetVringBase(index, base))

    def get_vring_base(self, index: int) -> int:
        """Unbind the ring if it is bound, and return the next avail index to take."""
        return self.apply(verbs.GetVringBase(index))

    def set_vring_addr(self, index: int, desc: int, avail: int, used: int, log_used: int | None = None) -> None:
        """Set a ring's guest addresses. `log_used`: the address to log its used ring under; None logs it not."""
        self.apply(verbs.SetVringAddr(index, desc, avail, used, log_used))

    def set_vring_kick(self, index: int, kick: EventFd | None) -> None:
        """Set the eventfd of the driver's kicks, which the caller keeps open; without one the ring is polled."""
        self.apply(verbs.SetVringKick(index, kick))

    def set_vring_call(self, index: int, call: EventFd | None) -> None:
        """Set the eventfd of calls to the driver, which the caller keeps open; None calls no driver."""
        self.apply(verbs.SetVringCall(index, call))

    def set_vring_enable(self, index: int, enabled: bool) -> None:
        """Enable or disable a ring (vhost-user). A disabled ring that is bound drops frames sent, and receives none."""
        self.apply(verbs.SetVringEnable(index, enabled))

    def set_vring_inflight(self, index: int, area: int, journal: int) -> None:
        """Set the offsets in `GuestMemory.mem` of the ring's inflight area and journal; 0 for none."""
        self.apply(verbs.SetVringInflight(index, area, journal))

    def set_backend(self, index: int, endpoint: Endpoint | None) -> None:
        """Bind a ring to an endpoint, or with None unbind it."""
        self.apply(verbs.SetBackend(index, endpoint))

    def bind_rings(self, bases: Sequence[tuple[int, int]], endpoint: Endpoint) -> bool:
        """Set base and endpoint of many rings of one worker at once; `bases`: (queue, avail index) of each.

        False, and no change, if that can't be done at once: the single verbs then say why.
        """
        return False

    @property
    @abstractmethod
    def worker(self) -> object:
        """The worker that this backend runs on. Pausing a worker pauses every backend that shares it."""

    def hold(self) -> AbstractContextManager[None]:
        """Return a context manager that pauses the worker, for several verbs in one go."""
        return nullcontext()  # the caller runs the rings itself, or a program elsewhere does

    def park(self, parked: bool) -> None:  # noqa: B027 - as for `hold`
        """Pause the worker, or with False resume it. Each True needs a False."""

    @abstractmethod
    def listen(self, on_broken: Callable[[], None], on_gone: Callable[[], None]) -> Callable[[], None]:
        """Have *on_broken* called when a ring of the worker broke, and *on_gone* once the worker has ended.

        Both are called in a thread of the worker's. Return a function that undoes this. ConfigError if the worker has
        another device already.
        """

    @abstractmethod
    def status(self, index: int) -> int:
        """Return 0, or the status code of a ring that broke (`GuestError.status`)."""

    def row(self, index: int) -> Words | None:
        """Return the row of a ring, int64[VQ_SLOTS], to look at; None if it lies elsewhere, or with its worker's end."""
        return None

    @abstractmethod
    def counters(self, index: int) -> dict[str, int]:
        """Return `packets`, `bytes`, `dropped`, `calls` and `kicks` of a ring since the backend was made."""
