"""The first steps of a child process: it ends with its parent, however its parent ends."""

from __future__ import annotations

import os
import select
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from . import limits
from .errors import MachineError

TO_END_S: Final = 2.0  # for a process that is asked to end, if it was stopped: it never does
_SLOW_S: Final = 20.0  # for one that runs, on a machine that is busy


def start(code: str, parent: socket.socket, passed: Sequence[int]) -> subprocess.Popen[bytes]:
    """Start a Python process that runs *code*, and has the descriptors of *parent* and *passed*.

    parent: the child's end of a pair of sockets. The child is in a process group of its own: a signal from the terminal is
    for us alone, and we end it. The group is in our session, so that the kernel wakes a child that is stopped when we die.
    """
    fd = parent.fileno()
    with limits.giving("a process"):
        return subprocess.Popen(
            [sys.executable, "-c", f"from {__name__} import follow; follow({fd}); {code}"],
            pass_fds=(fd, *passed),
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
            process_group=0,
        )


def end(process: subprocess.Popen[bytes]) -> bool:
    """Wait until *process* has ended, as it was asked to; kill it if it was stopped, or hangs, and return False."""
    for patience_s in (TO_END_S, _SLOW_S):
        try:
            process.wait(patience_s)
        except subprocess.TimeoutExpired:
            if stopped(process.pid):
                break
        else:
            return True
    process.kill()
    process.wait()
    return False


def stopped(pid: int) -> bool:
    """Return whether a signal or a debugger has stopped the process."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in ("T", "t")
    except OSError:
        return False  # it has just ended


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
