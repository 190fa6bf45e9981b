"""Userspace and vhost do the same: for one seed they leave byte-identical guest memory, and deliver the same frames.

Work comes in batches. Whoever runs the rings is woken, and stands still while a batch is laid out; it has come to rest
when it sleeps again, since everything there is to find was there before it looked. So whole memories can be compared,
rings, flags and events included.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from random import Random

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.support.by_hand import INDIRECT, NEXT, WRITE, scaled, wait_for
from vnetdp.backends.base import Backend
from vnetdp.backends.process import WorkerProcess
from vnetdp.backends.userspace import UserspaceBackend
from vnetdp.backends.worker import Worker
from vnetdp.datapath.datapath import Datapath
from vnetdp.device import vhost_net
from vnetdp.endpoints.base import Endpoint
from vnetdp.endpoints.loopback import EchoEndpoint, GenerateEndpoint, MacswapEndpoint, ReflectEndpoint
from vnetdp.endpoints.mailbox import MailboxEndpoint
from vnetdp.shared.memory import GuestMemory
from vnetdp.shared.notify import EventFd
from vnetdp.testing import HandRing
from vnetdp.virtio import features as f
from vnetdp.virtio.queue import RECEIVEQ, TRANSMITQ, Virtqueue
from vnetdp_kernels import rows as r
from vnetdp_kernels import spec

BLOCK = 4096
# Two regions that are adjacent, a hole, and one high up.
REGIONS = ((0x10000, 0x60000), (0x70000, 0x20000), (1 << 33, 0x20000))
SEAM = 0x70000
KEPT = [r.EP_SEQ, r.EP_PENDING]  # what an endpoint keeps, and any owner finds
CHOICES = (
    f.VIRTIO_F_VERSION_1,
    f.VIRTIO_RING_F_EVENT_IDX,
    f.VIRTIO_RING_F_INDIRECT_DESC,
    f.VIRTIO_NET_F_MRG_RXBUF,
)


class Chain:
    """A chain in flight: what it takes of the table, and of memory."""

    def __init__(self) -> None:
        self.descs: list[int] = []
        self.blocks: list[int] = []


class Guest:
    """A driver by hand that lays out the same chains for the same seed, whatever runs the device."""

    def __init__(self, seed: int, features: int, num: int, start: int) -> None:
        self.random = Random(seed)
        self.features = features
        self.memory = GuestMemory.create(REGIONS)
        receiveq = HandRing(self.memory, REGIONS[0][0], num, start)
        transmitq = HandRing(self.memory, receiveq.buffer(0), num, start)
        self.rings = (receiveq, transmitq)
        self.free_descs = [list(range(num)), list(range(num))]
        self.in_flight: list[dict[int, Chain]] = [{}, {}]
        first = spec.align_up(transmitq.buffer(0), BLOCK)
        self.free_blocks: list[int] = [*range(first, SEAM - BLOCK, BLOCK), SEAM - BLOCK // 2]
        self.free_blocks += list(range(SEAM + BLOCK, SEAM + REGIONS[1][1] - BLOCK, BLOCK))
        self.free_blocks += list(range(REGIONS[2][0], REGIONS[2][0] + REGIONS[2][1], BLOCK))
        for free in (*self.free_descs, self.free_blocks):
            self.random.shuffle(free)

    def _place(self, chain: Chain, length: int, align: int = 1) -> int:
        block = self.free_blocks.pop()
        chain.blocks.append(block)
        return int(block) + int(self.random.randrange(0, BLOCK - length + 1, align))

    def _put(self, index: int, segments: Sequence[tuple[bytes | None, int]]) -> bool:
        """Make a chain available: (content, length) readable, (None, length) writable. False if it does not fit."""
        ring, free = self.rings[index], self.free_descs[index]
        direct = len(segments)
        if self.features & f.VIRTIO_RING_F_INDIRECT_DESC and self.random.random() < 0.5:
            direct = self.random.randrange(len(segments))
        needed = direct + (direct < len(segments))
        if needed > len(free) or len(segments) + 1 > len(self.free_blocks):
            return False
        chain = Chain()
        entries = []
        for content, length in segments:
            at = self._place(chain, length)
            if content is not None:
                self.memory.write(at, content)
            entries.append((at, length, 0 if content is not None else WRITE))
        table, ids = -1, [free.pop() for _ in range(needed)]
        chain.descs = ids
        for k in range(needed):
            flags, following = (NEXT, ids[k + 1]) if k + 1 < needed else (0, self.random.randrange(65536))
            if k < direct:
                at, length, direction = entries[k]
                ring.put_desc(ids[k], at, length, flags | direction, following)
            else:
                # An indirect table may lie anywhere, and its own WRITE flag means nothing (2.7.5.3.2).
                table = self._place(chain, 16 * (len(segments) - direct))
                flags = INDIRECT | self.random.choice((0, WRITE))
                ring.put_desc(ids[k], table, 16 * (len(segments) - direct), flags, following)
        for k, (at, length, direction) in enumerate(entries[direct:]):
            more = NEXT if direct + k + 1 < len(segments) else 0
            self.memory.write(table + 16 * k, struct.pack("<QIHH", at, length, more | direction, k + 1))
        ring.offer(ids[0])
        self.in_flight[index][ids[0]] = chain
        return True

    def _cut(self, length: int, pieces: int) -> list[int]:
        cuts = sorted(self.random.randrange(1, length) for _ in range(pieces - 1)) if length > pieces else []
        parts = [b - a for a, b in zip([0, *cuts], [*cuts, length], strict=True)]
        return [part for part in parts if part]

    def send(self, frame: bytes) -> bool:
        data = bytes(f.header_len(self.features)) + frame
        segments: list[tuple[bytes | None, int]] = []
        at = 0
        for part in self._cut(len(data), self.random.randint(1, 4)):
            segments.append((data[at : at + part], part))
            at += part
        if self.random.random() < 0.1:
            segments.append((None, 64))
        return self._put(TRANSMITQ, segments)

    def post(self) -> bool:
        length = self.random.choice((64, 300, 1526, 1700))
        return self._put(RECEIVEQ, [(None, part) for part in self._cut(length, self.random.randint(1, 3))])

    def frame(self) -> bytes:
        length = self.random.choice((14, 60, 61, self.random.randint(14, 1514), 1514, 3000))
        return self.random.randbytes(length)

    def batch(self, endpoint: Endpoint) -> None:
        """Take back what was used, and lay out the next chains; give the endpoint frames if it takes them by hand."""
        for index, ring in enumerate(self.rings):
            for head, _ in ring.taken():
                chain = self.in_flight[index].pop(head)
                self.free_descs[index] += chain.descs
                self.free_blocks += chain.blocks
        for _ in range(self.random.randrange(20)):
            self.post()
        for _ in range(self.random.randrange(12)):
            self.send(self.frame())
        if self.random.random() < 0.2:
            self.send(b"")
            self.send(self.random.randbytes(13))
        for ring in self.rings:
            ring.avail_flags = self.random.choice((0, spec.VIRTQ_AVAIL_F_NO_INTERRUPT))
            ring.used_event = ring.used_idx + self.random.randint(-2, 4)
        if isinstance(endpoint, MailboxEndpoint):
            for _ in range(self.random.randrange(16)):
                endpoint.put(self.frame())
        elif isinstance(endpoint, GenerateEndpoint):
            endpoint.rows[0, r.EP_LIMIT] += self.random.randrange(16)

    def content(self) -> list[bytes]:
        return [self.memory.read(gpa, length) for gpa, length in REGIONS]


class Machine:
    """A guest, an endpoint, and whoever runs the rings: `kind` is userspace, worker, process, or in turn."""

    def __init__(self, kind: str, endpoint: Endpoint, guest: Guest) -> None:
        self.kind, self.endpoint, self.guest = kind, endpoint, guest
        self.stepped = Datapath(1)
        self.worker = WorkerProcess(1) if kind == "process" else Worker(1)
        self.events = [EventFd() for _ in range(4)]
        queues = [Virtqueue(r.num, r.desc, r.avail, r.used, True, r.used_idx) for r in guest.rings]
        self.rings = vhost_net.Rings(
            queues, self.events[:2], self.events[2:], endpoint, guest.memory, None, guest.features, None
        )
        self._mine: Sequence[Backend] = [UserspaceBackend(self.stepped, 0)]
        self.userspace = kind != "worker" and kind != "process"
        with self._awake():
            vhost_net.start(self._owner(), self.rings)

    def _owner(self) -> Sequence[Backend]:
        return self._mine if self.userspace else self.worker.backends

    @contextmanager
    def _awake(self) -> Iterator[None]:
        """Wake whoever runs the rings, hold it for the length of the block, and wait until it sleeps again."""
        self.stepped.bell.signal()
        self.stepped.run(-1, 0, 1)
        self.stepped.bell.clear()
        with self.worker.backends[0].hold():
            yield
            sleeps = int(self.worker.datapath.ctl[r.CTL_SLEEPS])
        self.stepped.run(-1, 0, 1)
        wait_for(lambda: int(self.worker.datapath.ctl[r.CTL_SLEEPS]) > sleeps, "the worker sleeps")

    def step(self) -> list[bytes]:
        """Lay out a batch and run until there is nothing left to do; return the frames that came out."""
        if self.kind == "in turn":
            with self._awake():
                vhost_net.stop(self._owner(), self.rings)
                self.userspace = not self.userspace
                vhost_net.start(self._owner(), self.rings)
        with self._awake():
            self.guest.batch(self.endpoint)
        return self.endpoint.take_raw() if isinstance(self.endpoint, MailboxEndpoint) else []

    def bases(self) -> list[int]:
        return [backend.get_vring_base(i) for backend in self._owner() for i in (RECEIVEQ, TRANSMITQ)]

    def close(self) -> None:
        vhost_net.stop(self._owner(), self.rings)
        self.worker.close()
        self.stepped.close()
        for event in self.events:
            event.close()
        self.endpoint.close()
        self.guest.memory.close()


ENDPOINTS: dict[str, Callable[[], Endpoint]] = {
    "mailbox": MailboxEndpoint,
    "echo": EchoEndpoint,
    "macswap": MacswapEndpoint,
    "reflect": ReflectEndpoint,
    "generate": lambda: GenerateEndpoint(size=100, count=0),
}


def compare(kinds: Sequence[str], endpoint: str, seed: int, features: int, num: int, start: int, batches: int) -> int:
    """Run the same batches on all *kinds*, and compare after each; return the chains used."""
    with ExitStack() as stack:
        machines = []
        for kind in kinds:
            machine = Machine(kind, ENDPOINTS[endpoint](), Guest(seed, features, num, start))
            stack.callback(machine.close)
            machines.append(machine)
        first, *others = machines
        for n in range(batches):
            frames = first.step()
            content = first.guest.content()
            for machine in others:
                assert machine.step() == frames, f"batch {n}: {machine.kind} delivered other frames"
                for (gpa, _), mine, theirs in zip(REGIONS, content, machine.guest.content(), strict=True):
                    if mine != theirs:
                        at = next(i for i, (a, b) in enumerate(zip(mine, theirs, strict=True)) if a != b)
                        raise AssertionError(f"batch {n}: {machine.kind} left another byte at {gpa + at:#x}")
                assert machine.endpoint.counters() == first.endpoint.counters()
                assert (machine.endpoint.rows[:, KEPT] == first.endpoint.rows[:, KEPT]).all()
        bases = first.bases()
        assert all(machine.bases() == bases for machine in others)
        used = [(idx - start) & 0xFFFF for idx in bases]
        status = [backend.status(i) for m in machines for backend in m._owner() for i in (RECEIVEQ, TRANSMITQ)]
        assert not any(status)
        return sum(used)


@settings(max_examples=scaled(40, 4), deadline=None, suppress_health_check=list(HealthCheck))
@given(
    seed=st.integers(0, 1 << 32),
    features=st.sets(st.sampled_from(CHOICES)).map(sum),
    num=st.sampled_from((2, 4, 8, 16, 64)),
    start=st.sampled_from((0, 1, 0xFFF0, 0xFFFF)),
    endpoint=st.sampled_from(sorted(ENDPOINTS)),
)
def test_userspace_and_vhost_leave_the_same_memory(
    seed: int, features: int, num: int, start: int, endpoint: str
) -> None:
    compare(("userspace", "worker", "in turn"), endpoint, seed, features, num, start, scaled(8, 4))


@pytest.mark.parametrize("endpoint", ["echo", "generate"])
@pytest.mark.parametrize("features", [0, sum(CHOICES)])
def test_a_worker_process_leaves_the_same_memory(endpoint: str, features: int) -> None:
    assert compare(("userspace", "process"), endpoint, features, features, 16, 0xFFF0, scaled(30, 4)) > 0


@pytest.mark.parametrize("endpoint", sorted(ENDPOINTS))
def test_many_batches_move_many_frames(endpoint: str) -> None:
    batches = scaled(100, 6)
    used = compare(("userspace", "worker", "in turn"), endpoint, 1, sum(CHOICES), 64, 0xFF00, batches)
    assert used > batches
