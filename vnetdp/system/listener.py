"""A listening Unix socket and its file: its maker removes the file, and one left by the dead is taken over.

A path is only a name: another program may put its own file there at any moment. So a file is removed only if it still
is the very one (device and inode) that was looked at, or made.
"""

from __future__ import annotations

import fcntl
import os
import shlex
import socket
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ..errors import ConfigError
from . import signals
from .limits import giving, of_path
from .owned import Owned
from .socket_path import check_path

_LOCK_S = 2.0  # for the folder's lock; each of us holds it for less than a millisecond


class Listener(Owned):
    """Listens on *path*; ConfigError if that can't be. A file that is no socket, or a socket in use, stays."""

    def __init__(self, path: str, backlog: int | None, kind: socket.SocketKind = socket.SOCK_STREAM) -> None:
        """*backlog*: None only takes the path, and no connection. kind: SOCK_DGRAM takes datagrams there."""
        check_path(path, "cannot listen on")
        self._path = Path(path)
        with giving("a socket"):
            self._sock = socket.socket(socket.AF_UNIX, kind)
        with signals.unbroken():
            try:
                with _alone_in(self._path.parent):
                    _remove_if_dead(self._path, kind)
                    self._sock.bind(path)
                    if backlog is not None:
                        self._sock.listen(backlog)
                    self._made: os.stat_result | None = self._path.lstat()
            except OSError as e:
                self._sock.close()
                raise ConfigError(f"cannot listen on {path}: {of_path(path, e, to_make=True)}") from e
            except ConfigError:
                self._sock.close()
                raise
            self.close_on_fork()
            signals.at_end(self.close)

    def fileno(self) -> int:
        return self._sock.fileno()

    def accept(self) -> socket.socket:
        return self._sock.accept()[0]

    def close(self) -> None:
        """Remove the file if it still is ours, and close the socket. A forked child leaves the file to its parent."""
        if self._made is not None and not self.inherited:
            # While it is open: no other file can have the number of our inode before we close it.
            with suppress(OSError):
                _remove(self._path, self._made)
        self._made = None
        self._sock.close()
        signals.no_more_at_end(self.close)  # last: a signal that breaks off the rest has it called once more

    def leave_to_parent(self) -> None:
        self._sock.close()


def check_free(path: str) -> None:
    """Raise ConfigError if nothing can listen on *path*, found out by trying; nothing stays behind."""
    Listener(path, None).close()


@contextmanager
def _alone_in(folder: Path) -> Iterator[None]:
    """Hold the lock of *folder*, so that no two of us find the same dead socket; without it where it can't be had."""
    fd = -1
    with suppress(OSError):  # a folder that may not be read, or has no locks
        fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        until = time.monotonic() + _LOCK_S
        while not _locks(fd) and time.monotonic() < until:  # another program may hold it for good
            time.sleep(0.002)
    try:
        yield
    finally:
        if fd >= 0:
            os.close(fd)


def _locks(fd: int) -> bool:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _remove(path: Path, known: os.stat_result) -> None:
    """Remove the file at *path* if it still is the file of the status *known*."""
    with suppress(FileNotFoundError):
        if os.path.samestat(path.lstat(), known):
            path.unlink()


def _remove_if_dead(path: Path, kind: socket.SocketKind) -> None:
    """Remove the socket at *path* if no program has it; ConfigError if one does, or the file is no socket."""
    try:
        found = path.lstat()
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(found.st_mode):
        raise ConfigError(f"{path} exists and is not a socket: take another path")
    with socket.socket(socket.AF_UNIX, kind) as probe:
        probe.setblocking(False)  # a full backlog has a listener, too
        try:
            probe.connect(str(path))
        except ConnectionRefusedError:
            _remove(path, found)
            return
        except FileNotFoundError:
            return  # its owner has just removed it
        except BlockingIOError:
            pass
        except OSError as e:
            raise ConfigError(
                f"cannot use {path}, which exists: {of_path(path, e)}; or remove it: rm {shlex.quote(str(path))}"
            ) from e
    raise ConfigError(f"another program listens on {path}: end that program, or take another path")
