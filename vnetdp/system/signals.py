"""How a signal ends a command: the first SIGINT, SIGTERM or SIGHUP asks it to end, the second ends it at once.

A command at work looks at `Ending.asked`. Anywhere else the first signal raises `Ended`, which gets the main thread out of
any system call and any lock. A thread counts the signals, and ends the process if the main thread hears nothing: it may be
in compiled code, or wait for a thread that never ends.
"""

from __future__ import annotations

import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
Report = dict[str, Any]
Writer = Callable[[Report], None]

_removals: list[Callable[[], None]] = []
_ends = threading.Event()  # the process is being ended, while the main thread goes on
_unbroken: list[int] = []  # for each block of the main thread: 0, or the signal that it put off

_TOGETHER_S = 0.25  # signals so close behind the first ask nothing more for 10 s: timeout(1) sends each twice
_DEAF_S = 2.0  # the main thread handles no signal: it is in compiled code
_UNWIND_S = 10.0  # for closing all that is open
_TIDY_S = 2.0  # for socket files and the report, at an end without closing
_TICK_S = 0.05
_IMPORTLIB = "<frozen importlib._bootstrap>"


class Ended(KeyboardInterrupt):
    """A signal ended the command before its work was done."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number


class Asked:
    """Whether a command at work was asked to end. A handler sets it, so there is no lock: the main thread might hold it."""

    def __init__(self) -> None:
        self._fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._set = False

    def fileno(self) -> int:
        """Return a descriptor that is readable once it is set."""
        return self._fd

    def is_set(self) -> bool:
        return self._set

    def set(self) -> None:
        self._set = True
        os.eventfd_write(self._fd, 1)

    def wait(self, timeout_s: float) -> bool:
        """Wait until it is set, for *timeout_s* seconds at most; return whether it is."""
        _readable(self._fd, timeout_s)
        return self._set

    def close(self) -> None:
        os.close(self._fd)


class Ending:
    """A command's request to end, report and clean-up, so that a signal can end it. `handled` makes it."""

    def __init__(self) -> None:
        self.asked = Asked()
        self.number = 0  # of the first signal
        self.over = False
        self.writers: list[Writer] = []
        self._at_work = False
        self._done = False
        self._compiling = False
        self._imports = _imports(sys._getframe())  # another program may run us as it is imported
        self._hook = sys.unraisablehook
        self._sending = threading.Lock()  # held while a signal is sent again
        self._lock = threading.Lock()  # the report is made once, and written once
        self._make: Callable[[], Report] = dict
        self._report: Report | None = None
        self._written = False

    @contextmanager
    def at_work(self, make: Callable[[], Report], *writers: Writer) -> Iterator[None]:
        """Have the first signal set `asked` within the block, and raise nothing; the rest as `reporting`.

        Once the block has ended the work is done: a signal that comes first then leaves 10 s to close and report all.
        """
        with self.reporting(make, *writers):
            self._at_work = True
            try:
                yield
                self._done = True
            finally:
                self._at_work = False

    @contextmanager
    def compiling(self) -> Iterator[None]:
        """Have the first signal end the process within the block: LLVM takes 20 s and more, and runs no Python."""
        self._compiling = True
        try:
            yield
        finally:
            self._compiling = False

    @contextmanager
    def reporting(self, make: Callable[[], Report], *writers: Writer) -> Iterator[None]:
        """Have *make* return the report: when the block ends, in any way, or when the process is ended at once.

        *writers*: functions that write it, beside `writers`.
        """
        self.writers += writers
        self._make = make
        try:
            yield
        finally:
            self._made()

    def finish(self, complete: Callable[[Report], None] = lambda _: None) -> Report:
        """Have the report written by every writer, one after the other, unless that was done; return it.

        complete: adds to the report the entries that came up since it was made.
        """
        report = self._made()
        self._done = True
        with self._lock, ExitStack() as each:  # a writer that fails does not keep the others from writing
            if not self._written:
                self._written = True
                complete(report)
                for write in reversed(self.writers):
                    each.callback(write, report)
        return report

    def give_up(self, number: int) -> int:
        """Run the removals, and write the report, of a command that signal *number* ended; return the exit status."""
        for remove in tuple(_removals):
            with suppress(Exception):
                remove()
        self._made().setdefault("ended_by", signal.Signals(number).name)
        self.finish()
        return 128 + number

    def _made(self) -> Report:
        with self._lock:
            if self._report is None:
                self._report = self._make()
            return self._report

    def hear(self, number: int, frame: FrameType | None) -> None:
        """Handle the first signal, in the main thread; `count` handles the signals that follow."""
        if self.number or self.over:
            return
        # An exception would be lost in the hook, and C code that imports makes an ImportError of it: the signal comes again.
        quiet = self._at_work or self._done
        if _runs(Ending.unraisable.__code__, frame) or (not quiet and _imports(frame) > self._imports):
            return
        self.number = number
        if not quiet:
            if self._compiling or _numba_works():
                self._compiling = True  # `count` ends the process
                return
            if _unbroken:
                _unbroken[-1] = number
                return
            raise Ended(number)
        if self._at_work:
            self.asked.set()

    def unraisable(self, args: sys.UnraisableHookArgs) -> None:
        """Be `sys.unraisablehook`: if `Ended` was lost, in a weak reference's callback or a finalizer, it comes again."""
        if isinstance(args.exc_value, Ended):
            self.number = 0
        else:
            self._hook(args)

    def count(self, pipe: int) -> None:
        """Count the signals, whose numbers come through *pipe*, until it is closed; end the process if that is needed."""
        numbers = b""
        began = 0.0
        second = False  # a signal came that is not of the first request
        again = 0  # the number of coming signals that we sent
        while True:
            if _readable(pipe, _TICK_S if numbers else None):
                came = os.read(pipe, 64)
                if not came:
                    return
                came = bytes(number for number in came if number in SIGNALS)
                ours = min(again, len(came))
                again -= ours
                if len(came) > ours:
                    now = time.monotonic()
                    began = began if numbers else now
                    second = second or now - began >= _TOGETHER_S
                    numbers += came[ours:]
            elif self._send_again(numbers[0]):
                again += 1
            passed_s = time.monotonic() - began
            if numbers and self._must_end(second or (len(numbers) > 1 and passed_s >= _UNWIND_S), passed_s):
                self._end(numbers[-1])

    def _send_again(self, number: int) -> bool:
        """Send a signal that the main thread has not heard to it again; return whether that was needed.

        It was about to enter a system call when the signal came, or could not let an exception through.
        """
        with self._sending:
            if self.number or self.over:
                return False
            signal.pthread_kill(threading.main_thread().ident or 0, number)
            return True

    def _must_end(self, second: bool, passed_s: float) -> bool:
        """Return whether to end at once, *passed_s* after the first signal. second: it was followed by another request."""
        if self._compiling or (_numba_works() and not self._at_work):
            return True
        if second:
            return True
        return not self._at_work and not self.asked.is_set() and passed_s >= (_UNWIND_S if self.number else _DEAF_S)

    def _end(self, number: int) -> None:
        """End the process, after at most 2 s of tidying up."""
        _ends.set()
        tidy = threading.Thread(target=self._tidy, args=(number,), name="tidy", daemon=True)
        with suppress(RuntimeError):  # no thread can be started
            tidy.start()
            tidy.join(_TIDY_S)
        os._exit(128 + number)

    def _tidy(self, number: int) -> None:
        for pid in _children():
            with suppress(OSError):
                os.kill(pid, signal.SIGTERM)
                os.kill(pid, signal.SIGCONT)  # a child that was stopped gets the SIGTERM now
        with suppress(Exception):
            self.give_up(number)
            sys.stdout.flush()

    def close(self) -> None:
        self.asked.close()


def _readable(fd: int, timeout_s: float | None) -> bool:
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    return bool(poll.poll(None if timeout_s is None else timeout_s * 1000))


def _runs(code: CodeType, frame: FrameType | None) -> bool:
    """Return whether *frame* is of *code*, or was called from there."""
    while frame is not None and frame.f_code is not code:
        frame = frame.f_back
    return frame is not None


def _imports(frame: FrameType | None) -> int:
    """Return how many calls of the import system *frame* is in."""
    count = 0
    while frame is not None:
        count += frame.f_code.co_filename == _IMPORTLIB
        frame = frame.f_back
    return count


def _numba_works() -> bool:
    """Return whether something is compiled, or loaded: an exception that is raised then gets lost in LLVM, or crashes it."""
    lock = sys.modules.get("numba.core.compiler_lock")
    return lock is not None and bool(lock.global_compiler_lock.is_locked())


def _children() -> list[int]:
    """Return the processes that this one started, and that are still there."""
    found: list[int] = []
    for task in Path("/proc/self/task").glob("*/children"):
        with suppress(OSError):
            found += map(int, task.read_text().split())
    return found


def at_end(remove: Callable[[], None]) -> None:
    """Have *remove* called if a signal ends the command before `no_more_at_end`: files and namespaces outlive a process."""
    _removals.append(remove)
    if _main_thread_is_over():
        remove()
        threading.Event().wait()


def no_more_at_end(remove: Callable[[], None]) -> None:
    """Take back an `at_end`."""
    with suppress(ValueError):
        _removals.remove(remove)
    if _main_thread_is_over():
        threading.Event().wait()


def _main_thread_is_over() -> bool:
    """Return whether this is the main thread, while another one ends the process: removed files are missing here."""
    return _ends.is_set() and threading.current_thread() is threading.main_thread()


@contextmanager
def unbroken() -> Iterator[None]:
    """Have no signal raise `Ended` within the block, but after it: a file made there has to be known to `at_end`."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    _unbroken.append(0)
    try:
        yield
    finally:
        number = _unbroken.pop()
    if number and _unbroken:
        _unbroken[-1] = number
    elif number:
        raise Ended(number)


@contextmanager
def handled(program: bool = False) -> Iterator[Ending]:
    """Handle signals for the length of the block, if it runs in the main thread: elsewhere none can be handled.

    program: nothing of it goes on after the block, so a later ^C just ends the process.
    """
    ending = Ending()
    try:
        if threading.current_thread() is not threading.main_thread():
            yield ending
            return
        pipe, signals = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        counter = threading.Thread(target=ending.count, args=(pipe,), name="signals", daemon=True)
        counter.start()
        wakeup = signal.set_wakeup_fd(signals, warn_on_full_buffer=False)
        before = {number: signal.getsignal(number) for number in SIGNALS}
        if before[signal.SIGHUP] is signal.SIG_IGN:
            del before[signal.SIGHUP]  # nohup
        before = {number: handler for number, handler in before.items() if handler is not None}  # None: C's, not ours
        hook = sys.unraisablehook
        try:
            sys.unraisablehook = ending.unraisable
            for number in before:
                signal.signal(number, ending.hear)
            yield ending
        finally:
            ending.over = True
            with ending._sending:
                pass  # no signal is sent again from here on, so none meets the handlers that are put back
            for number, handler in before.items():
                ends = program and number == signal.SIGINT
                signal.signal(number, signal.SIG_DFL if ends else handler)
            sys.unraisablehook = hook
            signal.set_wakeup_fd(wakeup)
            os.close(signals)
            counter.join()
            os.close(pipe)
    finally:
        ending.close()
