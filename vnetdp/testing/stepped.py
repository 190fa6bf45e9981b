"""Stepped: a device, its guest, its wire and its vhost without threads, and all that a step can do to them.

Guest, device and vhost move frames in their own steps alone, so a list of steps decides every byte.
"""

from __future__ import annotations

import errno
import importlib
import struct
import zlib
from collections.abc import Callable
from contextlib import ExitStack
from functools import reduce
from typing import Any, ClassVar

import numpy as np

from vnetdp_kernels import spec

from ..backends.faulty import Fault, Faults, FaultyBackend, FaultyNotifiers
from ..backends.names import UNBIND
from ..backends.userspace import UserspaceBackend
from ..backends.verbs import Verb, refusal
from ..datapath.datapath import Datapath
from ..device.device import NetDevice
from ..device.owners import Owner
from ..device.vhost_net import used_idx
from ..endpoints.mailbox import MailboxEndpoint
from ..errors import BackendError, ConfigError, reason
from ..guest.driver import BUFFER_LEN, Driver, memory_for
from ..lab.invariants import device_violations
from ..shared.memory import Bytes, DirtyLog
from ..system.owned import Owned
from ..virtio.queue import VRINGS, is_receiveq, pair_of
from .flow import Flow
from .schedule import Setup, Step

_ROUNDS = 10_000  # of guest, device and vhost, until `settle` gives up
_TAKING = (UNBIND, "get_vring_base")  # if both failed, no ring could be taken from vhost; the kernel's fails neither


class _Vhost(UserspaceBackend):
    """vhost's side of a queue pair, which can be killed between two steps: no verb reaches it then."""

    killed = False

    def apply(self, verb: Verb) -> int:
        if self.killed:
            raise refusal(verb, errno.ESRCH, "the step `kill` ended it")
        return super().apply(verb)

    def kill(self) -> None:
        """End it, as a worker process ends: it lets go of its rings, and tells no index."""
        for vring in range(VRINGS):
            self._unbind(vring)
        self.killed = True


class Stepped(Owned):
    """All that *setup* names, brought up. `run` does one step, and looks at the invariants afterwards."""

    def __init__(self, setup: Setup) -> None:
        pairs = setup.pairs
        self._faults = Faults()
        self._log: DirtyLog | None = None
        self._shadow: Bytes = np.zeros(0, np.uint8)  # guest memory when the log was last read
        self.dirty = 0
        self.to_wire = Flow("from guest to wire", 1, pairs)
        self.to_guest = Flow("from wire to guest", 2, pairs)
        with ExitStack() as made:
            self.memory = made.enter_context(memory_for(pairs, setup.num, BUFFER_LEN))
            self.wire = made.enter_context(_wire_of(setup))
            self.datapath = Datapath(pairs)
            made.callback(self.datapath.close)
            self._vhost = [_Vhost(self.datapath, pair) for pair in range(pairs)]
            self.device = made.enter_context(
                NetDevice(
                    self.memory,
                    self.wire,
                    queue_pairs=pairs,
                    vhost=[FaultyBackend(inner, pair, self._faults) for pair, inner in enumerate(self._vhost)],
                    threaded=False,
                    running=False,
                    notifiers=FaultyNotifiers(pairs, self._faults),
                )
            )
            self.guest = made.enter_context(
                Driver(
                    self.device,
                    self.memory,
                    queue_pairs=pairs,
                    num=setup.num,
                    wanted=setup.features,
                    first_idx=setup.first_idx,
                )
            )
            for queue in self.device.queues:
                queue.last_avail_idx = setup.first_idx
            self.device.set_running(True)
            self._made = made.pop_all()

    def run(self, step: Step) -> tuple[int, list[str]]:
        """Do *step*; return the frames moved, and each violation of an invariant."""
        moved, found = 0, []
        try:
            moved = self._RUN[step.name](self, *step.args) or 0
        except BackendError as e:
            self.device.last_error = e
        except Exception as e:  # noqa: BLE001 - the steps that led to it have to be told
            found.append(f"{step.name}: {reason(e)}")
        self._collect()
        found += self.to_wire.violations() + self.to_guest.violations()
        found += device_violations(self.device, still=True) + self._inexact() + self._unlogged()
        if step.name == "settle":
            found += self.to_wire.missing() + self.to_guest.missing()
            if self.device.owner is Owner.NOBODY:
                found.append("I4: the rings have no owner, although link and driver are ready")
        return moved, found

    def memory_crc(self, before: int = 0) -> int:
        """Return the CRC-32 of guest memory, continued from *before*."""
        return zlib.crc32(self.memory.mem.data, before)

    def close(self) -> None:
        self._made.close()
        if self._log is not None:
            self._log.close()

    # --- frames ---

    def _collect(self) -> None:
        self.to_wire.arrived(self.wire.take())
        self.to_guest.arrived(self.guest.receive())

    def _send(self, end: str, pair: int, count: int, length: int) -> int:
        """Give *count* numbered frames to an end; those that its mailbox has no room for are not sent."""
        flow = self.to_wire if end == "guest" else self.to_guest
        for n in range(count):
            if not self._put(end, pair, flow.frame(pair, length)):
                return n
            flow.sent(pair, length)
        return count

    def _frame(self, end: str, pair: int, text: str) -> int:
        flow = self.to_wire if end == "guest" else self.to_guest
        data = bytes.fromhex(text).ljust(spec.NET_HDR_LEN, b"\0")
        flow.foreign += 1
        return self._put(end, pair, data[spec.NET_HDR_LEN :], data[: spec.NET_HDR_LEN])

    def _put(self, end: str, pair: int, frame: bytes, header: bytes = bytes(spec.NET_HDR_LEN)) -> bool:
        mailbox = self.guest.mailbox if end == "guest" else self.wire
        assert mailbox is not None
        return mailbox.put(frame, header, pair)

    def _run_vhost(self, budget: int) -> int:
        moved = self.datapath.run(budget)[1]
        self.device.check_rings()  # as a worker has it done, once a ring broke
        return moved

    def _settle(self) -> int:
        """Take all faults away, bring the link up, and run all until no frame moves."""
        self._faults.clear()
        self.device.set_link(True)
        self.device.set_status(self.device.status)
        total = idle = 0
        for _ in range(_ROUNDS):
            moved = self.guest.step() + self.device.step() + self._run_vhost(64)
            total += moved
            self._collect()  # a mailbox keeps only so many
            idle = 0 if moved else idle + 1
            if idle == 2:  # frames that were dropped in the first are not counted, and made room for others
                return total
        raise ConfigError(f"frames still move after {_ROUNDS:,} rounds: the wire's endpoint never comes to rest")

    # --- the driver ---

    def _set_status(self) -> None:
        self.device.set_status(self.device.status)

    def _reset(self) -> None:
        self.to_wire.excuse()
        self.to_guest.excuse()
        self.guest.reset()
        self._remember()

    def _reset_queue(self, index: int) -> None:
        """Reset a queue, and set it up again where it was. Frames that the device has not taken from it are lost."""
        self.device.reset_queue(index)
        self.guest.run()  # takes the chains that were used before the reset
        if not is_receiveq(index):
            self.to_wire.excuse(pair_of(index))
        self.guest.lay_out(index, self.guest.place_of(index)[0])
        self._remember()

    # --- the host ---

    def _use(self, owner: str) -> None:
        self.device.set_use_vhost(owner == "vhost")

    def _set_link(self, state: str) -> None:
        self.device.set_link(state == "up")

    def _add_fault(self, text: str) -> None:
        fault = Fault.parse(text)
        if fault.verb in _TAKING:
            self._faults[:] = [other for other in self._faults if other.verb not in _TAKING]
        self._faults.append(fault)

    def _kill(self) -> None:
        for backend in self._vhost:
            backend.kill()
        self.device.take_from(Owner.VHOST)

    def _revive(self) -> None:
        for backend in self._vhost:
            backend.killed = False
        self.device.restart_vhost()

    # --- the dirty log ---

    def _set_log(self, state: str) -> None:
        if state == "on" and self._log is None:
            log = DirtyLog(self.memory.end)
            try:
                self.device.set_log(log)
            except BackendError:
                log.close()
                raise
            self._log = log
            self._remember()
        elif state == "read" and self._log is not None:
            pages = self._log.take()
            self.dirty = zlib.crc32(struct.pack(f"<{len(pages)}I", *pages), self.dirty)
            self._remember()
        elif state == "off" and self._log is not None:
            log, self._log = self._log, None
            self.device.set_log(None)
            log.close()

    def _remember(self) -> None:
        if self._log is not None:
            self._shadow = self.memory.mem.copy()

    def _unlogged(self) -> list[str]:
        """Return the pages that the device wrote since the log was read, and that are not in it (I8)."""
        if self._log is None:
            return []
        window = self.memory.translate(0, 0)
        now, then = (mem[window:].reshape(-1, spec.PAGE_SIZE) for mem in (self.memory.mem, self._shadow))
        pages = set(np.flatnonzero((now != then).any(axis=1)).tolist()) - set(self._log.pages())
        for gpa, length in self.guest.private_ranges():
            pages -= {*range(gpa // spec.PAGE_SIZE, (gpa + length - 1) // spec.PAGE_SIZE + 1)}
        return [f"I8: page {page} was written, and is not in the dirty log" for page in sorted(pages)]

    def _inexact(self) -> list[str]:
        """Return the queues of a device without an owner that do not go on where their used ring ends (I3)."""
        device = self.device
        if device.owner is not Owner.NOBODY:
            return []
        return [
            f"I3: queue {n} goes on at {queue.last_avail_idx}, and used.idx is {used}"
            for n, queue in enumerate(device.queues)
            if queue.enabled and queue.last_avail_idx != (used := used_idx(self.memory, queue))
        ]

    _RUN: ClassVar[dict[str, Callable[..., Any]]] = {
        "send": _send,
        "frame": _frame,
        "guest": lambda self, budget: self.guest.step(budget),
        "device": lambda self, budget: self.device.step(budget),
        "vhost": _run_vhost,
        "use": _use,
        "status": _set_status,
        "reset": _reset,
        "queue": _reset_queue,
        "link": _set_link,
        "log": _set_log,
        "fault": _add_fault,
        "mend": lambda self: self._faults.clear(),
        "kill": _kill,
        "revive": _revive,
        "settle": _settle,
    }


def _wire_of(setup: Setup) -> MailboxEndpoint:
    """Return a new endpoint of the class that *setup* names."""
    module, _, name = setup.wire.partition(":")
    try:
        found = reduce(getattr, name.split("."), importlib.import_module(module))
    except (Exception, SystemExit) as e:
        raise ConfigError(
            f"wire {setup.wire}: {reason(e)} (a module is looked for in the current folder and PYTHONPATH)"
        ) from e
    if not (isinstance(found, type) and issubclass(found, MailboxEndpoint)):
        raise ConfigError(f"wire {setup.wire} is no subclass of MailboxEndpoint")
    return found(setup.pairs)
