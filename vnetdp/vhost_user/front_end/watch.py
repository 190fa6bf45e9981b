"""Watch: has a device follow its remote back end, which may die and come back at any moment."""

from __future__ import annotations

import errno
import logging
import threading
from collections.abc import Callable
from typing import Any

from ...device.device import NetDevice
from ...device.owners import Owner
from ...errors import BackendError, ConfigError, EndpointError
from ...shared.notify import EventFd
from ...system import limits
from ...system.owned import Owned
from ...virtio.features import VIRTIO_NET_F_STATUS
from ...virtio.state import VIRTIO_NET_S_LINK_UP
from ..message import U64, BackendRequest, Payload, Request, VringState
from .front_end import VhostUserFrontEnd

_log = logging.getLogger("vnetdp.watch")

_ATTEMPT_S = 1.0  # for one handshake
_BACKOFF_S = (0.02, 1.0)  # first and longest wait between two attempts
_STILL_S = 5.0  # no frame moved for so long: the back end is asked whether it answers


class Watch(Owned):
    """A thread that connects *front_end* again when its back end is gone, and gives the next back end *device*'s rings.

    Until then userspace has the rings if the device falls back, else they have no owner. A front end that was made with
    `watched` has its back end's own requests answered: another configuration, a call, a ring that broke.

    `moved`: a function that returns how many frames have moved. While that does not change, the back end is asked every
    5 s whether it still answers. None: a back end that hangs shows only when a verb asks it something.

    Only the watch may call `connect`. Close it before device and front end.
    """

    def __init__(self, front_end: VhostUserFrontEnd, device: NetDevice, moved: Callable[[], int] | None = None) -> None:
        self._front_end = front_end
        self._moved = moved
        self._count = -1
        self._device = device
        self._stop = threading.Event()
        self._wake = EventFd()
        self._refusal = ""
        self._thread = threading.Thread(target=self._run, name="vhost-user-watch", daemon=True)
        limits.start(self._thread)

    def _run(self) -> None:
        while not self._stop.is_set():
            if self._front_end.connected:
                if self._front_end.wait(self._wake.fd, None if self._moved is None else _STILL_S):
                    self._serve(self._front_end.take_request())
                elif self._moved is not None:
                    self._look_alive(self._moved())
            else:
                self._follow()

    def _serve(self, asked: tuple[BackendRequest, Payload] | None) -> None:
        """Carry out a request of the back end."""
        if asked is None:
            return
        request, payload = asked
        if request is BackendRequest.CONFIG_CHANGE_MSG:
            self._take_config()
        elif isinstance(payload, VringState) and payload.index < len(self._device.calls):
            if request is BackendRequest.VRING_CALL:
                self._device.calls[payload.index].signal()
            else:
                _log.warning("%s: the back end reports that vring %d broke", self._front_end.path, payload.index)
                self._device.mark_broken()

    def _look_alive(self, count: int) -> None:
        """Ask the back end for its features if no frame moved since the last look; if it hangs, take its rings."""
        before, self._count = self._count, count
        if count != before or self._stop.is_set() or not self._front_end.connected:
            return
        try:
            self._front_end.ask(Request.GET_FEATURES, U64)
        except BackendError as e:
            if e.errno != errno.ESRCH:  # a back end that is gone is followed as ever
                self._device.restart_vhost()

    def _take_config(self) -> None:
        """Copy the back end's configuration into the device: MAC address, link and MTU."""
        try:
            config = self._front_end.read_config()
            if config is None:
                return
            changes: dict[str, Any] = {"mtu": config.mtu} if config.mtu else {}
            if self._front_end.features & VIRTIO_NET_F_STATUS:
                changes["net_status"] = config.status & VIRTIO_NET_S_LINK_UP
            self._device.set_control(mac=config.mac, **changes)
        except (BackendError, ConfigError, EndpointError) as e:
            _log.warning("%s: the back end's configuration can't be used: %s", self._front_end.path, e)

    def _follow(self) -> None:
        """Have userspace go on, if it can, until there is a back end again."""
        backoff, longest = _BACKOFF_S
        while not self._stop.is_set():
            self._device.take_from(Owner.VHOST)
            if self._device.fallback and self._device.owner is Owner.NOBODY:
                self._device.restart_vhost()  # it hung, and may have let go
            if self._attach():
                return
            self._stop.wait(backoff)
            backoff = min(2 * backoff, longest)

    def _attach(self) -> bool:
        try:
            if not self._front_end.connect(_ATTEMPT_S, self._stop.is_set):
                return False
        except (BackendError, ConfigError) as e:
            if str(e) != self._refusal:
                _log.warning("%s: the next back end can't be used: %s", self._front_end.path, e)
            self._refusal = str(e)
            return False
        self._device.restart_vhost()
        if self._device.ready and self._device.owner is Owner.NOBODY:
            self._front_end.disconnect()  # it did not take the rings: another may
            return False
        self._refusal = ""
        return True

    def close(self) -> None:
        """End the thread. The connection and the rings stay as they are."""
        if not self.inherited:
            self._stop.set()
            self._wake.signal()
            self._thread.join()
        self._wake.close()
