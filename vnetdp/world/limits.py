"""Limits of the rows that kernels index with: a row from outside that keeps them leads no kernel out of its arrays."""

from __future__ import annotations

from typing import Final

import numpy as np

from vnetdp_kernels import rows as r
from vnetdp_kernels import spec

from ..errors import ConfigError
from ..shared.memory import ADDRESS_LIMIT, GuestMemory, Words
from ..virtio.queue import Virtqueue, ring_len
from .plain import MOST

_FLAG: Final = (0, 1)
_INDEX: Final = (0, 0xFFFF)
_COUNT: Final = (0, MOST)
_PLACE: Final = (-1, MOST)
_LONGEST: Final = (0, r.FRAME_SLOT)
_SHORTEST: Final = spec.NET_HDR_LEN + spec.ETH_HLEN

# A slot that is not named is 0.
_VQ: Final = {
    r.VQ_NUM: (0, spec.VIRTQ_MAX_NUM),
    **dict.fromkeys((r.VQ_DESC, r.VQ_AVAIL, r.VQ_USED, r.VQ_DESC_GPA, r.VQ_AVAIL_GPA, r.VQ_USED_GPA), _PLACE),
    **dict.fromkeys((r.VQ_LAST_AVAIL_IDX, r.VQ_LAST_USED_IDX, r.VQ_AVAIL_IDX, r.VQ_SIGNALLED_USED), _INDEX),
    **dict.fromkeys((r.VQ_SIGNALLED_USED_VALID, r.VQ_EVENT_IDX, r.VQ_INDIRECT, r.VQ_MRG_RXBUF), _FLAG),
    **dict.fromkeys((r.VQ_BOUND, r.VQ_ENABLED, r.VQ_KICKS_ON, r.VQ_CALL_DUE), _FLAG),
    **dict.fromkeys((r.VQ_PACKETS, r.VQ_BYTES, r.VQ_DROPPED, r.VQ_CALLS, r.VQ_KICKS, r.VQ_CHAINS), _COUNT),
    r.VQ_HDR_LEN: (0, spec.NET_HDR_LEN),
    r.VQ_STATUS: (r.E_FULL, 0),
    r.VQ_LOG_USED: (-1, ADDRESS_LIMIT),
    r.VQ_OFFLOADS: (0, 0xFFFF),
    r.VQ_MAX_FRAME: (0, 0xFFFF + spec.ETH_HLEN),
    r.VQ_NOTED: (0, ADDRESS_LIMIT),
}
# The slots of a driver's queue that `Driver.check_adopted` leaves alone.
_DVQ: Final = {
    **dict.fromkeys((r.DVQ_PACKETS, r.DVQ_BYTES, r.DVQ_DROPPED, r.DVQ_KICKS, r.DVQ_CALLS), _COUNT),
    r.DVQ_CALLS_ON: _FLAG,
}
_EP: Final = {
    r.EP_KIND: (0, r.KIND_FAULT_PYTHON),
    r.EP_SIZE: (0, spec.MAX_FRAME_LEN),
    r.EP_FLOW: _INDEX,
    r.EP_LIMIT: _PLACE,
    **dict.fromkeys((r.EP_FIRST, r.EP_OUT_FIRST), (0, 1 << 16)),
    **dict.fromkeys((r.EP_COUNT, r.EP_OUT_COUNT), (0, 1 << 32)),
    **dict.fromkeys((r.EP_CHECK, r.EP_GONE, r.EP_BLOCKED), _FLAG),
    **dict.fromkeys((r.EP_SEQ, r.EP_INTERVAL_NS, r.EP_NEXT_NS, r.EP_TOLD_NS), (0, MOST + 1)),
    **dict.fromkeys((r.EP_DROP_SHORT, r.EP_DROP_LONG, r.EP_DROP_ERROR, r.EP_DROP_NO_BUFFER, r.EP_DROP_OFFLOAD), _COUNT),
    **dict.fromkeys((r.EP_TO_WIRE, r.EP_FROM_WIRE, r.EP_BYTES_TO_WIRE, r.EP_BYTES_FROM_WIRE), _COUNT),
    r.EP_LAST_ERRNO: (0, 4095),
    r.EP_PENDING: _LONGEST,
    r.EP_LINES: (0, 1 << 16),
}
_LINE: Final = {
    r.LINE_HEAD: (0, r.LINE_FRAMES - 1),
    r.LINE_HELD: (0, r.LINE_FRAMES),
    **dict.fromkeys((r.LINE_TAIL, r.LINE_FIRST), (0, r.LINE_RING)),
    **dict.fromkeys(range(r.LINE_DUE_NS, r.LINE_ASIDE_LEN), _COUNT),
    r.LINE_ASIDE_LEN: _LONGEST,
    r.LINE_ASIDE_COPIES: (0, 2),
    **dict.fromkeys((r.LINE_ASIDE_NUMBER, r.LINE_ASIDE_NS, r.LINE_CLOCK, r.LINE_CLOCK + 1), _COUNT),
    **dict.fromkeys(range(r.LINE_CHANCE, r.LINE_TOLD_NS), _COUNT),
    r.LINE_TOLD_NS: (0, MOST + 1),
}
_LEDGER: Final = {
    **dict.fromkeys(range(r.LEDGER_SLOTS), _COUNT),
    **dict.fromkeys(
        (
            r.LEDGER_NOTE_MISSING,
            r.LEDGER_NOTE_DUPLICATED,
            r.LEDGER_NOTE_REORDERED,
            r.LEDGER_NOTE_CORRUPTED,
        ),
        (0, r.LEDGER_NOTED),
    ),
}


def _table(limits: dict[int, tuple[int, int]], slots: int) -> Words:
    """Return the lowest and the highest value of each slot: int64[2, slots]."""
    return np.array([limits.get(slot, (0, 0)) for slot in range(slots)], np.int64).T


_OF_VQ: Final = _table(_VQ, r.VQ_SLOTS)
_OF_EP: Final = _table(_EP, r.EP_SLOTS)
_OF_LINE: Final = _table(_LINE, r.LINE_SLOTS)
_OF_LEDGER: Final = _table(_LEDGER, r.LEDGER_SLOTS)
_OF_STAGE: Final = np.concatenate([_OF_EP, _OF_LINE, _OF_LINE], axis=1)


def _keep(rows: Words, limits: Words, what: str) -> None:
    wrong = np.argwhere((rows < limits[0]) | (rows > limits[1]))
    if wrong.size:
        row, slot = wrong[0].tolist()
        low, high = limits[:, slot].tolist()
        raise ConfigError(f"{what} {row}: slot {slot} is {int(rows[row, slot])}, not {low} to {high}")


def check_rings(rows: Words, memory: GuestMemory, in_use: list[bool]) -> None:
    """Raise ConfigError unless the rows of a datapath's queues, int64[n, VQ_SLOTS], can be a device's.

    in_use: of each queue, whether a kernel may take the offsets of its row as they are.
    """
    _keep(rows, _OF_VQ, "ring")
    for n, row in enumerate(rows.tolist()):
        if not (in_use[n] or row[r.VQ_BOUND]):
            continue
        gpas = row[r.VQ_DESC_GPA], row[r.VQ_AVAIL_GPA], row[r.VQ_USED_GPA]
        try:
            Virtqueue(row[r.VQ_NUM], *gpas, True).validate()
            offsets = [memory.translate(gpa, length) for gpa, length in zip(gpas, ring_len(row[r.VQ_NUM]), strict=True)]
        except ConfigError as e:
            raise ConfigError(f"ring {n}: {e}") from e
        if [row[slot] for slot in (r.VQ_DESC, r.VQ_AVAIL, r.VQ_USED)] != offsets:
            raise ConfigError(f"ring {n}: its offsets in the window are not those of its addresses")
        if row[r.VQ_BOUND] and row[r.VQ_HDR_LEN] not in (spec.NET_HDR_LEN_LEGACY, spec.NET_HDR_LEN):
            raise ConfigError(f"ring {n}: a virtio_net_hdr has {spec.NET_HDR_LEN_LEGACY} or {spec.NET_HDR_LEN} bytes")


def check_counters(rows: Words) -> None:
    """Raise ConfigError unless the counters in the rows of a driver's queues, int64[n, DVQ_SLOTS], can be its own."""
    slots = [*_DVQ]
    _keep(rows[:, slots], np.array([*_DVQ.values()], np.int64).T, "counters of queue")


def check_endpoint(rows: Words, ledger: Words, lines: int, lengths: tuple[Words, Words]) -> None:
    """Raise ConfigError unless an endpoint's rows, int64[queues, lines × STAGE_SLOTS + EP_SLOTS], can be its own.

    The kinds in them are right already. lengths: those of its in slots and out slots, without its lines.
    """
    _keep(rows, np.concatenate([_OF_STAGE] * lines + [_OF_EP], axis=1), "queue")
    _keep(ledger, _OF_LEDGER, "ledger")
    own = rows[:, lines * r.STAGE_SLOTS :]
    waiting = rows[:, r.EP_PENDING]
    if ((waiting > 0) & (waiting < _SHORTEST)).any():
        raise ConfigError(f"a frame of {int(waiting[waiting > 0].min())} bytes waits, of at least {_SHORTEST}")
    if any((of_slots < 0).any() or (of_slots > r.FRAME_SLOT).any() for of_slots in lengths):
        raise ConfigError(f"a frame slot has {r.FRAME_SLOT} bytes at most")
    if own[0, r.EP_KIND] == r.KIND_PYTHON:
        slots = lengths[0].shape[1]
        if (own[:, r.EP_FIRST] + own[:, r.EP_COUNT] > slots).any() or (own[:, r.EP_OUT_COUNT] > slots).any():
            raise ConfigError(f"an endpoint in Python has {slots} frame slots each way")
    elif own[0, r.EP_KIND] == r.KIND_GENERATE and (own[:, r.EP_SIZE] < r.LEDGER_MIN_LEN).any():
        raise ConfigError(f"a numbered frame has at least {r.LEDGER_MIN_LEN} bytes")


def check_line(words: Words, table: Words) -> None:
    """Raise ConfigError unless the frames of one way of a faulty wire lie within its ring. Its words keep their limits."""
    held = (int(words[r.LINE_HEAD]) + np.arange(int(words[r.LINE_HELD]))) % r.LINE_FRAMES
    entries = table.reshape(r.LINE_FRAMES, r.ENTRY_SLOTS)[held]
    at, length = entries[:, r.ENTRY_OFFSET], entries[:, r.ENTRY_LEN]
    if (
        (at < 0).any()
        or (length < _SHORTEST).any()
        or (length > r.FRAME_SLOT).any()
        or (at > r.LINE_RING - length).any()
    ):
        raise ConfigError("a frame on a faulty wire lies outside of its ring, or is too short or too long")
    if held.size and (at[0], entries[0, r.ENTRY_DUE_NS]) != (words[r.LINE_FIRST], words[r.LINE_DUE_NS]):
        raise ConfigError("the oldest frame on a faulty wire is not the first of its table")
    if 0 < words[r.LINE_ASIDE_LEN] < _SHORTEST:
        raise ConfigError(f"a frame of {int(words[r.LINE_ASIDE_LEN])} bytes waits to be overtaken")
