"""Stepper: a device without threads, each of whose actions is a step that is recorded and can be replayed."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterable
from contextlib import suppress
from typing import Self

from ..device.device import NetDevice
from ..endpoints.mailbox import MailboxEndpoint
from ..errors import reason
from ..guest.driver import Driver
from ..shared.memory import GuestMemory
from ..system.owned import Owned
from .outcome import Outcome, ScheduleError
from .schedule import Schedule, Setup, Step
from .stepped import Stepped


class Stepper(Owned):
    """A device, its guest and its vhost, without threads, on the wire that *setup* names; `do` runs and records a step.

    After each step the invariants I1 to I10 hold that a device without a migration has (docs/testing.md). A step that
    breaks one raises a ScheduleError, which has the schedule in its text; any other exception that leaves a `with` block
    gets the schedule as a note. ConfigError if the wire can't be made.
    """

    def __init__(self, setup: Setup | None = None) -> None:
        self.setup = setup or Setup()
        """The device that the steps are for."""
        self._stepped = Stepped(self.setup)
        self._steps: list[Step] = []
        self._notes: list[str] = []
        self._violations: tuple[str, ...] = ()
        self._trail = 0

    @property
    def device(self) -> NetDevice:
        """The device, to look at between two steps. A schedule has the steps alone, and no other call of it."""
        return self._stepped.device

    @property
    def guest(self) -> Driver:
        """The guest's driver, likewise."""
        return self._stepped.guest

    @property
    def wire(self) -> MailboxEndpoint:
        """The wire's endpoint, likewise. Each step takes the frames that arrived."""
        return self._stepped.wire

    @property
    def memory(self) -> GuestMemory:
        """Guest memory, likewise."""
        return self._stepped.memory

    @property
    def schedule(self) -> Schedule:
        """The steps so far."""
        return Schedule(self.setup, tuple(self._steps))

    def do(self, step: Step | str) -> int:
        """Run one step, such as `send guest 0 3 64`, and look at the invariants; return the number of frames moved.

        ScheduleError if it broke an invariant; ConfigError, and nothing is done or recorded, if there is no such step.
        """
        self.check_maker()
        step = Step.parse(step) if isinstance(step, str) else step
        self.setup.check(step)
        before = self.device.last_error
        self._steps.append(step)
        moved, violations = self._stepped.run(step)
        self._trail = self._stepped.memory_crc(self._trail)
        error = self.device.last_error
        new_error = reason(error) if error is not None and error is not before else ""
        self._notes.append("; ".join(filter(None, (f"{moved} moved", self.device.owner.value, new_error))))
        self._violations = tuple(violations)
        if violations:
            raise ScheduleError(violations, self.schedule, self._notes)
        return moved

    def play(self, steps: Iterable[Step | str]) -> Self:
        """Run *steps* one after another, as `do` does; return the stepper itself."""
        for step in steps:
            self.do(step)
        return self

    def outcome(self) -> Outcome:
        """Return all that the steps so far left behind."""
        stepped, device, error = self._stepped, self.device, self.device.last_error
        return Outcome(
            schedule=self.schedule,
            notes=tuple(self._notes),
            violations=self._violations,
            trail=self._trail,
            memory=stepped.memory_crc(),
            frames=zlib.crc32(struct.pack("<II", stepped.to_wire.crc, stepped.to_guest.crc)),
            dirty=stepped.dirty,
            to_wire=stepped.to_wire.ledger(),
            to_guest=stepped.to_guest.ledger(),
            counters=(*device.counters(), *self.guest.counters(), self.wire.counters()),
            owner=device.owner.value,
            handovers=device.handovers,
            fallbacks=device.fallbacks,
            last_error=reason(error) if error is not None else "",
        )

    def __exit__(self, *exc: object) -> None:
        _, error, _ = exc
        if isinstance(error, Exception) and not isinstance(error, ScheduleError):
            error.add_note(f"The schedule that led to it:\n\n{self.schedule.text(self._notes)}")
        self.close()

    def close(self) -> None:
        """Give up all that it made."""
        self._stepped.close()


def replay(schedule: Schedule | str) -> Outcome:
    """Run *schedule*, or the one in a text such as that of a ScheduleError, and return what it left behind.

    It ends at the first step that breaks an invariant; `Outcome.check` raises that. ConfigError if the text has no schedule.
    """
    if isinstance(schedule, str):
        schedule = Schedule.parse(schedule)
    with Stepper(schedule.setup) as stepper:
        with suppress(ScheduleError):  # the outcome has it
            stepper.play(schedule.steps)
        return stepper.outcome()
