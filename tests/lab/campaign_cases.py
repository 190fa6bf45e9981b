"""Functions that campaigns run in other processes: they import little, as each process has to."""

from __future__ import annotations

import os
import signal
from pathlib import Path


def square(n: int) -> int:
    if n < 0:
        raise ValueError(f"{n} is negative")
    return n * n


def die_once(case: tuple[Path, bool]) -> int:
    """Kill this process when a case that is to lose its worker first runs; return the process's id."""
    mark, dies = case
    if dies and not mark.exists():
        mark.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return os.getpid()


def die(n: int) -> int:
    if n == 2:
        os._exit(3)
    return n
