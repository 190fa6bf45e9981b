"""Feature bits by name, their dependencies, and their spelling as text (Virtio 1.2, 2.2, 5.1.3 and 6).

`NetDevice(offered=…)` and `Driver(wanted=…)` take such bits, as one integer. vnetdp offers not all that have a name
here."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from vnetdp_kernels import spec

from ..errors import ConfigError

VIRTIO_NET_F_CSUM: Final = 1 << 0
"""The device takes frames whose checksum is left to do."""
VIRTIO_NET_F_GUEST_CSUM: Final = 1 << 1
"""The driver takes frames whose checksum is left to do."""
VIRTIO_NET_F_CTRL_GUEST_OFFLOADS: Final = 1 << 2
"""The driver can change its receive offloads while it runs."""
VIRTIO_NET_F_MTU: Final = 1 << 3
"""The configuration space has an MTU."""
VIRTIO_NET_F_MAC: Final = 1 << 5
"""The configuration space has a MAC address."""
VIRTIO_NET_F_GUEST_TSO4: Final = 1 << 7
"""The driver takes TCP segments to be cut, over IPv4."""
VIRTIO_NET_F_GUEST_TSO6: Final = 1 << 8
"""The driver takes TCP segments to be cut, over IPv6."""
VIRTIO_NET_F_GUEST_ECN: Final = 1 << 9
"""The driver takes such TCP segments with ECN."""
VIRTIO_NET_F_GUEST_UFO: Final = 1 << 10
"""The driver takes UDP datagrams to be cut into fragments."""
VIRTIO_NET_F_HOST_TSO4: Final = 1 << 11
"""The device takes TCP segments to be cut, over IPv4."""
VIRTIO_NET_F_HOST_TSO6: Final = 1 << 12
"""The device takes TCP segments to be cut, over IPv6."""
VIRTIO_NET_F_HOST_ECN: Final = 1 << 13
"""The device takes such TCP segments with ECN."""
VIRTIO_NET_F_HOST_UFO: Final = 1 << 14
"""The device takes UDP datagrams to be cut into fragments."""
VIRTIO_NET_F_MRG_RXBUF: Final = 1 << 15
"""A frame may be received into several buffers."""
VIRTIO_NET_F_STATUS: Final = 1 << 16
"""The configuration space has the link state."""
VIRTIO_NET_F_CTRL_VQ: Final = 1 << 17
"""There is a control queue."""
VIRTIO_NET_F_CTRL_RX: Final = 1 << 18
"""Control commands set the receive mode."""
VIRTIO_NET_F_CTRL_VLAN: Final = 1 << 19
"""Control commands set the VLAN filter."""
VIRTIO_NET_F_GUEST_ANNOUNCE: Final = 1 << 21
"""The driver announces itself when it is asked to."""
VIRTIO_NET_F_MQ: Final = 1 << 22
"""There are several queue pairs."""
VIRTIO_NET_F_CTRL_MAC_ADDR: Final = 1 << 23
"""A control command sets the MAC address."""
VHOST_F_LOG_ALL: Final = 1 << 26
"""vhost logs writes to guest memory."""
VIRTIO_RING_F_INDIRECT_DESC: Final = 1 << 28
"""Descriptors may refer to a table of descriptors."""
VIRTIO_RING_F_EVENT_IDX: Final = 1 << 29
"""Each side says at which index it wants to be notified."""
VHOST_USER_F_PROTOCOL_FEATURES: Final = 1 << 30
"""vhost-user's protocol features can be negotiated."""
VIRTIO_F_VERSION_1: Final = 1 << 32
"""The device is no legacy device."""
VIRTIO_F_ACCESS_PLATFORM: Final = 1 << 33
"""Addresses go through an IOMMU, which vnetdp has not."""
VIRTIO_F_RING_PACKED: Final = 1 << 34
"""Rings are packed, which vnetdp has not."""
VIRTIO_F_IN_ORDER: Final = 1 << 35
"""The device uses buffers in the order in which they were made available."""
VIRTIO_F_RING_RESET: Final = 1 << 40
"""The driver can reset one queue."""

NAMES: Final[dict[str, int]] = {
    name.split("_F_", 1)[1].lower(): value
    for name, value in list(globals().items())
    if "_F_" in name and name.startswith(("VIRTIO_", "VHOST_"))
}
"""Each bit by its name on a command line: the specification's, without its prefix, in lower case, such as `mrg_rxbuf`."""

# A feature may be offered and accepted only together with one of these (5.1.3.1).
_NEEDS: Final[tuple[tuple[int, int], ...]] = (
    (VIRTIO_NET_F_GUEST_TSO4, VIRTIO_NET_F_GUEST_CSUM),
    (VIRTIO_NET_F_GUEST_TSO6, VIRTIO_NET_F_GUEST_CSUM),
    (VIRTIO_NET_F_GUEST_UFO, VIRTIO_NET_F_GUEST_CSUM),
    (VIRTIO_NET_F_GUEST_ECN, VIRTIO_NET_F_GUEST_TSO4 | VIRTIO_NET_F_GUEST_TSO6),
    (VIRTIO_NET_F_HOST_TSO4, VIRTIO_NET_F_CSUM),
    (VIRTIO_NET_F_HOST_TSO6, VIRTIO_NET_F_CSUM),
    (VIRTIO_NET_F_HOST_UFO, VIRTIO_NET_F_CSUM),
    (VIRTIO_NET_F_HOST_ECN, VIRTIO_NET_F_HOST_TSO4 | VIRTIO_NET_F_HOST_TSO6),
    (VIRTIO_NET_F_CTRL_RX, VIRTIO_NET_F_CTRL_VQ),
    (VIRTIO_NET_F_CTRL_VLAN, VIRTIO_NET_F_CTRL_VQ),
    (VIRTIO_NET_F_GUEST_ANNOUNCE, VIRTIO_NET_F_CTRL_VQ),
    (VIRTIO_NET_F_MQ, VIRTIO_NET_F_CTRL_VQ),
    (VIRTIO_NET_F_CTRL_MAC_ADDR, VIRTIO_NET_F_CTRL_VQ),
)

RING_FEATURES: Final = (
    VIRTIO_RING_F_INDIRECT_DESC | VIRTIO_RING_F_EVENT_IDX | VIRTIO_F_VERSION_1 | VIRTIO_F_IN_ORDER | VIRTIO_F_RING_RESET
)
"""Features of the rings, which the device offers with any endpoint."""
HOST_OFFLOADS: Final = VIRTIO_NET_F_CSUM | VIRTIO_NET_F_HOST_TSO4 | VIRTIO_NET_F_HOST_TSO6 | VIRTIO_NET_F_HOST_ECN
"""Offloads on the way to the wire, which the device offers if its endpoint takes virtio_net_hdr (`Endpoint.vnet_hdr`)."""
GUEST_OFFLOADS: Final = (
    VIRTIO_NET_F_GUEST_CSUM | VIRTIO_NET_F_GUEST_TSO4 | VIRTIO_NET_F_GUEST_TSO6 | VIRTIO_NET_F_GUEST_ECN
)
"""Offloads on the way to the driver, likewise."""
OFFLOADS: Final = HOST_OFFLOADS | GUEST_OFFLOADS
"""Both."""

_GUEST_TO_MASK: Final[tuple[tuple[int, int], ...]] = (
    (VIRTIO_NET_F_GUEST_CSUM, spec.OFFLOAD_CSUM),
    (VIRTIO_NET_F_GUEST_TSO4, spec.OFFLOAD_TSO4),
    (VIRTIO_NET_F_GUEST_TSO6, spec.OFFLOAD_TSO6),
    (VIRTIO_NET_F_GUEST_ECN, spec.OFFLOAD_ECN),
    (VIRTIO_NET_F_GUEST_UFO, spec.OFFLOAD_UFO),
)
_HOST_TO_MASK: Final[tuple[tuple[int, int], ...]] = (
    (VIRTIO_NET_F_CSUM, spec.OFFLOAD_CSUM),
    (VIRTIO_NET_F_HOST_TSO4, spec.OFFLOAD_TSO4),
    (VIRTIO_NET_F_HOST_TSO6, spec.OFFLOAD_TSO6),
    (VIRTIO_NET_F_HOST_ECN, spec.OFFLOAD_ECN),
    (VIRTIO_NET_F_HOST_UFO, spec.OFFLOAD_UFO),
)


def mtu_error(mtu: int) -> str:
    """Return why no device can have the MTU *mtu* (5.1.4.1); "" if one can."""
    low, high = spec.MIN_MTU, spec.MAX_MTU
    return "" if low <= mtu <= high else f"MTU {mtu} is not between {low} and {high}"


def guest_offload_mask(features: int) -> int:
    """Return the offloads, as bits of TUNSETOFFLOAD, that a driver with *features* takes in frames it receives."""
    return sum(mask for bit, mask in _GUEST_TO_MASK if features & bit)


def host_offload_mask(features: int) -> int:
    """Return the offloads, as bits of TUNSETOFFLOAD, that a device with *features* takes in frames from its driver."""
    return sum(mask for bit, mask in _HOST_TO_MASK if features & bit)


def header_len(features: int) -> int:
    """Return the bytes of virtio_net_hdr: 12, or 10 for a legacy driver without MRG_RXBUF (Virtio 1.2, 5.1.6.1)."""
    if features & (VIRTIO_F_VERSION_1 | VIRTIO_NET_F_MRG_RXBUF):
        return spec.NET_HDR_LEN
    return spec.NET_HDR_LEN_LEGACY


def names(features: int) -> list[str]:
    """Return the names (`NAMES`) of the bits set, lowest first; `bit N` for a bit without a name."""
    known = {value: name for name, value in NAMES.items()}
    return [known.get(1 << bit, f"bit {bit}") for bit in range(64) if features >> bit & 1]


def missing_dependency(features: int) -> tuple[int, int] | None:
    """Return (feature, the bits of which it needs one) for the first feature that lacks them; None if none does."""
    for feature, needs in _NEEDS:
        if features & feature and not features & needs:
            return feature, needs
    return None


def closure(features: int) -> int:
    """Return *features* without each that lacks a feature it needs (Virtio 1.2, 5.1.3.1)."""
    while (unmet := missing_dependency(features)) is not None:
        features &= ~unmet[0]
    return features


def with_needs(features: int) -> int:
    """Return *features* with the features they need; of several that would do, the lowest bit."""
    while (unmet := missing_dependency(features)) is not None:
        features |= unmet[1] & -unmet[1]
    return features


def parse(text: str, known: Mapping[str, int] = NAMES, usual: int = (1 << 64) - 1) -> int:
    """Return the bits that *text*, a comma-separated list of *known* names, stands for.

    `-name` leaves a bit out of *usual*, `+name` adds one to it. Names without a sign give these bits alone. ConfigError
    for an unknown name, and for a list that has names with and without a sign.
    """
    words = [word for part in text.split(",") if (word := part.strip().lower())]
    bits = {"+": 0, "-": 0, "": 0}
    for word in words:
        sign = word[0] if word[0] in "+-" else ""
        name = word.removeprefix(sign)
        if name not in known:
            raise ConfigError(f"unknown feature {name!r}; known are {', '.join(sorted(known))}")
        bits[sign] |= known[name]
    if bits[""] and (bits["+"] or bits["-"]):
        raise ConfigError(
            f"features {text!r}: either names alone, or names with a sign: left out with a minus, added with a plus"
        )
    if both := [name for name, bit in known.items() if bit & bits["+"] & bits["-"]]:
        raise ConfigError(f"features {text!r}: {', '.join(both)} is both left out and added: take one sign")
    return bits[""] or (usual | bits["+"]) & ~bits["-"]
