"""Loops by one array: `run_side` runs one side of rings, and `settle` both sides of many, until no frame moves.

A side's row has the addresses of all arrays that its loop works on (`rows.SIDE_*`).
"""

from __future__ import annotations

from typing import Any

from .. import rows as r
from ..platform.atomic import Words, compiled_as
from ..platform.jit import inlined, kernel
from ..platform.native import bytes_of, call_at, row_at, tables_of, words_of
from ..rows import Control, DriverRings, Guest, Limits, LoopScratch, Rings, Scratch, Wire
from .drive import drive
from .serve import serve

_Ran = tuple[int, int]


def _drive_at(at: int, rings: DriverRings, wire: Wire, control: Control, scratch: LoopScratch, limits: Limits) -> _Ran:
    """Call `drive`, whose address *at* is."""
    return drive(rings, wire, control, scratch, limits)


@compiled_as(_drive_at)
def _drive_overload(at: Any, rings: Any, wire: Any, control: Any, scratch: Any, limits: Any) -> Any:
    return lambda at, rings, wire, control, scratch, limits: call_at(at, rings, wire, control, scratch, limits)


def _serve_at(at: int, rings: Rings, wire: Wire, control: Control, scratch: LoopScratch, limits: Limits) -> _Ran:
    """Call `serve`, whose address *at* is."""
    return serve(rings, wire, control, scratch, limits)


@compiled_as(_serve_at)
def _serve_overload(at: Any, rings: Any, wire: Any, control: Any, scratch: Any, limits: Any) -> Any:
    return lambda at, rings, wire, control, scratch, limits: call_at(at, rings, wire, control, scratch, limits)


@inlined
def _wire(side: Words) -> Wire:
    return Wire(
        words_of(side, r.SIDE_EPS),
        words_of(side, r.SIDE_FDS)[0],
        bytes_of(side, r.SIDE_PENDING),
        bytes_of(side, r.SIDE_IN_FRAMES),
        words_of(side, r.SIDE_IN_LENGTHS),
        bytes_of(side, r.SIDE_OUT_FRAMES),
        words_of(side, r.SIDE_OUT_LENGTHS),
        words_of(side, r.SIDE_LEDGER),
        bytes_of(side, r.SIDE_WINDOWS),
    )


@inlined
def _scratch(side: Words) -> LoopScratch:
    frames = Scratch(
        words_of(side, r.SIDE_IOV),
        words_of(side, r.SIDE_FRAME_IOV),
        words_of(side, r.SIDE_CHAINS),
        bytes_of(side, r.SIDE_HDR)[0],
        words_of(side, r.SIDE_WORDS)[0],
    )
    return LoopScratch(frames, words_of(side, r.SIDE_POLLFDS), words_of(side, r.SIDE_ONE)[0])


@kernel
def run_side(side: Words, budget: int, poll_us: int, timeout_ms: int) -> tuple[int, int]:
    """Run the loop of a side of rings, `drive` or `serve`, with these `Limits`; return (LOOP_*, frames moved)."""
    wire, scratch, limits = _wire(side), _scratch(side), Limits(budget, poll_us, timeout_ms)
    control = Control(words_of(side, r.SIDE_CTL)[0], side[r.SIDE_CONTROL_FD])
    mem, notify, queues = bytes_of(side, r.SIDE_MEM)[0], words_of(side, r.SIDE_NOTIFY), words_of(side, r.SIDE_QUEUES)
    if side[r.SIDE_IS_DRIVER]:
        driver = DriverRings(mem, queues, tables_of(side, r.SIDE_STATES), notify)
        return _drive_at(side[r.SIDE_LOOP], driver, wire, control, scratch, limits)
    guest = Guest(mem, words_of(side, r.SIDE_REGIONS), bytes_of(side, r.SIDE_LOG)[0])
    return _serve_at(side[r.SIDE_LOOP], Rings(guest, queues, notify), wire, control, scratch, limits)


@kernel
def settle(sides: Words, most: int) -> tuple[int, int]:
    """Run both sides of rings until no frame moves; return (frames moved, findings: SETTLE_*).

    sides int64[2 * k]: the addresses of the rows of a driver and of its device, of the next driver and so on. most: frames
    that each pair of sides may move; the rest is left.
    """
    moved = 0
    found = 0
    for k in range(0, sides.size, 2):
        driver = row_at(sides[k], r.SIDE_SLOTS)
        device = row_at(sides[k + 1], r.SIDE_SLOTS)
        left = most
        n = 1
        while n and left > 0:
            drove, sent = run_side(driver, left, 0, 0)
            served, taken = run_side(device, left, 0, 0)
            if drove == r.LOOP_BROKEN or served == r.LOOP_BROKEN:
                found |= r.SETTLE_BROKEN
            n = sent + taken
            left -= n
            moved += n
        if n:
            found |= r.SETTLE_MORE
    return moved, found
