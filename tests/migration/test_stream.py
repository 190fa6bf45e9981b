"""The stream: what a section may be and when it may come. Whatever else comes fails the migration, and no more."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.migration.rig import SMALL, Meddle, Tape, migrate, record, section_bytes, wire_bytes
from tests.support.by_hand import no_descriptor_leaks, wait_for
from vnetdp.device.owners import Owner
from vnetdp.endpoints.base import Endpoint
from vnetdp.lab.invariants import violations
from vnetdp.migration.channel import CHECK, COMMIT, DELTA, DEVICE, EARLY, END, INDICES, POLICIES, RAM, SETUP, VHOST
from vnetdp.migration.machine import Machine, make_wire
from vnetdp.migration.seed import SeedTarget
from vnetdp.migration.stream import Cursor, Phase, Section, SectionType, StreamError, decode, from_bytes
from vnetdp.migration.target import Target

ALL = {name: section for sections in POLICIES.values() for name, section in sections.items()}
HEADER = 12
PAYLOAD = bytes(range(100))


# --- a section ---


@given(st.sampled_from(sorted(ALL)), st.binary(max_size=300))
def test_what_is_encoded_is_decoded(name: str, payload: bytes) -> None:
    payload = payload[: ALL[name].longest]
    data = wire_bytes(ALL[name], payload)
    read = from_bytes(data * 2)
    for _ in range(2):
        section = decode(read, ALL)
        assert (section.type, section.version, bytes(section.payload)) == (ALL[name], ALL[name].version, payload)
    assert data == section_bytes(name.encode(), ALL[name].phase, ALL[name].version, payload)


def test_older_versions_are_read_as_far_as_they_are_known() -> None:
    known = {"thing": SectionType("thing", Phase.FINAL, version=3, minimum_version=2)}
    for version in range(6):
        data = section_bytes(b"thing", Phase.FINAL, version, b"")
        if version in (2, 3):
            assert decode(from_bytes(data), known).version == version
        else:
            with pytest.raises(StreamError, match=f"thing has version {version}; this side reads 2 to 3"):
                decode(from_bytes(data), known)


def test_a_section_cut_off_at_every_byte() -> None:
    data = wire_bytes(RAM, PAYLOAD)
    for length in range(len(data)):
        with pytest.raises(StreamError):
            decode(from_bytes(data[:length]), ALL)


def test_every_flipped_bit_is_found() -> None:
    data = wire_bytes(RAM, PAYLOAD)
    for bit in range(8 * len(data)):
        wrong = bytearray(data)
        wrong[bit // 8] ^= 1 << bit % 8
        with pytest.raises(StreamError):
            decode(from_bytes(bytes(wrong)), ALL)


def test_nothing_is_read_of_a_section_that_is_too_long() -> None:
    """Nor of one that is unknown, or comes in a wrong phase or version: its header is all that is looked at."""
    wrong = [
        section_bytes(b"ram", Phase.ITERATE, 1, b"", length=0xFFFF_FFFF),
        section_bytes(b"ram", Phase.ITERATE, 1, b"", length=RAM.longest + 1),
        section_bytes(b"setup", Phase.SETUP, 1, b"", length=SETUP.longest + 1),
        section_bytes(b"end", Phase.FINAL, 1, b"", length=1),
        section_bytes(b"ran", Phase.ITERATE, 1, b"", length=1 << 20),
        section_bytes(b"ram", Phase.EARLY, 1, b"", length=1 << 20),
        section_bytes(b"ram", Phase.ITERATE, 2, b"", length=1 << 20),
        section_bytes(b"x" * 33, Phase.ITERATE, 1, b"", length=1 << 20),
    ]
    for data in wrong:
        asked: list[int] = []
        read = from_bytes(data)

        def counted(length: int, read: Callable[[int], memoryview] = read, asked: list[int] = asked) -> memoryview:
            asked.append(length)
            return read(length)

        with pytest.raises(StreamError):
            decode(counted, ALL)
        assert sum(asked) <= HEADER + 32


def test_a_cursor_reads_a_payload_to_its_end() -> None:
    cursor = Cursor(b"abc", "this")
    assert bytes(cursor.take(2)) == b"ab"
    assert cursor.left == 1
    with pytest.raises(StreamError, match="this has 1 bytes too many"):
        cursor.end()
    with pytest.raises(StreamError, match="this is cut off"):
        cursor.take(2)
    cursor.take(1)
    cursor.end()


Make = Callable[[bytes], bytes | None]


# --- whatever is wrong with a stream, the source goes on ---


@pytest.fixture(scope="module")
def wire() -> Iterator[Endpoint]:
    with make_wire(SMALL) as wire:
        yield wire


@pytest.fixture(scope="module")
def source(wire: Endpoint) -> Iterator[Machine]:
    """A machine that runs all the time."""
    with Machine(SMALL, wire.block.fd) as machine:
        machine.boot()
        machine.run()
        # Not before its threads have loaded their kernels: that opens files, which would count as leaked.
        wait_for(lambda: all(ledger.delivered for ledger in machine.ledgers()), "frames both ways")
        yield machine


@pytest.fixture
def target(wire: Endpoint) -> Iterator[Machine]:
    with no_descriptor_leaks(), Machine(SMALL, wire.block.fd) as machine:
        yield machine


def fails(source: Machine, target: Machine, policy: str, says: str, meddle: Meddle = wire_bytes, at: str = "") -> None:
    """Migrate, which fails on both sides for the reason *says*; afterwards all is as before. at: the target's policy."""
    ours, theirs = migrate(source, target, policy, at, meddle)
    assert says in theirs.error
    assert (ours.outcome, ours.error) == ("source", f"the destination failed: {theirs.error}")
    assert theirs.outcome == "source"
    assert target.device.owner is Owner.NOBODY
    assert violations(target, final=False) == []
    assert violations(source) == []
    before = [ledger.delivered for ledger in source.ledgers()]
    wait_for(
        lambda: all(now.delivered > then + 5 for now, then in zip(source.ledgers(), before, strict=True)),
        "frames both ways at the source",
    )
    assert all(not (x.duplicated or x.reordered or x.corrupted) for x in source.ledgers())


def instead_of(section: SectionType, make: Make, other: SectionType | None = None, make_other: Make = bytes) -> Meddle:
    """Return what sends something else in place of *section*, and of *other*."""

    def meddle(kind: SectionType, payload: bytes) -> bytes | None:
        if kind is section:
            return make(payload)
        return make_other(payload) if kind is other else wire_bytes(kind, payload)

    return meddle


def of(section: SectionType, payload: bytes, **wrong: int) -> bytes:
    """Return *section* with what is *wrong* about it."""
    fields = {"phase": int(section.phase), "version": section.version, **wrong}
    return section_bytes(section.name.encode(), payload=payload, **fields)


def damaged(data: bytes) -> bytes:
    return data[:-1] + bytes([data[-1] ^ 1])


WRONG: dict[str, tuple[str, str, Meddle]] = {
    "magic": ("delta", "magic 0x4d57 and reserved 0, not 0x4d56 and 0", instead_of(RAM, lambda p: of(RAM, p, magic=0x4D57))),
    "reserved": ("delta", "magic 0x4d56 and reserved 1, not 0x4d56 and 0", instead_of(RAM, lambda p: of(RAM, p, zero=1))),
    "checksum": ("delta", "ram is damaged", instead_of(RAM, lambda p: damaged(wire_bytes(RAM, p)))),
    "phase": ("delta", "virtio-net-early comes in phase 3", instead_of(EARLY, lambda p: of(EARLY, p, phase=3))),
    "version": ("none", "virtio-net has version 10", instead_of(DEVICE, lambda p: of(DEVICE, p, version=10))),
    "later version": ("none", "virtio-net has version 12", instead_of(DEVICE, lambda p: of(DEVICE, p, version=12))),
    "length": ("none", "end claims 1 bytes", instead_of(END, lambda _: of(END, b"x"))),
    "unknown": ("none", "unknown section b'new'", instead_of(END, lambda _: section_bytes(b"new", 3, 1, b""))),
    "name": ("none", "a section's name has 200 bytes", instead_of(END, lambda _: section_bytes(b"n" * 200, 3, 1, b""))),
    "no setup": ("none", "ram comes before the setup", instead_of(SETUP, lambda _: b"")),
    "two setups": ("none", "the setup comes twice", instead_of(SETUP, lambda p: 2 * wire_bytes(SETUP, p))),
    "another setup": ("none", "the source's machine differs", instead_of(SETUP, lambda _: wire_bytes(SETUP, b"{}"))),
    "no JSON": ("none", "the setup cannot be read", instead_of(SETUP, lambda _: wire_bytes(SETUP, b"\xff" * 9))),
    "no device": ("none", "ends without the device's state", instead_of(DEVICE, lambda _: b"")),
    "no early": ("delta", "a delta comes without an early state", instead_of(EARLY, lambda _: b"")),
    "two devices": ("none", "virtio-net comes twice", instead_of(DEVICE, lambda p: 2 * wire_bytes(DEVICE, p))),
    "early at the end": ("delta", "virtio-net-early comes after", instead_of(END, lambda _: wire_bytes(EARLY))),
    "pages at the end": ("delta", "ram comes after", instead_of(END, lambda _: wire_bytes(RAM, bytes(4)))),
    "rising priority": ("delta", "check comes after", instead_of(CHECK, lambda _: b"", END, lambda _: wire_bytes(CHECK))),
    "early commit": ("none", "commit comes out of place", instead_of(DEVICE, lambda _: wire_bytes(COMMIT))),
    "end": ("delta", "the other side is gone", instead_of(END, lambda _: None)),
}  # fmt: skip


@pytest.mark.parametrize("what", WRONG)
def test_the_source_goes_on_after(what: str, source: Machine, target: Machine) -> None:
    policy, says, meddle = WRONG[what]
    fails(source, target, policy, says, meddle)


@pytest.mark.parametrize(
    ("policy", "at", "section"),
    [
        ("seed", "none", "virtio-net-early"),
        ("delta", "none", "virtio-net-early"),
        ("none", "delta", "virtio-net"),
        ("seed", "delta", "virtio-delta"),
        ("delta", "seed", "virtio-net-delta"),
    ],
)
def test_both_sides_need_the_same_policy(source: Machine, target: Machine, policy: str, at: str, section: str) -> None:
    fails(source, target, policy, f"unknown section b'{section}': both sides need the same policy and version", at=at)


def test_the_patch_takes_a_source_without_it() -> None:
    """Its sections may all be left out: so does one that does not have them."""
    with make_wire(SMALL) as wire, Machine(SMALL, wire.block.fd) as here, Machine(SMALL, wire.block.fd) as there:
        here.boot()
        here.run()
        ours, theirs = migrate(here, there, "none", "seed")
        assert (ours.outcome, theirs.error) == ("vhost", "")
        assert theirs.violations == violations(there) == violations(here) == []
        assert there.drain()
        assert all(ledger.clean for ledger in there.ledgers())


def test_a_stream_cut_off_anywhere(source: Machine, wire: Endpoint) -> None:
    """All along each section, but the pages', and in the middle of those."""
    sections = record(source, "delta")
    with Machine(SMALL, wire.block.fd) as target:
        target.adopt()
        ours = target.driver
        data = b"".join(wire_bytes(*section) for section in sections)
        cuts, at = [], 0
        for kind, payload in sections:
            end = at + len(wire_bytes(kind, payload))
            cuts += [at, at + 1, at + HEADER, (at + end) // 2, end - 1] if kind is RAM else list(range(at, end, 7))
            at = end
        for cut in cuts:
            target.driver = ours
            report = Target(target, Tape(data[:cut]), "delta").run()
            assert report.error == "the stream is cut off"
            assert violations(target, final=False) == []


# --- the order of sections, one by one ---


def section(kind: SectionType, payload: bytes = b"") -> Section:
    return Section(kind, kind.version, memoryview(payload))


@pytest.fixture
def loader(source: Machine, target: Machine) -> Callable[..., None]:
    """Return a function that loads a recorded stream's sections of a policy, by their types."""

    def load(policy: str, *kinds: SectionType) -> None:
        recorded = record(source, policy)
        side = (SeedTarget if policy == "seed" else Target)(target, Tape(), policy)
        try:
            for kind in kinds:
                payloads = [payload for sent, payload in recorded if sent is kind] or [b""]
                for payload in payloads if kind is RAM else payloads[-1:]:
                    side.load(section(kind, payload))
        finally:
            side.give_up()

    return load


@pytest.mark.parametrize(
    ("policy", "kinds"),
    [
        ("none", [SETUP, RAM, DEVICE, END]),
        ("delta", [SETUP, RAM, EARLY, RAM, EARLY, RAM, DELTA, END]),
        ("seed", [SETUP, EARLY, RAM, INDICES, END]),
    ],
)
def test_what_may_come(loader: Callable[..., None], policy: str, kinds: list[SectionType]) -> None:
    loader(policy, *kinds)


@pytest.mark.parametrize(
    ("policy", "kinds", "says"),
    [
        ("none", [RAM], "before the setup"),
        ("none", [DEVICE], "before the setup"),
        ("none", [SETUP, SETUP], "comes twice"),
        ("none", [SETUP, RAM, DEVICE, SETUP], "setup comes after virtio-net"),
        ("none", [SETUP, RAM, DEVICE, RAM], "ram comes after virtio-net"),
        ("none", [SETUP, RAM, DEVICE, CHECK], "check comes after virtio-net"),
        ("none", [SETUP, RAM, DEVICE, DEVICE], "virtio-net comes twice"),
        ("none", [SETUP, RAM, END], "ends without the device's state"),
        ("delta", [SETUP, RAM, DELTA], "without an early state"),
        ("delta", [SETUP, EARLY, RAM, DELTA, EARLY], "virtio-net-early comes after virtio-net-delta"),
        ("seed", [SETUP, EARLY, RAM, INDICES, END, VHOST], "virtio-net-vhost comes after end"),
        ("delta", [SETUP, COMMIT], "commit comes out of place"),
    ],
)
def test_what_may_not_come(loader: Callable[..., None], policy: str, kinds: list[SectionType], says: str) -> None:
    with pytest.raises(StreamError, match=says):
        loader(policy, *kinds)
