"""A world that can't be saved says why in one line; data that no world saved changes nothing, and crashes nothing."""

from __future__ import annotations

import copy
import random
import struct
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import pytest

from tests.support.by_hand import CAMPAIGN, scaled
from tests.world.bed import KINDS, NUM, Bed, Host
from tests.world.test_world import TRAFFIC
from vnetdp import (
    Announcer,
    Clock,
    ConfigError,
    Datapath,
    DirtyLog,
    Driver,
    Endpoint,
    FrameEndpoint,
    GuestError,
    MailboxEndpoint,
    NetDevice,
    PcapEndpoint,
    UserspaceBackend,
    Worker,
    World,
    memory_for,
)
from vnetdp.world.plain import checksum
from vnetdp_kernels import rows as r

HOSTILE = 4000 if CAMPAIGN else scaled(25, 5)


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


def guest_of(stack: ExitStack, wire: Endpoint | None = None, **options: Any) -> Driver:
    memory = stack.enter_context(memory_for(num=4))
    wire = stack.enter_context(wire or MailboxEndpoint())
    device = stack.enter_context(NetDevice(memory, wire, **{"threaded": False, **options}))
    return stack.enter_context(Driver(device, memory, num=4))


def device_of(guest: Driver) -> NetDevice:
    assert isinstance(guest.device, NetDevice)
    return guest.device


# --- worlds that can't be saved ---


def with_a_thread(stack: ExitStack) -> World:
    return World(guest_of(stack, threaded=True))


def with_a_worker(stack: ExitStack) -> World:
    return World(guest_of(stack, vhost=stack.enter_context(Worker(pairs=1))))


def with_a_started_driver(stack: ExitStack) -> World:
    guest = guest_of(stack)
    guest.start()
    stack.callback(guest.stop)
    return World(guest)


def with_a_file(stack: ExitStack) -> World:
    path = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "out.pcap"
    return World(guest_of(stack, PcapEndpoint(None, path)))


def with_an_announcement(stack: ExitStack) -> World:
    clock = Clock()
    guest = guest_of(stack, clock=clock)
    stack.enter_context(Announcer(device_of(guest).endpoint.send_to_wire, lambda: bytes(6), clock))
    return World(guest)


def with_half_of_a_clock(stack: ExitStack) -> World:
    clock = Clock()
    guest_of(stack, clock=clock)
    return World(guest_of(stack, clock=clock))


def with_a_dirty_log(stack: ExitStack) -> World:
    guest = guest_of(stack)
    device_of(guest).set_log(stack.enter_context(DirtyLog(guest.memory.end)))
    return World(guest)


def with_a_prepared_vhost(stack: ExitStack) -> World:
    vhost = Datapath(1)
    stack.callback(vhost.close)
    guest = guest_of(stack, vhost=[UserspaceBackend(vhost, 0)])
    device_of(guest).set_running(False)
    assert device_of(guest).prepare_vhost()
    return World(guest)


def with_a_closed_memory(stack: ExitStack) -> World:
    guest = guest_of(stack)
    guest.memory.close()
    return World(guest)


def with_a_closed_wire(stack: ExitStack) -> World:
    guest = guest_of(stack)
    device_of(guest).endpoint.close()
    return World(guest)


def with_a_set_as_its_own_state(stack: ExitStack) -> World:
    class Wire(FrameEndpoint):
        def save_own(self) -> object:
            return {1, 2}

    return World(guest_of(stack, Wire()))


def twice(stack: ExitStack) -> World:
    guest = guest_of(stack)
    return World(guest, guest)


def of_nothing(_stack: ExitStack) -> World:
    return World()


@pytest.mark.parametrize(
    ("made", "says"),
    [
        (with_a_thread, "threaded=False"),
        (with_a_worker, "UserspaceBackend of a Datapath that you run"),
        (with_a_started_driver, "driver 0: it runs in a thread: stop it"),
        (with_a_file, "out.pcap): a file, a socket or a TAP can't go back"),
        (with_an_announcement, "clock 0: announcements are due"),
        (with_half_of_a_clock, "clock 0: mailbox reads it, of a device that is not in this world"),
        (with_a_dirty_log, "set_log(None) first"),
        (with_a_prepared_vhost, "device 0: its vhost is prepared"),
        (with_a_closed_memory, "memory 0: it is closed"),
        (with_a_closed_wire, "endpoint 0 (mailbox): it is closed"),
        (with_a_set_as_its_own_state, "save_own: a set is no plain data"),
        (twice, "give World each driver once"),
        (of_nothing, "give World the drivers of its devices"),
    ],
)
def test_a_world_that_can_t_be_saved_says_why(made: Callable[[ExitStack], World], says: str, stack: ExitStack) -> None:
    with pytest.raises(ConfigError, match=r"^[^\n]*$") as raised:
        made(stack).save()
    assert says in str(raised.value)


def test_a_world_is_not_saved_in_the_midst_of_a_step(stack: ExitStack) -> None:
    class Wire(FrameEndpoint):
        def frame_received(self, frame: bytes, queue: int) -> None:
            world.save()

    wire = Wire()
    guest = guest_of(stack, wire)
    world = World(guest)
    guest.send(bytes(60))
    guest.step()
    assert device_of(guest).step() == 1
    assert "a step is under way" in str(wire.last_error)


# --- data that no world saved ---


def sealed(data: Any) -> Any:
    """Return saved data with a checksum that fits."""
    return {**data, "checksum": checksum(data["parts"])}


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda _data: None, "a NoneType is no saved world"),
        (lambda data: {**data, "version": 2}, "the saved world has version 2, and this vnetdp reads 1"),
        (lambda data: {**data, "parts": data["parts"][:-1]}, "its checksum is another one"),
        (lambda data: {**data, "parts": {1, 2}}, "the saved world is damaged"),
        (lambda data: sealed({**data, "parts": data["parts"][:-1]}), "make both by the same calls"),
        (lambda data: sealed({**data, "parts": [[1, 2]]}), "the saved world is damaged"),
    ],
)
def test_data_that_is_cut_or_of_another_version_is_refused(change: Callable[[Any], Any], says: str) -> None:
    with Bed("mailbox") as bed:
        before = bed.world.save()
        with pytest.raises(ConfigError, match=r"^[^\n]*$") as raised:
            bed.world.load(change(bed.world.save()))
        assert says in str(raised.value)
        assert bed.world.save() == before


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"max_num": 512}, "max_num is 1024 in the saved world and 512 in this one"),
        ({"fallback": False}, "fallback is True in the saved world"),
        ({"mtu": 1500}, "offered is"),
        ({"mac": bytes(6)}, "mac is b'RT"),
    ],
)
def test_the_world_of_another_device_is_refused(options: dict[str, Any], says: str, stack: ExitStack) -> None:
    saved = World(guest_of(stack)).save()
    with pytest.raises(ConfigError, match=r"device 0: .*: make both worlds alike") as raised:
        World(guest_of(stack, **options)).load(saved)
    assert says in str(raised.value)


def test_an_endpoint_that_refuses_its_own_state_leaves_all_as_it_was(stack: ExitStack) -> None:
    class Wire(FrameEndpoint):
        count = 0

        def save_own(self) -> object:
            return self.count

        def load_own(self, data: object) -> None:
            if data == 7:
                raise ValueError("7 is too many")

    wire = Wire()
    guest = guest_of(stack, wire)
    world = World(guest)
    wire.count = 7
    saved = world.save()
    wire.count = 6
    guest.send(bytes(60))
    guest.step()
    before = world.save()
    with pytest.raises(ConfigError, match=r"endpoint 0: .*nothing was loaded: load_own: ValueError: 7 is too many"):
        world.load(saved)
    assert world.save() == before


def poked(host: Host, what: str) -> None:
    """Change a value that kernels index with."""
    ring, ep, line = host.vhost.vqs[0], host.wire.rows[0], host.wire.rows[0, r.EP_SLOTS :]
    inner = host.wire.rows[0, r.STAGE_SLOTS :]
    places: dict[str, tuple[Any, int, int]] = {
        "offset": (ring, r.VQ_USED, int(ring[r.VQ_USED]) + 64),
        "address": (ring, r.VQ_DESC_GPA, 1 << 40),
        "size": (ring, r.VQ_NUM, 7),
        "header": (ring, r.VQ_HDR_LEN, 11),
        "index": (ring, r.VQ_LAST_AVAIL_IDX, 1 << 16),
        "journal": (ring, r.VQ_JOURNAL, 1 << 20),
        "kind": (ep, r.EP_KIND, r.KIND_TAP),
        "lines": (ep, r.EP_LINES, 3),
        "pending": (ep, r.EP_PENDING, r.FRAME_SLOT + 1),
        "slot": (inner, r.EP_FIRST, 65),
        "head": (line, r.LINE_HEAD, r.LINE_FRAMES),
        "held": (line, r.LINE_HELD, 1),
        "aside": (line, r.LINE_ASIDE_LEN, 12),
        "free": (host.guest.dvqs[1], r.DVQ_FREE_HEAD, NUM),
        "next": (host.guest.states[1], r.DS_NEXT, -1),
        "buffer": (host.guest.dvqs[0], r.DVQ_BUF_OFFSET, 0),
        "slots": (host.wire.in_lengths[0], -1, r.FRAME_SLOT + 1),
        "notes": (host.wire.ledger[0], r.LEDGER_NOTE_MISSING, 101),
    }
    array, slot, value = places[what]
    array[..., slot] = value


@pytest.mark.parametrize(
    ("what", "says"),
    [
        ("offset", "its offsets in the window are not those of its addresses"),
        ("address", "guest range 0x10000000000+0x80 is not inside guest memory"),
        ("size", "queue size 7 is not a power of two"),
        ("header", "a virtio_net_hdr has 10 or 12 bytes"),
        ("index", "slot 4 is 65536, not 0 to 65535"),
        ("journal", "slot 29 is 1048576, not 0 to 0"),
        ("kind", "its kind, faulty wires or flows"),
        ("lines", "its kind, faulty wires or flows"),
        ("pending", "is 65601, not 0 to 65600"),
        ("slot", "64 frame slots each way"),
        ("head", "is 4096, not 0 to 4095"),
        ("held", "outside of its ring, or is too short"),
        ("aside", "a frame of 12 bytes waits to be overtaken"),
        ("free", "the driver's state of its descriptors contradicts the ring"),
        ("next", "the driver's state of its descriptors contradicts the ring"),
        ("buffer", "driver state does not match a ring"),
        ("slots", "a frame slot has 65600 bytes at most"),
        ("notes", "is 101, not 0 to 100"),
    ],
)
def test_a_value_that_would_lead_a_kernel_out_of_its_arrays_is_refused(what: str, says: str) -> None:
    with Bed("lossy") as bed, Bed("lossy") as other:
        poked(bed.hosts[0], what)
        hostile = bed.world.save()
        before = other.world.save()
        with pytest.raises(ConfigError, match=r"not a state that World.save returned, nothing was loaded") as raised:
            other.world.load(hostile)
        assert says in str(raised.value)
        assert other.world.save() == before


NUMBERS = (
    -1,
    0,
    1,
    63,
    65,
    4095,
    4097,
    65535,
    65536,
    1 << 23,
    1 << 31,
    1 << 40,
    (1 << 62) + 1,
    (1 << 63) - 1,
    -(1 << 63),
)
OTHERS: tuple[object, ...] = (None, "", b"", [], {}, 0.5, True)


def damaged(data: Any, rng: random.Random) -> Any:
    """Return plain data with one leaf changed: a number, a word within bytes, a length, or a type."""
    if isinstance(data, dict) and data:
        key = rng.choice([*data])
        return {**data, key: damaged(data[key], rng)}
    if isinstance(data, list | tuple) and data:
        at = rng.randrange(len(data))
        return type(data)([*data[:at], damaged(data[at], rng), *data[at + 1 :]])
    if rng.random() < 0.05:
        return rng.choice(OTHERS)
    if isinstance(data, bytes) and len(data) >= 8:
        words = len(data) // 8
        at = 8 * rng.randrange(words)
        cut = rng.random() < 0.02
        return data[: -8 if cut else None][:at] + struct.pack("<q", rng.choice(NUMBERS)) + data[at + 8 :]
    return rng.choice(NUMBERS) if isinstance(data, int) else data


@pytest.mark.parametrize("kind", KINDS)
def test_hostile_data_is_refused_or_harmless(kind: str) -> None:
    rng = random.Random(kind)
    with Bed(kind) as bed:
        bed.do(TRAFFIC * 2)
        saved = bed.world.save()
        refused, before = 0, saved
        for _ in range(HOSTILE):
            hostile = copy.deepcopy(saved)
            for _ in range(rng.choice((1, 1, 3))):
                part = rng.choice(hostile["parts"])
                part[2] = damaged(part[2], rng)
            try:
                bed.world.load(sealed(hostile))
            except ConfigError as e:
                refused += 1
                assert "\n" not in str(e)
                assert bed.world.save() == before
                continue
            with suppress(GuestError):  # the device or its driver met nonsense in guest memory, and said so
                bed.do(TRAFFIC)
            before = bed.world.save()
        assert refused < HOSTILE
        bed.world.load(saved)
        assert bed.world.save() == saved
