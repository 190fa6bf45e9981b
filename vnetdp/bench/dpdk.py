"""DPDK's testpmd as a peer, steered through its own command line: a virtio driver, or a vhost-user back end."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Self

from ..errors import VnetdpError
from ..system.poll import readable

PROGRAM = "dpdk-testpmd"
_PROMPT = "testpmd> "
_FIGURE = re.compile(r"([RT][Xx]-\w+): +(\d+)")


class DpdkError(VnetdpError):
    """testpmd ended, or refused a command."""


def why_no_dpdk() -> str | None:
    """Return why testpmd can't run here; None if it can."""
    return None if shutil.which(PROGRAM) else f"{PROGRAM} isn't installed (Debian's package dpdk-dev)"


def cpu_list() -> str:
    """Return the cores that we may run on, as --lcores spells them."""
    return ",".join(str(core) for core in sorted(os.sched_getaffinity(0)))


class Dpdk:
    """A testpmd with the virtual devices *vdevs* as its ports, in interactive mode: it forwards when told to start.

    scratch: a folder for its log. cpus: the cores of each forwarding thread, as --lcores spells them; a
    thread takes the streams that its turn gives it. args: testpmd's own arguments, eal: those of DPDK.
    """

    def __init__(
        self,
        vdevs: Sequence[str],
        scratch: Path,
        cpus: Sequence[str],
        *,
        args: Sequence[str] = (),
        eal: Sequence[str] = (),
    ) -> None:
        lcores = [f"0@({cpu_list()})", *(f"{number}@({cores})" for number, cores in enumerate(cpus, 1))]
        argv = [
            *("stdbuf", "-oL"),  # into a pipe it would print by the page, and we wait for its prompt
            *(PROGRAM, "--no-pci", "--no-huge", "--no-telemetry", "-m", "256"),
            f"--file-prefix=vnetdp-{os.getpid()}-{id(self):x}",
            f"--lcores={','.join(lcores)}",
            *eal,
            *(f"--vdev={vdev}" for vdev in vdevs),
            *("--", "--interactive", f"--nb-cores={len(cpus)}", "--total-num-mbufs=8192"),
            *("--no-lsc-interrupt", "--no-flush-rx"),  # flushing would throw a capture away
            *("--mask-event", "all"),  # another thread's output may fall into the middle of a prompt
            *args,
        ]
        self._said = ""  # all that it printed
        self._seen = 0  # how much of that was looked at
        self._log = scratch / f"testpmd-{id(self):x}.log"
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                argv,
                bufsize=0,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,  # not among the prompts
                env={**os.environ, "RUNTIME_DIRECTORY": str(scratch)},  # --no-huge leaves files behind
            )

    @property
    def log(self) -> str:
        """DPDK's log."""
        return self._log.read_text(errors="replace")

    def wait(self, seconds: float = 60.0) -> str:
        """Wait for the prompt, and return the output before it."""
        assert self._process.stdout is not None
        until = time.monotonic() + seconds
        while (found := self._said.find(_PROMPT, self._seen)) < 0:
            ready = readable(self._process.stdout, max(0.0, until - time.monotonic()))
            data = os.read(self._process.stdout.fileno(), 1 << 16) if ready else b""
            if not data:
                what = "ended" if ready else f"has not answered for {seconds:g} s"
                raise DpdkError(f"testpmd {what}; it printed: {self._said[-4000:]}{self.log[-4000:]}")
            self._said += data.decode(errors="replace")
        text = self._said[self._seen : found]
        self._seen = found + len(_PROMPT)
        return text

    def ask(self, command: str) -> str:
        """Send a command, and return its output."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{command}\n".encode())
        answer = self.wait()
        for complaint in ("Bad arguments", "Command not found", "Ambiguous command"):
            if complaint in answer:
                raise DpdkError(f"testpmd: {answer.strip()}")
        return answer

    def figures(self, port: int) -> dict[str, int]:
        """Return the counters of a port by their names (RX-packets, TX-packets, Rx-pps, ...).

        A rate is that since they were last asked for.
        """
        return {name: int(value) for name, value in _FIGURE.findall(self.ask(f"show port stats {port}"))}

    def close(self) -> None:
        """Have it close its devices and end; end it if it does not."""
        assert self._process.stdin is not None and self._process.stdout is not None
        try:
            self._process.stdin.write(b"quit\n")
            self._process.communicate(timeout=20)
        except (BrokenPipeError, subprocess.TimeoutExpired):
            self._process.kill()
            self._process.communicate()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()
