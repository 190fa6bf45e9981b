"""A host: a process that has one machine at a time, and takes requests over a socket (`HostProcess`).

Requests and answers are pickled; only the parent that started the process speaks to it.
"""

from __future__ import annotations

import gc
import logging
import os
import pickle
import signal
import socket
import sys
import threading
from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from typing import Any

from ..backends.faulty import Fault, Faults
from ..device.owners import Owner
from ..errors import VnetdpError, WorkError, reason
from ..migration.channel import DELTA, DEVICE, INDICES, Channel
from ..migration.machine import Machine, MachineConfig
from ..migration.ram import RamSource
from ..migration.report import Report
from ..migration.seed import SeedTarget
from ..migration.source import Cancelled, Source
from ..migration.stream import SectionType
from ..migration.target import STARTING, Target
from ..shared.memory import DirtyLog, Words
from ..system import child, limits
from ..system.owned import Owned
from ..virtio.state import DeviceState
from ..warmup import warm_up
from .changes import CHANGES, EVENTS, Before, change_back, churning, leaving
from .invariants import resources, violations

_log = logging.getLogger("vnetdp.migration")

_MAX_MESSAGE = 1 << 17
_PATIENCE_S = 600.0  # for an answer: a host may be compiling, on a machine that is busy
_STOPPED_S = 10.0  # for a host that was stopped: it may never go on
_SWITCH_S = 0.0002  # between two threads that both run Python: 5 ms, the default, would be most of a blackout


@dataclass(frozen=True)
class Orders:
    """The changes and faults of one side of a migration. Each point is one of that side's POINTS.

    changes: (name, point), made when the point is first reached; back_at: where all of them are undone again. churn: a
    change made 1,000 times a second until the machine stops. cancel_at, die_at: points. check: compare all of guest
    memory. damage: of the source's final sections (`_Damaged`). left: frames left in its rings (`changes.leaving`).
    asleep: the guest that comes in looks at no ring before it is called. look_at: points at which no owner may have the
    rings, and no invariant may be violated. forget_log: ignore the dirty log, to see that this is found out.
    """

    policy: str = "delta"
    check: bool = True
    faults: tuple[str, ...] = ()
    changes: tuple[tuple[str, str], ...] = ()
    back_at: str = ""
    churn: str = ""
    cancel_at: str = ""
    die_at: str = ""
    damage: str = ""
    left: str = ""
    asleep: bool = False
    look_at: tuple[str, ...] = ()
    forget_log: bool = False


_PHASES = {"setup": "early", "loading": "final", STARTING: "retry"}


def enter_phase(faults: Faults, point: str, policy: str) -> None:
    """Have the faults of a phase strike from *point* of a destination on."""
    if point in _PHASES and (point != STARTING or policy != "none"):  # which has started nothing before
        faults.phase = _PHASES[point]


class _Forgetful(Source):
    """A source that ignores the dirty log: the comparison of guest memory has to find that out."""

    def _changed(self, ram: RamSource, log: DirtyLog) -> Words:
        return ram.changed(None)


class _Damaged(Channel):
    """A channel of a source whose final state lacks its last byte (`state`), or is of another version (`version`)."""

    def __init__(self, sock: socket.socket, what: str) -> None:
        super().__init__(sock)
        self._what = what

    def send(self, section: SectionType, payload: bytes = b"") -> int:
        if self._what == "state" and section in (DEVICE, DELTA, INDICES):
            payload = payload[:-1]
        if self._what == "version" and section in (DEVICE, DELTA, INDICES):
            section = replace(section, version=section.version + 1)
        return super().send(section, payload)


class _Points:
    """Carries out the orders at each point.

    channel: the source's. A source that cancels closes it first, as QEMU's does, and the destination lets go of the wire.
    """

    def __init__(self, machine: Machine, orders: Orders, channel: Channel | None = None) -> None:
        self._machine = machine
        self._orders = orders
        self._channel = channel
        self._made: list[int] = []  # of the orders' changes, by position
        self._before: Before | None = None
        self.violations: list[str] = []
        self._until_stopped = ExitStack()

    def __call__(self, point: str) -> None:
        orders = self._orders
        enter_phase(self._machine.faults, point, orders.policy)
        if orders.die_at == point:
            os.kill(os.getpid(), signal.SIGKILL)
        if orders.cancel_at == point:
            if self._channel is not None:
                self._channel.drain()
            raise Cancelled(f"cancelled at {point}")
        if orders.churn and point == "logging":
            self._until_stopped.enter_context(churning(self._machine, orders.churn, 0.001))
        if point == "stopping":
            self.end()
        for n, (name, when) in enumerate(orders.changes):
            if when == point and n not in self._made:
                self._before = self._before or Before.of(self._machine)
                self._made.append(n)
                (CHANGES | EVENTS)[name](self._machine, n + 1)
        if point == orders.back_at and self._before is not None:
            for n in reversed(self._made):
                change_back(self._machine, orders.changes[n][0], n + 1, self._before)
            self._before = None
        if point in orders.look_at:
            owner = self._machine.device.owner
            if owner is not Owner.NOBODY:
                self.violations.append(f"at {point}: I5: {owner.value} has the rings, which nobody gave up")
            self.violations += [f"at {point}: {text}" for text in violations(self._machine, final=False)]
        if orders.left and point == "stopping":
            self._until_stopped.enter_context(leaving(self._machine, orders.left))
        if point == "stopped":
            self.end()

    def end(self) -> None:
        self._until_stopped.close()


class Host:
    """The machine of the process, and a method for each request."""

    def __init__(self) -> None:
        self.machine: Machine | None = None
        self._resources = resources()

    @property
    def _one(self) -> Machine:
        if self.machine is None:
            raise VnetdpError("the host has no machine")
        return self.machine

    def warm_up(self) -> None:
        """Load the kernels, and note the resources that the process holds without a machine."""
        warm_up()
        gc.collect()
        gc.freeze()  # the compiler's objects are never looked at again: to collect garbage takes ms, not 100 ms
        self._resources = resources()

    def make(self, config: MachineConfig, faults: tuple[str, ...], wire_fd: int) -> None:
        """Make a machine, stopped and empty; the machine before it is given up."""
        self.drop()
        self.machine = Machine(config, wire_fd, Faults(Fault.parse(fault) for fault in faults))
        os.close(wire_fd)

    def boot(self) -> None:
        self._one.boot()
        self._one.run()

    def send(self, orders: Orders, fd: int) -> Report:
        """Migrate the machine out, over the socket *fd*."""
        self._one.faults[:] = [Fault.parse(fault) for fault in orders.faults]
        sock = socket.socket(fileno=fd)
        with _Damaged(sock, orders.damage) if orders.damage else Channel(sock) as channel:
            points = _Points(self._one, orders, channel)
            kind = _Forgetful if orders.forget_log else Source
            source = kind(self._one, channel, orders.policy, points, orders.check)
            try:
                report = _uninterrupted(source.run)
            finally:
                points.end()
        report.counts["hits"] = self._hits()
        report.violations += violations(self._one)
        return report

    def receive(self, orders: Orders, fd: int) -> Report:
        """Take a machine in, over the socket *fd*."""
        kind = SeedTarget if orders.policy == "seed" else Target
        self._one.faults[:] = [Fault.parse(fault) for fault in orders.faults]
        self._one.asleep = orders.asleep
        with Channel(socket.socket(fileno=fd)) as channel:
            points = _Points(self._one, orders)
            report = _uninterrupted(kind(self._one, channel, orders.policy, points).run)
        report.violations += points.violations
        report.violations += violations(self._one, final=report.outcome != "source")
        report.counts["hits"] = self._hits()
        return report

    def _hits(self) -> int:
        return sum(fault.hits for fault in self._one.faults)

    def set_status_again(self) -> str:
        """Write the status as it is, which is when vhost is tried again; return the owner."""
        device = self._one.device
        device.set_status(device.status)
        return device.owner.value

    def change(self, name: str, n: int = 1) -> None:
        CHANGES[name](self._one, n)

    def drain(self) -> bool:
        return self._one.drain()

    def allow(self, traffic: bool) -> None:
        self._one.allow(traffic)

    def look(self) -> dict[str, Any]:
        """Return the owner, whether the machine runs, violations, the two ledgers, and the guest's settings."""
        machine = self._one
        datapath = machine.worker.datapath if machine.worker else None
        return {
            "owner": machine.device.owner.value,
            "running": machine.device.running,
            "handovers": machine.device.handovers,
            "logging": any(each is not None and each.log is not None for each in (machine.device, datapath)),
            "violations": violations(machine),
            "ledgers": machine.ledgers(),
            "control": machine.device.control,
            "features": machine.device.driver_features,
        }

    def state(self) -> DeviceState:
        """Return the device's state as a migration would send it now."""
        return self._one.device.save_state()

    def drop(self) -> dict[str, int]:
        """Give the machine up; return its leaks: descriptors, mappings and threads that were not there before."""
        if self.machine is not None:
            self.machine.close()
            self.machine = None
        gc.collect()
        now = resources()
        return {what: count - self._resources[what] for what, count in now.items() if count != self._resources[what]}


def _uninterrupted(run: Callable[[], Report]) -> Report:
    """Run without garbage collection: it would stop the machine's threads in the worst moment."""
    gc.collect()
    gc.disable()
    try:
        return run()
    finally:
        gc.enable()


class HostProcess(Owned):
    """A `Host` in a process of its own. `call` waits for the answer; `begin` gives a function that does.

    A host that is stopped for 10 s while its answer is waited for is killed. WorkError if the host is gone.
    """

    def __init__(self, quiet: bool = False) -> None:
        """*quiet*: the host logs nothing, since its failures are injected."""
        self._sock, theirs = limits.socket_pair(socket.SOCK_SEQPACKET)
        with ExitStack() as made, theirs:
            made.callback(self._sock.close)
            code = f"from {__name__} import main; main({theirs.fileno()}, {quiet})"
            self._child = child.Child(child.start(code, theirs, ()), self._sock)
            made.pop_all()
        self._lock = threading.Lock()
        self._stopped_s = 0.0
        self.close_on_fork()

    @property
    def pid(self) -> int:
        return self._child.pid

    @property
    def alive(self) -> bool:
        return self._child.alive

    def begin(self, what: str, *args: Any, fds: tuple[int, ...] = ()) -> Callable[..., Any]:
        """Ask for *what*; its last arguments are *fds*, as the host will have them.

        Return a function that waits for the answer. Its arguments are the hosts that this one waits for in turn: they may
        not be stopped either.
        """
        self.check_maker()
        self._lock.acquire()
        try:
            socket.send_fds(self._sock, [pickle.dumps((what, args))], fds)
        except OSError as e:
            self._lock.release()
            raise self._gone() from e

        def answer(*others: HostProcess) -> Any:
            try:
                self._await_answer(others)
                data = self._sock.recv(_MAX_MESSAGE)
            except OSError:
                data = b""
            finally:
                self._lock.release()
            if not data:
                raise self._gone()
            done, result = pickle.loads(data)
            if not done:
                raise VnetdpError(result)
            return result

        return answer

    def _gone(self) -> WorkError:
        return WorkError(f"the host of process {self.pid} {self._child.ended()}")

    def _await_answer(self, others: tuple[HostProcess, ...]) -> None:
        for waited_s in self._child.waiting():
            for host in (self, *others):
                host._kill_if_stopped()
            if waited_s > _PATIENCE_S:
                self._child.kill(f"did not answer within {_PATIENCE_S:.0f} s")

    def _kill_if_stopped(self) -> None:
        """Look whether the host is stopped, and kill it once it was at every look for 10 s."""
        self._stopped_s = self._stopped_s + child.LOOK_S if self._child.stopped else 0.0
        if self._stopped_s >= _STOPPED_S:
            self._child.kill(f"was stopped for {_STOPPED_S:.0f} s")

    def call(self, what: str, *args: Any, fds: tuple[int, ...] = ()) -> Any:
        return self.begin(what, *args, fds=fds)()

    def close(self) -> None:
        """End the process. A forked child leaves it to its parent."""
        if self.inherited:
            return
        if not self._child.end():
            _log.warning("%s", self._gone())

    def leave_to_parent(self) -> None:
        """Leave the socket to the parent: the host is to see it if the parent closes it, or dies."""
        self._sock.close()


def main(fd: int, quiet: bool) -> None:
    """Serve one parent until it closes its end."""
    if quiet:
        logging.disable()
    sys.setswitchinterval(_SWITCH_S)
    host = Host()
    with socket.socket(fileno=fd) as sock:
        while True:
            try:
                data, fds, _, _ = socket.recv_fds(sock, _MAX_MESSAGE, 4)
            except ConnectionError:  # the parent is gone, and left an answer unread
                break
            if not data:
                break
            what, args = pickle.loads(data)
            try:
                answer = (True, getattr(host, what)(*args, *fds))
            except Exception as e:  # noqa: BLE001 - it is the parent's to judge
                answer = (False, reason(e))
            with suppress(ConnectionError):  # the parent is gone, and so are we
                sock.send(pickle.dumps(answer))
    host.drop()
