"""The stream: named sections, each with its version, length and checksum. Everything that is read is hostile.

A section on the wire, little endian: magic u16, name length u8, phase u8, version u16, 0 u16, payload length u32, then
name, payload, and the CRC-32 of all that. No section is longer than MAX_PAYLOAD, and nothing is allocated for one
before its header was checked against the sections that the reader knows.
"""

from __future__ import annotations

import enum
import struct
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from ..errors import VnetdpError

_HEADER = struct.Struct("<HBBHHI")
_CRC = struct.Struct("<I")
_MAGIC = 0x4D56
_NAME_LEN = 32
MAX_PAYLOAD = 1 << 20


class StreamError(VnetdpError):
    """The stream is broken or invalid: the migration fails, and the source goes on."""


class Phase(enum.IntEnum):
    """When a section may come."""

    SETUP = 0
    EARLY = 1  # while the source runs, again and again
    ITERATE = 2
    FINAL = 3  # after the source has stopped
    CONTROL = 4  # answers and orders between the two sides


@dataclass(frozen=True)
class SectionType:
    """A section that can come: its versions, its longest payload in bytes, and when it is loaded among others.

    Sections of one phase are saved and loaded by falling priority.
    """

    name: str
    phase: Phase
    version: int = 1
    minimum_version: int = 1
    priority: int = 1
    longest: int = MAX_PAYLOAD


@dataclass(frozen=True)
class Section:
    """A section as it came."""

    type: SectionType
    version: int
    payload: memoryview


def encode(section: SectionType, payload: bytes | bytearray | memoryview) -> list[bytes | bytearray | memoryview]:
    """Return a section's parts, in order, as `sendmsg` takes them."""
    name = section.name.encode()
    head = _HEADER.pack(_MAGIC, len(name), section.phase, section.version, 0, len(payload)) + name
    crc = zlib.crc32(payload, zlib.crc32(head))
    return [head, payload, _CRC.pack(crc)]


def decode(read: Callable[[int], memoryview], known: Mapping[str, SectionType]) -> Section:
    """Read the next section. *read* gives exactly so many bytes, or raises StreamError at the stream's end."""
    head = read(_HEADER.size)
    magic, name_len, phase, version, zero, length = _HEADER.unpack(head)
    if magic != _MAGIC or zero:
        raise StreamError(f"not a migration stream: magic {magic:#x} and reserved {zero}, not {_MAGIC:#x} and 0")
    if name_len > _NAME_LEN:
        raise StreamError(f"a section's name has {name_len} bytes, of at most {_NAME_LEN}")
    name = bytes(read(name_len))
    section = known.get(name.decode("ascii", "replace"))
    if section is None:
        raise StreamError(f"unknown section {name!r}: both sides need the same policy and version")
    if phase != section.phase:
        raise StreamError(f"section {section.name} comes in phase {phase}, not {section.phase}")
    if not section.minimum_version <= version <= section.version:
        raise StreamError(
            f"section {section.name} has version {version}; this side reads {section.minimum_version} to {section.version}"
        )
    if length > section.longest:
        raise StreamError(f"section {section.name} claims {length} bytes, of at most {section.longest}")
    payload = read(length)
    (crc,) = _CRC.unpack(read(_CRC.size))
    if crc != zlib.crc32(payload, zlib.crc32(name, zlib.crc32(head))):
        raise StreamError(f"section {section.name} is damaged: its checksum is wrong")
    return Section(section, version, payload)


class Cursor:
    """Reads a payload from its start; StreamError when it is too short, or too long at the end."""

    def __init__(self, payload: bytes | memoryview, what: str) -> None:
        self._payload = memoryview(payload)
        self._at = 0
        self._what = what

    def _skip(self, length: int) -> int:
        """Go on by *length* bytes; return the offset where they begin."""
        at, end = self._at, self._at + length
        if end > len(self._payload):
            raise StreamError(f"{self._what} is cut off")
        self._at = end
        return at

    def take(self, length: int) -> memoryview:
        at = self._skip(length)
        return self._payload[at : at + length]

    def unpack(self, form: struct.Struct) -> tuple[int, ...]:
        return form.unpack_from(self._payload, self._skip(form.size))

    def end(self) -> None:
        if self.left:
            raise StreamError(f"{self._what} has {self.left} bytes too many")

    @property
    def left(self) -> int:
        return len(self._payload) - self._at


def from_bytes(data: bytes | memoryview) -> Callable[[int], memoryview]:
    """Return a `read` for `decode` over bytes at hand."""
    cursor = Cursor(data, "the stream")
    return cursor.take
