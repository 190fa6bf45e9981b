"""EventFd: a kick (driver to device) or a call (device to driver)."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from contextlib import suppress

from ..system.limits import giving
from ..system.owned import Owned

_CLOSED = -1
_LATER = -2
_making = threading.Lock()


def _renew() -> None:
    global _making
    _making = threading.Lock()  # a thread of the parent may have had it


os.register_at_fork(after_in_child=_renew)


def _eventfd(count: int) -> int:
    with giving("an eventfd"):
        return os.eventfd(count, os.EFD_NONBLOCK | os.EFD_CLOEXEC)


class EventFd(Owned):
    """A non-blocking eventfd. `fd`: an open one, which becomes this one's; None makes one, or raises MachineError.

    `later`: True makes it only once its descriptor is asked for; signals are counted until then.
    """

    def __init__(self, fd: int | None = None, later: bool = False) -> None:
        self._count = 0  # of signals before it was made
        self._fd = _LATER if later else _eventfd(0) if fd is None else fd

    @property
    def fd(self) -> int:
        """The descriptor; -1 once it is closed. MachineError if it has to be made, and there are no more descriptors."""
        if self._fd == _LATER:
            with _making:
                if self._fd == _LATER:
                    self._fd = _eventfd(self._count)
        return self._fd

    @property
    def made(self) -> int:
        """The descriptor, or -1 if nobody has asked for it. @private"""
        return max(self._fd, _CLOSED)

    def fileno(self) -> int:
        """Return the descriptor, for select() and poll(): it is readable while the count is not 0."""
        return self.fd

    @property
    def notify(self) -> int:
        """The descriptor, as kernels want to know it. @private"""
        return self.fd

    def signal(self) -> None:
        """Add 1 to the count, unless it is full; do nothing once it is closed."""
        if self._fd == _LATER:
            with _making:
                if self._fd == _LATER:
                    self._count += 1
                    return
        fd = self._fd
        if fd >= 0:
            with suppress(BlockingIOError):
                os.eventfd_write(fd, 1)

    def clear(self) -> int:
        """Set the count to 0, and return the count before; 0 once it is closed."""
        if self._fd == _LATER:
            with _making:
                if self._fd == _LATER:
                    count, self._count = self._count, 0
                    return count
        fd = self._fd
        try:
            return os.eventfd_read(fd) if fd >= 0 else 0
        except BlockingIOError:
            return 0

    def adopt(self) -> None:
        super().adopt()
        if self._fd >= 0:
            fd = _eventfd(0)
            os.dup2(fd, self._fd, inheritable=False)  # under the same number, which kernels know
            os.close(fd)

    def close(self) -> None:
        fd, self._fd = self._fd, _CLOSED  # first: another thread that closes it, too, finds none
        if fd >= 0:
            os.close(fd)


class Notifier(EventFd):
    """An eventfd that kernels signal. A kernel that found none made has signalled none: so it begins signalled.

    told: called once it was made later.
    """

    def __init__(self, later: bool, told: Callable[[], None]) -> None:
        super().__init__(later=later)
        self._told = told

    @property
    def fd(self) -> int:
        if self._fd != _LATER:
            return self._fd
        super().signal()
        made = super().fd
        self._told()
        return made

    def clear(self) -> int:
        """Set the count to 0, and return the count before; 0 once it is closed. It is made for that."""
        return max(0, self.fd) and super().clear()

    def forget(self) -> None:
        """Set the count to 0, and make no descriptor for that. @private"""
        super().clear()
