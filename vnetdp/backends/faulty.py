"""Faults: make any verb of any backend fail, or take longer, by name, without a line of it in the product's path."""

from __future__ import annotations

import errno
import re
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, Final, Self, SupportsIndex

from ..datapath.notifiers import Notifiers
from ..errors import BackendError, ConfigError
from ..shared.memory import Words
from .base import Backend, HasBackends, backends_of
from .names import FAULT, FAULT_POINTS, UNBIND
from .verbs import SetBackend, Verb

_ERRNOS: Final = {name: code for code, name in errno.errorcode.items()}
_MAX_DELAY_S: Final = 60.0


@dataclass
class Fault:
    """A vhost verb that is to fail, or to take longer.

    Written as text: `[PHASE.]VERB[:PAIR[,VRING]][:#N][:ERRNO][:delay=S][:once|always]`, such as
    `set_vring_base:0,1:#2:EBUSY`. The parts behind the place may come in any order. ConfigError if a field has a value
    that no call can have.
    """

    verb: str
    """The verb's name, such as `set_backend`, or `unbind`. Names of notifiers are for `vnetdp migrate` alone."""
    pair: int | None = None
    """The queue pair; None for any."""
    index: int | None = None
    """The vring, 0 (receiveq) or 1 (transmitq); None for any."""
    times: int = 1
    """How often it fails from now on; -1 for always."""
    code: int = errno.EIO
    """The errno of the BackendError; 0 lets the verb succeed, after its delay."""
    phase: str = ""
    """It fails only while `Faults.phase` is this; empty for any phase."""
    hits: int = field(default=0, compare=False)
    """How often it has struck."""
    nth: int = field(default=1, kw_only=True)
    """It strikes from the *nth* call on that it fits."""
    delay_s: float = field(default=0.0, kw_only=True)
    """Seconds that the call takes longer."""
    text: str = field(default="", compare=False, repr=False, kw_only=True)
    """The text that it was parsed from, if any."""
    _calls: int = field(default=0, init=False, compare=False, repr=False)

    def __post_init__(self) -> None:
        if self.verb not in FAULT_POINTS:
            raise ConfigError(f"fault of {self.verb!r}: verbs are {', '.join(FAULT_POINTS)}")
        limits = {
            "pair": (self.pair is None or self.pair >= 0, "None or a number from 0"),
            "index": (self.index in (None, 0, 1), "None, 0 (receiveq) or 1 (transmitq)"),
            "times": (
                self.times == -1 or self.times >= 1,
                "a number from 1 (a fault that has struck has 0), or -1 for always",
            ),
            "code": (self.code >= 0, "an errno, or 0"),
            "phase": (not self.phase or self.phase.isidentifier(), "a word, or empty"),
            "nth": (self.nth >= 1, "a number from 1"),
            "delay_s": (0 <= self.delay_s <= _MAX_DELAY_S, f"0 to {_MAX_DELAY_S:g} seconds"),
        }
        for name, (right, limit) in limits.items():
            if not right:
                found = f"fault {self.text or self.verb}: {name} {getattr(self, name)!r} is not {limit}"
                raise ConfigError(found + (f"; a fault is {FAULT}" if self.text else ""))

    @classmethod
    def parse(cls, text: str) -> Fault:
        """Return the fault that *text* describes; ConfigError if none.

        It strikes once, unless the text says always, with EIO, unless the text has an errno or a delay.
        """
        head, *parts = text.split(":")
        phase, dot, verb = head.rpartition(".")
        if verb not in FAULT_POINTS or (dot and not phase.isidentifier()):
            raise ConfigError(f"fault {text!r} is not {FAULT}; verbs are {', '.join(FAULT_POINTS)}")
        found: dict[str, Any] = {}
        for n, part in enumerate(parts):
            values = _values(part, first=n == 0)
            if not values:
                raise ConfigError(f"fault {text!r}: {part!r} is none of the parts of {FAULT}, nor the name of an errno")
            if not found.keys().isdisjoint(values):
                raise ConfigError(f"fault {text!r}: {part!r} says again what a part before it says: leave one out")
            found |= values
        if "delay_s" in found:
            found.setdefault("code", 0)
        return cls(verb, phase=phase, text=text, **found)

    def strikes(self, verb: str, pair: int, index: int | None) -> bool:
        """Return whether it strikes this call, and count that if so. @private"""
        if verb != self.verb or self.pair not in (None, pair) or self.index not in (None, index):
            return False
        self._calls += 1
        if self.times == 0 or self._calls < self.nth:
            return False
        self.times -= self.times > 0
        self.hits += 1
        return True


class Faults(list[Fault]):
    """A list of `Fault`, which may change at any time. A text that is put into it becomes the fault that it describes."""

    phase = ""
    """The present phase, which its user sets; a fault with another phase does not strike."""
    armed = True
    """False: none strikes."""

    def __init__(self, faults: str | Fault | Iterable[Fault | str] = ()) -> None:
        given = [faults] if isinstance(faults, str | Fault) else faults
        if not isinstance(given, Iterable):
            raise ConfigError(f"faults={faults!r} are none: give a Fault, its text, or several")
        super().__init__(map(_fault, given))

    def append(self, fault: Fault | str) -> None:
        if isinstance(fault, Fault) and fault.times == 0:
            raise ConfigError(f"fault {fault.text or fault.verb} has struck as often as it may: append a new one")
        super().append(_fault(fault))

    def insert(self, index: SupportsIndex, fault: Fault | str) -> None:
        super().insert(index, _fault(fault))

    def extend(self, faults: Iterable[Fault | str]) -> None:
        super().extend(map(_fault, faults))

    def __iadd__(self, faults: Iterable[Fault | str]) -> Self:  # type: ignore[misc, override] # it takes texts too
        self.extend(faults)
        return self

    def __setitem__(self, where: Any, faults: Any) -> None:
        super().__setitem__(where, [*map(_fault, faults)] if isinstance(where, slice) else _fault(faults))

    def wrap(self, vhost: HasBackends | Sequence[Backend]) -> list[Backend]:
        """Return the backends of a worker, or a sequence of backends, each as a `FaultyBackend` with these faults."""
        return [FaultyBackend(backend, pair, self) for pair, backend in enumerate(backends_of(vhost))]

    def report(self) -> list[dict[str, Any]]:
        """Return how often each has struck, for a report. @private"""
        return [{"fault": fault.text or str(fault), "hits": fault.hits} for fault in self]

    def strike(self, verb: str, pair: int, index: int | None) -> None:
        """Delay this verb of this queue pair and ring, or raise BackendError, if a fault strikes it. @private"""
        for fault in self if self.armed else ():
            if (not fault.phase or fault.phase == self.phase) and fault.strikes(verb, pair, index):
                if fault.delay_s:
                    time.sleep(fault.delay_s)
                if fault.code:
                    raise BackendError(verb, fault.code, index, "injected fault")


def _fault(fault: Fault | str) -> Fault:
    """Return *fault*, parsed if it is a text; ConfigError if it is neither."""
    if isinstance(fault, str):
        return Fault.parse(fault)
    if not isinstance(fault, Fault):
        raise ConfigError(f"{fault!r} is not a Fault, nor the text of one")
    return fault


def _values(part: str, first: bool) -> dict[str, Any]:
    """Return the fields of `Fault` that a part of its text sets; empty if it is no part of one."""
    if first and (place := re.fullmatch(r"(\d{1,6})(?:,(\d{1,6}))?", part, re.ASCII)):
        return {"pair": int(place[1]), "index": int(place[2]) if place[2] else None}
    if nth := re.fullmatch(r"#([1-9]\d{0,8})", part, re.ASCII):
        return {"nth": int(nth[1])}
    if delay := re.fullmatch(r"delay=(\d{1,6}\.?\d{0,6}|\.\d{1,6})", part, re.ASCII):
        return {"delay_s": float(delay[1])}
    if part in ("once", "always"):
        return {"times": 1 if part == "once" else -1}
    return {"code": _ERRNOS[part]} if part in _ERRNOS else {}


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
