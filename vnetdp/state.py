"""What a device holds besides its rings: the state a driver sets by registers and control commands (Virtio 1.2, 5.1.6.5).

It is plain data: it can be copied, compared and sent. What comes from outside is checked by `validate`.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from .errors import ConfigError
from .features import mtu_error
from .virtqueue import Virtqueue

MAX_QUEUE_PAIRS = 1024
MAC_TABLE_ENTRIES = 64
VLAN_BYTES = 512  # one bit a VLAN id
RSS_TABLE_ENTRIES = 128
RSS_KEY_LEN = 40

DEFAULT_MAC = b"\x52\x54\x00\x12\x34\x56"  # QEMU's, of its first card

VIRTIO_CONFIG_S_ACKNOWLEDGE = 1
VIRTIO_CONFIG_S_DRIVER = 2
VIRTIO_CONFIG_S_DRIVER_OK = 4
VIRTIO_CONFIG_S_FEATURES_OK = 8
VIRTIO_CONFIG_S_NEEDS_RESET = 0x40
VIRTIO_CONFIG_S_FAILED = 0x80
VIRTIO_NET_S_LINK_UP = 1
VIRTIO_NET_S_ANNOUNCE = 2

# rx_mode, a bit a command of VIRTIO_NET_CTRL_RX (5.1.6.5.1).
RX_PROMISC, RX_ALLMULTI, RX_ALLUNI, RX_NOMULTI, RX_NOUNI, RX_NOBCAST = (1 << bit for bit in range(6))

CONFIG_SPACE = ("mac", "mtu", "net_status")  # of `Control`, what the driver reads there: it is notified of a change


@dataclass(frozen=True)
class Control:
    """What control commands and the configuration space hold. A change makes a new one (`changed`)."""

    mac: bytes = DEFAULT_MAC
    mtu: int = 0  # 0: none was set
    net_status: int = VIRTIO_NET_S_LINK_UP
    curr_queue_pairs: int = 1
    rx_mode: int = RX_PROMISC
    mac_table: tuple[bytes, ...] = ()
    mac_first_multi: int = 0  # entries before this one are unicast
    mac_overflow: int = 0  # bit 0: unicast, bit 1: multicast
    vlans: bytes = bytes(VLAN_BYTES)
    guest_offloads: int = 0
    rss_enabled: bool = False
    rss_redirect: bool = False
    rss_populate_hash: bool = False
    rss_hash_types: int = 0
    rss_default_queue: int = 0
    rss_table: tuple[int, ...] = ()
    rss_key: bytes = bytes(RSS_KEY_LEN)

    def validate(self, queue_pairs: int) -> None:
        """Raise ConfigError for what no driver of a device with *queue_pairs* pairs could have set."""
        wrong = [
            len(self.mac) != 6 and "a MAC address has 6 bytes",
            self.mtu != 0 and mtu_error(self.mtu),
            self.net_status & ~3 and f"net status {self.net_status:#x} has unknown bits",
            not 1 <= self.curr_queue_pairs <= queue_pairs
            and f"{self.curr_queue_pairs} queue pairs in use: the device has {queue_pairs}",
            self.rx_mode & ~0x3F and f"rx mode {self.rx_mode:#x} has unknown bits",
            len(self.mac_table) > MAC_TABLE_ENTRIES and "the MAC table is full with 64 entries",
            self.mac_table and any(len(mac) != 6 for mac in self.mac_table) and "a MAC address has 6 bytes",
            not 0 <= self.mac_first_multi <= len(self.mac_table) and "the MAC table's multicast part begins behind it",
            self.mac_overflow & ~3 and f"MAC overflow {self.mac_overflow:#x} has unknown bits",
            len(self.vlans) != VLAN_BYTES and f"the VLAN table has {VLAN_BYTES} bytes",
            len(self.rss_table) > RSS_TABLE_ENTRIES and f"the RSS table has at most {RSS_TABLE_ENTRIES} entries",
            self.rss_table
            and any(not 0 <= queue < queue_pairs for queue in self.rss_table)
            and "the RSS table names a queue that is not",
            not 0 <= self.rss_default_queue < queue_pairs and "the RSS default queue is none of the device's",
            len(self.rss_key) != RSS_KEY_LEN and f"the RSS key has {RSS_KEY_LEN} bytes",
        ]
        for text in wrong:
            if text:
                raise ConfigError(str(text))

    def changed(self, changes: dict[str, Any]) -> Control:
        """Return a copy with other values: what `replace` does, without setting each of the other fields anew."""
        if not changes.keys() <= vars(self).keys():
            raise TypeError(f"no fields of Control: {', '.join(changes.keys() - vars(self).keys())}")
        made = object.__new__(Control)
        vars(made).update(vars(self), **changes)
        return made

    @property
    def link_up(self) -> bool:
        return bool(self.net_status & VIRTIO_NET_S_LINK_UP)


@dataclass
class DeviceState:
    """All that a migration has to know of a device: its registers, its control state, and its queues."""

    status: int = 0
    features: int = 0
    control: Control = field(default_factory=Control)
    queues: list[Virtqueue] = field(default_factory=list)

    def copy(self) -> DeviceState:
        return DeviceState(self.status, self.features, self.control, [replace(queue) for queue in self.queues])


@dataclass
class StateDelta:
    """What turns one `DeviceState` into another: only what has changed, but every index of an enabled queue.

    registers: of status and features; control: fields of `Control`; queues: those whose size, addresses or enabling
    changed; bases: (queue, last_avail_idx) of the others.
    """

    registers: dict[str, int]
    control: dict[str, Any]
    queues: dict[int, Virtqueue]
    bases: list[tuple[int, int]]

    @property
    def empty(self) -> bool:
        """True if nothing but indices changed."""
        return not (self.registers or self.control or self.queues)

    @property
    def concerns_vhost(self) -> bool:
        """True if vhost may have to be told of something; indices aside, which it is told when it is bound."""
        return bool(self.registers or self.queues or "mtu" in self.control)
