"""virtio-net, the device's side, against a model: frames out of a transmitq, into a receiveq, and across.

The guest is played by hand: chains of any shape, frames cut anywhere. The model says how many frames a call
moves, which receive buffers each takes, and what the guest finds in them.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from itertools import pairwise

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from tests.kernels.rig import CAMPAIGN, Arena, Rig, pages_of, pattern, scaled
from vnetdp.testing.strategies import headers
from vnetdp_kernels import rows as r
from vnetdp_kernels import spec
from vnetdp_kernels.virtq import split_driver

WIRE_SLOTS = 4
LENGTHS = st.integers(14, 1600) | st.sampled_from((0, 1, 13, 14, 60, 1514, 3000))
OFFSETS = st.integers(0, 300)
HEADERS = headers(length=10)
CUTS = st.lists(st.integers(1, 2000), max_size=14)
KINDS = st.sampled_from((r.KIND_PYTHON, r.KIND_PYTHON, r.KIND_ECHO, r.KIND_MACSWAP))


@dataclass
class Sent:
    """A frame in the transmitq."""

    header: bytes
    frame: bytes
    slot: int


@dataclass
class Buffer:
    """A chain in the receiveq."""

    head: int
    slot: int
    segments: list[tuple[int, int]]

    @property
    def room(self) -> int:
        return sum(length for _, length in self.segments)


@dataclass
class Placed:
    """A frame that the guest must find in the receiveq."""

    header: bytes
    frame: bytes
    buffers: list[Buffer]


def cut(length: int, cuts: list[int]) -> list[int]:
    """Return the lengths of the pieces of *length* bytes cut at those positions that lie inside."""
    at = sorted({0, *(c for c in cuts if c < length), length})
    return [b - a for a, b in pairwise(at)]


class NetDevice(RuleBasedStateMachine):
    @initialize(
        num=st.sampled_from((2, 4, 8, 16, 64)), start=st.sampled_from((0, 65530)), kind=KINDS,
        layout=st.sampled_from(((True, 12), (False, 12), (False, 10))), log=st.booleans(),
    )  # fmt: skip
    def build(self, num: int, start: int, kind: int, layout: tuple[bool, int], log: bool) -> None:
        self.mergeable, self.hdr_len = layout
        self.rig = Rig(
            num,
            start=start,
            mergeable=self.mergeable,
            hdr_len=self.hdr_len,
            slots=WIRE_SLOTS,
            device=kind,
            buf_len=0,
        )
        self.num, self.kind, self.ep = num, kind, self.rig.device.eps[0]
        if log:
            self.rig.memory.log_on()
        self.must_log: set[int] = set()
        self.tx_arena, self.rx_arena = (
            Arena(self.rig.memory),
            Arena(self.rig.memory, self.rig.memory.low(530_000)),
        )
        self.sent: deque[Sent] = deque()
        self.tx_seen = 0  # of `sent`, those the device knows of
        self.expected_out: deque[Sent] = deque()
        self.wire: deque[tuple[bytes, bytes]] = deque()
        self.pending: tuple[bytes, bytes] | None = None
        self.posted: deque[Buffer] = deque()
        self.placed: deque[Placed] = deque()
        self.counts = dict.fromkeys((r.EP_DROP_SHORT, r.EP_DROP_NO_BUFFER, r.EP_TO_WIRE, r.EP_FROM_WIRE), 0)

    # --- the guest ---

    @precondition(lambda self: self.tx_arena.free)
    @rule(
        length=LENGTHS, header=HEADERS, seed=st.integers(0, 255), cuts=CUTS,
        direct=st.integers(0, 15), start=OFFSETS, table_at=OFFSETS, flip=st.booleans(),
        writable=st.integers(0, 2), missing=st.integers(0, 11),
    )  # fmt: skip
    def send(
        self, *, length: int, header: bytes, seed: int, cuts: list[int], direct: int, start: int, table_at: int,
        flip: bool, writable: int, missing: int,
    ) -> None:  # fmt: skip
        """Put a frame into the transmitq; of a frame of no bytes even part of the header may be missing."""
        sent = Sent(header, pattern(seed, length), 0)
        data = header + bytes(self.hdr_len - 10) + sent.frame
        data = data[: max(1, len(data) - missing)] if not length else data
        lengths = cut(len(data), cuts)
        # A device must put up with writable descriptors behind the frame: it does not write them.
        lengths, n_out = lengths + [7] * writable, len(lengths)
        queue = self.rig.tx
        sent.slot, segments, iov, table = self.tx_arena.lay_out(lengths, start, table_at, flip)
        self.rig.memory.write(segments[0][0], data)
        if queue.put(iov, n_out, min(direct, len(lengths)), table, sent.slot) >= 0:
            self.tx_arena.free.popleft()
            self.sent.append(sent)
        split_driver.publish_available(self.rig.memory.mem, queue.dvq)

    @precondition(lambda self: self.rx_arena.free)
    @rule(
        lengths=st.lists(st.integers(1, 900), min_size=1, max_size=4), small=st.booleans(),
        direct=st.integers(0, 4), start=OFFSETS, table_at=OFFSETS, flip=st.booleans(),
    )  # fmt: skip
    def post(self, lengths: list[int], small: bool, direct: int, start: int, table_at: int, flip: bool) -> None:
        """Post a receive buffer."""
        lengths = [1 + length % 9 for length in lengths] if small else lengths
        queue = self.rig.rx
        slot, segments, iov, table = self.rx_arena.lay_out(lengths, start, table_at, flip)
        head = queue.put(iov, 0, min(direct, len(lengths)), table, slot)
        if head >= 0:
            self.rx_arena.free.popleft()
            self.posted.append(Buffer(head, slot, segments))
        split_driver.publish_available(self.rig.memory.mem, queue.dvq)

    @rule()
    def find_received(self) -> None:
        """Look at what the receiveq holds, as Linux's driver would, then give the descriptors back."""
        queue, memory = self.rig.rx, self.rig.memory
        used = deque(queue.used())
        while used:
            placed = self.placed.popleft()
            data = b""
            for k, buffer in enumerate(placed.buffers):
                head, length = used.popleft()
                assert head == buffer.head
                assert length == buffer.room or k == len(placed.buffers) - 1, "filled up, all but the last"
                left = b"".join(memory.read(*segment) for segment in buffer.segments)
                data += left[:length]
                assert left[length:] == bytes([Arena.FILL]) * (buffer.room - length)
            assert data[:10] == placed.header
            assert data[self.hdr_len :] == placed.frame
            if self.hdr_len == spec.NET_HDR_LEN:
                assert int.from_bytes(data[10:12], "little") == len(placed.buffers)
            for buffer in placed.buffers:
                assert split_driver.used_ready(memory.mem, queue.dvq) > 0
                assert split_driver.take_used(memory.mem, queue.dvq, queue.state)[0] == buffer.head
                split_driver.release(queue.dvq, queue.state, buffer.head)
                self.rx_arena.free.append(buffer.slot)
        assert not self.placed

    @rule()
    def reclaim(self) -> None:
        queue, mem = self.rig.tx, self.rig.memory.mem
        for head, length in queue.used():
            assert length == 0
            assert split_driver.used_ready(mem, queue.dvq) > 0
            assert split_driver.take_used(mem, queue.dvq, queue.state) == (head, 0)
            self.tx_arena.free.append(int(queue.state[head, r.DS_TOKEN]))
            split_driver.release(queue.dvq, queue.state, head)

    # --- the wire ---

    @precondition(lambda self: not self.ep[r.EP_COUNT])
    @rule(
        frames=st.lists(st.tuples(LENGTHS, HEADERS), min_size=1, max_size=WIRE_SLOTS),
        seed=st.integers(0, 255),
    )  # fmt: skip
    def from_wire(self, frames: list[tuple[int, bytes]], seed: int) -> None:
        self.wire.extend((header, pattern(seed + k, length)) for k, (length, header) in enumerate(frames))
        self.rig.device.feed(*(header + b"\xff\xff" + frame for header, frame in self.wire))

    @rule()
    def to_wire(self) -> None:
        for data in self.rig.device.collect():
            sent = self.expected_out.popleft()
            assert (data[:12], data[12:]) == (sent.header + bytes(2), sent.frame)
        assert not self.expected_out

    # --- the device ---

    def log_used(self, gpa: int, first: int, n: int) -> None:
        if n and self.rig.memory.log.size:
            self.must_log |= pages_of(gpa, 4)
            for k in range(first, first + n):
                self.must_log |= pages_of(gpa + 4 + 8 * (k % self.num), 8)

    def place(self, header: bytes, frame: bytes) -> int:
        """What a frame does to the receiveq: the buffers it takes; 0 = it waits, -1 = it is dropped."""
        need = self.hdr_len + len(frame)
        buffers: list[Buffer] = []
        while sum(buffer.room for buffer in buffers) < need:
            if buffers and not self.mergeable:
                return -1
            if len(buffers) == len(self.posted):
                return -1 if len(buffers) == self.num else 0
            buffers.append(self.posted[len(buffers)])
        for buffer in buffers:
            self.posted.popleft()
            for segment in buffer.segments if self.rig.memory.log.size else []:
                self.must_log |= pages_of(segment[0], min(segment[1], need))
                need -= min(segment[1], need)
        self.placed.append(Placed(header, frame, buffers))
        return len(buffers)

    def known_tx(self, budget: int) -> int:
        self.tx_seen = self.tx_seen or len(self.sent)
        return min(self.tx_seen, budget)

    @precondition(lambda self: self.kind == r.KIND_PYTHON)
    @rule(budget=st.integers(1, 8))
    def drain(self, budget: int) -> None:
        queue, used = self.rig.tx, 0
        first = queue.used_idx
        for _ in range(self.known_tx(budget)):
            sent = self.sent[0]
            if len(sent.frame) < spec.ETH_HLEN:
                self.counts[r.EP_DROP_SHORT] += 1
            elif len(self.expected_out) == WIRE_SLOTS:
                break
            else:
                self.counts[r.EP_TO_WIRE] += 1
                self.expected_out.append(sent)
            self.sent.popleft()
            used += 1
        self.tx_seen -= used
        self.log_used(queue.used_gpa, first, used)
        assert self.rig.drain(budget) == used

    @precondition(lambda self: self.kind == r.KIND_PYTHON)
    @rule(budget=st.integers(1, 8))
    def fill(self, budget: int) -> None:
        queue = self.rig.rx
        first, handled, chains = queue.used_idx, 0, 0
        for _ in range(budget):
            if self.pending is None:
                if not self.posted:
                    break
                while self.wire and len(self.wire[0][1]) < spec.ETH_HLEN:
                    self.wire.popleft()
                    self.counts[r.EP_DROP_SHORT] += 1
                if not self.wire:
                    break
                self.pending = self.wire.popleft()
                self.counts[r.EP_FROM_WIRE] += 1
            took = self.place(*self.pending)
            if took == 0:
                break
            self.pending = None
            handled += 1
            chains += max(took, 0)
            self.counts[r.EP_DROP_NO_BUFFER] += took < 0
        self.log_used(queue.used_gpa, first, chains)
        assert self.rig.fill(budget) == handled

    @precondition(lambda self: self.kind != r.KIND_PYTHON)
    @rule(budget=st.integers(1, 8))
    def forward(self, budget: int) -> None:
        tx, rx = self.rig.tx, self.rig.rx
        first_tx, first_rx, used, chains = tx.used_idx, rx.used_idx, 0, 0
        for _ in range(self.known_tx(budget)):
            sent = self.sent[0]
            frame = sent.frame
            if len(frame) < spec.ETH_HLEN:
                self.counts[r.EP_DROP_SHORT] += 1
            else:
                if self.kind == r.KIND_MACSWAP:
                    frame = frame[6:12] + frame[:6] + frame[12:]
                took = self.place(sent.header, frame)
                if took == 0:
                    break
                chains += max(took, 0)
                self.counts[r.EP_DROP_NO_BUFFER] += took < 0
                self.counts[r.EP_TO_WIRE] += took > 0
                self.counts[r.EP_FROM_WIRE] += took > 0
            self.sent.popleft()
            used += 1
        self.tx_seen -= used
        self.log_used(tx.used_gpa, first_tx, used)
        self.log_used(rx.used_gpa, first_rx, chains)
        assert self.rig.forward(budget) == used

    @invariant()
    def counters_and_log_agree(self) -> None:
        if hasattr(self, "rig"):
            assert {slot: self.ep[slot] for slot in self.counts} == self.counts
            assert not self.rig.vqs[:, r.VQ_STATUS].any()
            dropped = self.counts[r.EP_DROP_SHORT] + self.counts[r.EP_DROP_NO_BUFFER]
            if self.kind != r.KIND_PYTHON:
                assert self.rig.vqs[:, r.VQ_DROPPED].sum() == dropped
            if self.rig.memory.log.size:
                assert self.rig.memory.dirty() == self.must_log

    def teardown(self) -> None:
        if hasattr(self, "rig"):
            self.find_received()
            assert self.rig.memory.intact()


TestNetDevice = NetDevice.TestCase
TestNetDevice.settings = settings(
    max_examples=1000 if CAMPAIGN else scaled(100, 80),
    stateful_step_count=60,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much, HealthCheck.data_too_large],
)
