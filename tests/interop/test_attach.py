"""The README's commands that attach guests, run as they stand there: a reader's shell finds what this machine has.

Only names are other ones, so that two runs can't meet: the namespace, and the folder of the socket. A guest gets one
more console, to take commands.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.by_hand import wait_for
from tests.test_docs import README, blocks, only

from .guests import images
from .guests.machine import REPOSITORY, Console, Guest, end, why_no_guest

pytestmark = [pytest.mark.interop, pytest.mark.timeout(240)]

RUN_HERE = {"wire", "wire, meanwhile", "qemu", "guest", "uml", "virtio_user, serve", "virtio_user", "net_vhost"}
RUN_HERE |= {"net_vhost, drive"}


class Shell:
    """A reader's terminals: programs put into `bin` are found, and *names* stand for those of the page."""

    def __init__(self, folder: Path, names: dict[str, str]) -> None:
        self.folder = folder
        self._names = {"/tmp/net.sock": f"{folder}/net.sock", **names}
        (folder / "bin").mkdir()
        self.program("vnetdp", f'exec "{sys.executable}" -m vnetdp "$@"')
        self._env = {**os.environ, "PATH": f"{folder}/bin:{os.environ['PATH']}", "PYTHONPATH": str(REPOSITORY)}
        self._env |= {"RUNTIME_DIRECTORY": str(folder)}  # DPDK's, which leaves files behind

    def program(self, name: str, text: str) -> None:
        path = self.folder / "bin" / name
        path.write_text(f"#!/bin/sh\n{text}\n")
        path.chmod(0o755)

    def text(self, test: str) -> str:
        text = only(test).text
        for name, mine in self._names.items():
            text = text.replace(name, mine)
        return text

    def run(self, test: str) -> str:
        """Run a block to its end, and return what it prints."""
        done = subprocess.run(
            ["sh", "-eu", "-c", self.text(test)], cwd=self.folder, env=self._env, capture_output=True, text=True,
            timeout=60, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return done.stdout + done.stderr

    @contextmanager
    def running(self, test: str, *fds: int, stdin: int = subprocess.DEVNULL) -> Iterator[Running]:
        """Run the last command of a block for the length of the `with` block, after those before it."""
        text = self.text(test).replace("\\\n", " ")
        *before, last = text.splitlines()
        log = self.folder / f"{test}.log"
        with log.open("wb") as out:
            process = subprocess.Popen(
                ["sh", "-eu", "-c", "\n".join([*before, f"exec {last}"])], cwd=self.folder, env=self._env, stdin=stdin,
                stdout=out, stderr=out, pass_fds=fds, start_new_session=True,
            )  # fmt: skip
        running = Running(process, log)
        try:
            yield running
        finally:
            end(process, signal.SIGKILL)


class Running:
    """A program that runs, and what it printed."""

    def __init__(self, process: subprocess.Popen[bytes], log: Path) -> None:
        self.process = process
        self._log = log

    def said(self) -> str:
        return self._log.read_text(errors="replace")

    def wait_until_it_says(self, text: str) -> None:
        wait_for(lambda: text in self.said() or self.process.poll() is not None, text)
        assert text in self.said(), self.said()

    def interrupt(self) -> str:
        """Press ^C; return all that it printed. Its end must be a good one."""
        assert self.process.poll() is None, self.said()
        self.process.send_signal(signal.SIGINT)
        assert self.process.wait(30) == 0, self.said()
        return self.said()


@pytest.fixture
def shell(tmp_path: Path) -> Shell:
    return Shell(tmp_path, {"lab": f"vnetdp-lab-{os.getpid()}"})


def test_every_command_of_the_section_is_run_here() -> None:
    lines = README.read_text().splitlines()
    began = lines.index("## Attach a real guest")
    ended = next(n for n in range(began + 1, len(lines)) if lines[n].startswith("## "))
    assert {block.test for block in blocks(README) if began < block.line < ended} == RUN_HERE


# --- guests ---


@pytest.fixture
def wire(shell: Shell) -> Iterator[Running]:
    if (missing := why_no_guest("ping")) is not None:
        pytest.skip(missing)
    try:
        with shell.running("wire") as serve:
            serve.wait_until_it_says("serving")
            shell.run("wire, meanwhile")
            yield serve
    finally:
        subprocess.run(["ip", "netns", "delete", f"vnetdp-lab-{os.getpid()}"], check=False)


def link(folder: Path, image: images.Image) -> None:
    (folder / "vmlinuz").symlink_to(image.kernel)
    (folder / "initrd").symlink_to(image.initrd)


def assert_attached(shell: Shell, guest: Guest, serve: Running, mac: str) -> None:
    guest.boot()
    assert " 0% packet loss" in guest.run(" && ".join(shell.text("guest").splitlines()))
    assert guest.run("cat /sys/class/net/eth0/address").strip() == mac
    assert "refused" not in serve.said()


def test_qemu(shell: Shell, wire: Running) -> None:
    try:
        emulator, image = images.qemu(), images.pc()
    except images.MissingError as e:
        pytest.skip(str(e))
    link(shell.folder, image)
    environment = " ".join(f"{name}={value}" for name, value in emulator.environment.items())
    # The first serial line, which -nographic would give it, has to be said once a second one is. Its boot ROM is in a
    # package that was not fetched.
    shell.program(
        "qemu-system-x86_64",
        f'{environment} exec {emulator.binary} {" ".join(emulator.arguments)} "$@" '
        f"-global virtio-net-pci.romfile= -serial mon:stdio -serial unix:{shell.folder}/line,server=on,wait=off",
    )
    with shell.running("qemu"), Guest(shell.folder, "qemu") as guest:
        line = socket.socket(socket.AF_UNIX)
        wait_for(lambda: line.connect_ex(str(shell.folder / "line")) == 0, "QEMU runs")
        guest.console = Console(line)
        assert_attached(shell, guest, wire, "52:54:00:00:00:02")


def test_user_mode_linux(shell: Shell, wire: Running) -> None:
    try:
        image = images.uml()
    except images.MissingError as e:
        pytest.skip(str(e))
    link(shell.folder, image)
    ours, theirs = socket.socketpair()
    fd = theirs.fileno()
    shell.program(
        "linux.uml", f'TMPDIR=/dev/shm exec {image.kernel} "$@" uml_dir={shell.folder} con=null con1=fd:{fd},fd:{fd}'
    )
    nobody, terminal = os.openpty()
    with theirs, shell.running("uml", fd, stdin=terminal), Guest(shell.folder, "uml") as guest:
        guest.console = Console(ours)
        assert_attached(shell, guest, wire, "52:54:00:12:34:56")
        guest.console.send("poweroff -f")
        time.sleep(1)  # its helpers lead groups of their own, and end with it
    os.close(nobody)
    os.close(terminal)


# --- DPDK ---


@pytest.fixture
def dpdk_shell(shell: Shell, dpdk: None) -> Shell:
    return shell


def packets(said: str, way: str) -> int:
    """Return the last count that testpmd printed."""
    return int(said.rpartition(f"{way}-packets:")[2].split()[0])


def test_virtio_user(dpdk_shell: Shell) -> None:
    with dpdk_shell.running("virtio_user, serve") as serve:
        serve.wait_until_it_says("serving")
        with dpdk_shell.running("virtio_user") as testpmd:
            testpmd.wait_until_it_says("Port statistics")
            wait_for(
                lambda: "RX-packets:" in testpmd.said() and packets(testpmd.said(), "RX") > 1000, "frames are back"
            )
            said = testpmd.interrupt()
        assert packets(said, "TX") > 0
        assert "served 1 front ends" in serve.interrupt()
    assert "refused" not in serve.said()


def test_net_vhost(dpdk_shell: Shell) -> None:
    with dpdk_shell.running("net_vhost") as testpmd:
        wait_for(lambda: (dpdk_shell.folder / "net.sock").exists(), "testpmd listens")
        assert "sent 20,000, received 20,000" in dpdk_shell.run("net_vhost, drive")
        said = testpmd.interrupt()
    assert packets(said, "RX") == packets(said, "TX") == 20_000
