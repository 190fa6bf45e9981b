"""passt, which joins a guest to the sockets of a normal user, for the length of a `with` block."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

from tests.support.by_hand import wait_for

GUEST: Final = "10.0.2.15"  # the guest's address, and the host's, behind which is its loopback
HOST: Final = "10.0.2.2"
_NOBODY: Final = 65534


def why_no_passt() -> str | None:
    return None if shutil.which("passt") else "passt isn't installed (Debian's package passt)"


def unprivileged(argv: Sequence[str]) -> list[str]:
    """Return the command that runs *argv* without any capability: a normal user runs it as it is."""
    if os.geteuid():
        return list(argv)
    return ["setpriv", "--bounding-set=-all", "--inh-caps=-all", "--no-new-privs", *argv]


@contextmanager
def passt() -> Iterator[Path]:
    """Give the socket of a running passt, which belongs to a normal user."""
    user: dict[str, Any] = {}
    if os.geteuid() == 0:
        user = {"user": _NOBODY, "group": _NOBODY, "extra_groups": []}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "passt"
        Path(folder).chmod(0o777)
        network = ["-a", GUEST, "-n", "255.255.255.0", "-g", HOST, "-D", "none", "-4", "--no-ndp", "--no-dhcpv6"]
        with (
            open(Path(folder) / "log", "w+b") as log,
            subprocess.Popen(
                ["passt", "--foreground", "--stderr", "--quiet", "--socket", str(path), *network],
                **{"stdin": subprocess.DEVNULL, "stdout": log, "stderr": log, "umask": 0, **user},
            ) as process,
        ):
            try:
                wait_for(lambda: path.exists() or process.poll() is not None, "passt listens")
                log.seek(0)
                assert process.poll() is None, log.read().decode()
                yield path
            finally:
                process.kill()
