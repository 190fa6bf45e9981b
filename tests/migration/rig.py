"""What the tests of migration share: two machines, a stream on tape, and a channel that sends what it should not."""

from __future__ import annotations

import socket
import struct
import threading
import zlib
from collections.abc import Callable

from tests.support.by_hand import wait_for
from vnetdp.device.owners import Owner
from vnetdp.lab.invariants import violations
from vnetdp.migration.channel import Channel
from vnetdp.migration.machine import Machine, MachineConfig
from vnetdp.migration.report import Report
from vnetdp.migration.seed import SeedTarget
from vnetdp.migration.source import Source
from vnetdp.migration.stream import MAX_PAYLOAD, SectionType, StreamError, encode, from_bytes
from vnetdp.migration.target import Target
from vnetdp_kernels import rows as r

MAGIC = 0x4D56
SMALL = MachineConfig(queue_pairs=2, num=16, rate=2000.0, first_idx=0xFFF0)

Meddle = Callable[[SectionType, bytes], bytes | None]


def wire_bytes(section: SectionType, payload: bytes = b"") -> bytes:
    """Return a section as it goes over the wire."""
    return b"".join(encode(section, payload))


def section_bytes(
    name: bytes,
    phase: int,
    version: int,
    payload: bytes,
    *,
    magic: int = MAGIC,
    zero: int = 0,
    length: int | None = None,
) -> bytes:
    """Return any section, right or wrong, with the checksum that belongs to it."""
    length = len(payload) if length is None else length
    head = struct.pack("<HBBHHI", magic, len(name), phase, version, zero, length) + name
    return head + payload + struct.pack("<I", zlib.crc32(head + payload))


class Tape(Channel):
    """A channel without a socket: reads from bytes, and keeps what is sent. No read may be longer than a section."""

    def __init__(self, data: bytes = b"") -> None:
        self._take = from_bytes(data)
        self.sections: list[tuple[SectionType, bytes]] = []
        self.sent = 0

    def send(self, section: SectionType, payload: bytes = b"") -> int:
        self.sections.append((section, bytes(payload)))
        return len(payload)

    def read(self, length: int) -> memoryview:
        assert 0 <= length <= MAX_PAYLOAD
        return self._take(length)

    def has_more(self) -> bool:
        return False

    def drain(self) -> None:
        pass

    def close(self) -> None:
        pass


def record(machine: Machine, policy: str) -> list[tuple[SectionType, bytes]]:
    """Return the sections that *machine*, which runs, sends before an answer; it goes on, since none comes."""
    tape = Tape()
    report = Source(machine, tape, policy, check=True).run()
    assert report.outcome == "source"
    return tape.sections


class Meddling(Channel):
    """A channel that puts on the wire what *meddle* makes of each section; None = the stream ends here."""

    def __init__(self, sock: socket.socket, meddle: Meddle) -> None:
        super().__init__(sock)
        self._meddle = meddle

    def send(self, section: SectionType, payload: bytes = b"") -> int:
        data = self._meddle(section, payload)
        try:
            if data is None:
                self.sock.shutdown(socket.SHUT_WR)
            else:
                self.sock.sendall(data)
        except OSError as e:
            raise StreamError(f"the other side is gone: {e}") from e
        return len(data or b"")


def migrate(
    source: Machine, target: Machine, policy: str, target_policy: str = "", meddle: Meddle = wire_bytes
) -> tuple[Report, Report]:
    """Migrate over a socket, each side in a thread of its own; return how it went on either side."""
    near, far = socket.socketpair()
    target_policy = target_policy or policy
    with near, far:
        destination = (SeedTarget if target_policy == "seed" else Target)(target, Channel(far), target_policy)

        def run() -> None:
            destination.run()
            while far.recv(1 << 16):  # a source that still sends reads the answer when it is done
                pass

        thread = threading.Thread(target=run)
        thread.start()
        report = Source(source, Meddling(near, meddle), policy, check=True).run()
        near.shutdown(socket.SHUT_WR)
        thread.join()
    return report, destination.report


Hook = Callable[[str], None]


def move(
    source: Machine,
    target: Machine,
    at: Hook = lambda _: None,
    at_target: Hook = lambda _: None,
    policy: str = "delta",
    kind: type[Channel] = Channel,
) -> tuple[Report, Report]:
    """As `migrate`, each side told the points that it reaches; what the source raises is raised."""
    near, far = socket.socketpair()
    with near, far:
        destination = (SeedTarget if policy == "seed" else Target)(target, Channel(far), policy, at_target)
        thread = threading.Thread(target=destination.run)
        thread.start()
        try:
            report = Source(source, kind(near), policy, at, check=True).run()
        finally:
            near.shutdown(socket.SHUT_WR)
            thread.join()
    return report, destination.report


def failing(point: str, error: BaseException) -> Hook:
    """Return what raises *error* at a point."""

    def at(reached: str) -> None:
        if reached == point:
            raise error

    return at


def assert_runs(machine: Machine) -> None:
    """Frames go both ways, vhost has the rings, and nothing is left of a migration."""
    enough = machine.wire.rows[:, (r.EP_TO_WIRE, r.EP_FROM_WIRE)] + 5
    wait_for(lambda: bool((machine.wire.rows[:, (r.EP_TO_WIRE, r.EP_FROM_WIRE)] >= enough).all()), "frames both ways")
    assert violations(machine) == []
    assert machine.device.owner is Owner.VHOST
    assert machine.device.log is None
    assert machine.ram is None
