"""Faults: make any verb of any backend fail by name, without a line of it in the product's path."""

from __future__ import annotations

import errno
import re
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import TypeVar

from ..endpoints.base import Endpoint
from ..errors import BackendError, ConfigError
from ..memory import DirtyLog, GuestMemory
from ..notifiers import Notifiers
from ..notify import EventFd
from .base import VERBS, Backend

# What else can fail: unbinding (which the kernel's never does), and the notifiers.
POINTS = (*VERBS, "unbind", "grab_ioeventfd", "set_host_notifier", "set_guest_notifiers", "unset_guest_notifiers")

T = TypeVar("T")


@dataclass
class Fault:
    """A vhost verb that is to fail. Written as text: `[PHASE.]VERB[:PAIR[,VRING]][:once|always]`."""

    verb: str
    """The verb's name, such as `set_backend`, or `unbind`. Names of notifiers are for `vnetdp migrate` alone."""
    pair: int | None = None
    """The queue pair; None for any."""
    index: int | None = None
    """The vring, 0 (receiveq) or 1 (transmitq); None for any."""
    times: int = 1
    """How often it fails from now on; -1 for always."""
    code: int = errno.EIO
    """The errno of the BackendError."""
    phase: str = ""
    """It fails only while `Faults.phase` is this; empty for any phase."""
    hits: int = field(default=0, compare=False)
    """How often it has failed."""

    @classmethod
    def parse(cls, text: str) -> Fault:
        """Return the fault that *text* describes, for one time unless it says always; ConfigError if none."""
        match = re.fullmatch(r"(?:(\w+)\.)?(\w+)(?::(\d+)(?:,(\d+))?)?(?::(once|always))?", text)
        if not match or match[2] not in POINTS:
            raise ConfigError(
                f"fault {text!r} is not [PHASE.]VERB[:PAIR[,VRING]][:once|always]; verbs are {', '.join(POINTS)}"
            )
        return cls(
            match[2],
            int(match[3]) if match[3] else None,
            int(match[4]) if match[4] else None,
            -1 if match[5] == "always" else 1,
            phase=match[1] or "",
        )

    def strikes(self, verb: str, pair: int, index: int | None) -> bool:
        """Return whether this call fails, and count it if so. @private"""
        if verb != self.verb or self.pair not in (None, pair) or self.index not in (None, index):
            return False
        if self.times == 0:
            return False
        self.times -= self.times > 0
        self.hits += 1
        return True


class Faults(list[Fault]):
    """A list of `Fault`, which may change at any time."""

    phase = ""
    """The present phase, which its user sets; a fault with another phase does not strike."""

    def strike(self, verb: str, pair: int, index: int | None) -> None:
        """Raise BackendError if one of them says so. @private"""
        for fault in self:
            if (not fault.phase or fault.phase == self.phase) and fault.strikes(verb, pair, index):
                raise BackendError(verb, fault.code, index, "injected fault")


class FaultyNotifiers(Notifiers):
    """Notifiers that fail as *faults* say."""

    def __init__(self, queue_pairs: int, faults: Faults) -> None:
        super().__init__(queue_pairs)
        self._faults = faults

    def grab_ioeventfd(self, pair: int) -> None:
        self._faults.strike("grab_ioeventfd", pair, None)
        super().grab_ioeventfd(pair)

    def set_host_notifier(self, queue: int) -> None:
        self._faults.strike("set_host_notifier", *divmod(queue, 2))
        super().set_host_notifier(queue)

    def set_guest_notifiers(self, assign: bool) -> None:
        self._faults.strike("set_guest_notifiers" if assign else "unset_guest_notifiers", 0, None)
        super().set_guest_notifiers(assign)


class FaultyBackend:
    """A `Backend` of queue pair *pair* whose verbs fail as *faults* say, before they reach *inner*."""

    def __init__(self, inner: Backend, pair: int, faults: Faults) -> None:
        self.inner = inner
        self._pair = pair
        self._faults = faults

    def _do(self, verb: str, index: int | None, call: Callable[[], T]) -> T:
        self._faults.strike(verb, self._pair, index)
        return call()

    def set_mtu(self, mtu: int) -> None:
        self._do("set_mtu", None, lambda: self.inner.set_mtu(mtu))

    def set_features(self, features: int) -> None:
        self._do("set_features", None, lambda: self.inner.set_features(features))

    def set_memory(self, memory: GuestMemory) -> None:
        self._do("set_memory", None, lambda: self.inner.set_memory(memory))

    def set_log(self, log: DirtyLog | None) -> None:
        self._do("set_log", None, lambda: self.inner.set_log(log))

    def set_vring_num(self, index: int, num: int) -> None:
        self._do("set_vring_num", index, lambda: self.inner.set_vring_num(index, num))

    def set_vring_base(self, index: int, base: int) -> None:
        self._do("set_vring_base", index, lambda: self.inner.set_vring_base(index, base))

    def get_vring_base(self, index: int) -> int:
        return self._do("get_vring_base", index, lambda: self.inner.get_vring_base(index))

    def set_vring_addr(self, index: int, desc: int, avail: int, used: int, log_used: int | None = None) -> None:
        self._do("set_vring_addr", index, lambda: self.inner.set_vring_addr(index, desc, avail, used, log_used))

    def set_vring_kick(self, index: int, kick: EventFd | None) -> None:
        self._do("set_vring_kick", index, lambda: self.inner.set_vring_kick(index, kick))

    def set_vring_call(self, index: int, call: EventFd | None) -> None:
        self._do("set_vring_call", index, lambda: self.inner.set_vring_call(index, call))

    def set_vring_enable(self, index: int, enabled: bool) -> None:
        self.inner.set_vring_enable(index, enabled)

    def set_vring_inflight(self, index: int, area: int, journal: int) -> None:
        self.inner.set_vring_inflight(index, area, journal)

    def set_backend(self, index: int, endpoint: Endpoint | None) -> None:
        verb = "unbind" if endpoint is None else "set_backend"
        self._do(verb, index, lambda: self.inner.set_backend(index, endpoint))

    def bind_rings(self, bases: Sequence[tuple[int, int]], endpoint: Endpoint) -> bool:
        """No: each verb may fail by its name. @private"""
        return False

    @property
    def site(self) -> object:
        return self.inner.site

    def hold(self) -> AbstractContextManager[None]:
        return self.inner.hold()

    def park(self, parked: bool) -> None:
        self.inner.park(parked)

    def listen(self, on_broken: Callable[[], None], on_gone: Callable[[], None]) -> Callable[[], None]:
        return self.inner.listen(on_broken, on_gone)

    def status(self, index: int) -> int:
        return self.inner.status(index)

    def counters(self, index: int) -> dict[str, int]:
        return self.inner.counters(index)
