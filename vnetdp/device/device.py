"""NetDevice: an emulated virtio-net device, as its driver sees it, and its rings' owners (Virtio 1.2, 2 and 5.1).

The device has a userspace datapath always, and a vhost worker if it was given one. Whenever the driver is ready, the
link up and the device running, the worker gets the rings; any failure of any verb gives them to userspace, and the next
status set tries again. A hand-over may happen at any moment, under traffic.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack
from typing import Any

from vnetdp_kernels import rows as r

from ..backends.base import Backend, HasBackends, backends_of
from ..datapath.notifiers import Notifiers
from ..endpoints.base import Endpoint
from ..endpoints.clock import Clock
from ..errors import BackendError, ConfigError, GuestError, UnbindError
from ..shared.memory import DirtyLog, GuestMemory
from ..shared.notify import EventFd
from ..system.owned import Owned, OwnedLock
from ..virtio import features as f
from ..virtio.queue import Virtqueue
from ..virtio.state import CONFIG_SPACE, DEFAULT_MAC, VIRTIO_NET_S_LINK_UP, Control, DeviceState, StateDelta
from . import vhost_net
from .own_datapath import OwnDatapath, hand_in
from .owners import Owner, Owners
from .registers import Registers
from .status import DeviceStatus

_log = logging.getLogger("vnetdp.device")


class NetDevice(Owned):
    """A virtio-net device (Virtio 1.2, 5.1): rings in *memory*, and *endpoint*, where its frames come from and go to.

    - `queue_pairs`: 1 to 1024. Queue 2i is the receiveq, 2i + 1 the transmitq of pair i, which queue i of *endpoint*
      serves.
    - `mac`: the card's address, 6 bytes.
    - `mtu`: the MTU to offer (VIRTIO_NET_F_MTU), 68 to 65535 bytes; the endpoint is set to it. None offers none.
    - `offered`: feature bits to offer (see `features`); None offers all that the device and *endpoint* support.
    - `vhost`: a `Worker`, a `WorkerProcess`, a `VhostUserFrontEnd`, or a sequence of their `backends`, one for each
      queue pair, that no other device uses. None: userspace alone.
    - `threaded`: True runs the userspace datapath in a thread of the device; False moves frames in `step` alone.
    - `poll_us`: microseconds for which that thread busy-polls before it sleeps; 0 sleeps at once, -1 never sleeps.
    - `max_num`: descriptors of the largest queue that a driver may set up, a power of two up to 32768.
    - `fallback`: True gives the rings to userspace while vhost cannot have them; False leaves them without an owner.
    - `running`: False makes a device whose machine does not run yet, such as a migration's destination (`set_running`).
    - `clock`: a simulator's `Clock`, which endpoint and driver then read; None: the machine's. It needs `threaded=False`.
    - `notifiers`: internal.

    ConfigError or EndpointError if an argument cannot be. The caller closes memory, endpoint and worker, after the
    device.
    """

    config_call: EventFd
    """It is signalled to notify the driver of a changed configuration (Virtio 1.2, 2.3)."""

    def __init__(
        self,
        memory: GuestMemory,
        endpoint: Endpoint,
        *,
        queue_pairs: int = 1,
        mac: bytes = DEFAULT_MAC,
        mtu: int | None = None,
        offered: int | None = None,
        vhost: HasBackends | Sequence[Backend] | None = None,
        threaded: bool = True,
        poll_us: int = 0,
        max_num: int = 1024,
        fallback: bool = True,
        running: bool = True,
        clock: Clock | None = None,
        notifiers: Notifiers | None = None,
    ) -> None:
        backends = None if vhost is None else backends_of(vhost, queue_pairs)
        self._registers = Registers(endpoint, queue_pairs, mac, mtu, offered, max_num)
        hand_in(clock, endpoint, threaded, backends or ())
        self.clock = clock
        self.queues = self._registers.queues
        """Size, addresses and state of each queue, for reading: a list of `Virtqueue`."""
        self.memory = memory
        self.endpoint = endpoint
        self.queue_pairs = queue_pairs
        self.max_num = max_num
        self.fallback = fallback
        self.log: DirtyLog | None = None
        """The dirty log that `set_log` set; None while writes to guest memory are not logged."""
        self.vhost = backends
        """The backends that the device was given, one for each queue pair; None: userspace alone."""
        self.use_vhost = vhost is not None
        """True while vhost is the owner to choose (`set_use_vhost`), whether or not it has the rings."""
        self.last_error: Exception | None = None
        """The last failure of an owner, a queue or the endpoint; None if there was none."""
        with ExitStack() as made:
            self.notifiers = notifiers or Notifiers(queue_pairs, later=not threaded and vhost is None)
            made.callback(self.notifiers.close)
            self.config_call = made.enter_context(EventFd(later=not threaded))
            self.userspace = OwnDatapath(queue_pairs, threaded, poll_us)
            made.pop_all()
        self.notifiers.on_made(lambda: self.userspace.plug(self.notifiers.made))
        self.kicks = self.notifiers.kicks
        """An `EventFd` for each queue, by which the driver notifies the device."""
        self.calls = self.notifiers.calls
        """An `EventFd` for each queue, by which the device notifies the driver."""
        self._lock = OwnedLock(self, lambda: self._owners.check_outside())
        self._status = DeviceStatus(self.config_call)
        self._running = running
        self._owners = Owners(self.userspace.backends, self.vhost, self.notifiers, self.check_rings, fallback)
        with ExitStack() as made:
            made.callback(self.close)
            self._owners.listen(self.take_from)
            made.pop_all()

    # --- registers, as a driver uses them ---

    @property
    def status(self) -> int:
        """The device status field, as its driver reads it (Virtio 1.2, 2.1)."""
        return self._status.status

    @property
    def device_features(self) -> int:
        """The feature bits that the device offers (Virtio 1.2, 2.2)."""
        return self._registers.offered

    @property
    def driver_features(self) -> int:
        """The feature bits that the driver accepted; 0 before it did."""
        return self._registers.features

    @property
    def control(self) -> Control:
        """MAC address, MTU, link state, filters and offloads, as control commands or the host set them."""
        return self._registers.control

    def set_driver_features(self, features: int) -> None:
        """Set the feature bits that the driver accepts; `set_status` then checks them (Virtio 1.2, 3.1.1).

        ConfigError after FEATURES_OK: the device has to be reset first.
        """
        with self._lock:
            self._registers.accept(features, self.status)

    def set_status(self, status: int) -> None:
        """Write the device status field (Virtio 1.2, 2.1): 0 resets the device, DRIVER_OK gives the rings an owner.

        FEATURES_OK and DRIVER_OK stay clear if the accepted features are not a subset of those offered, or lack a
        feature that one of them needs.
        """
        with self._lock:
            if status == 0:
                self._reset()
                return
            status, error = self._registers.agree(status, self.status)
            self.last_error = error or self.last_error
            self._status.write_status(status)
            self._update_owner()

    def set_queue(self, index: int, num: int, desc: int, avail: int, used: int) -> None:
        """Set a queue's size, in descriptors, and the guest addresses of its three parts (Virtio 1.2, 4.1.4.3).

        ConfigError if the queue is enabled, or size or an address cannot be.
        """
        with self._lock:
            self._registers.set_queue(index, Virtqueue(num, desc, avail, used))

    def enable_queue(self, index: int) -> None:
        """Enable a queue. After DRIVER_OK, which is to say after `reset_queue`, the owner of the rings starts it at once.

        ConfigError if the device lacks that queue, or the queue has no addresses.
        """
        with self._lock:
            queue = self._registers.complete_queue(index)
            if queue.enabled:
                return
            try:
                self._owners.start_queue(self.rings(), index)
            except BackendError as e:
                # Not enabled as yet: the backend does not know its index, and would give back one of another time.
                self._hand_to(Owner.NOBODY)
                queue.enabled = True
                self._restart_after(e)

    def reset_queue(self, index: int) -> None:
        """Reset one queue while the others go on (Virtio 1.2, 2.6.1). It is then as after a reset of the device."""
        with self._lock:
            self._registers.queue(index)
            try:
                self._owners.stop_queue(self.rings(), index)
            except UnbindError as e:
                self._restart_after(e)
            with self._status.lock:
                self._registers.reset_queue(index)
                self._status.broken.pop(index, None)

    def read_config(self, offset: int, length: int) -> bytes:
        """Return *length* bytes of the configuration space: mac, status, max_virtqueue_pairs, mtu (Virtio 1.2, 5.1.4).

        ConfigError if that is not within its 12 bytes.
        """
        return self._registers.read_config(offset, length)

    def set_link(self, up: bool) -> None:
        """Set the link state. While the link is down the rings have no owner."""
        with self._lock:
            self.set_control(net_status=self.control.net_status & ~VIRTIO_NET_S_LINK_UP | VIRTIO_NET_S_LINK_UP * up)

    def set_control(self, **changes: Any) -> None:
        """Change fields of `control`, given by name, and notify the driver if it reads them in the configuration space.

        ConfigError or EndpointError, and no change, if a value cannot be or the endpoint refuses it.
        """
        with self._lock:
            before, wanted = self.control, self._registers.set_control(changes)
            if any(getattr(wanted, name) != getattr(before, name) for name in CONFIG_SPACE):
                self._status.notify_config()
            if wanted.link_up != before.link_up:
                self._update_owner()

    def set_running(self, running: bool) -> None:
        """Resume the device, or stop it, as a virtual machine does. While it is stopped the rings have no owner."""
        with self._lock:
            self._running = running
            self._update_owner()

    @property
    def running(self) -> bool:
        """True unless the device was made with `running=False`, or `set_running` stopped it."""
        return self._running

    def set_use_vhost(self, use: bool) -> None:
        """Hand the rings over to vhost, or to userspace, at once and under traffic.

        ConfigError if the device was made without `vhost`. If vhost fails, see `fallback`, `last_error` and `owner`.
        """
        with self._lock:
            if use and self.vhost is None:
                raise ConfigError("the device was made without a vhost worker: give NetDevice one (vhost=)")
            self.use_vhost = use
            self._update_owner()

    def restart_vhost(self) -> None:
        """Take the rings from vhost, and try to give them to it again: for a back end that is gone, or came back."""
        with self._lock:
            if self.owner is Owner.VHOST:
                self._hand_to(Owner.NOBODY)
            self._update_owner()

    def take_from(self, owner: Owner) -> None:
        """Take the rings from an owner that is gone, and give them to the next one, if the device falls back. @private"""
        with self._lock:
            # NOBODY: an exception, such as ^C, broke off the change from this owner or to it.
            if self.owner in (owner, Owner.NOBODY) and (self.fallback or owner is Owner.USERSPACE):
                self._hand_to(Owner.NOBODY)
                self._update_owner()

    def set_log(self, log: DirtyLog | None) -> None:
        """Log the device's writes to guest memory in *log*, or with None in no log. The rings keep their owner.

        BackendError, and no change, if logging can't be started. The log stays the caller's.
        """
        with self._lock:
            before, self.log = self.log, log
            try:
                self._owners.set_log(self.rings())
            except BackendError as e:
                if log is not None:
                    self.log = before
                    try:
                        self._owners.set_log(self.rings())
                    except BackendError as again:
                        self._restart_after(again)
                    raise
                self._restart_after(e)

    # --- owners ---

    @property
    def owner(self) -> Owner:
        """The present owner of the rings."""
        return self._owners.owner

    @property
    def on_owner(self) -> list[Callable[[bool], None]]:
        """Functions that are called at each change of owner, in the midst of it (`Owners.on_change`). @private"""
        return self._owners.on_change

    @property
    def handovers(self) -> int:
        """The number of changes of owner, including a change to or from no owner."""
        return self._owners.handovers

    @property
    def handovers_ns(self) -> deque[int]:
        """The durations of the last 10,000 hand-overs, in ns."""
        return self._owners.handovers_ns

    @property
    def fallbacks(self) -> int:
        """The number of times that vhost could not be started."""
        return self._owners.fallbacks

    @property
    def owner_error(self) -> Exception | None:
        """The last failure of an owner of the rings; None if there was none."""
        return self._owners.last_error

    @property
    def fenced(self) -> bool:
        """True while the rings are fenced: vhost hangs and may still run them, so no owner gets them."""
        return self._owners.fenced

    def paused(self) -> AbstractContextManager[None]:
        """Pause the owner of the rings for the length of a `with` block: no ring moves. Nothing to do without an owner."""
        return vhost_net.standing_still(self._owners.backends or ())

    def rings(self) -> vhost_net.Rings:
        """Return the queues, notifiers, memory and features that an owner of the rings needs. @private"""
        features = self.driver_features | (f.VHOST_F_LOG_ALL if self.log else 0)
        return vhost_net.Rings(self.queues, self.kicks, self.calls, self.endpoint, self.memory, self.log, features,
                               self._registers.negotiated_mtu, self._status.broken)  # fmt: skip

    @property
    def ready(self) -> bool:
        """True if DRIVER_OK is set, even with NEEDS_RESET for one queue, and the link up: the rings then have an owner."""
        return self._status.driver_ok and not self._status.halted and self.control.link_up

    def _update_owner(self) -> None:
        """Bring the owner in line with status, link, running and choice; if vhost fails, userspace gets the rings.

        If vhost hangs, and may go on with the rings, they have no owner until it has let go of them.
        """
        if not (self.ready and self._running):
            self._hand_to(Owner.NOBODY)
            if self._running:
                self._owners.abandon()  # prepared for a machine that was about to run, and can't have an owner now
        elif (
            (not self.use_vhost or (not self._hand_to(Owner.VHOST) and self.fallback))
            and not self._hand_to(Owner.USERSPACE)
            and not self._owners.fenced
        ):
            self._status.halt()

    def _hand_to(self, owner: Owner) -> bool:
        if owner is self.owner:
            return True  # before `rings` gathers the data for an owner
        done = self._owners.hand_to(owner, self.rings())
        if not done:
            self.last_error = self._owners.last_error
        return done

    # --- migration: calls by a destination before its machine runs, and by a source after its machine has stopped ---

    def save_state(self) -> DeviceState:
        """Return the state, for a migration. Indices are exact while the rings have no owner (`set_running`)."""
        with self._lock:
            return DeviceState(self.status, self.driver_features, self.control, self.queues).copy()

    def load_state(self, state: DeviceState) -> None:
        """Take over the state of another device, which has as many queues. Only while this device does not run.

        ConfigError, and no change, if this device cannot have that state.
        """
        self.load_delta(self._registers.all_of(state))

    def load_delta(self, delta: StateDelta) -> None:
        """Take over the changes of another device since `load_state`. ConfigError, and no change, if they cannot be."""
        with self._lock:
            if self._running:
                raise ConfigError("the device runs: stop it before its state is loaded")
            features, control, queues = self._registers.after(delta)
            if delta.control:
                self._registers.take_control(control)  # the last that can fail
            self._registers.features = features
            with self._status.lock:
                self._status.load(delta)
                self._registers.load_queues(queues, delta.bases)
            if delta.registers or not delta.control.keys().isdisjoint(CONFIG_SPACE):
                self._status.notify_config()  # a notification pending at the source is not sent: this replaces it

    def prepare_vhost(self, *, unready: bool = False) -> bool:
        """Configure vhost, all but binding the rings, before the device runs. False if that failed or can't be now.

        `set_running` then binds the rings; until then they stand still. A second call, after a change of the state,
        tells vhost only the difference.

        *unready*: internal; True prepares it even while DRIVER_OK is clear or the link down.
        """
        with self._lock:
            if self._running or not self.use_vhost:
                return False
            if not (self.ready or unready):
                self._owners.abandon()
                return False
            return self._owners.prepare(self.rings())

    @property
    def vhost_prepared(self) -> bool:
        """True while vhost is prepared, and neither bound nor abandoned."""
        return self._owners.prepared is not None

    def bind_prepared(self) -> bool:
        """Bind the rings to a prepared vhost. False if it was not prepared or failed; indices are exact then.

        `set_running` comes next, and tries vhost anew if this failed.
        """
        with self._lock:
            return self.ready and self.vhost_prepared and self._hand_to(Owner.VHOST)

    @property
    def unwound_ns(self) -> tuple[int, int] | None:
        """The begin and end of undoing the last binding that failed, in ns of CLOCK_MONOTONIC; None if none failed."""
        return self._owners.unwound_ns

    def assume_bound(self) -> None:
        """Make a prepared vhost the owner without binding the rings: the caller bound them, or ought to have. @private"""
        with self._lock:
            self._owners.take_as_bound()

    def mark_broken(self) -> None:
        """Set NEEDS_RESET, and run no ring until the driver resets the device (Virtio 1.2, 2.1.2)."""
        with self._lock:
            self._status.halt()
            self._update_owner()

    def abandon_vhost(self) -> None:
        """Undo `prepare_vhost`."""
        with self._lock:
            self._owners.abandon()

    def _restart_after(self, error: BackendError) -> None:
        """The owner failed at a verb in passing: take the rings from it, and start anew."""
        self.last_error = error
        _log.warning("%s: starting the rings anew", error)
        self._hand_to(Owner.NOBODY)
        self._update_owner()

    def _reset(self) -> None:
        self._hand_to(Owner.NOBODY)
        self._owners.abandon()
        with self._status.lock:
            self._status.reset()
            self._registers.reset_queues()
        self.endpoint.rows[:, r.EP_PENDING] = 0
        self.notifiers.clear()
        self.last_error = self._registers.reset() or self.last_error

    # --- trouble ---

    def check_rings(self) -> None:
        """Look for queues that broke, and set NEEDS_RESET (2.1.2); an owner whose ring broke calls this. @private"""
        with self._status.lock:
            error = self._status.look(self._owners.backends or (), self.queues)
            if error is not None:
                self.last_error = error
                self._status.needs_reset()

    def ring_errors(self) -> list[GuestError]:
        """Return a `GuestError` for each queue that broke and was not reset since."""
        self.check_rings()
        return self._status.errors()

    # --- running it by hand ---

    @property
    def native_id(self) -> int:
        """The kernel's id of the userspace datapath's thread, for its affinity. ConfigError with `threaded=False`."""
        return self.userspace.native_id

    def step(self, budget: int = 64) -> int:
        """Move at most *budget* frames between rings and endpoint, in this thread, and return how many. Never waits.

        ConfigError if the device has a thread.
        """
        reason, moved = self.userspace.stepped.run(budget, 0, 0)
        if reason == r.LOOP_BROKEN:
            self.check_rings()
        return moved

    def counters(self) -> list[dict[str, int]]:
        """Return `packets`, `bytes`, `dropped`, `calls` and `kicks` of each queue, summed over both owners."""
        return self._owners.counters()

    def close(self) -> None:
        """Take the rings from their owner, and give up the threads and descriptors that the device made."""
        self._owners.close()
        if not self.inherited:  # a forked child leaves the rings to its parent
            with self._lock:
                self._running = False  # nor does a worker that ends now bring the rings back
                self._hand_to(Owner.NOBODY)
                self._owners.abandon()
        self.userspace.close()
        self.notifiers.close()
        self.config_call.close()
