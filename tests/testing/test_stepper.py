"""A stepped device: each step is recorded, the invariants hold after each, and a schedule leaves the same bytes anywhere."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import Phase, given, settings

from tests.support.by_hand import CAMPAIGN, no_descriptor_leaks, scaled
from tests.testing import wires
from vnetdp import ConfigError, UserspaceBackend
from vnetdp.backends.verbs import GetVringBase, SetLog
from vnetdp.testing import Schedule, ScheduleError, Setup, Stepper, replay
from vnetdp.testing.__main__ import main
from vnetdp.testing.strategies import schedules

ROOT = Path(__file__).parents[2]
LOSSY = Setup(wire=f"{wires.__name__}:LosesFrames")

EVERYTHING = (
    "send guest 0 10 60, guest 64, use userspace, device 3, send wire 1 7 1514, log on, device 64, "
    "fault set_backend:0_1:once, use vhost, status, vhost 64, guest 64, log read, queue 1, link down, settle, kill, "
    "settle, revive, frame wire 0 00000000000000000000000001, send guest 1 5 100, log off, mend, reset, settle"
)
STEPS = [step.replace("_1", ",1") for step in EVERYTHING.split(", ")]


def test_each_step_is_recorded_with_what_came_of_it() -> None:
    with no_descriptor_leaks(), Stepper(Setup(pairs=2, num=4, first_idx=0xFFFC)) as stepper:
        stepper.play(STEPS)
        outcome = stepper.outcome()
        assert list(map(str, stepper.schedule.steps)) == STEPS
    notes = dict(zip(STEPS, outcome.notes, strict=True))
    assert notes["use vhost"] == "0 moved; userspace; set_backend (vring 1): EIO: injected fault"
    assert notes["status"] == "0 moved; vhost"
    assert notes["link down"] == "0 moved; nobody"
    assert "ESRCH" in notes["kill"]
    assert (outcome.violations, outcome.owner) == ((), "vhost")
    assert outcome.dirty
    assert outcome.to_guest.clean
    # The reset of the queue, and that of the device, lost frames that were under way; nothing else did.
    assert (outcome.to_wire.sent, outcome.to_wire.duplicated, outcome.to_wire.corrupted) == (15, 0, 0)


def test_two_runs_of_a_schedule_leave_the_same_bytes_and_another_schedule_others() -> None:
    setup = Setup(num=4)
    first = replay(Schedule.of(setup, ["send guest 0 10 60", "guest 64", "vhost 3", "settle"]))
    again = replay(str(first.schedule))
    other = replay(Schedule.of(setup, ["send guest 0 10 60", "guest 64", "vhost 4", "settle"]))
    assert first == again
    assert first.to_wire == other.to_wire
    assert first.trail != other.trail


def test_a_vhost_that_is_killed_between_two_steps_costs_no_frame() -> None:
    with Stepper(Setup(num=64)) as stepper:
        stepper.play(["send guest 0 40 60", "send wire 0 40 60", "guest 64", "vhost 7"])
        stepper.do("kill")
        assert stepper.device.owner.value == "userspace"
        assert stepper.do("vhost 64") == 0
        stepper.do("settle")
        stepper.do("revive")
        outcome = stepper.outcome()
        assert outcome.owner == "vhost"
        assert outcome.to_wire.clean
        assert outcome.to_guest.clean


@settings(max_examples=1000 if CAMPAIGN else scaled(25, 3))
@given(schedules())
def test_whatever_is_done_in_whatever_order_every_frame_arrives_once(schedule: Schedule) -> None:
    replay(schedule).check()


def found_by_hypothesis() -> str:
    """Return the text of the failure that hypothesis finds, and makes small, on a wire that loses frames."""

    phases = (Phase.generate, Phase.shrink)

    @settings(phases=phases, derandomize=True, database=None, report_multiple_bugs=False)
    @given(schedules(LOSSY, max_steps=8))
    def no_frame_is_lost(schedule: Schedule) -> None:
        replay(schedule).check()

    with pytest.raises(ScheduleError) as caught:
        no_frame_is_lost()
    return str(caught.value)


def test_a_schedule_that_hypothesis_found_replays_byte_for_byte_in_another_process(tmp_path: Path) -> None:
    text = found_by_hypothesis()
    here = replay(text)
    assert here.violations[0].startswith("I1: 1 frames from guest to wire lost on pair 0: ")
    assert len(here.schedule.steps) <= 4  # a step that is not needed to lose a frame was left out
    failure = tmp_path / "failure"
    failure.write_text("".join(f"E       {line}\n" for line in text.splitlines()))  # as pytest prints it
    command = [sys.executable, "-m", "vnetdp.testing", "replay", str(failure)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 1, done.stderr
    assert done.stderr.splitlines()[-1] == here.violations[-1]
    assert json.loads(done.stdout) == json.loads(json.dumps(here.as_dict()))


@pytest.mark.parametrize(
    ("wire", "steps", "says"),
    [
        ("LosesFrames", ["send guest 0 40 60", "settle"], "I1: 2 frames from guest to wire lost on pair 0: 19, 39"),
        ("Repeats", ["send wire 0 3 60", "settle"], "I1: 3 frames from wire to guest duplicated"),
        ("Turns", ["send wire 0 3 60", "settle"], "I10: 2 frames from wire to guest reordered"),
        ("Damages", ["send guest 0 3 60", "guest 9", "vhost 9"], "I8: 3 frames from guest to wire corrupted"),
        ("Raises", ["send guest 0 3 60", "guest 9", "vhost 9"], "vhost: ZeroDivisionError: the wire's own mistake"),
    ],
)
def test_a_broken_wire_breaks_the_invariant_at_the_step_where_it_shows(wire: str, steps: list[str], says: str) -> None:
    outcome = replay(Schedule.of(Setup(wire=f"{wires.__name__}:{wire}"), steps))
    assert outcome.violations[0] == says
    assert len(outcome.schedule.steps) == len(steps)
    with pytest.raises(ScheduleError) as caught:
        outcome.check()
    assert caught.value.violations == outcome.violations
    assert replay(str(caught.value)) == outcome


def one_too_few(backend: UserspaceBackend, verb: GetVringBase) -> int:
    return (GOOD_BASE(backend, verb) or 0) - 1 & 0xFFFF


GOOD_BASE = UserspaceBackend._RUN[GetVringBase]


@pytest.mark.parametrize(
    ("verb", "broken", "says"),
    [
        (GetVringBase, one_too_few, "I3: queue 1 goes on at 2, and used.idx is 3"),
        (SetLog, lambda *_: 0, "I8: page 19 was written, and is not in the dirty log"),
    ],
)
def test_a_verb_that_does_its_work_wrongly_is_found_at_once(
    monkeypatch: pytest.MonkeyPatch, verb: type, broken: Callable[..., int], says: str
) -> None:
    monkeypatch.setitem(UserspaceBackend._RUN, verb, broken)
    steps = ["send wire 0 1 60", "send guest 0 3 60", "log on", "guest 64", "vhost 64", "link down"]
    assert says in replay(Schedule.of(Setup(), steps)).violations


def test_a_page_that_is_written_past_the_dirty_log_is_found() -> None:
    with Stepper() as stepper:
        stepper.play(["log on", "send wire 0 1 60", "vhost 64", "log read", "guest 64"])
        first, length = stepper.guest.place_of(0)
        page = (first + length - 1) // 4096  # of the last receive buffer
        stepper.memory.write(first + length - 1, b"\1")
        with pytest.raises(ScheduleError, match=f"^I8: page {page} was written, and is not in the dirty log\n"):
            stepper.do("guest 64")


def test_an_exception_of_the_tests_own_carries_the_schedule() -> None:
    with pytest.raises(AssertionError) as caught, Stepper() as stepper:
        stepper.do("send guest 0 1 60")
        raise AssertionError("the test's own")
    (note,) = caught.value.__notes__
    assert Schedule.parse(note) == Schedule.of(Setup(), ["send guest 0 1 60"])


@pytest.mark.parametrize(
    ("wire", "says"),
    [
        ("no_such_module:Wire", "No module named 'no_such_module'"),
        (f"{wires.__name__}:Nothing", "has no attribute 'Nothing'"),
        (f"{wires.__name__}:NoMailbox", "is no subclass of MailboxEndpoint"),
    ],
)
def test_a_wire_that_can_t_be_made_is_said_in_one_line(wire: str, says: str) -> None:
    with no_descriptor_leaks(), pytest.raises(ConfigError, match=f"wire {wire}.*{says}") as caught:
        Stepper(Setup(wire=wire))
    assert "\n" not in str(caught.value)


def test_a_step_that_can_t_be_is_neither_done_nor_recorded() -> None:
    with Stepper() as stepper:
        for step in ("jump", "send guest 1 1 60", "guest 0"):
            with pytest.raises(ConfigError):
                stepper.do(step)
        assert stepper.schedule.steps == ()
        assert stepper.do("settle") == 0


def test_the_command_runs_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "schedule"
    path.write_text(str(Schedule.of(Setup(), ["send guest 0 2 60", "settle"])))
    assert main(["replay", str(path)]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["to_wire"]["delivered"] == 2
    path.write_text("nothing")
    assert main(["replay", str(path)]) == 2
    assert "this is no schedule" in capsys.readouterr().err
    assert main(["replay", str(tmp_path / "missing")]) == 2
    assert "No such file" in capsys.readouterr().err
