"""What is sent of a device: nothing is lost on the way, its size goes with what is in use, and nothing wrong is taken."""

from __future__ import annotations

import dataclasses
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vnetdp.device.device import NetDevice
from vnetdp.endpoints.loopback import NullEndpoint
from vnetdp.errors import VnetdpError
from vnetdp.migration.snapshot import (
    FIELDS,
    QEMU_SLOTS,
    decode_delta,
    decode_early,
    decode_full,
    delta_between,
    encode_delta,
    encode_early,
    encode_full,
    value_of,
)
from vnetdp.migration.stream import StreamError
from vnetdp.shared.memory import GuestMemory
from vnetdp.virtio.queue import Virtqueue
from vnetdp.virtio.state import Control, DeviceState, StateDelta

REGISTERS = ("status", "features")
U8, U16, U32, U64 = (st.integers(0, (1 << bits) - 1) for bits in (8, 16, 32, 64))
MACS = st.binary(min_size=6, max_size=6)


@st.composite
def controls(draw: st.DrawFn, pairs: int) -> Control:
    table = tuple(draw(st.lists(MACS, max_size=64)))
    vlans = bytearray(512)
    for vlan in draw(st.sets(st.integers(0, 4095), max_size=4)):
        vlans[vlan // 8] |= 1 << vlan % 8
    return Control(
        mac=draw(MACS),
        mtu=draw(st.just(0) | st.integers(68, 65535)),
        net_status=draw(st.integers(0, 3)),
        curr_queue_pairs=draw(st.integers(1, pairs)),
        rx_mode=draw(st.integers(0, 63)),
        mac_table=table,
        mac_first_multi=draw(st.integers(0, len(table))),
        mac_overflow=draw(st.integers(0, 3)),
        vlans=bytes(vlans),
        guest_offloads=draw(U64),
        rss_enabled=draw(st.booleans()),
        rss_redirect=draw(st.booleans()),
        rss_populate_hash=draw(st.booleans()),
        rss_hash_types=draw(U32),
        rss_default_queue=draw(st.integers(0, pairs - 1)),
        rss_table=tuple(draw(st.lists(st.integers(0, pairs - 1), max_size=128))),
        rss_key=draw(st.binary(min_size=40, max_size=40)),
    )


@st.composite
def queues(draw: st.DrawFn) -> Virtqueue:
    """A queue that is not set up, or set up, or enabled: only then has it an index."""
    if draw(st.booleans()):
        return Virtqueue()
    desc, avail, used = (align * draw(st.integers(0, 1 << 40)) for align in (16, 2, 4))
    enabled = draw(st.booleans())
    return Virtqueue(1 << draw(st.integers(0, 15)), desc, avail, used, enabled, draw(U16) if enabled else 0)


@st.composite
def states(draw: st.DrawFn, pairs: int) -> DeviceState:
    listed = [draw(queues()) for _ in range(2 * pairs)]
    return DeviceState(draw(U8), draw(U64), draw(controls(pairs)), listed)


any_state = st.integers(1, 4).flatmap(states)


@st.composite
def two_states(draw: st.DrawFn) -> tuple[DeviceState, DeviceState]:
    """What a device was, and what it is: anything between all the same and all new."""
    pairs = draw(st.integers(1, 4))
    was, new = draw(states(pairs)), draw(states(pairs))
    kept = draw(st.sets(st.sampled_from([field.name for field in FIELDS if field.name not in REGISTERS])))
    if "mac_table" not in kept or "mac_first_multi" not in kept:
        kept -= {"mac_table", "mac_first_multi"}  # they belong together
    control = replace(new.control, **{name: value_of(was, name) for name in kept})
    now = DeviceState(draw(st.sampled_from([was.status, new.status])), new.features, control, new.queues)
    for n, queue in enumerate(was.queues):
        if draw(st.booleans()):
            now.queues[n] = replace(queue, last_avail_idx=draw(U16) if queue.enabled else 0)
    return was, now


def applied(state: DeviceState, delta: StateDelta) -> DeviceState:
    """Return what *delta* makes of *state*, as the words of `StateDelta` have it."""
    state = replace(state.copy(), control=replace(state.control, **delta.control))
    state.status = delta.registers.get("status", state.status)
    state.features = delta.registers.get("features", state.features)
    for n, queue in delta.queues.items():
        state.queues[n] = queue
    for n, base in delta.bases:
        state.queues[n].last_avail_idx = base
    return state


# --- nothing is lost ---


@given(any_state)
def test_the_early_state_arrives(state: DeviceState) -> None:
    assert decode_early(memoryview(encode_early(state))) == state


@given(any_state)
def test_the_full_state_arrives(state: DeviceState) -> None:
    assert decode_full(memoryview(encode_full(state))) == state


@given(two_states())
def test_a_delta_makes_the_early_state_that_of_now(pair: tuple[DeviceState, DeviceState]) -> None:
    was, now = pair
    delta = delta_between(was, now)
    arrived = decode_delta(memoryview(encode_delta(delta)), len(now.queues))
    assert arrived == delta
    assert applied(was, arrived) == now


@given(any_state)
def test_a_delta_of_nothing_is_every_index(state: DeviceState) -> None:
    delta = delta_between(state, state.copy())
    assert delta.empty
    assert delta.bases == [(n, q.last_avail_idx) for n, q in enumerate(state.queues) if q.enabled]


def test_the_table_names_every_field() -> None:
    names = [field.name for field in FIELDS]
    assert names == [*REGISTERS, *(field.name for field in dataclasses.fields(Control))]


OTHER: dict[str, Any] = {
    "status": 0xF,
    "features": 1 << 63,
    "mac": b"\2abcde",
    "mtu": 9000,
    "net_status": 2,
    "curr_queue_pairs": 2,
    "rx_mode": 0x3F,
    "mac_table": (b"abcdef",) * 64,
    "mac_first_multi": 1,
    "mac_overflow": 3,
    "vlans": b"\xff" * 512,
    "guest_offloads": 1 << 63,
    "rss_enabled": True,
    "rss_redirect": True,
    "rss_populate_hash": True,
    "rss_hash_types": 0xFFFF_FFFF,
    "rss_default_queue": 3,
    "rss_table": (3, 2, 1, 0) * 32,
    "rss_key": b"k" * 40,
}


def of_four_pairs() -> DeviceState:
    return DeviceState(0, 0, Control(mac_table=(b"first.",)), [Virtqueue() for _ in range(8)])


def having(state: DeviceState, name: str, value: Any) -> DeviceState:
    """Return *state* with one other value."""
    if name in REGISTERS:
        return replace(state.copy(), **{name: value})
    return replace(state.copy(), control=replace(state.control, **{name: value}))


@pytest.mark.parametrize("name", [field.name for field in FIELDS])
def test_a_field_alone_is_all_of_its_delta(name: str) -> None:
    was = of_four_pairs()
    now = having(was, name, OTHER[name])
    delta = delta_between(was, now)
    assert {**delta.registers, **delta.control} == {name: OTHER[name]}
    assert not (delta.empty or delta.queues or delta.bases)
    assert applied(was, decode_delta(memoryview(encode_delta(delta)), 8)) == now


@pytest.mark.parametrize(
    "change",
    [{"num": 8}, {"desc": 0x9000}, {"avail": 0x9000}, {"used": 0x9000}, {"enabled": False, "last_avail_idx": 0}],
)
def test_a_queue_alone_is_all_of_its_delta(change: dict[str, Any]) -> None:
    was = of_four_pairs()
    was.queues[5] = Virtqueue(16, 0x1000, 0x2000, 0x3000, True, 77)
    was.queues[6] = Virtqueue(16, 0x4000, 0x5000, 0x6000, True, 5)
    now = was.copy()
    now.queues[5] = replace(now.queues[5], **change)
    delta = delta_between(was, now)
    assert (delta.registers, delta.control, delta.queues, delta.bases) == ({}, {}, {5: now.queues[5]}, [(6, 5)])


# --- its size ---


def with_queues_in_use(pairs: int, used: int) -> DeviceState:
    up = [Virtqueue(256, 0x10000 * n, 0x10000 * n + 0x4000, 0x10000 * n + 0x8000, True, n) for n in range(2 * used)]
    return DeviceState(15, 0, Control(), up + [Virtqueue() for _ in range(2 * (pairs - used))])


def test_the_early_state_is_as_long_as_the_queues_in_use() -> None:
    lengths = {used: len(encode_early(with_queues_in_use(128, used))) for used in (0, 1, 2, 128)}
    a_pair = lengths[1] - lengths[0]
    assert lengths[2] - lengths[1] == a_pair
    assert lengths[128] == lengths[0] + 128 * a_pair
    assert 10 * lengths[1] < lengths[128]
    assert lengths[1] == len(encode_early(with_queues_in_use(1, 1)))  # what could be used costs nothing


def test_a_delta_is_as_long_as_what_has_changed() -> None:
    for pairs in (1, 128):
        state = with_queues_in_use(pairs, 1)
        assert len(encode_delta(delta_between(state, state))) < 20


def test_the_full_state_walks_every_slot() -> None:
    """As QEMU does: 1024 queues, of which most have never been."""
    lengths = {
        len(encode_full(with_queues_in_use(pairs, used))) for pairs, used in ((1, 0), (1, 1), (128, 1), (128, 128))
    }
    assert len(lengths) == 1
    assert lengths.pop() > 31 * QEMU_SLOTS
    more = with_queues_in_use(1024, 1024)
    assert decode_full(memoryview(encode_full(more))) == more


# --- what can't be is refused ---

IMPOSSIBLE: list[tuple[str, Any]] = [
    ("mtu", 67),
    ("net_status", 4),
    ("curr_queue_pairs", 0),
    ("curr_queue_pairs", 5),
    ("rx_mode", 0x40),
    ("mac_table", (b"abcdef",) * 65),
    ("mac_first_multi", 2),
    ("mac_overflow", 4),
    ("vlans", bytes(511)),
    ("vlans", bytes(513)),
    ("rss_enabled", 2),
    ("rss_redirect", 255),
    ("rss_default_queue", 4),
    ("rss_table", (4,)),
    ("rss_table", (0,) * 129),
    ("rss_key", bytes(39)),
]
BAD_QUEUES = [
    Virtqueue(num=0),
    Virtqueue(num=17),
    Virtqueue(num=1 << 16),
    Virtqueue(enabled=True),
    Virtqueue(16, 8, 0x2000, 0x3000),
    Virtqueue(16, 0x1000, 0x2001, 0x3000),
    Virtqueue(16, 0x1000, 0x2000, 0x3002, True),
    Virtqueue(16, 0x1000, -2, 0x3000, True),
]


@pytest.mark.parametrize(("name", "value"), IMPOSSIBLE)
def test_a_value_that_no_driver_could_set(name: str, value: Any) -> None:
    state = having(of_four_pairs(), name, value)
    for encode, decode in ((encode_early, decode_early), (encode_full, decode_full)):
        with pytest.raises(StreamError):
            decode(memoryview(encode(state)))


@pytest.mark.parametrize(("name", "value"), IMPOSSIBLE)
def test_a_delta_to_a_value_that_no_driver_could_set(name: str, value: Any) -> None:
    """It may need the rest of the state to tell: then the device refuses it, and stays as it was."""
    payload = memoryview(encode_delta(StateDelta({"status": 1}, {name: value}, {}, [])))
    with (
        GuestMemory.create([(0, 1 << 20)]) as memory,
        NetDevice(memory, NullEndpoint(4), queue_pairs=4, running=False) as device,
    ):
        device.load_state(of_four_pairs())
        with pytest.raises(VnetdpError):
            device.load_delta(decode_delta(payload, 8))
        assert device.save_state() == of_four_pairs()


@pytest.mark.parametrize("queue", BAD_QUEUES)
def test_a_queue_that_no_driver_could_set_up(queue: Virtqueue) -> None:
    state = of_four_pairs()
    state.queues[3] = queue
    if queue.enabled or queue.has_addresses:  # the others are not sent early
        with pytest.raises(StreamError):
            decode_early(memoryview(encode_early(state)))
    with pytest.raises(StreamError):
        decode_full(memoryview(encode_full(state)))
    with pytest.raises(StreamError):
        decode_delta(memoryview(encode_delta(StateDelta({}, {}, {3: queue}, []))), 8)


def test_queues_that_the_device_has_not() -> None:
    queue = Virtqueue(16, 0x1000, 0x2000, 0x3000)
    with pytest.raises(StreamError, match="the device has 8"):
        decode_delta(memoryview(encode_delta(StateDelta({}, {}, {8: queue}, []))), 8)
    with pytest.raises(StreamError, match="the device has 8"):
        decode_delta(memoryview(encode_delta(StateDelta({}, {}, {}, [(0, 0), (8, 0)]))), 8)
    state = of_four_pairs()
    state.queues[7] = queue
    for encode, decode in ((encode_early, decode_early), (encode_full, decode_full)):
        for n_queues in (0, 7, 2049):
            data = n_queues.to_bytes(2, "little") + encode(state)[2:]
            with pytest.raises(StreamError):
                decode(memoryview(data))


def test_a_full_state_with_fewer_slots_than_queues() -> None:
    whole = encode_full(of_four_pairs())
    rings = len(whole) - 31 * QEMU_SLOTS
    extras = rings + 14 * QEMU_SLOTS
    four = whole[:2] + bytes((4, 0)) + whole[4:rings] + whole[rings : rings + 4 * 14] + whole[extras : extras + 4 * 17]
    with pytest.raises(StreamError, match="8 queues in 4 slots"):
        decode_full(memoryview(four))


def test_a_field_that_is_not_known() -> None:
    with pytest.raises(StreamError, match="changes field 19; fields are 0 to 18"):
        decode_delta(memoryview(bytes([1, len(FIELDS), 0, 0, 0, 0])), 8)


@given(any_state, st.data())
def test_a_payload_cut_off_or_too_long(state: DeviceState, data: st.DataObject) -> None:
    delta = encode_delta(
        StateDelta({"status": state.status}, vars(state.control), dict(enumerate(state.queues)), [(0, 1)])
    )
    for payload, decode in (
        (encode_early(state), decode_early),
        (encode_full(state), decode_full),
        (delta, lambda view: decode_delta(view, len(state.queues))),
    ):
        cut = data.draw(st.integers(0, len(payload) - 1))
        for wrong in (payload[:cut], payload + b"\0"):
            with pytest.raises(StreamError):
                decode(memoryview(wrong))
