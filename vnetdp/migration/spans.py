"""Spans: what took how long, on the one clock that both sides of a migration on one machine share."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager


class Spans:
    """Named spans of CLOCK_MONOTONIC, in ns: a name may come more than once."""

    def __init__(self) -> None:
        self.spans: list[tuple[str, int, int]] = []

    @contextmanager
    def span(self, name: str) -> Iterator[None]:
        began = time.monotonic_ns()
        try:
            yield
        finally:
            self.spans.append((name, began, time.monotonic_ns()))

    def mark(self, name: str) -> None:
        """Record a moment."""
        now = time.monotonic_ns()
        self.spans.append((name, now, now))

    def totals_us(self) -> dict[str, float]:
        """Return µs by name."""
        totals: dict[str, float] = {}
        for name, began, ended in self.spans:
            totals[name] = totals.get(name, 0.0) + (ended - began) / 1e3
        return totals
