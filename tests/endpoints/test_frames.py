"""A FrameEndpoint sees plain Ethernet frames, sends its own at any time, and its mistakes cost the frame at hand alone."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.endpoints.joined import guest_of, receive_all, send_all
from tests.support.by_hand import frame, wait_equal, wait_for
from vnetdp import ConfigError, FrameEndpoint


class Answering(FrameEndpoint):
    """It answers each frame as *answer* says, and keeps what it received."""

    name = "answering"

    def __init__(self, answer: Callable[[bytes], Any] = lambda _: None, queues: int = 1, limit: int = 4096) -> None:
        super().__init__(queues, limit)
        self.answer = answer
        self.received: list[tuple[bytes, int]] = []

    def frame_received(self, frame: bytes, queue: int) -> Any:
        self.received.append((frame, queue))
        return self.answer(frame)


def _twice(one: bytes) -> Iterator[bytes]:
    yield one
    yield one


@pytest.mark.parametrize(
    ("answer", "times"),
    [(lambda one: one, 1), (bytearray, 1), (lambda one: [one, one], 2), (_twice, 2), (lambda _: [], 0)],
    ids=["bytes", "bytearray", "list", "generator", "none"],
)
def test_a_return_value_is_sent_back(answer: Callable[[bytes], Any], times: int) -> None:
    frames = [frame(n) for n in range(100)]
    with Answering(answer) as endpoint, guest_of(endpoint) as driver:
        send_all(driver, frames)
        assert receive_all(driver, times * len(frames)) == [one for one in frames for _ in range(times)]
        wait_equal(lambda: endpoint.received, [(one, 0) for one in frames])
        assert endpoint.errors == 0


def test_frames_are_sent_from_any_thread_while_the_loop_sleeps() -> None:
    with FrameEndpoint() as endpoint, guest_of(endpoint) as driver:
        threads = [threading.Thread(target=endpoint.send, args=(frame(n),)) for n in range(8)]
        for thread in threads:
            thread.start()
        assert sorted(receive_all(driver, 8)) == sorted(frame(n) for n in range(8))
        for thread in threads:
            thread.join()
        assert endpoint.send(frame(9))
        assert receive_all(driver, 1) == [frame(9)]


def test_a_frame_sent_in_frame_received_goes_the_same_way() -> None:
    with Answering() as endpoint, guest_of(endpoint) as driver:
        endpoint.answer = lambda one: endpoint.send(one) and None
        send_all(driver, [frame(1)])
        assert receive_all(driver, 1) == [frame(1)]


def test_each_queue_has_frames_of_its_own() -> None:
    with Answering(queues=2) as endpoint, guest_of(endpoint) as driver:
        assert endpoint.send(frame(1), 1)
        assert receive_all(driver, 1) == [frame(1)]
        assert driver.send(frame(2), queue=1)
        wait_equal(lambda: endpoint.received, [(frame(2), 1)])


def test_a_frame_above_the_limit_is_refused_and_an_answer_above_it_is_counted() -> None:
    with Answering(limit=2) as endpoint:
        assert [endpoint.send(frame(n)) for n in range(3)] == [True, True, False]
        endpoint.answer = lambda one: one
        endpoint.transmit_frames(0, [bytes(12) + frame(4)])
        assert endpoint.counters()["dropped_error"] == 1
        assert endpoint.errors == 0


def _raises(_: bytes) -> None:
    raise ValueError("no such host")


@pytest.mark.parametrize(
    ("answer", "says"),
    [
        (_raises, "no such host"),
        (lambda _: "text", "frame_received returned str, not bytes, several bytes or None"),
        (lambda _: 7, "frame_received returned int"),
        (lambda one: [one, "text"], "frame_received returned str"),
        (memoryview, "frame_received returned int"),
        (lambda _: exit(), ""),
    ],
    ids=["raises", "str", "int", "list with a str", "memoryview", "exit"],
)
def test_a_mistake_costs_the_frame_at_hand_alone(
    answer: Callable[[bytes], Any], says: str, caplog: pytest.LogCaptureFixture
) -> None:
    with Answering() as endpoint, guest_of(endpoint) as driver:
        endpoint.answer = lambda one: answer(one) if one == frame(1) else one
        send_all(driver, [frame(n) for n in range(4)])
        assert receive_all(driver, 3) == [frame(0), frame(2), frame(3)]
        assert endpoint.errors == endpoint.counters()["dropped_error"] == 1
        assert says in str(endpoint.last_error)
    (record,) = caplog.records
    assert record.getMessage().startswith("answering: ")
    assert "\n" not in record.getMessage()


def test_a_frame_is_bytes_of_a_queue_that_exists() -> None:
    with FrameEndpoint() as endpoint:
        for no_frame in ("text", 7, None, [frame(0)]):
            with pytest.raises(TypeError, match="a frame is bytes, not"):
                endpoint.send(no_frame)  # type: ignore[arg-type]
        for queue in (-1, 1):
            with pytest.raises(ConfigError, match=f"queue pair {queue}: the last one is 0"):
                endpoint.send(frame(0), queue)
        assert endpoint.idle


def test_a_frame_too_short_or_too_long_is_dropped_and_counted() -> None:
    with FrameEndpoint() as endpoint, guest_of(endpoint) as driver:
        for odd in (b"", bytes(13), bytes(70_000)):
            assert endpoint.send(odd)
        assert endpoint.send(frame(0))
        assert receive_all(driver, 1) == [frame(0)]
        wait_for(lambda: endpoint.counters()["dropped_short"] == 2, "short ones are counted")
        assert endpoint.counters()["dropped_long"] == 1


def test_a_frame_sent_after_close_harms_nobody() -> None:
    endpoint = FrameEndpoint()
    endpoint.close()
    endpoint.send(frame(0))
