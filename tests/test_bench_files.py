"""The files in bench/ run, each once: so that they do not rot. Their figures are `make bench`'s affair."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

BENCH = Path(__file__).parents[1] / "bench"


@pytest.mark.skipif(not BENCH.exists(), reason="bench/ is in the checkout only")
def test_they_run() -> None:
    command = [sys.executable, "-m", "pytest", "-q", "--benchmark-disable", str(BENCH)]
    done = subprocess.run(command, cwd=BENCH.parent, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "skipped" not in done.stdout
