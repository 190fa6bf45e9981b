"""A device's state besides its rings: a driver sets it by registers and control commands (Virtio 1.2, 5.1.6.5).

The state is plain data: it can be copied, compared and sent. State from outside is checked by `validate`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from ..errors import ConfigError
from .features import mtu_error
from .queue import Virtqueue

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

CONFIG_SPACE = ("mac", "mtu", "net_status")  # `Control` fields in the configuration space: a change notifies the driver


def _wrong_entry(table: Sequence[int], queue_pairs: int) -> str:
    """Return the first entry of an RSS table that is no queue pair of the device."""
    at, entry = next((at, entry) for at, entry in enumerate(table) if not 0 <= entry < queue_pairs)
    return f"RSS table entry {at} is {entry}, not a queue pair (0 to {queue_pairs - 1})"


@dataclass(frozen=True)
class Control:
    """A device's state that control commands and the configuration space hold (Virtio 1.2, 5.1.4 and 5.1.6.5).

    It is read-only: `NetDevice.set_control` sets a changed copy.
    """

    mac: bytes = DEFAULT_MAC
    """The card's address, 6 bytes."""
    mtu: int = 0
    """The MTU, 68 to 65535 bytes; 0 if none was set."""
    net_status: int = VIRTIO_NET_S_LINK_UP
    """VIRTIO_NET_S_* bits: 1 link up, 2 announce."""
    curr_queue_pairs: int = 1
    """The queue pairs in use."""
    rx_mode: int = RX_PROMISC
    """A bit for each command of VIRTIO_NET_CTRL_RX, by its number: 1 is PROMISC, 32 is NOBCAST."""
    mac_table: tuple[bytes, ...] = ()
    """MAC addresses to receive, at most 64, unicast first."""
    mac_first_multi: int = 0
    """The index of the first multicast address in `mac_table`."""
    mac_overflow: int = 0
    """Bit 0: too many unicast addresses were given; bit 1: too many multicast addresses."""
    vlans: bytes = bytes(VLAN_BYTES)
    """512 bytes: bit i % 8 of byte i // 8 stands for VLAN id i."""
    guest_offloads: int = 0
    """Offloads that the driver takes in frames it receives: the bits of TUNSETOFFLOAD."""
    rss_enabled: bool = False
    """True if receive-side scaling was set up."""
    rss_redirect: bool = False
    """True if `rss_table` chooses the queue."""
    rss_populate_hash: bool = False
    """True if the hash is reported to the driver."""
    rss_hash_types: int = 0
    """VIRTIO_NET_RSS_HASH_TYPE_* bits."""
    rss_default_queue: int = 0
    """The queue pair of frames without a hash."""
    rss_table: tuple[int, ...] = ()
    """The indirection table: queue pairs, at most 128."""
    rss_key: bytes = bytes(RSS_KEY_LEN)
    """The key of the Toeplitz hash, 40 bytes."""

    def validate(self, queue_pairs: int) -> None:
        """Raise ConfigError unless a driver of a device with *queue_pairs* pairs can have set this."""
        wrong = [
            len(self.mac) != 6 and f"the MAC address has {len(self.mac)} bytes, not 6",
            self.mtu != 0 and mtu_error(self.mtu),
            self.net_status & ~3 and f"net status {self.net_status:#x} has unknown bits",
            not 1 <= self.curr_queue_pairs <= queue_pairs
            and f"{self.curr_queue_pairs} queue pairs in use: the device has 1 to {queue_pairs}",
            self.rx_mode & ~0x3F and f"rx mode {self.rx_mode:#x} has unknown bits",
            len(self.mac_table) > MAC_TABLE_ENTRIES
            and f"the MAC table has {len(self.mac_table)} entries, of at most {MAC_TABLE_ENTRIES}",
            self.mac_table
            and any(len(mac) != 6 for mac in self.mac_table)
            and "an entry of the MAC table has not 6 bytes",
            not 0 <= self.mac_first_multi <= len(self.mac_table)
            and f"the multicast part begins at entry {self.mac_first_multi} of a MAC table of {len(self.mac_table)}",
            self.mac_overflow & ~3 and f"MAC overflow {self.mac_overflow:#x} has unknown bits",
            len(self.vlans) != VLAN_BYTES and f"the VLAN table has {len(self.vlans)} bytes, not {VLAN_BYTES}",
            len(self.rss_table) > RSS_TABLE_ENTRIES
            and f"the RSS table has {len(self.rss_table)} entries, of at most {RSS_TABLE_ENTRIES}",
            self.rss_table
            and any(not 0 <= queue < queue_pairs for queue in self.rss_table)
            and _wrong_entry(self.rss_table, queue_pairs),
            not 0 <= self.rss_default_queue < queue_pairs
            and f"RSS default queue {self.rss_default_queue} is not a queue pair (0 to {queue_pairs - 1})",
            len(self.rss_key) != RSS_KEY_LEN and f"the RSS key has {len(self.rss_key)} bytes, not {RSS_KEY_LEN}",
        ]
        for text in wrong:
            if text:
                raise ConfigError(str(text))

    def changed(self, changes: dict[str, Any]) -> Control:
        """Return a copy with other values: `replace`, without setting each of the other fields anew. @private"""
        if not changes.keys() <= vars(self).keys():
            raise TypeError(f"no fields of Control: {', '.join(changes.keys() - vars(self).keys())}")
        made = object.__new__(Control)
        vars(made).update(vars(self), **changes)
        return made

    @property
    def link_up(self) -> bool:
        """True if `net_status` says that the link is up."""
        return bool(self.net_status & VIRTIO_NET_S_LINK_UP)


@dataclass
class DeviceState:
    """The state of a device that a migration moves. Guest memory, which holds the rings, goes separately."""

    status: int = 0
    """The device status field (Virtio 1.2, 2.1)."""
    features: int = 0
    """The feature bits that the driver accepted."""
    control: Control = field(default_factory=Control)
    """MAC address, MTU, link state, filters and offloads."""
    queues: list[Virtqueue] = field(default_factory=list)
    """Each queue: receiveq 2i, transmitq 2i + 1."""

    def copy(self) -> DeviceState:
        """Return a copy whose queues can change by themselves."""
        return DeviceState(self.status, self.features, self.control, [replace(queue) for queue in self.queues])


@dataclass
class StateDelta:
    """The difference between two `DeviceState` of one device, with the index of every enabled queue."""

    registers: dict[str, int]
    """New values of `status` and `features`, if they changed."""
    control: dict[str, Any]
    """New values of fields of `Control`, by name."""
    queues: dict[int, Virtqueue]
    """The queues whose size, addresses or enabling changed, by number."""
    bases: list[tuple[int, int]]
    """(queue, last_avail_idx) of each other enabled queue."""

    @classmethod
    def of(cls, state: DeviceState) -> StateDelta:
        """Return all of *state* as a difference, in copies."""
        registers = {"status": state.status, "features": state.features}
        return cls(registers, vars(state.control), dict(enumerate(state.copy().queues)), [])

    @property
    def empty(self) -> bool:
        """True if nothing but indices changed."""
        return not (self.registers or self.control or self.queues)

    @property
    def concerns_vhost(self) -> bool:
        """True if a prepared vhost may have to be told of something else than indices."""
        return bool(self.registers or self.queues or "mtu" in self.control)
