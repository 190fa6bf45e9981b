"""Clock: the time of a simulator, handed in to a device, whose endpoints and announcements then read it."""

from __future__ import annotations

import heapq
from collections.abc import Callable
from itertools import count
from typing import Protocol

from ..errors import ConfigError
from ..system.owned import Owned

_LAST_NS = 1 << 62


class _Reader(Protocol):
    """An endpoint as a clock sees it."""

    def tell_time(self, now_ns: int) -> None: ...
    def next_due_ns(self) -> int | None: ...


class Clock(Owned):
    """The time of a simulator in ns, from *now_ns* on: `NetDevice(…, clock=clock)` and its driver never read the machine's.

    It stands still until `advance_to` is called, in the thread that steps the devices. Many devices may have one clock.
    ConfigError if *now_ns* is not between 0 and 2^62.
    """

    def __init__(self, now_ns: int = 0) -> None:
        self._now_ns = 0
        self._readers: list[_Reader] = []
        self._calls: list[tuple[int, int, Callable[[], None]]] = []  # a heap: when, in which order, what
        self._order = count()
        self.advance_to(now_ns)

    @property
    def now_ns(self) -> int:
        """The time, in ns."""
        return self._now_ns

    def advance_to(self, now_ns: int) -> None:
        """Set the time to *now_ns*; announcements that are due by then are sent, each at its time. No ring moves.

        ConfigError, and no change, if that is before the present time, or behind 2^62 ns.
        """
        self.check_maker()
        if not self._now_ns <= now_ns <= _LAST_NS:
            raise ConfigError(
                f"clock: {now_ns} ns is not between the present time, {self._now_ns} ns, and 2^62: it only goes forward"
            )
        while self._calls and self._calls[0][0] <= now_ns:
            due_ns, _, call = heapq.heappop(self._calls)
            self._tell(due_ns)
            call()
        self._tell(now_ns)

    def next_due_ns(self) -> int | None:
        """Return the earliest time, in ns and after `now_ns`, at which time alone lets a frame move; None if there is none.

        That is over all endpoints and announcements that read this clock. Step devices and drivers until none moves a frame
        before: frames that are due already are not counted.
        """
        due = [at for at in (reader.next_due_ns() for reader in self._readers) if at is not None]
        return min([*due, *(call[0] for call in self._calls[:1])], default=None)

    # --- the endpoints and announcements that read it ---

    def call_at(self, due_ns: int, call: Callable[[], None]) -> None:
        """Have `advance_to` call *call* at that time, or at its next call if that time has passed. @private"""
        heapq.heappush(self._calls, (max(due_ns, self._now_ns), next(self._order), call))

    def add(self, reader: _Reader) -> None:
        """Tell *reader* the time, from now on. @private"""
        self._readers.append(reader)
        reader.tell_time(self._now_ns)

    def remove(self, reader: _Reader) -> None:
        """Tell *reader* the time no longer; nothing if it is not told. @private"""
        self._readers = [other for other in self._readers if other is not reader]

    def _tell(self, now_ns: int) -> None:
        # Each endpoint has the time in its own rows: kernels have them at hand, in whichever process they run.
        self._now_ns = now_ns
        for reader in self._readers:
            reader.tell_time(now_ns)
