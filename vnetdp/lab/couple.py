"""One migration between two processes, watched from outside: for `vnetdp migrate`, fault matrix and benchmark."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from vnetdp_kernels import rows as r

from ..endpoints.base import Endpoint
from ..endpoints.loopback import Ledger
from ..errors import VnetdpError, WorkError
from ..migration.channel import POLICIES
from ..migration.machine import MachineConfig, make_wire
from ..migration.report import Report
from ..shared.memory import Words
from ..system import limits
from ..system.owned import Owned
from ..virtio.state import DeviceState
from .host import HostProcess, Orders
from .invariants import differences

_SAMPLE_S = 0.0001
_LOOK_ON_S = 0.02
_FIRST_S = 5.0  # until a machine that runs is taken to move no frame
_WAYS = {
    "both": (r.EP_TO_WIRE, r.EP_FROM_WIRE),
    "tx": (r.EP_TO_WIRE,),
    "rx": (r.EP_FROM_WIRE,),
    "idle": (),
}
# The destination's spans between the source's stop and its own first packet.
DESTINATION_WORK = (
    "load_full",
    "load_delta",
    "index_check",
    "set_bases",
    "configure",
    "bind_backends",
    "unwind",
    "retry",
    "start_vhost",
    "set_running",
)


class Sampler:
    """Looks at the far end of the traffic some thousand times a second: frames each way, and when."""

    def __init__(self, wire: Endpoint) -> None:
        self._rows = wire.rows
        self._samples: list[tuple[int, int, int]] = []
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._sample, name="sampler", daemon=True)
        limits.start(self._thread)

    def _sample(self) -> None:
        while not self._end.is_set():
            self.look()
            time.sleep(_SAMPLE_S)

    def look(self) -> None:
        """Take a sample now, in the calling thread: the sampler's own may not get a core for a long time."""
        to_wire, from_wire = self._rows[:, r.EP_TO_WIRE], self._rows[:, r.EP_FROM_WIRE]
        self._samples.append((time.monotonic_ns(), int(to_wire.sum()), int(from_wire.sum())))

    def stop(self) -> Words:
        """Stop looking; return int64[n, 3]: time in ns, frames to the wire, frames from the wire."""
        self._end.set()
        self._thread.join()
        self.look()  # frames that its caller has seen are in the samples, too
        return np.array(sorted(self._samples), np.int64).reshape(-1, 3)


def blackout_us(samples: Words, stopped: int) -> float | None:
    """Return the longest time without a frame either way, in µs, up to the end of the samples.

    None if none moved after *stopped*, a time in ns: the length of the blackout is not known.
    """
    moved = np.flatnonzero(np.diff(samples[:, 1] + samples[:, 2]) > 0) + 1
    times = samples[moved, 0]
    if not len(times) or times[-1] <= stopped:
        return None
    return float(np.diff(np.append(times, samples[-1, 0])).max(initial=0)) / 1e3


@dataclass
class Result:
    """A migration's result. spans: (side, name, began, ended) in ns of CLOCK_MONOTONIC; samples as `Sampler.stop`."""

    policy: str
    outcome: str
    error: str
    ledger: Ledger
    violations: list[str]
    spans: list[tuple[str, str, int, int]]
    samples: Words
    bytes: dict[str, int]
    counts: dict[str, int]
    false_deltas: int = 0  # of migrations that came after it

    @property
    def spans_us(self) -> dict[str, float]:
        """µs by name, both sides."""
        totals: dict[str, float] = {}
        for _, name, began, ended in self.spans:
            if ended > began:
                totals[name] = totals.get(name, 0.0) + (ended - began) / 1e3
        stopped = self._stopped
        for column, name in ((1, "first_tx"), (2, "first_rx")):
            if stopped and len(self.samples):
                later = self.samples[self.samples[:, 0] > stopped]
                moved = np.flatnonzero(np.diff(later[:, column]) > 0)
                if len(moved):
                    totals[name] = float(later[moved[0] + 1, 0] - stopped) / 1e3
        return totals

    @property
    def _stopped(self) -> int:
        """When the source had stopped, in ns; 0 = it did not come to that."""
        return next((ended for side, name, _, ended in self.spans if (side, name) == ("source", "stop")), 0)

    @property
    def blackout_us(self) -> float | None:
        """The longest time without a packet, in µs; None if none came after the stop."""
        return blackout_us(self.samples, self._stopped)

    @property
    def destination_us(self) -> float:
        """µs of work at the destination during the blackout."""
        return sum(us for name, us in self.spans_us.items() if name in DESTINATION_WORK)

    def as_dict(self) -> dict[str, Any]:
        """Return the report that `vnetdp migrate --json` writes."""
        return {
            "policy": self.policy,
            "outcome": self.outcome,
            "error": self.error,
            "ledger": self.ledger.as_dict(),
            "violations": self.violations,
            "spans_us": {name: round(us, 1) for name, us in self.spans_us.items()},
            "destination_us": round(self.destination_us, 1),
            "blackout_us": None if self.blackout_us is None else round(self.blackout_us, 1),
            "bytes": self.bytes,
            "counts": self.counts,
        }


def socket_pair(tcp: bool = False) -> tuple[socket.socket, socket.socket]:
    """Return two connected stream sockets, over loopback TCP or a Unix socket."""
    if not tcp:
        return socket.socketpair()
    with socket.create_server(("127.0.0.1", 0)) as server:
        one = socket.create_connection(server.getsockname())
        try:
            other, _ = server.accept()
        except OSError:
            one.close()
            raise
    for sock in (one, other):
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return one, other


class Couple(Owned):
    """Two hosts, and a machine that lives on one of them. `start` it, then `migrate` it as often as you like."""

    def __init__(self, quiet: bool = False) -> None:
        self._quiet = quiet
        self.config = MachineConfig()
        self.wire: Endpoint | None = None
        self.booted: DeviceState | None = None
        with ExitStack() as made:
            self.source = made.enter_context(HostProcess(quiet))
            self.target = made.enter_context(HostProcess(quiet))
            for wait in [host.begin("warm_up") for host in (self.source, self.target)]:
                wait()
            made.pop_all()

    def start(self, config: MachineConfig) -> None:
        """Boot a machine at the source. The machine before it is dropped at both hosts."""
        self.drop()
        self.config = config
        self.wire = make_wire(config)
        self._make(self.source, config)
        self.source.call("boot")
        self.booted = self.source.call("state")

    def _make(self, host: HostProcess, config: MachineConfig) -> None:
        assert self.wire is not None
        host.call("make", config, (), fds=(self.wire.block.fd,))

    def migrate(
        self,
        policy: str = "delta",
        *,
        source: Orders | None = None,
        target: Orders | None = None,
        target_policy: str = "",
        target_vhost: bool | None = None,
        target_endpoint: str = "",
        tcp: bool = False,
    ) -> Result:
        """Migrate the machine, and let it run on; the hosts swap names if it moved. `settle` completes the result."""
        if policy not in POLICIES:
            raise VnetdpError(f"unknown policy {policy!r}: one of {', '.join(POLICIES)}")
        assert self.wire is not None
        vhost = self.config.vhost if target_vhost is None else target_vhost
        config = replace(self.config, vhost=vhost, endpoint=target_endpoint or self.config.endpoint)
        try:
            self._make(self.target, config)
        except VnetdpError as e:
            raise WorkError(str(e)) from e  # the machine ran already
        sampler = Sampler(self.wire)
        try:
            ours, theirs = socket_pair(tcp)
            with ours, theirs:
                receive = self.target.begin(
                    "receive", replace(target or Orders(), policy=target_policy or policy), fds=(theirs.fileno(),)
                )
                send = self.source.begin("send", replace(source or Orders(), policy=policy), fds=(ours.fileno(),))
            sent = _answer(self.source, send, self.target)
            received = _answer(self.target, receive, self.source, receives=True)
            sampler.look()  # the first frames come after a sample, so that they can be told from those before
            self._wait_for_first_frames()
        finally:
            samples = sampler.stop()
        outcome = sent.outcome
        if outcome in ("lost", "source") and received.outcome in ("vhost", "userspace"):
            outcome = received.outcome  # the destination runs, though the source could not be told
        spans = [("source", *span) for span in sent.spans.spans] + [("target", *span) for span in received.spans.spans]
        result = Result(
            policy,
            outcome,
            _errors(sent.error, received.error),
            Ledger(),
            [
                f"{side}: {text}"
                for side, report in (("source", sent), ("target", received))
                for text in report.violations
            ],
            spans,
            samples,
            sent.bytes,
            {
                name: sent.counts.get(name, 0) + received.counts.get(name, 0)
                for name in (*received.counts, *sent.counts)
            },
        )
        if outcome in ("vhost", "userspace"):
            if self.source.alive:
                result.violations += differences(self.source.call("state"), self.target.call("state"))
            self.source, self.target = self.target, self.source
            self.config = replace(self.config, endpoint=config.endpoint)
        return result

    def _wait_for_first_frames(self) -> None:
        """Wait until frames go all the ways that they went before, if a machine runs: the first ones are to be seen."""
        assert self.wire is not None
        ways = _WAYS[self.config.traffic]
        before = self.wire.rows[:, ways].sum(axis=0)
        until = time.monotonic() + _FIRST_S
        if ways:
            time.sleep(_LOOK_ON_S)
        while ((before > 0) & (self.wire.rows[:, ways].sum(axis=0) == before)).any():
            if time.monotonic() > until or not self._runs():
                return
            time.sleep(_LOOK_ON_S)

    def _runs(self) -> bool:
        return any(_seen(host)["owner"] != "nobody" for host in (self.source, self.target))

    def settle(self, result: Result) -> Result:
        """Make no more frames, wait for frames on their way, and add the ledgers and violations to *result*."""
        self.source.call("drain")
        seen = self.source.call("look")
        to_wire, to_guest = seen["ledgers"]
        result.ledger = to_wire + to_guest
        result.violations += [f"afterwards: {text}" for text in seen["violations"]]
        for name, ledger in (("to the wire", to_wire), ("to the guest", to_guest)):
            for what, invariant in (("lost", "I4"), ("duplicated", "I1"), ("reordered", "I10"), ("corrupted", "I8")):
                count = getattr(ledger, what)
                if count:
                    result.violations.append(f"{invariant}: {count} frames {name} {what}")
        return result

    def drop(self) -> dict[str, int]:
        """Give the machine up on both sides; return the resources, by kind, that the hosts have not given back."""
        left: dict[str, int] = {}
        for host in (self.source, self.target):
            if host.alive:
                for what, count in host.call("drop").items():
                    left[what] = left.get(what, 0) + count
        if self.wire is not None:
            self.wire.close()
            self.wire = None
        return left

    def replace_dead(self) -> None:
        """Put a new host in the place of each host that was killed."""
        for side in ("source", "target"):
            host: HostProcess = getattr(self, side)
            if not host.alive:
                host.close()
                fresh = HostProcess(self._quiet)
                setattr(self, side, fresh)
                fresh.call("warm_up")

    def close(self) -> None:
        if self.wire is not None:
            self.wire.close()
        for host in (self.source, self.target):
            host.close()


def _answer(host: HostProcess, wait: Callable[..., Report], other: HostProcess, receives: bool = False) -> Report:
    """Return a host's report. A host that raised, and lives, has lost its machine only if the machine does not run.

    receives: the host is the destination, where a machine that runs has arrived.
    """
    try:
        return wait(other)
    except VnetdpError as e:
        seen = _seen(host)
        if not seen["running"]:
            return Report("lost", str(e))
        if not receives:
            return Report("source", str(e))
        return Report("userspace" if seen["owner"] == "nobody" else seen["owner"], str(e))  # as `Target` reports it


def _errors(source: str, target: str) -> str:
    """Return the errors of both sides; mostly one side repeats the other's."""
    if not source or not target or target in source:
        return source or target
    return f"{source}; the destination: {target}"


def _seen(host: HostProcess) -> dict[str, Any]:
    """Return a host's `look` at its machine; nothing runs on a host that is gone, or has no machine."""
    try:
        if host.alive:
            return dict(host.call("look"))
    except VnetdpError:
        pass
    return {"running": False, "owner": "nobody"}
