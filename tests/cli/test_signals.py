"""How a signal ends each command: asked to by the first, at once by the second, with its report and with nothing left."""

from __future__ import annotations

import fcntl
import json
import os
import select
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

import vnetdp
import vnetdp_kernels
from tests.cli import test_cli
from tests.support.by_hand import COMPILED, stand_still, wait_for
from tests.support.shell import Shell
from tests.support.zygote import popen
from vnetdp.system import signals

INT, TERM, HUP = signal.SIGINT, signal.SIGTERM, signal.SIGHUP
shell = test_cli.shell

_CATCHES_ALL = """
while True:
    try:
        time.sleep(1000)
    except BaseException:
        pass
"""


class Command:
    """A command in a session of its own, and what it says."""

    def __init__(self, shell: Shell, *args: str, **options: Any) -> None:
        self._shell = shell
        self.process = shell.start(*args, "--json", "report.json", start_new_session=True, **options)
        self.said: list[str] = []

    def says(self, text: str, where: str = "stderr") -> None:
        """Return once it has said *text*."""
        stream = getattr(self.process, where)
        while not self.said or text not in self.said[-1]:
            assert select.select([stream], [], [], 240)[0], f"it did not say {text!r}: {self.said}"
            self.said.append(stream.readline())
            assert self.said[-1], f"it ended, and did not say {text!r}: {self.said}"

    def group(self, number: int) -> None:
        """Send a signal to all of its session, as a terminal does."""
        os.killpg(self.process.pid, number)

    def insist(self, number: int) -> None:
        """Send a signal again and again until it has ended, as people do: at first that asks nothing more."""
        for _ in range(200):
            self.group(number)
            with suppress(subprocess.TimeoutExpired):
                self.process.wait(0.3)
                return
        raise AssertionError("it never ended")

    def ends(self, *status: int) -> dict[str, Any]:
        """Return its report once it has ended, and every process of it has."""
        done = self._shell.finish(self.process)
        assert done.returncode in status, done.stderr
        report: dict[str, Any] = json.loads((self._shell.folder / "report.json").read_text())
        assert not any(path.is_socket() for path in self._shell.folder.iterdir())
        return report


def there(shell: Shell, name: str) -> Callable[[], bool]:
    return (shell.folder / name).exists


# --- asked to end ---


def test_a_server_whose_terminal_is_closed_ends_as_by_sigterm(shell: Shell) -> None:
    command = Command(shell, "serve", "macswap", "--socket", "s")
    command.says("serving")
    command.group(HUP)
    assert command.ends(0)["served"] == 0


def test_a_bridge_of_two_guests_ends_and_removes_both_sockets(shell: Shell) -> None:
    command = Command(shell, "link", "vhost-user:left", "vhost-user:right")
    command.says("joining")
    command.group(HUP)
    assert command.ends(0)["served"] == [0, 0]


def test_a_signal_that_comes_twice_at_once_is_one_request(shell: Shell) -> None:
    command = Command(shell, "serve", "macswap", "--socket", "s")
    command.says("serving")
    command.process.send_signal(TERM)
    command.group(TERM)  # timeout(1) does both
    assert command.ends(0, -TERM)["served"] == 0  # -TERM: the second one comes when all is done


_WORKS_ON = """
import signal, time
from vnetdp.system import signals
with signals.handled() as ending, ending.at_work(dict):
    signal.raise_signal(signal.SIGTERM)
    signal.raise_signal(signal.{second})
    time.sleep(1.5 * signals._TOGETHER_S)  # work that takes longer
    print("done")
"""


@pytest.mark.parametrize("second", ["SIGTERM", "SIGHUP"])
def test_a_pair_of_signals_lets_long_work_come_to_its_end(second: str) -> None:
    """timeout(1) sends one twice, and systemd SIGHUP behind SIGTERM."""
    code = _WORKS_ON.format(second=second)
    with popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as process:
        assert process.communicate(timeout=60) == ("done\n", None)
        assert process.returncode == 0


def test_a_front_end_that_waits_for_a_back_end_can_be_ended(shell: Shell) -> None:
    command = Command(shell, "drive", "generate", "--listen", "--socket", "s", "--wait", "1000")
    wait_for(there(shell, "s"), "it listens")
    command.group(TERM)
    assert command.ends(128 + TERM) == {"ended_by": "SIGTERM"}


def test_a_migration_can_be_ended_with_both_its_processes(shell: Shell) -> None:
    command = Command(shell, "migrate", "--repeat", "1000000", "--no-check")
    wait_for(lambda: len(shell.processes()) == 3, "it has started both")
    command.group(INT)
    assert command.ends(128 + INT)["ended_by"] == "SIGINT"


def test_a_demo_reports_the_phases_that_it_came_to(shell: Shell) -> None:
    command = Command(shell, "demo", "--seconds", "1000")
    command.says("both ways at once", "stdout")
    command.group(INT)
    assert command.ends(128 + INT) == {"ok": False, "phases": [], "ended_by": "SIGINT"}


def test_under_nohup_a_hangup_stays_ignored(shell: Shell) -> None:
    command = Command(shell, "serve", "null", "--socket", "s", preexec_fn=lambda: signal.signal(HUP, signal.SIG_IGN))
    command.says("serving")
    masks = dict(
        line.split(":\t")
        for line in Path(f"/proc/{command.process.pid}/status").read_text().splitlines()
        if ":\t" in line
    )
    assert int(masks["SigIgn"], 16) >> HUP - 1 & 1
    assert all(int(masks["SigCgt"], 16) >> number - 1 & 1 for number in (INT, TERM))
    command.group(TERM)
    command.ends(0)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can make a namespace of processes")
def test_as_the_first_process_of_a_container_it_hears_signals_too(shell: Shell) -> None:
    code = "import os, sys; os.execvp('unshare', ['unshare', '--pid', '--fork', '--kill-child', *sys.argv[1:]])"
    outer = subprocess.Popen(
        [sys.executable, "-c", code, sys.executable, "-m", "vnetdp", "serve", "null", "--socket", "s", "--json", "r"],
        cwd=shell.folder,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert outer.stderr is not None
        assert "serving" in outer.stderr.readline()
        (inner,) = map(int, Path(f"/proc/{outer.pid}/task/{outer.pid}/children").read_text().split())
        os.kill(inner, TERM)
        assert outer.wait(60) == 0
        assert json.loads((shell.folder / "r").read_text())["served"] == 0
        assert not (shell.folder / "s").exists()
    finally:
        outer.kill()
        outer.communicate()


# --- deaf: what blocks ---


def test_a_second_signal_ends_what_a_function_of_the_users_holds_up(shell: Shell) -> None:
    (shell.folder / "stuck.py").write_text(
        "import pathlib, threading\n"
        "def answer(packet):\n    pathlib.Path('called').touch()\n    threading.Event().wait()\n"
    )
    command = Command(shell, "link", "scapy:stuck:answer", "generate")
    command.says("linked")  # the function may be called before, and there is no report of a link then
    wait_for(there(shell, "called"), "the function is called")
    command.group(INT)
    command.insist(TERM)
    report = command.ends(128 + TERM)
    assert report["ended_by"] == "SIGTERM"
    assert report["right"]["from_wire"] > 0


def test_a_second_signal_ends_a_worker_that_was_stopped_too(shell: Shell) -> None:
    command = Command(shell, "link", "generate", "generate", "--datapath", "vhost-process")
    command.says("linked")
    for pid in set(shell.processes()) - {command.process.pid}:
        stand_still(pid)
    os.kill(command.process.pid, INT)
    command.insist(TERM)
    command.ends(0, 1, 128 + TERM)  # 0, 1: on a machine that takes 2 s for it, as the worker is given up then


def _stop(shell: Shell, command: Command) -> int:
    """Stop the one process that *command* has started, and return its id."""
    (pid,) = set(shell.processes()) - {command.process.pid}
    stand_still(pid)  # the kernel wakes it, if its parent dies, only if all of its threads have stopped by then
    return pid


def test_a_worker_that_was_stopped_is_given_two_seconds_and_costs_no_frame(shell: Shell) -> None:
    command = Command(shell, "link", "generate:rate=1000", "generate", "--datapath", "vhost-process")
    command.says("linked")
    pid = _stop(shell, command)
    os.kill(command.process.pid, INT)
    command.says(f"the worker process {pid} did not answer within")
    report = command.ends(0, 1)
    assert report["owner"] == "userspace"
    assert f"the worker process {pid} did not answer" in report["fallback"]
    assert report["ledger"]["sent"] > 0
    # One that is killed may have moved a batch each way that it had not published yet.
    assert abs(report["ledger"]["lost"]) + report["ledger"]["duplicated"] <= 2 * 64


def test_a_worker_that_hangs_is_given_up_after_the_time_that_was_asked_for(shell: Shell) -> None:
    args = ("link", "generate:rate=1000", "generate", "--datapath", "vhost-process", "--worker-timeout", "0.5")
    command = Command(shell, *args)
    command.says("linked")
    pid = _stop(shell, command)
    command.says(f"the worker process {pid} did not answer within")
    os.kill(command.process.pid, INT)
    assert command.ends(0, 1)["owner"] == "userspace"


@pytest.mark.parametrize(
    ("body", "numbers"),
    [("time.sleep(1000)", [INT]), (_CATCHES_ALL, [INT, TERM])],
    ids=["that sleeps", "that catches everything"],
)
def test_a_module_of_the_users_does_not_keep_it_from_ending(shell: Shell, body: str, numbers: list[int]) -> None:
    (shell.folder / "stuck.py").write_text(f"import pathlib, time\npathlib.Path('imported').touch()\n{body}\n")
    command = Command(shell, "link", "scapy:stuck:answer", "null")
    wait_for(there(shell, "imported"), "the module is imported")
    for number in numbers:
        command.group(number)
    assert command.ends(*(128 + number for number in numbers))["ended_by"] in ("SIGINT", "SIGTERM")


@pytest.mark.skipif(not COMPILED, reason="nothing is compiled")
def test_while_another_run_compiles_it_says_so_and_either_can_be_ended(
    shell: Shell, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for package in (vnetdp, vnetdp_kernels):  # away from what is compiled already
        source = Path(str(package.__file__)).parent
        shutil.copytree(source, tmp_path / "copy" / source.name, ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "copy"))
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(tmp_path / "cache"))
    (tmp_path / "there").mkdir()
    first = Command(Shell(tmp_path / "there"), "link", "null", "null")
    try:
        first.says("compiling the kernels")
        first.group(signal.SIGSTOP)
        second = Command(Shell(shell.folder), "link", "null", "null")
        second.says("waiting for another command")
        second.group(INT)
        assert second.ends(128 + INT) == {"ended_by": "SIGINT"}
        first.group(TERM)
        first.group(signal.SIGCONT)
        assert first.ends(128 + TERM) == {"ended_by": "SIGTERM"}
    finally:
        first.process.kill()
        first.process.communicate()


def test_a_lock_that_another_run_holds_is_told_of_and_no_reason_not_to_end(
    shell: Shell, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where all that was looked for is compiled already."""
    source = Path(str(vnetdp_kernels.__file__)).parent
    cache = tmp_path / source.name / "__pycache__"
    shutil.copytree(source, cache.parent)
    cache.mkdir(exist_ok=True)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.delenv("NUMBA_CACHE_DIR", raising=False)
    with open(cache / "compiling.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        command = Command(Shell(shell.folder), "link", "null", "null")
        command.says(f"waiting for another command, which compiles the kernels and holds {lock.name}")
        command.group(HUP)
        assert command.ends(128 + HUP) == {"ended_by": "SIGHUP"}


_AS_IT_LOADS = """
import importlib.abc, signal, sys
import vnetdp
assert signal.getsignal(signal.SIGINT) is signal.{found}, "a library leaves signals alone"

class Finder(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name == "vnetdp.cli.parser":
            signal.raise_signal(signal.SIGINT)

sys.meta_path.insert(0, Finder())
from vnetdp.__main__ import main
sys.argv = ["vnetdp", "--version"]
main()
"""


@pytest.mark.parametrize(
    ("found", "status", "says"),
    [("default_int_handler", -INT, ""), ("SIG_IGN", 0, f"vnetdp {vnetdp.__version__}\n")],
    ids=["as usual", "ignored"],
)
def test_a_command_that_is_still_being_loaded_ends_without_a_word(found: str, status: int, says: str) -> None:
    def surroundings() -> None:
        signal.signal(INT, signal.SIG_IGN if found == "SIG_IGN" else signal.SIG_DFL)

    code = _AS_IT_LOADS.format(found=found)
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, preexec_fn=surroundings, timeout=240, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (status, says, "")


# --- what outlives a command ---


@pytest.mark.parametrize(
    "args",
    [("link", "generate", "generate", "--datapath", "vhost-process"), ("migrate", "--repeat", "1000000")],
    ids=["a worker", "two hosts"],
)
def test_no_process_outlives_a_command_that_was_killed(shell: Shell, args: tuple[str, ...]) -> None:
    process = shell.start(*args)
    wait_for(lambda: len(shell.processes()) > 1, "it has started another process")
    process.kill()
    shell.finish(process)  # also without a traceback of those that it started


def test_a_worker_that_was_stopped_does_not_outlive_a_command_that_was_killed(shell: Shell) -> None:
    command = Command(shell, "link", "generate:rate=1000", "generate", "--datapath", "vhost-process")
    command.says("linked")
    _stop(shell, command)
    command.process.kill()
    shell.finish(command.process)


def test_what_was_to_be_removed_is_removed_when_a_signal_ends_the_command(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    signals.at_end((tmp_path / "file").unlink)
    ending = signals.Ending()
    assert ending.give_up(TERM) == 128 + TERM
    signals.no_more_at_end((tmp_path / "file").unlink)
    ending.close()
    assert not (tmp_path / "file").exists()


_GOES_ON = """
import pathlib, signal, threading
from vnetdp.system import signals
file = pathlib.Path("file")
made = threading.Event()
def write(report):
    made.wait()
    while file.exists():
        pass
with signals.handled() as ending, ending.compiling(), ending.reporting(dict, write):
    signal.raise_signal(signal.SIGTERM)
    signals._ends.wait()
    file.touch()
    made.set()
    signals.at_end(file.unlink)
    print("goes on with what was removed", flush=True)
"""


def test_what_is_made_while_the_process_is_being_ended_is_removed_too(tmp_path: Path) -> None:
    with popen([sys.executable, "-c", _GOES_ON], cwd=tmp_path, stdout=subprocess.PIPE, text=True) as process:
        assert process.communicate(timeout=60) == ("", None)
        assert process.returncode == 128 + TERM
    assert not list(tmp_path.iterdir())
