"""An actor's local states: what it does next, found by running its function with the answers that it got so far.

An actor is a function, called turn after turn, whose whole state between two turns lies in one block of memory and one
value. `Node` is a state of it: at an operation, with a value to come. The search is over nodes, not over threads: a node
that was reached once is never computed again, in whatever state the other actors are.
"""

from __future__ import annotations

from collections.abc import Hashable
from copy import copy
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from .operations import Answer, Doorbell, Effect, Operation, Pause, Record, RuleError, Running

_BLOCK = 16384
_Start = tuple[bytes, Hashable]


class _Run(NamedTuple):
    """A run of an actor's program: from *start*, between two turns, with the answers that it got."""

    start: _Start
    answers: tuple[Answer, ...]


class Node:
    """A state of an actor: it did *effects*, and is at *operation*; None = its program has ended, by *fault* if it has one.

    outcome: of `Actor.outcome`, as it is here.
    """

    __slots__ = ("_next", "_run", "_successor", "actor", "effects", "fault", "kept", "operation", "outcome")

    def __init__(
        self, actor: Actor, run: _Run, effects: tuple[Effect, ...], operation: Operation | None, fault: str = ""
    ) -> None:
        self.actor = actor
        self.effects = effects
        self.operation = operation
        self.fault = fault
        self.kept = actor.kept
        self.outcome: Any = None
        try:
            self.outcome = actor.outcome()
        except RuleError as e:
            self.operation, self.fault = None, f"{actor.name}: {e}"
        self._run = run
        self._next: dict[Answer, Node] = {}
        self._successor: tuple[Node | None] | None = None

    def after(self, answer: Answer) -> Node:
        """Return the state that the operation leads to, if its value is *answer*."""
        node = self._next.get(answer)
        if node is None:
            node = self._next[answer] = self.actor.run(_Run(self._run.start, (*self._run.answers, answer)))
        return node

    def successor(self) -> Node | None:
        """Return the first state of the actor's successor, if it is killed here; None if it is not to be killed here."""
        if self._successor is None:
            self._successor = (self.actor.killed(self),)
        return self._successor[0]

    def behind(self, before: tuple[Effect, ...]) -> Node:
        """Return the same state, with the effects *before* still to be done."""
        node = copy(self)
        node.effects = before + self.effects
        node._next = {}
        return node

    def with_fault(self, fault: str) -> Node:
        """Return the state in which the actor ends with a fault."""
        node = copy(self)
        node.effects, node.operation, node.fault = (), None, fault
        return node


class Actor:
    """One side: `turn` is its program, and runs over arrays from `carve` and over *kept*, which has to be hashable."""

    name = "actor"
    mortal = False  # it may be killed

    def __init__(self) -> None:
        self._block: npt.NDArray[np.uint8] = np.zeros(_BLOCK, np.uint8)
        self._used = 0
        self._known: dict[Hashable, Node] = {}
        self.doorbell: Any = Doorbell()
        self.kept: Any = ()

    def carve(self, dtype: Any, *shape: int) -> Any:
        """Return the next array of the block, which is a part of the actor's state."""
        count = int(np.prod(shape))
        array: npt.NDArray[Any] = np.frombuffer(self._block.data, dtype, count, self._used).reshape(shape)
        self._used += -(-array.nbytes // 8) * 8
        return array

    def clear(self) -> None:
        """Zero the block, for a successor."""
        self._block[:] = 0

    def turn(self) -> bool:
        """Do a part of the program; False if that was the last one. `RuleError` if a rule is broken."""
        raise NotImplementedError

    def outcome(self) -> Any:
        """Return the facts about the state that the scenario's check and `killed` look at."""
        return None

    def killed(self, node: Node) -> Node | None:
        """Return the first state of the successor of this actor, killed in *node*; None if it is not to be killed there."""
        return None

    def first(self) -> Node:
        """Return the state at the first operation."""
        return self._begin(self.save(), ())

    def save(self) -> _Start:
        return self._block[: self._used].tobytes(), self.kept

    def run(self, run: _Run) -> Node:
        """Return the state that a run of the program leads to."""
        self._block[: self._used] = np.frombuffer(run.start[0], np.uint8)
        self.kept = run.start[1]
        record = Running.record = Record(run.answers)
        Running.doorbell = self.doorbell
        self.doorbell.armed = self.doorbell.rang = False
        try:
            goes_on = self.turn()
        except Pause as pause:
            return Node(self, run, tuple(record.effects), pause.operation)
        except (RuleError, IndexError) as e:
            return Node(self, run, tuple(record.effects), None, f"{self.name}: {e}")
        effects = tuple(record.effects)
        return self._begin(self.save(), effects) if goes_on else Node(self, run, effects, None)

    def _begin(self, start: _Start, before: tuple[Effect, ...]) -> Node:
        """Return the state at the first operation of a turn; *before*: effects of the turn that ended."""
        key = (start, before)
        if key not in self._known:
            node = self.run(_Run(start, ()))
            self._known[key] = node.behind(before) if before else node
        return self._known[key]
