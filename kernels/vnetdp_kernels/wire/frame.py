"""A frame and its virtio_net_hdr, in compiled code: the header is split off, checked and fitted; the frame is made whole."""

from __future__ import annotations

from .. import rows as r
from .. import spec
from ..platform.atomic import (
    Bytes,
    Words,
    copy,
    load_u8,
    load_u16_unaligned,
    load_u32_unaligned,
    load_u64_unaligned,
    store_u16_unaligned,
    store_u32_unaligned,
    store_u64_unaligned,
)
from ..platform.jit import inlined, kernel
from ..rows import Frame

HDR_SCRATCH = 64  # bytes: virtio_net_hdr, and the addresses behind it


@inlined
def take_front(frame: Frame, length: int, dst: Bytes, at: int) -> int:
    """Move *length* bytes off the front of *frame* to *dst* at *at*; return the first row left.

    The rows are shifted past the bytes taken. Takes less where there is less: then n_rows comes back.
    """
    iov = frame.iov
    row = frame.row
    done = 0
    while row < frame.n_rows and done < length:
        part = min(length - done, iov[row, r.IOV_LEN])
        copy(dst, at + done, frame.mem, iov[row, r.IOV_OFFSET], part)
        done += part
        if part == iov[row, r.IOV_LEN]:
            row += 1
        else:
            iov[row, r.IOV_OFFSET] += part
            iov[row, r.IOV_LEN] -= part
    return row


@inlined
def split_header(chain: Frame, hdr_len: int, hdr: Bytes) -> tuple[int, int]:
    """Move the virtio_net_hdr off the front of *chain* into *hdr* (uint8[HDR_SCRATCH]).

    Returns (first row of the frame, bytes of the frame); 0 bytes if the chain is no longer than its header.
    """
    mem = chain.mem
    iov = chain.iov
    first = iov[0, r.IOV_LEN]
    if hdr_len == spec.NET_HDR_LEN and first > spec.NET_HDR_LEN:
        at = iov[0, r.IOV_OFFSET]
        store_u64_unaligned(hdr, 0, load_u64_unaligned(mem, at))
        store_u32_unaligned(hdr, 8, load_u32_unaligned(mem, at + 8))
        iov[0, r.IOV_OFFSET] = at + spec.NET_HDR_LEN
        iov[0, r.IOV_LEN] = first - spec.NET_HDR_LEN
        row = 0
    else:
        row = take_front(chain, hdr_len, hdr, 0)
    return row, max(chain.length - hdr_len, 0)


@inlined
def tidy(hdr: Bytes, frame_len: int, flags: int) -> None:
    """Clear in a peer's header every flag but *flags*, and every field that flags and GSO type give no meaning.

    hdr_len is a hint that a receiver may not rely on (5.1.6.2.2), but a TAP refuses an impossible one.
    """
    if load_u16_unaligned(hdr, spec.NET_HDR_FLAGS) == 0:
        store_u64_unaligned(hdr, 0, 0)
        store_u16_unaligned(hdr, spec.NET_HDR_CSUM_OFFSET, 0)
    else:
        _tidy(hdr, frame_len, flags)


@kernel
def _tidy(hdr: Bytes, frame_len: int, flags: int) -> None:
    flags &= load_u8(hdr, spec.NET_HDR_FLAGS)
    gso = load_u8(hdr, spec.NET_HDR_GSO_TYPE)
    gso = spec.VIRTIO_NET_HDR_GSO_NONE if gso == spec.VIRTIO_NET_HDR_GSO_ECN else gso
    store_u16_unaligned(hdr, spec.NET_HDR_FLAGS, flags | gso << 8)
    if gso == spec.VIRTIO_NET_HDR_GSO_NONE:
        store_u32_unaligned(hdr, spec.NET_HDR_HDR_LEN, 0)  # and gso_size
    elif not spec.ETH_HLEN <= load_u16_unaligned(hdr, spec.NET_HDR_HDR_LEN) <= frame_len:
        store_u16_unaligned(hdr, spec.NET_HDR_HDR_LEN, 0)
    if not flags & spec.VIRTIO_NET_HDR_F_NEEDS_CSUM:
        store_u32_unaligned(hdr, spec.NET_HDR_CSUM_START, 0)  # and csum_offset


@inlined
def makes_sense(hdr: Bytes, at: int, frame_len: int) -> bool:
    """Return whether the offloads that the header at *at* asks for fit a frame of *frame_len* bytes."""
    return load_u16_unaligned(hdr, at + spec.NET_HDR_FLAGS) == 0 or _makes_sense(hdr, at, frame_len)


@kernel
def _makes_sense(hdr: Bytes, at: int, frame_len: int) -> bool:
    gso = load_u8(hdr, at + spec.NET_HDR_GSO_TYPE) & ~spec.VIRTIO_NET_HDR_GSO_ECN
    summed = load_u8(hdr, at + spec.NET_HDR_FLAGS) & spec.VIRTIO_NET_HDR_F_NEEDS_CSUM
    if summed:
        start = load_u16_unaligned(hdr, at + spec.NET_HDR_CSUM_START)
        if start + load_u16_unaligned(hdr, at + spec.NET_HDR_CSUM_OFFSET) + 2 > frame_len:
            return False
    if gso == spec.VIRTIO_NET_HDR_GSO_NONE:
        return True
    # A segment without NEEDS_CSUM has no checksum that would be right for its parts (5.1.6.2.1).
    return bool(summed and _needed(gso) and load_u16_unaligned(hdr, at + spec.NET_HDR_GSO_SIZE))


@inlined
def _needed(kind: int) -> int:
    """Return the OFFLOAD_* that a gso_type without its ECN bit takes, of which one may be another's; 0 if there is none."""
    if kind == spec.VIRTIO_NET_HDR_GSO_TCPV4:
        return spec.OFFLOAD_CSUM | spec.OFFLOAD_TSO4
    if kind == spec.VIRTIO_NET_HDR_GSO_TCPV6:
        return spec.OFFLOAD_CSUM | spec.OFFLOAD_TSO6
    if kind == spec.VIRTIO_NET_HDR_GSO_UDP:
        return spec.OFFLOAD_CSUM | spec.OFFLOAD_UFO
    if kind == spec.VIRTIO_NET_HDR_GSO_UDP_L4:
        return spec.OFFLOAD_CSUM | spec.OFFLOAD_USO4 | spec.OFFLOAD_USO6
    return 0


@inlined
def accepts(hdr: Bytes, at: int, offloads: int) -> bool:
    """Fit the header at *at* to the receiver's *offloads*; False if the frame needs others (5.1.6.4.1)."""
    gso = load_u8(hdr, at + spec.NET_HDR_GSO_TYPE)
    if gso == spec.VIRTIO_NET_HDR_GSO_NONE and load_u8(hdr, at + spec.NET_HDR_FLAGS) == 0:
        return True
    if gso == spec.VIRTIO_NET_HDR_GSO_NONE:
        if not offloads & spec.OFFLOAD_CSUM:
            store_u64_unaligned(hdr, at, 0)
            store_u16_unaligned(hdr, at + 8, 0)
        return True
    needed = _needed(gso & ~spec.VIRTIO_NET_HDR_GSO_ECN)
    if needed == 0:
        return False
    if gso & spec.VIRTIO_NET_HDR_GSO_ECN:
        needed |= spec.OFFLOAD_ECN
    return offloads & needed == needed


@inlined
def exceeds_mtu(vq: Words, gso: int, frame: Frame) -> bool:
    """True if a frame is longer than the MTU that was negotiated allows (5.1.4.1).

    gso: its gso_type; a segment may have any length, and a VLAN tag is not counted.
    """
    limit = vq[r.VQ_MAX_FRAME]
    if limit == 0 or frame.length <= limit:
        return False
    if gso & ~spec.VIRTIO_NET_HDR_GSO_ECN != spec.VIRTIO_NET_HDR_GSO_NONE:
        return False
    return frame.length > limit + spec.VLAN_HLEN or not _is_tagged(frame)


@kernel
def _is_tagged(frame: Frame) -> bool:
    """True if the EtherType of a frame is that of a VLAN tag."""
    iov = frame.iov
    ether_type = 0
    at = 0
    for k in range(frame.row, frame.n_rows):
        for i in range(spec.ETH_TYPE_AT, spec.ETH_TYPE_AT + 2):
            if at <= i < at + iov[k, r.IOV_LEN]:
                ether_type = ether_type << 8 | load_u8(frame.mem, iov[k, r.IOV_OFFSET] + i - at)
        at += iov[k, r.IOV_LEN]
        if at >= spec.ETH_TYPE_AT + 2:
            break
    return ether_type in (spec.ETH_P_8021Q, spec.ETH_P_8021AD)


@kernel
def linearize(frame: Frame, dst: Bytes, at: int) -> None:
    """Copy a frame to *dst* from *at* on, in one piece."""
    iov = frame.iov
    for k in range(frame.row, frame.n_rows):
        copy(dst, at, frame.mem, iov[k, r.IOV_OFFSET], iov[k, r.IOV_LEN])
        at += iov[k, r.IOV_LEN]


@inlined
def swap_macs(dst: Bytes, to: int, src: Bytes, at: int) -> None:
    """Write the two addresses of the Ethernet frame at *at* to *to* (the same place, too), exchanged."""
    low = load_u32_unaligned(src, at)
    high = load_u16_unaligned(src, at + 4)
    from_low = load_u32_unaligned(src, at + 6)
    from_high = load_u16_unaligned(src, at + 10)
    store_u32_unaligned(dst, to, from_low)
    store_u16_unaligned(dst, to + 4, from_high)
    store_u32_unaligned(dst, to + 6, low)
    store_u16_unaligned(dst, to + 10, high)
