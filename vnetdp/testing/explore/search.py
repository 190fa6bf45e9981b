"""The search: all schedules of a scenario's actors, breadth first, so that the first fault found has a shortest schedule.

A state is the image and, for each actor, its node, its place among the node's effects, its store buffer, and the past of
memory that it may still read. A step is one choice: an actor goes on from its operation, a store reaches memory, an actor is
killed. Two things are left out, as they lead to nothing else:

* Operations on memory that no two actors share (one of them writing) are no choice: the step before has them with it.
  The search learns which memory that is, and begins anew when it has learnt.
* A store reaches memory no earlier than it has to: when its actor waits for that, or another actor is at an operation that
  can tell the difference.
"""

from __future__ import annotations

import functools
import random
import time
from collections import deque
from collections.abc import Callable, Iterator
from typing import NamedTuple

from . import memory_model as order
from .actors import Node
from .layout import Layout
from .operations import DOORBELL, FENCE, Answer, Operation, RuleError, Store
from .recovery import recoveries

_PROGRESS_S = 1.0
_SCOUTS = 16  # schedules at random, before a search, that learn most of the memory that is shared
_SCOUT_STEPS = 300


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
    """A choice: actor *who* goes on (to value *which*), a store of its buffer arrives (that at *which*), or it is killed."""

    who: int
    verb: str  # go, store, kill
    which: int


class Done(NamedTuple):
    """An operation of a schedule. step: the choice that it is, if every operation is one; at: -1 = no place."""

    who: int
    verb: str
    at: int
    data: bytes
    step: Step | None


class Found(NamedTuple):
    """The result of a search."""

    states: int
    steps: int
    schedules: int | None  # None: without end, as the graph has a circle
    whole: bool
    fault: str
    schedule: tuple[Step, ...]


_NOTHING = Step(0, "", 0)


class Search:
    """A search from one state.

    check: returns the fault of a state where no actor can go on, "" if there is none. every: every operation is a step, for
    a schedule that has to be the same whatever memory is shared.
    """

    def __init__(
        self,
        first: list[Node],
        image: bytes,
        layout: Layout,
        model: str,
        check: Callable[[State], str],
        every: bool = False,
    ) -> None:
        self._first = first
        self._image = image
        self._layout = layout
        self._model = model
        self._check = check
        self._every = every
        self._users: list[list[int]] = [[0, 0] for _ in image]  # by byte: actors that read it, that write it
        self._shared = bytearray(len(image))
        self._private: dict[tuple[int, int, int, bool], bool] = {}
        self._has_learnt = False
        self._recoveries = functools.cache(functools.partial(recoveries, layout))
        self._told: list[Done] | None = None

    def _tell(self, who: int, verb: str, at: int = -1, data: bytes = b"", step: Step | None = None) -> None:
        if self._told is not None:
            self._told.append(Done(who, verb, at, data, step))

    # --- memory that actors share ---

    def _is_private(self, who: int, at: int, length: int, writes: bool) -> bool:
        key = (who, at, length, writes)
        known = self._private.get(key)
        if known is None:
            for byte in range(at, at + length):
                before = sum(self._users[byte])
                self._users[byte][writes] |= 1 << who
                readers, writers = self._users[byte]
                if writers and (readers | writers).bit_count() > 1 and readers + writers != before:
                    self._shared[byte] = self._has_learnt = True
                    self._private.clear()
            known = self._private[key] = not self._every and not any(self._shared[at : at + length])
        return known

    # --- one actor's moves ---

    def _arrive(self, state: State, who: int, indices: list[int]) -> State:
        """Let stores of the buffer reach memory, in this order."""
        if not indices:
            return state
        buffer = state.places[who].buffer
        for gone, index in enumerate(indices):
            at, data, _ = buffer[index].store
            self._is_private(who, at, len(data), True)
            self._tell(who, "arrives", at, data, Step(who, "store", index - gone))
            state = self._write(state, who, at, data)
        node, done, _, past = state.places[who]
        gone_stores = [buffer[index].store for index in indices]
        past = tuple(old for old in past if not any(order.meet(old, at, len(data)) for at, data, _ in gone_stores))
        return _put(state, who, Place(node, done, order.without(buffer, indices), past))

    def _drain(self, state: State, who: int) -> State:
        return self._arrive(state, who, list(range(len(state.places[who].buffer))))

    def _write(self, state: State, who: int, at: int, data: bytes) -> State:
        image, places = state
        old = image[at : at + len(data)]
        if old == data:
            return state
        image = image[:at] + data + image[at + len(data) :]
        if self._model == "weak":
            readers = -1 if self._every else 0
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
            node, done, buffer, past = state.places[who]
            if done < len(node.effects):
                effect = node.effects[done]
                if effect is not FENCE:
                    self._tell(who, "stores", effect.at, effect.data)
                    state = _put(state, who, Place(node, done + 1, (*buffer, order.Held(effect, False)), past))
                    continue
                if not buffer:
                    state = _put(state, who, Place(node, done + 1, (), ()))
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
            found = order.values(state.image, place.buffer, place.past, at, length)
            for which, (value, before) in enumerate(found):
                self._tell(who, "loads", at, value, Step(who, "go", which))
                yield self._go(state, who, value, order.past_after(place.past, before, at, length, bool(argument)))
        elif kind == "poll":
            yield from self._poll(state, who, argument)
        elif kind == "choose":
            for which, verb in enumerate(("is left alone", "is called away")):
                self._tell(who, verb, step=Step(who, "go", which))
                yield self._go(state, who, which, place.past)
        else:
            yield from self._change(self._drain(state, who), who, operation)

    def _poll(self, state: State, who: int, argument: tuple[tuple[int, ...], bool, bool]) -> Iterator[State]:
        """Return the states after a sleep. argument: of `Operation`."""
        events, others, called_away = argument
        woken = tuple(event for event in events if state.image[event])
        which = 0
        if woken or others:
            self._tell(who, "is woken by" if woken else "is woken", woken[0] if woken else -1, step=Step(who, "go", 0))
            yield self._go(state, who, woken, ())
            which = 1
        if called_away:
            self._tell(who, "is called away", step=Step(who, "go", which))
            yield self._go(state, who, (*woken, DOORBELL), ())

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
        verb = {"or": "ors", "exchange": "swaps", "signal": "signals", "take": "takes"}[kind]
        self._tell(who, verb, at, after, Step(who, "go", 0))
        answer: Answer = before[0] if kind == "take" else before
        yield self._go(self._write(state, who, at, after), who, answer, ())

    def _recover(self, state: State, who: int, queue: int) -> Iterator[State]:
        place = state.places[who]
        try:
            broken_off, image, base = self._recoveries(state.image, queue)
        except RuleError as e:
            self._tell(who, f"can't recover queue {queue}", step=Step(who, "go", 0))
            yield _put(state, who, Place(place.node.with_fault(str(e)), 0, (), ()))
            return
        self._tell(who, f"recovers queue {queue}: index {base}", step=Step(who, "go", 0))
        yield self._go(State(image, state.places), who, base, ())
        successor = place.node.successor()
        for k, image in enumerate(broken_off if successor is not None else ()):
            self._tell(who, f"is killed at store {k} of the recovery of queue {queue}", step=Step(who, "go", k + 1))
            yield _put(State(image, state.places), who, Place(successor or place.node, 0, (), ()))

    def _go(self, state: State, who: int, answer: Answer, past: order.Past) -> State:
        place = state.places[who]
        return _put(state, who, Place(place.node.after(answer), 0, place.buffer, past))

    def _kills(self, state: State, who: int) -> Iterator[State]:
        """Kill the actor after each of the stores that are in its buffer: those before have been executed, and arrive."""
        place = state.places[who]
        successor = place.node.successor()
        if successor is None:
            return
        executed = max((k + 1 for k, held in enumerate(place.buffer) if held.bound), default=0)
        for n in range(executed, len(place.buffer) + 1):
            after = self._arrive(state, who, list(range(n)))
            self._tell(who, "is killed", step=Step(who, "kill", 0))
            yield _put(after, who, Place(successor, 0, (), ()))

    def _stores(self, state: State, who: int) -> Iterator[int]:
        """Return the indices of the stores in the buffer whose arrival another actor can tell at its next operation."""
        buffer = state.places[who].buffer
        for k, (store, _) in enumerate(buffer):
            if self._every or any(_sees(place, store) for o, place in enumerate(state.places) if o != who):
                yield k

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

    def run(self, most_states: int, progress: Callable[[int], None]) -> Found:
        """Look at all states, *most_states* at most. progress: called about every second with their number so far."""
        for scout in range(_SCOUTS):
            self._scout(random.Random(scout))
        while True:
            self._has_learnt = False
            found = self._run(most_states, progress)
            if found is not None:
                return found

    def _scout(self, choices: random.Random) -> None:
        state = self.start()
        for _ in range(_SCOUT_STEPS):
            following = [after for _, after in self._steps(state)]
            if not following:
                return
            state = choices.choice(following)

    def _run(self, most_states: int, progress: Callable[[int], None]) -> Found | None:
        """Return the result; None if the search has learnt that actors share more memory."""
        first = self.start()
        numbers = {first: 0}
        came: list[tuple[int, Step]] = [(-1, _NOTHING)]  # by state: the state before it, and the step from there
        edges: list[list[int]] = []
        ends: list[int] = []
        steps = 0
        due = time.monotonic() + _PROGRESS_S
        queue = deque([first])
        while queue:
            state = queue.popleft()
            number = len(edges)  # states are looked at in the order in which they were reached
            if time.monotonic() > due:
                progress(len(came))
                due = time.monotonic() + _PROGRESS_S
            fault = _fault(state)
            after: list[int] = []
            moves = False
            for step, following in self._steps(state) if not fault else ():
                moves |= step.verb != "kill"
                known = numbers.setdefault(following, len(came))
                if known == len(came):
                    came.append((number, step))
                    queue.append(following)
                after.append(known)
            if self._has_learnt:
                return None
            edges.append(after)
            steps += len(after)
            if not moves:
                ends.append(number)
                fault = fault or self._check(state)
            if fault or len(came) > most_states:
                return Found(len(came), steps, None, False, fault, _way(number, came) if fault else ())
        return Found(len(came), steps, _schedules(edges, ends), True, "", ())

    def follow(self, schedule: tuple[Step, ...]) -> tuple[list[Done], str]:
        """Do the steps of a schedule; return the operations, and the fault. ValueError for a step that can't be done."""
        done: list[Done] = []
        told: list[Done] = []
        self._told = told
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
                    raise ValueError(f"step {number + 1}, {step.verb} {step.which} of actor {step.who}, can't be done")
            done += told
        finally:
            self._told = None
        ended = all(step.verb == "kill" for step, _ in self._steps(state))
        return done, _fault(state) or (self._check(state) if ended else "")


def _sees(place: Place, store: Store) -> bool:
    """Return whether the next operation of an actor, or a store in its buffer, touches the place of *store*."""
    operation = place.node.operation if place.done == len(place.node.effects) else None
    if operation and (operation.kind == "recover" or order.meet(store, operation.at, operation.length)):
        return True
    return any(order.meet(store, held.at, len(held.data)) for held, _ in place.buffer)


def _put(state: State, who: int, place: Place) -> State:
    places = state.places
    return State(state.image, (*places[:who], place, *places[who + 1 :]))


def _fault(state: State) -> str:
    return next((place.node.fault for place in state.places if place.node.fault), "")


def _way(number: int, came: list[tuple[int, Step]]) -> tuple[Step, ...]:
    """Return the steps that lead to a state."""
    steps: list[Step] = []
    while number:
        number, step = came[number]
        steps.append(step)
    return tuple(reversed(steps))


def _schedules(edges: list[list[int]], ends: list[int]) -> int | None:
    """Return the number of ways from the first state to an end; None if a circle makes it endless."""
    into = [0] * len(edges)
    for after in edges:
        for number in after:
            into[number] += 1
    ways = [0] * len(edges)
    ways[0] = 1
    ready = [] if into[0] else [0]
    done = 0
    while ready:
        number = ready.pop()
        done += 1
        for following in edges[number]:
            ways[following] += ways[number]
            into[following] -= 1
            if not into[following]:
                ready.append(following)
    return sum(ways[number] for number in ends) if done == len(edges) else None
