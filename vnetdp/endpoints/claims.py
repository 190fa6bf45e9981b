"""Claims: one owner for each queue of an endpoint, whichever processes share it."""

from __future__ import annotations

import fcntl
import os
import struct
from collections.abc import Iterable

from ..shared.memory import SharedBlock
from ..system import limits

_FLOCK = struct.Struct("@hhqqi4x")  # l_type, l_whence, l_start, l_len, l_pid


class Claims:
    """Locks on the bytes of *block*, one byte a queue, against every other process that shares it.

    A block that is this process's alone needs none. *held*: the queues that are claimed, to lock them once it is shared.
    MachineError if there are no more descriptors.
    """

    def __init__(self, block: SharedBlock, held: Iterable[int]) -> None:
        self._block = block
        self._held = held
        self._fd = -1
        if block.shared:
            self._open()
        block.on_shared = self._share

    def _open(self) -> None:
        # The kernel keeps claims for each open file, and gives them up with it: so the block, whose descriptor may be a
        # copy, is opened anew.
        with limits.giving("a second descriptor of a shared block"):
            self._fd = os.open(f"/proc/self/fd/{self._block.fd}", os.O_RDWR | os.O_CLOEXEC)

    def _share(self) -> None:
        self._open()
        for queue in self._held:
            self.take(queue, 1)

    def take(self, queue: int, n: int) -> bool:
        """Claim *n* queues from *queue* on; False, and none is claimed, if another process has one."""
        return self._lock(queue, n, fcntl.F_WRLCK)

    def give_up(self, queue: int) -> None:
        """Give up the claim of *queue*."""
        self._lock(queue, 1, fcntl.F_UNLCK)

    def _lock(self, queue: int, n: int, kind: int) -> bool:
        if self._fd < 0:
            return True
        try:
            fcntl.fcntl(self._fd, fcntl.F_OFD_SETLK, _FLOCK.pack(kind, os.SEEK_SET, queue, n, 0))
        except BlockingIOError:
            return False
        return True

    def close(self) -> None:
        """Give up all claims; those of a parent are left to it."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)
