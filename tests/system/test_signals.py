"""Signals in a process that calls vnetdp: each is heard wherever it comes, and handlers, report and status stay whole."""

from __future__ import annotations

import importlib
import itertools
import select
import signal
import subprocess
import sys
import threading
import time
import weakref
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

from vnetdp.cli import main
from vnetdp.system import output, signals

TERM, HUP = signal.SIGTERM, signal.SIGHUP


def test_a_command_runs_in_any_thread(capsys: pytest.CaptureFixture[str]) -> None:
    status: list[int] = []
    thread = threading.Thread(target=lambda: status.append(main(["link", "null", "generate:count=10"])))
    thread.start()
    thread.join()
    assert status == [0]
    assert "right to left: 10 frames" in capsys.readouterr().out


def test_handlers_are_put_back() -> None:
    def on_signal(_number: int, _frame: object) -> None: ...

    before = {number: signal.signal(number, on_signal) for number in signals.SIGNALS}
    try:
        with signals.handled() as ending:
            assert signal.getsignal(TERM) == ending.hear
        assert all(signal.getsignal(number) is on_signal for number in signals.SIGNALS)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    assert signal.set_wakeup_fd(-1) == -1


def test_outside_of_its_work_a_signal_raises_and_within_it_asks() -> None:
    with signals.handled() as ending, pytest.raises(signals.Ended):
        signal.raise_signal(TERM)
    with signals.handled() as ending, ending.at_work(lambda: {"done": True}):
        signal.raise_signal(HUP)
        assert ending.asked.is_set()
        assert select.select([ending.asked], [], [], 0)[0]
    assert ending.finish() == {"done": True}


def test_a_signal_that_comes_while_the_report_is_written_leaves_it_and_the_status_whole() -> None:
    written: list[str] = []

    def write(report: dict[str, Any]) -> None:
        signal.raise_signal(TERM)
        written.extend(report)

    for at_work in (True, False):
        with signals.handled() as ending:
            with (ending.at_work if at_work else ending.reporting)(lambda: {"done": True}, write):
                pass
            assert ending.finish() == {"done": True}
            assert not ending.asked.is_set()
    assert written == ["done", "done"]


def test_a_signal_that_comes_while_all_is_closed_leaves_the_report_and_the_status_whole() -> None:
    with signals.handled() as ending:
        with ending.at_work(lambda: {"done": True}):
            pass
        signal.raise_signal(TERM)
        assert ending.finish() == {"done": True}


@pytest.mark.parametrize("error", [signals.Ended(TERM), ValueError()], ids=["a signal", "a defect"])
def test_whatever_breaks_off_the_writing_of_a_file_leaves_no_part_of_it(tmp_path: Path, error: BaseException) -> None:
    with pytest.raises(type(error)), output.whole_file(str(tmp_path / "file")):
        (tmp_path / "file").write_text("a part")
        raise error
    assert not list(tmp_path.iterdir())


def test_a_command_that_is_ended_at_once_leaves_no_part_of_a_file(tmp_path: Path) -> None:
    ending = signals.Ending()
    with output.whole_file(str(tmp_path / "file")):
        (tmp_path / "file").write_text("a part")
        ending.give_up(TERM)
        assert not list(tmp_path.iterdir())
    ending.close()


def test_a_signal_is_heard_wherever_it_interrupts_the_wait_for_it() -> None:
    """The handler runs in between two lines of the main thread's: a lock that these hold is never let go."""
    for moment in itertools.count(1):
        lines = 0

        def trace(_frame: FrameType, _event: str, _arg: object, moment: int = moment) -> Any:
            nonlocal lines
            lines += 1
            if lines == moment:
                signal.raise_signal(TERM)
            return trace

        with signals.handled() as ending, ending.at_work(dict):
            before = sys.gettrace()
            sys.settrace(trace)
            try:
                ending.asked.wait(0.01)
            finally:
                sys.settrace(before)
            assert ending.asked.is_set() == (lines >= moment)
        if lines < moment:
            break
    assert moment > 5


def test_a_signal_waits_until_what_was_begun_is_known() -> None:
    reached: list[str] = []
    with signals.handled(), pytest.raises(signals.Ended), signals.unbroken():
        signal.raise_signal(TERM)
        reached.append("the end of the block")
    assert reached


def test_the_report_is_made_before_what_it_tells_of_is_closed_and_written_once() -> None:
    written: list[dict[str, Any]] = []
    closed = False

    def fail(_report: dict[str, Any]) -> None:
        raise OSError("no room")

    ending = signals.Ending()
    with (
        pytest.raises(ValueError, match="in between"),
        ending.reporting(lambda: {"closed": closed}, fail, written.append),
    ):
        raise ValueError("in between")
    closed = True
    with pytest.raises(OSError, match="no room"):
        ending.finish()
    ending.finish()
    ending.close()
    assert written == [{"closed": False}]


def test_a_signal_that_comes_in_a_callback_is_heard_all_the_same(capfd: pytest.CaptureFixture[str]) -> None:
    """An import ends in one, a set of weak references has many: what is raised there is only printed."""

    class Thing:
        pass

    thing = Thing()
    ref = weakref.ref(thing, lambda _: signal.raise_signal(TERM))
    with pytest.raises(signals.Ended) as ended, signals.handled():
        del thing
        time.sleep(60)
    assert ended.value.number == TERM
    assert ref() is None
    assert "Traceback" not in capfd.readouterr().err


def test_a_signal_that_comes_where_the_interpreter_tells_of_a_lost_exception_is_heard_all_the_same(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What is raised there is lost once more."""

    class Thing:
        def __del__(self) -> None:
            raise ValueError

    told: list[type[BaseException]] = []

    def tell(args: sys.UnraisableHookArgs) -> None:
        told.append(args.exc_type)
        signal.raise_signal(TERM)

    monkeypatch.setattr(sys, "unraisablehook", tell)
    thing = Thing()
    with pytest.raises(signals.Ended), signals.handled():
        del thing
        time.sleep(60)
    assert told == [ValueError]


def _imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, body: str) -> Any:
    """Import a module of that *body*, and return it."""
    (tmp_path / "new_module.py").write_text(f"import signal\nfrom vnetdp.system import signals\n{body}")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "new_module", raising=False)
    return importlib.import_module("new_module")


def test_a_signal_that_comes_in_an_import_is_heard_after_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """C code that imports, as NumPy's and Numba's does, makes an ImportError of whatever is raised there."""
    with pytest.raises(signals.Ended), signals.handled():
        module = _imported(tmp_path, monkeypatch, "signal.raise_signal(signal.SIGTERM)\nwhole = True\n")
        time.sleep(60)
    assert module.whole


def test_a_command_that_runs_as_a_module_is_imported_hears_signals_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    body = """
heard = False
try:
    with signals.handled():
        signal.raise_signal(signal.SIGTERM)
except signals.Ended:
    heard = True
"""
    assert _imported(tmp_path, monkeypatch, body).heard


_COMPILES = """
import signal, time
from numba.core.compiler_lock import global_compiler_lock
from vnetdp.system import signals
with signals.handled(), global_compiler_lock:
    try:
        signal.raise_signal(signal.SIGTERM)
        time.sleep(60)
    except BaseException:
        print("raised")
"""


def test_a_signal_ends_the_process_wherever_a_kernel_is_compiled() -> None:
    """Not only where that is known to take long: an exception in the midst of LLVM's work has crashed it."""
    done = subprocess.run([sys.executable, "-c", _COMPILES], capture_output=True, text=True, timeout=240, check=False)
    assert (done.returncode, done.stdout) == (128 + TERM, ""), done.stderr
