"""Faulty wires in compiled code: an endpoint behind them is served through a line each way (`line`).

`hold` puts a frame that leaves the rings on the line of the outermost wire, `send_on` hands on the frames that are due, and
`bring` takes one for the rings.
"""

from __future__ import annotations

from .. import rows as r
from .. import spec
from ..platform.atomic import (
    Bytes,
    Words,
    address,
    copy,
    store_u16_unaligned,
    store_u32_unaligned,
    store_u64_unaligned,
)
from ..platform.io import EIO, time_ns, writev
from ..platform.jit import inlined, kernel
from ..rows import Frame, Line, Sink, Source
from .answer import answer, answers
from .frame import linearize, makes_sense
from .kinds import ended, from_slots, from_tap, generate, sent_to_tap, slot_for
from .ledger import enter
from .line import LOST, WAIT, admit, drop_oldest, is_due, may_go, move, oldest, put_off, room

_MOST = 256  # frames that are moved for one that is due, lest a wire that loses all keeps a loop: more than Python has slots
TO_WIRE = 0  # the ways: which of a wire's two lines
FROM_WIRE = 1


@inlined
def _line(ep: Words, table: Words, data: Bytes, stage: int, way: int) -> Line:
    """Return one line of the wire *stage*, 0 for the outermost; *table* and *data* are the endpoint's lengths and frames."""
    k = 2 * stage + way
    at = _at(stage, way)
    return Line(
        ep[at : at + r.LINE_SLOTS],
        table[k * r.LINE_TABLE : (k + 1) * r.LINE_TABLE],
        data[k * r.LINE_BYTES : (k + 1) * r.LINE_BYTES],
    )


@inlined
def _at(stage: int, way: int) -> int:
    """Return the slot where a line of the wire *stage* begins. A kernel returns no array, so callers take the slice."""
    return stage * r.STAGE_SLOTS + r.EP_SLOTS + way * r.LINE_SLOTS


@inlined
def _behind(ep: Words) -> int:
    """Return the slot where the row of the endpoint behind all faulty wires begins."""
    return int(ep[r.EP_LINES] * r.STAGE_SLOTS)


@inlined
def _count(row: Words, slot: int, bytes_slot: int, length: int) -> None:
    row[slot] += 1
    row[bytes_slot] += length - spec.NET_HDR_LEN


@kernel
def _held(ep: Words, way: int) -> int:
    """Return the frames that the lines of one way hold."""
    held = 0
    for stage in range(ep[r.EP_LINES]):
        words = ep[_at(stage, way) :]
        held += words[r.LINE_HELD] + (words[r.LINE_ASIDE_LEN] > 0) * words[r.LINE_ASIDE_COPIES]
    return held


@kernel
def takes(ep: Words, way: int) -> bool:
    """Return whether frames can enter the lines of one way: from the rings, or from the endpoint behind."""
    stage = 0 if way == TO_WIRE else ep[r.EP_LINES] - 1
    return bool(room(ep[_at(stage, way) :]) >= 0)


@inlined
def _sooner(soonest: int, at: int, now: int) -> int:
    left = max(at - now, 0)
    return left if soonest < 0 else min(soonest, left)


@inlined
def _due_of(ep: Words, way: int, now: int) -> int:
    soonest = -1
    for stage in range(ep[r.EP_LINES]):
        words = ep[_at(stage, way) :]
        if words[r.LINE_HELD]:
            soonest = _sooner(soonest, max(words[r.LINE_DUE_NS], words[r.LINE_RETRY_NS]), now)
        if words[r.LINE_ASIDE_LEN]:
            soonest = _sooner(soonest, words[r.LINE_ASIDE_NS], now)
    return soonest


@kernel
def out_due_ns(ep: Words, now: int) -> int:
    """Return the ns until a frame that is held back may go to the wire; -1 if there is none. now: in ns."""
    return int(_due_of(ep, TO_WIRE, now))


@kernel
def in_due_ns(ep: Words, now: int) -> int:
    """Return the ns until a frame may come from the wire, if no descriptor tells of it; -1 if no clock will bring one."""
    soonest = _due_of(ep, FROM_WIRE, now)
    row = ep[_behind(ep) :]
    if row[r.EP_KIND] == r.KIND_GENERATE and not ended(row) and takes(ep, FROM_WIRE):
        soonest = _sooner(soonest, row[r.EP_NEXT_NS] if row[r.EP_INTERVAL_NS] else 0, now)
    return int(soonest)


# --- from the rings to the endpoint ---


@kernel
def hold(frame: Frame, hdr: Bytes, sink: Sink) -> int:
    """Put a frame that leaves the rings, and its virtio_net_hdr, on the line to the wire. Returns 0, or E_BLOCKED."""
    line = _line(sink.ep, sink.out_lengths, sink.out_frames, 0, TO_WIRE)
    at = room(line.words)
    if at < 0:
        return r.E_BLOCKED
    store_u16_unaligned(hdr, spec.NET_HDR_NUM_BUFFERS, 0)
    copy(line.data, at, hdr, 0, spec.NET_HDR_LEN)
    linearize(frame, line.data, at + spec.NET_HDR_LEN)
    admit(line, at, spec.NET_HDR_LEN + frame.length)
    sink.ep[r.EP_OUT_COUNT] += 1  # that `send_on` is called, and corrects it
    return 0


@kernel
def send_on(sink: Sink, words: Words) -> int:
    """Hand on the frames that are due; return the frames that an endpoint in Python has to take. words: of `Scratch`."""
    ep, table, data = sink.ep, sink.out_lengths, sink.out_frames
    lines = ep[r.EP_LINES]
    row = ep[_behind(ep) :]
    for stage in range(lines):
        line = _line(ep, table, data, stage, TO_WIRE)
        while is_due(line):
            may = may_go(line)
            if may == WAIT:
                break
            if may == LOST:
                ep[stage * r.STAGE_SLOTS + r.EP_DROP_ERROR] += 1
                ep[stage * r.STAGE_SLOTS + r.EP_LAST_ERRNO] = EIO
            elif stage + 1 < lines:
                moved = move(line, _line(ep, table, data, stage + 1, TO_WIRE))
                if moved == 0:
                    put_off(line)
                    break
                _count(ep[(stage + 1) * r.STAGE_SLOTS :], r.EP_TO_WIRE, r.EP_BYTES_TO_WIRE, moved)
            elif _give(sink, line, words) < 0:
                # Free slots of an endpoint in Python are no matter of time, but if it takes no frames.
                if row[r.EP_KIND] != r.KIND_PYTHON or row[r.EP_BLOCKED]:
                    put_off(line)
                break
            drop_oldest(line)
    ep[r.EP_OUT_COUNT] = _held(ep, TO_WIRE) + row[r.EP_OUT_COUNT]
    if answers(row):
        ep[r.EP_COUNT] = _held(ep, FROM_WIRE)
    return int(row[r.EP_OUT_COUNT])


@inlined
def _give(sink: Sink, line: Line, words: Words) -> int:
    """Hand the oldest frame of a line to the endpoint. Returns 0 when it is done with, or E_BLOCKED. words: of `Scratch`."""
    row = sink.ep[_behind(sink.ep) :]
    kind = row[r.EP_KIND]
    at, length = oldest(line)
    if kind == r.KIND_TAP:
        words[0] = address(line.data, at)
        words[1] = length
        sent = sent_to_tap(row, writev(sink.fd, words, 1))
        if sent <= 0:
            return int(sent)
    elif kind == r.KIND_PYTHON:
        frames, lengths = _slots(sink.ep, sink.out_frames, sink.out_lengths, TO_WIRE)
        to = slot_for(row, frames, lengths, length)
        if to < 0:
            return r.E_BLOCKED if to == r.E_BLOCKED else 0
        copy(frames, to, line.data, at, length)
        row[r.EP_OUT_COUNT] += 1
    elif answers(row):
        return int(_answer(sink, line))
    elif row[r.EP_CHECK]:
        enter(line.data, at + spec.NET_HDR_LEN, length - spec.NET_HDR_LEN, sink.ledger, sink.windows)
    _count(row, r.EP_TO_WIRE, r.EP_BYTES_TO_WIRE, length)
    return 0


@inlined
def _slots(ep: Words, frames: Bytes, lengths: Words, way: int) -> tuple[Bytes, Words]:
    """Return the frame slots of an endpoint in Python, and the lengths of their frames."""
    frames = frames[ep[r.EP_LINES] * 2 * r.LINE_BYTES :]
    lengths = lengths[ep[r.EP_LINES] * 2 * r.LINE_TABLE :]
    n, half = lengths.size // 2, frames.size // 2
    return frames[way * half : (way + 1) * half], lengths[way * n : (way + 1) * n]


@kernel
def _answer(sink: Sink, line: Line) -> int:
    """Have echo, macswap or reflect turn the oldest frame of a line around. Returns 0, or E_BLOCKED."""
    row = sink.ep[_behind(sink.ep) :]
    back = _line(sink.ep, sink.out_lengths, sink.out_frames, sink.ep[r.EP_LINES] - 1, FROM_WIRE)
    where = room(back.words)
    if where < 0:
        return r.E_BLOCKED
    at, length = oldest(line)
    kind, frame_at = row[r.EP_KIND], where + spec.NET_HDR_LEN
    if kind != r.KIND_REFLECT and not makes_sense(line.data, at, length - spec.NET_HDR_LEN):
        row[r.EP_DROP_OFFLOAD] += 1
        return 0
    _count(row, r.EP_TO_WIRE, r.EP_BYTES_TO_WIRE, length)
    copy(back.data, where, line.data, at, length)
    if kind == r.KIND_REFLECT:  # its answers are whole
        store_u64_unaligned(back.data, where, 0)
        store_u32_unaligned(back.data, where + 8, 0)
    if answer(kind, back.data, frame_at, length - spec.NET_HDR_LEN):
        _count(row, r.EP_FROM_WIRE, r.EP_BYTES_FROM_WIRE, length)
        admit(back, where, length)
    return 0


# --- from the endpoint to the rings ---


@kernel
def bring(source: Source, dst: Bytes, at: int, room: int) -> int:
    """Bring one frame in through the faulty wires, header first, to *dst* at *at*; return its bytes, 0 if none is due.

    room: bytes there. No more is taken from the endpoint than the lines hold, and nothing while a frame is due.
    """
    ep, table, data = source.ep, source.in_lengths, source.in_frames
    last = ep[r.EP_LINES] - 1
    line = _line(ep, table, data, 0, FROM_WIRE)
    length = 0
    for _ in range(_MOST):
        if is_due(line):
            first, length = oldest(line)
            drop_oldest(line)
            if length <= room:
                copy(dst, at, line.data, first, length)
                break
            ep[r.EP_DROP_LONG] += 1
            length = 0
            continue
        moved = False
        for stage in range(last):
            moved |= _rise(ep, table, data, stage)
        if not moved and not _pull(source, last):
            break
    ep[r.EP_COUNT] = _held(ep, FROM_WIRE)
    return int(length)


@kernel
def _rise(ep: Words, table: Words, data: Bytes, stage: int) -> bool:
    """Move a frame that is due from the wire behind to the wire *stage*; return whether there was one, and it had room."""
    line = _line(ep, table, data, stage + 1, FROM_WIRE)
    if not is_due(line):
        return False
    moved = move(line, _line(ep, table, data, stage, FROM_WIRE))
    if moved == 0:
        return False
    drop_oldest(line)
    _count(ep[(stage + 1) * r.STAGE_SLOTS :], r.EP_FROM_WIRE, r.EP_BYTES_FROM_WIRE, moved)
    return True


@inlined
def _pull(source: Source, stage: int) -> bool:
    """Take the endpoint's next frame on the line of the innermost wire, *stage*; return whether there was one, and room."""
    line = _line(source.ep, source.in_lengths, source.in_frames, stage, FROM_WIRE)
    row = source.ep[_behind(source.ep) :]
    kind = row[r.EP_KIND]
    where = room(line.words)
    if where < 0:
        return False
    length = 0
    if kind == r.KIND_TAP:
        length = from_tap(row, source.fd, line.data, where, r.FRAME_SLOT)
    elif kind == r.KIND_GENERATE:
        now = time_ns(row[r.EP_TOLD_NS], line.words[r.LINE_CLOCK :]) if row[r.EP_INTERVAL_NS] else 0
        length = generate(row, line.data, where, r.FRAME_SLOT, now)
    elif kind == r.KIND_PYTHON:
        frames, lengths = _slots(source.ep, source.in_frames, source.in_lengths, FROM_WIRE)
        length = from_slots(row, frames, lengths, line.data, where, r.FRAME_SLOT)
    if length == 0:
        return False
    _count(row, r.EP_FROM_WIRE, r.EP_BYTES_FROM_WIRE, length)
    admit(line, where, length)
    return True
