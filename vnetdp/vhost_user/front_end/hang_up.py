"""HangUp: a thread that waits for the other end of one connection to close it, or to die."""

from __future__ import annotations

import select
import threading
from collections.abc import Callable

from ...errors import MachineError
from ...shared.notify import EventFd
from ...system import limits


class HangUp:
    """Calls *tell* in a thread of its own, once the connection of descriptor *fd* is closed by its other end.

    The descriptor stays the caller's; `stop` comes before it is closed.
    """

    def __init__(self, fd: int, tell: Callable[[], None]) -> None:
        self._tell = tell
        self._stop = EventFd()
        self._poll = select.poll()
        self._poll.register(fd, select.POLLRDHUP)
        self._poll.register(self._stop.fd, select.POLLIN)
        self._thread = threading.Thread(target=self._wait, name="vhost-user-hang-up", daemon=True)
        try:
            limits.start(self._thread)
        except MachineError:
            self._stop.close()
            raise

    def _wait(self) -> None:
        if all(fd != self._stop.fd for fd, _ in self._poll.poll()):
            self._tell()

    def stop(self) -> None:
        """End the thread, and wait for it: *tell* is not called any more."""
        self._stop.signal()
        if self._thread is not threading.current_thread():
            self._thread.join()
        self._stop.close()
