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
from ..notify import EventFd
from .base import VERBS, Backend

T = TypeVar("T")


@dataclass
class Fault:
    """Fail *verb* with *code*: on queue pair *pair* and vring *index* (None = any), *times* times (-1 = always).

    Written `VERB[:PAIR[,VRING]][:once|always]`. Unbinding (`set_backend` to nothing) can't fail in the kernel, and does
    not fail here.
    """

    verb: str
    pair: int | None = None
    index: int | None = None
    times: int = 1
    code: int = errno.EIO
    hits: int = field(default=0, compare=False)

    @classmethod
    def parse(cls, text: str) -> Fault:
        match = re.fullmatch(r"(\w+)(?::(\d+)(?:,(\d+))?)?(?::(once|always))?", text)
        if not match or match[1] not in VERBS:
            raise ConfigError(f"fault {text!r} is not VERB[:PAIR[,VRING]][:once|always]; verbs are {', '.join(VERBS)}")
        return cls(
            match[1],
            int(match[2]) if match[2] else None,
            int(match[3]) if match[3] else None,
            -1 if match[4] == "always" else 1,
        )

    def strikes(self, verb: str, pair: int, index: int | None) -> bool:
        """Return whether this call fails, and count it if so."""
        if verb != self.verb or self.pair not in (None, pair) or self.index not in (None, index):
            return False
        if self.times == 0:
            return False
        self.times -= self.times > 0
        self.hits += 1
        return True


class FaultyBackend:
    """A backend whose verbs fail as *faults* say, before they reach the real one."""

    def __init__(self, inner: Backend, pair: int, faults: Sequence[Fault]) -> None:
        self.inner = inner
        self._pair = pair
        self._faults = faults

    def _do(self, verb: str, index: int | None, call: Callable[[], T]) -> T:
        for fault in self._faults:
            if fault.strikes(verb, self._pair, index):
                raise BackendError(verb, fault.code, index, "injected fault")
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
        if endpoint is None:
            self.inner.set_backend(index, None)
        else:
            self._do("set_backend", index, lambda: self.inner.set_backend(index, endpoint))

    @property
    def site(self) -> object:
        return self.inner.site

    def hold(self) -> AbstractContextManager[None]:
        return self.inner.hold()

    def status(self, index: int) -> int:
        return self.inner.status(index)

    def counters(self, index: int) -> dict[str, int]:
        return self.inner.counters(index)
