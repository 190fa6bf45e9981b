"""The shipped kernels keep every rule in every schedule, and the kernels with an order taken away do not."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from tests.support.by_hand import CAMPAIGN, wait_for
from vnetdp.errors import ConfigError, WorkError
from vnetdp.testing.explore import MUTANTS, SCENARIOS, Job, Mutant, Report, explore, explore_all

LONG = {"transmit-killed"}  # takes half as long as all others together
WEAK = ("A-release", "A-acquire", "B-release", "B-acquire")
GIVES_UP = Job("transmit", most_states=100)
COMMAND = [sys.executable, "-m", "vnetdp.testing.explore"]


def run(*args: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*COMMAND, *args], capture_output=True, text=True, timeout=240, check=False)


def mutation(name: str) -> Job:
    return Job(MUTANTS[name].scenario, name)


def ended(pid: int) -> bool:
    """Return whether a process has ended; nobody may have taken note of it yet."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in ("Z", "X")
    except OSError:
        return True


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


@pytest.fixture(scope="module")
def reports() -> dict[Job, Report]:
    """The searches of this file, in one process."""
    jobs = [Job(name) for name in SCENARIOS if CAMPAIGN or name not in LONG]
    jobs += [Job(name, extra=1) for name in SCENARIOS if CAMPAIGN]
    jobs += [mutation(name) for name in MUTANTS]
    jobs += [replace(mutation(name), model="tso") for name in WEAK]
    return dict(zip([*jobs, GIVES_UP], explore_all([*jobs, GIVES_UP], print), strict=True))


def test_the_shipped_kernels_keep_the_rules_in_every_schedule(reports: dict[Job, Report]) -> None:
    shipped = [report for job, report in reports.items() if not job.mutant and job != GIVES_UP]
    assert len(shipped) >= len(SCENARIOS) - len(LONG)
    assert [str(report) for report in shipped if not report.survived] == []


def test_every_mutant_is_found_within_a_minute_and_its_schedule_can_be_replayed(reports: dict[Job, Report]) -> None:
    found = [reports[mutation(name)] for name in MUTANTS]
    assert [str(report) for report in found if not report.fault or report.seconds > 60] == []
    again = list(explore_all([Job(report.scenario, report.mutant, schedule=report.schedule) for report in found]))
    assert [report.fault for report in again] == [report.fault for report in found]
    assert [report.operations for report in again] == [report.operations for report in found]


def test_barriers_a_and_b_are_needed_in_the_weak_model_alone(reports: dict[Job, Report]) -> None:
    assert all(reports[replace(mutation(name), model="tso")].survived for name in WEAK)


def test_a_search_that_gives_up_has_survived_nothing(reports: dict[Job, Report]) -> None:
    assert not reports[GIVES_UP].survived
    assert "not all states were looked at" in str(reports[GIVES_UP])


def test_a_mutant_changes_text_that_is_there_once() -> None:
    for mutant in MUTANTS.values():
        assert mutant.source() != ""
        assert mutant.scenario in SCENARIOS
    wrong = Mutant("", "transmit", "vnetdp_kernels.virtq.split_device", "needs_call", (("no such text", ""),))
    with pytest.raises(ValueError, match="needs_call has 0 times, not once: no such text"):
        wrong.source()


@pytest.mark.parametrize(
    ("job", "text"),
    [
        (Job("transmission"), "scenario 'transmission' is none of: transmit, "),
        (Job("transmit", "no-fence"), "mutant 'no-fence' is none of: A-release, "),
        (Job("transmit", model="arm"), "model 'arm' is none of: tso, weak"),
        (Job("transmit", extra=-1), "extra is -1: transmit can have 0 to 3 frames more"),
        (Job("dirty-log", extra=2), "extra is 2: dirty-log can have 0 to 1 frames more"),
        (Job("transmit", most_states=0), "most_states is 0: 1 is the least"),
        (Job("transmit", schedule="driver.go guest.go"), "'guest.go' is no step: one is ACTOR.go"),
    ],
    ids=["scenario", "mutant", "model", "negative", "extra", "states", "schedule"],
)
def test_a_job_that_cannot_be_done_is_refused(job: Job, text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        explore(job)


def test_a_search_whose_process_is_killed_says_so() -> None:
    killed: list[int] = []

    def kill(_: str) -> None:
        if not killed:
            killed.extend(children(os.getpid())[-1:])
            os.kill(killed[0], signal.SIGKILL)

    with pytest.raises(WorkError, match="transmit: the process of the search was killed by SIGKILL"):
        explore(Job("transmit", extra=2), kill)


def test_the_command_prints_the_size_and_a_schedule_by_name() -> None:
    done = run("--mutant", "A-release")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("transmit-weak (weak), mutant A-release: ")
    assert "driver  arrives tx.avail.idx = 0x1" in done.stdout
    assert "replay: --schedule '" in done.stdout
    wrong = run("nothing")
    assert (wrong.returncode, wrong.stdout) == (2, "")
    assert wrong.stderr.startswith("vnetdp: scenario 'nothing' is none of: transmit, ")


def test_ctrl_c_ends_a_search_and_its_process() -> None:
    with subprocess.Popen([*COMMAND, "transmit", "--extra", "2"], stderr=subprocess.PIPE, text=True) as command:
        assert command.stderr is not None
        assert command.stderr.readline().startswith("transmit: ")
        (searcher,) = children(command.pid)
        command.send_signal(signal.SIGINT)
        assert command.wait(60) == -signal.SIGINT
        assert command.stderr.read() == ""
    wait_for(lambda: ended(searcher), "the process of the search has ended")
