"""What all tests want: examples without a deadline, and, if asked for, no test that is left out unseen."""

from __future__ import annotations

import os
from collections.abc import Generator

import pytest
from hypothesis import HealthCheck, settings

from vnetdp.warmup import warm_up

# How long an example takes, or takes to be made up, says nothing on a machine that others use too.
settings.register_profile("vnetdp", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("vnetdp")


@pytest.fixture(scope="session", autouse=True)
def compiled() -> None:
    """Have the kernels compiled before the first test, by one process for all: no deadline of a test is meant for that."""
    warm_up()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """With VNETDP_NO_SKIP=1, where all that tests need is said to be there, a test that is skipped has failed."""
    report = yield
    if report.skipped and not hasattr(report, "wasxfail") and os.environ.get("VNETDP_NO_SKIP") == "1":
        report.outcome = "failed"
    return report
