"""A schedule is text that can be read back, and says in one line, with its number, what can't be read."""

from __future__ import annotations

import pytest
from hypothesis import given, settings

from tests.support.by_hand import CAMPAIGN
from vnetdp import ConfigError
from vnetdp.testing import Schedule, Setup, Step
from vnetdp.testing.strategies import schedules

GOOD = Schedule.of(Setup(2, 4, 3, 0), ["send guest 1 3 64", "fault set_backend:0,1:once", "settle"])


@settings(max_examples=1000 if CAMPAIGN else 30)
@given(schedules())
def test_its_text_is_read_back(schedule: Schedule) -> None:
    assert Schedule.parse(str(schedule)) == schedule
    assert eval(repr(schedule), {"Schedule": Schedule}) == schedule


def test_its_text_has_a_version_and_a_line_a_step() -> None:
    assert str(GOOD).splitlines() == [
        "vnetdp schedule 1",
        "setup pairs=2 num=4 first_idx=3 features=none wire=vnetdp:MailboxEndpoint",
        "send guest 1 3 64",
        "fault set_backend:0,1:once",
        "settle",
        "end",
    ]
    assert GOOD.text(["3 moved; vhost"]).splitlines()[2] == "send guest 1 3 64        # 3 moved; vhost"
    assert Schedule.parse(GOOD.text(["3 moved", "", "done"])) == GOOD


def test_it_is_read_out_of_a_failure_s_text() -> None:
    text = "\n".join(
        ["Some test failed:", "", *(f"E           {line}" for line in str(GOOD).splitlines()), "E", "more"]
    )
    assert Schedule.parse(text) == GOOD


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("vnetdp schedule", "another schedule", "no line begins with 'vnetdp schedule': this is no schedule"),
        ("schedule 1", "schedule 2", "line 1: 'vnetdp schedule 2': this version reads vnetdp schedule 1 alone"),
        ("\nend", "", "the schedule does not end with the line 'end': it was cut off"),
        ("setup", "settings", "line 2: 'settings pairs=2"),
        ("pairs=2", "pairs=0", "line 2: 0 queue pairs: 1 to 64 can be"),
        ("pairs=2", "pairs=x", "line 2: setup: pairs 'x' is not a number"),
        ("pairs=2 ", "", "is not: setup pairs=… num=… first_idx=… features=… wire=…"),
        ("num=4", "num=5", "line 2: queue size 5 is not a power of two"),
        ("num=4", "num=2048", "line 2: queue size 2048: at most 1024 can be"),
        ("first_idx=3", "first_idx=65536", "line 2: first_idx 65536 is not between 0 and 65535"),
        ("features=none", "features=tso", "line 2: unknown feature 'tso'"),
        ("vnetdp:MailboxEndpoint", "vnetdp", "line 2: wire 'vnetdp' is not MODULE:CLASS"),
        ("send guest 1 3 64", "jump", "line 3: 'jump' is no step; steps are send, frame, guest,"),
        ("send guest 1 3 64", "send guest 1 3", "line 3: 'send guest 1 3' has 3 arguments; the step is: send END PAIR"),
        ("send guest 1 3 64", "send moon 1 3 64", "line 3: END 'moon' is not guest or wire"),
        ("send guest 1 3 64", "send guest 2 3 64", "line 3: 'send guest 2 3 64': PAIR 2 of a device with 2: 0 to 1"),
        ("send guest 1 3 64", "queue 4", "line 3: 'queue 4': QUEUE 4 of a device with 4: 0 to 3 can be"),
        ("send guest 1 3 64", "send guest 1 -3 64", "line 3: COUNT '-3' is not a number from 1 to 4096"),
        ("send guest 1 3 64", "frame wire 0 xyz", "line 3: frame 'xyz' is not bytes in hexadecimal"),
        ("set_backend:0,1", "set_nothing", "line 4: fault 'set_nothing:once' is not"),
    ],
)
def test_what_is_wrong_with_it_is_said_with_its_line(old: str, new: str, says: str) -> None:
    text = str(GOOD)
    assert old in text
    with pytest.raises(ConfigError) as caught:
        Schedule.parse(text.replace(old, new))
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_schedule_can_t_be_made_for_a_queue_that_its_device_lacks() -> None:
    with pytest.raises(ConfigError, match="PAIR 1 of a device with 1: 0 to 0 can be"):
        Schedule(Setup(), (Step("send", ("guest", 1, 1, 60)),))
    with pytest.raises(ConfigError, match="features: bit 63 has no name"):
        Setup(features=1 << 63)
