"""A worker is killed, fails or hangs when a test asks it to (`kill`, `fail`, `hang`), at any time and in any order."""

from __future__ import annotations

import logging
import math

import pytest

from tests.support.by_hand import no_descriptor_leaks
from vnetdp import BackendError, ConfigError, MacswapEndpoint, Worker, WorkerProcess

Kind = type[Worker] | type[WorkerProcess]


@pytest.fixture(params=[Worker, WorkerProcess], ids=["thread", "process"])
def make(request: pytest.FixtureRequest) -> Kind:
    kind: Kind = request.param
    return kind


def test_a_worker_can_be_killed_at_any_time_and_more_than_once(make: Kind) -> None:
    with no_descriptor_leaks():
        worker = make(1)
        for _ in range(2):
            worker.kill()
        for end in (worker.kill, lambda: worker.fail(OSError("too late")), lambda: worker.hang(math.inf)):
            end()  # an ended worker is left alone
        with MacswapEndpoint() as wire, pytest.raises(BackendError, match="killed"):
            worker.backends[0].set_backend(0, wire)
        worker.close()
        for end in (worker.kill, lambda: worker.fail(OSError("too late")), lambda: worker.hang(math.inf)):
            end()


def test_a_worker_that_hangs_for_ever_is_closed_at_once(make: Kind, caplog: pytest.LogCaptureFixture) -> None:
    worker = make(1, timeout_s=None)
    worker.hang(math.inf)
    worker.close()
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR]  # none had to be killed


def test_a_worker_ends_in_no_way_that_is_none(make: Kind) -> None:
    worker = make(1)
    for seconds in (-1, math.nan):
        with pytest.raises(ConfigError, match="can't hang for"):
            worker.hang(seconds)
    with pytest.raises(TypeError, match="an exception, such as OSError"):
        worker.fail("boom")  # type: ignore[arg-type]
    worker.backends[0].set_features(0)  # it lives
    worker.close()


def test_the_exception_that_ended_a_thread_is_told() -> None:
    worker = Worker(1)
    worker.fail(OSError("the disk is full"))
    with MacswapEndpoint() as wire, pytest.raises(BackendError, match="has ended: OSError: the disk is full"):
        worker.backends[0].set_backend(0, wire)
    worker.close()
