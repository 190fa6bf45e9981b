"""An endpoint in Python that misbehaves costs its frames, and neither the datapath nor anybody else's frames."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

import pytest

from tests.endpoints.joined import guest_of, receive_all, send_all
from tests.support.by_hand import frame, wait_for
from vnetdp.endpoints.base import PYTHON_SLOTS
from vnetdp.endpoints.loopback import NullEndpoint
from vnetdp.endpoints.mailbox import MailboxEndpoint
from vnetdp.endpoints.scapy import ScapyEndpoint
from vnetdp.errors import EndpointError
from vnetdp_kernels import spec

HEADER = bytes(spec.NET_HDR_LEN)


def _exit() -> Any:
    sys.exit("enough")


def _fail() -> Any:
    raise EndpointError("not now")


class Misbehaving(MailboxEndpoint):
    """A mailbox whose next batch is what `instead` gives."""

    name = "misbehaving"
    instead: Callable[[], Any] | None = None

    def receive_frames(self, queue: int, limit: int) -> Sequence[bytes]:
        if self.instead is None:
            return super().receive_frames(queue, limit)
        instead, self.instead = self.instead, None
        batch: Sequence[bytes] = instead()
        return batch


@pytest.mark.parametrize(
    "instead",
    [_exit, _fail, lambda: None, lambda: 7, lambda: [None], lambda: [HEADER, "text"], lambda: [HEADER, 5]],
)
def test_what_is_no_batch_of_frames_is_an_error_and_no_more(
    instead: Callable[[], Any], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING), Misbehaving() as endpoint, guest_of(endpoint) as driver:
        for n in range(1, 4):
            endpoint.instead = instead
            endpoint.put(frame(n))
            assert receive_all(driver, 1)[-1] == frame(n)
            send_all(driver, [frame(n)])
            wait_for(lambda n=n: endpoint.counters()["to_wire"] == n, "the other way lives too")  # type: ignore[misc]
            wait_for(lambda n=n: endpoint.errors == n, "an error is counted")  # type: ignore[misc]
    assert ["logged once" in r.getMessage() for r in caplog.records] == [True]


def test_more_than_was_asked_for_is_dropped_and_counted() -> None:
    frames = [frame(n) for n in range(PYTHON_SLOTS + 9)]
    with Misbehaving() as endpoint, guest_of(endpoint) as driver:
        endpoint.instead = lambda: [HEADER + one for one in frames]
        endpoint.put(frames[0])
        got = receive_all(driver, PYTHON_SLOTS + 1)
        assert got == [*frames[:PYTHON_SLOTS], frames[0]]
        assert endpoint.counters()["dropped_error"] == 9
        assert endpoint.errors == 0


@pytest.mark.parametrize("batch", [False, True])
def test_a_callable_that_exits_costs_its_packets(batch: bool) -> None:
    def answer(packets: Any) -> Any:
        return packets if endpoint.counters()["dropped_error"] else sys.exit("enough")

    with ScapyEndpoint(answer, batch=batch) as endpoint, guest_of(endpoint) as driver:
        send_all(driver, [frame(0)])
        wait_for(lambda: endpoint.counters()["dropped_error"] == 1, "it is counted")
        send_all(driver, [frame(1)])
        assert receive_all(driver, 1) == [frame(1)]
        assert endpoint.errors == 1


def test_an_interrupt_is_not_the_endpoint_s_to_swallow() -> None:
    def interrupted() -> Any:
        raise KeyboardInterrupt

    with Misbehaving() as endpoint:
        endpoint.instead = interrupted
        with pytest.raises(KeyboardInterrupt):
            endpoint.service()


@pytest.mark.parametrize("shared", [False, True])
def test_neighbours_are_claimed_all_or_none(shared: bool) -> None:
    """Beside somebody in the same process, and beside one who has the block elsewhere."""
    one, two = object(), object()
    with NullEndpoint(6) as here, NullEndpoint(6, os.dup(here.block.fd) if shared else None) as there:
        other = there if shared else here
        other.start_polling(3, two)
        for queues in (range(6), range(3, 4), range(1, 4), range(3, 6)):
            assert not here.start_polling_all(queues, one)
        assert one not in here.polled_by.values()
        assert here.start_polling_all(range(3), one)
        assert here.start_polling_all(range(4, 6), one)
        assert here.polls_started - here.polls_stopped == len(here.polled_by) == (5 if shared else 6)
        here.stop_polling(1, one)  # by itself
        with pytest.raises(EndpointError):
            other.start_polling(2, two)
        other.start_polling(1, two)
        other.stop_polling(3, two)
        here.start_polling(3, one)


def test_an_endpoint_that_a_loop_polls_gets_no_file_for_another_process() -> None:
    """The file takes the place of its rows, in which the loop writes."""
    owner = object()
    with NullEndpoint(2) as endpoint:
        endpoint.start_polling(0, owner)
        with pytest.raises(EndpointError, match="null: an owner in this process polls it"):
            endpoint.share()
        assert not endpoint.block.shared
        endpoint.stop_polling(0, owner)
        endpoint.share()
        endpoint.start_polling(0, owner)
        endpoint.share()  # it has its file
