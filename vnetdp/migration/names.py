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
