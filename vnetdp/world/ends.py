"""The parts of a saved world that frames come from and go to: guest memory, clocks, endpoints, and the faults of verbs."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Any

import numpy as np

from vnetdp_kernels import rows as r

from ..backends.faulty import Fault, Faults
from ..endpoints.base import Endpoint
from ..endpoints.clock import Clock
from ..endpoints.fault import FaultEndpoint, FrameFaults
from ..endpoints.frames import QueuedEndpoint
from ..endpoints.mailbox import MailboxEndpoint
from ..errors import ConfigError, reason
from ..shared.memory import GuestMemory
from ..system.owned import Owned, OwnedLock
from . import limits
from .part import Part
from .plain import copied, flag, frames, number, of_error, to_error
from .sparse import pack, pages_of_block, pages_of_memory, unpack

_IN_PROCESS = (
    *(r.KIND_NULL, r.KIND_ECHO, r.KIND_MACSWAP, r.KIND_REFLECT, r.KIND_GENERATE),
    *(r.KIND_FAULT, r.KIND_PYTHON, r.KIND_FAULT_PYTHON),
)
_FAULT = ("verb", "pair", "index", "code", "phase", "nth", "delay_s", "text")  # of a `Fault`, as it was made
_MANY = 1 << 20  # faults, frames of one queue


class MemoryPart(Part):
    """Guest memory: the lines of each region that are not all zero."""

    def __init__(self, name: str, memory: GuestMemory) -> None:
        super().__init__(name)
        self._memory = memory

    def owned(self) -> Sequence[Owned | OwnedLock]:
        return [self._memory]

    def check_private(self) -> None:
        if not self._memory.private:
            raise ConfigError(f"{self.name}: parent and child share it: make it with memory_for(private=True)")

    def check_at_rest(self) -> None:
        if self._memory.closed:
            raise ConfigError(f"{self.name}: it is closed")

    def shape(self) -> dict[str, Any]:
        return {"regions": [[region.gpa, region.length] for region in self._memory.regions]}

    def save(self) -> Any:
        return [pack(flat, pages) for flat, pages in pages_of_memory(self._memory)]

    def load(self, state: Any) -> None:
        for saved, (flat, pages) in zip(state, pages_of_memory(self._memory), strict=True):
            unpack(saved, flat, pages)


class ClockPart(Part):
    """A clock: its time. endpoints: those of the world."""

    def __init__(self, name: str, clock: Clock, endpoints: list[Endpoint]) -> None:
        super().__init__(name)
        self._clock, self._endpoints = clock, endpoints

    def owned(self) -> Sequence[Owned | OwnedLock]:
        return [self._clock]

    def check_at_rest(self) -> None:
        for reader in self._clock._readers:
            if not any(reader is endpoint for endpoint in self._endpoints):
                raise ConfigError(
                    f"{self.name}: {getattr(reader, 'name', 'another endpoint')} reads it, of a device that is not in this "
                    "world: give World all drivers of the clock"
                )

    def save(self) -> Any:
        if self._clock._calls:
            raise ConfigError(
                f"{self.name}: announcements are due on it, which can't be saved: advance it past them (next_due_ns) first"
            )
        return {"now_ns": self._clock.now_ns}

    def load(self, state: Any) -> None:
        self._clock._calls.clear()  # of announcements that were made since
        self._clock._tell(number(state["now_ns"], "now_ns"))


class FaultsPart(Part):
    """A list of faults that verbs may meet."""

    def __init__(self, name: str, faults: Faults) -> None:
        super().__init__(name)
        self._faults = faults
        self._before: list[Fault] = []  # the faults at the last save: a caller may hold one, and ask for its hits

    def save(self) -> Any:
        self._before = list(self._faults)
        return {
            "phase": self._faults.phase,
            "armed": self._faults.armed,
            "faults": [
                {name: getattr(fault, name) for name in (*_FAULT, "times", "hits")} | {"calls": fault._calls}
                for fault in self._faults
            ],
        }

    def load(self, state: Any) -> None:
        wanted = [self._fault(n, saved) for n, saved in enumerate(state["faults"][:_MANY])]
        self._faults.phase, self._faults.armed = str(state["phase"]), flag(state["armed"], "armed")
        self._faults[:] = wanted

    def _fault(self, n: int, saved: Any) -> Fault:
        """Return a fault as it was saved: the one that was at its place before, if that is the same."""
        made = {name: copied(saved[name], name) for name in _FAULT}
        fault = self._before[n] if n < len(self._before) else None
        if fault is None or any(getattr(fault, name) != value for name, value in made.items()):
            fault = Fault(**made)
        fault.times, fault.hits = number(saved["times"], "times", -1), number(saved["hits"], "hits")
        fault._calls = number(saved["calls"], "calls")
        return fault


class EndpointPart(Part):
    """An endpoint: its rows, frames and ledger, and the state that it keeps in Python.

    in_wire: it is behind a faulty wire, whose part has its rows and frames.
    """

    def __init__(self, name: str, endpoint: Endpoint, in_wire: bool) -> None:
        super().__init__(name)
        self.endpoint = endpoint
        self._in_wire = in_wire
        stages = range(endpoint.lines + 1)
        self._slots = [k * r.STAGE_SLOTS + slot for k in stages for slot in (r.EP_KIND, r.EP_LINES, r.EP_FLOW)]
        self._constant = endpoint.rows[:, self._slots]  # no step changes these slots of the wires and the endpoint

    def owned(self) -> Sequence[Owned | OwnedLock]:
        endpoint = self.endpoint
        found: list[Owned | OwnedLock] = [endpoint, endpoint.block, endpoint._python_side, *endpoint._wakes]
        found += [endpoint._lock] if isinstance(endpoint, QueuedEndpoint) else []
        return [*found, endpoint.ready] if isinstance(endpoint, MailboxEndpoint) else found

    def adopt(self) -> None:
        super().adopt()
        self._tell_waiters()

    def _tell_waiters(self) -> None:
        """Have eventfds readable if frames wait, or may: a loop asks once more than it has to."""
        endpoint = self.endpoint
        for queue in range(len(endpoint._wakes)):
            endpoint._wake(queue)
        if isinstance(endpoint, MailboxEndpoint):
            endpoint.ready.clear()
            if endpoint._from_ring:
                endpoint.ready.signal()

    def check_at_rest(self) -> None:
        endpoint = self.endpoint
        named = f"{self.name} ({endpoint.name})"
        if endpoint._closed:
            raise ConfigError(f"{named}: it is closed")
        if endpoint.kind not in _IN_PROCESS or endpoint.files:
            raise ConfigError(
                f"{named}: a file, a socket or a TAP can't go back to an earlier state: take an endpoint that lives in "
                "the simulation alone, such as MailboxEndpoint"
            )
        if endpoint.block.shared:
            raise ConfigError(f"{named}: another process may run it: make a new endpoint for this world")
        if endpoint._in_hand:
            raise ConfigError(f"{named}: a step is under way: save or load the world between two steps")

    def shape(self) -> dict[str, Any]:
        endpoint = self.endpoint
        shape = {
            "class": type(endpoint).__name__,
            "queues": endpoint.queues,
            "kind": endpoint.kind,
            "lines": endpoint.lines,
            "in_wire": self._in_wire,
        }
        return shape | ({"limit": endpoint.limit} if isinstance(endpoint, QueuedEndpoint) else {})

    def save(self) -> Any:
        endpoint = self.endpoint
        state: dict[str, Any] = {
            "errors": endpoint.errors,
            "last_error": of_error(endpoint.last_error),
            "late": [[queue, [bytes(frame) for frame in late]] for queue, late in sorted(endpoint._late.items())],
            "own": copied(endpoint.save_own(), f"{endpoint.name}: save_own"),
        }
        if not self._in_wire:
            state["block"] = pack(*pages_of_block(endpoint.block))
        if isinstance(endpoint, FaultEndpoint):
            state["faults"] = vars(endpoint.faults).copy()
        if isinstance(endpoint, QueuedEndpoint):
            state["to_ring"] = [list(waiting) for waiting in endpoint._to_ring]
        if isinstance(endpoint, MailboxEndpoint):
            state |= {"from_ring": list(endpoint._from_ring), "dropped": endpoint.dropped}
        return state

    def load(self, state: Any) -> None:
        endpoint = self.endpoint
        if not self._in_wire:
            unpack(state["block"], *pages_of_block(endpoint.block))
            if (endpoint.rows[:, self._slots] != self._constant).any():
                raise ConfigError("its kind, faulty wires or flows are not those of the endpoint")
        if isinstance(endpoint, FaultEndpoint):
            faults = copied(state["faults"], "faults")
            endpoint.set(**{name: faults[name] for name in vars(FrameFaults())})
        if isinstance(endpoint, MailboxEndpoint):
            endpoint.dropped = number(state["dropped"], "dropped")
            self._refill(endpoint._from_ring, frames(state["from_ring"], endpoint.limit))
        if isinstance(endpoint, QueuedEndpoint):
            for waiting, saved in zip(endpoint._to_ring, state["to_ring"], strict=True):
                self._refill(waiting, frames(saved, endpoint.limit))
        endpoint.errors, endpoint.last_error = number(state["errors"], "errors"), to_error(state["last_error"])
        endpoint._late.clear()
        endpoint._late.update({int(queue): frames(late, _MANY) for queue, late in state["late"]})
        self._tell_waiters()
        try:
            endpoint.load_own(copied(state["own"], "own"))
        except Exception as e:
            raise ConfigError(f"load_own: {reason(e)}") from e

    @staticmethod
    def _refill(waiting: deque[bytes], saved: list[bytes]) -> None:
        waiting.clear()
        waiting.extend(saved)

    def check(self) -> None:
        if self._in_wire:
            return
        endpoint, lines = self.endpoint, self.endpoint.lines
        into, out = endpoint.in_lengths, endpoint.out_lengths
        if lines:  # both are one array, with the slots of both ways behind the lines
            out, into = np.split(into[:, 2 * lines * r.LINE_TABLE :], 2, axis=1)
        limits.check_endpoint(endpoint.rows, endpoint.ledger, lines, (into, out))
        for queue, row in enumerate(endpoint.rows):
            for k in range(2 * lines):  # of each wire the line to the wire, then that from it
                stage, way = divmod(k, 2)
                at = stage * r.STAGE_SLOTS + r.EP_SLOTS + way * r.LINE_SLOTS
                table = endpoint.in_lengths[queue, k * r.LINE_TABLE : (k + 1) * r.LINE_TABLE]
                limits.check_line(row[at : at + r.LINE_SLOTS], table)
