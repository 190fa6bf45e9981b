"""The shipped kernels keep every rule in every schedule, and the kernels with an order taken away do not."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.by_hand import CAMPAIGN, wait_for
from vnetdp.errors import ConfigError, WorkError
from vnetdp.testing.explore import MUTANTS, SCENARIOS, Job, Mutant, explore, explore_all

LONG = {"transmit-killed"}  # takes longer than all others together
COMMAND = [sys.executable, "-m", "vnetdp.testing.explore"]


def run(*args: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*COMMAND, *args], capture_output=True, text=True, timeout=240, check=False)


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def test_the_shipped_kernels_keep_the_rules_in_every_schedule() -> None:
    jobs = [Job(name) for name in SCENARIOS if CAMPAIGN or name not in LONG]
    if CAMPAIGN:
        jobs += [Job(name, extra=1) for name in SCENARIOS]
    assert [str(report) for report in explore_all(jobs, print) if not report.survived] == []


def test_every_mutant_is_found_within_a_minute_and_its_schedule_can_be_replayed() -> None:
    found = list(explore_all([Job(mutant.scenario, name) for name, mutant in MUTANTS.items()], print))
    assert [str(report) for report in found if not report.fault or report.seconds > 60] == []
    again = list(explore_all([Job(report.scenario, report.mutant, schedule=report.schedule) for report in found]))
    assert [report.fault for report in again] == [report.fault for report in found]
    assert [report.operations for report in again] == [report.operations for report in found]


def test_barriers_a_and_b_are_needed_in_the_weak_model_alone() -> None:
    names = ["A-release", "A-acquire", "B-release", "B-acquire"]
    jobs = [Job(MUTANTS[name].scenario, name, "tso") for name in names]
    assert all(report.survived for report in explore_all(jobs))


def test_a_mutant_changes_text_that_is_there_once() -> None:
    for mutant in MUTANTS.values():
        assert mutant.source() != ""
        assert mutant.scenario in SCENARIOS
    wrong = Mutant("", "transmit", "vnetdp_kernels.virtq.split_device", "needs_call", (("no such text", ""),))
    with pytest.raises(ValueError, match="needs_call has 0 times, not once: no such text"):
        wrong.source()


def test_a_search_that_gives_up_has_survived_nothing() -> None:
    report = explore(Job("transmit", most_states=100))
    assert not report.survived
    assert "not all states were looked at" in str(report)


@pytest.mark.parametrize(
    ("job", "text"),
    [
        (Job("transmission"), "scenario 'transmission' is none of: transmit, "),
        (Job("transmit", "no-fence"), "mutant 'no-fence' is none of: A-release, "),
        (Job("transmit", model="arm"), "model 'arm' is none of: tso, weak"),
        (Job("transmit", extra=-1), "extra is -1: 0 is the least"),
        (Job("transmit", schedule="guest.go"), "'guest.go' is no step: one is ACTOR.go"),
        (Job("transmit", schedule="device.kill"), r"step 1, kill 0 of actor 0, can't be done"),
    ],
    ids=["scenario", "mutant", "model", "extra", "actor", "step"],
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
    wait_for(lambda: not Path(f"/proc/{searcher}").exists(), "the process of the search has ended")
