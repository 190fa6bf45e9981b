"""The loops: why they return, that they sleep when there is nothing to do, and that they are always woken."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator

import pytest

from tests.kernels.rig import WRITE, Rig, pattern
from vnetdp_kernels import rows as r
from vnetdp_kernels import spec
from vnetdp_kernels.loops import wait
from vnetdp_kernels.virtq import split_driver

HEADER = bytes(spec.NET_HDR_LEN)
FRAME = HEADER + pattern(1)
PATIENCE = 60  # seconds before a test gives up on something that should happen at once

Loop = Callable[..., tuple[int, int]]


class Running:
    """A loop in a thread of its own."""

    def __init__(self, loop: Loop, *args: Rig | int) -> None:
        self.outcome: tuple[int, int] | None = None
        self.thread = threading.Thread(target=self._run, args=(loop, args), daemon=True)
        self.thread.start()

    def _run(self, loop: Loop, args: tuple[Rig | int, ...]) -> None:
        self.outcome = loop(*args)

    def join(self) -> tuple[int, int]:
        self.thread.join(PATIENCE)
        assert self.outcome is not None, "the loop does not return"
        return self.outcome


def wait_until(true: Callable[[], bool], what: str) -> None:
    end = time.monotonic() + PATIENCE
    while not true():
        assert time.monotonic() < end, what
        time.sleep(0.001)


@pytest.fixture
def rigs() -> Iterator[Callable[..., Rig]]:
    """Make rigs whose descriptors are closed, and whose loops are called back, when the test is over."""
    made: list[Rig] = []

    def make(*args: int, **kwargs: int) -> Rig:
        rig = Rig(*args, **kwargs)  # type: ignore[arg-type]
        rig.open_eventfds()
        made.append(rig)
        return rig

    yield make
    for rig in made:
        rig.device.ring_doorbell()
        rig.guest.ring_doorbell()
        rig.close()


Make = Callable[..., Rig]
GENERATE = {"device": r.KIND_GENERATE, "guest": r.KIND_GENERATE}


# --- why a loop returns ---


@pytest.mark.parametrize("loop", [Rig.serve, Rig.drive])
def test_doorbell(rigs: Make, loop: Loop) -> None:
    """It ends a loop after one pass: a thread that is halted again and again still moves something each time."""
    rig = rigs(512, buf_len=128, **GENERATE)
    rig.device.ctl[r.CTL_DOORBELL] = rig.guest.ctl[r.CTL_DOORBELL] = 1
    rig.post_receive()
    reason, moved = loop(rig, -1)
    assert reason == r.LOOP_CONTROL
    assert 0 < moved <= 2 * wait.BATCH


@pytest.mark.parametrize("budget", [0, 1, wait.BATCH - 1, wait.BATCH, wait.BATCH + 1, 300])
@pytest.mark.parametrize("pairs", [1, 2])
def test_budget(rigs: Make, pairs: int, budget: int) -> None:
    """A loop moves as many frames as it may, and not one more."""
    rig = rigs(512, pairs, buf_len=128, **GENERATE)
    for pair in range(pairs):
        rig.post_receive(pair)
    assert rig.drive(budget) == (r.LOOP_BUDGET, budget)
    assert rig.dvqs[:, r.DVQ_PACKETS].sum() == budget
    assert rig.serve(budget) == (r.LOOP_BUDGET, budget)
    assert rig.vqs[:, r.VQ_PACKETS].sum() == budget


def test_each_pair_has_its_turn(rigs: Make) -> None:
    """No pair waits until another has nothing left: after a batch of one comes a batch of the next."""
    rig = rigs(512, 3, buf_len=128, **GENERATE)
    for pair in range(3):
        rig.post_receive(pair)
    rig.drive(3 * wait.BATCH)
    assert rig.dvqs[1::2, r.DVQ_PACKETS].tolist() == [wait.BATCH] * 3
    rig.serve(6 * wait.BATCH)
    assert rig.vqs[:, r.VQ_PACKETS].tolist() == [wait.BATCH] * 6


@pytest.mark.parametrize("loop", [Rig.serve, Rig.drive])
def test_nothing_to_do(rigs: Make, loop: Loop) -> None:
    rig = rigs(16)
    assert loop(rig, -1, 0, 0) == (r.LOOP_IDLE, 0)
    assert loop(rig, -1, -1, 0) == (r.LOOP_IDLE, 0), "not even polled for, if it may not wait"
    assert rig.device.ctl[r.CTL_SLEEPS] == rig.guest.ctl[r.CTL_SLEEPS] == 0


@pytest.mark.parametrize("poll_us", [0, 100])
@pytest.mark.parametrize("loop", [Rig.serve, Rig.drive])
def test_timeout(rigs: Make, loop: Loop, poll_us: int) -> None:
    rig = rigs(16)
    assert loop(rig, -1, poll_us, 2) == (r.LOOP_IDLE, 0)
    assert rig.device.ctl[r.CTL_SLEEPS] + rig.guest.ctl[r.CTL_SLEEPS] == 1


@pytest.mark.parametrize("loop", [Rig.serve, Rig.drive])
def test_a_readable_control_descriptor(rigs: Make, loop: Loop) -> None:
    """It brings a loop back out of its sleep without a doorbell too."""
    rig = rigs(16)
    for side in (rig.device, rig.guest):
        os.eventfd_write(side.ctl_fd, 1)
    assert Running(loop, rig, -1, 0, -1).join() == (r.LOOP_CONTROL, 0)


@pytest.mark.parametrize("poll_us", [0, -1])
@pytest.mark.parametrize("loop", [Rig.serve, Rig.drive])
def test_doorbell_out_of_sleep(rigs: Make, loop: Loop, poll_us: int) -> None:
    rig = rigs(16, device=r.KIND_NULL, guest=r.KIND_NULL)
    side = rig.device if loop is Rig.serve else rig.guest
    running = Running(loop, rig, -1, poll_us, -1)
    if poll_us == 0:
        wait_until(lambda: bool(side.ctl[r.CTL_SLEEPS]), "the loop does not sleep")
    side.ring_doorbell()
    assert running.join() == (r.LOOP_CONTROL, 0)


@pytest.mark.parametrize("loop", [Rig.serve, Rig.drive])
def test_polling_for_ever_leaves_python_its_turn(rigs: Make, loop: Loop) -> None:
    """Only an endpoint in Python knows whether it has more: a loop that never sleeps asks it."""
    assert Running(loop, rigs(16), -1, -1, -1).join() == (r.LOOP_PYTHON, 0)


def test_nothing_bound_is_nothing_to_poll_for(rigs: Make) -> None:
    """While all its queues belong to another owner, a loop sleeps, however it is told to wait for frames."""
    rig = rigs(16, device=r.KIND_GENERATE)
    rig.vqs[:, r.VQ_BOUND] = 0
    running = Running(rig.serve, -1, -1, -1)
    wait_until(lambda: bool(rig.device.ctl[r.CTL_SLEEPS]), "the loop does not sleep")
    rig.device.ring_doorbell()
    assert running.join() == (r.LOOP_CONTROL, 0)


# --- sleeping and waking ---


@pytest.mark.parametrize("event_idx", [False, True])
@pytest.mark.parametrize("device", [r.KIND_NULL, r.KIND_ECHO, r.KIND_GENERATE])
def test_a_kick_wakes_the_device(rigs: Make, device: int, event_idx: bool) -> None:
    """Asleep, it has asked for kicks; one is due, and it moves the frame and sleeps again."""
    rig = rigs(16, device=device, event_idx=event_idx)
    rig.device.eps[0, r.EP_LIMIT] = 0
    rig.post_receive()
    running = Running(rig.serve, -1, 0, -1)
    for k in range(1, 40):
        wait_until(lambda: rig.device.ctl[r.CTL_SLEEPS] > 0, "the device does not sleep")
        sleeps = int(rig.device.ctl[r.CTL_SLEEPS])
        rig.guest.feed(FRAME)
        assert rig.send() == 1
        assert split_driver.needs_kick(rig.memory.mem, rig.tx.dvq)
        os.eventfd_write(int(rig.notify[1, 0]), 1)
        wait_until(lambda k=k: rig.tx.used_idx == k, "the frame was not taken")  # type: ignore[misc]
        rig.receive()
        rig.guest.collect()
        wait_until(
            lambda sleeps=sleeps: rig.device.ctl[r.CTL_SLEEPS] > sleeps,  # type: ignore[misc]
            "the device does not sleep again",
        )
    rig.device.ring_doorbell()
    assert running.join() == (r.LOOP_CONTROL, 39)
    assert rig.tx.vq[r.VQ_KICKS] == 39


@pytest.mark.parametrize("event_idx", [False, True])
def test_a_call_wakes_the_driver(rigs: Make, event_idx: bool) -> None:
    rig = rigs(16, event_idx=event_idx, guest=r.KIND_NULL)
    rig.post_receive()
    running = Running(rig.drive, -1, 0, -1)
    for k in range(1, 40):
        wait_until(lambda: rig.guest.ctl[r.CTL_SLEEPS] > 0, "the driver does not sleep")
        sleeps = int(rig.guest.ctl[r.CTL_SLEEPS])
        rig.device.feed(FRAME)
        assert rig.serve() == (r.LOOP_IDLE, 1)
        assert rig.rx.vq[r.VQ_CALLS] == k
        wait_until(
            lambda sleeps=sleeps: rig.guest.ctl[r.CTL_SLEEPS] > sleeps,  # type: ignore[misc]
            "the driver does not sleep again",
        )
    rig.guest.ring_doorbell()
    assert running.join() == (r.LOOP_CONTROL, 39)
    assert rig.rx.dvq[r.DVQ_CALLS] == 39


def test_a_driver_out_of_descriptors_waits_for_the_transmitq(rigs: Make) -> None:
    """With the transmitq full it asks for calls there too; when they come it sends the rest."""
    rig = rigs(4, guest=r.KIND_GENERATE, device=r.KIND_NULL)
    rig.guest.eps[0, r.EP_LIMIT] = 10
    running = Running(rig.drive, -1, 0, -1)
    for sent in (4, 8, 10):
        wait_until(lambda sent=sent: rig.tx.avail_idx >= sent, "the driver does not send")  # type: ignore[misc]
        wait_until(lambda: rig.guest.ctl[r.CTL_SLEEPS] > 0, "the driver does not sleep")
        rig.serve()
    rig.guest.ring_doorbell()
    assert running.join() == (r.LOOP_CONTROL, 10)


@pytest.mark.parametrize("kind", [r.KIND_ECHO, r.KIND_MACSWAP, r.KIND_REFLECT])
@pytest.mark.parametrize("what", ["more buffers came", "more frames came", "nothing left to send"])
def test_an_endpoint_that_answers_sleeps(rigs: Make, kind: int, what: str) -> None:
    """Whatever the guest put on one ring while the other is empty, the device sleeps until it can go on."""
    rig = rigs(16, device=kind, mergeable=False)
    gpa = rig.memory.low(72)
    rig.memory.write(gpa, FRAME)
    for k in range(16):
        rig.rx.desc(k, gpa, 72, WRITE)
        rig.tx.desc(k, gpa, 72)
    rig.rx.offer(*range(3))
    rig.tx.offer(*range(2 if what != "more frames came" else 5))
    rig.serve()
    if what == "more buffers came":
        rig.rx.offer(3, 4)
    elif what == "more frames came":
        rig.tx.offer(5, 6)
    running = Running(rig.serve, -1, 0, -1)
    wait_until(lambda: rig.device.ctl[r.CTL_SLEEPS] > 0, "the device does not sleep")
    before = int(rig.device.ctl[r.CTL_SLEEPS])
    rig.rx.offer(*range(5, 11))
    rig.tx.offer(0)
    for fd in rig.notify[:, 0].tolist():
        os.eventfd_write(fd, 1)
    total = 3 if what != "more frames came" else 8
    wait_until(lambda: rig.tx.used_idx == total, "the device does not go on")
    wait_until(lambda: rig.device.ctl[r.CTL_SLEEPS] > before, "the device does not sleep again")
    rig.device.ring_doorbell()
    assert running.join()[0] == r.LOOP_CONTROL


def test_a_driver_without_kicks_is_looked_at(rigs: Make) -> None:
    """No kick descriptor (vhost-user allows it): the device polls, slowly, and finds the frames."""
    rig = rigs(16, device=r.KIND_NULL)
    rig.notify[:] = -1
    running = Running(rig.serve, -1, 0, -1)
    wait_until(lambda: rig.device.ctl[r.CTL_SLEEPS] > 2, "the device does not look again")
    rig.guest.feed(FRAME)
    assert rig.send() == 1
    wait_until(lambda: rig.tx.used_idx == 1, "the frame was not taken")
    rig.device.ring_doorbell()
    assert running.join() == (r.LOOP_CONTROL, 1)


# --- queues that are not served ---


def test_an_unbound_queue_is_not_touched(rigs: Make) -> None:
    rig = rigs(16, **GENERATE)
    rig.post_receive()
    rig.drive(8)
    for bound, moved in (((0, 0), 0), ((0, 1), 8), ((1, 0), 16)):
        rig.vqs[:, r.VQ_BOUND] = bound
        before = [queue.used_idx for queue in rig.queues]
        assert rig.serve(100)[1] == moved
        after = [queue.used_idx for queue in rig.queues]
        assert [b - a for a, b in zip(before, after, strict=True)] == [moved * bound[0], moved * bound[1]]


def test_a_broken_pair_lets_the_others_live(rigs: Make) -> None:
    """The loop returns once for each queue that breaks, then goes on with what is left."""
    rig = rigs(16, 3, **GENERATE)
    for pair in range(3):
        rig.post_receive(pair)
    rig.guest.eps[:, r.EP_LIMIT] = 1
    assert rig.drive() == (r.LOOP_IDLE, 3)
    rig.queues[1].avail_idx += 100
    rig.queues[4].avail_idx += 100
    outcomes = [rig.serve(200) for _ in range(3)]
    assert [outcome for outcome, _ in outcomes] == [r.LOOP_BROKEN, r.LOOP_BROKEN, r.LOOP_IDLE]
    assert rig.vqs[:, r.VQ_STATUS].tolist() == [0, r.E_AVAIL_IDX, 0, 0, r.E_AVAIL_IDX, 0]
    assert rig.vqs[[2, 3, 5], r.VQ_PACKETS].tolist() == [16, 1, 1]


# --- endpoints in Python ---


def test_python_takes_what_goes_out(rigs: Make) -> None:
    """The loop returns as soon as a pass has left frames in the slots; full slots hold the transmitq up."""
    rig = rigs(16, slots=4)
    rig.guest.feed(*[FRAME] * 4)
    assert rig.drive() == (r.LOOP_IDLE, 4)
    rig.guest.feed(*[FRAME] * 3)
    assert rig.drive() == (r.LOOP_IDLE, 3)
    assert rig.serve() == (r.LOOP_PYTHON, 4)
    assert rig.serve() == (r.LOOP_PYTHON, 0)
    assert rig.device.collect() == [FRAME] * 4
    assert rig.serve() == (r.LOOP_PYTHON, 3)
    assert rig.device.collect() == [FRAME] * 3
    assert rig.serve() == (r.LOOP_IDLE, 0)


def test_python_takes_what_the_guest_received(rigs: Make) -> None:
    rig = rigs(16, slots=4)
    rig.post_receive()
    for _ in range(2):
        rig.device.feed(*[FRAME] * 3)
        assert rig.serve() == (r.LOOP_IDLE, 3)
    assert rig.drive() == (r.LOOP_PYTHON, 4)
    assert rig.drive() == (r.LOOP_PYTHON, 0)
    assert rig.guest.collect() == [FRAME] * 4
    assert rig.drive() == (r.LOOP_PYTHON, 2)
    assert rig.guest.collect() == [FRAME] * 2


@pytest.mark.parametrize("loop", [Rig.serve, Rig.drive])
def test_python_has_something_to_read(rigs: Make, loop: Loop) -> None:
    """Its descriptor wakes the loop, which leaves the reading to Python."""
    rig = rigs(16)
    rig.post_receive()
    side = rig.device if loop is Rig.serve else rig.guest
    fd = os.eventfd(0, os.EFD_NONBLOCK)
    side.fds[0] = fd
    running = Running(loop, rig, -1, 0, -1)
    wait_until(lambda: side.ctl[r.CTL_SLEEPS] > 0, "the loop does not sleep")
    os.eventfd_write(fd, 1)
    assert running.join() == (r.LOOP_PYTHON, 0)
    assert os.eventfd_read(fd) == 1
    os.close(fd)


def test_frames_of_a_batch_that_is_all_dropped_hold_nothing_up(rigs: Make) -> None:
    """Python's slots hold more frames than a turn: those behind a whole turn of useless ones are still seen."""
    rig = rigs(16, slots=wait.BATCH + 10, mergeable=False)
    rig.rx.desc(0, rig.memory.low(72), 72, WRITE)
    rig.rx.offer(0)
    rig.device.feed(*[FRAME + bytes(100)] * (wait.BATCH + 5), FRAME)
    running = Running(rig.serve, -1, 0, -1)
    wait_until(lambda: rig.rx.used_idx == 1, "the last frame is not delivered")
    rig.device.ring_doorbell()
    running.join()
