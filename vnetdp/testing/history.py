"""History: the events of a test in order, each with its time, as JSON lines."""

from __future__ import annotations

import errno
import json
import time
from collections import deque
from pathlib import Path
from typing import Any

from ..backends.base import Backend
from ..backends.faulty import Faults, FaultyBackend, point_of
from ..backends.verbs import Verb
from ..errors import BackendError

_KEPT = 100_000


class History:
    """The last 100,000 events of a `Vnet`, each a dict: `at_s`, in seconds since its start, `event`, and more by event.

    - `owner`: a change of owner, `owner` and `indices`, the next avail index of each queue;
    - `verb`: a vhost verb, `verb`, `pair`, `vring` (None for a verb of a device) and `error` (None if it succeeded);
    - `violation`: an invariant that was violated, `owner` and `text`;
    - `frame`: a frame that was lost, doubled, late or corrupted, with the fields of `Fate`; entered at the end.
    """

    def __init__(self) -> None:
        self._began = time.monotonic()
        self.events: deque[dict[str, Any]] = deque(maxlen=_KEPT)
        """The events, oldest first."""

    def now_s(self) -> float:
        """Return the seconds since the start."""
        return round(time.monotonic() - self._began, 6)

    def add(self, event: str, **values: Any) -> None:
        """Enter an event of now."""
        self.events.append({"at_s": self.now_s(), "event": event} | values)

    def lines(self) -> str:
        """Return the events as JSON, a line each."""
        return "".join(json.dumps(event) + "\n" for event in tuple(self.events))

    def write(self, path: Path) -> None:
        """Write `lines` to the file *path*."""
        path.write_text(self.lines())


class Recorder(FaultyBackend):
    """A backend whose verbs fail as faults say, and stand in the history."""

    def __init__(self, inner: Backend, pair: int, faults: Faults, history: History) -> None:
        super().__init__(inner, pair, faults)
        self._history = history

    def apply(self, verb: Verb) -> int:
        error: str | None = "unknown"
        try:
            answer = super().apply(verb)
            error = None
        except BackendError as e:
            error = errno.errorcode.get(e.errno, str(e.errno))
            raise
        finally:
            self._history.add("verb", verb=point_of(verb), pair=self._pair, vring=verb.index, error=error)
        return answer
