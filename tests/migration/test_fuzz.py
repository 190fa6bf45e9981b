"""A destination that is sent anything at all refuses it, does nothing meanwhile, and can still be migrated to.

Each input is a recorded stream with things done to it: bits, sections, and payloads whose checksum is made right again, so
that what is behind the checksum is reached. 3,000 inputs; 200,000 with VNETDP_CAMPAIGN=1 (`make campaign`).
"""

from __future__ import annotations

import ctypes
import gc
import logging
import os
import random
import struct
import tracemalloc
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace

import pytest

from tests.by_hand import PATIENCE, no_descriptor_leaks
from tests.migration.rig import SMALL, Tape, migrate, record, section_bytes, wire_bytes
from vnetdp.errors import VnetdpError
from vnetdp.migration.channel import COMMIT, POLICIES, VHOST
from vnetdp.migration.invariants import resources, violations
from vnetdp.migration.machine import Machine, make_wire
from vnetdp.migration.seed import SeedTarget
from vnetdp.migration.stream import MAX_PAYLOAD
from vnetdp.migration.target import Target
from vnetdp.owners import Owner

INPUTS = 200_000 if os.environ.get("VNETDP_CAMPAIGN") == "1" else 3_000
SHOWN = 20_000
CUT_OFF = "the stream is cut off"  # what a stream without a fault ends with: nobody commits

Part = tuple[bytes, int, int, bytes]  # name, phase, version, payload

EXTREMES = [0, 1, 2, 3, 0x7F, 0x80, 0xFF, 0x3FF, 0x400, 0x7FFF, 0x8000, 0xFFFF, 1 << 31, (1 << 32) - 1, (1 << 63) - 2]
EXTREMES += [(1 << 63) - 16, 1 << 63, (1 << 64) - 1, 1 << 52]

ENDS = (1 << 62, (1 << 63) - 16, (1 << 63) - 4, (1 << 63) - 2, -16)  # addresses near the last that there can be


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """Every input costs a warning."""
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)


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

    def feed(self, data: bytes) -> str:
        """Have the machine take a stream, which ends without a commit; return why it failed, and begin anew."""
        side = (SeedTarget if self.policy == "seed" else Target)(self.machine, Tape(data), self.policy)
        report = side.run()
        device = self.machine.device
        assert report.outcome == "source"
        assert report.error
        assert device.owner is Owner.NOBODY
        assert device.owners.prepared is None
        device.load_state(self._fresh)
        return report.error

    def check(self) -> None:
        """Check that nobody touched a ring or a frame."""
        assert violations(self.machine, final=False) == []
        assert self._moved() == self._frames

    def take_a_valid_one(self) -> None:
        """Migrate the source into the machine, as after its start."""
        for region in self.machine.memory.regions:
            ctypes.memset(self.machine.memory.mem[region.gpa :].ctypes.data, 0, region.length)
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


@pytest.fixture(params=POLICIES)
def bed(request: pytest.FixtureRequest) -> Iterator[Bed]:
    with no_descriptor_leaks():
        bed = Bed(request.param)
        yield bed
        bed.close()


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


# --- the tests ---


def test_whatever_comes_is_refused(bed: Bed, capsys: pytest.CaptureFixture[str]) -> None:
    errors: Counter[str] = Counter()
    assert bed.feed(b"".join(section_bytes(*part) for part in bed.pool[bed.policy])) == CUT_OFF
    gc.collect()
    before = resources()
    for n in range(INPUTS // len(POLICIES)):
        data = fuzzed(random.Random(n), bed.pool[bed.policy], bed.pool)
        try:
            errors[bed.feed(data)[:24]] += 1
        except Exception as e:
            raise AssertionError(f"input {n}") from e
        if n % 500 == 0:
            bed.check()
        if n % SHOWN == SHOWN - 1:
            with capsys.disabled():
                print(f"\n{bed.policy}: {n + 1} inputs, {len(errors)} reasons", end="", flush=True)  # noqa: T201
    bed.check()
    gc.collect()
    assert resources() == before
    assert len(errors) > 20  # so many reasons: all of the destination was reached
    assert errors[CUT_OFF] > 10  # as were both ends
    bed.take_a_valid_one()


def test_noise_is_refused(bed: Bed) -> None:
    rnd = random.Random(1)
    for _ in range(300):
        bed.feed(rnd.randbytes(rnd.randrange(200)))
    for part in bed.pool[bed.policy]:
        for _ in range(20):
            noise = rnd.randbytes(rnd.randrange(300))
            setup = bed.pool[bed.policy][0]
            bed.feed(section_bytes(*setup) + section_bytes(*part[:3], noise))
    bed.check()
    bed.take_a_valid_one()


def test_no_count_makes_it_ask_for_more_memory_than_came(bed: Bed) -> None:
    """Each two and four bytes of the small sections, and of a ram section's start, as large as can be."""
    own = bed.pool[bed.policy]
    whole = sum(len(part[3]) for part in own)
    bed.feed(b"".join(section_bytes(*part) for part in own))
    tracemalloc.start()
    try:
        for at, (name, phase, version, payload) in enumerate(own):
            start = b"".join(section_bytes(*part) for part in own[:at])
            for place in range(0, min(len(payload), 600), 1 if len(payload) < 300 else 7):
                data = payload[:place] + b"\xff" * 4 + payload[place + 4 :]
                data = start + section_bytes(name, phase, version, data)
                tracemalloc.reset_peak()
                held = tracemalloc.get_traced_memory()[0]
                bed.feed(data)
                assert tracemalloc.get_traced_memory()[1] - held < whole + 4 * MAX_PAYLOAD
    finally:
        tracemalloc.stop()


def test_a_ring_at_the_end_of_all_addresses(bed: Bed) -> None:
    """Addresses that are aligned, and that something added to them overflows."""
    own = bed.pool[bed.policy]
    for n, (name, phase, version, payload) in enumerate(own):
        if name not in (b"virtio-net", b"virtio-net-early"):
            continue
        queue = bed.source.device.queues[1]
        for address in (queue.desc, queue.avail, queue.used):
            was = struct.pack("<q", address)
            assert was in payload
            for wrong in (*ENDS, bed.machine.memory.end - 16, bed.machine.memory.end):
                parts = own.copy()
                parts[n] = name, phase, version, payload.replace(was, struct.pack("<q", wrong))
                bed.feed(b"".join(section_bytes(*part) for part in parts))
    bed.check()
    bed.take_a_valid_one()


def test_sections_one_by_one_raise_nothing_else(bed: Bed) -> None:
    """A section that fails leaves a destination that can be sent the next; `load` raises our errors alone."""
    rnd = random.Random(2)
    side = Target(bed.machine, Tape(), bed.policy)
    channel = Tape(wire_bytes(COMMIT))
    with pytest.raises(VnetdpError):
        side.load(channel.receive(POLICIES[bed.policy]))
    for _ in range(200):
        name, phase, version, payload = rnd.choice(bed.pool[bed.policy])
        data = section_bytes(name, phase, version, scribbled(rnd, payload) if rnd.random() < 0.5 else payload)
        try:
            side.load(Tape(data).receive(POLICIES[bed.policy]))
        except VnetdpError:
            continue
    side.give_up()
    bed.check()
