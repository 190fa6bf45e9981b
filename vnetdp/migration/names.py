"""The names of policies, traffic, changes and verbs for the command line, without the weight of their modules."""

from __future__ import annotations

from typing import Final

POLICIES: Final = ("none", "seed", "delta")
TRAFFIC: Final = ("idle", "tx", "rx", "both")  # as the guest sees it
CHANGES: Final = (
    "mac",
    "mac_table",
    "vlans",
    "rx_mode",
    "queue_pairs",
    "mtu",
    "offloads",
    "rss",
    "announce",
    "link",
    "queue_reset",
    "ring_setup",
    "features",
)
FAULT_POINTS: Final = (
    "set_mtu",
    "set_features",
    "set_memory",
    "set_log",
    "set_vring_num",
    "set_vring_base",
    "set_vring_addr",
    "set_vring_kick",
    "set_vring_call",
    "set_backend",
    "get_vring_base",
    "unbind",
    "grab_ioeventfd",
    "set_host_notifier",
    "set_guest_notifiers",
    "unset_guest_notifiers",
)
