"""The search: all schedules of a scenario's actors, breadth first, so that the first fault found has a shortest schedule.

A state is the image and, for each actor, its node, its place among the node's effects, its store buffer, and the past of memory
that it may still read. A step is one choice: an actor goes on from its operation, a store reaches memory, an actor is
killed. Two things are left out, as they lead to nothing else:

* Operations on memory that no two actors share (one of them writing) are no choice: they are done along with the step before.
  The search learns which memory that is, and begins anew when it has learnt.
* A store reaches memory no earlier than it has to: when its actor waits for that, or another actor is at an operation that
  can tell the difference.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator
from typing import NamedTuple

from . import memory_model as order
from .actors import Node
from .layout import Layout
from .operations import DOORBELL, FENCE, Answer, Operation, Wrong
from .recovery import recoveries

_PROGRESS_S = 1.0


class Place(NamedTuple):
    """Where one actor is: done = effects of *node* that it has done."""

    node: Node
    done: int
    buffer: order.Buffer
    past: order.Past


class State(NamedTuple):
    image: bytes
    places: tuple[Place, ...]


class Step(NamedTuple):
    """A choice: actor *who* goes on (its choice *which*), a store of its buffer arrives (at index *which*), or it is killed."""

    who: int
    verb: str  # go, store, kill
    which: int


class Found(NamedTuple):
    """The result of a search."""

    states: int
    steps: int
    schedules: int | None  # None: without end, as the graph has a circle
    whole: bool
    fault: str
    schedule: tuple[Step, ...]


Trace = Callable[[int, str, int, bytes], None]


class _Learnt(Exception):
    """Two actors share memory that was not known to be shared."""


class Search:
    """A search from one state. check: returns the fault of a state where no actor can go on, "" if there is none."""

    def __init__(
        self, first: list[Node], image: bytes, layout: Layout, model: str, check: Callable[[State], str]
    ) -> None:
        self._first = first
        self._image = image
        self._layout = layout
        self._model = model
        self._check = check
        self._users: list[list[int]] = [[0, 0] for _ in image]  # by byte: actors that read it, that write it
        self._shared = bytearray(len(image))
        self._private: dict[tuple[int, int, int, bool], bool] = {}
        self.trace: Trace = _untold

    # --- memory that actors share ---

    def _is_private(self, who: int, at: int, length: int, writes: bool) -> bool:
        key = (who, at, length, writes)
        known = self._private.get(key)
        if known is None:
            grown = False
            for byte in range(at, at + length):
                self._users[byte][writes] |= 1 << who
                readers, writers = self._users[byte]
                if writers and (readers | writers).bit_count() > 1 and not self._shared[byte]:
                    self._shared[byte] = grown = True
            if grown:
                self._private.clear()
                raise _Learnt
            known = self._private[key] = not any(self._shared[at : at + length])
        return known

    # --- one actor's moves ---

    def _arrive(self, state: State, who: int, indices: list[int]) -> State:
        """Let stores of the buffer reach memory, in this order."""
        buffer = state.places[who].buffer
        for index in indices:
            at, data, _ = buffer[index].store
            self._is_private(who, at, len(data), True)
            self.trace(who, "arrives", at, data)
            state = self._write(state, who, at, data)
        place = state.places[who]
        return _put(state, who, place._replace(buffer=order.without(buffer, indices))) if indices else state

    def _drain(self, state: State, who: int) -> State:
        return self._arrive(state, who, list(range(len(state.places[who].buffer))))

    def _write(self, state: State, who: int, at: int, data: bytes) -> State:
        image, places = state
        old = image[at : at + len(data)]
        if old == data:
            return state
        image = image[:at] + data + image[at + len(data) :]
        if self._model == "weak":
            readers = 0
            for byte in range(at, at + len(data)):
                readers |= self._users[byte][0]
            places = tuple(
                place._replace(past=(*place.past, order.Old(at, old))) if k != who and readers >> k & 1 else place
                for k, place in enumerate(places)
            )
        return State(image, places)

    def _settle(self, state: State, who: int) -> State:
        """Have an actor do all that is no choice: its stores into the buffer, and what concerns no other actor."""
        while True:
            place = state.places[who]
            node, done, buffer, _ = place
            if done < len(node.effects):
                effect = node.effects[done]
                if effect is not FENCE:
                    self.trace(who, "stores", effect.at, effect.data)
                    state = _put(state, who, place._replace(done=done + 1, buffer=(*buffer, order.Held(effect, False))))
                    continue
                if not buffer:
                    state = _put(state, who, place._replace(done=done + 1, past=()))
                    continue
            if buffer and not node.actor.mortal:
                indices = self._private_stores(who, buffer)
                if indices:
                    state = self._arrive(state, who, indices)
                    continue
            operation = node.operation
            if done < len(node.effects) or operation is None or not self._concerns_nobody(who, operation, buffer):
                return state
            state = next(self._answers(state, who))

    def _private_stores(self, who: int, buffer: order.Buffer) -> list[int]:
        """Return the indices of stores that can arrive unseen, in order."""
        for k in range(len(buffer)):
            indices = order.before(buffer, k, self._model)
            if all(self._is_private(who, buffer[i].store.at, len(buffer[i].store.data), True) for i in indices):
                return indices
        return []

    def _concerns_nobody(self, who: int, operation: Operation, buffer: order.Buffer) -> bool:
        kind, at, length, _ = operation
        if kind == "load":
            return self._is_private(who, at, length, False)
        return kind in ("exchange", "or") and not buffer and self._is_private(who, at, length, True)

    def _answers(self, state: State, who: int) -> Iterator[State]:
        """Return the states after the actor's operation, one for each value that it may have."""
        place = state.places[who]
        operation = place.node.operation
        assert operation is not None
        kind, at, length, argument = operation
        if kind == "load":
            self._is_private(who, at, length, False)
            for value, before in order.values(state.image, place.buffer, place.past, at, length):
                self.trace(who, "loads", at, value)
                yield self._go(state, who, value, order.past_after(place.past, before, at, length, bool(argument)))
        elif kind == "poll":
            events, others, called_away = argument
            woken = tuple(event for event in events if state.image[event])
            if woken or others:
                self.trace(who, "is woken by" if woken else "is woken", woken[0] if woken else -1, b"")
                yield self._go(state, who, woken, ())
            if called_away:
                self.trace(who, "is called away", -1, b"")
                yield self._go(state, who, (*woken, DOORBELL), ())
        elif kind == "choose":
            for value in (0, 1):
                if value:
                    self.trace(who, "is called away", -1, b"")
                yield self._go(state, who, value, place.past)
        else:
            yield from self._change(self._drain(state, who), who, operation)

    def _change(self, state: State, who: int, operation: Operation) -> Iterator[State]:
        """Return the states after an atomic operation that writes."""
        kind, at, length, argument = operation
        if kind == "recover":
            yield from self._recover(state, who, at)
            return
        before = state.image[at : at + length]
        if kind == "or":
            after = bytes([before[0] | argument])
        elif kind == "exchange":
            after = argument.to_bytes(length, "little")
        else:
            after = bytes([kind == "signal"])
        self._is_private(who, at, length, True)
        self._is_private(who, at, length, False)
        self.trace(who, {"or": "sets", "exchange": "swaps", "signal": "signals", "take": "takes"}[kind], at, after)
        answer: Answer = before[0] if kind == "take" else before
        yield self._go(self._write(state, who, at, after), who, answer, ())

    def _recover(self, state: State, who: int, queue: int) -> Iterator[State]:
        place = state.places[who]
        try:
            broken_off, image, base = recoveries(self._layout, state.image, queue)
        except Wrong as e:
            yield _put(state, who, Place(place.node.with_fault(str(e)), 0, (), ()))
            return
        self.trace(who, f"recovers queue {queue} at index {base}", -1, b"")
        yield self._go(State(image, state.places), who, base, ())
        successor = place.node.actor.killed(place.node)
        if successor is not None:
            for k, image in enumerate(broken_off):
                self.trace(who, f"is killed at store {k} of the recovery of queue {queue}", -1, b"")
                yield _put(State(image, state.places), who, Place(successor, 0, (), ()))

    def _go(self, state: State, who: int, answer: Answer, past: order.Past) -> State:
        place = state.places[who]
        return _put(state, who, Place(place.node.after(answer), 0, place.buffer, past))

    def _kills(self, state: State, who: int) -> Iterator[State]:
        """Kill the actor after each of the stores that are in its buffer: those before have been executed, and arrive."""
        place = state.places[who]
        successor = place.node.actor.killed(place.node)
        if successor is None:
            return
        executed = max((k + 1 for k, held in enumerate(place.buffer) if held.bound), default=0)
        for n in range(executed, len(place.buffer) + 1):
            after = self._arrive(state, who, list(range(n)))
            self.trace(who, "is killed", -1, b"")
            yield _put(after, who, Place(successor, 0, (), ()))

    def _stores(self, state: State, who: int) -> Iterator[int]:
        """Return the indices of the stores in the buffer whose arrival another actor can tell at its next operation."""
        buffer = state.places[who].buffer
        for k, (store, _) in enumerate(buffer):
            for other, (node, done, held, _) in enumerate(state.places):
                if other == who:
                    continue
                operation = node.operation if done == len(node.effects) else None
                if (
                    (operation is not None and (operation.kind == "recover" or order.meet(store, *operation[1:3])))
                    or any(order.meet(store, o.at, len(o.data)) for o, _ in held)
                ):  # fmt: skip
                    yield k
                    break

    def _steps(self, state: State) -> Iterator[tuple[Step, State]]:
        waits = True
        for who, (node, done, buffer, _) in enumerate(state.places):
            for index in self._stores(state, who):
                arrived = self._arrive(state, who, order.before(buffer, index, self._model))
                yield Step(who, "store", index), self._settle(arrived, who)
            if done < len(node.effects):  # at a fence
                waits = False
                yield Step(who, "go", 0), self._settle(self._drain(state, who), who)
            elif node.operation is not None:
                for which, after in enumerate(self._answers(state, who)):
                    waits = False
                    yield Step(who, "go", which), self._settle(after, who)
            if node.actor.mortal:
                for which, killed in enumerate(self._kills(state, who)):
                    yield Step(who, "kill", which), self._settle(killed, who)
        for who, place in enumerate(state.places):
            if waits and place.buffer:  # in the end every store arrives
                yield Step(who, "store", len(place.buffer)), self._settle(self._drain(state, who), who)

    # --- the whole ---

    def start(self) -> State:
        state = State(self._image, tuple(Place(node, 0, (), ()) for node in self._first))
        for who in range(len(self._first)):
            state = self._settle(state, who)
        return state

    def run(self, most_states: int, progress: Callable[[int, int], None]) -> Found:
        """Look at all states, *most_states* at most. progress: called every second with (states, depth)."""
        while True:
            try:
                return self._run(most_states, progress)
            except _Learnt:
                continue

    def _run(self, most_states: int, progress: Callable[[int, int], None]) -> Found:
        first = self.start()
        came: dict[State, tuple[int, Step] | None] = {first: None}
        numbers = {first: 0}
        order_of: list[State] = [first]
        edges: list[list[int]] = []
        steps = 0
        due = time.monotonic() + _PROGRESS_S
        queue = deque([first])
        while queue:
            state = queue.popleft()
            if time.monotonic() > due:
                progress(len(numbers), steps)
                due = time.monotonic() + _PROGRESS_S
            number = numbers[state]
            fault = next((place.node.fault for place in state.places if place.node.fault), "")
            after: list[int] = []
            moved = False
            for step, following in self._steps(state) if not fault else ():
                steps += 1
                moved |= step.verb != "kill"
                known = numbers.get(following)
                if known is None:
                    known = numbers[following] = len(order_of)
                    order_of.append(following)
                    came[following] = (number, step)
                    queue.append(following)
                after.append(known)
            edges.append(after)
            if not fault and not moved:
                fault = self._check(state)
            if fault:
                return Found(len(numbers), steps, None, False, fault, _way(state, came, order_of))
            if len(numbers) > most_states:
                return Found(len(numbers), steps, None, False, "", ())
        return Found(len(numbers), steps, _schedules(edges), True, "", ())

    def follow(self, schedule: tuple[Step, ...]) -> list[tuple[int, str, int, bytes]]:
        """Do the steps of a schedule; return the operations: actor, verb, offset (-1 = none), bytes. ValueError for a wrong step."""
        done: list[tuple[int, str, int, bytes]] = []
        told: list[tuple[int, str, int, bytes]] = []
        self.trace = lambda *operation: told.append(operation)
        try:
            state = self.start()
            for number, step in enumerate(schedule):
                done += told
                told.clear()
                for each, after in self._steps(state):
                    if each == step:
                        state = after
                        break
                    told.clear()
                else:
                    raise ValueError(f"step {number + 1} of the schedule can't be done: {step}")
            return done + told
        finally:
            self.trace = _untold


def _untold(who: int, verb: str, at: int, data: bytes) -> None:
    """The trace of a search: none."""


def _put(state: State, who: int, place: Place) -> State:
    places = state.places
    return State(state.image, (*places[:who], place, *places[who + 1 :]))


def _way(state: State, came: dict[State, tuple[int, Step] | None], order_of: list[State]) -> tuple[Step, ...]:
    steps = []
    while (link := came[state]) is not None:
        steps.append(link[1])
        state = order_of[link[0]]
    return tuple(reversed(steps))


def _schedules(edges: list[list[int]]) -> int | None:
    """Return the number of ways from the first state to one where nothing is left to do; None if a circle makes it endless."""
    into = [0] * len(edges)
    for after in edges:
        for number in after:
            into[number] += 1
    ways = [0] * len(edges)
    ways[0] = 1
    ready = [0] if not into[0] else []
    done = 0
    total = 0
    while ready:
        number = ready.pop()
        done += 1
        if not edges[number]:
            total += ways[number]
        for following in edges[number]:
            ways[following] += ways[number]
            into[following] -= 1
            if not into[following]:
                ready.append(following)
    return total if done == len(edges) else None
