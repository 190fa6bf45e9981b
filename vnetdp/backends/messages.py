"""Messages between a worker process and its parent: pickled, with every descriptor they speak of beside them."""

from __future__ import annotations

import errno
import io
import os
import pickle
import socket
from contextlib import suppress
from typing import Any, Final

import numpy as np

from vnetdp_kernels import spec

from ..endpoints.base import Endpoint
from ..shared.memory import DirtyLog, GuestMemory, Region
from ..shared.notify import EventFd

MAX_LEN: Final = 1 << 16
MAX_FDS: Final = 250  # SCM_MAX_FD is 253


class RemoteEndpoint(Endpoint):
    """The child's view of an endpoint: the same rows and slots, its own copies of the descriptors."""

    def __init__(self, kind: int, lines: int, queues: int, block_fd: int, fds: list[int], name: str) -> None:
        self.kind = kind
        self.lines = lines
        self.name = name
        super().__init__(queues, block_fd)
        self.fds[:] = np.array(fds)

    def _claim(self, queue: int, n: int) -> bool:
        """True: the parent, whose child this is, has the lock."""
        return True

    def renew(self, endpoint: Endpoint) -> None:
        """Put the files of *endpoint*, a newer view of the same endpoint, behind the descriptors here."""
        for own, new in zip(self.fds.tolist(), endpoint.fds.tolist(), strict=True):
            if new >= 0:
                os.dup2(new, own, inheritable=False)

    def close(self) -> None:
        fds = set(self.fds.tolist()) - {-1}
        super().close()
        for fd in fds:
            os.close(fd)


def pack(message: object) -> tuple[bytes, list[int]]:
    """Return the bytes of a message, and the descriptors that go beside it."""
    fds: list[int] = []

    def beside(fd: int) -> int:
        if fd < 0:
            return -1
        fds.append(fd)
        return len(fds) - 1

    class Pickler(pickle.Pickler):
        def persistent_id(self, obj: object) -> object:
            if isinstance(obj, EventFd):
                return ("eventfd", beside(obj.fd))
            if isinstance(obj, GuestMemory):
                return ("memory", [(r.gpa, r.length, beside(r.fd), r.fd_offset) for r in obj.regions])
            if isinstance(obj, DirtyLog):
                return ("log", obj.length, beside(obj.fd))
            if isinstance(obj, Endpoint):
                queue_fds = [beside(fd) for fd in obj.fds.tolist()]
                return ("endpoint", obj.kind, obj.lines, obj.queues, beside(obj.block.fd), queue_fds, obj.name)
            return None

    buffer = io.BytesIO()
    Pickler(buffer).dump(message)
    return buffer.getvalue(), fds


def _unpack(data: bytes, fds: list[int]) -> Any:
    """Return a message; the objects that arrived in it own their descriptors."""

    class Unpickler(pickle.Unpickler):
        def persistent_load(self, pid: Any) -> object:
            kind, *rest = pid
            if kind == "eventfd":
                return EventFd(fds[rest[0]])
            if kind == "memory":
                memory = GuestMemory([Region(gpa, n, fds[fd], at) for gpa, n, fd, at in rest[0]])
                for _, _, fd, _ in rest[0]:
                    os.close(fds[fd])
                return memory
            if kind == "log":
                return DirtyLog(rest[0] * 8 * spec.PAGE_SIZE, fds[rest[1]])
            endpoint_kind, lines, queues, block, queue_fds, name = rest
            own = [fds[fd] if fd >= 0 else -1 for fd in queue_fds]
            return RemoteEndpoint(endpoint_kind, lines, queues, fds[block], own, name)

    try:
        return Unpickler(io.BytesIO(data)).load()
    except BaseException:  # an object that could not be made may have closed its own
        for fd in fds:
            with suppress(OSError):
                os.close(fd)
        raise


def receive(sock: socket.socket) -> Any:
    """Return the next message; EOFError once the other end is closed, OSError if its descriptors did not fit."""
    data, fds, flags, _ = socket.recv_fds(sock, MAX_LEN, MAX_FDS)
    if not data:
        raise EOFError
    if flags & (socket.MSG_TRUNC | socket.MSG_CTRUNC):
        for fd in fds:
            os.close(fd)
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
    return _unpack(data, list(fds))
