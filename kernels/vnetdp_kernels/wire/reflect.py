"""The `reflect` endpoint: a host that has every address, answering ARP requests and ICMP echo (IPv4)."""

from __future__ import annotations

from .. import spec
from ..platform.atomic import Bytes, copy, load_u8, store_u8
from ..platform.jit import kernel
from .frame import swap_macs

_ARP_LEN = 28
_IPV4_MIN_LEN = 20
_MAC_BYTE = 0x02  # our address in ARP answers, and where none was asked for: 02:02:02:02:02:02
_PROTO_ICMP = 1
_ICMP_ECHO = 8
_MULTICAST = 224


@kernel
def _u16(frame: Bytes, at: int) -> int:
    return int(load_u8(frame, at) << 8 | load_u8(frame, at + 1))


@kernel
def _put_u16(frame: Bytes, at: int, value: int) -> None:
    store_u8(frame, at, value >> 8)
    store_u8(frame, at + 1, value)


@kernel
def checksum(frame: Bytes, at: int, length: int) -> int:
    """Return the Internet checksum (RFC 1071) of *length* bytes."""
    total = 0
    for k in range(at, at + length - 1, 2):
        total += _u16(frame, k)
    if length & 1:
        total += load_u8(frame, at + length - 1) << 8
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return int(~total & 0xFFFF)


@kernel
def _exchange(frame: Bytes, a: int, b: int, length: int) -> None:
    for k in range(length):
        byte = load_u8(frame, a + k)
        store_u8(frame, a + k, load_u8(frame, b + k))
        store_u8(frame, b + k, byte)


@kernel
def _is_host(frame: Bytes, at: int) -> bool:
    """True if the IPv4 address at *at* can be one host's: not 0.0.0.0/8, multicast, reserved or broadcast."""
    return 0 < load_u8(frame, at) < _MULTICAST


@kernel
def _put_our_mac(frame: Bytes, at: int) -> None:
    for k in range(6):
        store_u8(frame, at + k, _MAC_BYTE)


@kernel
def _answer_arp(frame: Bytes, at: int, length: int) -> int:
    net = at + spec.ETH_HLEN
    if _u16(frame, net) != 1 or _u16(frame, net + 2) != 0x0800 or _u16(frame, net + 4) != 0x0604:
        return 0
    if _u16(frame, net + 6) != 1:
        return 0
    # RFC 5227: a probe (no sender) asks whether an address is free, an announcement (of the sender's own) says that it is
    # taken. An answer to either means that we have that address, and the guest gives it up.
    if not _is_host(frame, net + 14) or not _is_host(frame, net + 24):
        return 0
    if _u16(frame, net + 14) == _u16(frame, net + 24) and _u16(frame, net + 16) == _u16(frame, net + 26):
        return 0
    _put_u16(frame, net + 6, 2)
    copy(frame, at, frame, at + 6, 6)
    _exchange(frame, net + 8, net + 18, 10)
    _put_our_mac(frame, at + 6)
    _put_our_mac(frame, net + 8)
    return length


@kernel
def _answer_echo(frame: Bytes, at: int, length: int) -> int:
    net = at + spec.ETH_HLEN
    header = (load_u8(frame, net) & 15) * 4
    total = _u16(frame, net + 2)
    icmp = net + header
    if header < _IPV4_MIN_LEN or total < header + 8 or spec.ETH_HLEN + total > length:
        return 0
    if load_u8(frame, net + 9) != _PROTO_ICMP or load_u8(frame, icmp) != _ICMP_ECHO:
        return 0
    if _u16(frame, net + 6) & 0x3FFF:
        return 0
    # The addresses change places, and a sender is one host: RFC 1122, 3.2.1.3.
    if not _is_host(frame, net + 12) or not _is_host(frame, net + 16):
        return 0
    to_group = load_u8(frame, at) & 1
    swap_macs(frame, at, frame, at)
    if to_group:
        _put_our_mac(frame, at + 6)
    _exchange(frame, net + 12, net + 16, 4)
    store_u8(frame, icmp, 0)
    _put_u16(frame, icmp + 2, 0)
    _put_u16(frame, icmp + 2, checksum(frame, icmp, total - header))
    return length


@kernel
def reply(frame: Bytes, at: int, length: int) -> int:
    """Turn the Ethernet frame at *at* into the answer to it, in place; return its length, 0 if it gets none."""
    if load_u8(frame, at + 6) & 1:
        return 0  # no sender to answer: a group sends nothing
    ethertype = _u16(frame, at + 12)
    if ethertype == 0x0806 and length >= spec.ETH_HLEN + _ARP_LEN:
        return int(_answer_arp(frame, at, length))
    if ethertype == 0x0800 and length >= spec.ETH_HLEN + _IPV4_MIN_LEN + 8:
        return int(_answer_echo(frame, at, length))
    return 0
