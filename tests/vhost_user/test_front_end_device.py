"""What a front end of ours tells its back end of the device, asks it, and is told."""

from __future__ import annotations

import errno
import itertools
import os
import struct
import threading
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import pytest

from tests.support.by_hand import NEEDS_RESET, frame, no_descriptor_leaks, wait_equal, wait_for
from tests.support.vhost_user import MOVABLE, NEED_REPLY, NO_FD, PAIRS, UNTOLD, VERSION_1
from tests.vhost_user.card import NUM, Card, attached, in_thread
from vnetdp.device.device import NetDevice
from vnetdp.device.owners import Owner
from vnetdp.endpoints.loopback import EchoEndpoint
from vnetdp.errors import BackendError, RemoteProtocolError
from vnetdp.guest.driver import Driver, memory_for
from vnetdp.shared.memory import GuestMemory, Region
from vnetdp.testing import READY, HandRing, bring_up
from vnetdp.vhost_user.back_end.session import Session
from vnetdp.vhost_user.connection import Message
from vnetdp.vhost_user.front_end.backend_requests import BackendRequests
from vnetdp.vhost_user.front_end.watch import Watch
from vnetdp.vhost_user.message import (
    U64,
    VERSION,
    BackendRequest,
    Empty,
    Header,
    Payload,
    ProtocolFeature,
    Request,
    VringState,
)
from vnetdp_kernels import spec


def tell(session: Session, request: BackendRequest, payload: Payload) -> None:
    """Send a front end a message of its back end's."""
    assert session._front_end is not None
    body = payload.encode()
    session._front_end.sendall(Header(request, VERSION, len(body)).encode() + body)


# --- memory, status, configuration ---


def in_pieces(memory: GuestMemory, pieces: int) -> GuestMemory:
    """Return the memory of *memory*, a single region, in so many regions side by side; *memory* is closed."""
    with memory:
        whole = memory.regions[0]
        size = whole.length // pieces // spec.PAGE_SIZE * spec.PAGE_SIZE
        cuts = [size * n for n in range(pieces)] + [whole.length]
        return GuestMemory([Region(whole.gpa + a, b - a, whole.fd, a) for a, b in itertools.pairwise(cuts)])


@pytest.mark.parametrize("pieces", [8, 9, 100])
def test_memory_of_more_regions_than_a_message_holds(tmp_path: Path, pieces: int) -> None:
    with in_thread(tmp_path) as back_end, attached(back_end.path) as front_end:
        card = Card(front_end, memory=in_pieces(memory_for(1, NUM), pieces))
        card.wait_for_more()
        card.device.set_use_vhost(False)
        card.wait_for_more()
        card.device.set_use_vhost(True)
        card.is_of(Owner.VHOST)
        card.wait_for_more()
        card.finish()


@pytest.mark.parametrize(("withheld", "slots"), [(ProtocolFeature.CONFIGURE_MEM_SLOTS, 8), (ProtocolFeature(0), 509)])
def test_more_regions_than_the_back_end_takes(tmp_path: Path, withheld: ProtocolFeature, slots: int) -> None:
    with in_thread(tmp_path) as back_end, ExitStack() as stack:
        back_end.server.protocol_features = int(UNTOLD & ~withheld)
        front_end = stack.enter_context(attached(back_end.path))
        parts = [(n << 13, spec.PAGE_SIZE) for n in range(slots + 1)]
        memory = stack.enter_context(GuestMemory.create(parts))
        with pytest.raises(BackendError, match=f"{slots + 1} regions; the back end takes {slots}") as caught:
            front_end.backends[0].set_memory(memory)
        assert caught.value.errno == errno.E2BIG


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, Any]]:
    """What a back end in this process is asked from now on, with the number that it is about."""
    asked: list[tuple[str, Any]] = []
    apply = Session._apply

    def spy(self: Session, message: Message, fds: list[int]) -> tuple[Payload | None, list[int]]:
        asked.append((message.request.name, getattr(message.payload, "index", getattr(message.payload, "value", None))))
        return apply(self, message, fds)

    monkeypatch.setattr(Session, "_apply", spy)
    return asked


@pytest.mark.parametrize(
    ("spoken", "reset"),
    [
        (MOVABLE, ("SET_STATUS", 0)),
        (UNTOLD, ("RESET_DEVICE", None)),
        (UNTOLD | ProtocolFeature.DEVICE_STATE, None),  # its state may be asked for next
        (UNTOLD & ~ProtocolFeature.RESET_DEVICE, None),
    ],
)
def test_a_device_that_is_reset_resets_its_back_end_and_begins_anew(
    tmp_path: Path, told: list[tuple[str, Any]], spoken: ProtocolFeature, reset: tuple[str, Any] | None
) -> None:
    with in_thread(tmp_path) as back_end, ExitStack() as stack:
        back_end.server.protocol_features = int(spoken)
        front_end = stack.enter_context(attached(back_end.path))
        card = Card(front_end)
        card.wait_for_more()
        card.driver.close()
        told.clear()
        card.device.set_status(0)
        assert told == [("GET_VRING_BASE", 0), ("GET_VRING_BASE", 1)] + ([reset] if reset else [])
        driver = Driver(card.device, card.memory, num=NUM)
        card.is_of(Owner.VHOST)
        driver.start()
        assert driver.send(frame(1))
        wait_for(lambda: driver.receive() == [frame(1)], "a frame comes back")
        driver.close()
        card.close()


@pytest.mark.parametrize("spoken", [MOVABLE, UNTOLD])
def test_both_queues_are_reset_one_after_the_other(tmp_path: Path, spoken: ProtocolFeature) -> None:
    """The back end has no ring between the two, and is reset itself."""
    with in_thread(tmp_path) as back_end, ExitStack() as stack:
        back_end.server.protocol_features = int(spoken)
        front_end = stack.enter_context(attached(back_end.path))
        memory = stack.enter_context(GuestMemory.create([(0x10000, 1 << 20)]))
        wire = stack.enter_context(EchoEndpoint())
        device = stack.enter_context(
            NetDevice(memory, wire, offered=front_end.features, vhost=front_end.backends, fallback=False)
        )
        rings = bring_up(device, VERSION_1)
        device.set_status(READY)
        for n in range(2):
            receiveq, transmitq = rings
            receiveq.post(0)
            transmitq.send(0, frame(n))
            device.kicks[1].signal()
            wait_equal(lambda: receiveq.used_idx, 1)  # noqa: B023
            assert memory.read(receiveq.buffer(0) + spec.NET_HDR_LEN, 60) == frame(n)
            for index in range(2):
                device.reset_queue(index)
            rings = [HandRing(memory, rings[1].end), HandRing(memory, rings[1].end + 0x20000)]
            for index, ring in enumerate(rings):
                device.set_queue(index, ring.num, ring.desc, ring.avail, ring.used)
                device.enable_queue(index)
            assert device.owner is Owner.VHOST, device.last_error


def test_the_state_of_one_back_end_is_loaded_into_another(tmp_path: Path) -> None:
    with in_thread(tmp_path) as back_end:
        back_end.server.mac = bytes.fromhex("02000000000a")
        with attached(back_end.path) as front_end:
            card = Card(front_end)
            with pytest.raises(BackendError, match="EBUSY"):
                front_end.save_device_state()
            card.device.set_use_vhost(False)
            state = front_end.save_device_state()
            assert front_end.save_device_state() == state
            card.finish()
        back_end.server.mac = bytes(6)
        with attached(back_end.path) as front_end:
            front_end.load_device_state(state)
            config = front_end.read_config()
            assert config is not None
            assert config.mac.hex() == "02000000000a"
            for wrong in (b"", state[:-1], b"x" * 1000):
                with pytest.raises(BackendError, match="the back end reports that it failed"):
                    front_end.load_device_state(wrong)
            config = front_end.read_config()
            assert config is not None
            assert config.mac.hex() == "02000000000a"


@pytest.mark.parametrize("way", ["refuses", "has its own descriptor", "writes for ever", "never ends", "reads nothing"])
def test_a_state_that_is_moved_otherwise(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, way: str) -> None:
    kept: list[int] = []

    def move(self: Session, message: Message, fds: list[int]) -> tuple[Payload | None, list[int]]:
        if message.request is not Request.SET_DEVICE_STATE_FD:
            return apply(self, message, fds)
        if way == "refuses":
            return U64(1 | NO_FD), []
        if way == "has its own descriptor":
            reader, writer = os.pipe()
            os.write(writer, b"state")
            os.close(writer)
            kept.append(reader)
            return U64(0), [reader]
        if way == "writes for ever":
            writer = fds.pop()
            threading.Thread(target=write_for_ever, args=(writer,), name="writer").start()
        else:
            kept.append(fds.pop())
        return U64(NO_FD), []

    def write_for_ever(writer: int) -> None:
        with open(writer, "wb", 0) as out, suppress(BrokenPipeError):
            while True:
                out.write(bytes(1 << 20))

    apply = Session._apply
    monkeypatch.setattr(Session, "_apply", move)
    with in_thread(tmp_path) as back_end, attached(back_end.path, timeout_s=0.3) as front_end:
        if way == "has its own descriptor":
            assert front_end.save_device_state() == b"state"
        elif way == "reads nothing":
            with pytest.raises(BackendError, match="does not read"):
                front_end.load_device_state(bytes(1 << 20))
        else:
            with pytest.raises(
                BackendError, match="refuses the request" if way == "refuses" else "no end of the state after"
            ):
                front_end.save_device_state()
        wait_for(lambda: "writer" not in [thread.name for thread in threading.enumerate()], "it writes no more")
        for fd in kept:
            os.close(fd)


# --- what the back end asks by itself ---


@pytest.fixture
def sessions(monkeypatch: pytest.MonkeyPatch) -> list[Session]:
    """The sessions of back ends in this process that were given a socket for their requests."""
    found: list[Session] = []
    take = Session._on_set_backend_req_fd

    def spy(self: Session, payload: Empty, fds: list[int]) -> None:
        found.append(self)
        take(self, payload, fds)

    monkeypatch.setattr(Session, "_on_set_backend_req_fd", spy)
    return found


def test_a_configuration_that_changes_is_the_device_s(tmp_path: Path, sessions: list[Session]) -> None:
    with in_thread(tmp_path) as back_end, attached(back_end.path, watched=True) as front_end:
        assert front_end.read_config() == (b"\x52\x54\x00\x12\x34\x56", 1, PAIRS, 0)
        card = Card(front_end)
        with Watch(front_end, card.device):
            space = bytes.fromhex("020000000007") + struct.pack("<HHH", 0, PAIRS, 1400)
            for status, owner in ((0, Owner.NOBODY), (1, Owner.VHOST)):
                space = space[:6] + struct.pack("<HHH", status, PAIRS, 1400)
                sessions[-1]._config_space = lambda: space  # type: ignore[method-assign]  # noqa: B023
                tell(sessions[-1], BackendRequest.CONFIG_CHANGE_MSG, Empty())
                wait_equal(lambda: card.device.owner, owner)  # the link goes down, and up
                assert card.device.read_config(0, 12) == space[:8] + struct.pack("<HH", 1, 1400)
            card.wait_for_more()
            card.all_back()
        card.close()


def test_a_back_end_that_has_nothing_to_ask_any_more_is_kept(tmp_path: Path, sessions: list[Session]) -> None:
    with in_thread(tmp_path) as back_end, attached(back_end.path, watched=True) as front_end:
        card = Card(front_end)
        with Watch(front_end, card.device):
            end = sessions[-1]._front_end
            assert end is not None
            end.close()
            card.wait_for_more()
            card.is_of(Owner.VHOST)
        card.finish()
        sessions[-1]._front_end = None


def test_calls_in_band(tmp_path: Path, sessions: list[Session]) -> None:
    with in_thread(tmp_path, inband=True) as back_end, ExitStack() as stack:
        front_end = stack.enter_context(attached(back_end.path, watched=True, inband=True))
        assert front_end.has(ProtocolFeature.INBAND_NOTIFICATIONS)
        card = Card(front_end)
        with Watch(front_end, card.device):
            card.wait_for_more()
            card.all_back()  # called by the watch until then
        card.close()
        assert sessions


def test_a_ring_that_broke_elsewhere_breaks_the_device(tmp_path: Path, sessions: list[Session]) -> None:
    with in_thread(tmp_path) as back_end, attached(back_end.path, watched=True) as front_end:
        card = Card(front_end)
        with Watch(front_end, card.device):
            tell(sessions[-1], BackendRequest.VRING_ERR, VringState(7, 0))  # which is none of ours
            tell(sessions[-1], BackendRequest.VRING_ERR, VringState(1, 0))
            wait_equal(lambda: card.device.owner, Owner.NOBODY)
            assert card.device.status & NEEDS_RESET
        card.close()


@pytest.mark.parametrize(
    ("request_", "flags", "payload", "answer"),
    [
        (2, 1 | NEED_REPLY, b"", 0),
        (9, 1 | NEED_REPLY, bytes(16), 1),
        (9, 1, bytes(16), None),
        (4, 1, bytes(3), None),
        (2, 7, b"", None),
    ],
)
def test_requests_of_a_back_end_are_acknowledged_refused_or_end_it(
    request_: int, flags: int, payload: bytes, answer: int | None
) -> None:
    with no_descriptor_leaks():
        requests = BackendRequests()
        requests.theirs.sendall(struct.pack("<III", request_, flags, len(payload)) + payload)
        if request_ == 4 or flags == 7:
            with pytest.raises(RemoteProtocolError):
                requests.take()
        else:
            asked = requests.take()
            assert asked == ((BackendRequest(request_), Empty()) if request_ == 2 else None)
        if answer is not None:
            assert requests.theirs.recv(100) == struct.pack("<IIIQ", request_, 5, 8, answer)
        requests.theirs.close()
        with pytest.raises(EOFError):
            requests.take()
        requests.close()
