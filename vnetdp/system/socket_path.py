"""The path of a Unix socket, checked before the socket is made."""

from __future__ import annotations

import os
from typing import Final

from ..errors import ConfigError

_MOST_BYTES: Final = 107  # sun_path, less its null byte


def check_path(path: str, cannot: str) -> None:
    """Raise ConfigError, which begins with *cannot*, if no socket can have *path*."""
    length = len(os.fsencode(path))
    if not path:
        raise ConfigError(f"{cannot} a socket with an empty path: name a file, such as /tmp/net.sock")
    if length > _MOST_BYTES:
        raise ConfigError(
            f"{cannot} {path}: this path is too long for a socket: {length} bytes, of at most {_MOST_BYTES}: take a shorter "
            "one, or a link to its folder"
        )
    if "\0" in path:
        raise ConfigError(f"{cannot} {path!r}: it has a null byte in it: take another path")
