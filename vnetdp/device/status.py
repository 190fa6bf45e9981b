"""DeviceStatus: a device's status field and its broken queues, which a worker's thread changes beside the driver."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from ..backends.base import Backend
from ..errors import GuestError
from ..shared.notify import EventFd
from ..system.owned import Owned, OwnedLock
from ..virtio.queue import Virtqueue, pair_of, queues_of, vring_of
from ..virtio.state import VIRTIO_CONFIG_S_DRIVER_OK, VIRTIO_CONFIG_S_NEEDS_RESET, StateDelta

_log = logging.getLogger("vnetdp.device")


class DeviceStatus(Owned):
    """status: as the driver reads it (Virtio 1.2, 2.1). broken: the rows.E_* of each queue that broke, until it is reset.
    halted: no ring may run before the device is reset.

    `lock` is held for moments only: a worker's thread, finding a broken queue, can't wait for the device's lock, whose
    holder may be waiting for that thread to stand still. *config_call* notifies the driver of a changed configuration.
    """

    def __init__(self, config_call: EventFd) -> None:
        self.lock = OwnedLock(self)
        self.status = 0
        self.broken: dict[int, int] = {}
        self.halted = False
        self._config_call = config_call

    @property
    def driver_ok(self) -> bool:
        return bool(self.status & VIRTIO_CONFIG_S_DRIVER_OK)

    def notify_config(self) -> None:
        """Notify the driver of a changed configuration (2.3), if it is ready."""
        if self.driver_ok:
            self._config_call.signal()

    def load(self, delta: StateDelta) -> None:
        """Take over the state of another device; hold `lock`."""
        if "status" in delta.registers:
            self.status, self.halted = delta.registers["status"], False
        for index in delta.queues:
            self.broken.pop(index, None)

    def write_status(self, status: int) -> None:
        """Take the driver's write: only a reset takes NEEDS_RESET back."""
        with self.lock:
            self.status = status | self.status & VIRTIO_CONFIG_S_NEEDS_RESET

    def look(self, backends: Sequence[Backend], queues: Sequence[Virtqueue]) -> GuestError | None:
        """Enter which queues broke since the last look, and return the last of them; hold `lock`."""
        found = None
        for n, queue in enumerate(queues[: queues_of(len(backends))]):
            status = backends[pair_of(n)].status(vring_of(n))
            # A queue that was reset is not broken, even if its backend still says so.
            if status and queue.enabled and n not in self.broken:
                self.broken[n] = status
                found = GuestError(n, status)
                _log.warning("%s; the queue is stopped until the driver resets it", found)
        return found

    def errors(self) -> list[GuestError]:
        with self.lock:
            return [GuestError(n, status) for n, status in sorted(self.broken.items())]

    def needs_reset(self) -> None:
        """Set DEVICE_NEEDS_RESET, and notify the driver (2.1.2), once."""
        with self.lock:
            if not self.status & VIRTIO_CONFIG_S_NEEDS_RESET:
                self.status |= VIRTIO_CONFIG_S_NEEDS_RESET
                self.notify_config()

    def halt(self) -> None:
        """Have no ring run before a reset."""
        self.halted = True
        self.needs_reset()

    def reset(self) -> None:
        """Forget everything; hold `lock`."""
        self.status = 0
        self.broken.clear()
        self.halted = False
