"""Spans: named durations, on the one clock that both sides of a migration on one machine share."""

from __future__ import annotations

import time
from contextlib import AbstractContextManager


class _Span:
    """One span: a class, since a generator takes as long as some spans."""

    def __init__(self, name: str, spans: list[tuple[str, int, int]]) -> None:
        self._name = name
        self._spans = spans

    def __enter__(self) -> None:
        self._began = time.monotonic_ns()

    def __exit__(self, *exc: object) -> None:
        self._spans.append((self._name, self._began, time.monotonic_ns()))


class Spans:
    """Named spans of CLOCK_MONOTONIC, in ns: a name may come more than once."""

    def __init__(self) -> None:
        self.spans: list[tuple[str, int, int]] = []

    def span(self, name: str) -> AbstractContextManager[None]:
        """Return a context that records the length of its block as a span."""
        return _Span(name, self.spans)

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
