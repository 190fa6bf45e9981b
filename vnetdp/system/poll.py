"""Waiting for a descriptor that has something to read."""

from __future__ import annotations

import select
from typing import Protocol


class HasFileno(Protocol):
    """An open file, socket or eventfd."""

    def fileno(self) -> int: ...


def readable(file: HasFileno | int, timeout_s: float) -> bool:
    """Wait for something to read, or a hang-up, for at most so many seconds; return whether there is.

    Not select(), which knows no descriptor above 1,023: a machine of 256 queue pairs has more.
    """
    poll = select.poll()
    poll.register(file, select.POLLIN)
    return bool(poll.poll(1000 * timeout_s))
