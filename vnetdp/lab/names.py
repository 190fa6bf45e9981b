"""The names of changes for the command line, without the weight of their module."""

from __future__ import annotations

from typing import Final

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
