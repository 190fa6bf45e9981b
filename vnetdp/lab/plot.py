"""The timeline picture: spans of both sides over the packet rate that the far end saw, so that one sees the blackout."""

from __future__ import annotations

import numpy as np

from ..errors import ConfigError
from ..system.output import whole_file
from .couple import Result

_BEFORE_MS, _AFTER_MS = 4.0, 6.0
_BINS = 160


def draw(result: Result, path: str) -> None:
    """Write the timeline of a migration around the source's stop to *path*; needs matplotlib (the plot extra)."""
    from matplotlib.figure import Figure  # not pyplot, whose backend is the caller's

    spans = [span for span in result.spans if span[3] > span[2]]
    stop = next((began for side, name, began, _ in spans if (side, name) == ("source", "stop")), None)
    if stop is None:
        raise ConfigError(
            f"{path} is not drawn: the migration failed before the source stopped, so there is no blackout"
        )
    last = max(ended for _, _, _, ended in spans)
    low, high = -_BEFORE_MS, (last - stop) / 1e6 + _AFTER_MS
    shown = [span for span in spans if (span[3] - stop) / 1e6 > low]
    figure = Figure(figsize=(10, 6), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(2, 1))
    names = list(dict.fromkeys((side, name) for side, name, _, _ in shown))
    for side, name, began, ended in shown:
        row = names.index((side, name))
        color = "tab:blue" if side == "source" else "tab:orange"
        above.barh(row, max(ended - began, 2000) / 1e6, left=(began - stop) / 1e6, color=color)
        above.text((ended - stop) / 1e6, row, f" {(ended - began) / 1e3:.0f} µs", va="center", fontsize=7)
    above.set_yticks(range(len(names)), [f"{side}: {name}" for side, name in names], fontsize=8)
    above.invert_yaxis()
    blackout = "without end" if result.blackout_us is None else f"{result.blackout_us / 1e3:.1f} ms"
    above.set_title(
        f"policy {result.policy}: {result.outcome}, blackout {blackout}, "
        f"destination work {result.destination_us:.0f} µs"
    )
    at = (result.samples[:, 0] - stop) / 1e6
    edges = np.linspace(low, high, _BINS)
    for column, label in ((1, "guest to wire"), (2, "wire to guest")):
        counts = np.interp(edges, at, result.samples[:, column])
        below.step(edges[1:], np.diff(counts) / np.diff(edges) / 1e3, label=label, linewidth=1)
    below.set_ylabel("Mpps")
    below.set_xlabel("ms since the source began to stop")
    below.legend(fontsize=8)
    below.set_xlim(low, high)
    with whole_file(path):
        figure.savefig(path, dpi=110)
