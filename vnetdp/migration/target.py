"""The destination: loads a machine, has vhost prepared long before it arrives, and lets it run once the source gave it up.

Nothing leaves this side before the commit: vhost is configured early, based when the final indices are here, and bound last.
Any failure of vhost, early or late, is non-fatal: the rings go to userspace with exact indices, after one retry.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from itertools import chain
from operator import attrgetter
from typing import Any

import numpy as np

from vnetdp_kernels.virtq.bind import RING_APART, RING_MOVED, RING_OUTSIDE, check_rings

from ..device.owners import Owner
from ..errors import ConfigError, reason
from ..shared.memory import Words
from ..virtio.state import VIRTIO_CONFIG_S_DRIVER_OK
from .channel import COMMIT, END, FAILED, POLICIES, READY, RUNNING, Channel
from .machine import Machine
from .ram import RamTarget
from .report import Report
from .snapshot import decode_delta, decode_early, decode_full
from .source import MAX_EARLY
from .stream import Phase, Section, StreamError

_log = logging.getLogger("vnetdp.migration")

STARTING = "starting"  # a prepared vhost was bound, or could not be; then the device runs, and vhost is tried anew

_ring_of = attrgetter("enabled", "num", "desc", "avail", "used", "last_avail_idx")  # as `check_rings` takes it


class Target:
    """Loads *machine*, which is stopped and fresh, from *channel*.

    at: told each point that is reached (POINTS), in which it may raise to cancel; after the commit also STARTING.
    """

    POINTS = ("setup", "early", "prepared", "ram", "loading", "loaded", "ready", "bound")

    def __init__(
        self, machine: Machine, channel: Channel, policy: str, at: Callable[[str], None] = lambda _point: None
    ) -> None:
        self.machine = machine
        self.report = Report()
        self.device = machine.device
        self._channel = channel
        self._policy = policy
        self._at = at
        self._ram = RamTarget(machine.memory)
        self._has_setup = False
        self._n_early = 0
        # As `check_rings` takes them; with the early state's indices until the delta's are here.
        self._rings = self._ring_rows()
        self._seen: list[str] = []  # final sections
        self.handlers: dict[str, Callable[[Section], None]] = {
            "setup": self._load_setup,
            "ram": self._load_ram,
            "virtio-net-early": self._load_early,
            "virtio-net": self._load_device,
            "virtio-net-delta": self._load_delta,
            "check": self._check_memory,
            "end": self._load_end,
        }

    def run(self) -> Report:
        """Load, and run the machine if the source gives it up; return how it went.

        Any failure before the commit is undone here and told to the source; an exception that ends the program is
        raised again.
        """
        report = self.report
        try:
            while not self._seen or self._seen[-1] != END.name:
                self.load(self._channel.receive(POLICIES[self._policy]))
            self._at("loaded")
            self._channel.send(READY)
            self._at("ready")
            section = self._channel.receive(POLICIES[self._policy])
            if section.type is not COMMIT:
                raise StreamError(f"section {section.type.name} in place of the commit")
        except BaseException as e:
            report.error = reason(e)
            _log.warning("migration failed: %s; the source goes on", report.error)
            try:
                self.give_up()
            finally:
                self._answer_failure(report.error)
            if not isinstance(e, Exception):
                raise
            return report
        try:
            self.resume()
        except Exception as e:
            if not self.device.running:
                raise
            report.error = reason(e)
            _log.warning("the machine runs here, with an error: %s", report.error)
        self._see_who_serves()
        try:
            self._channel.send(RUNNING, json.dumps(self._summary()).encode())
        except StreamError as e:
            _log.warning("the machine runs here, and the source was lost after its commit: %s", e)
        return report

    def _see_who_serves(self) -> None:
        """Report the owner. No owner is right without a link or a driver, and a violation if the device broke."""
        device = self.device
        self.report.outcome = device.owner.value
        if device.owner is Owner.NOBODY:
            self.report.outcome = Owner.USERSPACE.value
            if device.status & VIRTIO_CONFIG_S_DRIVER_OK and device.control.link_up:
                why = f": {device.last_error}" if device.last_error else ""
                self.report.violations.append(f"I4: nobody serves the rings, the device needs a reset{why}")

    def give_up(self) -> None:
        """Undo the preparation of vhost, of which nothing can be seen from outside."""
        self.device.abandon_vhost()

    def _answer_failure(self, text: str) -> None:
        try:
            self._channel.send(FAILED, text.encode(errors="replace")[: FAILED.longest])
            self._channel.drain()
        except StreamError:
            _log.debug("the source is gone")

    def _summary(self) -> dict[str, Any]:
        return {
            "outcome": self.report.outcome,
            "spans": self.report.spans.spans,
            "violations": self.report.violations,
            "pages": self._ram.loaded,
        }

    # --- sections ---

    def load(self, section: Section) -> None:
        """Load one section; StreamError if it can't come now."""
        kind = section.type
        if not self._has_setup and kind.phase is not Phase.SETUP:
            raise StreamError(f"section {kind.name} comes before the setup")
        if kind.phase is Phase.FINAL:
            if kind.name in self._seen:
                raise StreamError(f"section {kind.name} comes twice")
            if self._seen and kind.priority > POLICIES[self._policy][self._seen[-1]].priority:
                raise StreamError(f"section {kind.name} comes after {self._seen[-1]}")
            self._seen.append(kind.name)
        elif kind.phase is not Phase.CONTROL and self._seen:
            raise StreamError(f"section {kind.name} comes after {self._seen[-1]}")
        handler = self.handlers.get(kind.name)
        if handler is None:
            raise StreamError(f"section {kind.name} comes out of place")
        if kind.phase is Phase.FINAL and len(self._seen) == 1:
            self._at("loading")
        handler(section)

    def _load_setup(self, section: Section) -> None:
        if self._has_setup:
            raise StreamError("the setup comes twice")
        config = self.machine.config
        ours = {"queue_pairs": config.queue_pairs, "num": config.num, "end": self.machine.memory.end}
        try:
            theirs = json.loads(bytes(section.payload))
        except (ValueError, RecursionError) as e:
            raise StreamError(f"the setup cannot be read: {e}") from e
        if theirs != ours:
            raise StreamError(f"the source's machine differs: {theirs}, and this one is {ours}")
        self._has_setup = True
        self.machine.adopt()
        self._at("setup")

    def _load_ram(self, section: Section) -> None:
        self._ram.load(section.payload)
        self._at("ram")

    def _load_early(self, section: Section) -> None:
        """Load the state for the time being, and prepare vhost for it; again, if the source sends it again.

        So often as a source does, and no more: each costs time, and a place in the report.
        """
        if self._n_early == MAX_EARLY:
            raise StreamError(f"the early state comes more than {MAX_EARLY} times")
        self._n_early += 1
        with self.report.spans.span("early_load"):
            self.device.load_state(decode_early(section.payload))
            self._rings = self._ring_rows()
        self._at("early")
        if self.device.vhost is not None:
            with self.report.spans.span("early_vhost_start"):
                self.prepare_early()
        self._at("prepared")

    def prepare_early(self) -> None:
        """Start vhost as far as it goes without binding."""
        self.device.prepare_vhost()

    def _load_device(self, section: Section) -> None:
        with self.report.spans.span("load_full"):
            self.device.load_state(decode_full(section.payload))

    def _load_delta(self, section: Section) -> None:
        """Load the delta: the changes, and every index; vhost is told only these."""
        if not self._n_early:
            raise StreamError("a delta comes without an early state")
        with self.report.spans.span("load_delta"):
            delta = decode_delta(section.payload, len(self.device.queues))
            self.device.load_delta(delta)
        with self.report.spans.span("index_check"):
            if delta.queues:
                self._rings = self._ring_rows()
            else:
                for n, base in delta.bases:
                    self._rings[n, -1] = base
            self.check_indices(self._rings)
        with self.report.spans.span("configure"):
            known = self.device.vhost_prepared
            if (known and delta.concerns_vhost) or not self.device.ready:
                self.device.prepare_vhost()

    def _ring_rows(self) -> Words:
        queues = self.device.queues
        return np.fromiter(chain.from_iterable(map(_ring_of, queues)), np.int64, 6 * len(queues)).reshape(-1, 6)

    def check_indices(self, rings: Words) -> None:
        """Hold each index against final guest memory, as virtio_load does: an impossible index fails the migration."""
        memory = self.machine.memory
        found, n = check_rings(memory.mem, memory.table, rings)
        if found == RING_OUTSIDE:
            raise StreamError(f"queue {n}: a ring lies outside guest memory")
        if found == RING_APART:
            raise StreamError(f"queue {n}: last_avail_idx and used.idx are further apart than the queue is long")
        if found == RING_MOVED:
            _log.warning("the guest moved avail.idx by more than a queue's size: the device needs a reset")
            self.device.mark_broken()

    def _load_end(self, _section: Section) -> None:
        if not {"virtio-net", "virtio-net-delta", "virtio-delta"} & set(self._seen):
            raise StreamError("the stream ends without the device's state")
        if "virtio-net" in self._seen:
            with self.report.spans.span("index_check"):
                self.check_indices(self._ring_rows())
        with self.report.spans.span("guest_check"):
            self.check_guest()

    def check_guest(self) -> None:
        """Check the guest's state in guest memory, on which kernels rely: it comes from outside, as a section does."""
        try:
            self.machine.check_guest()
        except ConfigError as e:
            raise StreamError(str(e)) from e

    def _check_memory(self, section: Section) -> None:
        """Compare guest memory with the source's checksums: for tests, since it takes its time."""
        if len(section.payload) % 4:
            raise StreamError("a checksum is cut off")
        sums = np.frombuffer(section.payload, "<u4").tolist()
        ours = self.machine.memory_sums()
        if sums != ours:
            regions = [n for n, (a, b) in enumerate(zip(sums, ours, strict=False)) if a != b]
            self.report.violations.append(f"I8: guest memory differs in region {regions}: a write was not sent again")

    # --- the end ---

    def resume(self) -> None:
        """Bind and run. If binding fails, vhost is started anew, once; if that fails too, userspace has the rings."""
        device, spans = self.device, self.report.spans
        prepared = device.vhost_prepared
        bound = False
        if prepared:
            with spans.span("bind_backends"):
                bound = device.bind_prepared()
            if device.unwound_ns is not None:
                spans.spans.append(("unwind", *device.unwound_ns))
        self._at(STARTING)
        if device.fallbacks and not bound:
            name = "retry"
        else:
            name = "start_vhost" if self._policy == "none" and device.vhost is not None else "set_running"
        with spans.span(name):
            device.set_running(True)
        self.start_guest()

    def start_guest(self) -> None:
        """Let the guest go on."""
        with self.report.spans.span("resume"):
            self.machine.start_guest()
        self.report.spans.mark("running")
        self.machine.announce()
        self._at("bound")
