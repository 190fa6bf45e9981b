"""Driver and device verbs of the split ring against a model of two queues: chains on their way out, and back.

The model keeps what was put, published, used and taken as plain lists, and works out every decision about a
notification from the specification's words: notify if the event lies among what was just published (2.7.7,
2.7.10).
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from random import Random

import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from tests.kernels.rig import CAMPAIGN, Arena, Rig, pages_of, pattern, scaled
from vnetdp_kernels import rows as r
from vnetdp_kernels.virtq import split_device, split_driver
from vnetdp_kernels.virtq.memory import take_dirty, write

SIZES = (1, 2, 2, 4, 4, 8, 8, 16, 32, 64, 256, 1024, 32768)
STARTS = st.sampled_from((0, 0, 65530, 65530, 65535, 32760)) | st.integers(0, 65535)
LENGTHS = st.lists(st.integers(1, 300), max_size=6)


@dataclass
class Chain:
    """A chain, as the driver knows it."""

    token: int
    slot: int
    n_out: int
    n_desc: int
    segments: list[tuple[int, int]]  # (guest address, length), readable ones first
    head: int = -1
    written: int = 0  # bytes that the device wrote, or says so
    content: bytes = b""  # of the readable buffers

    @property
    def room(self) -> int:
        return sum(length for _, length in self.segments[self.n_out :])


@dataclass
class Side:
    """What one side knows of the other's index, and what it was promised before it went to sleep."""

    seen: int = 0  # the other's index when last read, not wrapped
    decided: int = 0  # own index at the last decision about a notification
    sleeps_at: int | None = None  # the other's index when asking for notifications found nothing new
    published: int = 0
    taken: int = 0
    chains: deque[Chain] = field(default_factory=deque)  # published, for the other side to take

    def known(self) -> int:
        return self.seen - self.taken


def in_interval(event: int, old: int, new: int) -> bool:
    """True if index *event* (u16) is among entries old .. new - 1 (not wrapped)."""
    return any(k & 0xFFFF == event for k in range(old, new))


class SplitRing(RuleBasedStateMachine):
    @initialize(
        num=st.sampled_from(SIZES), start=STARTS, event_idx=st.booleans(), in_order=st.booleans(),
        log=st.booleans(), log_used=st.booleans(), indirect=st.booleans(),
    )  # fmt: skip
    def build(
        self, num: int, start: int, event_idx: bool, in_order: bool, log: bool, log_used: bool, indirect: bool
    ) -> None:
        self.rig = Rig(num, event_idx=event_idx, in_order=in_order, start=start, buf_len=0)
        self.memory, self.queue = self.rig.memory, self.rig.tx
        self.mem, self.vq = self.memory.mem, self.queue.vq
        self.dvq, self.state = self.queue.dvq, self.queue.state
        self.num, self.start, self.event_idx, self.in_order = num, start, event_idx, in_order
        self.vq[r.VQ_INDIRECT] = self.indirect = indirect
        if log:
            self.memory.log_on()
        if not log_used:
            self.vq[r.VQ_LOG_USED] = -1
        self.must_log: set[int] = set()
        self.arena = Arena(self.memory)
        self.put: deque[Chain] = deque()
        self.unreleased: deque[Chain] = deque()
        self.driver, self.device = Side(), Side()
        self.next_token = 1
        self.called_before = False
        self.drivers_parts = self.queue.drivers_parts()

    # --- the driver ---

    def free_descriptors(self) -> int:
        on_the_way = (*self.put, *self.driver.chains, *self.device.chains, *self.unreleased)
        return self.num - sum(chain.n_desc for chain in on_the_way)

    @precondition(lambda self: self.arena.free)
    @rule(
        out=LENGTHS, into=LENGTHS, direct=st.integers(0, 12), start=st.integers(0, 300),
        table_at=st.integers(0, 300), table_first=st.booleans(),
    )  # fmt: skip
    def put_chain(
        self, out: list[int], into: list[int], direct: int, start: int, table_at: int, table_first: bool
    ) -> None:
        lengths = [*out, *into] or [1]
        n_out = len(out) if out or into else 1
        direct = min(direct, len(lengths)) if self.indirect else len(lengths)
        n_desc = direct + (direct < len(lengths))
        slot, segments, iov, table = self.arena.lay_out(lengths, start, table_at, table_first)
        chain = Chain(self.next_token, slot, n_out, n_desc, segments)
        for k in range(n_out):
            data = pattern(chain.token + k, lengths[k])
            self.memory.write(segments[k][0], data)
            chain.content += data
        full = n_desc > self.free_descriptors()
        head = self.queue.put(iov, n_out, direct, table, chain.token)
        self.drivers_parts = self.queue.drivers_parts()
        if full:
            assert head == r.E_FULL
            return
        assert 0 <= head < self.num
        chain.head = head
        self.next_token += 1
        self.arena.free.popleft()
        self.put.append(chain)

    @rule()
    def publish(self) -> None:
        split_driver.publish_available(self.mem, self.dvq)
        self.driver.published += len(self.put)
        self.driver.chains.extend(self.put)
        self.put.clear()
        assert self.queue.avail_idx == (self.start + self.driver.published) & 0xFFFF
        self.drivers_parts = self.queue.drivers_parts()

    @rule()
    def decide_about_kick(self) -> None:
        side = self.driver
        if self.event_idx:
            old, new = self.start + side.decided, self.start + side.published
            expected = in_interval(self.queue.avail_event, old, new)
        else:
            expected = side.published != side.decided and not self.queue.used_flags & 1
        kicked = split_driver.needs_kick(self.mem, self.dvq)
        assert kicked == expected
        side.decided = side.published
        if self.device.sleeps_at is not None and side.published > self.device.sleeps_at:
            assert kicked, "the device sleeps, and nobody wakes it"
            self.device.sleeps_at = None

    @rule(fresh=st.booleans())
    def look_at_used(self, fresh: bool) -> None:
        side = self.driver
        if fresh or not side.known():
            side.seen = self.device.published
        look = split_driver.refresh_used if fresh else split_driver.used_ready
        assert look(self.mem, self.dvq) == side.known()

    @precondition(lambda self: self.driver.known())
    @rule(n=st.integers(1, 8))
    def take_used(self, n: int) -> None:
        for _ in range(min(n, self.driver.known())):
            chain = self.device.chains.popleft()
            head, length = split_driver.take_used(self.mem, self.dvq, self.state)
            assert (head, length) == (chain.head, chain.written)
            assert self.state[head, r.DS_TOKEN] == chain.token
            got = b"".join(self.memory.read(*segment) for segment in chain.segments[chain.n_out :])
            assert got[:length] == pattern(chain.token, length)
            assert got[length:] == bytes([Arena.FILL]) * (len(got) - length)
            self.driver.taken += 1
            self.unreleased.append(chain)

    @precondition(lambda self: self.unreleased)
    @rule(n=st.integers(1, 8))
    def release(self, n: int) -> None:
        for _ in range(min(n, len(self.unreleased))):
            chain = self.unreleased.popleft()
            split_driver.release(self.dvq, self.state, chain.head)
            self.arena.free.append(chain.slot)

    @rule()
    def enable_calls(self) -> None:
        again = split_driver.enable_calls(self.mem, self.dvq)
        assert again == (self.device.published != self.driver.taken)
        self.driver.sleeps_at = None if again else self.device.published
        self.drivers_parts = self.queue.drivers_parts()

    @rule()
    def disable_calls(self) -> None:
        split_driver.disable_calls(self.mem, self.dvq)
        self.driver.sleeps_at = None
        self.drivers_parts = self.queue.drivers_parts()

    # --- the device ---

    @rule(fresh=st.booleans())
    def look_at_available(self, fresh: bool) -> None:
        side = self.device
        if fresh or not side.known():
            side.seen = self.driver.published
        look = split_device.refresh if fresh else split_device.available
        assert look(self.mem, self.vq) == side.known()

    def write_log(self, gpa: int, length: int) -> None:
        if self.memory.log.size:
            self.must_log |= pages_of(gpa, length)

    def process(self, ahead: int, share: int) -> Chain:
        """Take the chain *ahead* of the next one, check it, fill *share* percent of its writable bytes."""
        chain = self.driver.chains[ahead]
        assert split_device.head_at(self.mem, self.vq, ahead) == chain.head
        iov = self.rig.device.scratch.iov
        iov[:] = -1
        n = len(chain.segments)
        n_in = n - chain.n_out
        lengths = [length for _, length in chain.segments]
        sizes = (sum(lengths[: chain.n_out]), sum(lengths[chain.n_out :]))
        assert split_device.gather(self.mem, self.memory.regions, self.vq, chain.head, iov) == (
            chain.n_out,
            n_in,
            *sizes,
        )
        expected = [(self.memory.at(gpa, length), length, gpa) for gpa, length in chain.segments]
        assert [tuple(row) for row in iov[:n].tolist()] == expected
        assert (iov[n:] == -1).all()
        found = (self.mem[at : at + length].tobytes() for at, length, _ in expected[: chain.n_out])
        assert b"".join(found) == chain.content
        chain.written = chain.room * share // 100
        data = np.frombuffer(pattern(chain.token, chain.written), np.uint8).copy()
        done = 0
        for at, length, gpa in expected[chain.n_out :]:
            part = min(length, chain.written - done)
            write(self.mem, self.vq, self.memory.log, at, gpa, data, done, part)
            self.write_log(gpa, part)
            done += part
        return chain

    def publish_used(self, n: int) -> None:
        queue, first = self.queue, self.start + self.device.published
        split_device.publish_used(self.mem, self.vq, self.memory.log, n)
        self.device.published += n
        self.device.taken += n
        assert queue.used_idx == (self.start + self.device.published) & 0xFFFF
        if self.vq[r.VQ_LOG_USED] >= 0:
            self.write_log(queue.used_gpa, 4)
            for k in range(first, first + n):
                self.write_log(queue.used_gpa + 4 + 8 * (k % self.num), 8)

    @precondition(lambda self: self.device.known())
    @rule(shares=st.lists(st.integers(0, 100), min_size=1, max_size=10), order=st.randoms(use_true_random=False))
    def use_each(self, shares: list[int], order: Random) -> None:
        shares = shares[: self.device.known()]
        chains = [self.process(ahead, share) for ahead, share in enumerate(shares)]
        if not self.in_order:
            order.shuffle(chains)
        for ahead, chain in enumerate(chains):
            split_device.put_used(self.mem, self.vq, ahead, chain.head, chain.written)
        self.publish_used(len(chains))
        for _ in chains:
            self.driver.chains.popleft()
        self.device.chains.extend(chains)

    @precondition(lambda self: self.in_order and self.device.known())
    @rule(n=st.integers(1, 8), share=st.integers(0, 100))
    def use_a_batch_with_one_element(self, n: int, share: int) -> None:
        n = min(n, self.device.known())
        chains = [self.process(ahead, share if ahead == n - 1 else 100) for ahead in range(n)]
        split_device.put_used(self.mem, self.vq, 0, chains[-1].head, chains[-1].written)
        self.publish_used(n)
        for _ in chains:
            self.driver.chains.popleft()
        self.device.chains.extend(chains)

    @rule()
    def decide_about_call(self) -> None:
        side = self.device
        if not self.event_idx:
            expected = not self.queue.avail_flags & 1
        elif self.called_before:
            old, new = self.start + side.decided, self.start + side.published
            expected = in_interval(self.queue.used_event, old, new)
        else:
            expected = True
        called = split_device.needs_call(self.mem, self.vq)
        assert called == expected
        self.called_before = True
        side.decided = side.published
        if self.driver.sleeps_at is not None and side.published > self.driver.sleeps_at:
            assert called, "the driver sleeps, and nobody wakes it"
            self.driver.sleeps_at = None

    @rule()
    def enable_kicks(self) -> None:
        again = split_device.enable_kicks(self.mem, self.vq, self.memory.log)
        assert again == (self.driver.published != self.device.seen)
        self.device.sleeps_at = None if again else self.driver.published
        if self.vq[r.VQ_LOG_USED] >= 0:
            at = 4 + 8 * self.num if self.event_idx else 0
            self.write_log(self.queue.used_gpa + at, 2)

    @rule()
    def disable_kicks(self) -> None:
        before = self.queue.used_flags
        split_device.disable_kicks(self.mem, self.vq, self.memory.log)
        self.device.sleeps_at = None
        if self.vq[r.VQ_LOG_USED] >= 0 and self.queue.used_flags != before:
            self.write_log(self.queue.used_gpa, 2)

    @rule(room=st.integers(64, 200))
    def take_dirty(self, room: int) -> None:
        pages = np.zeros(room, np.int64)
        found: list[int] = []
        at = 0
        while at < self.memory.log.size:
            n, at = take_dirty(self.memory.log, at, pages)
            assert n <= room
            found += pages[:n].tolist()
        assert len(set(found)) == len(found)
        self.check_log(set(found))
        assert not self.memory.log.any()
        self.must_log.clear()

    # --- what always holds ---

    def check_log(self, dirty: set[int]) -> None:
        ring = pages_of(self.queue.used_gpa, 6 + 8 * self.num) if self.vq[r.VQ_LOG_USED] >= 0 else set()
        assert self.must_log <= dirty
        assert dirty <= self.must_log | ring, "a page is logged that was not written"

    @invariant()
    def counts_agree(self) -> None:
        if hasattr(self, "rig"):
            free = self.free_descriptors()
            on_the_way = len(self.put) + len(self.driver.chains) + len(self.device.chains)
            assert (self.dvq[r.DVQ_NUM_FREE], self.dvq[r.DVQ_IN_FLIGHT]) == (free, on_the_way)

    @invariant()
    def each_writes_only_its_part(self) -> None:
        if hasattr(self, "rig"):
            assert self.queue.drivers_parts() == self.drivers_parts
            used_flags, avail_flags = self.queue.used_flags, self.queue.avail_flags
            assert {used_flags, avail_flags} <= ({0} if self.event_idx else {0, 1})
            if not self.event_idx:
                assert self.queue.avail_event == self.queue.used_event == self.start
            if self.memory.log.size:
                self.check_log(self.memory.dirty())

    def teardown(self) -> None:
        if hasattr(self, "rig"):
            assert self.memory.intact()


TestSplitRing = SplitRing.TestCase
TestSplitRing.settings = settings(
    max_examples=1000 if CAMPAIGN else scaled(100, 100),
    stateful_step_count=60,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much, HealthCheck.data_too_large],
)


@pytest.mark.parametrize("in_order", [False, True])
@pytest.mark.parametrize("num", [1, 2, 256, scaled(32768, 2048)])
def test_a_ring_filled_to_the_last_descriptor(num: int, in_order: bool) -> None:
    """Every descriptor is given out once, and comes back; the indices wrap on the way."""
    rig = Rig(num, in_order=in_order, start=65530, buf_len=0)
    queue, mem, regions = rig.tx, rig.memory.mem, rig.memory.regions
    gpa = rig.memory.low(64)
    for lap in range(3):
        heads = [split_driver.put_single(mem, queue.dvq, queue.state, gpa, 1 + k % 64, 0, k) for k in range(num)]
        assert sorted(heads) == list(range(num))
        assert split_driver.put_single(mem, queue.dvq, queue.state, gpa, 1, 0, 0) == r.E_FULL
        split_driver.publish_available(mem, queue.dvq)
        assert split_device.available(mem, queue.vq) == num
        for k, head in enumerate(heads):
            assert split_device.head_at(mem, queue.vq, k) == head
            assert split_device.gather(mem, regions, queue.vq, head, rig.device.scratch.iov) == (1, 0, 1 + k % 64, 0)
            assert rig.device.scratch.iov[0, r.IOV_LEN] == 1 + k % 64
        token_of = {head: k for k, head in enumerate(heads)}
        order = heads if in_order else heads[::-1]
        for k, head in enumerate(order):
            split_device.put_used(mem, queue.vq, k, head, 0)
        split_device.publish_used(mem, queue.vq, rig.memory.log, num)
        assert split_driver.used_ready(mem, queue.dvq) == num
        for head in order:
            assert split_driver.take_used(mem, queue.dvq, queue.state) == (head, 0)
            assert queue.state[head, r.DS_TOKEN] == token_of[head]
            split_driver.release(queue.dvq, queue.state, head)
        assert queue.used_idx == (65530 + num * (lap + 1)) & 0xFFFF
        assert split_device.available(mem, queue.vq) == 0
    assert rig.memory.intact()
