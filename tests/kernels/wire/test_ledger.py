"""The ledger against a model that remembers every number, and its frames against any change of a byte."""

from __future__ import annotations

import struct
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.kernels.rig import scaled
from vnetdp_kernels import rows as r
from vnetdp_kernels.platform.atomic import Bytes
from vnetdp_kernels.wire import ledger

WINDOW = r.LEDGER_WINDOW
NOTED = r.LEDGER_NOTED
SIZES = st.sampled_from((30, 31, 37, 38, 39, 46, 60, 61, 64, 1514, 9000, 65550)) | st.integers(30, 300)
SEQS = st.integers(0, 70_000) | st.sampled_from((1 << 31, 1 << 32, 1 << 61, (1 << 62) - 1))


class Ledger:
    """A ledger of two flows, and frames for it."""

    def __init__(self, flows: int = 2) -> None:
        self.rows = np.zeros((flows, r.LEDGER_SLOTS), np.int64)
        self.windows = np.zeros((flows, WINDOW), np.uint8)
        self.frame: Bytes = np.zeros(65600, np.uint8)

    def enter(self, seq: int, flow: int = 0, size: int = 30) -> None:
        ledger.stamp(self.frame, 0, size, flow, seq)
        ledger.enter(self.frame, 0, size, self.rows, self.windows)

    def row(self, flow: int = 0) -> tuple[int, ...]:
        """Return (delivered, missing, duplicated, reordered, corrupted, foreign)."""
        return tuple(self.rows[flow, r.LEDGER_DELIVERED : r.LEDGER_FOREIGN + 1].tolist())

    def noted(self, notes: int, flow: int = 0) -> list[int]:
        """Return the numbers noted at slot *notes* of the row."""
        row: list[int] = self.rows[flow].tolist()
        return row[notes + 1 : notes + 1 + row[notes]]


@settings(max_examples=scaled(200, 60), deadline=None)
@given(size=SIZES, seq=SEQS, flow=st.integers(0, 3), at=st.integers(0, 9))
def test_a_frame_is_as_described(size: int, seq: int, flow: int, at: int) -> None:
    """Ethernet, the mark, flow, length and number; not a byte outside; and it is found whole."""
    mem = np.full(at + size + 9, 0xEE, np.uint8)
    ledger.stamp(mem, at, size, flow, seq)
    frame = mem[at : at + size].tobytes()
    assert frame[:14] == bytes.fromhex("020000000002 020000000001 88b5")
    assert struct.unpack_from("<IHHQ", frame, 14) == (r.LEDGER_MARK, flow, size & 0xFFFF, seq)
    assert (mem[:at] == 0xEE).all()
    assert (mem[at + size :] == 0xEE).all()
    assert ledger.flow_of(mem, at, size) == flow
    found = Ledger(4)
    ledger.enter(mem, at, size, found.rows, found.windows)
    assert found.row(flow) == (1, seq, 0, 0, 0, 0)


@settings(max_examples=scaled(300, 100), deadline=None)
@given(size=st.integers(30, 200), seq=st.integers(0, (1 << 62) - 1), byte=st.data())
def test_a_changed_byte_is_found(size: int, seq: int, byte: st.DataObject) -> None:
    """Any changed byte makes a frame corrupt, foreign or (its number, its flow) not what it was."""
    known = Ledger()
    known.enter(seq, 1, size)
    good = known.row(1)
    position = byte.draw(st.integers(0, size - 1))
    known = Ledger()
    ledger.stamp(known.frame, 0, size, 1, seq)
    known.frame[position] ^= byte.draw(st.integers(1, 255))
    ledger.enter(known.frame, 0, size, known.rows, known.windows)
    assert known.row(1) != good
    if size >= 46:
        assert known.rows[:, r.LEDGER_DELIVERED].sum() == 0
        assert known.rows[:, [r.LEDGER_CORRUPTED, r.LEDGER_FOREIGN]].sum() == 1


@settings(max_examples=scaled(300, 100), deadline=None)
@given(sizes=st.tuples(SIZES, SIZES).filter(lambda sizes: sizes[0] != sizes[1]), seq=SEQS)
def test_a_frame_of_another_length_is_corrupt(sizes: tuple[int, int], seq: int) -> None:
    """Cut off at any place, or with something behind it."""
    known = Ledger()
    ledger.stamp(known.frame, 0, sizes[0], 0, seq)
    ledger.enter(known.frame, 0, sizes[1], known.rows, known.windows)
    assert known.row() == (0, 0, 0, 0, 1, 0)


def test_addresses_may_be_exchanged_and_no_more() -> None:
    known = Ledger()
    ledger.stamp(known.frame, 0, 64, 0, 0)
    ours, theirs = known.frame[:6].copy(), known.frame[6:12].copy()
    for n, (to, source) in enumerate(((theirs, ours), (ours, ours), (theirs, theirs))):
        known.frame[:6], known.frame[6:12] = to, source
        ledger.enter(known.frame, 0, 64, known.rows, known.windows)
        assert known.row() == (1, 0, 0, 0, n, 0)


@pytest.mark.parametrize("size", range(30))
def test_short_frames_are_foreign(size: int) -> None:
    known = Ledger()
    ledger.stamp(known.frame, 0, 60, 0, 0)
    ledger.enter(known.frame, 0, size, known.rows, known.windows)
    assert known.row() == (0, 0, 0, 0, 0, 1)


@pytest.mark.parametrize("flow", [2, 3, 0x7FFF, 0x8000, 0xFFFF])
def test_unknown_flows_are_foreign(flow: int) -> None:
    known = Ledger()
    known.enter(0, flow)
    assert known.row(0) == (0, 0, 0, 0, 0, 1)
    assert known.row(1) == (0, 0, 0, 0, 0, 0)


def test_a_ledger_of_no_flows_takes_anything() -> None:
    known = Ledger(0)
    known.enter(5)


def test_other_traffic_is_foreign() -> None:
    known = Ledger()
    known.frame[:60] = 0xFF
    ledger.enter(known.frame, 0, 60, known.rows, known.windows)
    known.frame[:60] = 0
    known.frame[12:14] = (0x88, 0xB5)
    ledger.enter(known.frame, 0, 60, known.rows, known.windows)
    assert known.row() == (0, 0, 0, 0, 0, 2)


def test_frames_exchanged_between_flows_are_counted_apart() -> None:
    known = Ledger()
    for seq in range(100):
        known.enter(seq, seq % 2)
    assert known.row(0) == (50, 49, 0, 0, 0, 0)
    assert known.row(1) == (50, 50, 0, 0, 0, 0)


@settings(max_examples=scaled(300, 100), deadline=None)
@given(
    steps=st.lists(
        st.integers(-6, 6) | st.sampled_from((WINDOW - 1, WINDOW, WINDOW + 1, -WINDOW, 1 - WINDOW, -1 - WINDOW)),
        max_size=40,
    )
)
def test_any_order(steps: list[int]) -> None:
    """Numbers in any order, against a set of those seen: within the window, late is told from repeated."""
    known = Ledger()
    seen: set[int] = set()
    doubled: list[int] = []
    late: list[int] = []
    missed: set[int] = set()
    delivered = duplicated = reordered = 0
    following = number = 0
    for step in steps:
        number = max(0, number + step)
        known.enter(number)
        if number >= following:
            room = NOTED - len(missed)
            missed.update(range(following, min(number, following + room)))
            following = number + 1
            delivered += 1
        elif number in seen or following - number > WINDOW:
            duplicated += 1
            doubled.append(number)
        else:
            late.append(number)
            missed.discard(number)
            delivered += 1
            reordered += 1
        seen.add(number)
        missing = following - delivered
        assert known.row() == (delivered, missing, duplicated, reordered, 0, 0)
        assert known.rows[0, r.LEDGER_NEXT] == following
        assert set(known.noted(r.LEDGER_NOTE_MISSING)) == missed
        assert known.noted(r.LEDGER_NOTE_DUPLICATED) == doubled
        assert known.noted(r.LEDGER_NOTE_REORDERED) == late


def test_loss_over_several_windows() -> None:
    """What lies in the window from before a large gap is not taken for seen."""
    known = Ledger()
    for seq in range(10):
        known.enter(seq)
    known.enter(5 * WINDOW)
    assert known.row() == (11, 5 * WINDOW - 10, 0, 0, 0, 0)
    for seq in range(5 * WINDOW - 1, 5 * WINDOW - 11, -1):
        known.enter(seq)
    assert known.row() == (21, 5 * WINDOW - 20, 0, 10, 0, 0)
    known.enter(5 * WINDOW)
    known.enter(4 * WINDOW)
    assert known.row() == (21, 5 * WINDOW - 20, 2, 10, 0, 0)


def test_patterns_of_neighbours_differ() -> None:
    """The same bytes under another number or flow are corrupt: a buffer delivered from the frame before is found."""
    frames = []
    for flow, seq in [(0, 0), (0, 1), (1, 1), (1, 0), (0, 1 << 31)]:
        frame = np.zeros(64, np.uint8)
        ledger.stamp(frame, 0, 64, flow, seq)
        frames.append(frame)
    for one, other in pairwise(frames):
        mixed = np.concatenate([one[:30], other[30:]])
        known = Ledger()
        ledger.enter(mixed, 0, 64, known.rows, known.windows)
        assert known.rows[:, r.LEDGER_CORRUPTED].sum() == 1


def test_the_first_hundred_numbers_of_each_kind_are_noted_and_no_other_slot_is_written() -> None:
    known = Ledger()
    for seq in range(0, 4 * NOTED, 2):
        known.enter(seq)
        known.enter(seq)
    assert known.noted(r.LEDGER_NOTE_MISSING) == [*range(1, 2 * NOTED, 2)]
    assert known.noted(r.LEDGER_NOTE_DUPLICATED) == [*range(0, 2 * NOTED, 2)]
    for seq in range(1, 4 * NOTED, 2):
        known.enter(seq)
    assert known.noted(r.LEDGER_NOTE_MISSING) == []
    assert known.noted(r.LEDGER_NOTE_REORDERED) == [*range(1, 2 * NOTED, 2)]
    known.enter(8 * NOTED)
    assert known.noted(r.LEDGER_NOTE_MISSING) == [*range(4 * NOTED, 5 * NOTED)]
    assert not known.rows[0, r.LEDGER_NOTE_CORRUPTED :].any()
    assert not known.rows[1].any()


def test_a_corrupted_frame_is_noted_by_the_number_that_was_due() -> None:
    known = Ledger()
    known.enter(0)
    known.enter(1)
    ledger.stamp(known.frame, 0, 64, 0, 2)
    known.frame[50] ^= 1
    ledger.enter(known.frame, 0, 64, known.rows, known.windows)
    assert known.noted(r.LEDGER_NOTE_CORRUPTED) == [2]


@pytest.mark.parametrize("count", [NOTED + 1, 1 << 40])
def test_a_count_of_notes_that_cannot_be_writes_nowhere_else(count: int) -> None:
    """The ledger of a guest that migrates comes from outside."""
    known = Ledger()
    for notes in (r.LEDGER_NOTE_MISSING, r.LEDGER_NOTE_DUPLICATED, r.LEDGER_NOTE_REORDERED, r.LEDGER_NOTE_CORRUPTED):
        known.rows[0, notes] = count
    for seq in (0, 2, 2, 1):
        known.enter(seq)
    assert known.row() == (3, 0, 1, 1, 0, 0)
    assert not known.rows[0, r.LEDGER_NOTE_CORRUPTED + 1 :].any()
    assert not known.rows[1].any()


class KilledError(Exception):
    """The process that enters a frame is killed."""


class Stores:
    """An array whose writer is killed once *left*, a count that several arrays share, is used up."""

    def __init__(self, array: np.ndarray[Any, Any], left: list[int]) -> None:
        self._array, self._left = array, left

    def __getitem__(self, k: int) -> Any:
        return self._array[k]

    def __setitem__(self, k: int, value: int) -> None:
        if not self._left[0]:
            raise KilledError
        self._left[0] -= 1
        self._array[k] = value


@pytest.mark.parametrize("stores", [0, 1, 2])
def test_a_frame_is_late_for_nobody_though_a_process_was_killed_as_it_entered_it(stores: int) -> None:
    found, left = Ledger(), [stores]
    ledger.stamp(found.frame, 0, 30, 0, 0)
    enter: Any = getattr(ledger.check, "py_func", ledger.check)
    with pytest.raises(KilledError):
        enter(found.frame, 0, 30, Stores(found.rows[0], left), Stores(found.windows[0], left))
    found.enter(0)
    delivered, missing, duplicated, *others = found.row()
    assert (delivered + duplicated, missing, others) == (1, 0, [0, 0, 0])
