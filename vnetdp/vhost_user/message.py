"""vhost-user messages: one table has the payload, the descriptors and the reply of each.

Wire sizes are those of the C structures on x86-64 and aarch64, as QEMU, DPDK and Linux send them. Addresses are the
front end's user addresses (`uva`) for rings, guest physical (`gpa`) for regions and logs.
"""

from __future__ import annotations

import enum
import struct
from dataclasses import dataclass
from typing import ClassVar, Final, Protocol, Self

from ..errors import RemoteProtocolError

HEADER: Final = struct.Struct("=III")
VERSION: Final = 1
VERSION_MASK: Final = 3
REPLY: Final = 1 << 2
NEED_REPLY: Final = 1 << 3
MAX_PAYLOAD: Final = 4096
MAX_FDS: Final = 8
MAX_CONFIG: Final = 256
MAX_VRINGS: Final = 256  # SET_VRING_KICK and its like have 8 bits for the index
VHOST_VRING_F_LOG: Final = 1
NO_FD: Final = 1 << 8  # in a vring descriptor message: there is none


class Request(enum.IntEnum):
    """Front end to back end."""

    GET_FEATURES = 1
    SET_FEATURES = 2
    SET_OWNER = 3
    RESET_OWNER = 4
    SET_MEM_TABLE = 5
    SET_LOG_BASE = 6
    SET_LOG_FD = 7
    SET_VRING_NUM = 8
    SET_VRING_ADDR = 9
    SET_VRING_BASE = 10
    GET_VRING_BASE = 11
    SET_VRING_KICK = 12
    SET_VRING_CALL = 13
    SET_VRING_ERR = 14
    GET_PROTOCOL_FEATURES = 15
    SET_PROTOCOL_FEATURES = 16
    GET_QUEUE_NUM = 17
    SET_VRING_ENABLE = 18
    SEND_RARP = 19
    NET_SET_MTU = 20
    SET_BACKEND_REQ_FD = 21
    GET_CONFIG = 24
    SET_CONFIG = 25
    GET_INFLIGHT_FD = 31
    SET_INFLIGHT_FD = 32
    RESET_DEVICE = 34
    VRING_KICK = 35
    GET_MAX_MEM_SLOTS = 36
    ADD_MEM_REG = 37
    REM_MEM_REG = 38
    SET_STATUS = 39
    GET_STATUS = 40
    SET_DEVICE_STATE_FD = 42
    CHECK_DEVICE_STATE = 43


class BackendRequest(enum.IntEnum):
    """Back end to front end, on the socket that SET_BACKEND_REQ_FD gave."""

    CONFIG_CHANGE_MSG = 2
    VRING_CALL = 4
    VRING_ERR = 5


class ProtocolFeature(enum.IntFlag):
    """The features of the vhost-user protocol that vnetdp speaks: VHOST_USER_PROTOCOL_F_*."""

    MQ = 1 << 0
    """Several queue pairs."""
    LOG_SHMFD = 1 << 1
    """The dirty log in shared memory."""
    RARP = 1 << 2
    """The back end announces a guest that has moved."""
    REPLY_ACK = 1 << 3
    """Any request can be answered with its success."""
    MTU = 1 << 4
    """The front end tells the MTU."""
    BACKEND_REQ = 1 << 5
    """The back end sends requests of its own, on a second socket."""
    CONFIG = 1 << 9
    """The back end tells the configuration space."""
    INFLIGHT_SHMFD = 1 << 12
    """The chains in flight are kept in shared memory, for the next back end."""
    RESET_DEVICE = 1 << 13
    """The front end can reset the device."""
    INBAND_NOTIFICATIONS = 1 << 14
    """Kicks and calls as messages."""
    CONFIGURE_MEM_SLOTS = 1 << 15
    """Memory regions are added and removed one by one."""
    STATUS = 1 << 16
    """The front end tells the device status."""
    DEVICE_STATE = 1 << 19
    """The back end's own state can be moved to another back end."""


class Payload(Protocol):
    """The base of payloads with fixed fields."""

    def encode(self) -> bytes: ...
    @classmethod
    def decode(cls, data: bytes) -> Self: ...


class _Fixed:
    """A payload of fixed size: the fields of the dataclass, in the order of `_layout`."""

    _layout: ClassVar[struct.Struct]

    def encode(self) -> bytes:
        return self._layout.pack(*vars(self).values())

    @classmethod
    def decode(cls, data: bytes) -> Self:
        if len(data) != cls._layout.size:
            raise RemoteProtocolError(f"{cls.__name__} has {cls._layout.size} bytes, not {len(data)}")
        return cls(*cls._layout.unpack(data))


@dataclass(frozen=True)
class Empty(_Fixed):
    _layout = struct.Struct("=")


@dataclass(frozen=True)
class U64(_Fixed):
    value: int
    _layout = struct.Struct("=Q")


@dataclass(frozen=True)
class VringState(_Fixed):
    index: int
    num: int
    _layout = struct.Struct("=II")


@dataclass(frozen=True)
class VringAddr(_Fixed):
    """Ring addresses, used before avail; log: guest address under which used-ring writes are logged."""

    index: int
    flags: int
    desc: int
    used: int
    avail: int
    log: int
    _layout = struct.Struct("=IIQQQQ")


@dataclass(frozen=True)
class MemoryRegion(_Fixed):
    """[gpa, gpa + size) is at *uva* in the front end, and at *mmap_offset* of the descriptor."""

    gpa: int
    size: int
    uva: int
    mmap_offset: int
    _layout = struct.Struct("=QQQQ")


@dataclass(frozen=True)
class MemoryTable:
    regions: tuple[MemoryRegion, ...]

    def encode(self) -> bytes:
        return struct.pack("=II", len(self.regions), 0) + b"".join(region.encode() for region in self.regions)

    @classmethod
    def decode(cls, data: bytes) -> Self:
        if len(data) < 8:
            raise RemoteProtocolError(f"a memory table has at least 8 bytes, not {len(data)}")
        n, _ = struct.unpack_from("=II", data)
        if n > MAX_FDS or len(data) < 8 + 32 * n or len(data) % 32 != 8:  # Linux sends room for more than it fills
            raise RemoteProtocolError(f"a memory table of {n} regions has not {len(data)} bytes")
        return cls(tuple(MemoryRegion.decode(data[at : at + 32]) for at in range(8, 8 + 32 * n, 32)))


@dataclass(frozen=True)
class SingleRegion:
    region: MemoryRegion

    def encode(self) -> bytes:
        return bytes(8) + self.region.encode()

    @classmethod
    def decode(cls, data: bytes) -> Self:
        if len(data) != 40:
            raise RemoteProtocolError(f"a single memory region has 40 bytes, not {len(data)}")
        return cls(MemoryRegion.decode(data[8:]))


@dataclass(frozen=True)
class Log(_Fixed):
    """The dirty log: *size* bytes at *offset* of the descriptor."""

    size: int
    offset: int
    _layout = struct.Struct("=QQ")


@dataclass(frozen=True)
class Inflight(_Fixed):
    """The inflight area: *size* bytes at *offset* of the descriptor, for that many queues of that size."""

    size: int
    offset: int
    num_queues: int
    queue_size: int
    _layout = struct.Struct("=QQHH4x")


@dataclass(frozen=True)
class Config:
    """Configuration space: flags 0 = writable fields, 1 = migration. An answer without data says no."""

    offset: int
    size: int
    flags: int
    data: bytes

    def encode(self) -> bytes:
        return struct.pack("=III", self.offset, self.size, self.flags) + self.data

    @classmethod
    def decode(cls, data: bytes) -> Self:
        if not 12 <= len(data) <= 12 + MAX_CONFIG:
            raise RemoteProtocolError(f"a config message has 12 to {12 + MAX_CONFIG} bytes, not {len(data)}")
        offset, size, flags = struct.unpack_from("=III", data)
        return cls(offset, size, flags, data[12:])


@dataclass(frozen=True)
class DeviceStateTransfer(_Fixed):
    direction: int
    phase: int
    _layout = struct.Struct("=II")


@dataclass(frozen=True)
class Rule:
    """A message's entry in the table: payload, least and most descriptors, reply, and the feature it needs (gate)."""

    payload: type[Payload]
    fds: tuple[int, int] = (0, 0)
    reply: type[Payload] | None = None
    gate: ProtocolFeature | None = None


_F = ProtocolFeature
RULES: Final[dict[Request, Rule]] = {
    Request.GET_FEATURES: Rule(Empty, reply=U64),
    Request.SET_FEATURES: Rule(U64),
    Request.SET_OWNER: Rule(Empty),
    Request.RESET_OWNER: Rule(Empty),
    Request.SET_MEM_TABLE: Rule(MemoryTable, (1, MAX_FDS)),
    Request.SET_LOG_BASE: Rule(Log, (1, 1), reply=Empty, gate=_F.LOG_SHMFD),
    Request.SET_LOG_FD: Rule(Empty, (1, 1)),
    Request.SET_VRING_NUM: Rule(VringState),
    Request.SET_VRING_ADDR: Rule(VringAddr),
    Request.SET_VRING_BASE: Rule(VringState),
    Request.GET_VRING_BASE: Rule(VringState, reply=VringState),
    Request.SET_VRING_KICK: Rule(U64, (0, 1)),
    Request.SET_VRING_CALL: Rule(U64, (0, 1)),
    Request.SET_VRING_ERR: Rule(U64, (0, 1)),
    Request.GET_PROTOCOL_FEATURES: Rule(Empty, reply=U64),
    Request.SET_PROTOCOL_FEATURES: Rule(U64),
    Request.GET_QUEUE_NUM: Rule(Empty, reply=U64, gate=_F.MQ),
    Request.SET_VRING_ENABLE: Rule(VringState),
    Request.SEND_RARP: Rule(U64, gate=_F.RARP),
    Request.NET_SET_MTU: Rule(U64, gate=_F.MTU),
    Request.SET_BACKEND_REQ_FD: Rule(Empty, (1, 1), gate=_F.BACKEND_REQ),
    Request.GET_CONFIG: Rule(Config, reply=Config, gate=_F.CONFIG),
    Request.SET_CONFIG: Rule(Config, gate=_F.CONFIG),
    Request.GET_INFLIGHT_FD: Rule(Inflight, reply=Inflight, gate=_F.INFLIGHT_SHMFD),
    Request.SET_INFLIGHT_FD: Rule(Inflight, (1, 1), gate=_F.INFLIGHT_SHMFD),
    Request.RESET_DEVICE: Rule(Empty, gate=_F.RESET_DEVICE),
    Request.VRING_KICK: Rule(VringState, gate=_F.INBAND_NOTIFICATIONS),
    Request.GET_MAX_MEM_SLOTS: Rule(Empty, reply=U64, gate=_F.CONFIGURE_MEM_SLOTS),
    Request.ADD_MEM_REG: Rule(SingleRegion, (1, 1), gate=_F.CONFIGURE_MEM_SLOTS),
    Request.REM_MEM_REG: Rule(SingleRegion, (0, 1), gate=_F.CONFIGURE_MEM_SLOTS),
    Request.SET_STATUS: Rule(U64, gate=_F.STATUS),
    Request.GET_STATUS: Rule(Empty, reply=U64, gate=_F.STATUS),
    Request.SET_DEVICE_STATE_FD: Rule(DeviceStateTransfer, (1, 1), reply=U64, gate=_F.DEVICE_STATE),
    Request.CHECK_DEVICE_STATE: Rule(Empty, reply=U64, gate=_F.DEVICE_STATE),
}

BACKEND_RULES: Final[dict[BackendRequest, Rule]] = {
    BackendRequest.CONFIG_CHANGE_MSG: Rule(Empty),
    BackendRequest.VRING_CALL: Rule(VringState),
    BackendRequest.VRING_ERR: Rule(VringState),
}


@dataclass(frozen=True)
class Header:
    """The 12 bytes before every message."""

    request: int
    flags: int
    size: int

    def encode(self) -> bytes:
        return HEADER.pack(self.request, self.flags, self.size)

    @classmethod
    def decode(cls, data: bytes) -> Self:
        header = cls(*HEADER.unpack(data))
        if header.flags & VERSION_MASK != VERSION:
            raise RemoteProtocolError(f"request {header.request}: version {header.flags & VERSION_MASK}, not 1")
        if header.size > MAX_PAYLOAD:
            raise RemoteProtocolError(f"request {header.request}: {header.size} bytes; at most {MAX_PAYLOAD} are taken")
        return header
