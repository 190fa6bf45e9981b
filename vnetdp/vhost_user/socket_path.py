"""The path of a Unix socket: what no socket can be called, said before one is made."""

from __future__ import annotations

import os
from typing import Final

from ..errors import ConfigError

_MOST_BYTES: Final = 107  # sun_path, less its null byte


def check_path(path: str) -> None:
    """Raise ConfigError if no socket can have *path*."""
    if not path:
        raise ConfigError("a socket's path is empty: name a file, such as /tmp/net.sock")
    length = len(os.fsencode(path))
    if length > _MOST_BYTES:
        raise ConfigError(
            f"the path of socket {path} has {length} bytes, and may have {_MOST_BYTES}: take a shorter path, or a link "
            "to its folder"
        )
    if "\0" in path:
        raise ConfigError(f"the path of socket {path!r} has a null byte in it: take another path")
