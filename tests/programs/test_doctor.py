"""The doctor: it says what is there, and what to do about the rest. What is missing here is taken away for real."""

from __future__ import annotations

import ctypes
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.support.by_hand import no_descriptor_leaks
from vnetdp.programs import doctor

_PR_CAPBSET_DROP = 24
_CAP_NET_ADMIN = 12
_CAP_SYS_ADMIN = 21

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can give up capabilities for a child")


def report_of(tmp_path: Path, before: Callable[[], None] | None = None, **env: str) -> tuple[int, dict[str, Any], str]:
    """Run the doctor in a child; return its exit status, its report and what it printed."""
    path = tmp_path / "report.json"
    child = subprocess.run(
        [sys.executable, "-m", "vnetdp", "doctor", "--json", str(path)],
        preexec_fn=before,
        env={**os.environ, **env},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert "Traceback" not in child.stderr, child.stderr
    return child.returncode, json.loads(path.read_text()), child.stdout + child.stderr


def check(report: dict[str, Any], name: str) -> dict[str, Any]:
    found: list[dict[str, Any]] = [one for one in report["checks"] if one["name"] == name]
    assert len(found) == 1, f"{name}: {found}"
    return found[0]


def test_report_and_lines_say_the_same() -> None:
    lines: list[str] = []
    report = doctor.run(lines.append)
    assert set(report) == {"ok", "checks"}
    for one in report["checks"]:
        assert set(one) == {"name", "ok", "required", "detail", "advice"}
        assert one["detail"]
        assert any(one["name"] in line and one["detail"] in line for line in lines)
        assert one["ok"] or one["advice"], f"{one['name']} is missing, and nobody is told what to do"
    names = [one["name"] for one in report["checks"]]
    assert len(names) == len(set(names))
    assert {"python", "numba", "memfd", "numba cache", "cores", "python-pytun", "tun"} < set(names)
    assert {"network namespaces", "hugepages", "vhost-net", "iperf3", "dpdk-testpmd", "tshark"} < set(names)


def test_where_the_tests_run_all_that_is_required_is_there() -> None:
    report = doctor.run(lambda _line: None)
    assert report["ok"]
    assert all(one["ok"] for one in report["checks"] if one["required"])


def test_it_leaves_no_descriptor_and_no_interface_behind() -> None:
    doctor.run(lambda _line: None)  # the first run imports
    with no_descriptor_leaks():
        doctor.run(lambda _line: None)
    assert not Path("/sys/class/net/doctor0").exists()


def test_a_peer_that_is_not_installed(tmp_path: Path) -> None:
    status, report, _ = report_of(tmp_path, PATH=str(tmp_path))
    iperf3 = check(report, "iperf3")
    assert not iperf3["ok"]
    assert "apt-get install iperf3" in iperf3["advice"]
    assert status == 0, "a peer is not required"


def test_without_the_jit_it_says_so(tmp_path: Path) -> None:
    status, report, _ = report_of(tmp_path, NUMBA_DISABLE_JIT="1")
    assert status == 0
    assert "NUMBA_DISABLE_JIT" in check(report, "numba")["detail"]
    assert "NUMBA_DISABLE_JIT" in check(report, "numba cache")["detail"]


def test_a_cold_cache(tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    status, report, _ = report_of(tmp_path, NUMBA_CACHE_DIR=str(cache), NUMBA_DISABLE_JIT="0")
    assert status == 0
    assert check(report, "numba cache")["detail"].startswith(f"cold, in {cache}")
    assert not list(cache.rglob("*.nbi")), "looking compiled something"


@needs_root
def test_without_rights_tap_and_namespaces_are_missing_and_userspace_still_runs(tmp_path: Path) -> None:
    libc = ctypes.CDLL(None)

    def give_up() -> None:
        for capability in (_CAP_NET_ADMIN, _CAP_SYS_ADMIN):
            libc.prctl(_PR_CAPBSET_DROP, capability, 0, 0, 0)

    status, report, said = report_of(tmp_path, give_up)
    assert status == 0
    assert report["ok"]
    tun = check(report, "tun")
    assert not tun["ok"]
    assert not check(report, "network namespaces")["ok"]
    if Path("/dev/net/tun").exists():
        assert "ip tuntap add" in tun["advice"]
    assert tun["advice"] in said
