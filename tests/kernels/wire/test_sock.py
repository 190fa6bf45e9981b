"""Stream and datagram sockets as the wire: frames pass whole however they are cut, and no peer harms more than itself."""

from __future__ import annotations

import errno
import socket
import threading
from collections.abc import Iterator

import numpy as np
import pytest

from tests.kernels.rig import INDIRECT, NEXT, Rig, pattern, scaled
from tests.support.by_hand import wait_for
from vnetdp_kernels import rows as r
from vnetdp_kernels import spec
from vnetdp_kernels.wire import sock

Ends = tuple[socket.socket, socket.socket]

HEADER = bytes(spec.NET_HDR_LEN)
KINDS = {socket.SOCK_STREAM: r.KIND_STREAM, socket.SOCK_DGRAM: r.KIND_DGRAM}


def _pair(kind: socket.SocketKind) -> Iterator[Ends]:
    ends = socket.socketpair(socket.AF_UNIX, kind)
    ends[1].settimeout(60)
    yield ends
    for end in ends:
        end.close()


@pytest.fixture
def stream() -> Iterator[Ends]:
    """A connection: the kernels' end, which blocks as another program may have left it, and the peer's."""
    yield from _pair(socket.SOCK_STREAM)


@pytest.fixture
def dgram() -> Iterator[Ends]:
    yield from _pair(socket.SOCK_DGRAM)


def on_wire(ends: Ends, side: str = "device", **settings: int) -> Rig:
    """Return a rig one side of which has the socket for its endpoint."""
    rig = Rig(**{"num": 16, side: KINDS[ends[0].type], **settings})  # type: ignore[arg-type]
    endpoint = getattr(rig, side)
    endpoint.fds[0] = ends[0].fileno()
    endpoint.eps[0, r.EP_CHECK] = 0
    rig.post_receive()
    return rig


def framed(*frames: bytes) -> bytes:
    """Return frames as a stream has them."""
    return b"".join(len(frame).to_bytes(4, "big") + frame for frame in frames)


def read(peer: socket.socket, length: int) -> bytes:
    """Return the next *length* bytes that the peer gets."""
    data = b""
    while len(data) < length:
        data += peer.recv(length - len(data))
    return data


def sent(rig: Rig, *frames: bytes) -> None:
    """Have the guest send frames, and the device serve them."""
    rig.guest.feed(*[HEADER + frame for frame in frames])
    assert rig.send() == len(frames)
    rig.serve()


def received(rig: Rig) -> list[bytes]:
    """Have the device serve, and return the frames that the guest gets."""
    rig.serve()
    rig.receive()
    got = rig.guest.collect()
    assert all(frame[: spec.NET_HDR_NUM_BUFFERS] == HEADER[: spec.NET_HDR_NUM_BUFFERS] for frame in got)
    return [frame[spec.NET_HDR_LEN :] for frame in got]


# --- a stream ---


def test_each_frame_leaves_behind_its_length(stream: Ends) -> None:
    rig = on_wire(stream)
    frames = [pattern(1, 14), pattern(2, 300), pattern(3, 1514)]
    sent(rig, *frames)
    expected = framed(*frames)
    assert read(stream[1], len(expected)) == expected
    assert rig.device.eps[0, [r.EP_TO_WIRE, r.EP_BYTES_TO_WIRE, r.EP_OUT_COUNT]].tolist() == [3, 1828, 0]


def test_frames_arrive_however_the_stream_is_cut(stream: Ends) -> None:
    rig = on_wire(stream)
    frames = [pattern(1, 14), pattern(2, 60), pattern(3, 61)]
    data = framed(*frames)
    for cut in range(1, len(data)):
        stream[1].sendall(data[:cut])
        got = received(rig)
        stream[1].sendall(data[cut:])
        assert [*got, *received(rig)] == frames, cut
    assert rig.device.eps[0, [r.EP_FROM_WIRE, r.EP_DROP_SHORT, r.EP_DROP_ERROR]].tolist() == [3 * (len(data) - 1), 0, 0]


def test_a_stream_that_comes_byte_by_byte(stream: Ends) -> None:
    rig = on_wire(stream)
    frames = [pattern(1, 14), pattern(2, 60)]
    got = []
    for byte in framed(*frames):
        stream[1].sendall(bytes([byte]))
        got += received(rig)
    assert got == frames


def test_a_frame_that_was_half_sent_is_finished_before_the_next(stream: Ends) -> None:
    """At every byte of three frames: the bytes that were sent are not sent again, and those behind them are."""
    frames = [pattern(1, 14), pattern(2, 60), pattern(3, 61)]
    data = framed(*frames)
    rig = on_wire(stream)
    ep = rig.device.eps[0]
    for done in range(len(data)):
        # The row holds how much of the first frame was sent; whole frames before it are gone.
        whole = max(n for n in (0, 18, 82) if n <= done)
        rig.device.out_frames[0, : len(data)] = np.frombuffer(data, np.uint8)
        ep[r.EP_OUT_FIRST], ep[r.EP_OUT_COUNT], ep[r.EP_OUT_PART] = whole, len(data) - whole, done - whole
        sent(rig, pattern(4))
        expected = data[done:] + framed(pattern(4))
        assert read(stream[1], len(expected)) == expected, done
        assert ep[[r.EP_OUT_FIRST, r.EP_OUT_COUNT, r.EP_OUT_PART, r.EP_OUT_FRAMES]].tolist() == [0, 0, 0, 0]


def test_a_peer_that_takes_no_more_holds_frames_in_the_ring(stream: Ends) -> None:
    """And in the slots of the stream, as far as they go; when it takes again, all arrive, in order."""
    stream[0].setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1)
    rig = on_wire(stream, slots=2)
    frames = [pattern(k, 1500) for k in range(scaled(600, 200))]
    expected = framed(*frames)
    todo = [HEADER + frame for frame in frames]
    stream[1].setblocking(False)
    got, blocked, halves = b"", 0, 0
    while len(got) < len(expected):
        rig.guest.feed(*todo[:2])
        del todo[: rig.send()]
        rig.guest.eps[0, r.EP_COUNT] = 0
        assert rig.serve()[0] == r.LOOP_IDLE
        blocked += rig.tx.used_idx != rig.tx.avail_idx
        halves += rig.device.eps[0, r.EP_OUT_PART] > 0
        if blocked or not todo:
            try:
                got += stream[1].recv(777)
            except BlockingIOError:
                assert not todo
    assert got == expected
    assert blocked
    assert halves
    assert rig.device.eps[0, [r.EP_DROP_ERROR, r.EP_TO_WIRE, r.EP_OUT_COUNT]].tolist() == [0, len(frames), 0]


def test_a_peer_that_takes_no_more_lets_the_loop_sleep(stream: Ends) -> None:
    rig = on_wire(stream, slots=2)
    while not rig.device.eps[0, r.EP_OUT_COUNT]:
        sent(rig, *[pattern(k, 1500) for k in range(2)])
    rig.open_eventfds()
    before = rig.device.ctl[r.CTL_SLEEPS]
    assert rig.serve(-1, 0, 50) == (r.LOOP_IDLE, 0)
    assert rig.device.ctl[r.CTL_SLEEPS] - before == 1
    rig.close()


@pytest.mark.parametrize("side", ["device", "guest"])
def test_a_peer_that_takes_again_wakes_the_loop(stream: Ends, side: str) -> None:
    rig = on_wire(stream, side, slots=2)
    endpoint, count = getattr(rig, side), 0
    while not endpoint.eps[0, r.EP_OUT_COUNT]:
        if side == "device":
            sent(rig, pattern(count, 1500))
        else:
            rig.device.feed(HEADER + pattern(count, 1500))
            assert rig.serve()[1] == 1
            rig.drive()
        count += 1
    rig.open_eventfds()
    thread = threading.Thread(target=rig.serve if side == "device" else rig.drive, args=(-1, 0, -1))
    thread.start()
    expected = framed(*[pattern(k, 1500) for k in range(count)])
    assert read(stream[1], len(expected)) == expected
    endpoint.ring_doorbell()
    thread.join()
    rig.close()


@pytest.mark.parametrize("length", [0, sock.LONGEST + 1, 1 << 31, (1 << 32) - 1])
def test_a_length_that_no_frame_has_ends_the_connection(stream: Ends, length: int) -> None:
    rig = on_wire(stream)
    stream[1].sendall(framed(pattern(1)) + length.to_bytes(4, "big") + framed(pattern(2)))
    assert received(rig) == [pattern(1)]
    assert received(rig) == []
    ep = rig.device.eps[0]
    assert ep[r.EP_LOST] == r.LOST_LENGTH + length
    assert stream[1].recv(1) == b""
    sent(rig, pattern(3))
    assert ep[[r.EP_DROP_ERROR, r.EP_TO_WIRE, r.EP_FROM_WIRE]].tolist() == [1, 0, 1]


def test_the_longest_frame_passes_both_ways(stream: Ends) -> None:
    rig = on_wire(stream, num=64)
    longest = (bytes(range(256)) * 257)[: spec.MAX_FRAME_LEN]
    stream[1].sendall(framed(longest, pattern(1)))
    assert received(rig) == [longest, pattern(1)]
    gpa = rig.memory.high(spec.NET_HDR_LEN + len(longest))
    rig.memory.write(gpa, HEADER + longest)
    rig.tx.desc(0, gpa, spec.NET_HDR_LEN + len(longest))
    rig.tx.offer(0)
    rig.serve()
    expected = framed(longest)
    assert read(stream[1], len(expected)) == expected


def test_frames_too_short_are_dropped_one_by_one(stream: Ends) -> None:
    rig = on_wire(stream)
    shorts = scaled(30_000, 1000)
    data = framed(*[b"x"] * shorts, pattern(1))
    got: list[bytes] = []
    feeder = threading.Thread(target=stream[1].sendall, args=(data,))
    feeder.start()

    def arrived() -> bool:
        got.extend(received(rig))
        return bool(got)

    wait_for(arrived, "the frame behind them")
    feeder.join()
    assert got == [pattern(1)]
    assert rig.device.eps[0, r.EP_DROP_SHORT] == shorts


def test_frames_too_long_for_the_guests_buffers_are_dropped_alone(stream: Ends) -> None:
    rig = on_wire(stream, "guest", buf_len=128)
    stream[1].sendall(framed(pattern(1), pattern(2, 200), pattern(3)))
    rig.drive()
    assert rig.tx.avail_idx == 2
    assert rig.guest.eps[0, r.EP_DROP_LONG] == 1


def test_frames_that_came_before_the_end_arrive(stream: Ends) -> None:
    """The half of a frame that the end cut off does not, and nothing is read or written any more."""
    rig = on_wire(stream)
    stream[1].sendall(framed(pattern(1), pattern(2)) + framed(pattern(3))[:20])
    stream[1].close()
    assert received(rig) == [pattern(1), pattern(2)]
    received(rig)
    ep = rig.device.eps[0]
    assert ep[[r.EP_LOST, r.EP_COUNT, r.EP_GONE]].tolist() == [r.LOST_END, 0, 1]
    sent(rig, pattern(4), pattern(5))
    assert ep[[r.EP_DROP_ERROR, r.EP_TO_WIRE]].tolist() == [2, 0]


def test_frames_that_wait_for_a_peer_that_goes_are_counted(stream: Ends) -> None:
    rig = on_wire(stream, slots=2)
    while not rig.device.eps[0, r.EP_OUT_COUNT]:
        sent(rig, pattern(1, 1500))
    sent(rig, pattern(2, 1500))
    stream[1].close()
    rig.serve()
    assert rig.device.eps[0, [r.EP_DROP_ERROR, r.EP_OUT_COUNT, r.EP_OUT_FRAMES]].tolist() == [2, 0, 0]


# --- a datagram socket ---


@pytest.mark.parametrize("pieces", [1, 2, 61, 62, 63, 300])
def test_a_datagram_takes_a_frame_in_any_pieces(dgram: Ends, pieces: int) -> None:
    rig = on_wire(dgram)
    data = HEADER + pattern(3, 1200)
    gpa, table = rig.memory.high(len(data)), rig.memory.low(16 * pieces)
    rig.memory.write(gpa, data)
    rig.tx.desc(0, table, 16 * pieces, INDIRECT)
    size = len(data) // pieces
    for k in range(pieces):
        more = k + 1 < pieces
        rig.tx.desc(k, gpa + k * size, size if more else len(data) - k * size, NEXT * more, k + 1, table=table)
    rig.tx.offer(0)
    assert rig.serve() == (r.LOOP_IDLE, 1)
    assert dgram[1].recv(4096) == data[spec.NET_HDR_LEN :]
    assert rig.device.eps[0, [r.EP_TO_WIRE, r.EP_BYTES_TO_WIRE]].tolist() == [1, 1200]


def test_each_datagram_is_a_frame(dgram: Ends) -> None:
    """One too short to be one is dropped, and one too long: nothing of either reaches the guest."""
    rig = on_wire(dgram)
    got = []
    for data in (pattern(1), b"", b"x" * 13, bytes(sock.LONGEST + 1), pattern(2, 1514)):
        dgram[1].send(data)
        got += received(rig)
    assert got == [pattern(1), pattern(2, 1514)]
    assert rig.device.eps[0, [r.EP_DROP_SHORT, r.EP_DROP_LONG, r.EP_LOST]].tolist() == [2, 1, 0]


def test_a_peer_that_takes_no_datagrams_holds_them_in_the_ring(dgram: Ends) -> None:
    dgram[0].setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1)
    rig = on_wire(dgram, num=64)
    rig.open_eventfds()
    frames = [pattern(k) for k in range(48)]
    for at in range(0, len(frames), 8):
        rig.guest.feed(*[HEADER + frame for frame in frames[at : at + 8]])
        assert rig.send() == 8
    assert rig.serve(-1, 0, 50)[0] == r.LOOP_IDLE
    assert rig.device.ctl[r.CTL_SLEEPS] == 1
    assert 0 < rig.device.eps[0, r.EP_TO_WIRE] < len(frames)
    thread = threading.Thread(target=rig.serve, args=(-1, 0, -1))
    thread.start()
    got = [dgram[1].recv(4096) for _ in frames]
    rig.device.ring_doorbell()
    thread.join()
    rig.close()
    assert got == frames
    assert rig.device.eps[0, r.EP_DROP_ERROR] == 0


def test_a_peer_that_has_closed_its_datagram_socket_is_lost(dgram: Ends) -> None:
    rig = on_wire(dgram)
    dgram[1].close()
    sent(rig, pattern(1), pattern(2))
    ep = rig.device.eps[0]
    assert ep[[r.EP_LOST, r.EP_DROP_ERROR, r.EP_TO_WIRE, r.EP_GONE]].tolist() == [-errno.ECONNREFUSED, 2, 0, 1]


# --- without a connection ---


@pytest.mark.parametrize("side", ["device", "guest"])
def test_a_loop_finds_a_connection_that_was_made_while_it_slept(stream: Ends, side: str) -> None:
    rig = on_wire(stream, side)
    endpoint, other = (rig.device, rig.guest) if side == "device" else (rig.guest, rig.device)
    sock.lose(endpoint.eps[0], r.LOST_END)
    rig.open_eventfds()
    thread = threading.Thread(target=rig.serve if side == "device" else rig.drive, args=(-1, 0, -1))
    thread.start()
    wait_for(lambda: bool(endpoint.ctl[r.CTL_SLEEPS] > 1), "it slept, and looked again")
    stream[1].sendall(framed(pattern(7)))
    endpoint.eps[0, r.EP_GONE] = 0
    endpoint.eps[0, r.EP_LOST] = 0
    wait_for(lambda: bool(endpoint.eps[0, r.EP_FROM_WIRE]), "the frame came in")
    wait_for(lambda: not endpoint.eps[0, r.EP_BLOCKED], "it is not held up any more")
    endpoint.ring_doorbell()
    thread.join()
    rig.close()
    if side == "device":
        rig.receive()
    else:
        rig.serve()
    assert other.collect() == [HEADER + pattern(7)]
