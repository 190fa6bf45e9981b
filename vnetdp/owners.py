"""Owners: the two who can run a device's rings, and the hand-over from one to the other.

Configured, based and bound are three different things for vhost: `prepare` does all but the binding, at any time
before it, and whoever then gets the rings is decided by `hand_to`.
"""

from __future__ import annotations

import enum
import logging
import time
from collections import deque
from collections.abc import Sequence

from . import vhost_net
from .backends.base import Backend
from .errors import BackendError
from .notifiers import Notifiers

_log = logging.getLogger("vnetdp.device")

_HANDOVERS_KEPT = 10_000


class Owner(enum.Enum):
    """Who runs the rings."""

    NOBODY = "nobody"
    USERSPACE = "userspace"
    VHOST = "vhost"


class Owners:
    """The userspace datapath's backends, vhost's if there are any, and which of them has the rings."""

    def __init__(self, userspace: Sequence[Backend], vhost: Sequence[Backend] | None, notifiers: Notifiers) -> None:
        self.userspace = userspace
        self.vhost = vhost
        self.notifiers = notifiers
        self.owner = Owner.NOBODY
        self.prepared: vhost_net.Prepared | None = None
        self.fallbacks = 0
        self.handovers = 0
        self.handovers_ns: deque[int] = deque(maxlen=_HANDOVERS_KEPT)
        self.last_error: Exception | None = None

    @property
    def backends(self) -> Sequence[Backend] | None:
        """Those of the present owner."""
        if self.owner is Owner.VHOST:
            return self.vhost
        return self.userspace if self.owner is Owner.USERSPACE else None

    def hand_to(self, owner: Owner, rings: vhost_net.Rings) -> bool:
        """Stop the present owner and start *owner*; False if that could not be started (then nobody owns the rings)."""
        if owner is self.owner:
            return True
        began = time.perf_counter_ns()
        wanted = {Owner.NOBODY: (), Owner.USERSPACE: self.userspace, Owner.VHOST: self.vhost or ()}[owner]
        with vhost_net.standing_still([*(self.backends or ()), *wanted]):
            if self.backends is not None:
                vhost_net.stop(self.backends, rings)
            was, self.owner = self.owner, Owner.NOBODY
            if was is Owner.VHOST:
                self.notifiers.release()
            elif owner is Owner.USERSPACE:
                self.abandon()
            try:
                if owner is Owner.VHOST:
                    self._start_vhost(rings)
                elif owner is Owner.USERSPACE:
                    vhost_net.start(self.userspace, rings)
            except BackendError as e:
                self.last_error = e
                if owner is Owner.VHOST:
                    self.fallbacks += 1
                    _log.warning("unable to start vhost: %s: falling back on userspace virtio", e)
                else:
                    _log.error("unable to start the userspace datapath: %s", e)
                return False
            self.owner = owner
            if owner is not Owner.NOBODY:
                # Whoever held the rings before may have left a decision open: calls may be spurious, but not lost.
                for queue, call in zip(rings.queues, rings.calls, strict=True):
                    if queue.enabled:
                        call.signal()
        self.handovers += 1
        self.handovers_ns.append(time.perf_counter_ns() - began)
        return True

    def _start_vhost(self, rings: vhost_net.Rings) -> None:
        """Configure what is not, and bind; on BackendError nothing is left of it."""
        assert self.vhost is not None
        if self.prepared is None:
            self.notifiers.assign()
            self._park()
        try:
            vhost_net.start(self.vhost, rings, self.prepared)
        except BackendError:
            self.abandon()
            raise
        self.prepared = None
        vhost_net.park(self.vhost, False)

    def _park(self) -> None:
        """Begin to prepare: the worker stands still until its rings are bound, or all is given up."""
        assert self.vhost is not None
        self.prepared = vhost_net.Prepared()
        vhost_net.park(self.vhost, True)

    def prepare(self, rings: vhost_net.Rings) -> bool:
        """Do all of vhost's start but the binding; False, and nothing is left of it, if that fails.

        A second call tells vhost only what is new since the first.
        """
        assert self.vhost is not None and self.owner is Owner.NOBODY
        try:
            if self.prepared is None:
                self.notifiers.assign()
                self._park()
            assert self.prepared is not None
            vhost_net.configure(self.vhost, rings, self.prepared)
        except BackendError as e:
            self.last_error = e
            self.fallbacks += 1
            _log.warning("unable to prepare vhost: %s: it is started anew, or userspace goes on", e)
            self.abandon()
            return False
        return True

    def take_as_bound(self) -> None:
        """Count vhost as the owner of what was prepared: somebody else has bound it, or should have."""
        self.owner = Owner.VHOST
        if self.prepared is not None and self.vhost is not None:
            self.prepared = None
            vhost_net.park(self.vhost, False)

    def abandon(self) -> None:
        """Forget what was prepared."""
        if self.prepared is not None and self.vhost is not None:
            self.prepared = None
            self.notifiers.release()
            vhost_net.park(self.vhost, False)
