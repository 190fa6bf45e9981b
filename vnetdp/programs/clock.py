"""FrameClock: the time from a flow's first frame to its last, for its rate."""

from __future__ import annotations

import time

LOOK_S = 0.001  # so exact is that time


class FrameClock:
    """Looks at a count of frames, which begins at 0."""

    def __init__(self) -> None:
        self.looked = self._first = self._last = time.monotonic()
        self._count = 0

    def look(self, count: int) -> None:
        """Note the time, and whether frames came since the last look."""
        before, self.looked = self.looked, time.monotonic()
        if count != self._count:
            self._first, self._last = self._first if self._count else before, self.looked
            self._count = count

    @property
    def seconds(self) -> float:
        """From the look before the first frame to the look that saw the last one; 0 if there was none."""
        return self._last - self._first

    def mpps(self, count: int) -> float:
        """Return *count* frames in that time, in millions a second."""
        return count / self.seconds / 1e6 if self.seconds else 0.0
