"""A link in a process: what its report says of trouble."""

from __future__ import annotations

import pytest

from tests.by_hand import wait_for
from vnetdp.endpoints.mailbox import MailboxEndpoint
from vnetdp.link import Link


def _fails() -> None:
    raise RuntimeError("a defect")


@pytest.mark.parametrize(
    ("side", "says"),
    [
        ("left", "nobody runs the rings: set_backend (vring 0): ESRCH: the worker's thread has ended"),
        ("right", "the driver's thread ended: RuntimeError: a defect"),
    ],
)
def test_a_thread_that_ended_is_an_error(side: str, says: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with MailboxEndpoint() as left, MailboxEndpoint() as right, Link(left, right) as link:
        assert link.report()["errors"] == []
        end = {"left": left, "right": right}[side]
        monkeypatch.setattr(end, "service", _fails)
        end.put(bytes(60))
        wait_for(lambda: link.report()["errors"] == [says], says)
