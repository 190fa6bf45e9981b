"""The files in bench/ run, each once: so that they do not rot. Their figures are `make bench`'s affair."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.by_hand import COMPILED
from vnetdp.bench.netns import why_no_netns

BENCH = Path(__file__).parents[2] / "bench"


@pytest.mark.skipif(not COMPILED, reason="a benchmark of plain Python measures nothing")
@pytest.mark.skipif(not BENCH.exists(), reason="bench/ is in the checkout only")
def test_they_run() -> None:
    command = [sys.executable, "-m", "pytest", "-q", "--benchmark-disable", str(BENCH)]
    done = subprocess.run(command, cwd=BENCH.parent, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "skipped" not in done.stdout or why_no_netns()
