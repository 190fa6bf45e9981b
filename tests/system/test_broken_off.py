"""^C at each step of starting and of ending a worker: nothing that its thread runs is closed before the thread has ended."""

from __future__ import annotations

import gc
import os
import signal
import sys
import threading
from collections.abc import Callable
from contextlib import ExitStack, suppress
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

from tests.support.by_hand import CAMPAIGN, no_descriptor_leaks, wait_for
from vnetdp import Driver, NetDevice
from vnetdp.backends.worker import Worker
from vnetdp.datapath.datapath import Datapath
from vnetdp.datapath.loop_thread import LoopThread
from vnetdp.endpoints.loopback import NullEndpoint
from vnetdp.guest.driver import memory_for
from vnetdp.system import signals
from vnetdp.system.listener import Listener

_EVENTS = ("call", "line", "return")
_PLACES = (f"{os.sep}vnetdp{os.sep}", f"{os.sep}contextlib.py")
_EVERY = 1 if CAMPAIGN else 3  # which steps are tried


class BreakOff:
    """Raises KeyboardInterrupt at step *n* of `run`: a call, a line or a return. came: whether it had so many steps."""

    def __init__(self, n: int) -> None:
        self.came = False
        self._left = n

    def _trace(self, frame: FrameType, event: str, _arg: Any) -> Callable[..., Any] | None:
        if not any(place in frame.f_code.co_filename for place in _PLACES):
            return None  # broken off in its midst, threading itself is left in disorder
        if event in _EVENTS:
            self._left -= 1
            if self._left < 0:
                self.came = True
                sys.settrace(None)
                raise KeyboardInterrupt
        return self._trace

    def run(self, call: Callable[[], object]) -> None:
        before = sys.gettrace()
        # The collector may run other objects' finalizers at any step. They are no steps of the call; and where one is broken
        # off while a frame is made to be traced, the interpreter calls the trace function that was freed meanwhile.
        gc.disable()
        sys.settrace(self._trace)
        try:
            call()
        except KeyboardInterrupt:
            assert self.came
        finally:
            sys.settrace(before)
            gc.enable()


def _threads() -> set[threading.Thread]:
    return {thread for thread in threading.enumerate() if thread.name == "broken off" and thread.is_alive()}


def _end(loop_thread: LoopThread) -> None:
    """End what a broken-off close, or start, has left."""
    with suppress(Exception):
        loop_thread.close()


def _make(breaks: BreakOff) -> None:
    """A worker that is made: what its constructor had when it was broken off, it closes."""
    made: list[Worker] = []
    init = Worker.__init__

    def noted(self: Worker, *args: Any, **kwargs: Any) -> None:
        made.append(self)
        init(self, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Worker, "__init__", noted)
        breaks.run(lambda: Worker(1, name="broken off"))
    for worker in made:  # broken off behind the last step, it is complete
        if hasattr(worker, "loop_thread"):
            _end(worker.loop_thread)


def _close(breaks: BreakOff) -> None:
    """A worker's parts that are closed one after the other, whatever becomes of the first."""
    stack = ExitStack()
    datapath = Datapath(1)
    stack.callback(datapath.close)
    loop_thread = LoopThread(datapath, "broken off", 0, None, datapath.abandon)
    stack.callback(loop_thread.close)
    loop_thread.start()
    with loop_thread.paused():
        pass
    breaks.run(stack.close)
    _end(loop_thread)


@pytest.mark.parametrize("what", [_make, _close])
def test_a_thread_is_ended_before_what_it_runs_is_closed(
    what: Callable[[BreakOff], None], caplog: pytest.LogCaptureFixture
) -> None:
    for n in range(0, 100_000, _EVERY):
        breaks = BreakOff(n)
        what(breaks)
        wait_for(lambda: not _threads(), f"its thread has ended, broken off at step {n}")
        assert not caplog.records, f"step {n}: {caplog.text}"
        if not breaks.came:
            break
    assert n > 50


def test_a_signal_while_a_socket_file_is_removed_leaves_none(tmp_path: Path) -> None:
    path = tmp_path / "socket"
    for n in range(1000):
        breaks = BreakOff(n)
        listener = Listener(str(path), 1)
        breaks.run(listener.close)
        with signals.handled() as ending:
            ending.give_up(signal.SIGTERM)  # as a command that was broken off does
        assert not path.exists(), f"broken off at step {n}"
        if not breaks.came:
            break
    assert 5 < n < 999


@pytest.mark.parametrize("begun", [False, True])
def test_a_start_of_a_thread_that_is_broken_off_leaves_none_behind(
    begun: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    start = threading.Thread.start

    def broken_off(thread: threading.Thread) -> None:
        if begun:
            start(thread)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", broken_off)
        with pytest.raises(KeyboardInterrupt), no_descriptor_leaks():
            Worker(1, name="broken off")
    wait_for(lambda: not _threads(), "its thread has ended")
    assert not caplog.records


def test_a_driver_that_got_no_thread_may_be_started_again(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_more(_thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with (
        memory_for() as memory,
        NullEndpoint() as wire,
        NetDevice(memory, wire) as device,
        Driver(device, memory) as guest,
    ):
        with monkeypatch.context() as patch:
            patch.setattr(threading.Thread, "start", no_more)
            with pytest.raises(OSError, match="guest-driver"):
                guest.start()
        guest.start()
        assert guest.native_id
