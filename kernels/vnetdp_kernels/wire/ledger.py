"""The ledger: numbered frames, and a check that finds loss, duplication, reordering and corruption at full speed.

A numbered frame is an Ethernet header, a mark, its flow, length and number, then a pattern that depends on flow and
number. Its addresses may come back exchanged; nothing else may differ. The check keeps a window of the numbers seen, so
that a late frame is told from a repeated one, and notes the numbers of the first frames that are missing, repeated,
late or corrupted. A frame that arrives in its turn is compared and counted, and no note is looked at.
"""

from __future__ import annotations

from .. import rows as r
from ..platform.atomic import (
    Bytes,
    Words,
    load_u8,
    load_u16_unaligned,
    load_u32_unaligned,
    load_u64_unaligned,
    store_u8,
    store_u16_unaligned,
    store_u32_unaligned,
    store_u64_unaligned,
)
from ..platform.jit import inlined, kernel

# 02:00:00:00:00:01 and 02:00:00:00:00:02, both locally administered: twelve bytes as u64 and u32, either way round.
_TO_TWO, _FROM_ONE = 0x0002_0200_0000_0002, 0x0100_0000
_TO_ONE, _FROM_TWO = 0x0002_0100_0000_0002, 0x0200_0000
_ETHERTYPE_BE = (r.LEDGER_ETHERTYPE & 0xFF) << 8 | r.LEDGER_ETHERTYPE >> 8
_STEP = 0x0001_0001_0001


@inlined
def stamp(mem: Bytes, at: int, length: int, flow: int, seq: int) -> None:
    """Write numbered frame *seq* of *flow*, *length* bytes (at least LEDGER_MIN_LEN), at offset *at*.

    It goes from 02:00:00:00:00:01 to 02:00:00:00:00:02.
    """
    store_u64_unaligned(mem, at, _TO_TWO)
    store_u32_unaligned(mem, at + 8, _FROM_ONE)
    store_u16_unaligned(mem, at + 12, _ETHERTYPE_BE)
    store_u32_unaligned(mem, at + r.LEDGER_MARK_AT, r.LEDGER_MARK)
    store_u16_unaligned(mem, at + r.LEDGER_FLOW_AT, flow)
    store_u16_unaligned(mem, at + r.LEDGER_LEN_AT, length)
    store_u64_unaligned(mem, at + r.LEDGER_SEQ_AT, seq)
    seed = (seq ^ flow << 32) & 0x3FFF_FFFF_FFFF_FFFF
    n_words = (length - r.LEDGER_PATTERN_AT) >> 3
    for i in range(n_words):
        store_u64_unaligned(mem, at + r.LEDGER_PATTERN_AT + 8 * i, seed ^ i * _STEP)
    for k in range(at + r.LEDGER_PATTERN_AT + 8 * n_words, at + length):
        store_u8(mem, k, seq)


@inlined
def flow_of(mem: Bytes, at: int, length: int) -> int:
    """Return the flow of a numbered frame; -1 if it does not carry our mark."""
    if length < r.LEDGER_MIN_LEN or load_u16_unaligned(mem, at + 12) != _ETHERTYPE_BE:
        return -1
    if load_u32_unaligned(mem, at + r.LEDGER_MARK_AT) != r.LEDGER_MARK:
        return -1
    return int(load_u16_unaligned(mem, at + r.LEDGER_FLOW_AT))


@kernel
def _note(row: Words, notes: int, seq: int) -> None:
    """Note number *seq* among those of one kind, at slot *notes* (LEDGER_NOTE_*), if there is room."""
    n = row[notes]
    if 0 <= n < r.LEDGER_NOTED:
        row[notes + 1 + n] = seq
        row[notes] = n + 1


@kernel
def _note_gap(row: Words, following: int, seq: int) -> None:
    """Note the numbers from *following* to below *seq* as missing, as far as there is room."""
    for missing in range(following, min(seq, following + r.LEDGER_NOTED)):
        _note(row, r.LEDGER_NOTE_MISSING, missing)


@kernel
def _note_late(row: Words, seq: int) -> None:
    """Note that *seq*, which was missing, is late; the last number noted as missing takes its place."""
    notes = r.LEDGER_NOTE_MISSING + 1
    n = min(row[r.LEDGER_NOTE_MISSING], r.LEDGER_NOTED)
    for k in range(n):
        if row[notes + k] == seq:
            row[notes + k] = row[notes + n - 1]
            row[r.LEDGER_NOTE_MISSING] = n - 1
            break
    _note(row, r.LEDGER_NOTE_REORDERED, seq)


@kernel
def check(mem: Bytes, at: int, length: int, row: Words, window: Bytes) -> None:
    """Enter the frame of *length* bytes at *at* into a flow's ledger.

    row int64[LEDGER_SLOTS]; window uint8[LEDGER_WINDOW], 1 = seen.
    """
    seq = load_u64_unaligned(mem, at + r.LEDGER_SEQ_AT)
    flow = load_u16_unaligned(mem, at + r.LEDGER_FLOW_AT)
    seed = (seq ^ flow << 32) & 0x3FFF_FFFF_FFFF_FFFF
    n_words = (length - r.LEDGER_PATTERN_AT) >> 3
    wrong = load_u16_unaligned(mem, at + r.LEDGER_LEN_AT) ^ (length & 0xFFFF)
    to, source = load_u64_unaligned(mem, at), load_u32_unaligned(mem, at + 8)
    if not ((to == _TO_TWO and source == _FROM_ONE) or (to == _TO_ONE and source == _FROM_TWO)):
        wrong |= 1
    for i in range(n_words):
        wrong |= load_u64_unaligned(mem, at + r.LEDGER_PATTERN_AT + 8 * i) ^ (seed ^ i * _STEP)
    for k in range(at + r.LEDGER_PATTERN_AT + 8 * n_words, at + length):
        wrong |= load_u8(mem, k) ^ (seq & 0xFF)
    if wrong != 0 or not 0 <= seq < 1 << 62:
        row[r.LEDGER_CORRUPTED] += 1
        _note(row, r.LEDGER_NOTE_CORRUPTED, row[r.LEDGER_NEXT])
        return
    following = row[r.LEDGER_NEXT]
    if seq >= following:
        gap = seq - following
        if gap:
            row[r.LEDGER_MISSING] += gap
            for k in range(min(gap, r.LEDGER_WINDOW)):
                window[(seq - 1 - k) % r.LEDGER_WINDOW] = 0
            _note_gap(row, following, seq)
        # In this order: if the process is killed in between, its successor may enter the frame once more, and not as late.
        window[seq % r.LEDGER_WINDOW] = 1
        row[r.LEDGER_NEXT] = seq + 1
        row[r.LEDGER_DELIVERED] += 1
    elif following - seq > r.LEDGER_WINDOW or window[seq % r.LEDGER_WINDOW]:
        row[r.LEDGER_DUPLICATED] += 1
        _note(row, r.LEDGER_NOTE_DUPLICATED, seq)
    else:
        window[seq % r.LEDGER_WINDOW] = 1
        row[r.LEDGER_MISSING] -= 1
        row[r.LEDGER_REORDERED] += 1
        row[r.LEDGER_DELIVERED] += 1
        _note_late(row, seq)


@inlined
def enter(mem: Bytes, at: int, length: int, ledger: Words, windows: Bytes) -> None:
    """`check` the frame in the ledger of its flow; a frame without our mark or of no known flow counts as foreign.

    ledger int64[n_flows, LEDGER_SLOTS]; windows uint8[n_flows, LEDGER_WINDOW].
    """
    flow = flow_of(mem, at, length)
    if 0 <= flow < ledger.shape[0]:
        check(mem, at, length, ledger[flow], windows[flow])
    elif ledger.shape[0] > 0:
        ledger[0, r.LEDGER_FOREIGN] += 1
