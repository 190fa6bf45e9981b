"""Schedule: the steps of a stepped device as plain data, and as text: a line a step, with a version at its top."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from typing import Final

from ..backends.faulty import Fault
from ..errors import ConfigError
from ..virtio import features as f
from ..virtio.queue import check_num, queues_of

VERSION: Final = 1
_HEAD: Final = "vnetdp schedule"
_END: Final = "end"
_MAX_PAIRS: Final = 64
_MAX_NUM: Final = 1024
_ALL: Final = "all"

Arg = str | int


@dataclass(frozen=True, slots=True)
class _Number:
    """An argument that is a number from *low* to *high*."""

    name: str
    low: int
    high: int

    def take(self, value: Arg) -> Arg:
        number = int(value) if isinstance(value, int) or value.isdecimal() else -1
        if not self.low <= number <= self.high:
            raise ConfigError(f"{self.name} {value!r} is not a number from {self.low} to {self.high}")
        return number


@dataclass(frozen=True, slots=True)
class _Word:
    """An argument that is one of *choices*."""

    name: str
    choices: tuple[str, ...]

    def take(self, value: Arg) -> Arg:
        if value not in self.choices:
            raise ConfigError(f"{self.name} {value!r} is not {' or '.join(self.choices)}")
        return value


class _Fault:
    """An argument that is a fault, as `Fault.parse` takes it."""

    name = "FAULT"

    def take(self, value: Arg) -> Arg:
        Fault.parse(str(value))
        return value


class _Hex:
    """An argument that is bytes in hexadecimal."""

    name = "HEX"

    def take(self, value: Arg) -> Arg:
        try:
            return bytes.fromhex(str(value)).hex()
        except ValueError as e:
            raise ConfigError(f"frame {value!r} is not bytes in hexadecimal") from e


_END_OF = _Word("END", ("guest", "wire"))
_PAIR = _Number("PAIR", 0, _MAX_PAIRS - 1)
_QUEUE = _Number("QUEUE", 0, queues_of(_MAX_PAIRS) - 1)
_BUDGET = (_Number("BUDGET", 1, 4096),)
# Each step by its name, with its arguments. docs/testing.md says what each does.
STEPS: Final[dict[str, tuple[_Number | _Word | _Fault | _Hex, ...]]] = {
    "send": (_END_OF, _PAIR, _Number("COUNT", 1, 4096), _Number("LENGTH", 60, 1514)),
    "frame": (_END_OF, _PAIR, _Hex()),
    "guest": _BUDGET,
    "device": _BUDGET,
    "vhost": _BUDGET,
    "use": (_Word("OWNER", ("vhost", "userspace")),),
    "status": (),
    "reset": (),
    "queue": (_QUEUE,),
    "link": (_Word("STATE", ("up", "down")),),
    "log": (_Word("STATE", ("on", "read", "off")),),
    "fault": (_Fault(),),
    "mend": (),
    "kill": (),
    "revive": (),
    "settle": (),
}


@dataclass(frozen=True, slots=True)
class Step:
    """One step of a `Schedule`: `Step.parse("send guest 0 3 64")`. ConfigError if there is no such step."""

    name: str
    """The step's name, as docs/testing.md lists them."""
    args: tuple[Arg, ...] = ()
    """Its arguments: numbers as int, all others as text."""

    def __post_init__(self) -> None:
        if self.name not in STEPS:
            raise ConfigError(f"{self.name!r} is no step; steps are {', '.join(STEPS)}")
        kinds = STEPS[self.name]
        if len(kinds) != len(self.args):
            wanted = " ".join((self.name, *(kind.name for kind in kinds)))
            raise ConfigError(f"{str(self)!r} has {len(self.args)} arguments; the step is: {wanted}")
        taken = tuple(kind.take(arg) for kind, arg in zip(kinds, self.args, strict=True))
        object.__setattr__(self, "args", taken)

    @classmethod
    def parse(cls, line: str) -> Step:
        """Return the step that a line of a schedule's text describes; a comment behind `#` is left out."""
        name, *args = line.partition("#")[0].split() or [""]
        return cls(name, tuple(args))

    def __str__(self) -> str:
        return " ".join((self.name, *map(str, self.args)))


@dataclass(frozen=True, slots=True)
class Setup:
    """The device, the guest and the wire that a `Schedule` is for. ConfigError if a value cannot be."""

    pairs: int = 1
    """Queue pairs, 1 to 64."""
    num: int = 16
    """Descriptors of each queue, a power of two up to 1024."""
    first_idx: int = 0
    """The value at which all ring indices begin, 0 to 65535."""
    features: int | None = None
    """Feature bits for the guest to accept of those offered; None accepts all."""
    wire: str = "vnetdp:MailboxEndpoint"
    """The class of the wire's endpoint, MODULE:CLASS: a subclass of `MailboxEndpoint` that is made of a number of queues."""

    def __post_init__(self) -> None:
        if not 1 <= self.pairs <= _MAX_PAIRS:
            raise ConfigError(f"{self.pairs} queue pairs: 1 to {_MAX_PAIRS} can be")
        check_num(self.num)
        if self.num > _MAX_NUM:
            raise ConfigError(f"queue size {self.num}: at most {_MAX_NUM} can be")
        if not 0 <= self.first_idx <= 0xFFFF:
            raise ConfigError(f"first_idx {self.first_idx} is not between 0 and 65535")
        if self.features is not None and (odd := [name for name in f.names(self.features) if name not in f.NAMES]):
            raise ConfigError(f"features: {', '.join(odd)} has no name")
        module, _, name = self.wire.partition(":")
        if not module or not name or len(self.wire.split()) != 1:
            raise ConfigError(f"wire {self.wire!r} is not MODULE:CLASS")

    @classmethod
    def parse(cls, line: str) -> Setup:
        """Return the setup that the second line of a schedule's text describes."""
        word, *pairs = line.partition("#")[0].split() or [""]
        known = [field.name for field in fields(cls)]
        values = dict(pair.split("=", 1) for pair in pairs if "=" in pair)
        if word != "setup" or values.keys() != set(known):
            raise ConfigError(f"{line!r} is not: setup {' '.join(f'{name}=…' for name in known)}")
        for name in ("pairs", "num", "first_idx"):
            if not values[name].isdecimal():
                raise ConfigError(f"setup: {name} {values[name]!r} is not a number")
        wanted = values["features"]
        features = None if wanted == _ALL else f.parse(wanted.removeprefix("none"), usual=0)
        return cls(int(values["pairs"]), int(values["num"]), int(values["first_idx"]), features, values["wire"])

    def __str__(self) -> str:
        features = _ALL if self.features is None else ",".join(f.names(self.features)) or "none"
        return (
            f"setup pairs={self.pairs} num={self.num} first_idx={self.first_idx} features={features} wire={self.wire}"
        )

    def check(self, step: Step) -> None:
        """Raise ConfigError if *step* is of a queue that this device lacks."""
        for kind, arg in zip(STEPS[step.name], step.args, strict=True):
            limit = {_PAIR: self.pairs, _QUEUE: queues_of(self.pairs)}.get(kind) if isinstance(kind, _Number) else None
            if limit is not None and int(arg) >= limit:
                raise ConfigError(f"{str(step)!r}: {kind.name} {arg} of a device with {limit}: 0 to {limit - 1} can be")


@dataclass(frozen=True, slots=True, repr=False)
class Schedule:
    """A `Setup` and the `Step`s to run on it, in order. Two equal schedules leave the same bytes. ConfigError as theirs.

    `str(schedule)` is its text, and `Schedule.parse` reads that back.
    """

    setup: Setup = Setup()
    """The device that the steps are for."""
    steps: tuple[Step, ...] = ()
    """The steps, in order."""

    def __post_init__(self) -> None:
        for step in self.steps:
            self.setup.check(step)

    @classmethod
    def of(cls, setup: Setup, lines: Iterable[str]) -> Schedule:
        """Return a schedule of the steps that *lines* describe."""
        return cls(setup, tuple(map(Step.parse, lines)))

    @classmethod
    def parse(cls, text: str) -> Schedule:
        """Return the schedule in *text*: also out of a whole failure's text, indented or with pytest's `E` before each line.

        ConfigError, with the number of the line, if there is none, or a line is wrong.
        """
        lines = [line.strip().removeprefix("E ").strip() for line in text.splitlines()]
        try:
            first = next(n for n, line in enumerate(lines) if line.startswith(_HEAD))
        except StopIteration:
            raise ConfigError(f"no line begins with {_HEAD!r}: this is no schedule") from None
        if lines[first] != f"{_HEAD} {VERSION}":
            raise ConfigError(f"line {first + 1}: {lines[first]!r}: this version reads {_HEAD} {VERSION} alone")
        if _END not in lines[first:]:
            raise ConfigError(f"the schedule does not end with the line {_END!r}: it was cut off")
        last = lines.index(_END, first)
        at = first + 1
        try:
            setup = Setup.parse(lines[at])
            steps = []
            for at in range(first + 2, last):
                if lines[at].partition("#")[0]:
                    steps.append(Step.parse(lines[at]))
                    setup.check(steps[-1])
        except ConfigError as e:
            raise ConfigError(f"line {at + 1}: {e}") from None
        return cls(setup, tuple(steps))

    def text(self, notes: Sequence[str] = ()) -> str:
        """Return the text, with a note behind each of the first steps as a comment."""
        steps = [str(step) for step in self.steps]
        noted = [f"{step:<24} # {note}" if note else step for step, note in zip(steps, notes, strict=False)]
        return "\n".join((f"{_HEAD} {VERSION}", str(self.setup), *noted, *steps[len(noted) :], _END))

    def __str__(self) -> str:
        return self.text()

    def __repr__(self) -> str:
        return f"Schedule.parse({str(self)!r})"
