"""The state of a device as bytes: field by field and queue by queue, whole or as a delta.

FIELDS is the one table: the encoding of a field, and the cost of its change to a destination that has prepared vhost
already. Bytes come from outside: all of them are checked before anything is applied.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

from ..errors import ConfigError
from ..virtio.queue import VRINGS, Virtqueue
from ..virtio.state import MAX_QUEUE_PAIRS, Control, DeviceState, StateDelta
from .stream import Cursor, StreamError

_U8 = struct.Struct("<B")
_U16 = struct.Struct("<H")
_U32 = struct.Struct("<I")
_U64 = struct.Struct("<Q")
_QUEUE = struct.Struct("<HIqqqHB")  # queue, num, desc, avail, used, last_avail_idx, enabled
_BASE = struct.Struct("<HH")  # queue, last_avail_idx
_SLOT = struct.Struct("<IqH")  # as QEMU's virtio_save: num, desc, last_avail_idx
_EXTRA = struct.Struct("<qqB")  # as its subsections: avail, used, enabled
QEMU_SLOTS: Final = 1024  # VIRTIO_QUEUE_MAX: the slots of a full state, in use or not


@dataclass(frozen=True)
class Field:
    """One field of a device's state. cost: the work of a destination that has prepared vhost if it changed."""

    name: str
    kind: str
    cost: str
    says: str


_PLAIN = "nothing"
_ENDPOINT = "tell the endpoint"
FIELDS: Final[tuple[Field, ...]] = (
    Field("status", "u8", "prepare, or give up, if DRIVER_OK changed", "device status (2.1)"),
    Field("features", "u64", "set_features, once a pair", "negotiated feature bits (2.2)"),
    Field("mac", "mac", _PLAIN, "MAC address"),
    Field("mtu", "u16", "tell the endpoint; set_mtu, once a pair", "MTU, 0 = none"),
    Field("net_status", "u16", "prepare, or give up, if the link changed", "LINK_UP, ANNOUNCE (5.1.4)"),
    Field("curr_queue_pairs", "u16", _ENDPOINT, "pairs in use (5.1.6.5.5)"),
    Field("rx_mode", "u8", _PLAIN, "promisc, allmulti, alluni, nomulti, nouni, nobcast"),
    Field("mac_table", "macs", _PLAIN, "MAC filter, at most 64 entries"),
    Field("mac_first_multi", "u8", _PLAIN, "index of the first multicast address in mac_table"),
    Field("mac_overflow", "u8", _PLAIN, "bit 0: too many unicast addresses, bit 1: too many multicast addresses"),
    Field("vlans", "bytes", _PLAIN, "VLAN filter, a bit an id"),
    Field("guest_offloads", "u64", _ENDPOINT, "receive offloads in force (5.1.6.5.6)"),
    Field("rss_enabled", "bool", _PLAIN, "RSS (5.1.6.5.7)"),
    Field("rss_redirect", "bool", _PLAIN, "RSS steers, not only hashes"),
    Field("rss_populate_hash", "bool", _PLAIN, "the hash is reported to the driver"),
    Field("rss_hash_types", "u32", _PLAIN, "hash types in use"),
    Field("rss_default_queue", "u16", _PLAIN, "queue pair of frames without a hash"),
    Field("rss_table", "u16s", _PLAIN, "indirection table, at most 128 entries"),
    Field("rss_key", "bytes", _PLAIN, "hash key, 40 bytes"),
)
_IDS = {field.name: number for number, field in enumerate(FIELDS)}
_REGISTERS = ("status", "features")

_NUMBERS = {"u8": _U8, "bool": _U8, "u16": _U16, "u32": _U32, "u64": _U64}


def _write(kind: str, value: Any) -> bytes:
    if kind in _NUMBERS:
        return _NUMBERS[kind].pack(int(value))
    if kind == "mac":
        return bytes(value)
    if kind == "macs":
        return _U16.pack(len(value)) + b"".join(value)
    if kind == "u16s":
        return _U16.pack(len(value)) + struct.pack(f"<{len(value)}H", *value)
    return _U16.pack(len(value)) + bytes(value)


def _read(kind: str, cursor: Cursor) -> Any:
    if kind in _NUMBERS:
        (value,) = cursor.unpack(_NUMBERS[kind])
        if kind == "bool":
            if value > 1:
                raise StreamError(f"a boolean field is {value}, not 0 or 1")
            return bool(value)
        return value
    if kind == "mac":
        return bytes(cursor.take(6))
    (count,) = cursor.unpack(_U16)
    if kind == "macs":
        data = bytes(cursor.take(6 * count))
        return tuple(data[at : at + 6] for at in range(0, len(data), 6))
    if kind == "u16s":
        return struct.unpack(f"<{count}H", cursor.take(2 * count))
    return bytes(cursor.take(count))


def value_of(state: DeviceState, name: str) -> Any:
    """Return a field of FIELDS by name."""
    return getattr(state if name in _REGISTERS else state.control, name)


def _checked(build: Callable[[], Any], what: str) -> Any:
    try:
        return build()
    except (ConfigError, TypeError, ValueError) as e:
        raise StreamError(f"{what}: {e}") from e


def _queue(values: tuple[int, ...], n_queues: int) -> tuple[int, Virtqueue]:
    index, num, desc, avail, used, last_avail_idx, enabled = values
    if index >= n_queues or enabled > 1:
        raise StreamError(f"queue {index}, enabled {enabled}: the device has {n_queues} queues, and enabled is 0 or 1")
    queue = Virtqueue(num, desc, avail, used, bool(enabled), last_avail_idx)
    _checked(queue.validate, f"queue {index}")
    return index, queue


def _in_use(queue: Virtqueue) -> bool:
    return queue.enabled or queue.has_addresses


def _queue_bytes(n: int, queue: Virtqueue) -> bytes:
    return _QUEUE.pack(n, queue.num, queue.desc, queue.avail, queue.used, queue.last_avail_idx, queue.enabled)


# --- the early state: every field, and the queues in use ---


def encode_early(state: DeviceState) -> bytes:
    """Return a whole state; its size goes with the queues in use."""
    used = [(n, queue) for n, queue in enumerate(state.queues) if _in_use(queue)]
    fields = [_write(field.kind, value_of(state, field.name)) for field in FIELDS]
    queues = [_queue_bytes(n, queue) for n, queue in used]
    return b"".join([_U16.pack(len(state.queues)), *fields, _U16.pack(len(used)), *queues])


def decode_early(payload: memoryview) -> DeviceState:
    """Return the state that `encode_early` wrote."""
    cursor = Cursor(payload, "the early state")
    n_queues = _read_count(cursor)
    values = {field.name: _read(field.kind, cursor) for field in FIELDS}
    queues = [Virtqueue() for _ in range(n_queues)]
    (n_used,) = cursor.unpack(_U16)
    for _ in range(n_used):
        index, queue = _queue(cursor.unpack(_QUEUE), n_queues)
        queues[index] = queue
    cursor.end()
    return _state(values, queues)


def _read_count(cursor: Cursor) -> int:
    (n_queues,) = cursor.unpack(_U16)
    if not 0 < n_queues <= 2 * MAX_QUEUE_PAIRS:
        raise StreamError(f"a device of {n_queues} queues, not 1 to {2 * MAX_QUEUE_PAIRS}")
    return int(n_queues)


def _state(values: dict[str, Any], queues: list[Virtqueue]) -> DeviceState:
    registers = {name: values.pop(name) for name in _REGISTERS}
    control = Control(**values)
    _checked(lambda: control.validate(len(queues) // VRINGS), "control state")
    return DeviceState(registers["status"], registers["features"], control, queues)


# --- the delta: changes since the early state, and every index ---


def delta_between(early: DeviceState, now: DeviceState) -> StateDelta:
    """Return the delta that turns *early* into *now*. It has every index, as an early index is out of date."""
    registers = {name: getattr(now, name) for name in _REGISTERS if getattr(now, name) != getattr(early, name)}
    control = {}
    if now.control != early.control:
        for field in FIELDS:
            if field.name not in _REGISTERS and value_of(now, field.name) != value_of(early, field.name):
                control[field.name] = value_of(now, field.name)
    queues = {}
    bases = []
    for n, (was, queue) in enumerate(zip(early.queues, now.queues, strict=True)):
        if (queue.setup, queue.enabled) != (was.setup, was.enabled) and (_in_use(queue) or _in_use(was)):
            queues[n] = queue
        elif queue.enabled:
            bases.append((n, queue.last_avail_idx))
    return StateDelta(registers, control, queues, bases)


def encode_delta(delta: StateDelta) -> bytes:
    """Return a delta's bytes."""
    parts = []
    changes = {**delta.registers, **delta.control}
    for name, value in changes.items():
        number = _IDS[name]
        parts.append(_U8.pack(number) + _write(FIELDS[number].kind, value))
    queues = [_queue_bytes(n, queue) for n, queue in delta.queues.items()]
    bases = [_BASE.pack(*base) for base in delta.bases]
    counts = _U8.pack(len(changes)), _U16.pack(len(queues)), _U16.pack(len(bases))
    return b"".join([counts[0], *parts, counts[1], *queues, counts[2], *bases])


def decode_delta(payload: memoryview, n_queues: int) -> StateDelta:
    """Return the delta that `encode_delta` wrote, for a device of *n_queues* queues."""
    cursor = Cursor(payload, "the delta")
    delta = StateDelta({}, {}, {}, [])
    (n_fields,) = cursor.unpack(_U8)
    for _ in range(n_fields):
        (number,) = cursor.unpack(_U8)
        if number >= len(FIELDS):
            raise StreamError(f"the delta changes field {number}; fields are 0 to {len(FIELDS) - 1}")
        field = FIELDS[number]
        value = _read(field.kind, cursor)
        (delta.registers if field.name in _REGISTERS else delta.control)[field.name] = value
    (n_changed,) = cursor.unpack(_U16)
    for _ in range(n_changed):
        index, queue = _queue(cursor.unpack(_QUEUE), n_queues)
        delta.queues[index] = queue
    (n_bases,) = cursor.unpack(_U16)
    delta.bases = list(_BASE.iter_unpack(cursor.take(_BASE.size * n_bases)))
    cursor.end()
    if delta.bases and max(delta.bases)[0] >= n_queues:
        raise StreamError(f"the delta has an index for queue {max(delta.bases)[0]}; the device has {n_queues}")
    return delta


# --- the full state, as QEMU writes it: the fields, and twice a walk over every queue that there could be ---


def encode_full(state: DeviceState) -> bytes:
    """Return a whole state with QEMU_SLOTS or more slots, used or not."""
    slots = max(QEMU_SLOTS, len(state.queues))
    queues = state.queues + [Virtqueue()] * (slots - len(state.queues))
    fields = [_write(field.kind, value_of(state, field.name)) for field in FIELDS]
    ring = [_SLOT.pack(q.num, q.desc, q.last_avail_idx) for q in queues]
    extra = [_EXTRA.pack(q.avail, q.used, q.enabled) for q in queues]
    counts = _U16.pack(len(state.queues)) + _U16.pack(slots)
    return b"".join([counts, *fields, *ring, *extra])


def decode_full(payload: memoryview) -> DeviceState:
    """Return the state that `encode_full` wrote."""
    cursor = Cursor(payload, "the device's state")
    n_queues = _read_count(cursor)
    (slots,) = cursor.unpack(_U16)
    if slots < n_queues:
        raise StreamError(f"{n_queues} queues in {slots} slots: at least {n_queues} are needed")
    values = {field.name: _read(field.kind, cursor) for field in FIELDS}
    rings = list(_SLOT.iter_unpack(cursor.take(_SLOT.size * slots)))
    extras = list(_EXTRA.iter_unpack(cursor.take(_EXTRA.size * slots)))
    cursor.end()
    queues = []
    for n, ((num, desc, last_avail_idx), (avail, used, enabled)) in enumerate(zip(rings, extras, strict=True)):
        if n < n_queues:
            queues.append(_queue((n, num, desc, avail, used, last_avail_idx, enabled), n_queues)[1])
        elif desc >= 0 or enabled:
            raise StreamError(f"queue {n} is in use; the device has {n_queues}")
    return _state(values, queues)
