"""A vhost-user proxy that loses the dirty log: the mutant that a migration test must catch.

Messages pass through it with their descriptors, but for the log: the back end is given one that nobody reads, so
nothing that it writes into guest memory is migrated.
"""

from __future__ import annotations

import os
import select
import socket
import struct
import threading
from contextlib import ExitStack
from pathlib import Path
from typing import Self

from vnetdp.vhost_user.message import Request
from vnetdp.vhost_user.transport import Transport, close_fds


class ForgetfulProxy:
    """Listens on *path* for one front end, and connects it to the back end on *behind*."""

    def __init__(self, path: Path, behind: Path) -> None:
        self.logs_lost = 0
        self._behind = behind
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(path))
        self._listener.listen(1)
        self._stop = os.pipe()
        self._thread = threading.Thread(target=self._run, name="proxy")
        self._thread.start()

    def _run(self) -> None:
        wait: list[socket.socket | int] = [self._listener, self._stop[0]]
        if self._listener not in select.select(wait, [], [])[0]:
            return
        with ExitStack() as stack:
            front = Transport(stack.enter_context(self._listener.accept()[0]))
            back = Transport(stack.enter_context(socket.socket(socket.AF_UNIX)))
            back.sock.connect(str(self._behind))
            wait = [front.sock, back.sock, self._stop[0]]
            while self._stop[0] not in (ready := select.select(wait, [], [])[0]):
                if front.sock in ready and not self._pass(front, back, from_front_end=True):
                    return
                if back.sock in ready and not self._pass(back, front, from_front_end=False):
                    return

    def _pass(self, source: Transport, target: Transport, from_front_end: bool) -> bool:
        """Pass a message on; False if the connection has ended."""
        try:
            got = source.receive()
            if got is None:
                return False
            header, data, fds = got
            if from_front_end and header.request == Request.SET_LOG_BASE:
                size, offset = struct.unpack_from("=QQ", data)
                close_fds(fds)
                fds = (os.memfd_create("lost-log"),)
                os.ftruncate(fds[0], size + offset)
                self.logs_lost += 1
            target.send(header.encode() + data, fds)
            close_fds(fds)
        except OSError:
            return False
        return True

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        os.write(self._stop[1], b"x")
        self._thread.join()
        self._listener.close()
        for fd in self._stop:
            os.close(fd)
