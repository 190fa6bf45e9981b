"""A datapath run by hand, and `LoopThread`, the thread that runs one and stands still while somebody changes it."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator

import numpy as np
import pytest

from tests.support.by_hand import frame, no_descriptor_leaks, scaled, wait_equal, wait_for
from vnetdp.backends.userspace import UserspaceBackend
from vnetdp.datapath.datapath import Datapath
from vnetdp.datapath.loop_thread import LoopThread
from vnetdp.endpoints.mailbox import MailboxEndpoint
from vnetdp.shared.memory import GuestMemory, Words
from vnetdp.shared.notify import EventFd
from vnetdp.testing import HandRing
from vnetdp.virtio import features as f
from vnetdp.virtio.queue import RECEIVEQ, TRANSMITQ
from vnetdp_kernels import rows as r
from vnetdp_kernels import spec


class Bench:
    """A datapath with one pair bound to a mailbox, and its rings by hand."""

    def __init__(self, num: int = 64) -> None:
        self.memory = GuestMemory.create([(0, 1 << 20)])
        self.receiveq = HandRing(self.memory, 0, num)
        self.transmitq = HandRing(self.memory, self.receiveq.end, num)
        self.endpoint = MailboxEndpoint()
        self.datapath = Datapath(1)
        self.backend = UserspaceBackend(self.datapath, 0)
        self.backend.set_features(f.VIRTIO_F_VERSION_1)
        self.backend.set_memory(self.memory)
        for index, ring in ((RECEIVEQ, self.receiveq), (TRANSMITQ, self.transmitq)):
            self.backend.set_vring_num(index, ring.num)
            self.backend.set_vring_addr(index, ring.desc, ring.avail, ring.used)
            self.backend.set_backend(index, self.endpoint)

    def close(self) -> None:
        for index in (RECEIVEQ, TRANSMITQ):
            self.backend.set_backend(index, None)
        self.datapath.close()
        self.endpoint.close()
        self.memory.close()


@pytest.fixture
def bench() -> Iterator[Bench]:
    with no_descriptor_leaks():
        bench = Bench()
        yield bench
        bench.close()


def test_it_runs_until_there_is_nothing_to_do(bench: Bench) -> None:
    assert bench.datapath.run() == (r.LOOP_IDLE, 0)
    for n in range(40):
        bench.transmitq.send(n, frame(n))
        bench.endpoint.put(frame(n))
    bench.receiveq.post(*range(40))
    assert bench.datapath.run() == (r.LOOP_IDLE, 80)
    assert bench.endpoint.take() == [frame(n) for n in range(40)]
    assert bench.receiveq.taken() == [(n, 12 + 60) for n in range(40)]
    assert bench.memory.read(bench.receiveq.buffer(7) + 12, 60) == frame(7)


def test_a_budget_ends_it_and_the_rest_waits(bench: Bench) -> None:
    for n in range(10):
        bench.transmitq.send(n, frame(n))
    assert bench.datapath.run(0) == (r.LOOP_BUDGET, 0)
    assert bench.datapath.run(3) == (r.LOOP_BUDGET, 3)
    assert bench.endpoint.take() == [frame(n) for n in range(3)], "frames on their way out are not kept back"
    assert bench.datapath.run(7) == (r.LOOP_BUDGET, 7)
    assert bench.datapath.run(7) == (r.LOOP_IDLE, 0)
    assert bench.endpoint.take() == [frame(n) for n in range(3, 10)]


def test_the_bell_ends_a_wait(bench: Bench) -> None:
    bench.datapath.ctl[r.CTL_DOORBELL] = 1
    assert bench.datapath.run(-1, 0, -1) == (r.LOOP_CONTROL, 0)
    bench.datapath.ctl[r.CTL_DOORBELL] = 0
    bench.datapath.bell.signal()
    assert bench.datapath.run(-1, 0, -1) == (r.LOOP_CONTROL, 0)
    bench.datapath.bell.clear()
    assert bench.datapath.run(-1, 0, 1) == (r.LOOP_IDLE, 0)
    assert bench.datapath.run(-1, 10, 1) == (r.LOOP_IDLE, 0)


def test_whoever_never_sleeps_takes_back_that_a_ring_just_bound_asks_for_kicks(bench: Bench) -> None:
    assert (bench.receiveq.used_flags, bench.transmitq.used_flags) == (0, 0)
    bench.datapath.run()
    assert (bench.receiveq.used_flags, bench.transmitq.used_flags) == (0, 0), (
        "one that is stepped is kicked to be stepped"
    )
    bench.datapath.ctl[r.CTL_DOORBELL] = 1
    assert bench.datapath.run(-1, -1, -1) == (r.LOOP_CONTROL, 0)
    no_notify = spec.VIRTQ_USED_F_NO_NOTIFY
    assert (bench.receiveq.used_flags, bench.transmitq.used_flags) == (no_notify, no_notify)


def test_a_broken_queue_ends_it_once(bench: Bench) -> None:
    bench.transmitq.send(0, frame(0))
    bench.transmitq.put_desc(1, 0, 0)
    bench.transmitq.offer(1)
    reason, moved = bench.datapath.run()
    while reason == r.LOOP_PYTHON:
        reason, moved = bench.datapath.run()
    assert (reason, moved) == (r.LOOP_BROKEN, 1)
    assert bench.backend.status(TRANSMITQ) == r.E_ZERO_LEN
    assert bench.endpoint.take() == [frame(0)]
    assert bench.datapath.run() == (r.LOOP_IDLE, 0)


def test_with_nothing_bound_it_leaves_the_endpoint_alone(bench: Bench) -> None:
    for index in (RECEIVEQ, TRANSMITQ):
        bench.backend.set_backend(index, None)
    bench.endpoint.put(frame(0))
    assert bench.datapath.run() == (r.LOOP_IDLE, 0)
    # The frame still waits in the mailbox for whoever polls it next.
    assert list(bench.endpoint.receive_frames(0, 9)) == [bytes(12) + frame(0)]


def test_two_datapaths_share_one_block() -> None:
    with no_descriptor_leaks():
        first = Datapath(2)
        second = Datapath(2, os.dup(first.block.fd))
        first.vqs[3, r.VQ_PACKETS] = 77
        assert second.vqs[3, r.VQ_PACKETS] == 77
        second.ctl[r.CTL_DOORBELL] = 1
        assert first.run() == (r.LOOP_CONTROL, 0)
        second.close()
        first.close()


# --- LoopThread ---


class Counting:
    """Runs nothing but a count; sleeps on its bell as a datapath does."""

    def __init__(self) -> None:
        self.ctl: Words = np.zeros(r.CTL_SLOTS, np.int64)
        self.bell = EventFd()
        self.count = 0
        self.inside = 0
        self.broken = False

    def run(self, budget: int = -1, poll_us: int = 0, timeout_ms: int = 0) -> tuple[int, int]:
        self.inside += 1
        while not self.ctl[r.CTL_DOORBELL]:
            self.count += 1
            if self.broken:
                self.broken = False
                self.inside -= 1
                return r.LOOP_BROKEN, 0
        self.inside -= 1
        return r.LOOP_CONTROL, 0


@pytest.fixture
def counting() -> Iterator[Counting]:
    with no_descriptor_leaks():
        counting = Counting()
        yield counting
        counting.bell.close()


def test_it_stands_still_while_it_is_paused(counting: Counting) -> None:
    loop_thread = LoopThread(counting, "counting")
    loop_thread.start()
    for _ in range(scaled(500, 500)):
        with loop_thread.paused():
            assert counting.inside == 0
            before = counting.count
            with loop_thread.paused(), loop_thread.paused():
                assert counting.inside == 0
            assert counting.inside == 0
            assert counting.count == before
    then = counting.count
    wait_for(lambda: counting.count > then, "it goes on")
    loop_thread.close()
    assert counting.inside == 0
    # Closed, it stands still for good.
    with loop_thread.paused():
        pass
    loop_thread.close()
    counting.bell.close()
    loop_thread.close()


def test_several_threads_may_pause_it(counting: Counting) -> None:
    loop_thread = LoopThread(counting, "counting")
    loop_thread.start()
    wrong: list[int] = []
    holders = [0]

    def pause() -> None:
        for _ in range(200):
            with loop_thread.paused():
                holders[0] += 1
                if counting.inside or holders[0] != 1:
                    wrong.append(holders[0])
                holders[0] -= 1

    threads = [threading.Thread(target=pause) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    loop_thread.close()


class Busy(Counting):
    """Does not come back before it may."""

    def __init__(self) -> None:
        super().__init__()
        self.may_return = threading.Event()

    def run(self, budget: int = -1, poll_us: int = 0, timeout_ms: int = 0) -> tuple[int, int]:
        self.may_return.wait()
        return super().run(budget, poll_us, timeout_ms)


def test_it_goes_on_after_a_pause_that_was_broken_off() -> None:
    busy = Busy()
    loop_thread = LoopThread(busy, "busy")
    loop_thread.start()

    def interrupt_a_pause() -> None:
        wait_for(lambda: bool(busy.ctl[r.CTL_DOORBELL]), "the main thread waits for the other one")
        signal.raise_signal(signal.SIGINT)  # ^C: Python handles it in the main thread

    for _ in range(2):
        thread = threading.Thread(target=interrupt_a_pause)
        thread.start()
        with pytest.raises(KeyboardInterrupt), loop_thread.paused():
            pass
        thread.join()
    busy.may_return.set()
    wait_for(lambda: busy.count > 0, "it goes on")
    for _ in range(3):
        with loop_thread.paused():
            assert busy.inside == 0
        busy.count = 0
        wait_for(lambda: busy.count > 0, "it goes on")
    loop_thread.close()
    busy.bell.close()


def test_it_is_told_of_each_broken_queue(counting: Counting) -> None:
    told: list[str] = []
    loop_thread = LoopThread(counting, "counting")
    loop_thread.start()
    forget = loop_thread.listeners.add(
        lambda: told.append(threading.current_thread().name), lambda: told.append("gone")
    )
    for n in range(3):
        counting.broken = True
        wait_equal(lambda: len(told), n + 1)
    assert told == ["counting"] * 3
    forget()
    forget()
    counting.broken = True
    wait_for(lambda: not counting.broken, "it goes on without")
    loop_thread.close()


class Failing(Counting):
    def __init__(self, error: BaseException) -> None:
        super().__init__()
        self.error = error
        self.may_end = threading.Event()

    def run(self, budget: int = -1, poll_us: int = 0, timeout_ms: int = 0) -> tuple[int, int]:
        self.may_end.wait()
        raise self.error


@pytest.mark.parametrize("error", [RuntimeError("a defect"), SystemExit("enough"), KeyboardInterrupt()])
def test_a_thread_that_dies_stands_still_and_says_so(error: BaseException, caplog: pytest.LogCaptureFixture) -> None:
    gone = threading.Event()
    told: list[str] = []

    def on_gone() -> None:
        # Dying takes its time: the thread is still alive when it will never park again.
        told.append(threading.current_thread().name)
        gone.wait()

    failing = Failing(error)
    loop_thread = LoopThread(failing, "failing")
    loop_thread.start()
    loop_thread.listeners.add(lambda: None, on_gone)
    failing.may_end.set()
    wait_equal(lambda: told, ["failing"])
    for _ in range(3):
        with loop_thread.paused():
            pass
    gone.set()
    loop_thread.close()
    failing.bell.close()
    assert loop_thread.error is error
    assert "failing ended" in caplog.text
