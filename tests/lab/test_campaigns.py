"""A campaign reports each case once, whatever becomes of its workers: processes of this machine, or of a Dask cluster.

With VNETDP_CAMPAIGN=1 (`make campaign`) a cluster runs the whole fault matrix, and loses a worker.
"""

from __future__ import annotations

import os
import signal
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from tests.lab.campaign_cases import die, die_once, square
from tests.support.by_hand import CAMPAIGN, no_descriptor_leaks
from vnetdp.errors import ConfigError
from vnetdp.lab.campaigns import Finding, campaign
from vnetdp.lab.fault_cases import FaultCase, give_up, lost_row, run_case
from vnetdp.lab.matrix import Row, chosen


def plan(policy: str = "delta") -> list[FaultCase]:
    return [FaultCase(policy, config, case) for config, case in chosen((1, 4), ("idle", "both"), "")]


# --- this process, and processes of this machine ---


@pytest.mark.parametrize("jobs", [1, 2])
def test_each_case_has_a_finding_in_order_and_is_told(jobs: int) -> None:
    told: list[Finding[int, int]] = []
    campaign(square, range(1), jobs=jobs)  # Python's tracker of resources, which stays, has a descriptor
    with no_descriptor_leaks():
        found = campaign(square, range(-1, 4), jobs=jobs, done=told.append)
    assert found == [Finding(-1, None, "ValueError: -1 is negative"), *(Finding(n, n * n) for n in range(4))]
    assert sorted(told, key=lambda each: each.case) == found


def test_no_cases_need_no_process() -> None:
    assert campaign(square, (), jobs=2) == []


def test_a_worker_that_is_killed_loses_no_case(tmp_path: Path) -> None:
    cases = [(tmp_path / str(n), n in (1, 5)) for n in range(8)]
    told: list[Path] = []
    found = campaign(die_once, cases, jobs=2, done=lambda each: told.append(each.case[0]))
    assert [each.error for each in found] == [""] * 8
    assert Counter(told) == Counter(case[0] for case in cases)


def test_a_case_that_ends_each_of_its_workers_is_named() -> None:
    found = campaign(die, range(4), jobs=2)
    assert found == [
        Finding(0, 0),
        Finding(1, 1),
        Finding(2, None, "the worker process of this case ended 3 times"),
        Finding(3, 3),
    ]


def test_jobs_are_at_least_one() -> None:
    with pytest.raises(ConfigError, match="0 jobs: a campaign needs at least 1"):
        campaign(square, range(3), jobs=0)


def test_rows_of_the_fault_matrix_run_one_by_one_in_this_process() -> None:
    rows = [each for each in plan() if each.config.queue_pairs == 1 and each.case.id in ("E3", "E4")]
    with no_descriptor_leaks():
        found = campaign(run_case, rows)
        give_up()
    assert [(each.case, each.result.ok if each.result else each.error) for each in found] == [
        (row, True) for row in rows
    ]


def test_a_case_that_was_lost_is_a_row_that_failed() -> None:
    each = plan()[0]
    row = lost_row(Finding(each, None, "the worker process of this case ended 3 times"))
    assert (row.ok, row.outcome) == (False, "lost")
    assert row.violations == ["I6: the worker process of this case ended 3 times"]


# --- a Dask cluster ---


def cluster(**settings: Any) -> Any:
    distributed = pytest.importorskip("distributed", reason="Dask's distributed is not installed")
    return distributed.LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None, **settings)


def test_a_dask_cluster_runs_each_case_once() -> None:
    told: list[Finding[int, int]] = []
    with cluster(processes=False) as two, two.get_client() as client:
        found = campaign(square, range(-1, 20), client=client, done=told.append)
    assert found == [Finding(-1, None, "ValueError: -1 is negative"), *(Finding(n, n * n) for n in range(20))]
    assert sorted(told, key=lambda each: each.case) == found


if CAMPAIGN:  # it takes minutes

    def test_the_fault_matrix_on_a_dask_cluster_has_each_case_once_though_a_worker_is_killed() -> None:
        rows = plan()
        told: list[FaultCase] = []
        with cluster(processes=True) as two, two.get_client() as client:

            def one(found: Finding[FaultCase, Row]) -> None:
                told.append(found.case)
                if len(told) == len(rows) // 2:
                    os.kill(min(client.run(os.getpid).values()), signal.SIGKILL)

            found = campaign(run_case, rows, client=client, done=one)
        assert Counter(told) == Counter(rows)
        assert [each.case for each in found] == rows
        wrong = [
            (each.case.case.id, each.error or each.result) for each in found if not (each.result and each.result.ok)
        ]
        assert not wrong
