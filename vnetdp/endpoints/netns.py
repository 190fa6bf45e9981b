"""Network namespaces, for endpoints whose descriptor comes from another namespace than ours."""

from __future__ import annotations

import ctypes
import errno
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

from ..errors import EndpointError
from ..system.limits import of_path

T = TypeVar("T")

_CLONE_NEWNET = 0x40000000
_libc = ctypes.CDLL(None, use_errno=True)


def _path(netns: str) -> str:
    return netns if "/" in netns else f"/run/netns/{netns}"


def identity(netns: str | None = None) -> object:
    """Return the identity of a network namespace (None: ours), the same for each of its names."""
    path = "/proc/thread-self/ns/net" if netns is None else _path(netns)
    try:
        status = Path(path).stat()
    except OSError:
        return path  # it is not there
    return status.st_dev, status.st_ino


def run_in(netns: str, function: Callable[[], T]) -> T:
    """Return what *function* returns in a network namespace: a name as `ip netns` has it, or a path.

    *function* runs in a thread of its own, so the caller's namespace never changes. A descriptor that it opens
    stays in the namespace that it was opened in.
    """
    path = _path(netns)
    try:
        handle = Path(path).open("rb")  # noqa: SIM115 - closed below
    except FileNotFoundError as e:
        raise EndpointError(f"no network namespace {netns}: make it with: sudo ip netns add {netns}") from e
    except OSError as e:
        raise EndpointError(f"cannot open network namespace {path}: {of_path(path, e)}") from e

    with handle:
        return run_inside(handle.fileno(), netns, function)


def run_inside(fd: int, netns: str, function: Callable[[], T]) -> T:
    """As `run_in`, in the namespace of the descriptor *fd*; *netns* is its name for errors."""

    def inside() -> T:
        enter(fd, netns)
        return function()

    with ThreadPoolExecutor(1, "netns") as pool:
        return pool.submit(inside).result()


def enter(fd: int, netns: str) -> None:
    """Move the calling thread into the namespace that *fd* is of; sockets that are open already stay where they are."""
    # os.setns exists from Python 3.12 on only.
    if _libc.setns(fd, _CLONE_NEWNET) != 0:
        code = ctypes.get_errno()
        reason = "run as root" if code == errno.EPERM else os.strerror(code)
        raise EndpointError(f"cannot enter network namespace {netns}: {reason}")
