"""What all tests want: examples without a deadline, and, if asked for, no test that is left out unseen."""

from __future__ import annotations

import os
import signal
from collections.abc import Generator

import pytest
from hypothesis import HealthCheck, settings

from tests.support import zygote
from vnetdp.warmup import warm_up

# Tests that are run by nohup, or in the background of a script, have these ignored, and so would all that they start.
for _number, _handler in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
    if signal.getsignal(_number) is signal.SIG_IGN:
        signal.signal(_number, _handler)

# How long an example takes, or takes to be made up, says nothing on a machine that others use too.
settings.register_profile("vnetdp", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("vnetdp")


@pytest.fixture(scope="session", autouse=True)
def compiled() -> None:
    """Have the kernels compiled before the first test, by one process for all: no deadline of a test is meant for that."""
    warm_up()
    zygote.begin()


@pytest.fixture(autouse=True)
def forked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have the processes that vnetdp starts here be forked."""
    monkeypatch.setattr("vnetdp.system.child.start", zygote.start)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """With VNETDP_NO_SKIP=1, where all that tests need is said to be there, a test that is skipped has failed."""
    report = yield
    if report.skipped and not hasattr(report, "wasxfail") and os.environ.get("VNETDP_NO_SKIP") == "1":
        report.outcome = "failed"
    return report
