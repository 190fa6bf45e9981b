"""`drive`, when its back end dies, hangs or sends frames of its own: what it says, waits for, and reports."""

from __future__ import annotations

import signal
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

from tests.programs.test_drive_serve import served
from tests.support.by_hand import PATIENCE, no_descriptor_leaks, wait_for
from tests.support.vhost_user import serve
from tests.vhost_user.card import hang
from vnetdp.cli import commands
from vnetdp.endpoints.base import Endpoint
from vnetdp.endpoints.fault import FaultEndpoint
from vnetdp.endpoints.loopback import EchoEndpoint, GenerateEndpoint, NullEndpoint
from vnetdp.guest.driver import Driver
from vnetdp.programs import drive as drive_module
from vnetdp.programs.drive import drive
from vnetdp.vhost_user.front_end import watch
from vnetdp.vhost_user.front_end.front_end import VhostUserFrontEnd
from vnetdp_kernels import rows as r


class Driving:
    """`drive` in a thread: what it says, and its report."""

    def __init__(self, endpoint: Endpoint, path: Path, **options: Any) -> None:
        self.said: list[str] = []
        self.report: dict[str, Any] = {}
        self.stop = threading.Event()
        self._endpoint = endpoint
        self._front_ends: list[VhostUserFrontEnd] = []
        self._thread = threading.Thread(target=self._run, args=(path, options))
        self._thread.start()

    def _run(self, path: Path, options: dict[str, Any]) -> None:
        with patch.object(drive_module, "VhostUserFrontEnd", self._front_end):
            self.report = drive(self._endpoint, str(path), self.stop.is_set, self.said.append, **options)

    def _front_end(self, *args: Any, **options: Any) -> VhostUserFrontEnd:
        self._front_ends.append(VhostUserFrontEnd(*args, **options))
        return self._front_ends[0]

    def hang(self, process: subprocess.Popen[bytes]) -> None:
        """Have the back end hang, which shows as soon as it is asked something."""
        hang(process, self._front_ends[0])

    def says(self, text: str) -> None:
        wait_for(lambda: any(text in line for line in tuple(self.said)), text)

    def got(self, frames: int) -> None:
        wait_for(lambda: self._endpoint.counters()["to_wire"] >= frames, f"{frames} frames came back")

    def finish(self) -> dict[str, Any]:
        self._thread.join(PATIENCE)
        return self.report


@contextmanager
def back_end(path: Path) -> Iterator[subprocess.Popen[bytes]]:
    process = serve(str(path), path.with_name("log"))
    try:
        yield process
    finally:
        process.kill()
        process.wait()


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A socket. Frames on their way are not waited for once driving is to end."""
    monkeypatch.setattr(drive_module, "_SETTLE_S", 0.1)
    with no_descriptor_leaks():
        yield tmp_path / "s"


def test_a_back_end_that_is_lost_is_said_and_waited_for_as_the_first_one_was(path: Path) -> None:
    with GenerateEndpoint(rate=1000.0) as endpoint:
        with back_end(path):
            driving = Driving(endpoint, path, wait_s=PATIENCE)
            driving.got(10)
        driving.says(
            f"{path}: the back end is gone: its connection was lost; waiting up to 60 s for the next one on that socket"
        )
        with back_end(path):
            driving.says(f"driving {path} again, over connection 2")
            driving.got(endpoint.counters()["to_wire"] + 10)
            driving.stop.set()
            report = driving.finish()
    assert report["errors"] == []
    assert report["connections"] == 2


def test_driving_ends_with_a_report_and_the_next_step_once_no_back_end_came_back(path: Path) -> None:
    with GenerateEndpoint(rate=1000.0) as endpoint:
        with EchoEndpoint() as wire, served(wire, path):
            driving = Driving(endpoint, path, wait_s=3.0)
            driving.got(10)
        report = driving.finish()
    step = f"start one: vnetdp serve macswap --socket {path}"
    error = f"{path}: no back end came back within 3 s: the socket does not exist: {step}"
    assert report["errors"] == [error]
    assert driving.said[-2:] == [f"{path}: the socket does not exist; waiting", f"vnetdp: {error}"]
    assert report["tx_packets"] >= report["rx_packets"] >= 10
    assert report["ledger"]["lost"] == report["tx_packets"] - report["rx_packets"]


def test_a_back_end_that_ends_when_all_came_back_is_not_waited_for(path: Path) -> None:
    with GenerateEndpoint(count=10) as endpoint:
        with EchoEndpoint() as wire, served(wire, path):
            driving = Driving(endpoint, path, wait_s=PATIENCE)
            driving.got(10)
        report = driving.finish()
    assert report["errors"] == []
    assert report["ledger"]["delivered"] == 10


def test_ending_without_a_back_end_is_an_error_though_nothing_is_counted(path: Path) -> None:
    with NullEndpoint() as endpoint:
        with GenerateEndpoint() as wire, served(wire, path):
            driving = Driving(endpoint, path, wait_s=PATIENCE)
            driving.got(10)
        driving.says("the back end is gone")
        driving.stop.set()
        assert driving.finish()["errors"] == [f"{path}: no back end was connected at the end"]


@pytest.mark.parametrize("asked", [True, False])
def test_a_back_end_that_hangs_is_one_line_with_its_socket_and_the_next_step(
    path: Path, asked: bool, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is noticed when driving ends, and before that if nothing moves any more."""
    monkeypatch.setattr(watch, "_STILL_S", PATIENCE if asked else 0.1)
    with GenerateEndpoint() as endpoint, back_end(path) as process:
        driving = Driving(endpoint, path, wait_s=PATIENCE)
        driving.got(10)
        driving.hang(process)
        if not asked:
            driving.says(f"{path}: the back end hangs; waiting up to 60 s for the next one on that socket")
            driving.says(f"{path}: the previous back end hangs, and may still use the rings; waiting")
        driving.stop.set()
        report = driving.finish()
        process.send_signal(signal.SIGCONT)
    line = (
        f"{path}: the back end hangs: it has not answered for 10 s; its rings are fenced, as it may still use them: "
        "end it, or let it go on"
    )
    assert [record.getMessage() for record in caplog.records] == [line]
    assert report["errors"] == [line]


def test_a_back_end_that_hung_and_goes_on_is_driven_again(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch, "_STILL_S", 0.1)
    with GenerateEndpoint() as endpoint, back_end(path) as process:
        driving = Driving(endpoint, path, wait_s=PATIENCE)
        driving.got(10)
        driving.hang(process)
        driving.says("the back end hangs")
        process.send_signal(signal.SIGCONT)
        driving.says(f"driving {path} again")
        driving.got(endpoint.counters()["to_wire"] + 10)
        driving.stop.set()
        report = driving.finish()
    assert report["errors"] == []


def test_a_back_end_that_does_not_move_frames_but_answers_is_left_alone(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watch, "_STILL_S", 0.02)
    asked: list[int] = []
    look = watch.Watch._look_alive

    def count(self: watch.Watch, moved: int) -> None:
        look(self, moved)
        asked.append(moved)

    monkeypatch.setattr(watch.Watch, "_look_alive", count)
    with NullEndpoint() as endpoint, EchoEndpoint() as wire, served(wire, path) as server:
        driving = Driving(endpoint, path, wait_s=PATIENCE)
        wait_for(lambda: len(asked) > 5, "it is asked again and again")
        driving.stop.set()
        report = driving.finish()
        assert server.served == 1
    assert report["errors"] == []


@pytest.mark.parametrize("mine", [1000.0, 0.0])
def test_frames_of_a_back_end_that_generates_are_no_answers(path: Path, mine: float) -> None:
    """None of ours is lost then, nor is less than none."""
    with GenerateEndpoint(rate=mine, count=1000) as endpoint, GenerateEndpoint() as wire, served(wire, path):
        driving = Driving(endpoint, path, wait_s=PATIENCE)
        driving.got(5000)
        driving.stop.set()
        report = driving.finish()
    assert "ledger" not in report
    assert report["rx_packets"] >= 5000
    assert report["bad_packets"] == 0
    assert report["errors"] == []


def test_a_ring_that_the_back_end_breaks_ends_driving_with_a_report(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with GenerateEndpoint(rate=1000.0) as endpoint, EchoEndpoint() as wire, served(wire, path):
        check = Driver.check

        def break_ring(self: Driver) -> None:
            if endpoint.counters()["to_wire"] > 10:
                self.dvqs[0, r.DVQ_STATUS] = r.E_USED_ID
            check(self)

        monkeypatch.setattr(Driver, "check", break_ring)
        driving = Driving(endpoint, path, wait_s=PATIENCE)
        report = driving.finish()
    assert report["errors"] == [f"{path}: the back end broke queue 0: the device used a chain that is not in flight"]
    assert driving.said[-1] == f"vnetdp: {report['errors'][0]}"


@pytest.mark.parametrize("ends", ["signal", "seconds", "count"])
def test_frames_that_an_answering_back_end_loses_are_a_failure_however_driving_ends(path: Path, ends: str) -> None:
    count = 50 if ends == "count" else -1
    with (
        GenerateEndpoint(rate=1000.0, count=count) as endpoint,
        FaultEndpoint(EchoEndpoint(), drop=0.5) as wire,
        served(wire, path),
        patch.multiple(drive_module, _LOSS_S=0.5, _SETTLE_S=PATIENCE),
    ):
        driving = Driving(endpoint, path, wait_s=PATIENCE, seconds=0.5 if ends == "seconds" else None)
        if ends == "signal":
            driving.got(10)
            driving.stop.set()
        report = driving.finish()
    assert report["ledger"]["lost"] == report["ledger"]["sent"] - report["ledger"]["delivered"] > 0
    assert commands._status(report) == 1
