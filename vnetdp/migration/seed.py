"""The destination as the patch "virtio-net: vhost-net early migration" has it, bugs included.

It follows the patch step by step so that its defects can be seen, packet by packet; docs/migration.md lists them by the
names used here. `target` is the same flow without them.
"""

from __future__ import annotations

import select
import threading
from typing import Any

from vnetdp_kernels import spec
from vnetdp_kernels.platform.atomic import load_u16_acquire

from ..backends.base import Backend
from ..device import vhost_net
from ..device.owners import Owner
from ..errors import BackendError
from ..shared.notify import EventFd
from ..system import limits
from ..virtio.queue import TRANSMITQ, VRINGS, queue_of, transmitq
from .snapshot import decode_delta, decode_full
from .stream import Section
from .target import STARTING, Target, _log


class SeedTarget(Target):
    """A destination that follows the posted patch, bugs included."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.vhost_started = False
        self._vhost = self.device.vhost or ()
        self._failed = False  # so that the start at the end is a retry
        self._poll_off: set[int] = set()  # pairs whose endpoint queue is polled no more (D1, D2)
        self._kicks_swallowed: set[int] = set()  # queues
        self.handlers["virtio-delta"] = self._load_indices
        self.handlers["virtio-net-vhost"] = self._quickstart

    def prepare_early(self) -> None:
        """virtio_net_vhost_early_start: no look at DRIVER_OK or the link (E8), none at a start before this one (B13)."""
        if not self._vhost:
            return
        if self.device.vhost_prepared:
            self.device.notifiers.assign()  # a second time: these are never given back
        self.vhost_started = self.device.prepare_vhost(unready=True)
        self._failed = not self.vhost_started

    def _load_indices(self, section: Section) -> None:
        with self.report.spans.span("load_delta"):
            self.device.load_delta(decode_delta(section.payload, len(self.device.queues)))

    def _load_device(self, section: Section) -> None:
        """virtio_net_pre_load, and the full load: the start comes at the end, from the beginning."""
        if self.vhost_started:
            with self.report.spans.span("unwind"):
                vhost_net.stop(self._vhost, self.device.rings())
                self.device.abandon_vhost()
            self.vhost_started = False
        with self.report.spans.span("load_full"):
            self.device.load_state(decode_full(section.payload))

    # --- vhost_net_post_load_migration_quickstart ---

    def _quickstart(self, _section: Section) -> None:
        """Set every base, then bind every backend, in the load of a section: before the commit (E9)."""
        if not self.vhost_started:
            return
        self.check_guest()
        spans, device = self.report.spans, self.device
        try:
            with vhost_net.standing_still(self._vhost):
                with spans.span("set_bases"):
                    self._set_all_vring_bases()
                with spans.span("bind_backends"):
                    self._start_all_backends()
            device.assume_bound()
        except BackendError as e:
            _log.warning("unable to start vhost net: %s: falling back on userspace virtio", e)
            with spans.span("unwind"):
                device.abandon_vhost()  # its handlers run while vhost_started is still set, and leave the kicks alone (D6)
                kicks = enumerate(self.device.kicks)
                self._kicks_swallowed = {n for n, kick in kicks if kick.clear() or self._is_kicked(n)}
            self.vhost_started = False
            self._failed = True

    def _is_kicked(self, n: int) -> bool:
        """Return whether a queue has available chains, for which the release of the notifiers kicks it."""
        queue = self.device.queues[n]
        if not queue.enabled:
            return False
        memory = self.machine.memory
        avail_idx = load_u16_acquire(memory.mem, memory.translate(queue.avail + spec.VIRTQ_RING_IDX, 2))
        return avail_idx != queue.last_avail_idx

    def _set_all_vring_bases(self) -> None:
        for pair, backend in enumerate(self._vhost):
            for index in range(VRINGS):
                queue = self.device.queues[queue_of(pair, index)]
                try:
                    backend.set_vring_base(index, queue.last_avail_idx)
                except BackendError:
                    self._stop_down_from(pair)
                    raise

    def _start_all_backends(self) -> None:
        for pair, backend in enumerate(self._vhost):
            for index in range(VRINGS):
                if not self.device.queues[queue_of(pair, index)].enabled:
                    continue
                try:
                    backend.set_backend(index, self.device.endpoint)
                except BackendError:
                    self._stop_down_from(pair)
                    raise

    def _stop_down_from(self, pair: int) -> None:
        """Stop vhosts *pair* to 0; the vhosts above stay as they are, with the TAP's polling off (D1, D2).

        Each gives its index back, also where it was never told the final one: the early one takes its place.
        """
        rings = self.device.rings()
        for n in range(pair, -1, -1):
            backend: Backend = self._vhost[n]
            for index in range(VRINGS):
                if rings.queues[queue_of(n, index)].enabled:
                    vhost_net.stop_vring(backend, rings, n, index)
        self._poll_off = set(range(pair + 1, len(self._vhost)))

    # --- vm_start, and the failure of the rest ---

    def resume(self) -> None:
        """virtio_net_set_status at vm_start: nothing to do if vhost counts as started, bound or not (E4); else a start."""
        device = self.device
        if self.vhost_started:
            device.assume_bound()
            device.set_running(True)
            self.start_guest()
            return
        self._at(STARTING)
        name = "retry" if self._failed else "start_vhost" if self._vhost else "set_running"
        with self.report.spans.span(name), vhost_net.standing_still(device.userspace.backends):
            device.set_running(True)
            if device.owner is Owner.USERSPACE:
                self._leave_what_is_lost()
        self.start_guest()

    def _leave_what_is_lost(self) -> None:
        """Take from userspace the rings it would not serve: receiveqs without polling, transmitqs without a kick."""
        late = []
        for pair, backend in enumerate(self.device.userspace.backends):
            if pair in self._poll_off:
                backend.set_backend(0, None)
            if transmitq(pair) in self._kicks_swallowed:
                backend.set_backend(TRANSMITQ, None)
                late.append(pair)
        if late:
            self.machine.on_close(LateKicks(self.device, late).close)

    def give_up(self) -> None:
        self.device.set_running(False)  # unbinds quickstart's rings: frames they moved have left the machine (E9)
        self.vhost_started = False
        super().give_up()


class LateKicks:
    """Gives each transmitq of *pairs* to userspace at its next kick: a kick that was swallowed has to come again."""

    def __init__(self, device: Any, pairs: list[int]) -> None:
        self._device = device
        self._pairs = pairs
        self._end = EventFd()
        self._thread = threading.Thread(target=self._watch, name="late-kicks", daemon=True)
        limits.start(self._thread)

    def _watch(self) -> None:
        poll = select.poll()
        poll.register(self._end.fd, select.POLLIN)
        by_fd = {self._device.kicks[transmitq(pair)].fd: pair for pair in self._pairs}
        for fd in by_fd:
            poll.register(fd, select.POLLIN)
        while by_fd:
            for fd, _ in poll.poll():
                if fd == self._end.fd:
                    return
                poll.unregister(fd)
                if self._device.owner is Owner.USERSPACE:
                    self._device.userspace.backends[by_fd.pop(fd)].set_backend(TRANSMITQ, self._device.endpoint)

    def close(self) -> None:
        self._end.signal()
        self._thread.join()
        self._end.close()
