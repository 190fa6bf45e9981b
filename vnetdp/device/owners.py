"""Owners: userspace and vhost, which can run a device's rings, and the hand-over from one to the other.

Configured, based and bound are three different things for vhost: `prepare` does all but the binding, at any time
before it, and `hand_to` decides which owner then gets the rings.
"""

from __future__ import annotations

import enum
import errno
import logging
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import ExitStack, nullcontext
from functools import partial

from ..backends.base import Backend
from ..datapath.loop_thread import LoopThread
from ..datapath.notifiers import Notifiers
from ..errors import BackendError, UnbindError
from ..system.owned import Owned
from ..virtio.queue import VRINGS, pair_of, vring_of
from . import vhost_net

_log = logging.getLogger("vnetdp.device")

_HANDOVERS_KEPT = 10_000


class Owner(enum.Enum):
    """The owner of a device's rings: the present runner of the device's side of them."""

    NOBODY = "nobody"
    """No ring moves: the driver is not ready, the link is down, the device is stopped, or vhost failed without fallback."""
    USERSPACE = "userspace"
    """The device's own datapath."""
    VHOST = "vhost"
    """The backends that the device was given: a worker, a worker process, or a vhost-user back end."""


class Owners(Owned):
    """The userspace datapath's backends, vhost's if there are any, and which of them has the rings.

    check: called before rings are taken from an owner, once it stands still. fallback: whether userspace gets the rings
    if vhost can't start, for the log.
    """

    def __init__(
        self,
        userspace: Sequence[Backend],
        vhost: Sequence[Backend] | None,
        notifiers: Notifiers,
        check: Callable[[], None] = lambda: None,
        fallback: bool = True,
    ) -> None:
        self._check = check
        self._instead = "falling back on userspace virtio" if fallback else "the rings have no owner until vhost starts"
        self.userspace = userspace
        self.vhost = vhost
        self._workers = vhost_net.one_a_worker(vhost or ())
        self.notifiers = notifiers
        self.owner = Owner.NOBODY
        self.prepared: vhost_net.Prepared | None = None
        self.fenced = False  # vhost hangs, and may go on with rings that it had: no owner gets any
        self.fallbacks = 0
        self.unwound_ns: tuple[int, int] | None = None  # when the last binding that failed was undone, CLOCK_MONOTONIC
        self.handovers = 0
        self.handovers_ns: deque[int] = deque(maxlen=_HANDOVERS_KEPT)
        self.last_error: Exception | None = None
        self._said = ""  # why vhost can't start, until it does
        self._listening = ExitStack()
        self.on_change: list[Callable[[bool], None]] = []
        """Called once the rings have left an owner, with whether that was gone, and once another has them, with False."""

    def listen(self, gone: Callable[[Owner], None]) -> None:
        """Have either owner's backends call *check* when a ring broke, and *gone*, with the owner, if they are gone."""
        for owner, backends in (
            (Owner.VHOST, self._workers),
            (Owner.USERSPACE, vhost_net.one_a_worker(self.userspace)),
        ):
            for backend in backends:
                self._listening.callback(backend.listen(self._check, partial(gone, owner)))

    def check_outside(self) -> None:
        """Raise ConfigError if the calling thread runs the rings: a change of the device waits for it to pause."""
        for backend in (*self._workers, *self.userspace[:1]):
            if isinstance(backend.worker, LoopThread):
                backend.worker.check_outside()

    @property
    def backends(self) -> Sequence[Backend] | None:
        """The backends of the present owner; None without an owner."""
        if self.owner is Owner.VHOST:
            return self.vhost
        return self.userspace if self.owner is Owner.USERSPACE else None

    def counters(self) -> list[dict[str, int]]:
        """Return packets, bytes, drops, calls and kicks of each queue, over both owners."""
        totals = []
        for pair in range(len(self.userspace)):
            for vring in range(VRINGS):
                parts = [b[pair].counters(vring) for b in (self.userspace, self.vhost) if b is not None]
                totals.append({key: sum(part[key] for part in parts) for key in parts[0]})
        return totals

    def hand_to(self, owner: Owner, rings: vhost_net.Rings) -> bool:
        """Stop the present owner and start *owner*; False if either fails, and the rings have no owner then."""
        if owner is self.owner:
            return True
        if self.fenced and not self._regain(rings):
            return False
        began = time.perf_counter_ns()
        wanted = self.userspace if owner is Owner.USERSPACE else (self.vhost or ()) if owner is Owner.VHOST else ()
        if self.prepared is not None and owner is Owner.VHOST:
            wanted = ()  # parked already
        present = self.backends
        held = [*(present or ()), *wanted]
        gone: BackendError | None = None
        with vhost_net.standing_still(held) if held else nullcontext():
            if present is not None:
                self._check()
                try:
                    gone = vhost_net.stop(present, rings)
                except UnbindError as e:
                    self._fence(e)
            was, self.owner = self.owner, Owner.NOBODY
            if was is Owner.VHOST:
                self.notifiers.release()
            elif owner is Owner.USERSPACE:
                self.abandon()
            if was is not Owner.NOBODY:
                self._tell(gone is not None)
            if self.fenced:
                return owner is Owner.NOBODY
            try:
                if owner is Owner.VHOST:
                    self._start_vhost(rings)
                elif owner is Owner.USERSPACE:
                    vhost_net.start(self.userspace, rings)
                    if gone is not None:
                        self.last_error = gone
                        self._say_once(gone, rings)
            except UnbindError as e:
                self._fence(e)
                return False
            except BackendError as e:
                self.last_error = e
                if owner is Owner.VHOST:
                    self.fallbacks += 1
                    self._say_once(e, rings)
                else:
                    _log.error("unable to start the userspace datapath: %s", e)
                return False
            self.owner = owner
            if owner is Owner.VHOST:
                self._said = ""
        if self.prepared is not None and owner is Owner.VHOST:
            self.take_as_bound()
        self.handovers += 1
        self.handovers_ns.append(time.perf_counter_ns() - began)
        if owner is not Owner.NOBODY:
            self._tell(False)
        return True

    def _tell(self, gone: bool) -> None:
        for call in tuple(self.on_change):
            call(gone)

    def _say_once(self, error: BackendError, rings: vhost_net.Rings) -> None:
        """Log why vhost can't start, or is gone, and the owner in its place, unless the last line was the same."""
        said = f"unable to start vhost: {error}: {self._instead}"
        if error.errno == errno.ESRCH:
            numbers = [n for n, _, _ in vhost_net.enabled_queues(rings)]
            said = f"vhost is gone: {error.detail}: {self._instead} ({_named(numbers)})"
        if said != self._said:
            _log.warning("%s", said)
        self._said = said

    def _fence(self, error: UnbindError) -> None:
        self.fenced = True
        self.last_error = error
        _log.error("%s", error.detail)

    def _regain(self, rings: vhost_net.Rings) -> bool:
        """Try again to have vhost unbind every ring; the used rings tell where it stopped."""
        try:
            for backend in self.vhost or ():
                for index in range(VRINGS):
                    backend.set_backend(index, None)
        except UnbindError as e:
            self.last_error = e
            return False
        self.fenced = False
        for n, _, _ in vhost_net.enabled_queues(rings):
            rings.queues[n].last_avail_idx = vhost_net.used_idx(rings.memory, rings.queues[n])
        return True

    def _start_vhost(self, rings: vhost_net.Rings) -> None:
        """Configure the rest, and bind; undo both on any exception. The worker stays parked if it succeeds."""
        prepared = self._configure(rings)
        assert self.vhost is not None
        try:
            vhost_net.bind(self.vhost, rings, prepared, len(self._workers) == 1)
        except BaseException:
            self.abandon()
            if prepared.failed_ns:
                self.unwound_ns = prepared.failed_ns, time.monotonic_ns()
            raise

    def _configure(self, rings: vhost_net.Rings) -> vhost_net.Prepared:
        """Tell vhost the changes; on any exception abandon its start. Workers are parked until the rings are bound."""
        assert self.vhost is not None
        if self.prepared is None:
            self.notifiers.assign()
            self.prepared = vhost_net.Prepared()
            for worker in self._workers:
                worker.park(True)  # to stop a thread costs more than all verbs that it gets meanwhile
        try:
            vhost_net.configure(self.vhost, rings, self.prepared)
        except BaseException:
            self.abandon()
            raise
        return self.prepared

    def prepare(self, rings: vhost_net.Rings) -> bool:
        """Do all of vhost's start but the binding; False, and nothing is left of it, if that fails.

        A second call tells vhost only the changes since the first.
        """
        assert self.owner is Owner.NOBODY
        try:
            self._configure(rings)
        except BackendError as e:
            self.last_error = e
            self.fallbacks += 1
            _log.warning(
                "unable to prepare vhost: %s: vhost is started again after the commit, or userspace takes the rings", e
            )
            return False
        return True

    def take_as_bound(self) -> None:
        """Count vhost as the owner of the prepared rings: the caller has bound them, or should have."""
        self.owner = Owner.VHOST
        if self.prepared is not None and self.vhost is not None:
            self._release()

    def _release(self) -> None:
        self.prepared = None
        for worker in self._workers:
            worker.park(False)

    def start_queue(self, rings: vhost_net.Rings, index: int) -> None:
        """Enable a queue, and have the owner, if there is one, start its ring; BackendError, and it is not enabled."""
        if self.backends is None:
            rings.queues[index].enabled = True
            return
        pair, vring = pair_of(index), vring_of(index)
        with self.backends[pair].hold():
            vhost_net.start_vring(self.backends[pair], rings, pair, vring)
            self.backends[pair].set_backend(vring, rings.endpoint)
            rings.queues[index].enabled = True

    def stop_queue(self, rings: vhost_net.Rings, index: int) -> None:
        """Have the owner, if there is one, stop the ring of an enabled queue; UnbindError if it may go on with it."""
        if self.backends is not None and rings.queues[index].enabled:
            pair, vring = pair_of(index), vring_of(index)
            vhost_net.stop_vring(self.backends[pair], rings, pair, vring)

    def set_log(self, rings: vhost_net.Rings) -> None:
        """Tell the owner, if there is one, of the dirty log of *rings*, or that there is none any more."""
        if self.backends is not None:
            vhost_net.set_log(self.backends, rings)

    def close(self) -> None:
        """Listen no more. The backends are the caller's."""
        self._listening.close()

    def abandon(self) -> None:
        """Forget that vhost was prepared."""
        if self.prepared is not None and self.vhost is not None:
            self.notifiers.release()
            self._release()


def _named(rings: Sequence[int]) -> str:
    """Return `ring 0`, `rings 0 to 3`, or all numbers if one between is missing."""
    if len(rings) > 2 and rings[-1] - rings[0] == len(rings) - 1:
        return f"rings {rings[0]} to {rings[-1]}"
    return f"ring{'s' * (len(rings) != 1)} {' and '.join(map(str, rings)) if len(rings) < 3 else ', '.join(map(str, rings))}"
