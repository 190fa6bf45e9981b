"""Link: two endpoints joined through an emulated device and driver. LEFT is the device's, RIGHT the guest's."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

from vnetdp_kernels import rows as r

from ..backends.base import Backend, HasBackends
from ..backends.faulty import Faults
from ..backends.process import WorkerProcess
from ..backends.worker import Worker
from ..device.device import NetDevice
from ..device.owners import Owner
from ..endpoints.base import Endpoint
from ..endpoints.loopback import GenerateEndpoint, Ledger
from ..errors import ConfigError
from ..guest.driver import Driver, memory_for
from ..system.owned import Owned
from . import clock

_QUIET_S = 0.25
_PATIENCE_S = 5.0

DATAPATHS = ("userspace", "vhost", "vhost-process")


def check_datapath(datapath: str, left: Endpoint) -> None:
    """Raise ConfigError if the device's rings can't be served so."""
    if datapath not in DATAPATHS:
        raise ConfigError(f"datapath {datapath!r} is not one of {', '.join(DATAPATHS)}")
    if datapath == "vhost-process" and left.kind >= r.KIND_PYTHON:
        raise ConfigError(
            f"{left.name} runs in Python, in this process: a worker process can't serve it; take --datapath vhost"
        )


class Link(Owned):
    """A device over *left* and a driver over *right*, each in a thread, sharing guest memory.

    datapath: "userspace", "vhost" (a worker thread), or "vhost-process" (a worker process). poll_us: busy-poll so long
    before sleeping, -1 = for ever. worker_timeout_s: a worker that does not answer for so long loses its rings to userspace;
    a worker process has 2 s once *ending* returns True, or the link drains. faults: the worker's verbs that are to fail.
    The endpoints stay the caller's, and are closed
    by it after the link.
    """

    def __init__(
        self,
        left: Endpoint,
        right: Endpoint,
        datapath: str = "userspace",
        *,
        queue_pairs: int = 1,
        num: int = 256,
        poll_us: int = 0,
        mtu: int | None = None,
        switchable: bool = False,
        worker_timeout_s: float = 10.0,
        ending: Callable[[], bool] = lambda: False,
        faults: Faults | None = None,
    ) -> None:
        check_datapath(datapath, left)
        self.faults = faults
        self._draining = False
        with ExitStack() as stack:
            self.memory = stack.enter_context(memory_for(queue_pairs, num))
            self.worker: Worker | WorkerProcess | None = None
            vhost: HasBackends | Sequence[Backend] | None = None
            if datapath == "vhost-process":
                self.worker = WorkerProcess(queue_pairs, poll_us, worker_timeout_s, lambda: self._draining or ending())
            elif datapath == "vhost" or switchable:
                self.worker = Worker(queue_pairs, poll_us, timeout_s=worker_timeout_s)
            if self.worker is not None:
                stack.callback(self.worker.close)
                vhost = self.worker if faults is None else faults.wrap(self.worker)
            self.device = NetDevice(
                self.memory,
                left,
                queue_pairs=queue_pairs,
                mtu=mtu,
                vhost=vhost,
                poll_us=poll_us,
                max_num=max(num, 1024),
            )
            stack.callback(self.device.close)
            if self.worker is not None:
                self.device.set_use_vhost(datapath != "userspace")
            self.left, self.right = left, right
            self._clocks = {"left": clock.FrameClock(), "right": clock.FrameClock()}
            self.driver = Driver(self.device, self.memory, right, queue_pairs=queue_pairs, num=num)
            stack.callback(self.driver.close)
            self.driver.start(poll_us)
            self._stack = stack.pop_all()
        self.datapath = datapath

    def switch(self) -> Owner:
        """Hand the rings to the other owner, and return it."""
        self.device.set_use_vhost(self.device.owner is not Owner.VHOST)
        return self.device.owner

    def look(self) -> None:
        """Note whether frames have come since the last look: rates are those from the first frame to the last."""
        for side, each in self._clocks.items():
            each.look(int(getattr(self, side).rows[:, r.EP_FROM_WIRE].sum()))

    def report(self) -> dict[str, Any]:
        """Return the figures so far, as plain values; seconds and mpps are of the frames that an end gave."""
        self.look()
        errors = [str(error) for error in self.device.ring_errors()]
        if self.device.owner is Owner.NOBODY:
            errors.append(f"nobody runs the rings: {self.device.last_error or 'the driver is not ready'}")
        if self.driver.error is not None:
            errors.append(f"the driver's thread ended: {type(self.driver.error).__name__}: {self.driver.error}")
        errors += [*self.left.failures, *self.right.failures]
        report: dict[str, Any] = {
            "datapath": self.datapath,
            "owner": self.device.owner.value,
            "seconds": max(each.seconds for each in self._clocks.values()),
            "handovers": self.device.handovers,
            "fallbacks": self.device.fallbacks,
            "fallback": str(self.device.owner_error) if self.device.fallbacks else None,
            "status": self.device.status,
            "errors": errors,
            "left": self._counters("left"),
            "right": self._counters("right"),
            "queues": self.device.counters(),
        }
        if self.faults is not None:
            report["faults"] = self.faults.report()
        if (ledger := self._ledger()) is not None:
            report["ledger"] = ledger.as_dict()
        return report

    def _counters(self, side: str) -> dict[str, Any]:
        end: Endpoint = getattr(self, side)
        counters, took = end.counters(), self._clocks[side]
        return counters | {"seconds": took.seconds, "mpps": took.mpps(counters["from_wire"])}

    @property
    def done(self) -> bool:
        """True once the last frame of every end that gives any of itself has come; never if none of them is finite."""
        ends = (self.left, self.right)
        return any(end.finished for end in ends) and all(end.finished or not end.gives for end in ends)

    @property
    def dead(self) -> bool:
        """True once an end is gone: no frame passes the link any more."""
        return self.left.gone or self.right.gone

    def drain(self, stop: Callable[[], bool] = lambda: False) -> None:
        """Let generators make no more frames, and wait until those on their way have arrived, and were answered.

        Between two generators it is known when that is. Elsewhere it is when every frame counted at one end was counted at
        the other, neither end has one in hand, and none has moved for a quarter of a second. It is given up when none has
        moved for 5 s, unless an end has one in hand; and after 5 s if *stop* says so, or an end gives frames without end. An
        end that is gone is not waited for.
        """
        self._draining = True
        if isinstance(self.worker, WorkerProcess):
            self.worker.check()  # a stopped process holds frames, which userspace goes on with
        ends, finite = (self.left, self.right), self.done
        for end, side in ((self.left, self.device), (self.right, self.driver)):
            if isinstance(inner := end.innermost, GenerateEndpoint):
                with side.paused():  # or it makes one more, counted after all were seen to have arrived
                    inner.stop()
        if self.dead or not any(end.finished for end in ends):
            return  # frames from outside never end
        began = moved = time.monotonic()
        before = None
        while True:
            self.look()
            ledger = self._ledger()
            if ledger is not None and ledger.lost <= 0:
                return
            now, idle = [end.counters() for end in ends], all(end.idle for end in ends)
            if now != before or not (idle or ledger):
                before, moved = now, time.monotonic()
            known = ledger is None and _in_flight(now) <= 0
            if time.monotonic() - moved > (_QUIET_S if known else _PATIENCE_S):
                return
            if ledger is None and (stop() or not finite) and time.monotonic() - began > _PATIENCE_S:
                return
            time.sleep(clock.LOOK_S)

    def _ledger(self) -> Ledger | None:
        """Return the ledger of two generators, be they behind faults; None if the ends are others."""
        left, right = self.left.innermost, self.right.innermost
        if isinstance(left, GenerateEndpoint) and isinstance(right, GenerateEndpoint):
            return left.ledger_against(right) + right.ledger_against(left)
        return None

    @property
    def why_no_ledger(self) -> str:
        """Why a link with one generator has no ledger, in a line; empty for any other."""
        others = [end for end in (self.left, self.right) if not isinstance(end.innermost, GenerateEndpoint)]
        if len(others) != 1:
            return ""
        return f"no ledger: the frames of {others[0].name} have no numbers; with generate at both ends there is one"

    def close(self) -> None:
        """Stop both threads, the device and the worker."""
        self._stack.close()


def _in_flight(ends: list[dict[str, int]]) -> int:
    """Return how many frames came from one end, and have neither reached the other nor been dropped."""
    return sum(
        end["from_wire"] - end["to_wire"] - sum(count for key, count in end.items() if key.startswith("dropped_"))
        for end in ends
    )
