"""Child processes: each ends with its parent in any case; the parent waits for its answers, or reports its end."""

from __future__ import annotations

import os
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Final

from ..errors import MachineError
from . import limits
from .poll import readable

TO_END_S: Final = 2.0  # for a process that is asked to end, if it was stopped: it never does
_SLOW_S: Final = 20.0  # for a process that runs, on a busy machine
LOOK_S: Final = 0.1  # between two looks at a process, while its answer is waited for


def start(
    code: str, parent: socket.socket, passed: Sequence[int], env: Mapping[str, str] | None = None
) -> subprocess.Popen[bytes]:
    """Start a Python process that runs *code*, and has the descriptors of *parent* and *passed*.

    parent: the child's end of a pair of sockets. env: variables of its environment, beside ours. The child is in a process
    group of its own: a signal from the terminal is for us alone, and we end it. The group is in our session, so that the
    kernel wakes a child that is stopped when we die.
    """
    fd = parent.fileno()
    with limits.giving("a process"):
        return subprocess.Popen(
            [sys.executable, "-c", f"from {__name__} import follow; follow({fd}); {code}"],
            pass_fds=(fd, *passed),
            env={**os.environ, **(env or {}), "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
            process_group=0,
        )


def stopped(pid: int) -> bool:
    """Return whether a signal or a debugger has stopped the process."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in ("T", "t")
    except OSError:
        return False  # it has just ended


class Child:
    """A process from `start` that answers over *sock*: the wait for an answer, and how the process ended."""

    def __init__(self, process: subprocess.Popen[bytes], sock: socket.socket) -> None:
        self.process = process
        self._sock = sock
        self._end = ""  # how it ended

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def alive(self) -> bool:
        """True until the process has ended."""
        return self.process.poll() is None

    @property
    def stopped(self) -> bool:
        """True if a signal or a debugger has stopped the process."""
        return stopped(self.pid)

    def waiting(self, look_s: float = LOOK_S) -> Iterator[float]:
        """Wait until the process has answered, or is gone; yield the seconds waited so far every *look_s* seconds."""
        began = time.monotonic()
        while not readable(self._sock, look_s):
            yield time.monotonic() - began

    def kill(self, why: str) -> None:
        """Kill the process; `ended` then says that it *why*, and was killed."""
        self._end = f"{why}, and was killed"
        self.process.kill()
        self.process.wait()

    def end(self) -> bool:
        """Close the socket, which asks the process to end, and wait until it has; kill it if it is stopped, or hangs.

        False if it was killed: `ended` then says so.
        """
        self._sock.close()
        for patience_s in (TO_END_S, _SLOW_S):
            try:
                self.process.wait(patience_s)
            except subprocess.TimeoutExpired:
                if self.stopped:
                    break
            else:
                return True
        self.kill("did not end when it was asked to")
        return False

    def ended(self) -> str:
        """Return how a process that can't be talked to any more ended: by which signal, or with which exit status.

        It has ended then: one that does not is killed.
        """
        if not self._end:
            closed = self._sock.fileno() < 0
            try:
                code = self.process.wait(TO_END_S)
            except subprocess.TimeoutExpired:  # others may take over its work only once it is gone
                self.kill("was closed" if closed else "closed its connection")
            else:
                how = f"ended with exit status {code}" if code >= 0 else f"was killed by {_signal_name(-code)}"
                self._end = "was closed" if closed else how
        return self._end


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:  # a real-time signal
        return f"signal {number}"


def follow(fd: int) -> None:
    """Have this process end once the other end of the socket *fd* is closed: also while it imports, or compiles."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # no traceback
    signal.signal(signal.SIGTTOU, signal.SIG_IGN)  # a group in the background may write to the terminal all the same
    try:
        limits.start(threading.Thread(target=_end_with_parent, args=(fd,), name="parent", daemon=True))
    except MachineError as e:
        sys.exit(f"vnetdp: {e}")


def _end_with_parent(fd: int) -> None:
    poll = select.poll()
    poll.register(fd, 0)  # POLLHUP comes unasked
    poll.poll()
    os._exit(0)
