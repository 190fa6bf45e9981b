"""The files in bench/ run, each once: so that they do not rot. Their figures are `make bench`'s affair.

A link between TAPs, of processes that are started, runs on one datapath by default; on each with VNETDP_CAMPAIGN=1.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.by_hand import CAMPAIGN, COMPILED
from vnetdp.bench.netns import why_no_netns
from vnetdp.programs.link import DATAPATHS

BENCH = Path(__file__).parents[2] / "bench"


@pytest.mark.skipif(not COMPILED, reason="a benchmark of plain Python measures nothing")
@pytest.mark.skipif(not BENCH.exists(), reason="bench/ is in the checkout only")
def test_they_run() -> None:
    command = [sys.executable, "-m", "pytest", "-q", "--benchmark-disable", str(BENCH)]
    if not CAMPAIGN:
        command += [f"--deselect=bench/test_start.py::test_link_between_taps[{other}]" for other in DATAPATHS[1:]]
    done = subprocess.run(command, cwd=BENCH.parent, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "skipped" not in done.stdout or why_no_netns()
    assert CAMPAIGN or f"{len(DATAPATHS) - 1} deselected" in done.stdout
