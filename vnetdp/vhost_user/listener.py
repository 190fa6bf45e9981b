"""A listening Unix socket and its file: whoever made the file removes it; one that was left by the dead is taken over."""

from __future__ import annotations

import socket
import stat
from contextlib import suppress
from pathlib import Path

from ..errors import ConfigError


class Listener:
    """Listens on *path*; ConfigError if that can't be. A file that is no socket, or that somebody listens on, stays."""

    def __init__(self, path: str, backlog: int) -> None:
        self._path = Path(path)
        with suppress(FileNotFoundError):
            if not stat.S_ISSOCK(self._path.stat().st_mode):
                raise ConfigError(f"{path} exists and is not a socket: take another path")
            _remove_if_dead(self._path)
        self._sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            self._sock.bind(path)
            self._sock.listen(backlog)
            found = self._path.stat()
        except OSError as e:
            self._sock.close()
            raise ConfigError(f"cannot listen on {path}: {e.strerror or e}") from e
        self._inode = (found.st_dev, found.st_ino)

    def fileno(self) -> int:
        return self._sock.fileno()

    def accept(self) -> socket.socket:
        return self._sock.accept()[0]

    def close(self) -> None:
        """Close the socket, and remove the file if it still is ours."""
        self._sock.close()
        with suppress(FileNotFoundError):
            found = self._path.stat()
            if (found.st_dev, found.st_ino) == self._inode:
                self._path.unlink()


def _remove_if_dead(path: Path) -> None:
    """Remove a socket that nobody listens on; ConfigError if somebody does."""
    probe = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    probe.setblocking(False)  # a full backlog is somebody's, too
    try:
        probe.connect(str(path))
    except ConnectionRefusedError:
        path.unlink()
    except BlockingIOError:
        raise ConfigError(f"another program listens on {path}: end that, or take another path") from None
    except OSError as e:
        raise ConfigError(f"cannot use {path}: {e.strerror or e}") from e
    else:
        raise ConfigError(f"another program listens on {path}: end that, or take another path")
    finally:
        probe.close()
