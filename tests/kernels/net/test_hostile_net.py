"""Frames and buffers at the edge: headers in pieces, frames too short or too long, buffers too small, and offloads.

None of it breaks a queue. What can't be delivered is dropped and counted, and what comes after it goes through.
"""

from __future__ import annotations

import struct

import pytest

from tests.kernels.rig import INDIRECT, NEXT, WRITE, Queue, Rig, pattern
from vnetdp_kernels import rows as r
from vnetdp_kernels import spec

HEADER = bytes(spec.NET_HDR_LEN)
FRAME = HEADER + pattern(1)


def put(queue: Queue, head: int, sizes: list[int], data: bytes = b"", *, table: bool = False) -> int:
    """Write a chain of so many bytes each at *head*, in a table if told; return where its buffers lie, end to end."""
    gpa = queue.memory.high(sum(sizes))
    write = 0 if data else WRITE
    if data:
        queue.memory.write(gpa, data)
    first = head
    entries = -1
    if table:
        entries, first = queue.memory.low(16 * len(sizes)), 0
        queue.desc(head, entries, 16 * len(sizes), INDIRECT)
    at = gpa
    for k, size in enumerate(sizes, first):
        more = NEXT if k + 1 < first + len(sizes) else 0
        queue.desc(k, at, size, write | more, k + 1, table=entries)
        at += size
    queue.offer(head)
    return gpa


def post_small(rig: Rig, n: int, size: int) -> int:
    """Post *n* buffers of *size* bytes, one behind the other in memory; return where they begin."""
    gpa = rig.memory.high(n * size)
    for k in range(n):
        rig.rx.desc(k, gpa + size * k, size, WRITE)
    rig.rx.offer(*range(n))
    return gpa


# --- guest to wire ---


@pytest.mark.parametrize("device", [r.KIND_PYTHON, r.KIND_ECHO], ids=["drain", "forward"])
@pytest.mark.parametrize("hdr_len", [spec.NET_HDR_LEN, spec.NET_HDR_LEN_LEGACY])
@pytest.mark.parametrize("extra", range(-11, spec.ETH_HLEN))
def test_frames_too_short(extra: int, hdr_len: int, device: int) -> None:
    """No whole header, no frame, or 1 to 13 bytes: used, dropped, counted (CVE-2022-2132, CVE-2024-41090)."""
    rig = Rig(64, hdr_len=hdr_len, mergeable=False, device=device)
    length = max(1, hdr_len + extra)
    put(rig.tx, 0, [1] * length, b"\xff" * length)
    put(rig.tx, 40, [length], b"\xff" * length)
    put(rig.tx, 50, [len(FRAME)], HEADER[:hdr_len] + FRAME[12:] + bytes(12 - hdr_len))
    post_small(rig, 1, 2000)
    assert rig.serve()[1] == 3
    if device == r.KIND_PYTHON:
        assert [frame[12:72] for frame in rig.device.collect()] == [FRAME[12:]]
    else:
        assert len(rig.rx.used()) == 1
    assert [head for head, _ in rig.tx.used()] == [0, 40, 50]
    assert rig.device.eps[0, r.EP_DROP_SHORT] == 2
    assert rig.tx.vq[[r.VQ_STATUS, r.VQ_DROPPED, r.VQ_PACKETS, r.VQ_CHAINS]].tolist() == [0, 2, 1, 3]
    assert rig.tx.vq[r.VQ_BYTES] == len(FRAME) - hdr_len


@pytest.mark.parametrize("table", [False, True])
@pytest.mark.parametrize(
    "sizes",
    [[1] * 72, [1] * 11 + [61], [11, 61], [13, 59], [12, 60], [5, 5, 5, 57], [1, 10, 1, 60], [1, 71], [12, 1, 59]],
    ids=str,
)
def test_header_in_pieces(sizes: list[int], table: bool) -> None:
    rig = Rig(128)
    data = bytes((1, 2, 20, 0, 5, 6, 7, 8, 9, 10)) + bytes(2) + pattern(5)
    put(rig.tx, 3, sizes, data, table=table)
    assert rig.serve() == (r.LOOP_PYTHON, 1)
    assert rig.device.collect() == [data]


@pytest.mark.parametrize("device", [r.KIND_PYTHON, r.KIND_ECHO], ids=["drain", "forward"])
@pytest.mark.parametrize("pieces", [1, 2, 300])
def test_frames_too_long(pieces: int, device: int) -> None:
    """The longest frame goes through; one of a byte more is dropped and counted."""
    rig = Rig(16, device=device, buf_len=1 << 14)
    longest = spec.NET_HDR_LEN + spec.MAX_FRAME_LEN
    post_small(rig, 1, longest + 100)
    for head, length in ((0, longest + 1), (1, longest)):
        sizes = [length // pieces] * (pieces - 1)
        data = HEADER + pattern(head, length - len(HEADER))
        put(rig.tx, head, [*sizes, length - sum(sizes)], data, table=True)
    assert rig.serve()[1] == 2
    assert rig.tx.used() == [(0, 0), (1, 0)]
    assert rig.device.eps[0, r.EP_DROP_LONG] == rig.tx.vq[r.VQ_DROPPED] == rig.tx.vq[r.VQ_PACKETS] == 1
    if device == r.KIND_PYTHON:
        assert rig.device.collect() == [data]
    else:
        assert rig.rx.used() == [(0, longest)]
        assert rig.memory.read(rig.rx.buffer(0)[0], longest)[12:] == data[12:]


def test_a_legacy_header_carries_nothing_over() -> None:
    """num_buffers, which a legacy header has not, is zero towards the wire, whatever was in hand before."""
    rig = Rig(16, hdr_len=spec.NET_HDR_LEN_LEGACY, mergeable=False)
    rig.device.scratch.hdr[:] = 0xFF
    put(rig.tx, 0, [70], FRAME[2:])
    assert rig.serve()[1] == 1
    assert rig.device.collect() == [FRAME]


# --- wire to guest ---


def test_receive_buffers_of_one_byte() -> None:
    """A frame over 72 buffers, its header over twelve of them; num_buffers says so."""
    rig = Rig(128)
    gpa = post_small(rig, 128, 1)
    rig.device.feed(FRAME)
    assert rig.serve() == (r.LOOP_IDLE, 1)
    assert rig.rx.used() == [(k, 1) for k in range(72)]
    assert rig.memory.read(gpa, 128) == HEADER[:10] + b"\x48\0" + FRAME[12:] + bytes(56)


@pytest.mark.parametrize("size", [1, 12, 71])
@pytest.mark.parametrize("posted", [1, 4])
def test_buffer_too_small_without_merging(posted: int, size: int) -> None:
    """The frame is dropped, the buffer stays available, and that for ever (CVE-2015-7295, openvmm #3120)."""
    rig = Rig(4, mergeable=False)
    post_small(rig, posted, size)
    for k in range(1, 301):
        rig.device.feed(FRAME)
        assert rig.serve()[0] == r.LOOP_IDLE
        assert rig.rx.used() == []
        assert rig.device.eps[0, r.EP_DROP_NO_BUFFER] == rig.rx.vq[r.VQ_DROPPED] == k
        assert rig.device.eps[0, r.EP_PENDING] == 0
    assert rig.rx.vq[[r.VQ_STATUS, r.VQ_PACKETS, r.VQ_CHAINS]].tolist() == [0, 0, 0]
    if size > 26:
        rig.device.feed(FRAME[:size])
        rig.serve()
        assert rig.rx.used() == [(0, size)]


@pytest.mark.parametrize("hdr_len", [spec.NET_HDR_LEN, spec.NET_HDR_LEN_LEGACY])
@pytest.mark.parametrize("size", [72, 73, 4096])
def test_buffer_large_enough_without_merging(size: int, hdr_len: int) -> None:
    """One buffer a frame, num_buffers 1 whatever the endpoint put there, and no byte behind the frame written."""
    rig = Rig(4, mergeable=False, hdr_len=hdr_len)
    gpa = post_small(rig, 4, size)
    rig.memory.write(gpa, b"\xee" * 4 * size)
    rig.device.feed(HEADER[:10] + b"\xff\xff" + FRAME[12:])
    rig.serve()
    expected = HEADER[:10] + (b"\1\0" if hdr_len == spec.NET_HDR_LEN else b"") + FRAME[12:]
    assert rig.rx.used() == [(0, len(expected))]
    assert rig.memory.read(gpa, 4 * size) == expected.ljust(4 * size, b"\xee")


@pytest.mark.parametrize("device", [r.KIND_PYTHON, r.KIND_ECHO], ids=["fill", "forward"])
def test_merge_that_runs_out_of_buffers(device: int) -> None:
    """Nothing is used or written, the frame waits; with one buffer more it is delivered, once (CVE-2022-26353)."""
    rig = Rig(8, device=device)
    rig.memory.log_on()
    gpa = post_small(rig, 3, 20)
    if device == r.KIND_PYTHON:
        rig.device.feed(FRAME)
    else:
        put(rig.tx, 0, [len(FRAME)], FRAME)
    for _ in range(3):
        assert rig.serve() == (r.LOOP_IDLE, 0)
        assert rig.rx.used() == rig.tx.used() == []
        assert rig.memory.read(gpa, 60) == bytes(60)
        assert not rig.memory.log.any()
    more = rig.memory.high(20)
    rig.rx.desc(3, more, 20, WRITE)
    rig.rx.offer(3)
    assert rig.serve() == (r.LOOP_IDLE, 1)
    assert rig.rx.used() == [(0, 20), (1, 20), (2, 20), (3, 12)]
    assert rig.memory.read(gpa, 60) + rig.memory.read(more, 12) == HEADER[:10] + b"\4\0" + FRAME[12:]
    assert rig.serve() == (r.LOOP_IDLE, 0)
    assert rig.memory.log.any()


@pytest.mark.parametrize("device", [r.KIND_PYTHON, r.KIND_ECHO], ids=["fill", "forward"])
def test_frame_that_no_ring_full_of_buffers_holds(device: int) -> None:
    """Dropped, and the next is delivered: a frame never wants more buffers than the ring has."""
    rig = Rig(8, device=device)
    post_small(rig, 8, 20)
    if device == r.KIND_PYTHON:
        rig.device.feed(HEADER + pattern(1, 149), FRAME)
    else:
        put(rig.tx, 0, [161], HEADER + pattern(1, 149))
        put(rig.tx, 1, [len(FRAME)], FRAME)
    assert rig.serve()[0] == r.LOOP_IDLE
    assert [head for head, _ in rig.rx.used()] == [0, 1, 2, 3]
    assert rig.device.eps[0, r.EP_DROP_NO_BUFFER] == rig.rx.vq[r.VQ_DROPPED] == 1


def test_merge_of_more_pieces_than_there_are_rows() -> None:
    """Two chains, each good by itself, of more descriptors together than any frame may take: dropped."""
    rig = Rig(16)
    put(rig.rx, 0, [1] * 1000, table=True)
    put(rig.rx, 1, [1] * 1000, table=True)
    rig.device.feed(HEADER + pattern(1, 1100), FRAME)
    assert rig.serve()[0] == r.LOOP_IDLE
    assert rig.rx.used() == [(0, 72)]
    assert rig.device.eps[0, r.EP_DROP_NO_BUFFER] == 1
    assert rig.rx.vq[r.VQ_STATUS] == 0


@pytest.mark.parametrize("why", ["no buffer", "offload"])
def test_a_flood_that_is_dropped_ends_with_the_budget(why: str) -> None:
    """A wire faster than us that brings nothing of use may not keep the worker (CVE-2019-3900)."""
    rig = Rig(4, mergeable=False)
    post_small(rig, 4, 64)
    rig.device.feed(*[(HEADER if why == "no buffer" else b"\0\1" + HEADER[2:]) + pattern(1)] * 8)
    rig.vqs[0, r.VQ_OFFLOADS] = 0
    assert rig.fill(budget=5) == 5
    assert rig.device.eps[0, r.EP_COUNT] == 3
    assert rig.serve() == (r.LOOP_IDLE, 3)
    slot = r.EP_DROP_NO_BUFFER if why == "no buffer" else r.EP_DROP_OFFLOAD
    assert rig.device.eps[0, slot] == rig.rx.vq[r.VQ_DROPPED] == 8


def test_buffers_that_overlap() -> None:
    """Buffers on top of each other, and an echo into the very buffer it comes from: nobody's loss but the guest's."""
    rig = Rig(16, device=r.KIND_ECHO)
    gpa = put(rig.tx, 0, [len(FRAME)], FRAME)
    rig.tx.offer(0, 0)
    for k, skew in enumerate((0, 1, 12)):
        rig.rx.desc(k, gpa + skew, len(FRAME), WRITE)
    rig.rx.offer(0, 1, 2)
    assert rig.serve() == (r.LOOP_IDLE, 3)
    assert rig.memory.intact()


def test_a_zero_length_buffer_leaves_no_trace_in_the_log() -> None:
    """CVE-2019-14835."""
    rig = Rig(16)
    rig.memory.log_on()
    rig.rx.desc(0, rig.memory.high(64), 0, WRITE)
    rig.rx.offer(0)
    rig.device.feed(FRAME)
    assert rig.serve() == (r.LOOP_BROKEN, 0)
    assert not rig.memory.log.any()


# --- offloads (5.1.6.4.1) ---

ALL = 127
CSUM, TSO4, TSO6, ECN = spec.OFFLOAD_CSUM, spec.OFFLOAD_TSO4, spec.OFFLOAD_TSO6, spec.OFFLOAD_ECN
UFO, USO = spec.OFFLOAD_UFO, spec.OFFLOAD_USO4 | spec.OFFLOAD_USO6
NEEDS, VALID = spec.VIRTIO_NET_HDR_F_NEEDS_CSUM, spec.VIRTIO_NET_HDR_F_DATA_VALID
ECN_BIT = spec.VIRTIO_NET_HDR_GSO_ECN
PASSED, CLEARED, DROPPED = "passed", "cleared", "dropped"


@pytest.mark.parametrize("device", [r.KIND_PYTHON, r.KIND_ECHO], ids=["fill", "forward"])
@pytest.mark.parametrize(
    ("flags", "gso", "offloads", "outcome"),
    [
        (0, 0, 0, PASSED),
        (NEEDS, 0, CSUM, PASSED),
        (NEEDS, 0, ALL & ~CSUM, CLEARED),
        (VALID, 0, CSUM, PASSED),
        (VALID, 0, 0, CLEARED),
        (NEEDS, spec.VIRTIO_NET_HDR_GSO_TCPV4, CSUM | TSO4, PASSED),
        (NEEDS, spec.VIRTIO_NET_HDR_GSO_TCPV4, ALL & ~TSO4, DROPPED),
        (NEEDS, spec.VIRTIO_NET_HDR_GSO_TCPV4, ALL & ~CSUM, DROPPED),
        (NEEDS, spec.VIRTIO_NET_HDR_GSO_TCPV6, CSUM | TSO6, PASSED),
        (NEEDS, spec.VIRTIO_NET_HDR_GSO_TCPV6, ALL & ~TSO6, DROPPED),
        (NEEDS, spec.VIRTIO_NET_HDR_GSO_TCPV4 | ECN_BIT, CSUM | TSO4 | ECN, PASSED),
        (NEEDS, spec.VIRTIO_NET_HDR_GSO_TCPV4 | ECN_BIT, ALL & ~ECN, DROPPED),
        (NEEDS, spec.VIRTIO_NET_HDR_GSO_UDP, CSUM | UFO, PASSED),
        (NEEDS, spec.VIRTIO_NET_HDR_GSO_UDP, ALL & ~UFO, DROPPED),
        (NEEDS, spec.VIRTIO_NET_HDR_GSO_UDP_L4, CSUM | USO, PASSED),
        (NEEDS, spec.VIRTIO_NET_HDR_GSO_UDP_L4, CSUM | spec.OFFLOAD_USO4, DROPPED),
        (0, spec.VIRTIO_NET_HDR_GSO_TCPV4, 0, DROPPED),
        (NEEDS, 0x7F, CSUM | TSO4 | TSO6 | UFO, DROPPED),
    ],
)
def test_offloads(flags: int, gso: int, offloads: int, outcome: str, device: int) -> None:
    """A frame that its receiver can't take as it is loses its flags, if that is enough, or is dropped."""
    rig = Rig(16, device=device)
    rig.rx.vq[r.VQ_OFFLOADS] = offloads
    gpa = post_small(rig, 2, 100)
    header = struct.pack("<BBHHHHH", flags, gso, 54, 1448, 34, 16, 0)
    frames = [header + pattern(1), FRAME]
    if device == r.KIND_PYTHON:
        rig.device.feed(*frames)
    else:
        for head, frame in enumerate(frames):
            put(rig.tx, head, [len(frame)], frame)
    assert rig.serve()[1] == 2
    if outcome == DROPPED:
        assert rig.rx.used() == [(0, 72)]
        assert rig.device.eps[0, r.EP_DROP_OFFLOAD] == 1
        header = HEADER
    else:
        assert rig.rx.used() == [(0, 72), (1, 72)]
        header = header if outcome == PASSED else HEADER
        if device == r.KIND_ECHO and not gso:
            # Of a driver's header goes on what has a meaning: no checksum is done, and nothing is cut up.
            header = (
                struct.pack("<BBHHHHH", NEEDS, 0, 0, 0, 34, 16, 0) if flags & NEEDS and header != HEADER else HEADER
            )
    assert rig.memory.read(gpa, 72) == header[:10] + b"\1\0" + pattern(1)
