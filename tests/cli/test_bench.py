"""What benchmarks do about failures: one costs no other its result, and each is said in words."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Never

import pytest

from tests.project.test_package import here, python
from vnetdp.bench import link, migration, ring
from vnetdp.bench.report import finish
from vnetdp.cli import main
from vnetdp.endpoints import loopback
from vnetdp.endpoints.loopback import GenerateEndpoint, Ledger, drained
from vnetdp_kernels import rows as r


def fail(*_: Any) -> Never:
    raise ring.CountError(str(Ledger(sent=1003, delivered=1000, lost=3)))


def test_a_measurement_that_fails_leaves_the_others(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    row: dict[str, Any] = {"name": "some figure", "mpps": 1.5}
    monkeypatch.setattr(ring, "one_core", lambda *_: [row])
    monkeypatch.setattr(ring, "logging_cost", fail)
    monkeypatch.setattr(ring, "two_cores", lambda *_: [row])
    monkeypatch.setattr(ring, "handovers", lambda *_: row)
    assert main(["bench", "ring"]) == 1
    said = capsys.readouterr().out
    assert said.count("1.500 Mpps") == 4
    assert "failed: 1,003 sent, 1,000 delivered, 3 lost, 0 duplicated, 0 reordered, 0 corrupted" in said


def test_nothing_measured_is_an_error(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    skipped = {"name": "link", "peer": "x", "skipped": "run as root; TAPs are refused"}
    monkeypatch.setattr(link, "run", lambda *_: [skipped] * 3)
    assert main(["bench", "link"]) == 2
    assert capsys.readouterr().err == "vnetdp: nothing can be measured here: run as root; TAPs are refused\n"


class Clock:
    """Time that passes in sleeps alone; in each of the first ones a frame arrives."""

    def __init__(self, other: GenerateEndpoint, arrive: int) -> None:
        self._other, self._arrive = other, arrive
        self._now = 0.0

    def monotonic(self) -> float:
        return self._now

    def sleep(self, _seconds: float) -> None:
        self._now += 0.4
        self._other.ledger[0, r.LEDGER_DELIVERED] += self._arrive > 0
        self._arrive -= 1


@pytest.mark.parametrize(("asked", "made"), [([], 20), (["--rounds", "5"], 5)])
def test_migrations_are_measured_as_often_as_asked(
    monkeypatch: pytest.MonkeyPatch, asked: list[str], made: int
) -> None:
    rounds: list[int] = []

    def run(n: int, _say: Callable[[str], None]) -> list[dict[str, Any]]:
        rounds.append(n)
        return []

    monkeypatch.setattr(migration, "run", run)
    assert main(["bench", "migration", *asked]) == 0
    assert rounds == [made]


def test_queue_pairs_are_not_printed_as_bytes() -> None:
    lines: list[str] = []
    finish(
        "migration", [{"name": "destination work, delta, 4 pairs", "queue_pairs": 4, "us": 90.0}], None, lines.append
    )
    assert lines[-1].split() == ["destination", "work,", "delta,", "4", "pairs", "90.000", "µs"]


def test_drawing_leaves_the_backend_of_a_notebook_alone(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    code = """
import json, sys
import matplotlib
matplotlib.use("svg")
from vnetdp.bench.report import finish
finish("ring", [{"name": "a figure", "mpps": 1.5}], "picture.png", lambda _line: None)
print(json.dumps([matplotlib.get_backend(), "matplotlib.pyplot" in sys.modules]))
"""
    assert python(code, tmp_path, PYTHONPATH=here()) == ["svg", False]
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("arrive", [10, 7])
def test_drained_waits_as_long_as_frames_arrive(arrive: int, monkeypatch: pytest.MonkeyPatch) -> None:
    with GenerateEndpoint() as one, GenerateEndpoint() as other:
        one.rows[0, r.EP_SEQ] = 10
        monkeypatch.setattr(loopback, "time", Clock(other, arrive))
        ledger = drained(one, other, quiet_s=0.5)
        assert one.finished
        assert ledger == Ledger(sent=10, delivered=arrive, lost=10 - arrive)
