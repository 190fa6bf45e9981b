"""Captures in memory: find the frames of pcap records and of pcapng blocks, and copy them into frame slots.

A scanner reads *data* from state[AT] to state[END], believes no length in it, and leaves state[AT] at the first record or
block that it did not get past. Section header and interface description blocks, of which a file has few, are Python's.
"""

from __future__ import annotations

from typing import Final

from .. import rows as r
from .. import spec
from ..platform.atomic import (
    Bytes,
    Words,
    copy,
    load_u16_unaligned,
    load_u32_unaligned,
    store_u32_unaligned,
    store_u64_unaligned,
)
from ..platform.jit import inlined, kernel

# state: int64[STATE_SLOTS]
AT: Final = 0  # offset of the next record or block
END: Final = 1  # where the data ends
BIG: Final = 2  # 1: numbers are big-endian
RECORD_LEN: Final = 3  # pcap: bytes of a record's header
FCS_LEN: Final = 4  # pcap: bytes of the FCS behind each frame
OLD: Final = 5  # pcap before version 2.4: 1, a record's two lengths may stand the other way round
INTERFACES: Final = 6  # pcapng: rows of *interfaces* that are in use
SKIP: Final = 7  # bytes from AT on to pass over: a record or block too long to be looked at
SKIP_PACKET: Final = 8  # 1: that is a packet
PACKETS: Final = 9  # counter of records, of all kinds
LONG: Final = 10  # counter of frames that no slot can hold
FOREIGN: Final = 11  # counter of frames of another link type than Ethernet
FOREIGN_TYPE: Final = 12  # the first of these link types
STATE_SLOTS: Final = 16

# interfaces: int64[n, IF_SLOTS], of the section at hand
IF_LINK_TYPE: Final = 0
IF_SNAPLEN: Final = 1  # 0 = no limit
IF_FCS_LEN: Final = 2
IF_SLOTS: Final = 3

# Why a scanner returned.
SCAN_FULL: Final = 0  # the index is full, or enough was looked at for one call
SCAN_MORE: Final = 1  # the record or block at AT ends behind END
SCAN_SKIP: Final = 2  # the record or block at AT is to be passed over: state[SKIP] bytes
SCAN_SECTION: Final = 3  # a section header block lies at AT
SCAN_INTERFACE: Final = 4  # a whole interface description block lies at AT
SCAN_BAD_LENGTH: Final = 5  # a block whose lengths can't be
SCAN_BAD_INTERFACE: Final = 6  # a packet of an interface that the section does not have
SCAN_BAD_PACKET: Final = 7  # a packet longer than its block

LINKTYPE_ETHERNET: Final = 1
MAX_WHOLE: Final = 1 << 24  # bytes of the longest record or block that is looked at whole
BLOCK_MIN: Final = 12

_SECTION_HEADER: Final = 0x0A0D0D0A
_INTERFACE_DESCRIPTION: Final = 1
_PACKET: Final = 2  # obsolete; laid out as the enhanced one, but for the interface
_SIMPLE_PACKET: Final = 3
_ENHANCED_PACKET: Final = 6
_PACKET_FLAGS: Final = 2  # the option that may say how long the FCS is
_ROOM: Final = r.FRAME_SLOT - spec.NET_HDR_LEN
_LOOKS: Final = 1024  # records or blocks that one call looks at


@inlined
def _u16(data: Bytes, at: int, big: int) -> int:
    value = load_u16_unaligned(data, at)
    return value >> 8 | (value & 0xFF) << 8 if big else value


@inlined
def _u32(data: Bytes, at: int, big: int) -> int:
    value = load_u32_unaligned(data, at)
    if big:
        return (value & 0xFF) << 24 | (value & 0xFF00) << 8 | (value >> 8 & 0xFF00) | value >> 24
    return value


@inlined
def _keep(state: Words, index: Words, n: int, at: int, caplen: int, length: int, fcs_len: int) -> int:
    """Note the frame at *at* as row *n* of the index, without the captured bytes of its FCS; return the rows in use."""
    size = max(0, min(caplen, max(caplen, length) - fcs_len))
    if size > _ROOM:
        state[LONG] += 1
        return n
    index[n, 0] = at
    index[n, 1] = size
    return n + 1


@kernel
def scan_pcap(data: Bytes, state: Words, index: Words) -> tuple[int, int]:
    """Fill *index*, int64[n, 2], with offsets and lengths of the next frames; return how many, and why no more."""
    at, end, big, head = int(state[AT]), int(state[END]), int(state[BIG]), int(state[RECORD_LEN])
    n, why = 0, SCAN_FULL
    for _ in range(_LOOKS):
        if n == index.shape[0]:
            break
        if end - at < head:
            why = SCAN_MORE
            break
        caplen, length = _u32(data, at + 8, big), _u32(data, at + 12, big)
        if state[OLD] and caplen > length:
            caplen, length = length, caplen
        if caplen > MAX_WHOLE:
            state[SKIP], state[SKIP_PACKET] = head + caplen, 1
            why = SCAN_SKIP
            break
        if end - at - head < caplen:
            why = SCAN_MORE
            break
        state[PACKETS] += 1
        n = _keep(state, index, n, at + head, caplen, length, state[FCS_LEN])
        at += head + caplen
    state[AT] = at
    return n, why


@inlined
def _fcs_len(data: Bytes, at: int, end: int, big: int, default: int) -> int:
    """Return the bytes of the FCS by a packet block's options, from *at* to *end*; *default* if they don't say."""
    while end - at >= 8:
        code, length = _u16(data, at, big), _u16(data, at + 2, big)
        if code == 0:
            break
        if code == _PACKET_FLAGS and length == 4:
            own = _u32(data, at + 4, big) >> 5 & 0xF
            return own or default
        at += 4 + (length + 3 & ~3)
    return default


@inlined
def _packet(data: Bytes, state: Words, interfaces: Words, index: Words, n: int, block_len: int) -> tuple[int, int]:
    """Look at the whole packet block at AT; return the rows of *index* in use then, and SCAN_FULL, or why not."""
    at, big = int(state[AT]), int(state[BIG])
    kind = _u32(data, at, big)
    simple = kind == _SIMPLE_PACKET
    start = at + (12 if simple else 28)
    end = at + block_len - 4
    if start > end:
        return n, SCAN_BAD_LENGTH
    interface = 0
    if kind == _PACKET:
        interface = _u16(data, at + 8, big)
    elif kind == _ENHANCED_PACKET:
        interface = _u32(data, at + 8, big)
    if interface >= state[INTERFACES]:
        return n, SCAN_BAD_INTERFACE
    fcs_len = int(interfaces[interface, IF_FCS_LEN])
    if simple:
        length = _u32(data, at + 8, big)
        caplen = min(length, end - start)
        if interfaces[interface, IF_SNAPLEN]:
            caplen = min(caplen, int(interfaces[interface, IF_SNAPLEN]))
    else:
        caplen, length = _u32(data, at + 20, big), _u32(data, at + 24, big)
        if caplen > end - start:
            return n, SCAN_BAD_PACKET
        fcs_len = _fcs_len(data, start + (caplen + 3 & ~3), end, big, fcs_len)
    state[PACKETS] += 1
    if interfaces[interface, IF_LINK_TYPE] != LINKTYPE_ETHERNET:
        if state[FOREIGN] == 0:
            state[FOREIGN_TYPE] = interfaces[interface, IF_LINK_TYPE]
        state[FOREIGN] += 1
        return n, SCAN_FULL
    return _keep(state, index, n, start, caplen, length, fcs_len), SCAN_FULL


@kernel
def scan_pcapng(data: Bytes, state: Words, interfaces: Words, index: Words) -> tuple[int, int]:
    """As `scan_pcap`. Blocks of kinds that hold no packet are passed over."""
    end, big = int(state[END]), int(state[BIG])
    n, why = 0, SCAN_FULL
    for _ in range(_LOOKS):
        at = int(state[AT])
        if n == index.shape[0]:
            break
        if end - at < BLOCK_MIN:
            why = SCAN_MORE
            break
        kind, length = _u32(data, at, big), _u32(data, at + 4, big)
        if kind == _SECTION_HEADER:  # it reads the same either way; its length does not
            why = SCAN_SECTION
            break
        block_len = length + 3 & ~3  # some writers leave the padding out of the length
        if block_len < BLOCK_MIN or (block_len > MAX_WHOLE and kind == _INTERFACE_DESCRIPTION):
            why = SCAN_BAD_LENGTH
            break
        packet = kind in (_PACKET, _SIMPLE_PACKET, _ENHANCED_PACKET)
        if block_len > MAX_WHOLE:
            state[SKIP], state[SKIP_PACKET] = block_len, int(packet)
            why = SCAN_SKIP
            break
        if end - at < block_len:
            why = SCAN_MORE
            break
        if _u32(data, at + block_len - 4, big) + 3 & ~3 != block_len:
            why = SCAN_BAD_LENGTH
            break
        if kind == _INTERFACE_DESCRIPTION:
            why = SCAN_INTERFACE
            break
        if packet:
            n, why = _packet(data, state, interfaces, index, n, block_len)
            if why != SCAN_FULL:
                break
        state[AT] = at + block_len
    return n, why


@kernel
def take(data: Bytes, index: Words, first: int, n: int, frames: Bytes, lengths: Words) -> None:
    """Copy *n* frames, from row *first* of the index on, into frame slots: each behind a virtio_net_hdr of zeros."""
    slot_len = frames.size // lengths.size
    for k in range(n):
        at, length = k * slot_len, index[first + k, 1]
        store_u64_unaligned(frames, at, 0)
        store_u32_unaligned(frames, at + 8, 0)
        copy(frames, at + spec.NET_HDR_LEN, data, index[first + k, 0], length)
        lengths[k] = spec.NET_HDR_LEN + length
