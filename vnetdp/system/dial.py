"""Connecting to a Unix socket of another program: errors that waiting heals, and errors that last."""

from __future__ import annotations

import errno
import os
import socket
import stat
from pathlib import Path

from ..errors import ConfigError, VnetdpError
from .limits import of_path
from .socket_path import check_path

_MAY_COME = (errno.ENOENT, errno.ECONNREFUSED, errno.EAGAIN, errno.EINTR)


class NobodyYetError(VnetdpError):
    """No program listens on the socket yet, or its backlog is full. The text gives the reason."""


def dial(path: str) -> socket.socket:
    """Connect to *path* without waiting; NobodyYetError if waiting may help, ConfigError if it can't."""
    check_path(path, "cannot connect to")
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        sock.setblocking(False)  # else it waits for as long as the other's backlog is full
        sock.connect(path)
    except OSError as e:
        sock.close()
        if e.errno not in _MAY_COME:
            stream = f"{e.strerror}: it is not a stream socket: take another path"
            why = stream if e.errno == errno.EPROTOTYPE else of_path(path, e)
            raise ConfigError(f"cannot connect to {path}: {why}") from e
        if e.errno == errno.EAGAIN:
            raise NobodyYetError("the program that listens is busy: its backlog is full") from e
        raise NobodyYetError(why_not_there(path) or "no program listens on the socket") from e
    except BaseException:
        sock.close()
        raise
    return sock


def why_not_there(path: str) -> str:
    """Return why there is no socket at *path* yet, "" if there is one; ConfigError if we can't connect to it, ever."""
    check_path(path, "cannot connect to")
    target = Path(path)
    try:
        mode = target.stat().st_mode
    except FileNotFoundError:
        if target.is_symlink():
            return f"the path is a link to {target.readlink()}, which does not exist"
        return "the socket does not exist" if target.parent.is_dir() else f"its folder {target.parent} does not exist"
    except OSError as e:
        raise ConfigError(f"cannot connect to {path}: {of_path(path, e)}") from e
    if not stat.S_ISSOCK(mode):
        kind = "a directory" if stat.S_ISDIR(mode) else "a file"
        raise ConfigError(f"cannot connect to {path}: it is {kind}, not a socket: take another path, or remove it")
    if not os.access(path, os.W_OK):
        if not target.exists():
            return "the socket does not exist"  # any more
        raise ConfigError(
            f"cannot connect to {path}: {of_path(path, PermissionError(errno.EACCES, os.strerror(errno.EACCES)))}"
        )
    return ""
