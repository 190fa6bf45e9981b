"""Two TAPs in a network namespace of their own, as two hosts on one network have them; root only."""

from __future__ import annotations

import os
import select
import shutil
import socket
import subprocess
import time

from ..endpoints.announce import rarp
from ..endpoints.netns import run_in
from ..errors import VnetdpError
from ..system import signals
from ..system.owned import Owned

_ETH_P_RARP = 0x8035
_HEARD_S = 30.0  # it takes no time, unless the machine is busy with something else


def why_no_taps() -> str | None:
    """Return why there can't be such a namespace here; None if there can."""
    if os.geteuid() != 0:
        return "TAPs in a namespace of their own need root"
    return None if shutil.which("ip") else "the ip command (iproute2) isn't installed"


class TapNamespace(Owned):
    """A namespace that lasts as long as this. source, target: an endpoint each side can have."""

    def __init__(self) -> None:
        self._name = f"vnetdp-faults-{os.getpid()}"
        self.source, self.target = (f"tap:{side},netns={self._name}" for side in ("source", "target"))
        signals.at_end(self._delete)
        self._ip("netns", "add", self._name)
        self._ear = run_in(
            self._name, lambda: socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(_ETH_P_RARP))
        )

    def _delete(self) -> None:
        self._ip("netns", "delete", self._name)
        signals.no_more_at_end(self._delete)

    def _ip(self, *args: str) -> str:
        done = subprocess.run(["ip", *args], capture_output=True, text=True, check=False)
        if done.returncode:
            raise VnetdpError(f"ip {' '.join(args)}: {done.stderr.strip()}")
        return done.stdout

    def hears_of(self, mac: bytes) -> bool:
        """Return whether *mac* is announced within 30 s."""
        until = time.monotonic() + _HEARD_S
        while select.select([self._ear], [], [], max(0.0, until - time.monotonic()))[0]:
            if self._ear.recv(2048) == rarp(mac):
                return True
        return False

    def interfaces(self) -> list[str]:
        """Return the interfaces that are there beside lo."""
        lines = self._ip("-n", self._name, "-o", "link", "show").splitlines()
        names = [line.split(": ")[1] for line in lines]
        return [name for name in names if name in ("source", "target")]

    def close(self) -> None:
        self._ear.close()
        if not self.inherited:
            self._delete()
