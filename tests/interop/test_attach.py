"""The commands of README and docs/attach.md that attach guests, as they stand: a shell finds the programs of this machine.

Only names are other ones, so that two runs can't meet: the namespace, and the folder of the socket.
"""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
import sys
import tty
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.project.test_docs import README, ROOT, blocks, only
from tests.support.by_hand import wait_for

from .guests import images
from .guests.machine import REPOSITORY, end, why_no_guest

pytestmark = [pytest.mark.interop, pytest.mark.timeout(240)]

IN_README = {"reflect", "qemu", "guest"}
IN_ATTACH = {"guests", "wire", "wire, meanwhile", "uml", "virtio_user, serve", "virtio_user"}
IN_ATTACH |= {"net_vhost", "net_vhost, drive"}


class Shell:
    """A reader's terminals: programs put into `bin` are found, and *names* stand for those of the page."""

    def __init__(self, folder: Path, names: dict[str, str]) -> None:
        self.folder = folder
        self._names = {"/tmp/net.sock": f"{folder}/net.sock", **names}
        (folder / "bin").mkdir()
        self.program("vnetdp", f'exec "{sys.executable}" -m vnetdp "$@"')
        self._env = {**os.environ, "PATH": f"{folder}/bin:{folder}:{os.environ['PATH']}", "PYTHONPATH": str(REPOSITORY)}
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

    def run(self, test: str, check: bool = True) -> str:
        """Run a block to its end, which is a good one if *check* says so, and return what it prints."""
        done = subprocess.run(
            ["sh", "-eu", "-c", self.text(test)], cwd=self.folder, env=self._env, capture_output=True, text=True,
            timeout=60, check=False,
        )  # fmt: skip
        assert done.returncode == 0 or not check, done.stderr
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


def test_every_command_of_section_and_page_is_run_here() -> None:
    lines = README.read_text().splitlines()
    began = lines.index("## Attach a guest")
    ended = next(n for n in range(began + 1, len(lines)) if lines[n].startswith("## "))
    assert {block.test for block in blocks(README) if began < block.line < ended} == IN_README
    page = blocks(ROOT / "docs" / "attach.md")
    assert {block.test for block in page if block.language == "sh"} == IN_ATTACH


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


@pytest.fixture
def guests(shell: Shell) -> None:
    """Put guests where the reader has them: in the folder that the commands are run in."""
    try:
        images.put_into(shell.folder)
    except images.MissingError as e:
        pytest.skip(str(e))
    shell.program("linux.uml", f'TMPDIR=/dev/shm exec {shell.folder}/linux.uml "$@" uml_dir={shell.folder}')


def assert_attached(shell: Shell, test: str, serve: Running, mac: str) -> None:
    """Start a guest at a terminal of ours, and type what a reader types there."""
    ours, theirs = os.openpty()
    tty.setraw(theirs)  # nothing is echoed: what is found in the log, the guest has said
    with shell.running(test, stdin=theirs) as guest:
        guest.wait_until_it_says(" # ")
        for command in (*shell.text("guest").splitlines(), "cat /sys/class/net/eth0/address"):
            os.write(ours, f"{command}\n".encode())
        guest.wait_until_it_says(" 0% packet loss")
        guest.wait_until_it_says(mac)
        os.write(ours, b"poweroff -f\n")
        assert guest.process.wait(30) == 0, guest.said()
    os.close(ours)
    os.close(theirs)
    assert "refused" not in serve.said()


def test_the_folder_of_guests_has_what_the_commands_name(shell: Shell, guests: None) -> None:
    named = shell.text("guests").split()[3]
    assert f"cd {named}" in shell.text("guests")
    for test in ("qemu", "uml"):
        words = shlex.split(shell.text(test).replace("\\\n", " "))
        files = [
            words[0],
            *(word.removeprefix("initrd=") for word in words if re.fullmatch("vmlinuz|(initrd=)?initrd.*", word)),
        ]
        assert len(files) == (3 if test == "qemu" else 2)
        for name in files:
            assert (shell.folder / name).exists(), name


def test_qemu(shell: Shell, wire: Running, guests: None) -> None:
    assert_attached(shell, "qemu", wire, "52:54:00:00:00:02")


def test_qemu_and_reflect(shell: Shell, guests: None) -> None:
    with shell.running("reflect") as serve:
        serve.wait_until_it_says("serving")
        assert_attached(shell, "qemu", serve, "52:54:00:00:00:02")


def test_user_mode_linux(shell: Shell, wire: Running, guests: None) -> None:
    assert_attached(shell, "uml", wire, "52:54:00:12:34:56")


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
        assert "served 1 front end," in serve.interrupt()
    assert "refused" not in serve.said()


def test_net_vhost(dpdk_shell: Shell) -> None:
    with dpdk_shell.running("net_vhost") as testpmd:
        wait_for(lambda: (dpdk_shell.folder / "net.sock").exists(), "testpmd listens")
        report = dpdk_shell.run("net_vhost, drive", check=False)
        said = testpmd.interrupt()
    # testpmd receives before it may send: on a busy machine it drops its first burst. No other packet may be missing.
    back = packets(said, "TX")
    assert packets(said, "RX") == 20_000
    assert f"sent 20,000, received {back:,}" in report, said
    assert back >= 20_000 - 3 * 32
