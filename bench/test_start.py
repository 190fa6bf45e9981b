"""How long does a user wait: for the import, for `--help`, and for the first packet with the kernels compiled already?"""

from __future__ import annotations

import subprocess
import sys

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

STARTS = {
    "nothing": ["-c", "pass"],
    "import": ["-c", "import vnetdp"],
    "help": ["-m", "vnetdp", "--help"],
    "first packet": ["-m", "vnetdp", "link", "generate:count=1", "generate:count=1"],
}


@pytest.mark.parametrize("what", STARTS)
def test_start(benchmark: BenchmarkFixture, what: str) -> None:
    def start() -> int:
        return subprocess.run([sys.executable, *STARTS[what]], capture_output=True, check=False).returncode

    assert benchmark.pedantic(start, rounds=3) == 0  # type: ignore[no-untyped-call]
