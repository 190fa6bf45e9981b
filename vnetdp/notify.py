"""EventFd: a kick (driver to device) or a call (device to driver). And whether a descriptor has something to read."""

from __future__ import annotations

import os
import select
from contextlib import suppress
from typing import Protocol

from .limits import giving
from .owned import Owned


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


class EventFd(Owned):
    """A non-blocking eventfd. `fd`: an open one, which becomes this one's; None makes one, or raises MachineError."""

    def __init__(self, fd: int | None = None) -> None:
        if fd is None:
            with giving("an eventfd"):
                fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self.fd = fd
        """The descriptor; -1 once it is closed."""

    def fileno(self) -> int:
        """Return the descriptor, for select() and poll(): it is readable while the count is not 0."""
        return self.fd

    @property
    def notify(self) -> int:
        """The descriptor, as kernels want to know it. @private"""
        return self.fd

    def signal(self) -> None:
        """Add 1 to the count, unless it is full."""
        with suppress(BlockingIOError):
            os.eventfd_write(self.fd, 1)

    def clear(self) -> int:
        """Set the count to 0, and return what it was."""
        try:
            return os.eventfd_read(self.fd)
        except BlockingIOError:
            return 0

    def close(self) -> None:
        fd, self.fd = self.fd, -1  # first: another thread that closes it, too, finds none
        if fd >= 0:
            os.close(fd)
