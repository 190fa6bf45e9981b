"""The `reflect` endpoint: a host that has every address, answering ARP requests and ICMP echo (IPv4)."""

from __future__ import annotations

from .atomic import Bytes, copy, load_u8, store_u8
from .jit import kernel
from .layout import ETH_HLEN
from .port import swap_macs

_ARP_LEN = 28
_IPV4_MIN_LEN = 20
_MAC_BYTE = 0x02  # our address in ARP answers: 02:02:02:02:02:02
_PROTO_ICMP = 1
_ICMP_ECHO = 8


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
def answer(frame: Bytes, at: int, length: int) -> int:
    """Turn the Ethernet frame at *at* into the answer to it, in place; return its length, 0 if it gets none."""
    ethertype = _u16(frame, at + 12)
    net = at + ETH_HLEN
    if ethertype == 0x0806 and length >= ETH_HLEN + _ARP_LEN:
        if _u16(frame, net + 6) != 1:
            return 0
        _put_u16(frame, net + 6, 2)
        copy(frame, at, frame, at + 6, 6)
        _exchange(frame, net + 8, net + 18, 10)
        for k in range(6):
            store_u8(frame, at + 6 + k, _MAC_BYTE)
            store_u8(frame, net + 8 + k, _MAC_BYTE)
        return length
    if ethertype == 0x0800 and length >= ETH_HLEN + _IPV4_MIN_LEN + 8:
        header = (load_u8(frame, net) & 15) * 4
        total = _u16(frame, net + 2)
        icmp = net + header
        if header < _IPV4_MIN_LEN or total < header + 8 or ETH_HLEN + total > length:
            return 0
        if load_u8(frame, net + 9) != _PROTO_ICMP or load_u8(frame, icmp) != _ICMP_ECHO:
            return 0
        if _u16(frame, net + 6) & 0x3FFF:
            return 0
        swap_macs(frame, at, frame, at)
        _exchange(frame, net + 12, net + 16, 4)
        store_u8(frame, icmp, 0)
        _put_u16(frame, icmp + 2, 0)
        _put_u16(frame, icmp + 2, checksum(frame, icmp, total - header))
        return length
    return 0
