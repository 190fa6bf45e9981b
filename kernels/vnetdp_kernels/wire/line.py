"""One way of a faulty wire, in compiled code: its line, a queue of frames, and the faults that decide about each of them.

`room` says where the next frame may be written, and `admit` decides its fate: it is lost, damaged, doubled, put aside to be
overtaken, or put on the line with the time it is due. `is_due`, `oldest` and `drop_oldest` take frames off the line;
`may_go` decides whether sending one fails.

The n-th frame of a line meets the same fate however frames are batched: each decision is a hash of the line's key, the fault
and n. Frames keep their order, but for those that are to be overtaken.
"""

from __future__ import annotations

from .. import rows as r
from .. import spec
from ..platform.atomic import Words, copy, load_u8, store_u8
from ..platform.io import time_ns
from ..platform.jit import inlined, kernel
from ..rows import Line

_AT_ONCE = 4  # frames that one frame can put on a line: itself and one that it overtook, each twice
_ROOM = _AT_ONCE * r.FRAME_SLOT
_RETRY_NS = 1_000_000  # after EAGAIN
_ASIDE_NS = 1_000_000_000  # a frame that is to be overtaken waits so long for the next one
_AHEAD_NS = 10_000_000  # a wire with a rate holds the frames of so long a time; the others wait before it
_SECOND_NS = 1_000_000_000

_U32 = 0xFFFFFFFF
_ODD = 0x9E3779B9
_JITTER, _BIT, _TRIES = 10, 11, 16  # numbers of decisions, beside CHANCE_…; that of EAGAIN grows with each try

# Whether the oldest frame may leave a line.
GO, WAIT, LOST = 0, 1, 2


@inlined
def _now_ns(words: Words) -> int:
    """Return the time in ns by the clock that the line reads."""
    return int(time_ns(words[r.LINE_TOLD_NS], words[r.LINE_CLOCK :]))


# --- the fate of a frame ---


@inlined
def _mixed(x: int) -> int:
    """Return a u32 that depends on all bits of the u32 *x*: lowbias32, its second factor less 2^32, to stay in int64."""
    x ^= x >> 16
    x = x * 0x7FEB352D & _U32
    x ^= x >> 15
    x = x * (0x846CA68B - (1 << 32)) & _U32
    return x ^ x >> 16


@inlined
def _drawn(words: Words, decision: int, number: int) -> int:
    """Return the u32 that decides about frame *number*."""
    key = words[r.LINE_KEY] + decision * _ODD & _U32
    return int(_mixed(_mixed(number & _U32) ^ number >> 32 ^ key))


@inlined
def _hits(words: Words, fault: int, number: int) -> bool:
    chance = words[r.LINE_CHANCE + fault]
    if chance == 0 or (words[r.LINE_AT] and words[r.LINE_AT] != number):
        return False
    return bool(_drawn(words, fault, number) < chance)


@inlined
def _strikes(words: Words, fault: int, number: int) -> bool:
    """Return whether a fault strikes frame *number*, and count it."""
    struck = _hits(words, fault, number)
    words[r.LINE_STRUCK + fault] += struck
    return struck


@kernel
def _lost_in_burst(words: Words, number: int) -> bool:
    """Return whether the Gilbert–Elliott model loses frame *number*, as netem's does: by the state before the frame."""
    bad = words[r.LINE_BAD]
    leave = r.CHANCE_TO_GOOD if bad else r.CHANCE_TO_BAD
    if _drawn(words, leave, number) < words[r.LINE_CHANCE + leave]:
        words[r.LINE_BAD] = 1 - bad
    lost = _hits(words, r.CHANCE_LOSS_BAD if bad else r.CHANCE_LOSS_GOOD, number)
    words[r.LINE_STRUCK + r.STRUCK_BURST] += lost
    return lost


@kernel
def _due_ns(words: Words, length: int, number: int) -> int:
    """Return when, in ns, a frame that is put on a line now is due; 0 = at once."""
    if not (words[r.LINE_DELAY_NS] or words[r.LINE_JITTER_NS] or words[r.LINE_RATE]):
        return 0
    due = _now_ns(words)
    if words[r.LINE_RATE]:
        words[r.LINE_STRUCK + r.STRUCK_RATE] += due < words[r.LINE_FREE_NS]
        bits = 8 * (length - spec.NET_HDR_LEN)
        due = max(due, words[r.LINE_FREE_NS]) + bits * _SECOND_NS // words[r.LINE_RATE]
        words[r.LINE_FREE_NS] = due
    if words[r.LINE_DELAY_NS] or words[r.LINE_JITTER_NS]:
        words[r.LINE_STRUCK + r.STRUCK_DELAY] += 1
        part = (_drawn(words, _JITTER, number) >> 16) - (1 << 15)  # of 2^15, either way
        due += max(words[r.LINE_DELAY_NS] + (words[r.LINE_JITTER_NS] * part >> 15), 0)
    return int(due)


@inlined
def _put(line: Line, length: int, number: int) -> None:
    """Put the frame at the line's tail on it."""
    words, table = line.words, line.table
    held = words[r.LINE_HELD]
    entry = (words[r.LINE_HEAD] + held & r.LINE_FRAMES - 1) * r.ENTRY_SLOTS
    table[entry + r.ENTRY_OFFSET] = words[r.LINE_TAIL]
    table[entry + r.ENTRY_LEN] = length
    table[entry + r.ENTRY_DUE_NS] = _due_ns(words, length, number)
    table[entry + r.ENTRY_NUMBER] = number
    words[r.LINE_TAIL] += length + 15 & ~15
    words[r.LINE_HELD] = held + 1
    if held == 0:
        _show_oldest(line)


@inlined
def _show_oldest(line: Line) -> None:
    entry = line.words[r.LINE_HEAD] * r.ENTRY_SLOTS
    line.words[r.LINE_FIRST] = line.table[entry + r.ENTRY_OFFSET]
    line.words[r.LINE_DUE_NS] = line.table[entry + r.ENTRY_DUE_NS]


@kernel
def _rejoin(line: Line) -> None:
    """Put the frame that was overtaken on its line."""
    words = line.words
    length = words[r.LINE_ASIDE_LEN]
    for _ in range(words[r.LINE_ASIDE_COPIES]):
        copy(line.data, words[r.LINE_TAIL], line.data, r.LINE_RING, length)
        _put(line, length, words[r.LINE_ASIDE_NUMBER])
    words[r.LINE_ASIDE_LEN] = 0


@kernel
def _damage(line: Line, at: int, length: int, number: int) -> None:
    """Flip one bit of the frame at *at*, behind its virtio_net_hdr."""
    bit = _drawn(line.words, _BIT, number) * (8 * (length - spec.NET_HDR_LEN)) >> 32
    at += spec.NET_HDR_LEN + (bit >> 3)
    store_u8(line.data, at, load_u8(line.data, at) ^ 1 << (bit & 7))


@kernel
def admit(line: Line, at: int, length: int) -> None:
    """Decide the fate of the next frame: its *length* bytes lie at *at*, where `room` said."""
    words = line.words
    number = words[r.LINE_SEEN] + 1
    words[r.LINE_SEEN] = number
    if _strikes(words, r.CHANCE_DROP, number):
        return
    bursts = words[r.LINE_BAD] | words[r.LINE_CHANCE + r.CHANCE_TO_BAD] | words[r.LINE_CHANCE + r.CHANCE_LOSS_GOOD]
    if bursts and _lost_in_burst(words, number):
        return
    if _strikes(words, r.CHANCE_CORRUPT, number):
        _damage(line, at, length, number)
    copies = 1 + int(_strikes(words, r.CHANCE_DUPLICATE, number))
    if words[r.LINE_ASIDE_LEN] == 0 and _hits(words, r.CHANCE_REORDER, number):
        copy(line.data, r.LINE_RING, line.data, at, length)
        words[r.LINE_ASIDE_LEN] = length
        words[r.LINE_ASIDE_NUMBER] = number
        words[r.LINE_ASIDE_COPIES] = copies
        words[r.LINE_ASIDE_NS] = _now_ns(words) + _ASIDE_NS
        return
    _put(line, length, number)
    if copies > 1:
        copy(line.data, words[r.LINE_TAIL], line.data, at, length)
        _put(line, length, number)
    if words[r.LINE_ASIDE_LEN]:
        words[r.LINE_STRUCK + r.CHANCE_REORDER] += 1
        _rejoin(line)


# --- a line ---


@inlined
def room(words: Words) -> int:
    """Return the byte of a line where the next frame is to be written; -1 while the line takes none."""
    held = words[r.LINE_HELD]
    if held > r.LINE_FRAMES - _AT_ONCE:
        return -1
    if words[r.LINE_RATE] and words[r.LINE_FREE_NS] > _now_ns(words) + _AHEAD_NS:
        return -1
    if held == 0:
        words[r.LINE_HEAD] = 0
        words[r.LINE_TAIL] = 0
        return 0
    tail, first = words[r.LINE_TAIL], words[r.LINE_FIRST]
    if tail <= first:
        return int(tail) if first - tail > _ROOM else -1
    if tail + _ROOM <= r.LINE_RING:
        return int(tail)
    if first <= _ROOM:
        return -1
    words[r.LINE_TAIL] = 0
    return 0


@inlined
def is_due(line: Line) -> bool:
    """Return whether the oldest frame's time has come. One that waits in vain to be overtaken joins the line first."""
    words = line.words
    if words[r.LINE_ASIDE_LEN] and words[r.LINE_ASIDE_NS] <= _now_ns(words) and room(words) >= 0:
        _rejoin(line)
    if words[r.LINE_HELD] == 0:
        return False
    return bool(words[r.LINE_DUE_NS] == 0 or words[r.LINE_DUE_NS] <= _now_ns(words))


@inlined
def oldest(line: Line) -> tuple[int, int]:
    """Return where the oldest frame lies, and its bytes."""
    return line.words[r.LINE_FIRST], line.table[line.words[r.LINE_HEAD] * r.ENTRY_SLOTS + r.ENTRY_LEN]


@inlined
def drop_oldest(line: Line) -> None:
    words = line.words
    words[r.LINE_HEAD] = words[r.LINE_HEAD] + 1 & r.LINE_FRAMES - 1
    words[r.LINE_HELD] -= 1
    words[r.LINE_RETRY_NS] = 0
    words[r.LINE_TRIES] = 0
    if words[r.LINE_HELD]:
        _show_oldest(line)


@inlined
def move(line: Line, to: Line) -> int:
    """Put the oldest frame of one line on another; return its bytes, 0 if that takes none."""
    where = room(to.words)
    if where < 0:
        return 0
    at, length = oldest(line)
    copy(to.data, where, line.data, at, length)
    admit(to, where, length)
    return int(length)


# --- the end of a line ---


@inlined
def put_off(line: Line) -> None:
    line.words[r.LINE_RETRY_NS] = _now_ns(line.words) + _RETRY_NS


@kernel
def may_go(line: Line) -> int:
    """Return whether the oldest frame may leave the line now, as far as its faults are concerned."""
    words = line.words
    if words[r.LINE_RETRY_NS] and words[r.LINE_RETRY_NS] > _now_ns(words):
        return WAIT
    number = line.table[words[r.LINE_HEAD] * r.ENTRY_SLOTS + r.ENTRY_NUMBER]
    tries, chance = words[r.LINE_TRIES], words[r.LINE_CHANCE + r.CHANCE_EAGAIN]
    at = words[r.LINE_AT]
    may_strike = chance > 0 and (at == 0 or (at == number and tries == 0))
    if may_strike and _drawn(words, r.CHANCE_EAGAIN + _TRIES * tries, number) < chance:
        words[r.LINE_STRUCK + r.CHANCE_EAGAIN] += 1
        words[r.LINE_TRIES] = tries + 1
        put_off(line)
        return WAIT
    return LOST if _strikes(words, r.CHANCE_EIO, number) else GO
