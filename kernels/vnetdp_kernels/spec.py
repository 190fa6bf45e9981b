"""The numbers of the specification: offsets, flags and codes. The slots of our own rows are in `rows`.

Sections are those of Virtio 1.2 unless another is named. No Numba here: the control plane imports this file early.
"""

from __future__ import annotations

from typing import Final


def align_up(n: int, unit: int) -> int:
    """Return *n*, rounded up to a multiple of *unit*."""
    return -(-n // unit) * unit


# Split virtqueue (2.7): sizes and offsets in bytes.
VIRTQ_DESC_SIZE: Final = 16
VIRTQ_DESC_F_NEXT: Final = 1
VIRTQ_DESC_F_WRITE: Final = 2
VIRTQ_DESC_F_INDIRECT: Final = 4
VIRTQ_AVAIL_F_NO_INTERRUPT: Final = 1
VIRTQ_USED_F_NO_NOTIFY: Final = 1
VIRTQ_RING_IDX: Final = 2  # of `idx` in the avail and in the used ring
VIRTQ_RING_ENTRIES: Final = 4  # of the first element in either ring
VIRTQ_USED_ELEM_SIZE: Final = 8
VIRTQ_MAX_NUM: Final = 32768
VIRTQ_DESC_ALIGN: Final = 16
VIRTQ_AVAIL_ALIGN: Final = 2
VIRTQ_USED_ALIGN: Final = 4

MAX_CHAIN_BYTES: Final = 1 << 32  # 2.7.5.2

# virtio_net_hdr (5.1.6): offsets and values.
NET_HDR_FLAGS: Final = 0
NET_HDR_GSO_TYPE: Final = 1
NET_HDR_HDR_LEN: Final = 2
NET_HDR_GSO_SIZE: Final = 4
NET_HDR_CSUM_START: Final = 6
NET_HDR_CSUM_OFFSET: Final = 8
NET_HDR_NUM_BUFFERS: Final = 10
NET_HDR_LEN: Final = 12  # with VIRTIO_F_VERSION_1 or VIRTIO_NET_F_MRG_RXBUF
NET_HDR_LEN_LEGACY: Final = 10  # without either

VIRTIO_NET_HDR_F_NEEDS_CSUM: Final = 1
VIRTIO_NET_HDR_F_DATA_VALID: Final = 2
VIRTIO_NET_HDR_GSO_NONE: Final = 0
VIRTIO_NET_HDR_GSO_TCPV4: Final = 1
VIRTIO_NET_HDR_GSO_UDP: Final = 3
VIRTIO_NET_HDR_GSO_TCPV6: Final = 4
VIRTIO_NET_HDR_GSO_UDP_L4: Final = 5
VIRTIO_NET_HDR_GSO_ECN: Final = 0x80

# Offloads that a driver accepts in the header of a frame it receives (VIRTIO_NET_F_GUEST_*).
OFFLOAD_CSUM: Final = 1
OFFLOAD_TSO4: Final = 2
OFFLOAD_TSO6: Final = 4
OFFLOAD_ECN: Final = 8
OFFLOAD_UFO: Final = 16
OFFLOAD_USO4: Final = 32
OFFLOAD_USO6: Final = 64

MIN_MTU: Final = 68  # 5.1.4.1
MAX_MTU: Final = 65535
ETH_HLEN: Final = 14
VLAN_HLEN: Final = 4
ETH_TYPE_AT: Final = 12
ETH_P_8021Q: Final = 0x8100  # the two VLAN tags
ETH_P_8021AD: Final = 0x88A8
ETH_ZLEN: Final = 60  # the shortest Ethernet frame, without its FCS
MAX_FRAME_LEN: Final = 65550  # Ethernet header + 64 KiB - 1 of IP, rounded to even: the longest GSO frame

# vhost-user's inflight area, split rings: a header a queue, then 16 bytes a descriptor.
INFLIGHT_VERSION: Final = 8  # u16; 1
INFLIGHT_DESC_NUM: Final = 10  # u16
INFLIGHT_LAST_BATCH_HEAD: Final = 12  # u16
INFLIGHT_USED_IDX: Final = 14  # u16: used.idx when the last batch was done with
INFLIGHT_HEADER_LEN: Final = 16
INFLIGHT_DESC_LEN: Final = 16
INFLIGHT_ALIGN: Final = 64

PAGE_SIZE: Final = 4096  # of the dirty log (VHOST_PAGE_SIZE)
PAGE_SHIFT: Final = 12
CACHE_LINE: Final = 64  # bytes that caches of x86-64, and of most aarch64, move at once
