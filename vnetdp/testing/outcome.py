"""Outcome: all that a schedule left behind, as plain data, so that two processes can compare it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from ..endpoints.loopback import Ledger
from .schedule import Schedule

_HINT = "Replay this schedule with `python -m vnetdp.testing replay FILE`, or vnetdp.testing.replay(TEXT):"


class ScheduleError(AssertionError):
    """A step of a schedule broke an invariant. The text has the violations, and the schedule that replays them."""

    def __init__(self, violations: Sequence[str], schedule: Schedule, notes: Sequence[str] = ()) -> None:
        self.violations = tuple(violations)
        """One line each, which begins with the invariant's name."""
        self.schedule = schedule
        """The steps up to the one that broke it."""
        super().__init__("\n".join((*self.violations, "", _HINT, "", schedule.text(notes))))


@dataclass(frozen=True, slots=True)
class Outcome:
    """All that a `Schedule` left behind. Two runs of a schedule have equal outcomes, in whatever process they ran."""

    schedule: Schedule
    """The steps that ran: if one broke an invariant, it is the last."""
    notes: tuple[str, ...]
    """What came of each step: frames moved, the owner of the rings, and errors."""
    violations: tuple[str, ...]
    """The invariants that the last step broke, a line each; empty if none was."""
    trail: int
    """The CRC-32 of guest memory after each step, chained."""
    memory: int
    """The CRC-32 of guest memory at the end."""
    frames: int
    """The CRC-32 of all frames that arrived at either end, in their order."""
    dirty: int
    """The CRC-32 of the dirty log, as each `log read` took it."""
    to_wire: Ledger
    """The fate of numbered frames from the guest to the wire."""
    to_guest: Ledger
    """The fate of numbered frames from the wire to the guest."""
    counters: tuple[dict[str, int], ...]
    """The counters of the device's queues, of the guest's queues, and of the wire."""
    owner: str
    """The owner of the rings at the end."""
    handovers: int
    """Changes of owner."""
    fallbacks: int
    """The number of times that vhost could not be started."""
    last_error: str
    """The text of `NetDevice.last_error` at the end; empty if there was none."""

    def check(self) -> Outcome:
        """Return the outcome itself; ScheduleError if an invariant was broken."""
        if self.violations:
            raise ScheduleError(self.violations, self.schedule, self.notes)
        return self

    def as_dict(self) -> dict[str, Any]:
        """Return the outcome as a dictionary that JSON can hold, the schedule as its text."""
        values = {**asdict(self), "schedule": self.schedule.text(self.notes).splitlines()}
        return {
            key: list(value) if isinstance(value, tuple) else value for key, value in values.items() if key != "notes"
        }
