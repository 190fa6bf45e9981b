"""Owned: an object that one process has once. It can't be copied or pickled, and a forked child leaves it to its parent.

Behind it are descriptors, mappings, threads, or rings in shared memory. A copy would give them up a second time. A
forked child has the object and shares the rings, but has none of the threads, and a lock may be held for good there.
"""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Callable
from contextlib import suppress
from typing import Any, NoReturn, Self, SupportsIndex

from ..errors import ConfigError


class Owned:
    """The process that makes it closes it: with `close`, or on exit from `with`.

    In a forked child `inherited` is True; `close` gives up the child's descriptors there, and nothing else.
    """

    _maker: int

    def __new__(cls, *_args: Any, **_kwargs: Any) -> Self:
        self = super().__new__(cls)
        self._maker = os.getpid()
        return self

    def __reduce_ex__(self, protocol: SupportsIndex) -> NoReturn:
        raise TypeError(
            f"a {type(self).__name__} can be neither copied nor pickled: it owns descriptors, memory or threads, "
            "and closing a copy would take them from it"
        )

    @property
    def inherited(self) -> bool:
        """True in a forked child of the process that made it."""
        return os.getpid() != self._maker

    def check_maker(self) -> None:
        """Raise ConfigError in a forked child. @private"""
        if os.getpid() != self._maker:
            raise _left_to_its_maker(type(self).__name__, self._maker)

    def adopt(self) -> None:
        """Have it belong to this process, a forked child that shares nothing of it with its parent any more. @private"""
        self._maker = os.getpid()

    def close_on_fork(self) -> None:
        """Have a forked child call `leave_to_parent` at once. @private"""
        _to_leave.add(self)

    def leave_to_parent(self) -> None:
        """Close descriptors that a child may not keep: a peer waits for their end, or others for their place. @private"""

    def close(self) -> None:
        """Give up its descriptors, memory and threads. A second call does nothing."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


class OwnedLock:
    """A reentrant lock of *owner*. In a forked child, which its holder may be missing from, it raises ConfigError.

    may_wait: called before another holder is waited for; it raises an error if that holder may wait for this thread.
    """

    def __init__(self, owner: Owned, may_wait: Callable[[], None] = lambda: None) -> None:
        self._lock = threading.RLock()
        self._may_wait = may_wait
        self._name = type(owner).__name__
        self._maker = os.getpid()

    def adopt(self) -> None:
        """Have it belong to this process, a forked child in which nobody holds it."""
        self._lock = threading.RLock()
        self._maker = os.getpid()

    def acquire(self) -> None:
        if os.getpid() != self._maker:
            raise _left_to_its_maker(self._name, self._maker)
        if not self._lock.acquire(blocking=False):
            self._may_wait()
            self._lock.acquire()

    def release(self) -> None:
        self._lock.release()

    def __enter__(self) -> None:
        self.acquire()

    def __exit__(self, *exc: object) -> None:
        self.release()


def _left_to_its_maker(name: str, maker: int) -> ConfigError:
    return ConfigError(
        f"{name}: process {maker} made it, and its forked child {os.getpid()} can't use it: make another after the fork"
    )


_to_leave: weakref.WeakSet[Owned] = weakref.WeakSet()


def _forked() -> None:
    for one in list(_to_leave):
        with suppress(OSError):
            one.leave_to_parent()


os.register_at_fork(after_in_child=_forked)
