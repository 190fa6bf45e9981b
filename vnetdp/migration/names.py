"""The names of policies and traffic for the command line, without the weight of their modules."""

from __future__ import annotations

from typing import Final

POLICIES: Final = ("none", "seed", "delta")
TRAFFIC: Final = ("idle", "tx", "rx", "both")  # as the guest sees it
