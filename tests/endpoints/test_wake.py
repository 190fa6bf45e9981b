"""An endpoint in Python that calls `wake` is asked for its frames, however deep the loop sleeps, and none is forgotten."""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Sequence

import pytest

from tests.endpoints.joined import guest_of, receive_all
from tests.support.by_hand import frame, wait_equal, wait_for
from vnetdp import ConfigError, Endpoint, EventFd, FaultEndpoint, GenerateEndpoint, NullEndpoint
from vnetdp_kernels import spec

HEADER = bytes(spec.NET_HDR_LEN)


class Source(Endpoint):
    """It has frames for the ring, and says so by `wake` alone."""

    name = "source"

    def __init__(self, queues: int = 1) -> None:
        super().__init__(queues)
        self.frames: deque[bytes] = deque()
        self.asked = 0
        self.fails = 0

    def receive_frames(self, queue: int, limit: int) -> Sequence[bytes]:
        self.asked += 1
        if self.fails:
            self.fails -= 1
            raise OSError(f"failure {self.fails}")
        return [HEADER + self.frames.popleft() for _ in range(min(limit, len(self.frames)))]


def test_a_loop_that_sleeps_asks_once_it_is_woken() -> None:
    with Source() as source, guest_of(source) as driver:
        for n in range(20):
            asleep = source.asked
            source.frames.append(frame(n))
            source.wake()
            assert receive_all(driver, 1) == [frame(n)]
            assert source.asked > asleep


def test_more_frames_than_a_batch_holds_need_one_wake() -> None:
    with Source() as source, guest_of(source) as driver:
        source.frames.extend(frame(n) for n in range(1000))
        source.wake()
        assert receive_all(driver, 1000) == [frame(n) for n in range(1000)]


def test_a_wake_that_met_an_exception_is_not_lost() -> None:
    with Source() as source, guest_of(source) as driver:
        source.fails = 3
        source.frames.append(frame(0))
        source.wake()
        assert receive_all(driver, 1) == [frame(0)]
        assert source.errors == 3
        assert isinstance(source.last_error, OSError)
        assert str(source.last_error) == "failure 0"


def test_no_wake_of_many_threads_is_lost_and_the_loop_sleeps_again() -> None:
    with Source() as source, guest_of(source) as driver:

        def give(first: int) -> None:
            for n in range(first, first + 100):
                source.frames.append(frame(n))
                source.wake()

        threads = [threading.Thread(target=give, args=(1000 * k,)) for k in range(4)]
        for thread in threads:
            thread.start()
        got = receive_all(driver, 400)
        for thread in threads:
            thread.join()
        assert sorted(got) == sorted(frame(1000 * k + n) for k in range(4) for n in range(100))
        # With nothing to give it is asked no more, once the last wake was heard.
        wait_equal(lambda: source._woken, set())
        wait_for(lambda: not source._wakes[0].clear(), "no wake is left")


def test_a_wake_behind_a_faulty_wire_is_heard() -> None:
    with Source() as source, FaultEndpoint(source) as wire, guest_of(wire) as driver:
        for n in range(5):
            source.frames.append(frame(n))
            source.wake()
            assert receive_all(driver, 1) == [frame(n)]


def test_an_endpoint_that_is_closed_hears_no_wake() -> None:
    source = Source()
    source.close()
    source.wake()


def test_an_endpoint_has_no_error_before_its_first() -> None:
    with Source() as source:
        assert source.last_error is None


def test_a_wake_that_no_loop_can_hear_is_refused() -> None:
    with Source(2) as source, EventFd() as event:
        for queue in (-1, 2):
            with pytest.raises(ConfigError, match=f"queue pair {queue}: the last one is 1"):
                source.wake(queue)
        source.fds[1] = event.fd
        source.wake(0)
        with pytest.raises(ConfigError, match="queue 1 has another descriptor in fds"):
            source.wake(1)
    for endpoint in (GenerateEndpoint(), NullEndpoint(), Endpoint()):
        with endpoint, pytest.raises(ConfigError, match="no receive_frames of its own"):
            endpoint.wake()


def test_a_descriptor_of_the_endpoint_s_own_still_wakes_the_loop() -> None:
    class Piped(Source):
        def __init__(self) -> None:
            super().__init__()
            self.ends = os.pipe()
            os.set_blocking(self.ends[0], False)
            self.fds[0] = self.ends[0]

        def receive_frames(self, queue: int, limit: int) -> Sequence[bytes]:
            try:
                os.read(self.ends[0], 1)
            except BlockingIOError:
                return ()
            return super().receive_frames(queue, limit)

        def close(self) -> None:
            super().close()
            for fd in self.ends:
                os.close(fd)

    with Piped() as piped, guest_of(piped) as driver:
        piped.frames.append(frame(7))
        os.write(piped.ends[1], b"!")
        assert receive_all(driver, 1) == [frame(7)]
