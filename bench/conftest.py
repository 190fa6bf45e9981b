"""Benchmarks: each file asks one question, and checks its own packet counts. `make bench` runs them."""

from __future__ import annotations

import pytest

from vnetdp.warmup import warm_up


@pytest.fixture(scope="session", autouse=True)
def _compiled() -> None:
    """What is measured is no compilation."""
    warm_up()
