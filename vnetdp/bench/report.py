"""The report of a benchmark: a table, the machine, JSON, and a picture if asked for."""

from __future__ import annotations

import os
import platform
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ..errors import ConfigError
from ..system.output import tell, whole_file

Row = dict[str, Any]
_UNITS = (("mpps", "Mpps"), ("gbps", "Gbit/s"), ("us", "µs"), ("ns_per_packet", "ns/packet"))


def machine() -> dict[str, Any]:
    """Return the machine and the versions, by which a reader judges the figures."""
    model = platform.processor()
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            model = line.split(":", 1)[1].strip()
            break
    return {
        "cpu": model,
        "cores": len(os.sched_getaffinity(0)),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "load": os.getloadavg()[0],
    }


def finish(what: str, results: Sequence[Row], plot: str | None, say: Callable[[str], None] = tell) -> dict[str, Any]:
    """Tell *say* the *results*, draw them into *plot* if it is given, and return the whole report."""
    about = machine()
    report = {"bench": what, "machine": about, "results": list(results)}
    say(", ".join(f"{key} {value}" for key, value in about.items()))
    for row in results:
        label = f"{row['name']}, {row['size']} B" if row.get("size") else row["name"]
        why_not = next((f"{what}: {row[what]}" for what in ("skipped", "failed") if row.get(what)), None)
        if why_not:
            say(f"  {label:<40} {row.get('peer') or '':<24} {why_not}")
            continue
        figures = "  ".join(f"{row[key]:10.3f} {unit}" for key, unit in _UNITS if row.get(key) is not None)
        ratio = f"  x{row['ratio']:.2f}" if row.get("ratio") is not None else ""
        say(f"  {label:<40} {row.get('peer') or '':<24}{figures}{ratio}")
    if plot:
        _draw(what, results, plot)
    return report


def _draw(what: str, results: Sequence[Row], path: str) -> None:
    try:
        from matplotlib.figure import Figure  # not pyplot, whose backend is the caller's
    except ImportError as e:
        raise ConfigError("--plot needs matplotlib: pip install 'vnetdp[plot]'") from e

    panels = [(key, unit) for key, unit in _UNITS if any(row.get(key) is not None for row in results)]
    figure = Figure(figsize=(9, 1 + 0.35 * len(results) * len(panels)))
    axes = figure.subplots(len(panels), 1, squeeze=False)
    for axis, (key, unit) in zip(axes[:, 0], panels, strict=True):
        rows = [row for row in results if row.get(key) is not None]
        labels = [" ".join(str(row[k]) for k in ("name", "size", "peer") if row.get(k)) for row in rows]
        bars = axis.barh(labels, [row[key] for row in rows], color="#33658a")
        axis.bar_label(bars, fmt="%.2f", padding=3)
        axis.set_xlabel(unit)
        axis.invert_yaxis()
        axis.spines[["top", "right"]].set_visible(False)
    figure.suptitle(f"vnetdp bench {what}")
    figure.tight_layout()
    with whole_file(path):
        figure.savefig(path, dpi=120)
