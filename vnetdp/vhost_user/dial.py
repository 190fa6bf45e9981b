"""Connecting to a Unix socket that somebody else listens on: what waiting heals, and what it does not."""

from __future__ import annotations

import errno
import socket
import stat
from pathlib import Path

from ..errors import ConfigError, VnetdpError

_MAY_COME = (errno.ENOENT, errno.ECONNREFUSED, errno.EAGAIN, errno.EINTR)
_NEXT_STEP = {
    None: "take a shorter path, or a link to its folder",
    errno.EACCES: "its permissions, or those of its folder, are not for this user",
    errno.EPERM: "its permissions, or those of its folder, are not for this user",
    errno.EPROTOTYPE: "it is not a stream socket, which vhost-user needs",
}


class NobodyYetError(VnetdpError):
    """There is nothing to connect to, or its backlog is full: later there may be. The text says which."""


def dial(path: str) -> socket.socket:
    """Connect to *path* without waiting; NobodyYetError if waiting may help, ConfigError if it can't."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        sock.setblocking(False)  # else it waits for as long as the other's backlog is full
        sock.connect(path)
    except OSError as e:
        sock.close()
        if e.errno not in _MAY_COME:
            step = _NEXT_STEP.get(e.errno)
            raise ConfigError(f"cannot connect to {path}: {e.strerror or e}{f': {step}' if step else ''}") from e
        raise NobodyYetError(_why(path, e.errno)) from e
    except BaseException:
        sock.close()
        raise
    return sock


def _why(path: str, code: int | None) -> str:
    """Return why nobody is there; ConfigError if it is because *path* is no socket."""
    if code == errno.EAGAIN:
        return "it is busy: others wait already to be served"
    try:
        mode = Path(path).stat().st_mode
    except OSError:
        target = Path(path)
        if target.is_symlink():
            return f"it is a link to {target.readlink()}, which is not there"
        return "it is not there" if target.parent.is_dir() else f"its folder {target.parent} is not there"
    if not stat.S_ISSOCK(mode):
        kind = "a directory" if stat.S_ISDIR(mode) else "a file"
        raise ConfigError(f"cannot connect to {path}: it is {kind}, not a socket: take another path, or remove it")
    return "nobody listens on it"
