"""Descriptors that a front end gives us to keep: each is of the kind that is due, and none keeps the front end's own end.

The last copy of a connection's other end may be passed to us, by itself or unread in a socket: closed there, the connection
would stay open for ever. An eventfd and a pipe can hold no descriptor; the one kind of socket that is taken is emptied.
"""

from __future__ import annotations

import fcntl
import os
import socket
import stat
from pathlib import Path

import numpy as np

from vnetdp_kernels import rows as r
from vnetdp_kernels.platform import peer
from vnetdp_kernels.platform.atomic import Words

from ...errors import RequestRefused
from ...shared.notify import EventFd
from ..transport import MSG_CMSG_CLOEXEC, close_fds, fds_in

_EVENTFD = "anon_inode:[eventfd]"
_ROOM = 1 << 16
_MOST_FDS = 253  # that one message holds (SCM_MAX_FD)


class PeerEvent(EventFd):
    """A peer's eventfd or pipe, owned. Its flags are the peer's too, so they are left alone: it may be blocking.

    No call of ours waits on it: see `peer`.
    """

    def __init__(self, fd: int) -> None:
        super().__init__(fd)
        self._words = peer.tell_words()
        self._pollfds: Words = np.zeros((2, 1), np.int64)

    @property
    def notify(self) -> int:
        return self.fd | r.NOTIFY_PEER

    def signal(self) -> None:
        """Add one, unless that would wait: a descriptor that takes nothing more has said enough."""
        peer.tell(self.fd, self._words, self._pollfds)

    def clear(self) -> int:
        """Take off the count, or a few bytes of a pipe, in one read; return the number of bytes read."""
        return max(0, int(peer.take(self.fd, self._words, peer.TAKE_AT)))


def check_event(fd: int, connection: socket.socket | None = None) -> None:
    """RequestRefused unless *fd* is an eventfd, or a pipe's end to read from; with *connection*: to write to, or a socket.

    User Mode Linux kicks with an eventfd and is called through a socket; other front ends use eventfds.
    """
    mode = os.fstat(fd).st_mode
    if stat.S_ISFIFO(mode):
        flags = fcntl.fcntl(fd, fcntl.F_GETFL)
        if flags & os.O_PATH or flags & os.O_ACCMODE == (os.O_WRONLY if connection is None else os.O_RDONLY):
            raise RequestRefused(f"the pipe's end can't be {'read from' if connection is None else 'written to'}")
    elif stat.S_ISSOCK(mode) and connection is not None:
        check_socket(fd, connection)
    elif not _is_eventfd(fd):
        raise RequestRefused(f"{_kind(fd)} where an eventfd is due")


def _is_eventfd(fd: int) -> bool:
    try:
        return str(Path(f"/proc/self/fd/{fd}").readlink()) == _EVENTFD
    except OSError:  # no /proc: then no file type has to do
        return stat.S_IFMT(os.fstat(fd).st_mode) == 0


def _kind(fd: int) -> str:
    mode = os.fstat(fd).st_mode
    kinds = {
        stat.S_IFSOCK: "a socket",
        stat.S_IFIFO: "a pipe",
        stat.S_IFREG: "a file",
        stat.S_IFCHR: "a device file",
        stat.S_IFDIR: "a directory",
    }
    return kinds.get(stat.S_IFMT(mode), "a descriptor of another kind")


def check_state_channel(fd: int) -> None:
    """RequestRefused unless *fd* is a pipe or a file, which a device's state goes through."""
    mode = os.fstat(fd).st_mode
    if not stat.S_ISFIFO(mode) and not stat.S_ISREG(mode):
        raise RequestRefused(f"{_kind(fd)} where a pipe or a file is due")


def check_socket(fd: int, connection: socket.socket) -> None:
    """RequestRefused unless *fd* is a Unix stream socket, and no end of *connection*, that we can write to.

    Nothing is to be read from it: it takes nothing more that comes in, and is emptied.
    """
    try:
        sock = socket.socket(fileno=fd)
    except OSError as e:
        raise RequestRefused(f"{_kind(fd)} where a socket is due") from e
    try:
        if sock.family != socket.AF_UNIX or sock.type != socket.SOCK_STREAM:
            raise RequestRefused("the socket is no Unix stream socket")
        # A socket connected to the path that we listen on has its name; the two ends of a socketpair have none.
        if _names(sock) & _names(connection):
            raise RequestRefused("the descriptor is an end of this connection, or of another to the same path")
        sock.shutdown(socket.SHUT_RD)
        _empty(sock)
    except OSError as e:
        raise RequestRefused(f"the socket is not connected: {e.strerror}") from e
    finally:
        sock.detach()


def _names(sock: socket.socket) -> set[str | bytes]:
    """Return the names of a Unix socket's two ends, as far as they have one; OSError if it is not connected."""
    return {sock.getsockname(), sock.getpeername()} - {"", b""}


def _empty(sock: socket.socket) -> None:
    """Throw away all that a socket holds unread, descriptors too, up to its end."""
    while True:
        data, ancillary, _, _ = sock.recvmsg(
            _ROOM, socket.CMSG_SPACE(_MOST_FDS * 4), socket.MSG_DONTWAIT | MSG_CMSG_CLOEXEC
        )
        close_fds(fds_in(ancillary))
        if not data:
            return
