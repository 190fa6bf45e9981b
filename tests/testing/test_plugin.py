"""The pytest plugin in a project of its own that has vnetdp installed: fixtures, marker, reports; also with pytest-xdist."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

PROJECT = """
import pytest

from vnetdp import Endpoint, Fault, FrameEndpoint, Owner


class Mine(FrameEndpoint):
    name = "mine"

    def frame_received(self, frame, queue):
        return frame


class Loses(Mine):
    name = "loses"
    seen = 0

    def frame_received(self, frame, queue):
        self.seen += 1
        return None if self.seen == 100 else frame


@pytest.mark.vnet(endpoint=Mine, owner=["userspace", "thread", "vhost-user"], num=[16])
def test_passes(vnet, ledger):
    vnet.wait_for(50)
    assert (vnet.device.owner is Owner.USERSPACE) is (vnet.owner == "userspace")
    assert ledger.fates == []


@pytest.mark.vnet(endpoint=Mine, faults=["set_vring_num"])
def test_has_faults(vnet, faults):
    assert faults[0].hits == 1
    faults.append(Fault("set_backend"))
    vnet.change_owner()
    vnet.wait_for(50)


@pytest.mark.vnet(num=32)
class TestOfAClass:
    @pytest.mark.vnet(endpoint=Loses, quiet_s=0.3)
    def test_loses_a_frame(self, vnet):
        assert vnet.driver.num == 32
        vnet.wait_until(lambda: vnet.guest.sent > 200, "the frame is past")

    def test_without_an_endpoint(self, vnet):
        vnet.wait_for(50)


@pytest.mark.vnet(endpoint=Mine, num=3)
def test_cannot_be_set_up(vnet):
    pass


def test_of_something_else():
    pass
"""


def run(folder: Path, *args: str) -> subprocess.CompletedProcess[str]:
    (folder / "test_project.py").write_text(PROJECT)
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-p",
        "no:cacheprovider",
        "-p",
        "no:benchmark",
        "-W",
        "error",
        "-rA",
        *args,
    ]
    env = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST")}
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=280, check=False)


@pytest.mark.parametrize("args", [(), ("-n", "2", "-k", "not vhost-user")], ids=["alone", "xdist"])
def test_a_project_of_its_own_gets_fixtures_marker_and_reports(tmp_path: Path, args: tuple[str, ...]) -> None:
    done = run(tmp_path, "--vnet-history", "histories", *args)
    said = done.stdout
    outcomes = {
        (name, kind) for kind, name in re.findall(r"^(PASSED|FAILED|ERROR) test_project\.py::(\S+)", said, re.MULTILINE)
    }
    passed = {f"test_passes[{owner}-16]" for owner in ("userspace", "thread", *([] if args else ["vhost-user"]))}
    passed |= {"test_has_faults", "TestOfAClass::test_without_an_endpoint", "test_of_something_else"}
    assert outcomes == {(name, "PASSED") for name in passed} | {
        ("TestOfAClass::test_loses_a_frame", "FAILED"),
        ("test_cannot_be_set_up", "ERROR"),
    }, said
    assert (
        "frame 99 of pair 0 (guest to wire and back) was lost: avail index 99 of queue 1, taken by vhost (thread)"
        in said
    )
    assert "events of vnet" in said
    (history,) = (tmp_path / "histories").iterdir()
    events = [json.loads(line) for line in history.read_text().splitlines()]
    assert [event["number"] for event in events if event["event"] == "frame"] == [99]


FORGOTTEN = """
import pytest


@pytest.mark.vnet(num=16)
class TestOfAClass:
    def test_needs_none(self):
        pass

    @pytest.mark.vnet(owner="userspace")
    def test_forgot_the_fixture(self, tmp_path):
        pass
"""


def test_a_marker_on_a_test_without_the_fixture_is_an_error_of_the_collection(tmp_path: Path) -> None:
    (tmp_path / "test_forgotten.py").write_text(FORGOTTEN)
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-p", "no:benchmark", "-q"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 2, done.stdout
    assert "TestOfAClass::test_forgot_the_fixture: it has the marker vnet, and runs without one" in done.stdout
    assert "Traceback" not in done.stdout
    (tmp_path / "test_forgotten.py").write_text(FORGOTTEN.replace("tmp_path", "faults"))
    done = subprocess.run(
        [*command, "--collect-only"], cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stdout


def test_a_project_without_such_tests_loads_neither_numba_nor_numpy(tmp_path: Path) -> None:
    (tmp_path / "test_plain.py").write_text(
        "import sys\n\n\ndef test_nothing_is_loaded():\n    assert not {'numba', 'numpy'} & {*sys.modules}\n"
    )
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-p", "no:benchmark", "-q"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stdout
