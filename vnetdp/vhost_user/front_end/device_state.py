"""A front end moves its back end's state: out of one back end as bytes, and into another (SET_DEVICE_STATE_FD)."""

from __future__ import annotations

import errno
import os
import select
import time
from collections.abc import Callable
from typing import TypeVar

from ...errors import BackendError
from ..message import NO_FD, U64, DeviceStateTransfer, Request
from ..transport import close_fds
from .conversation import Conversation, wait_readable

T = TypeVar("T")

_SAVE, _LOAD = 0, 1  # directions
_STOPPED = 0  # phase
_LONGEST = 1 << 24  # bytes of a state that are taken


def save(conversation: Conversation, timeout_s: float) -> bytes:
    """Return the state of a back end whose rings are stopped; BackendError if it can't be had within *timeout_s*."""
    ours, theirs = os.pipe()
    return _move(conversation, _SAVE, ours, theirs, lambda fd: _read_all(fd, time.monotonic() + timeout_s))


def load(conversation: Conversation, state: bytes, timeout_s: float) -> None:
    """Have a back end whose rings are stopped take over *state*; BackendError if it does not."""
    theirs, ours = os.pipe()
    _move(conversation, _LOAD, ours, theirs, lambda fd: _write_all(fd, state, time.monotonic() + timeout_s))


def _move(conversation: Conversation, direction: int, ours: int, theirs: int, move: Callable[[int], T]) -> T:
    """Give the back end *theirs*, *move* the state through *ours* or the back end's pipe, and ask for the result."""
    try:
        try:
            answer, fds = conversation.exchange(
                Request.SET_DEVICE_STATE_FD, DeviceStateTransfer(direction, _STOPPED), [theirs]
            )
        finally:
            os.close(theirs)
        if isinstance(answer, U64) and not answer.value & NO_FD and len(fds) == 1:
            os.close(ours)
            ours, fds = fds[0], ()
        close_fds(fds)
        if not isinstance(answer, U64) or answer.value & 0xFF:
            raise BackendError("SET_DEVICE_STATE_FD", errno.EIO, None, "the back end refuses the request")
        os.set_blocking(ours, False)
        moved = move(ours)
    finally:
        os.close(ours)  # for a load, the end of the state
    if conversation.ask(Request.CHECK_DEVICE_STATE, U64).value:
        raise BackendError("CHECK_DEVICE_STATE", errno.EIO, None, "the back end reports that it failed")
    return moved


def _read_all(fd: int, until: float) -> bytes:
    data = b""
    while len(data) <= _LONGEST and wait_readable(fd, until):
        part = os.read(fd, _LONGEST)
        if not part:
            return data
        data += part
    raise BackendError("SET_DEVICE_STATE_FD", errno.ETIMEDOUT, None, f"no end of the state after {len(data)} bytes")


def _write_all(fd: int, data: bytes, until: float) -> None:
    poll = select.poll()
    poll.register(fd, select.POLLOUT)
    try:
        while data:
            left = until - time.monotonic()
            if left <= 0 or not poll.poll(1000 * left):
                raise BackendError("SET_DEVICE_STATE_FD", errno.ETIMEDOUT, None, "the back end does not read the state")
            data = data[os.write(fd, data) :]
    except BrokenPipeError as e:
        raise BackendError("SET_DEVICE_STATE_FD", errno.EIO, None, "the back end reads no more of the state") from e
