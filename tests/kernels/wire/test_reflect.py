"""The reflect endpoint's answers, read back by scapy: addresses, lengths, checksums; and what gets none."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.kernels.rig import WRITE, Rig, scaled
from vnetdp_kernels import rows as r
from vnetdp_kernels.wire.reflect import checksum, reply

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from scapy.layers.inet import ICMP, IP, TCP, UDP, IPOption_NOP, IPOption_RR
    from scapy.layers.inet6 import ICMPv6EchoRequest, IPv6
    from scapy.layers.l2 import ARP, Dot1Q, Ether
    from scapy.packet import Packet, Padding, Raw
    from scapy.utils import checksum as scapy_checksum

GUEST_MAC, GUEST_IP = "52:54:00:12:34:56", "10.0.0.2"
OTHER_MAC, OTHER_IP = "02:00:00:00:00:01", "10.0.0.1"
OUR_MAC = "02:02:02:02:02:02"

ETHER = Ether(src=GUEST_MAC, dst=OTHER_MAC)
INTERNET = ETHER / IP(src=GUEST_IP, dst=OTHER_IP)
X = b"x" * 20
PING = INTERNET / ICMP(id=0x1234, seq=7)
WHO_HAS = Ether(src=GUEST_MAC, dst="ff:ff:ff:ff:ff:ff") / ARP(
    op="who-has", hwsrc=GUEST_MAC, psrc=GUEST_IP, hwdst="00:00:00:00:00:00", pdst=OTHER_IP
)


def reflect(frame: bytes, at: int = 5) -> bytes | None:
    """Return the answer to *frame*, None if there is none; nothing around the frame may change."""
    mem = np.full(at + len(frame) + 64, 0xEE, np.uint8)
    mem[at : at + len(frame)] = np.frombuffer(frame, np.uint8)
    length = reply(mem, at, len(frame))
    assert (mem[:at] == 0xEE).all()
    assert (mem[at + len(frame) :] == 0xEE).all()
    assert 0 <= length <= len(frame)
    return mem[at : at + length].tobytes() if length else None


def check_ping(request: bytes, reply: bytes | None) -> None:
    """A reply has both addresses exchanged, type 0, and everything else as it was, checksums right."""
    assert reply is not None
    asked, got = Ether(request), Ether(reply)
    assert (got.src, got.dst) == (asked.dst, asked.src)
    assert (got[IP].src, got[IP].dst) == (asked[IP].dst, asked[IP].src)
    assert (got[ICMP].type, got[ICMP].code) == (0, asked[ICMP].code)
    assert (got[ICMP].id, got[ICMP].seq) == (asked[ICMP].id, asked[ICMP].seq)
    assert bytes(got[ICMP].payload) == bytes(asked[ICMP].payload)
    assert len(reply) == len(request)
    sums = got[IP].chksum, got[ICMP].chksum
    del got[IP].chksum, got[ICMP].chksum
    again = Ether(bytes(got))
    assert (again[IP].chksum, again[ICMP].chksum) == sums


@pytest.mark.parametrize("padding", [0, 1, 18])
def test_arp(padding: int) -> None:
    reply = reflect(bytes(WHO_HAS) + bytes(padding))
    assert reply is not None
    got = Ether(reply)
    assert (got.dst, got.src) == (GUEST_MAC, OUR_MAC)
    assert (got[ARP].op, got[ARP].hwsrc, got[ARP].psrc) == (2, OUR_MAC, OTHER_IP)
    assert (got[ARP].hwdst, got[ARP].pdst) == (GUEST_MAC, GUEST_IP)
    assert len(reply) == 42 + padding


@settings(max_examples=scaled(200, 80), deadline=None)
@given(
    payload=st.binary(max_size=300) | st.sampled_from((bytes(1472), b"\xff" * 1471, b"\xff\xff" * 4000)),
    ident=st.integers(0, 0xFFFF), seq=st.integers(0, 0xFFFF), ttl=st.integers(1, 255), flags=st.sampled_from((0, "DF")),
    options=st.sampled_from(([], [IPOption_NOP()] * 4, [IPOption_RR(length=39, routers=["0.0.0.0"] * 9)])),
)  # fmt: skip
def test_ping(payload: bytes, ident: int, seq: int, ttl: int, flags: str | int, options: list[Packet]) -> None:
    ip = IP(src=GUEST_IP, dst=OTHER_IP, ttl=ttl, flags=flags, options=options)
    request = bytes(ETHER / ip / ICMP(id=ident, seq=seq) / Raw(payload))
    check_ping(request, reflect(request))


@pytest.mark.parametrize("padding", [1, 4, 18])
def test_ping_with_padding(padding: int) -> None:
    """What lies behind the IP packet is no part of the checksum, and comes back too."""
    request = bytes(PING / Raw(b"odd") / Padding(b"\xaa" * padding))
    check_ping(request, reflect(request))


def with_byte(packet: Packet, at: int, value: int) -> bytes:
    frame = bytearray(bytes(packet))
    frame[at] = value
    return bytes(frame)


def arp(**fields: object) -> bytes:
    """Return an ARP request with some fields changed."""
    request = WHO_HAS.copy()
    for name, value in fields.items():
        setattr(request[ARP], name, value)
    return bytes(request)


def test_a_ping_to_all_is_answered_by_one() -> None:
    reply = reflect(bytes(Ether(src=GUEST_MAC, dst="ff:ff:ff:ff:ff:ff") / IP(src=GUEST_IP, dst=OTHER_IP) / ICMP()))
    assert reply is not None
    assert (Ether(reply).src, Ether(reply).dst) == (OUR_MAC, GUEST_MAC)
    assert Ether(reply)[IP].src == OTHER_IP


@pytest.mark.parametrize(
    "frame",
    [
        bytes(WHO_HAS)[:41],
        bytes(ETHER / ARP(op="is-at", psrc=GUEST_IP, pdst=OTHER_IP)),
        bytes(ETHER / ARP(op=3)),
        bytes(INTERNET / UDP(sport=1, dport=2) / X),
        bytes(INTERNET / TCP(sport=1, dport=2)),
        bytes(INTERNET / ICMP(type=0)),
        bytes(INTERNET / ICMP(type=3, code=1) / X),
        bytes(ETHER / IP(flags="MF") / ICMP()),
        bytes(ETHER / IP(frag=1) / ICMP()),
        bytes(ETHER / IPv6() / ICMPv6EchoRequest()),
        bytes(ETHER / Dot1Q(vlan=5) / IP() / ICMP()),
        bytes(ETHER / Raw(bytes(60))),
        bytes(14),
        bytes(60),
        b"\xff" * 60,
        bytes(PING)[:41],
        bytes(PING)[:34],
        bytes(PING)[:20],
        with_byte(PING / b"payload", 14, 0x44),  # a header of 16 bytes
        with_byte(PING / b"payload", 14, 0x4F),  # a header longer than the packet
        with_byte(PING, 17, 27),  # total length ends inside the ICMP header
        with_byte(PING, 17, 29),  # total length ends behind the frame
        with_byte(PING, 16, 0xFF),
        arp(psrc="0.0.0.0"),  # a probe: is the address free?
        arp(psrc="0.0.0.0", pdst=GUEST_IP),
        arp(psrc=OTHER_IP),  # an announcement: it is mine
        bytes(ETHER / ARP(op="is-at", psrc=GUEST_IP, pdst=GUEST_IP)),
        arp(pdst="0.0.0.0"),
        arp(pdst="224.0.0.1"),
        arp(pdst="255.255.255.255"),
        arp(psrc="239.1.2.3"),
        arp(hwtype=6),
        arp(ptype=0x86DD),
        with_byte(WHO_HAS, 18, 8),  # addresses of another length
        with_byte(WHO_HAS, 19, 16),
        with_byte(WHO_HAS, 6, 0xFF),  # from a group
        with_byte(PING, 6, 0x01),
        bytes(ETHER / IP(src=GUEST_IP, dst="224.0.0.1") / ICMP()),
        bytes(ETHER / IP(src=GUEST_IP, dst="255.255.255.255") / ICMP()),
        bytes(ETHER / IP(src="255.255.255.255", dst=OTHER_IP) / ICMP()),
        bytes(ETHER / IP(src="0.0.0.0", dst=OTHER_IP) / ICMP()),
        bytes(ETHER / IP(src="224.0.0.1", dst=OTHER_IP) / ICMP()),
    ],
    ids=range(42),
)
def test_no_answer(frame: bytes) -> None:
    assert reflect(frame) is None


@settings(max_examples=scaled(500, 200), deadline=None)
@given(
    packet=st.sampled_from((bytes(WHO_HAS), bytes(PING / b"some payload"))),
    changes=st.lists(st.tuples(st.integers(12, 40), st.integers(0, 255)), max_size=4),
    length=st.integers(14, 60),
)
def test_any_bytes(packet: bytes, changes: list[tuple[int, int]], length: int) -> None:
    """A mangled packet gets an answer of its own length or none, and nothing around it is touched."""
    frame = bytearray(packet)
    for at, value in changes:
        frame[at] = value
    reply = reflect(bytes(frame[:length]))
    assert reply is None or len(reply) == min(length, len(packet))


@settings(max_examples=scaled(300, 100), deadline=None)
@given(data=st.binary(max_size=100) | st.sampled_from((b"\xff" * 9, b"\xff\xff" * 40, bytes(7))), at=st.integers(0, 9))
def test_checksum(data: bytes, at: int) -> None:
    mem = np.full(at + len(data) + 9, 0xEE, np.uint8)
    mem[at : at + len(data)] = np.frombuffer(data, np.uint8)
    assert checksum(mem, at, len(data)) == scapy_checksum(data)


def test_through_the_rings() -> None:
    """A ping and an ARP request come back through the receiveq; a datagram between them is used, and no more."""
    rig = Rig(16, device=r.KIND_REFLECT)
    header = bytes([1, 0, 34, 0, 0, 0, 34, 0, 2, 0, 0, 0])  # asks for a checksum: an answer has its own
    requests = [bytes(PING / b"hello"), bytes(INTERNET / UDP() / X), bytes(WHO_HAS)]
    for k, request in enumerate(requests):
        gpa = rig.memory.high(12 + len(request))
        rig.memory.write(gpa, header + request)
        rig.tx.desc(k, gpa, 12 + len(request))
        rig.rx.desc(k, rig.memory.high(100), 100, WRITE)
    rig.tx.offer(0, 1, 2)
    rig.rx.offer(0, 1, 2)
    assert rig.serve() == (r.LOOP_IDLE, 3)
    assert [head for head, _ in rig.tx.used()] == [0, 1, 2]
    (first, ping_len), (second, arp_len) = rig.rx.used()
    ping, arp = (rig.memory.read(rig.rx.buffer(k)[0], n) for k, n in ((first, ping_len), (second, arp_len)))
    assert ping[:12] == arp[:12] == bytes(10) + b"\1\0"
    check_ping(requests[0], ping[12:])
    assert Ether(arp[12:])[ARP].psrc == OTHER_IP
    assert rig.tx.vq[r.VQ_DROPPED] == rig.rx.vq[r.VQ_DROPPED] == 0
