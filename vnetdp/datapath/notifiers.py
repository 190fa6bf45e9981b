"""Notifiers: the eventfds of a device's queues, and their listeners: the device's own loop, vhost or the guest.

While vhost runs the rings the device's own loop has let go of each kick (a host notifier, as an ioeventfd that was
grabbed), and calls go straight to the guest (guest notifiers, as an irqfd). Each is taken once and given back once.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import ExitStack

from ..errors import BackendError
from ..shared.notify import Notifier
from ..system.owned import Owned
from ..virtio.queue import queues_of

_log = logging.getLogger("vnetdp.notifiers")


class Notifiers(Owned):
    """Kicks and calls of *queue_pairs* pairs, queue by queue: receiveq 2i, transmitq 2i + 1.

    grabs: pairs whose ioeventfd is grabbed; host: queues with a host notifier; guest: times guest notifiers are assigned.
    All three are 0 while vhost has none. `grab_ioeventfd`, `set_host_notifier` and `set_guest_notifiers` may raise
    BackendError. later: each eventfd is made only once its descriptor is asked for (`on_made`).
    """

    def __init__(self, queue_pairs: int, later: bool = False) -> None:
        self.queue_pairs = queue_pairs
        with ExitStack() as made:
            self.kicks = [made.enter_context(Notifier(later, self._tell)) for _ in range(queues_of(queue_pairs))]
            self.calls = [made.enter_context(Notifier(later, self._tell)) for _ in range(queues_of(queue_pairs))]
            made.pop_all()
        self.grabs = 0
        self.host = 0
        self.guest = 0
        self._on_close: list[Callable[[], None]] = []
        self._on_made: list[Callable[[], None]] = []

    def on_made(self, call: Callable[[], None]) -> None:
        """Have *call* called each time a descriptor was made: kernels have to know it (`made`)."""
        self._on_made.append(call)

    def _tell(self) -> None:
        for call in self._on_made:
            call()

    @property
    def made(self) -> list[tuple[int, int]]:
        """The descriptors of kick and call of each queue; -1 for one that nobody has asked for."""
        return [(kick.made, call.made) for kick, call in zip(self.kicks, self.calls, strict=True)]

    def make(self) -> None:
        """Make every eventfd that is not; MachineError if there are no more descriptors."""
        for event in (*self.kicks, *self.calls):
            event.fileno()

    def on_close(self, call: Callable[[], None]) -> None:
        """Have *call* called before the descriptors are closed; not in a forked child."""
        self._on_close.append(call)

    def assign(self) -> None:
        """Give every notifier to vhost; on BackendError all are taken back."""
        with ExitStack() as undo:
            for pair in range(self.queue_pairs):
                self.grab_ioeventfd(pair)
                undo.callback(self._release_ioeventfd)
            for queue in range(queues_of(self.queue_pairs)):
                self.set_host_notifier(queue)
                undo.callback(self._unset_host_notifier)
            self.set_guest_notifiers(True)
            undo.pop_all()

    def release(self) -> None:
        """Take every notifier back. If guest notifiers can't be taken back, log that, and take the rest."""
        try:
            self.set_guest_notifiers(False)
        except BackendError as e:
            _log.warning("guest notifier cleanup failed: %s", e)
            self.guest -= 1
        for _ in range(queues_of(self.queue_pairs)):
            self._unset_host_notifier()
        for _ in range(self.queue_pairs):
            self._release_ioeventfd()

    def clear(self) -> None:
        """Clear the kicks and calls that are pending."""
        for event in (*self.kicks, *self.calls):
            event.forget()

    def grab_ioeventfd(self, pair: int) -> None:
        """Have the device's own loop let go of the kicks of *pair*."""
        self.grabs += 1

    def set_host_notifier(self, queue: int) -> None:
        """Lead the kicks of *queue* to vhost."""
        self.host += 1

    def set_guest_notifiers(self, assign: bool) -> None:
        """Lead all calls from vhost straight to the guest, or no longer."""
        self.guest += 1 if assign else -1

    def _release_ioeventfd(self) -> None:
        self.grabs -= 1

    def _unset_host_notifier(self) -> None:
        self.host -= 1

    @property
    def balanced(self) -> bool:
        """True if vhost has every notifier once, or none at all."""
        return (self.grabs, self.host, self.guest) in (
            (0, 0, 0),
            (self.queue_pairs, queues_of(self.queue_pairs), 1),
        )

    @property
    def with_vhost(self) -> bool:
        return self.grabs > 0

    def close(self) -> None:
        calls, self._on_close = self._on_close, []
        for call in reversed(calls if not self.inherited else []):
            call()
        for event in (*self.kicks, *self.calls):
            event.close()
