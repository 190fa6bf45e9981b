"""Processes that we start: each ends with its parent without a word, and none that is stopped is waited for, for ever."""

from __future__ import annotations

import json
import os
import pickle
import resource
import signal
import socket
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.support.by_hand import PATIENCE, no_descriptor_leaks, wait_for
from vnetdp.backends import process
from vnetdp.cli import main
from vnetdp.datapath.datapath import Datapath
from vnetdp.errors import WorkError
from vnetdp.lab import host
from vnetdp.lab.couple import Couple
from vnetdp.lab.host import HostProcess, Orders
from vnetdp.system import child
from vnetdp.system.poll import readable

LOOK = pickle.dumps(("look", ()))
PING = pickle.dumps((0, "ping"))


def _be_worker(sock: socket.socket) -> None:
    _, events = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    process.main((sock.detach(), events.detach(), os.dup(Datapath(1).block.fd)), 1, 0)


def _be_host(sock: socket.socket) -> None:
    host.main(sock.detach(), quiet=True)


@pytest.mark.parametrize(("main", "request_"), [(_be_worker, PING), (_be_host, LOOK)], ids=["worker", "host"])
def test_a_child_whose_parent_leaves_an_answer_unread_ends_quietly(
    main: Callable[[socket.socket], None], request_: bytes
) -> None:
    """Without the thread that ends a child beside its main thread: either may be first to see that the parent is gone."""
    with no_descriptor_leaks():
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # from Python 3.12 on, if threads run
            pid = os.fork()
        if pid == 0:
            try:
                ours.close()
                main(theirs)
                os._exit(0)
            except BaseException:  # noqa: BLE001 - nothing may pass: behind it are the tests
                os._exit(1)
        with ours, theirs:
            ours.send(request_)
            assert readable(ours, PATIENCE)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


def test_a_host_that_is_stopped_is_killed_and_so_is_one_that_it_waits_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "_STOPPED_S", 0.3)
    with no_descriptor_leaks(), HostProcess(quiet=True) as one, HostProcess(quiet=True) as other:
        for each in (one, other):
            os.kill(each.pid, signal.SIGSTOP)
        wait_for(lambda: child.stopped(one.pid) and child.stopped(other.pid), "both are stopped")
        answer = one.begin("look")
        with pytest.raises(WorkError, match=f"the host of process {one.pid} was stopped for 0 s, and was killed"):
            answer(other)
        assert not other.alive
        with pytest.raises(WorkError, match=f"the host of process {other.pid} was stopped"):
            other.call("look")


@pytest.mark.parametrize(
    ("number", "name"), [(signal.SIGTERM, "SIGTERM"), (signal.SIGRTMIN + 1, f"signal {signal.SIGRTMIN + 1}")]
)
def test_the_signal_that_ended_a_host_is_named(number: int, name: str) -> None:
    with no_descriptor_leaks(), HostProcess(quiet=True) as one:
        one.call("drop")
        os.kill(one.pid, number)
        for _ in range(2):
            with pytest.raises(WorkError, match=f"^the host of process {one.pid} was killed by {name}$"):
                one.call("drop")


@pytest.mark.parametrize(
    "command", [("migrate",), ("faults", "--only", "B1", "--traffic", "idle", "--queue-pairs", "1")]
)
def test_a_host_that_is_killed_at_work_is_exit_status_1_and_in_the_report(
    command: tuple[str, ...], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    migrate, killed = Couple.migrate, []

    def killing(couple: Couple, *args: Any, **orders: Any) -> Any:
        killed.append(couple.target.pid)
        os.kill(couple.target.pid, signal.SIGKILL)
        return migrate(couple, *args, **orders)

    monkeypatch.setattr(Couple, "migrate", killing)
    report = tmp_path / "report.json"
    with no_descriptor_leaks():
        assert main([*command, "--json", str(report)]) == 1
    said = f"the host of process {killed[0]} was killed by SIGKILL"
    assert said in report.read_text()
    assert said in "".join(capfd.readouterr())
    assert json.loads(report.read_text())


def test_a_demo_whose_migrated_machine_is_lost_ends_and_says_so(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    migrate = Couple.migrate
    monkeypatch.setattr(
        Couple, "migrate", lambda couple, policy: migrate(couple, policy, target=Orders(die_at="bound"))
    )
    report = tmp_path / "report.json"
    with no_descriptor_leaks():
        assert main(["demo", "--seconds", "0.01", "--json", str(report)]) == 1
    out = capfd.readouterr().out
    assert "NOT OK" in out
    assert "the migration's outcome is lost" in out
    assert json.loads(report.read_text())["migration"]["error"] in out


@pytest.mark.parametrize("command", ["migrate", "demo"])
def test_a_host_that_can_make_no_machine_while_another_runs_is_exit_status_1(
    command: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """It has no room for one: what the command did before is not undone by that."""
    migrate = Couple.migrate

    def without_room(couple: Couple, *args: Any, **orders: Any) -> Any:
        resource.prlimit(couple.target.pid, resource.RLIMIT_AS, (1 << 20, 1 << 20))
        return migrate(couple, *args, **orders)

    monkeypatch.setattr(Couple, "migrate", without_room)
    with no_descriptor_leaks():
        assert main([command, *(("--seconds", "0.01") if command == "demo" else ())]) == 1
    err = capfd.readouterr().err
    assert "Traceback" not in err
    assert "vnetdp: " in err
