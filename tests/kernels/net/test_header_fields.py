"""virtio_net_hdr of a driver that breaks the rules: no field goes on that means nothing, and no hint is relied on."""

from __future__ import annotations

import struct

import pytest

from tests.kernels.net.test_hostile_net import post_small, put
from tests.kernels.rig import Rig, pattern
from vnetdp_kernels import rows as r
from vnetdp_kernels import spec

BODY = pattern(3)
CSUM, VALID, RSC = 1, 2, 4
TCP4, UDP, TCP6, USO, ECN = 1, 3, 4, 5, 0x80


def header(flags: int = 0, gso: int = 0, hdr_len: int = 0, size: int = 0, start: int = 0, offset: int = 0) -> bytes:
    return struct.pack("<BBHHHHH", flags, gso, hdr_len, size, start, offset, 0)


@pytest.mark.parametrize(
    ("sent", "passed_on"),
    [
        (header(hdr_len=0xFFFF), header()),
        (header(hdr_len=1, size=9, start=0xFFFF, offset=0xFFFF), header()),
        (header(0xF8, hdr_len=300), header()),
        (header(VALID | RSC, start=7, offset=7), header()),
        (header(CSUM, hdr_len=5, size=3, start=20, offset=4), header(CSUM, start=20, offset=4)),
        (header(0xFF, start=20, offset=4), header(CSUM, start=20, offset=4)),
        (header(CSUM, ECN, 30, start=20, offset=4), header(CSUM, start=20, offset=4)),
        (header(CSUM, TCP4, 13, 20, 20, 4), header(CSUM, TCP4, 0, 20, 20, 4)),
        (header(CSUM, TCP4, len(BODY), 20, 20, 4), header(CSUM, TCP4, len(BODY), 20, 20, 4)),
        (header(CSUM, TCP4, len(BODY) + 1, 20, 20, 4), header(CSUM, TCP4, 0, 20, 20, 4)),
        (header(CSUM, TCP6 | ECN, 40, 20, 20, 4), header(CSUM, TCP6 | ECN, 40, 20, 20, 4)),
    ],
)
def test_a_header_goes_to_the_wire_with_what_it_asks_for(sent: bytes, passed_on: bytes) -> None:
    rig = Rig(16)
    put(rig.tx, 0, [len(sent) + len(BODY)], sent + BODY)
    assert rig.serve() == (r.LOOP_PYTHON, 1)
    assert rig.device.collect() == [passed_on + BODY]


@pytest.mark.parametrize(
    "sent",
    [
        header(CSUM, start=len(BODY) - 3, offset=2),
        header(CSUM, start=0xFFFF, offset=0xFFFF),
        header(CSUM, TCP4, 40, 0, 20, 4),
        header(CSUM, TCP4, 40, 20, 20, 0xFFFF),
        header(0, TCP4, 40, 20),
        header(CSUM, 2, 40, 20, 20, 4),
        header(CSUM, 7, 40, 20, 20, 4),
        header(CSUM, 0x7F, 40, 20, 20, 4),
        header(CSUM, ECN | 6, 40, 20, 20, 4),
    ],
)
def test_a_frame_that_asks_for_what_can_not_be_done_reaches_no_guest(sent: bytes) -> None:
    """However much the receiver negotiated."""
    rig = Rig(16, device=r.KIND_ECHO)
    post_small(rig, 2, 2000)
    put(rig.tx, 0, [len(sent) + len(BODY)], sent + BODY)
    put(rig.tx, 1, [len(sent) + len(BODY)], header() + BODY)
    assert rig.serve()[1] == 2
    assert len(rig.rx.used()) == 1
    assert rig.device.eps[0, r.EP_DROP_OFFLOAD] == rig.tx.vq[r.VQ_DROPPED] == 1


@pytest.mark.parametrize(
    ("gso", "offload"),
    [
        (TCP4, spec.OFFLOAD_TSO4),
        (TCP6, spec.OFFLOAD_TSO6),
        (UDP, spec.OFFLOAD_UFO),
        (USO, spec.OFFLOAD_USO4 | spec.OFFLOAD_USO6),
    ],
)
def test_a_segment_reaches_the_guest_that_takes_its_kind_alone(gso: int, offload: int) -> None:
    for offloads in (spec.OFFLOAD_CSUM | offload, 127 & ~offload):
        rig = Rig(16, device=r.KIND_ECHO)
        rig.rx.vq[r.VQ_OFFLOADS] = offloads
        post_small(rig, 1, 2000)
        put(rig.tx, 0, [12 + len(BODY)], header(CSUM, gso, 40, 20, 20, 4) + BODY)
        assert rig.serve()[1] == 1
        assert len(rig.rx.used()) == bool(offloads & offload)
        assert rig.device.eps[0, r.EP_DROP_OFFLOAD] == (not offloads & offload)


# --- the MTU ---


@pytest.mark.parametrize("pieces", [[], [13], [12, 1], [12, 2], [1] * 20], ids=str)
@pytest.mark.parametrize("tag", [b"\x81\0", b"\x88\xa8", b"\x88\xb5", b"\0\x81"], ids=bytes.hex)
@pytest.mark.parametrize("device", [r.KIND_PYTHON, r.KIND_ECHO], ids=["drain", "forward"])
def test_four_more_bytes_are_a_tags_alone(device: int, tag: bytes, pieces: list[int]) -> None:
    limit = 60 + spec.ETH_HLEN
    passed = 3 if tag in (b"\x81\0", b"\x88\xa8") else 1
    rig = Rig(64, device=device)
    rig.tx.vq[r.VQ_MAX_FRAME] = limit
    post_small(rig, 8, 2000)
    for head, length in ((0, limit), (21, limit + 1), (42, limit + 4)):
        frame = pattern(1, length)
        frame = frame[:12] + tag + frame[14:]
        put(rig.tx, head, [12, *pieces, length - sum(pieces)], header() + frame, table=True)
    put(rig.tx, 63, [12 + limit + 5], header() + pattern(1, 12) + tag + pattern(1, limit - 9))
    assert rig.serve()[1] == 4
    assert rig.device.eps[0, r.EP_TO_WIRE] == passed
    assert rig.device.eps[0, r.EP_DROP_LONG] == rig.tx.vq[r.VQ_DROPPED] == 4 - passed


def test_a_segment_may_be_longer_than_the_mtu() -> None:
    rig = Rig(16)
    rig.tx.vq[r.VQ_MAX_FRAME] = len(BODY) - 1
    put(rig.tx, 0, [12 + len(BODY)], header(CSUM, TCP4, 40, 20, 20, 4) + BODY)
    put(rig.tx, 1, [12 + len(BODY)], header(CSUM, ECN, 40, 20, 20, 4) + BODY)
    assert rig.serve()[1] == 2
    assert len(rig.device.collect()) == rig.device.eps[0, r.EP_DROP_LONG] == 1
