"""The source: sends the machine while it runs, stops it, sends the rest, and gives it up when the destination is ready.

After any failure before the commit, on either side, the machine goes on here as if there had been no migration.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from typing import Any

import numpy as np

from ..errors import VnetdpError, reason
from ..shared.memory import DirtyLog, Words
from ..virtio.state import DeviceState
from .channel import (
    ANSWERS,
    CHECK,
    COMMIT,
    DELTA,
    DEVICE,
    EARLY,
    END,
    FAILED,
    INDICES,
    RAM,
    READY,
    RUNNING,
    SETUP,
    VHOST,
    Channel,
)
from .machine import Machine
from .ram import RamSource
from .report import Report
from .snapshot import delta_between, encode_delta, encode_early, encode_full
from .stream import Section, SectionType, StreamError

_log = logging.getLogger("vnetdp.migration")

MAX_ROUNDS = 6
MAX_EARLY = 4  # early states sent: a guest that changes its configuration for ever delays nothing
_FEW_PAGES = 64
_SHRINKS = 0.8  # a round that leaves a larger share of the pages before it is the last


class Source:
    """Sends *machine*, which runs, over *channel*.

    at: told each point that is reached (POINTS), in which it may raise to cancel; check: have the destination compare all
    of guest memory, which makes the blackout longer.
    """

    POINTS = ("logging", "early", "round", "stopping", "stopped", "saved", "ready", "committed")

    def __init__(
        self,
        machine: Machine,
        channel: Channel,
        policy: str,
        at: Callable[[str], None] = lambda _point: None,
        check: bool = False,
    ) -> None:
        self.machine = machine
        self.report = Report()
        self._channel = channel
        self._policy = policy
        self._at = at
        self._check = check
        self._early: DeviceState | None = None
        self._n_early = 0
        self._n_changed = 0  # fields and queues of the delta
        self._count = dict.fromkeys(("early", "ram", "final"), 0)

    def run(self) -> Report:
        """Migrate; return how it went. The machine runs afterwards if the outcome is `source`, and is stopped if not.

        No failure before the commit, of any kind, stops it; an exception that ends the program is raised again.
        """
        machine, report = self.machine, self.report
        committed = False
        log = DirtyLog(machine.memory.end)
        try:
            machine.device.set_log(log)
            self._at("logging")
            ram = machine.ram = RamSource(machine.memory)
            ram.add_private(
                machine.private_ranges()
            )  # after that: a queue that moves meanwhile is added by the code that moves it
            self._send_setup()
            self._while_it_runs(ram, log)
            self._stop()
            self._send_final(ram, log)
            self._hear(READY)
            self._at("ready")
            machine.hold_announcing(True)
            self._channel.send(COMMIT)
            committed = True  # from here on the commit may have arrived
            self._channel.set_deadline()
            self._at("committed")
            answer = self._channel.receive(ANSWERS)
            committed = answer.type is not FAILED  # the destination gave up before it ran the machine
            self._expect(RUNNING, answer)
            report.target = _running(bytes(answer.payload))
            report.outcome = report.target["outcome"]
        except BaseException as e:
            report.error = reason(e)
            report.outcome = "lost" if committed else "source"
            _log.warning("migration failed: %s%s", report.error, "" if committed else "; the source goes on")
            if not committed:
                self._go_on()
            if not isinstance(e, Exception):
                raise
        finally:
            report.bytes = self._count
            pages = machine.ram.sent if machine.ram else 0
            report.counts = {"early": self._n_early, "changed": self._n_changed, "pages": pages}
            machine.ram = None
            if committed:
                machine.end_announcing()
                machine.device.set_log(None)
            log.close()
        return report

    def _hear(self, wanted: SectionType) -> None:
        self._expect(wanted, self._channel.receive(ANSWERS))

    def _expect(self, wanted: SectionType, answer: Section) -> None:
        if answer.type is not wanted:
            reason = bytes(answer.payload).decode(errors="replace") or f"it says {answer.type.name}"
            raise StreamError(f"the destination failed: {reason}")

    def _listen(self) -> None:
        """Learn of a destination that has failed before the machine is stopped for it."""
        if self._channel.has_more():
            self._hear(READY)
            raise StreamError("the destination sent ready before the section end")

    def _send(self, what: str, *args: Any) -> None:
        self._count[what] += self._channel.send(*args)

    def _send_setup(self) -> None:
        config = self.machine.config
        setup = {
            "queue_pairs": config.queue_pairs,
            "num": config.num,
            "end": self.machine.memory.end,
        }
        self._send("early", SETUP, json.dumps(setup).encode())

    def _while_it_runs(self, ram: RamSource, log: DirtyLog) -> None:
        """Send the early state and all pages, then changed pages, until few are left, or they do not get fewer."""
        self._send_early()
        pages = ram.all_in_use()
        for _ in range(MAX_ROUNDS):
            for payload in ram.payloads(pages):
                self._send("ram", RAM, payload)
            self._at("round")
            self._listen()
            self._send_early()
            before, pages = len(pages), self._changed(ram, log)
            if len(pages) < _FEW_PAGES or len(pages) > _SHRINKS * before:
                break
        for payload in ram.payloads(pages):
            self._send("ram", RAM, payload)

    def _changed(self, ram: RamSource, log: DirtyLog) -> Words:
        """Return the pages to send again: pages in *log*, and the guest's own pages that differ."""
        return ram.changed(log)

    def _send_early(self) -> None:
        """Send the early state, or send it again if it has changed; so often, and then no more."""
        if self._policy == "none" or self._n_early >= (1 if self._policy == "seed" else MAX_EARLY):
            return
        state = self.machine.device.save_state()
        if self._early is not None and delta_between(self._early, state).empty:
            return
        with self.report.spans.span("early_save"):
            self._send("early", EARLY, encode_early(state))
        self._early = state
        self._n_early += 1
        self._at("early")

    def _stop(self) -> None:
        self._at("stopping")
        self._listen()
        self._channel.set_deadline()  # the guest does not stand still for longer
        with self.report.spans.span("stop"):
            self.machine.stop()
        self._at("stopped")

    def _send_final(self, ram: RamSource, log: DirtyLog) -> None:
        """Send the pages left, then the device's state; the section that starts vhost comes last."""
        spans = self.report.spans
        with spans.span("log_sync"):
            pages = self._changed(ram, log)
            for payload in ram.payloads(pages):
                self._send("ram", RAM, payload)
        if self._check:
            self._send("final", CHECK, np.array(self.machine.memory_sums(), "<u4").tobytes())
        state = self.machine.device.save_state()
        if self._policy == "none":
            with spans.span("save"):
                self._send("final", DEVICE, encode_full(state))
        else:
            assert self._early is not None
            with spans.span("delta_check"):
                delta = delta_between(self._early, state)
            self._n_changed = len(delta.registers) + len(delta.control) + len(delta.queues)
            with spans.span("save"):
                if self._policy == "delta":
                    self._send("final", DELTA, encode_delta(delta))
                else:
                    self._save_as_the_patch_does(state, delta.empty)
        self._send("final", END)
        self._at("saved")

    def _save_as_the_patch_does(self, state: DeviceState, unchanged: bool) -> None:
        """Full state if anything has changed; else indices, and `virtio-net-vhost` where there is vhost (`.needed`)."""
        if not unchanged:
            self._send("final", DEVICE, encode_full(state))
            return
        self._send("final", INDICES, encode_delta(delta_between(self._early or state, state)))
        if self.machine.worker is not None:
            self._send("final", VHOST)

    def _go_on(self) -> None:
        """Let the machine run here again."""
        self.machine.hold_announcing(False)
        try:
            self.machine.device.set_log(None)
        except Exception as e:  # noqa: BLE001 - the machine runs after any error
            _log.warning("%s: the dirty log stays on until the rings start again", reason(e))
        self.machine.run()


def _running(payload: bytes) -> dict[str, Any]:
    try:
        said = json.loads(payload)
        if said["outcome"] in ("vhost", "userspace"):
            return dict(said)
    except (ValueError, KeyError, TypeError, RecursionError):
        pass
    raise StreamError("the destination runs the machine, and its section running can't be read")


class Cancelled(VnetdpError):  # noqa: N818 - it is no error
    """The migration was cancelled at one of its points."""
