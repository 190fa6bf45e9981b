"""The two orders of stores allow what the processors' manuals allow, and nothing else: the usual litmus tests."""

from __future__ import annotations

import random

import pytest

from tests.support.by_hand import CAMPAIGN
from vnetdp.testing.explore.actors import Actor
from vnetdp.testing.explore.layout import Layout
from vnetdp.testing.explore.operations import Operation, Running
from vnetdp.testing.explore.search import Search, State

PLACES = {"x": 8, "y": 16}


class Program(Actor):
    """Operations by name: `x=1` stores, `x:=1` stores with release, `x` loads, `+x` loads with acquire, `|` is a fence,
    `x|=1` is an atomic OR. The loads' values are kept."""

    def __init__(self, name: str, text: str) -> None:
        super().__init__()
        self.name = name
        self._text = text.split()

    def turn(self) -> bool:
        seen = []
        for word in self._text:
            name = word.strip("+:|=1")
            at = PLACES.get(name, 0)
            if word == "|":
                Running.record.fence()
            elif word.endswith("|=1"):
                Running.record.ask(Operation("or", at, 1, 1))
            elif word.endswith("=1"):
                Running.record.store(at, b"\1", ":" in word)
            else:
                seen.append(Running.record.ask(Operation("load", at, 1, int(word[0] == "+")))[0])
            self.kept = tuple(seen)
        return False


def outcomes(model: str, *programs: str, every: bool = False) -> set[tuple[int, ...]]:
    """Return the values that the programs' loads can have together. every: of `Search`."""
    found: set[tuple[int, ...]] = set()

    def check(state: State) -> str:
        found.add(sum((place.node.kept for place in state.places), ()))
        return ""

    actors = [Program(f"p{k}", text) for k, text in enumerate(programs)]
    layout = Layout(2, False, False)
    search = Search([actor.first() for actor in actors], bytes(layout.length), layout, model, check, every)
    assert search.run(100_000, lambda _: None).whole
    return found


@pytest.mark.parametrize("model", ["tso", "weak"])
def test_a_load_overtakes_the_store_before_it_unless_a_fence_or_an_atomic_operation_is_between(model: str) -> None:
    assert outcomes(model, "x=1 y", "y=1 x") == {(0, 0), (0, 1), (1, 0), (1, 1)}
    assert outcomes(model, "x=1 | y", "y=1 x") == {(0, 0), (0, 1), (1, 0), (1, 1)}
    assert outcomes(model, "x=1 | y", "y=1 | x") == {(0, 1), (1, 0), (1, 1)}
    assert outcomes(model, "x|=1 y", "y|=1 x") == {(0, 1), (1, 0), (1, 1)}


def test_tso_keeps_stores_among_each_other_and_loads_among_each_other() -> None:
    assert outcomes("tso", "x=1 y=1", "y x") == {(0, 0), (0, 1), (1, 1)}


def test_the_weak_order_keeps_a_message_behind_its_flag_by_release_and_acquire_together() -> None:
    assert (1, 0) in outcomes("weak", "x=1 y=1", "+y x")
    assert (1, 0) in outcomes("weak", "x=1 y:=1", "y x")
    assert (1, 0) not in outcomes("weak", "x=1 y:=1", "+y x")
    assert (1, 0) not in outcomes("weak", "x=1 | y=1", "y | x")


def test_a_release_store_waits_for_earlier_stores_and_later_ones_do_not_wait_for_it() -> None:
    assert (1, 0) in outcomes("weak", "x:=1 y=1", "+y x")


@pytest.mark.parametrize("model", ["tso", "weak"])
def test_no_load_sees_an_older_value_than_the_one_before_it_from_the_same_place(model: str) -> None:
    assert outcomes(model, "x=1", "x x") == {(0, 0), (0, 1), (1, 1)}
    assert outcomes(model, "x=1 x", "") == {(1,)}


def test_no_load_sees_an_older_value_than_its_own_programs_store() -> None:
    assert outcomes("weak", "y=1 +y", "y=1") == {(1,)}


@pytest.mark.parametrize("model", ["tso", "weak"])
def test_a_load_does_not_see_a_store_that_comes_later_in_its_own_program(model: str) -> None:
    assert (1, 1) not in outcomes(model, "x y=1", "y x=1")


@pytest.mark.parametrize("model", ["tso", "weak"])
def test_the_schedules_that_are_left_out_have_no_outcome_of_their_own(model: str) -> None:
    choices = random.Random(model)
    operations = [
        *(before + place for place in PLACES for before in ("", "+")),
        "x=1",
        "y=1",
        "x:=1",
        "y:=1",
        "|",
        "x|=1",
        "y|=1",
    ]
    for _ in range(500 if CAMPAIGN else 25):
        programs = [
            " ".join(choices.choices(operations, k=choices.randint(1, 4))) for _ in range(choices.choice((2, 2, 3)))
        ]
        assert outcomes(model, *programs) == outcomes(model, *programs, every=True), programs
