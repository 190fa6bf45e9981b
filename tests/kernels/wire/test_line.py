"""The line of a faulty wire: frames of any length come off it in order and unchanged, or are refused while it is full."""

from __future__ import annotations

import random
from collections import deque

import numpy as np
import pytest

from tests.kernels.rig import COMPILED, scaled
from vnetdp_kernels import rows as r
from vnetdp_kernels import spec
from vnetdp_kernels.platform.atomic import Bytes, Words
from vnetdp_kernels.rows import Frame, Sink
from vnetdp_kernels.wire import faulty, port
from vnetdp_kernels.wire.frame import HDR_SCRATCH

NEVER = 1 << 62
SLOTS = 8


class Wire:
    """A faulty wire before an endpoint in Python, laid out by hand."""

    def __init__(self, key: int = 0) -> None:
        self.ep: Words = np.zeros(r.STAGE_SLOTS + r.EP_SLOTS, np.int64)
        self.ep[r.EP_KIND], self.ep[r.EP_LINES] = r.KIND_FAULT_PYTHON, 1
        self.behind = self.ep[r.STAGE_SLOTS :]
        self.behind[r.EP_KIND] = r.KIND_PYTHON
        self.line = self.ep[r.EP_SLOTS :][: r.LINE_SLOTS]
        self.line[r.LINE_KEY] = key
        self.lengths: Words = np.zeros(2 * (r.LINE_TABLE + SLOTS), np.int64)
        self.frames: Bytes = np.zeros(2 * (r.LINE_BYTES + SLOTS * r.FRAME_SLOT), np.uint8)
        ledger, windows = np.zeros((1, r.LEDGER_SLOTS), np.int64), np.zeros((1, r.LEDGER_WINDOW), np.uint8)
        self.sink = Sink(self.ep, -1, self.frames, self.lengths, ledger, windows)
        self._hdr: Bytes = np.zeros(HDR_SCRATCH, np.uint8)
        self._words: Words = np.zeros(port.SCRATCH_WORDS, np.int64)

    def hold(self, data: bytes) -> bool:
        """Send a frame; return whether the wire took it."""
        iov = np.array([[0, len(data), 0]], np.int64)
        whole = Frame(np.frombuffer(bytearray(data), np.uint8), iov, 0, 1, len(data))
        return int(faulty.hold(whole, self._hdr, self.sink)) != r.E_BLOCKED

    def take(self) -> list[bytes]:
        """Have it hand on the frames that are due, and return as many as the endpoint has slots for."""
        n = int(faulty.send_on(self.sink, self._words))
        self.behind[r.EP_OUT_COUNT] = 0
        slots = self.frames[2 * r.LINE_BYTES :].reshape(-1, r.FRAME_SLOT)
        lengths = self.lengths[2 * r.LINE_TABLE :]
        return [slots[k, spec.NET_HDR_LEN : lengths[k]].tobytes() for k in range(n)]


@pytest.mark.parametrize("longest", [100, 3_000, spec.MAX_FRAME_LEN])
def test_frames_of_any_length_come_in_order_however_full_the_line_is(longest: int) -> None:
    """Filled by chance and emptied by chance, until the ring of bytes has wrapped around a few times."""
    dice = random.Random(longest)
    wire = Wire()
    held: deque[bytes] = deque()
    number = refused = 0
    for _ in range(scaled(30 if longest > 3_000 else 100, 10)):
        for _ in range(dice.randrange(scaled(400, 40))):
            data = number.to_bytes(8, "big") + dice.randbytes(dice.randrange(8, longest - 8))
            if not wire.hold(data):
                refused += 1
                assert len(held) > r.LINE_FRAMES - 5 or sum(map(len, held)) > r.LINE_RING - 10 * r.FRAME_SLOT
                break
            held.append(data)
            number += 1
        for _ in range(dice.randrange(scaled(400, 40) // SLOTS + 1)):
            for data in wire.take():
                assert data == held.popleft()
    while held:
        for data in wire.take():
            assert data == held.popleft()
    assert wire.take() == []
    assert wire.line[r.LINE_HELD] == 0
    assert refused or longest < spec.MAX_FRAME_LEN or not COMPILED


def test_a_frame_that_is_not_due_holds_up_those_behind_it() -> None:
    wire = Wire()
    for k in range(3):
        wire.line[r.LINE_DELAY_NS] = NEVER >> 1 if k == 1 else 0
        assert wire.hold(bytes([k]) * 60)
    assert wire.take() == [bytes([0]) * 60]
    assert 0 < faulty.out_due_ns(wire.ep, 0) < NEVER
    assert wire.take() == []
    wire.line[r.LINE_DUE_NS] = 1
    assert faulty.out_due_ns(wire.ep, 2) == 0
    assert wire.take() == [bytes([k]) * 60 for k in (1, 2)]
    assert faulty.out_due_ns(wire.ep, 2) == -1


def test_decisions_are_even_and_differ_by_key_and_fault() -> None:
    """Of 2^n frames with even odds about a half is struck, and two faults or keys agree about a half of them."""
    n = scaled(4_000, 400)
    fates = []
    for key, fault in ((1, r.CHANCE_DROP), (2, r.CHANCE_DROP), (1, r.CHANCE_EIO)):
        wire = Wire(key)
        wire.line[r.LINE_CHANCE + fault] = 1 << 31
        fate = []
        for _ in range(n):
            assert wire.hold(bytes(60))
            fate.append(len(wire.take()))
        fates.append(np.array(fate))
    for one, other in zip(fates, [*fates[1:], fates[0]], strict=True):
        assert abs(int(one.sum()) - n / 2) < 3 * n**0.5
        assert abs(int((one == other).sum()) - n / 2) < 3 * n**0.5
        assert abs(int((one[1:] == one[:-1]).sum()) - n / 2) < 3 * n**0.5
