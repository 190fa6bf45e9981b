"""Frames between rings and the outside: TAP queues (here: packet sockets), generators, and guests that answer."""

from __future__ import annotations

import errno
import socket
import struct
import threading
import time
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.kernels.rig import INDIRECT, NEXT, WRITE, Rig, pattern, scaled
from vnetdp.testing.strategies import hostile_headers
from vnetdp_kernels import rows as r
from vnetdp_kernels import spec
from vnetdp_kernels.platform.atomic import Words

HEADER = bytes(spec.NET_HDR_LEN)
FRAME = HEADER + pattern(1)
LAYOUTS = [(True, 12), (False, 12), (False, 10)]  # mergeable, length of virtio_net_hdr


@pytest.fixture
def wire() -> Iterator[tuple[socket.socket, socket.socket]]:
    """Two ends of a wire that keeps frames apart, as a TAP queue does: one for a kernel, one for the test."""
    ends = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    for end in ends:
        end.setblocking(False)
    yield ends
    for end in ends:
        end.close()


def on_wire(wire: tuple[socket.socket, socket.socket], **settings_: int) -> Rig:
    rig = Rig(16, device=r.KIND_TAP, **settings_)  # type: ignore[arg-type]
    rig.device.fds[0] = wire[0].fileno()
    return rig


# --- TAP ---


@pytest.mark.parametrize("pieces", [1, 2, 12, 63, 64, 65, 66, 300])
def test_tap_takes_a_frame_in_any_pieces(wire: tuple[socket.socket, socket.socket], pieces: int) -> None:
    """One writev, as long as the kernel takes as many pieces; num_buffers is cleared on the way."""
    rig = on_wire(wire)
    data = bytes(range(1, 11)) + b"\xff\xff" + pattern(3, 1200)
    gpa, table = rig.memory.high(len(data)), rig.memory.low(16 * pieces)
    rig.memory.write(gpa, data)
    rig.tx.desc(0, table, 16 * pieces, INDIRECT)
    size = len(data) // pieces
    for k in range(pieces):
        more = k + 1 < pieces
        rig.tx.desc(k, gpa + k * size, size if more else len(data) - k * size, NEXT * more, k + 1, table=table)
    rig.tx.offer(0)
    assert rig.serve() == (r.LOOP_IDLE, 1)
    assert wire[1].recv(4096) == data[:10] + bytes(2) + data[12:]
    assert rig.device.eps[0, [r.EP_TO_WIRE, r.EP_BYTES_TO_WIRE]].tolist() == [1, 1200]


def test_tap_brings_frames_in(wire: tuple[socket.socket, socket.socket]) -> None:
    """What is too short to be one is dropped; nothing is read while there are no buffers."""
    rig = on_wire(wire)
    for data in (FRAME, FRAME[:25], b"x", HEADER + pattern(2, 1500)):
        wire[1].send(data)
    assert rig.serve() == (r.LOOP_IDLE, 0)
    for k in range(3):
        rig.rx.desc(k, rig.memory.high(1600), 1600, WRITE)
    rig.rx.offer(0, 1, 2)
    moved = sum(rig.serve()[1] for _ in range(4))
    assert (moved, rig.device.eps[0, r.EP_DROP_SHORT]) == (2, 2)
    assert rig.rx.used() == [(0, 72), (1, 1512)]
    assert rig.memory.read(rig.rx.buffer(1)[0], 1512)[12:] == pattern(2, 1500)


def test_tap_that_takes_no_more(wire: tuple[socket.socket, socket.socket]) -> None:
    """What the wire does not take stays in the ring; when it takes again, all arrive, in order."""
    wire[0].setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1)
    rig = on_wire(wire, buf_len=2048)
    frames = [HEADER + pattern(k, 1500) for k in range(64)]
    todo, blocked = list(frames), 0
    got: list[bytes] = []
    while len(got) < len(frames):
        rig.guest.feed(*todo[:4])
        del todo[: rig.send()]
        rig.guest.eps[0, r.EP_COUNT] = 0
        outcome, _ = rig.serve()
        assert outcome == r.LOOP_IDLE
        blocked += rig.tx.used_idx != rig.tx.avail_idx
        try:
            got.append(wire[1].recv(4096))
        except BlockingIOError:
            assert not todo
    assert got == frames
    assert blocked
    assert rig.device.eps[0, [r.EP_DROP_ERROR, r.EP_TO_WIRE]].tolist() == [0, 64]


def test_tap_that_takes_again_wakes_the_device(wire: tuple[socket.socket, socket.socket]) -> None:
    wire[0].setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1)
    rig = on_wire(wire)
    rig.open_eventfds()
    rig.guest.feed(*[HEADER + pattern(k, 1500) for k in range(8)])
    assert rig.send() == 8
    thread = threading.Thread(target=rig.serve, args=(-1, 0, -1))
    thread.start()
    got: list[bytes] = []
    end = time.monotonic() + 60
    while len(got) < 8 and time.monotonic() < end:
        try:
            got.append(wire[1].recv(4096)[12:])
        except BlockingIOError:
            time.sleep(0.001)
    rig.device.ring_doorbell()
    thread.join()
    rig.close()
    assert got == [pattern(k, 1500) for k in range(8)]


@pytest.mark.parametrize("side", ["device", "guest"])
def test_tap_that_fails(wire: tuple[socket.socket, socket.socket], side: str) -> None:
    """An error costs the frame, with its reason, and the next is tried: the worker lives (CH #8722)."""
    rig = Rig(16, device=r.KIND_TAP if side == "device" else r.KIND_PYTHON, guest=r.KIND_PYTHON)
    endpoint = rig.device if side == "device" else rig.guest
    endpoint.fds[0] = wire[0].fileno()
    wire[1].close()
    rig.post_receive()
    if side == "device":
        rig.guest.feed(FRAME, FRAME)
        assert rig.drive()[1] == 2
        assert rig.serve() == (r.LOOP_IDLE, 2)
        assert rig.tx.used_idx == rig.tx.vq[r.VQ_DROPPED] == 2
    else:
        rig.device.feed(FRAME, FRAME)
        assert rig.serve()[1] == 2
        rig.guest.eps[0, r.EP_KIND] = r.KIND_TAP
        assert rig.drive() == (r.LOOP_IDLE, 2)
    assert endpoint.eps[0, [r.EP_DROP_ERROR, r.EP_LAST_ERRNO]].tolist() == [2, errno.EPIPE]


def test_tap_that_is_gone_lets_the_loop_sleep(wire: tuple[socket.socket, socket.socket]) -> None:
    """Its descriptor reports an error for ever: it is polled once, and then left alone."""
    rig = on_wire(wire)
    rig.open_eventfds()
    rig.post_receive()
    wire[1].close()
    for _ in range(3):
        assert rig.serve(-1, 0, 20)[0] == r.LOOP_IDLE
    assert rig.device.eps[0, r.EP_GONE] == 1
    assert rig.device.ctl[r.CTL_SLEEPS] <= 5
    rig.close()


def test_tap_of_the_guests(wire: tuple[socket.socket, socket.socket]) -> None:
    """The driver joins a wire as the device does; a frame that it does not take is counted."""
    wire[0].setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1)
    rig = Rig(16, guest=r.KIND_TAP)
    rig.guest.fds[0] = wire[0].fileno()
    rig.post_receive()
    wire[1].send(FRAME)
    assert rig.drive() == (r.LOOP_IDLE, 1)
    assert rig.serve() == (r.LOOP_PYTHON, 1)
    assert rig.device.collect() == [FRAME]
    for k in range(4):
        rig.device.feed(*[HEADER + pattern(k, 1500)] * 8)
        rig.serve()
        rig.drive()
    got = []
    while True:
        try:
            got.append(wire[1].recv(4096))
        except BlockingIOError:
            break
    assert 0 < len(got) < 32
    assert len(got) + rig.rx.dvq[r.DVQ_DROPPED] == rig.rx.dvq[r.DVQ_PACKETS] == 32


# --- generators ---


@pytest.mark.parametrize("side", ["device", "guest"])
def test_a_generator_ends_at_its_limit(side: str) -> None:
    rig = Rig(64, device=r.KIND_GENERATE, guest=r.KIND_GENERATE)
    rig.post_receive()
    rig.device.eps[0, r.EP_LIMIT] = 10 * (side == "device")
    rig.guest.eps[0, r.EP_LIMIT] = 10 * (side == "guest")
    for _ in range(3):
        rig.drive()
        rig.serve()
    rig.drive()
    receiver, flow = (rig.guest, 1) if side == "device" else (rig.device, 0)
    assert receiver.ledger[flow].tolist() == [10, 10] + [0] * (r.LEDGER_SLOTS - 2)
    assert (rig.guest.ledger.sum(), rig.device.ledger.sum()) == ((20, 0) if side == "device" else (0, 20))


@pytest.mark.parametrize("side", ["device", "guest"])
def test_a_generator_keeps_to_its_rate(side: str) -> None:
    """However slow we are, no more frames than the time that passed allows, and the millisecond in hand."""
    rig = Rig(4096, device=r.KIND_GENERATE, guest=r.KIND_GENERATE, buf_len=128)
    rig.post_receive()
    interval = 50_000
    rig.device.eps[0, r.EP_INTERVAL_NS] = rig.guest.eps[0, r.EP_INTERVAL_NS] = interval
    loop, endpoint = (rig.serve, rig.device) if side == "device" else (rig.drive, rig.guest)
    start = time.monotonic_ns()
    for _ in range(20):
        assert loop(-1, 0, 1)[0] == r.LOOP_IDLE
        passed = time.monotonic_ns() - start
        assert 0 < endpoint.eps[0, r.EP_SEQ] <= (passed + 1_000_000) // interval + 1


@pytest.mark.parametrize("kicks", [False, True])
def test_a_generator_that_is_not_due_lets_the_loop_sleep(kicks: bool) -> None:
    rig = Rig(16, device=r.KIND_GENERATE)
    if kicks:
        rig.open_eventfds()
    rig.post_receive()
    rig.device.eps[0, r.EP_INTERVAL_NS] = 1
    rig.device.eps[0, r.EP_NEXT_NS] = time.monotonic_ns() + 3_600_000_000_000
    assert rig.serve(-1, 0, 3) == (r.LOOP_IDLE, 0)
    assert rig.device.ctl[r.CTL_SLEEPS] == (1 if kicks else 3)
    rig.device.eps[0, r.EP_NEXT_NS] = time.monotonic_ns() + 5_000_000
    assert rig.serve(1, 0, -1) == (r.LOOP_BUDGET, 1), "it wakes by itself when a frame is due"
    rig.close()


def test_a_generator_of_frames_too_long() -> None:
    """Longer than a transmit buffer: dropped, counted, and the loop is not held."""
    rig = Rig(16, guest=r.KIND_GENERATE, buf_len=128)
    rig.guest.eps[0, r.EP_SIZE] = 117
    assert rig.drive() == (r.LOOP_IDLE, 0)
    assert rig.guest.eps[0, r.EP_DROP_LONG] > 0
    rig.guest.eps[0, r.EP_SIZE] = 116
    assert rig.drive(5) == (r.LOOP_BUDGET, 5)


# --- slots and buffers too short ---


def test_frames_longer_than_a_slot_of_pythons() -> None:
    """Dropped and counted, guest to wire; the next goes out."""
    rig = Rig(16)
    rig.device.out_frames = rig.device.out_frames[:, : 8 * 100].copy()
    rig.guest.feed(HEADER + pattern(1, 89), HEADER + pattern(2, 88))
    assert rig.drive()[1] == 2
    assert rig.serve() == (r.LOOP_PYTHON, 2)
    assert rig.device.eps[0, [r.EP_OUT_COUNT, r.EP_DROP_LONG, r.EP_TO_WIRE]].tolist() == [1, 1, 1]
    assert rig.device.out_lengths[0, 0] == 100
    assert rig.device.out_frames[0, :100].tobytes() == HEADER + pattern(2, 88)


def test_frames_longer_than_a_transmit_buffer() -> None:
    """Dropped and counted, endpoint to guest; so is one too short to be a frame; the next is sent."""
    rig = Rig(16, buf_len=128)
    rig.guest.feed(HEADER + pattern(1, 117), HEADER + pattern(1, 13), HEADER + pattern(2, 116))
    assert rig.drive() == (r.LOOP_IDLE, 1)
    assert rig.serve() == (r.LOOP_PYTHON, 1)
    assert rig.device.collect() == [HEADER + pattern(2, 116)]
    assert rig.guest.eps[0, [r.EP_DROP_LONG, r.EP_DROP_SHORT, r.EP_FROM_WIRE]].tolist() == [1, 1, 1]


# --- both sides together ---

FRAMES = st.lists(st.tuples(hostile_headers(length=10), st.integers(14, 900), st.integers(0, 255)), max_size=12)


KINDS = (0, 1, 3, 4, 5)  # of gso_type


def tidied(frame: bytes, known: int) -> bytes:
    """Return what goes on of a peer's frame: flags that are *known*, and the fields that have a meaning with them."""
    flags, gso, hdr_len, size, start, offset = struct.unpack("<BBHHHH", frame[:10])
    flags, gso = flags & known, 0 if gso == 0x80 else gso
    if not gso:
        hdr_len = size = 0
    elif not 14 <= hdr_len <= len(frame) - 12:
        hdr_len = 0
    if not flags & 1:
        start = offset = 0
    return struct.pack("<BBHHHH", flags, gso, hdr_len, size, start, offset) + frame[10:]


@settings(max_examples=scaled(100, 60), deadline=None)
@given(
    out=FRAMES, into=FRAMES, layout=st.sampled_from(LAYOUTS), start=st.sampled_from((0, 65533)),
    in_order=st.booleans(), num=st.sampled_from((4, 16)),
)  # fmt: skip
def test_driver_and_device(
    out: list[tuple[bytes, int, int]], into: list[tuple[bytes, int, int]], layout: tuple[bool, int], start: int,
    in_order: bool, num: int,
) -> None:  # fmt: skip
    """What either puts in comes out of the other, whole and in order, merged where it must be.

    Of the header comes what has a meaning; a frame to be cut up in a way that nobody knows does not reach the guest.
    """
    mergeable, hdr_len = layout
    rig = Rig(
        num, mergeable=mergeable, hdr_len=hdr_len, start=start, in_order=in_order, buf_len=256 if mergeable else 1000,
        slots=12,
    )  # fmt: skip
    rig.post_receive()
    sent, coming = ([h + bytes(2) + pattern(seed, n) for h, n, seed in frames] for frames in (out, into))
    sent = [frame for frame in sent if len(frame) <= rig.dvqs[1, r.DVQ_BUF_LEN]]
    rig.guest.feed(*sent)
    rig.device.feed(*coming)
    got_out: list[bytes] = []
    got_in: list[bytes] = []
    for _ in range(30):
        rig.drive()
        rig.serve()
        got_out += rig.device.collect()
        got_in += rig.guest.collect()
    assert got_out == [tidied(frame, 1) for frame in sent]
    known = [frame for frame in coming if (frame[1] == 0 or frame[1] & 0x7F) and frame[1] & 0x7F in KINDS]
    assert got_in == [tidied(frame, 3) for frame in known if len(frame) <= num * 256 or not mergeable]
    assert not rig.vqs[:, r.VQ_STATUS].any()
    assert not rig.dvqs[:, r.DVQ_STATUS].any()
    assert rig.memory.intact()


ARP = bytes.fromhex("ffffffffffff 525400123456 0806 0001 0800 06 04 0001 525400123456 0a000002 000000000000 0a000001")


def counted(row: Words) -> list[int]:
    """Return frames and bytes to the wire, then those from it."""
    slots = (r.EP_TO_WIRE, r.EP_BYTES_TO_WIRE, r.EP_FROM_WIRE, r.EP_BYTES_FROM_WIRE)
    return [int(row[slot]) for slot in slots]


@pytest.mark.parametrize(("mergeable", "hdr_len"), LAYOUTS)
@pytest.mark.parametrize("kind", [r.KIND_ECHO, r.KIND_MACSWAP, r.KIND_REFLECT])
def test_a_guest_that_answers(kind: int, mergeable: bool, hdr_len: int) -> None:
    """Echoed as it came, MACs exchanged, or answered; a frame longer than a transmit buffer is dropped."""
    rig = Rig(8, guest=kind, mergeable=mergeable, hdr_len=hdr_len, buf_len=256)
    rig.post_receive()
    answered = bytes.fromhex(
        "525400123456 0202020202020806 0001 0800 06 04 0002 020202020202 0a000001 525400123456 0a000002"
    )
    frames = [pattern(7, 100), ARP, pattern(8, 244 - 12), pattern(9, 600)]
    got: list[bytes] = []
    for _ in range(3):
        rig.device.feed(*[HEADER + frame for frame in frames])
        for _ in range(4):
            rig.serve()
            got += rig.device.collect()
            rig.drive()
    swapped = [frame[6:12] + frame[:6] + frame[12:] for frame in frames]
    expected = {r.KIND_ECHO: frames[:3], r.KIND_MACSWAP: swapped[:3], r.KIND_REFLECT: [answered]}[kind]
    assert got == [HEADER + frame for frame in expected] * 3
    if kind != r.KIND_REFLECT and mergeable:
        assert rig.guest.eps[0, r.EP_DROP_LONG] == 3
    taken = 3 * [len(frame) for frame in frames[:3]]
    assert counted(rig.guest.eps[0]) == [
        len(taken),
        sum(taken),
        len(got),
        sum(len(frame) - len(HEADER) for frame in got),
    ]


@pytest.mark.parametrize("kind", [r.KIND_ECHO, r.KIND_MACSWAP, r.KIND_REFLECT])
def test_a_device_that_answers_counts_both_ways(kind: int) -> None:
    rig = Rig(8, device=kind)
    rig.post_receive()
    rig.guest.feed(HEADER + pattern(7, 100), HEADER + ARP)
    rig.drive()
    rig.serve()
    rig.drive()
    back = [len(frame) - len(HEADER) for frame in rig.guest.collect()]
    assert back == ([len(ARP)] if kind == r.KIND_REFLECT else [100, len(ARP)])
    assert counted(rig.device.eps[0]) == [2, 100 + len(ARP), len(back), sum(back)]
    assert rig.vqs[:, r.VQ_PACKETS].tolist() == [len(back), 2]
    assert rig.vqs[:, r.VQ_BYTES].tolist() == [sum(back), 100 + len(ARP)]


def test_a_guest_that_answers_waits_for_descriptors() -> None:
    """With its transmitq full it takes nothing off the receiveq, sleeps, and goes on when the device does."""
    rig = Rig(4, guest=r.KIND_ECHO)
    rig.open_eventfds()
    rig.post_receive()
    rig.vqs[1, r.VQ_BOUND] = 0
    rig.device.feed(*[FRAME] * 8)
    for _ in range(4):
        rig.serve()
        rig.drive()
    assert (rig.tx.avail_idx, rig.rx.dvq[r.DVQ_PACKETS], rig.rx.used_idx) == (4, 4, 8)
    assert rig.drive(-1, 0, 5) == (r.LOOP_IDLE, 0)
    rig.vqs[1, r.VQ_BOUND] = 1
    for _ in range(4):
        rig.serve()
        rig.drive()
    assert rig.tx.used_idx == 8
    assert len(rig.device.collect()) == 8
    rig.close()


# --- queues that are disabled, and the journal of moves between rings ---


@pytest.mark.parametrize("kind", [r.KIND_PYTHON, r.KIND_ECHO])
def test_disabled_queues(kind: int) -> None:
    """vhost-user: a started transmitq that is disabled is emptied to nowhere, a receiveq is left as it is."""
    rig = Rig(16, device=kind)
    rig.vqs[:, r.VQ_ENABLED] = 0
    rig.post_receive()
    rig.guest.feed(*[FRAME] * 5)
    rig.device.feed(FRAME)
    assert rig.drive()[1] == 5
    assert rig.serve() == (r.LOOP_IDLE, 5)
    assert (rig.tx.used_idx, rig.rx.used_idx, rig.device.collect()) == (5, 0, [])
    assert rig.tx.vq[[r.VQ_DROPPED, r.VQ_PACKETS]].tolist() == [5, 0]
    rig.vqs[:, r.VQ_ENABLED] = 1
    rig.guest.feed(FRAME)
    rig.drive()
    assert rig.serve()[1] == (1 if kind == r.KIND_ECHO else 2)
    assert (rig.tx.used_idx, rig.rx.used_idx) == (6, 1)


def test_the_journal_names_both_indices() -> None:
    """It holds what both used indices become with a move, and is closed when both are published."""
    rig = Rig(16, device=r.KIND_ECHO, start=65534)
    journal = rig.memory.low(r.JOURNAL_LEN, 64)
    rig.tx.vq[r.VQ_JOURNAL] = rig.memory.at(journal)
    rig.post_receive()
    rig.guest.feed(*[HEADER + pattern(1, 3000)] * 0, *[FRAME] * 3)
    rig.drive()
    assert rig.serve() == (r.LOOP_IDLE, 3)
    noted = [rig.memory.u16(journal + at) for at in (r.JOURNAL_RECEIVEQ_IDX, r.JOURNAL_TRANSMITQ_IDX)]
    assert noted == [rig.rx.used_idx, rig.tx.used_idx] == [1, 1]
    assert rig.memory.u16(journal + r.JOURNAL_VALID) == 0
