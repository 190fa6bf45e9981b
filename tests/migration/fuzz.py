"""Streams with things done to them, and a machine that takes them: what `test_fuzz` runs, and its process for commits.

`main` feeds inputs that end with a commit: a machine whose source says so runs, whatever it was sent. It tells the number of
each input before it takes it, so that its end says which it was.
"""

from __future__ import annotations

import ctypes
import json
import logging
import random
import struct
import time
from collections import Counter
from dataclasses import replace

from tests.migration.rig import SMALL, Tape, migrate, record, section_bytes
from tests.support.by_hand import PATIENCE
from vnetdp.device.owners import Owner
from vnetdp.lab.invariants import violations
from vnetdp.migration.channel import COMMIT, POLICIES, VHOST
from vnetdp.migration.machine import Machine, make_wire
from vnetdp.migration.seed import SeedTarget
from vnetdp.migration.stream import MAX_PAYLOAD
from vnetdp.migration.target import Target
from vnetdp.virtio.queue import ring_len
from vnetdp_kernels import spec

CUT_OFF = "the stream is cut off"  # what a stream without a fault ends with: nobody commits
RUNS = "it runs"
_RUN_S = 0.001  # a machine that was committed moves some frames, or breaks
_STRUCTURE = ("I5", "I6", "I7")  # what holds of any machine; the others a guest can break, for itself

Part = tuple[bytes, int, int, bytes]  # name, phase, version, payload

EXTREMES = [0, 1, 2, 3, 0x7F, 0x80, 0xFF, 0x3FF, 0x400, 0x7FFF, 0x8000, 0xFFFF, 1 << 31, (1 << 32) - 1, (1 << 63) - 2]
EXTREMES += [(1 << 63) - 16, 1 << 63, (1 << 64) - 1, 1 << 52]


class Once(Machine):
    """A machine that keeps the driver that it has: to make one takes longer than most inputs."""

    def adopt(self) -> None:
        if self.driver is None:
            super().adopt()


class Bed:
    """Two machines: one that streams are recorded of, and stands still then, and one that takes them."""

    def __init__(self, policy: str) -> None:
        self.policy = policy
        # A destination as the patch's binds before the commit, and prepares twice if it is told so: not with vhost, then.
        self.config = SMALL if policy != "seed" else replace(SMALL, vhost=False)
        self.wire = make_wire(self.config)
        self.source = Machine(self.config, self.wire.block.fd)
        self.machine = Once(self.config, self.wire.block.fd)
        self.source.boot()
        self.source.run()
        self.pool = {name: self._record(name) for name in POLICIES}
        self.source.stop()
        self._fresh = self.machine.device.save_state()
        self._frames = self._moved()

    def _record(self, policy: str) -> list[Part]:
        parts = [(kind.name.encode(), int(kind.phase), kind.version, p) for kind, p in record(self.source, policy)]
        if policy == "seed":
            parts.insert(-1, (VHOST.name.encode(), VHOST.phase, VHOST.version, b""))
        return parts

    def _moved(self) -> tuple[bytes, bytes]:
        return self.wire.rows.tobytes(), self.wire.ledger.tobytes()

    def feed_and_commit(self, data: bytes) -> str:
        """Have the machine take a stream with a commit behind it; return RUNS, or why it failed, and begin anew."""
        self.clear()
        commit = section_bytes(COMMIT.name.encode(), COMMIT.phase, COMMIT.version, b"")
        side = (SeedTarget if self.policy == "seed" else Target)(self.machine, Tape(data + commit), self.policy)
        report = side.run()
        if report.outcome != "source":
            time.sleep(_RUN_S)
            assert [text for text in violations(self.machine) if text.startswith(_STRUCTURE)] == []
            self.machine.stop()
            self.machine.end_announcing()
        assert self.machine.device.owner is Owner.NOBODY
        assert [text for text in violations(self.machine, final=False) if text.startswith(_STRUCTURE)] == []
        self.machine.device.load_state(self._fresh)
        return report.error or RUNS

    def feed(self, data: bytes) -> str:
        """Have the machine take a stream, which ends without a commit; return why it failed, and begin anew."""
        side = (SeedTarget if self.policy == "seed" else Target)(self.machine, Tape(data), self.policy)
        report = side.run()
        device = self.machine.device
        assert report.outcome == "source"
        assert report.error
        assert device.owner is Owner.NOBODY
        assert not device.vhost_prepared
        device.load_state(self._fresh)
        return report.error

    def clear(self) -> None:
        """Empty guest memory, so that nothing of the input before is left."""
        memory = self.machine.memory
        ctypes.memset(memory.mem.ctypes.data, 0, memory.end)

    @property
    def pages(self) -> set[int]:
        """Those of the rings, of the driver's memory, and of the ledger."""
        pages = {region.gpa // spec.PAGE_SIZE for region in self.source.memory.regions[1:]}
        for queue in self.source.device.queues:
            for at, length in zip((queue.desc, queue.avail, queue.used), ring_len(queue.num), strict=True):
                pages |= set(range(at // spec.PAGE_SIZE, (at + length - 1) // spec.PAGE_SIZE + 1))
        return pages

    def check(self) -> None:
        """Check that nobody touched a ring or a frame."""
        assert violations(self.machine, final=False) == []
        assert self._moved() == self._frames

    def take_a_valid_one(self) -> None:
        """Migrate the source into the machine, as after its start."""
        self.clear()
        self.machine.driver = None
        self.source.run()
        ours, theirs = migrate(self.source, self.machine, self.policy)
        assert (ours.error, theirs.error) == ("", "")
        assert theirs.violations == violations(self.machine) == violations(self.source) == []
        assert self.machine.drain(PATIENCE)
        assert all(ledger.clean and ledger.delivered for ledger in self.machine.ledgers())

    def close(self) -> None:
        self.machine.close()
        self.source.close()
        self.wire.close()


# --- what is done to a stream ---


def shuffled(rnd: random.Random, parts: list[Part], pool: dict[str, list[Part]]) -> list[Part]:
    """Return sections exchanged, repeated, left out, or with one of another stream among them."""
    parts = parts.copy()
    at, other = rnd.randrange(len(parts)), rnd.randrange(len(parts))
    match rnd.randrange(5):
        case 0:
            parts[at], parts[other] = parts[other], parts[at]
        case 1:
            parts.insert(other, parts[at])
        case 2 if len(parts) > 1:
            del parts[at]
        case 3:
            parts.insert(at, rnd.choice(pool[rnd.choice(list(pool))]))
        case _:
            parts = parts[:at] + rnd.choice(list(pool.values()))[other:]
    return parts or [rnd.choice(pool["none"])]


def scribbled(rnd: random.Random, payload: bytes) -> bytes:
    """Return a payload with bits, or whole numbers, replaced; or cut off, or with more at its end."""
    data = bytearray(payload)
    for _ in range(rnd.choice((1, 1, 1, 2, 3, 8))):
        # Counts are at the start and at the end, queues at the end.
        size = len(data)
        at = rnd.choice((0, rnd.randrange(size + 1), min(rnd.randrange(64), size), max(0, size - rnd.randrange(200))))
        match rnd.randrange(8):
            case 0 | 1 if at < len(data):
                data[at] ^= 1 << rnd.randrange(8)
            case 2:
                del data[at : at + rnd.choice((1, 2, 8, 31, 1 << 20))]
            case 3:
                data[at:at] = rnd.randbytes(rnd.choice((1, 2, 8, 31, 4096)))
            case _:
                length = rnd.choice((1, 2, 2, 4, 8, 8))
                number = rnd.choice(EXTREMES) & (1 << 8 * length) - 1
                data[at : at + length] = number.to_bytes(length, "little")[: len(data) - at]
    return bytes(data[:MAX_PAYLOAD])


def poisoned(rnd: random.Random, parts: list[Part], pages: set[int]) -> list[Part]:
    """Return sections in which words of some of these pages are others: guest memory is as hostile as all the rest."""
    last: dict[int, tuple[int, int]] = {}  # where each of them stands the last time that it is sent
    for n, (name, _, _, payload) in enumerate(parts):
        if name == b"ram":
            (count,) = struct.unpack_from("<I", payload)
            numbers = struct.unpack_from(f"<{count}q", payload, 4)
            last |= {
                number: (n, 4 + 8 * count + spec.PAGE_SIZE * k) for k, number in enumerate(numbers) if number in pages
            }
    places = list(last.values())
    parts = parts.copy()
    for _ in range(rnd.choice((1, 1, 2, 3, 8))):
        n, at = rnd.choice(places)
        name, phase, version, payload = parts[n]
        at += 8 * rnd.choice((rnd.randrange(32), rnd.randrange(128), rnd.randrange(spec.PAGE_SIZE // 8)))
        (was,) = struct.unpack_from("<Q", payload, at)
        word = rnd.choice((rnd.choice(EXTREMES), rnd.randrange(40), was + rnd.choice((-16, -1, 1, 16, 4096)), was << 1))
        parts[n] = name, phase, version, payload[:at] + struct.pack("<Q", word & (1 << 64) - 1) + payload[at + 8 :]
    return parts


def headed(rnd: random.Random, part: Part) -> bytes:
    """Return a section whose header is wrong, and whose checksum is not."""
    name, phase, version, payload = part
    match rnd.randrange(6):
        case 0:
            phase = rnd.randrange(8)
        case 1:
            version = rnd.choice((0, 2, 10, 12, 0xFFFF))
        case 2:
            name = rnd.choice((b"", b"x" * 255, rnd.randbytes(8), name[:-1], name + b"\0"))
        case 3:
            return section_bytes(
                name, phase, version, payload, length=rnd.choice((0, 1 << 20, (1 << 20) + 1, 0xFFFF_FFFF))
            )
        case 4:
            return section_bytes(name, phase, version, payload, magic=rnd.randrange(1 << 16))
        case _:
            return section_bytes(name, phase, version, payload, zero=rnd.choice((1, 0xFFFF)))
    return section_bytes(name, phase, version, payload)


def joined(parts: list[Part]) -> bytes:
    """Return a stream of sections."""
    return b"".join(section_bytes(*part) for part in parts)


def fuzzed(rnd: random.Random, own: list[Part], pool: dict[str, list[Part]]) -> bytes:
    """Return a stream that is *own* with one or more things done to it."""
    parts = own
    kind = rnd.randrange(10)
    if kind < 3:
        for _ in range(rnd.choice((1, 1, 2, 5))):
            parts = shuffled(rnd, parts, pool)
    if 2 <= kind < 8:
        parts = parts.copy()
        places = [n for n, part in enumerate(parts) if part[0] not in (b"ram", b"setup", b"end")] or [0]
        for _ in range(rnd.choice((1, 1, 2))):
            at = rnd.choice(places) if rnd.random() < 0.85 else rnd.randrange(len(parts))
            name, phase, version, payload = parts[at]
            parts[at] = name, phase, version, scribbled(rnd, payload)
    sections = [section_bytes(*part) for part in parts if part[0] != COMMIT.name.encode()]
    if kind == 8:
        at = rnd.randrange(len(parts))
        sections[at] = headed(rnd, parts[at])
    data = bytearray().join(sections)
    if kind == 9:
        for _ in range(rnd.choice((1, 1, 2, 8))):
            data[rnd.randrange(len(data))] ^= 1 << rnd.randrange(8)
        if rnd.random() < 0.5:
            del data[rnd.randrange(len(data)) :]
    return bytes(data)


# --- in a process of its own ---


def main(policy: str, first: int, count: int) -> None:
    """Feed inputs and tell their numbers; at the end, how often each reason was given."""
    logging.disable()
    bed = Bed(policy)
    own = bed.pool[policy]
    reasons: Counter[str] = Counter()
    assert bed.feed_and_commit(joined(own)) == RUNS
    for n in range(first, first + count):
        print(n, flush=True)  # noqa: T201
        rnd = random.Random(n)
        parts = poisoned(rnd, own, bed.pages) if n % 4 else own
        reasons[bed.feed_and_commit(fuzzed(rnd, parts, bed.pool) if n % 4 in (0, 3) else joined(parts))[:24]] += 1
    bed.close()
    print(json.dumps(reasons))  # noqa: T201
