"""EventFd: a kick (driver to device) or a call (device to driver)."""

from __future__ import annotations

import os
from contextlib import suppress

from ..system.limits import giving
from ..system.owned import Owned


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
        """Add 1 to the count, unless it is full; do nothing once it is closed."""
        fd = self.fd
        if fd >= 0:
            with suppress(BlockingIOError):
                os.eventfd_write(fd, 1)

    def clear(self) -> int:
        """Set the count to 0, and return the count before; 0 once it is closed."""
        fd = self.fd
        try:
            return os.eventfd_read(fd) if fd >= 0 else 0
        except BlockingIOError:
            return 0

    def close(self) -> None:
        fd, self.fd = self.fd, -1  # first: another thread that closes it, too, finds none
        if fd >= 0:
            os.close(fd)
