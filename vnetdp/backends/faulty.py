"""Faults: make any verb of any backend fail by name, without a line of it in the product's path."""

from __future__ import annotations

import errno
import re
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field

from ..datapath.notifiers import Notifiers
from ..errors import BackendError, ConfigError
from ..shared.memory import Words
from .base import Backend
from .names import FAULT_POINTS, UNBIND
from .verbs import SetBackend, Verb


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
        if not match or match[2] not in FAULT_POINTS:
            raise ConfigError(
                f"fault {text!r} is not [PHASE.]VERB[:PAIR[,VRING]][:once|always]; verbs are {', '.join(FAULT_POINTS)}"
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
        """Raise BackendError if a fault strikes this verb of this queue pair and ring. @private"""
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


class FaultyBackend(Backend):
    """A `Backend` of queue pair *pair* whose verbs fail as *faults* say, before they reach *inner*."""

    def __init__(self, inner: Backend, pair: int, faults: Faults) -> None:
        self.inner = inner
        self._pair = pair
        self._faults = faults

    def apply(self, verb: Verb) -> int:
        self._faults.strike(point_of(verb), self._pair, verb.index)
        return self.inner.apply(verb)

    @property
    def worker(self) -> object:
        return self.inner.worker

    def hold(self) -> AbstractContextManager[None]:
        return self.inner.hold()

    def park(self, parked: bool) -> None:
        self.inner.park(parked)

    def listen(self, on_broken: Callable[[], None], on_gone: Callable[[], None]) -> Callable[[], None]:
        return self.inner.listen(on_broken, on_gone)

    def status(self, index: int) -> int:
        return self.inner.status(index)

    def row(self, index: int) -> Words | None:
        return self.inner.row(index)

    def counters(self, index: int) -> dict[str, int]:
        return self.inner.counters(index)


def point_of(verb: Verb) -> str:
    """Return the name under which faults know a verb."""
    return UNBIND if isinstance(verb, SetBackend) and verb.endpoint is None else verb.name
