"""A front end that sends what no front end may: every message in every wrong shape. It costs the connection, and no more."""

from __future__ import annotations

import random
import socket
import struct
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from tests.support.by_hand import no_descriptor_leaks
from tests.support.vhost_user import (
    FEATURES,
    MOVABLE,
    NEED_REPLY,
    NUM,
    PAIRS,
    UVA,
    BackEnd,
    ByHand,
    Guest,
    InThread,
    Left,
    costs_nothing,
    inflight,
    region,
    spare,
    state,
    table,
    u64,
)
from vnetdp.vhost_user.back_end import server
from vnetdp.vhost_user.message import ProtocolFeature, Request

R = Request
_ADDR = struct.pack("<IIQQQQ", 0, 0, UVA, UVA + 0x2000, UVA + 0x1000, 0)
_CONFIG = struct.pack("<III", 0, 8, 0) + bytes(8)
_PAGE = 4096

# Of every message: a payload of the right size, and how many descriptors may come with it.
SHAPES: dict[Request, tuple[bytes, range]] = {
    R.GET_FEATURES: (b"", range(1)),
    R.SET_FEATURES: (u64(FEATURES), range(1)),
    R.SET_OWNER: (b"", range(1)),
    R.RESET_OWNER: (b"", range(1)),
    R.SET_MEM_TABLE: (table(region(0, _PAGE, UVA)), range(1, 2)),
    R.SET_LOG_BASE: (struct.pack("<QQ", _PAGE, 0), range(1, 2)),
    R.SET_LOG_FD: (b"", range(1, 2)),
    R.SET_VRING_NUM: (state(0, NUM), range(1)),
    R.SET_VRING_ADDR: (_ADDR, range(1)),
    R.SET_VRING_BASE: (state(0, 0), range(1)),
    R.GET_VRING_BASE: (state(0, 0), range(1)),
    R.SET_VRING_KICK: (u64(0), range(1, 2)),
    R.SET_VRING_CALL: (u64(0), range(1, 2)),
    R.SET_VRING_ERR: (u64(0), range(1, 2)),
    R.GET_PROTOCOL_FEATURES: (b"", range(1)),
    R.SET_PROTOCOL_FEATURES: (u64(MOVABLE), range(1)),
    R.GET_QUEUE_NUM: (b"", range(1)),
    R.SET_VRING_ENABLE: (state(0, 1), range(1)),
    R.SEND_RARP: (u64(0), range(1)),
    R.NET_SET_MTU: (u64(1500), range(1)),
    R.SET_BACKEND_REQ_FD: (b"", range(1, 2)),
    R.GET_CONFIG: (_CONFIG, range(1)),
    R.SET_CONFIG: (_CONFIG, range(1)),
    R.GET_INFLIGHT_FD: (inflight(0, 0, 2, NUM), range(1)),
    R.SET_INFLIGHT_FD: (inflight(_PAGE, 0, 2, NUM), range(1, 2)),
    R.RESET_DEVICE: (b"", range(1)),
    R.VRING_KICK: (state(0, 0), range(1)),
    R.GET_MAX_MEM_SLOTS: (b"", range(1)),
    R.ADD_MEM_REG: (bytes(8) + region(0, _PAGE, UVA), range(1, 2)),
    R.REM_MEM_REG: (bytes(8) + region(0, _PAGE, UVA), range(2)),
    R.SET_STATUS: (u64(1), range(1)),
    R.GET_STATUS: (b"", range(1)),
    R.SET_DEVICE_STATE_FD: (struct.pack("<II", 0, 0), range(1, 2)),
    R.CHECK_DEVICE_STATE: (b"", range(1)),
}
INDEXED = [R.SET_VRING_NUM, R.SET_VRING_BASE, R.GET_VRING_BASE, R.SET_VRING_ENABLE, R.SET_VRING_ADDR]
BY_DESCRIPTOR = [R.SET_VRING_KICK, R.SET_VRING_CALL, R.SET_VRING_ERR]


def greeted(back_end: BackEnd) -> ByHand:
    end = ByHand.dial(back_end.path)
    end.shake_hands(protocol=MOVABLE)
    return end


def is_cut_off(back_end: BackEnd, request: int, payload: bytes = b"", fds: int = 0, flags: int = 1) -> None:
    """Send one message after a proper handshake; the back end closes the connection on that."""
    end = greeted(back_end)
    with spare(fds) as given:
        end.send(request, payload, given, flags)
    assert end.left()
    end.close()


def test_the_table_names_every_message() -> None:
    assert set(SHAPES) == set(Request)


@pytest.mark.parametrize("request_", Request, ids=lambda r: r.name)
def test_a_payload_of_another_size(back_end: BackEnd, request_: Request) -> None:
    payload, fds = SHAPES[request_]
    lengths = {len(payload) - 1, len(payload) + 1, len(payload) + 8, len(payload) // 2, 0, 11, 269, 4096}
    right = range(12, 269) if request_ in (R.GET_CONFIG, R.SET_CONFIG) else [len(payload)]
    wrong = sorted(n for n in lengths if n >= 0 and n not in right)
    with costs_nothing(back_end, len(wrong)):
        for length in wrong:
            is_cut_off(back_end, request_, payload.ljust(length, b"\0")[:length], fds.start)


@pytest.mark.parametrize("request_", Request, ids=lambda r: r.name)
def test_another_number_of_descriptors(back_end: BackEnd, request_: Request) -> None:
    payload, fds = SHAPES[request_]
    wrong = [n for n in (0, 1, 2, 3, 8, 9, 40, 200) if n not in fds]
    with costs_nothing(back_end, len(wrong)):
        for n in wrong:
            is_cut_off(back_end, request_, payload, n)


@pytest.mark.parametrize("request_", Request, ids=lambda r: r.name)
def test_as_the_first_message_of_all(back_end: BackEnd, request_: Request) -> None:
    """Right in itself, too early: it is answered, refused, or done, and whoever comes next finds nothing of it."""
    payload, fds = SHAPES[request_]
    with costs_nothing(back_end, None):
        for flags in (1, 1 | NEED_REPLY):
            end = ByHand.dial(back_end.path)
            with spare(fds.start) as given:
                end.send(request_, payload, given, flags)
            end.leave()


@pytest.mark.parametrize("request_", Request, ids=lambda r: r.name)
def test_repeated_while_the_rings_run(back_end: BackEnd, request_: Request) -> None:
    payload, fds = SHAPES[request_]
    with costs_nothing(back_end, None):
        for stretch in (1, 30):
            end = ByHand.dial(back_end.path)
            end.shake_hands()
            with Guest(end) as guest, spare(fds.start) as given:
                guest.share()
                guest.start(0, 1, 2, 3)
                guest.echo()
                try:
                    for _ in range(stretch):
                        end.send(request_, payload, given, 1 | NEED_REPLY)
                except Left:
                    pass
                end.leave()


@pytest.mark.parametrize("index", [2 * PAIRS, 0xFF, 0x100, 0x10000, 0x7FFFFFFF, 2**32 - 1], ids=hex)
def test_a_vring_that_is_not_there(back_end: BackEnd, index: int) -> None:
    with costs_nothing(back_end, 2 * len(INDEXED) - 1 + 2 * len(BY_DESCRIPTOR)):
        for request in INDEXED:
            rest = SHAPES[request][0][4:]
            is_cut_off(back_end, request, struct.pack("<I", index) + rest)
            if request is not R.GET_VRING_BASE:  # which has an answer of its own, and no way to say no
                end = greeted(back_end)
                assert not end.tell(request, struct.pack("<I", index) + rest)
                assert end.tell(R.SET_VRING_NUM, state(0, NUM))
                end.leave()
        for request in BY_DESCRIPTOR:
            # Bits 0 to 7 are the index, bit 8 says that no descriptor comes; none other means anything.
            value = index if index < 0x100 else index << 9
            is_cut_off(back_end, request, u64(value), 1)
            is_cut_off(back_end, request, u64(value | 0x100))


def test_requests_that_do_not_exist(back_end: BackEnd) -> None:
    unknown = [0, 22, 23, 26, 27, 28, 29, 30, 33, 41, 44, 100, 0x7FFFFFFF, 2**32 - 1]
    with costs_nothing(back_end, 2 * len(unknown)):
        for request in unknown:
            is_cut_off(back_end, request)
            is_cut_off(back_end, request, bytes(32), 8, 1 | NEED_REPLY)


@pytest.mark.parametrize("flags", [0, 2, 3, 0xFFFFFFFE, 5, 0xD], ids=hex)
def test_a_version_of_the_protocol_that_is_not_1_and_replies_to_nothing(back_end: BackEnd, flags: int) -> None:
    with costs_nothing(back_end):
        is_cut_off(back_end, R.GET_FEATURES, flags=flags)


@pytest.mark.parametrize("size", [4097, 0x10000, 0x7FFFFFFF, 2**32 - 1], ids=hex)
@pytest.mark.parametrize("fds", [0, 8])
def test_a_giant_size(back_end: BackEnd, size: int, fds: int) -> None:
    with costs_nothing(back_end):
        end = greeted(back_end)
        with spare(fds) as given:
            end.send(R.SET_MEM_TABLE, bytes(100), given, size=size)
        assert end.left()
        end.close()


@pytest.mark.parametrize("cut", [1, 11, 12, 13, 19])
def test_half_a_message_and_then_the_end(back_end: BackEnd, cut: int) -> None:
    whole = struct.pack("<III", R.SET_VRING_KICK, 1, 8) + u64(0)
    with costs_nothing(back_end):
        end = greeted(back_end)
        with spare(1) as given:
            socket.send_fds(end.sock, [whole[:cut]], given)
        end.leave()


@pytest.fixture
def hasty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[BackEnd]:
    """A back end that gives half a second to a message, or an answer, that comes in parts; ours always come whole."""
    monkeypatch.setattr(server, "_MESSAGE_TIMEOUT_S", 0.5)
    with no_descriptor_leaks():
        back_end = InThread(tmp_path)
        yield back_end
        back_end.close()


def test_half_a_message_and_then_silence(hasty: BackEnd) -> None:
    with costs_nothing(hasty):
        end = greeted(hasty)
        with spare(1) as given:
            end.send(R.SET_VRING_KICK, b"", given, size=8)
        assert end.left()
        end.close()


def test_a_message_that_trickles_in_for_ever(hasty: BackEnd) -> None:
    """Each byte comes before anyone would lose patience with a silent peer, but there is no end to them."""
    with costs_nothing(hasty):
        end = greeted(hasty)
        end.sock.settimeout(0.05)
        end.send(R.SET_MEM_TABLE, b"", size=4096)
        for _ in range(1200):
            try:
                end.sock.send(b"\0")
                assert not end.sock.recv(1)
            except TimeoutError:
                continue
            except OSError:
                pass
            end.close()
            return
        raise AssertionError("the back end waits for ever")


def test_a_front_end_that_reads_no_answers(hasty: BackEnd) -> None:
    with costs_nothing(hasty):
        end = ByHand.dial(hasty.path)
        with suppress(Left):
            while True:
                end.send(R.GET_FEATURES)
        assert end.left()
        end.close()


def test_garbage(back_end: BackEnd) -> None:
    random_ = random.Random(1)
    with costs_nothing(back_end, 4):
        for length in (1, 12, 64, 4096):
            end = ByHand.dial(back_end.path)
            end.sock.send(random_.randbytes(length))
            end.leave()


@pytest.mark.parametrize(
    "request_", [r for r in Request if r not in (R.GET_FEATURES, R.SET_FEATURES)], ids=lambda r: r.name
)
def test_a_message_whose_protocol_feature_was_not_negotiated(back_end: BackEnd, request_: Request) -> None:
    """Nothing of bits 16 and up was said: those messages end it, the others of the first protocol work."""
    payload, fds = SHAPES[request_]
    first = 1 <= request_ <= 16 and request_ != R.SET_LOG_BASE
    with costs_nothing(back_end, None):
        end = ByHand.dial(back_end.path)
        end.shake_hands(protocol=ProtocolFeature.REPLY_ACK)
        with spare(fds.start) as given:
            end.send(request_, payload, given, 1 | NEED_REPLY)
        if first or request_ == R.SET_VRING_ENABLE:
            end.leave()
        else:
            assert end.left()
            end.close()
