"""Report: how a migration went, as one side saw it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from .spans import Spans


@dataclass
class Report:
    """How a migration went, as one side saw it. outcome: `vhost` or `userspace` runs at the destination, or `source`."""

    outcome: str = "source"
    error: str = ""
    spans: Spans = field(default_factory=Spans)
    bytes: dict[str, int] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)
    violations: list[str] = field(default_factory=list)
    target: dict[str, Any] = field(default_factory=dict)
