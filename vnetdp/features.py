"""Feature bits by name, what depends on what, and the subsets that matter here (Virtio 1.2, 2.2, 5.1.3, 6)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from vnetdp_kernels import layout

from .errors import ConfigError

VIRTIO_NET_F_CSUM: Final = 1 << 0
VIRTIO_NET_F_GUEST_CSUM: Final = 1 << 1
VIRTIO_NET_F_CTRL_GUEST_OFFLOADS: Final = 1 << 2
VIRTIO_NET_F_MTU: Final = 1 << 3
VIRTIO_NET_F_MAC: Final = 1 << 5
VIRTIO_NET_F_GUEST_TSO4: Final = 1 << 7
VIRTIO_NET_F_GUEST_TSO6: Final = 1 << 8
VIRTIO_NET_F_GUEST_ECN: Final = 1 << 9
VIRTIO_NET_F_GUEST_UFO: Final = 1 << 10
VIRTIO_NET_F_HOST_TSO4: Final = 1 << 11
VIRTIO_NET_F_HOST_TSO6: Final = 1 << 12
VIRTIO_NET_F_HOST_ECN: Final = 1 << 13
VIRTIO_NET_F_HOST_UFO: Final = 1 << 14
VIRTIO_NET_F_MRG_RXBUF: Final = 1 << 15
VIRTIO_NET_F_STATUS: Final = 1 << 16
VIRTIO_NET_F_CTRL_VQ: Final = 1 << 17
VIRTIO_NET_F_CTRL_RX: Final = 1 << 18
VIRTIO_NET_F_CTRL_VLAN: Final = 1 << 19
VIRTIO_NET_F_GUEST_ANNOUNCE: Final = 1 << 21
VIRTIO_NET_F_MQ: Final = 1 << 22
VIRTIO_NET_F_CTRL_MAC_ADDR: Final = 1 << 23
VHOST_F_LOG_ALL: Final = 1 << 26
VIRTIO_RING_F_INDIRECT_DESC: Final = 1 << 28
VIRTIO_RING_F_EVENT_IDX: Final = 1 << 29
VHOST_USER_F_PROTOCOL_FEATURES: Final = 1 << 30
VIRTIO_F_VERSION_1: Final = 1 << 32
VIRTIO_F_ACCESS_PLATFORM: Final = 1 << 33
VIRTIO_F_RING_PACKED: Final = 1 << 34
VIRTIO_F_IN_ORDER: Final = 1 << 35
VIRTIO_F_RING_RESET: Final = 1 << 40

# Names as a command line spells them: the specification's, without the prefix, in lower case.
NAMES: Final[dict[str, int]] = {
    name.split("_F_", 1)[1].lower(): value
    for name, value in list(globals().items())
    if "_F_" in name and name.startswith(("VIRTIO_", "VHOST_"))
}

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

# What any of our local backends does by itself.
RING_FEATURES: Final = (
    VIRTIO_RING_F_INDIRECT_DESC | VIRTIO_RING_F_EVENT_IDX | VIRTIO_F_VERSION_1 | VIRTIO_F_IN_ORDER | VIRTIO_F_RING_RESET
)
# Passed through where both ends take a virtio_net_hdr.
HOST_OFFLOADS: Final = VIRTIO_NET_F_CSUM | VIRTIO_NET_F_HOST_TSO4 | VIRTIO_NET_F_HOST_TSO6 | VIRTIO_NET_F_HOST_ECN
GUEST_OFFLOADS: Final = (
    VIRTIO_NET_F_GUEST_CSUM | VIRTIO_NET_F_GUEST_TSO4 | VIRTIO_NET_F_GUEST_TSO6 | VIRTIO_NET_F_GUEST_ECN
)
OFFLOADS: Final = HOST_OFFLOADS | GUEST_OFFLOADS

_GUEST_TO_MASK: Final[tuple[tuple[int, int], ...]] = (
    (VIRTIO_NET_F_GUEST_CSUM, layout.OFFLOAD_CSUM),
    (VIRTIO_NET_F_GUEST_TSO4, layout.OFFLOAD_TSO4),
    (VIRTIO_NET_F_GUEST_TSO6, layout.OFFLOAD_TSO6),
    (VIRTIO_NET_F_GUEST_ECN, layout.OFFLOAD_ECN),
    (VIRTIO_NET_F_GUEST_UFO, layout.OFFLOAD_UFO),
)
_HOST_TO_MASK: Final[tuple[tuple[int, int], ...]] = (
    (VIRTIO_NET_F_CSUM, layout.OFFLOAD_CSUM),
    (VIRTIO_NET_F_HOST_TSO4, layout.OFFLOAD_TSO4),
    (VIRTIO_NET_F_HOST_TSO6, layout.OFFLOAD_TSO6),
    (VIRTIO_NET_F_HOST_ECN, layout.OFFLOAD_ECN),
    (VIRTIO_NET_F_HOST_UFO, layout.OFFLOAD_UFO),
)


def mtu_error(mtu: int) -> str:
    """Return why no device can have the MTU *mtu* (5.1.4.1); "" if one can."""
    low, high = layout.MIN_MTU, layout.MAX_MTU
    return "" if low <= mtu <= high else f"MTU {mtu} is not between {low} and {high}"


def guest_offload_mask(features: int) -> int:
    """Return the layout.OFFLOAD_* that a driver with *features* takes in frames it receives."""
    return sum(mask for bit, mask in _GUEST_TO_MASK if features & bit)


def host_offload_mask(features: int) -> int:
    """Return the layout.OFFLOAD_* that a device with *features* takes in frames it is sent."""
    return sum(mask for bit, mask in _HOST_TO_MASK if features & bit)


def header_len(features: int) -> int:
    """Return the bytes of virtio_net_hdr: 12, or 10 for a legacy driver without mergeable buffers (5.1.6.1)."""
    if features & (VIRTIO_F_VERSION_1 | VIRTIO_NET_F_MRG_RXBUF):
        return layout.NET_HDR_LEN
    return layout.NET_HDR_LEN_LEGACY


def names(features: int) -> list[str]:
    """Return the names of the bits set, lowest first; `bit N` for those without one here."""
    known = {value: name for name, value in NAMES.items()}
    return [known.get(1 << bit, f"bit {bit}") for bit in range(64) if features >> bit & 1]


def missing_dependency(features: int) -> tuple[int, int] | None:
    """Return (feature, bits of which it needs one) for the first feature whose need is not met, or None."""
    for feature, needs in _NEEDS:
        if features & feature and not features & needs:
            return feature, needs
    return None


def closure(features: int) -> int:
    """Return *features* less everything whose need is not met."""
    while (unmet := missing_dependency(features)) is not None:
        features &= ~unmet[0]
    return features


def with_needs(features: int) -> int:
    """Return *features* and what they need: of several that would do, the lowest."""
    while (unmet := missing_dependency(features)) is not None:
        features |= unmet[1] & -unmet[1]
    return features


def parse(text: str, known: Mapping[str, int] = NAMES, usual: int = (1 << 64) - 1) -> int:
    """Return the bits that a comma-separated list of *known* names stands for.

    `-name`: the *usual* without that; `+name`: the usual and that; `name`: only that. No list has names with and without
    a sign.
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
            f"features {text!r}: either all that is left, or changes: left out with a minus, added with a plus"
        )
    if bits["+"] & bits["-"]:
        raise ConfigError(f"features {text!r}: one is both left out and added")
    return bits[""] or (usual | bits["+"]) & ~bits["-"]
