"""Benchmarks: each file asks one question, and checks its own packet counts. `make bench` runs them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from vnetdp.warmup import warm_up

_RATES = pytest.StashKey[list[str]]()


@pytest.fixture(scope="session", autouse=True)
def _compiled() -> None:
    """What is measured is no compilation."""
    warm_up()


@pytest.fixture
def rate(benchmark: BenchmarkFixture, request: pytest.FixtureRequest) -> Callable[[int], None]:
    """Return what puts the packets a second, of the median, into `extra_info`: it is told the packets of one round."""

    def say(packets: int) -> None:
        if benchmark.stats is not None:
            per_s = packets / benchmark.stats.stats.median
            benchmark.extra_info |= {"packets_per_s": round(per_s), "ns_per_packet": round(1e9 / per_s, 1)}
            line = f"{request.node.name:<45} {per_s:15,.0f} packets/s {1e9 / per_s:12,.1f} ns a packet"
            request.config.stash.setdefault(_RATES, []).append(line)

    return say


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Print the rates, for which the tables have no column."""
    for line in config.stash.get(_RATES, []):
        terminalreporter.write_line(line)
