"""The result of a search, as data and as text."""

from __future__ import annotations

from dataclasses import dataclass

MOST_STATES = 1_000_000


@dataclass(frozen=True)
class Job:
    """A search to be made."""

    scenario: str
    """A name of `SCENARIOS`."""
    mutant: str = ""
    """A name of `MUTANTS`; "" = the kernels as they are shipped."""
    model: str = ""
    """The order of stores, `tso` or `weak`; "" = that of the scenario."""
    extra: int = 0
    """Frames more in the last batch of each direction."""
    most_states: int = MOST_STATES
    """States after which the search gives up."""
    schedule: str = ""
    """A schedule to be replayed, in place of a search."""


@dataclass(frozen=True)
class Report:
    """The result of a search."""

    scenario: str
    mutant: str
    model: str
    states: int
    """States of all actors together, and of memory, that were reached."""
    steps: int
    """Ways from one state to the next."""
    schedules: int | None
    """Schedules, from the beginning to an end; None if a circle makes them endless, or the search is not whole."""
    seconds: float
    """Time on a processor, in seconds."""
    whole: bool
    """True if every schedule was looked at: neither a fault nor `Job.most_states` ended the search."""
    fault: str
    """The rule that a schedule breaks; "" if none does."""
    schedule: str
    """A shortest schedule that breaks it, for `Job.schedule`."""
    operations: tuple[str, ...]
    """The operations of that schedule, a line each: actor, operation, place, value."""

    @property
    def survived(self) -> bool:
        """True if every schedule was looked at, and none breaks a rule."""
        return self.whole and not self.fault

    def __str__(self) -> str:
        name = f"{self.scenario} ({self.model})" + (f", mutant {self.mutant}" if self.mutant else "")
        size = f"{self.states:,} states, {self.steps:,} steps"
        if self.schedules is not None:
            size += f", {_rounded(self.schedules)} schedules"
        lines = [f"{name}: {size}, {self.seconds:.1f} s: {self._verdict()}"]
        lines += [f"  {line}" for line in self.operations]
        if self.schedule:
            lines.append(f"  replay: --schedule '{self.schedule}'")
        return "\n".join(lines)

    def _verdict(self) -> str:
        if self.fault:
            return self.fault
        return "no fault" if self.whole else "no fault so far, and not all states were looked at"


def _rounded(number: int) -> str:
    return f"{number:,}" if number < 1_000_000 else f"{number:.1e}"
