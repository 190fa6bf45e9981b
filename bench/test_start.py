"""How long does a user wait for the import, for `--help` and for the first packet, and how much memory does a link take?

The kernels are compiled already. Memory is the proportional set size (smaps_rollup's Pss) of all of a link's processes.
"""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from vnetdp.bench.netns import ADDRESSES, NetnsPair, why_no_netns
from vnetdp.programs.link import DATAPATHS

TAP = "start0"
MOST_MIB = 250
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

    assert benchmark.pedantic(start, rounds=10, warmup_rounds=1) == 0  # type: ignore[no-untyped-call]


def mib(pid: int, kind: str) -> float:
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
        if line.startswith(f"{kind}:"):
            return int(line.split()[1]) / 1024
    raise AssertionError(f"smaps_rollup has no {kind}")


def family(pid: int) -> list[int]:
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [pid, *(descendant for child in children for descendant in family(int(child)))]


@pytest.fixture
def spaces() -> Iterator[NetnsPair]:
    """Two namespaces whose TAPs and addresses are there already: what remains to be waited for is the link.

    Each knows the other's MAC address: a ping that is not even sent, since ARP got no answer for 3 s, would end with that.
    """
    if (missing := why_no_netns()) is not None:
        pytest.skip(missing)
    if shutil.which("ping") is None:
        pytest.skip("ping (iputils-ping) isn't installed")
    with NetnsPair() as pair:
        for side in ADDRESSES:
            pair.add_tap(side, TAP)
        pair.configure(TAP)
        for side, other in (("a", "b"), ("b", "a")):
            mac = json.loads(pair.ip(other, f"-json link show dev {TAP}"))[0]["address"]
            pair.ip(side, f"neighbour replace {ADDRESSES[other]} lladdr {mac} dev {TAP} nud permanent")
        yield pair


@pytest.mark.parametrize("datapath", DATAPATHS)
def test_link_between_taps(benchmark: BenchmarkFixture, spaces: NetnsPair, datapath: str) -> None:
    taps = [f"tap:{TAP},netns={spaces.names[side]}" for side in ADDRESSES]
    links: list[subprocess.Popen[bytes]] = []

    def end() -> None:
        while links:
            links[-1].send_signal(signal.SIGINT)
            links.pop().wait(30)

    def until_answered() -> None:
        command = [sys.executable, "-m", "vnetdp", "link", *taps, "--datapath", datapath]
        links.append(subprocess.Popen(command, stdout=subprocess.DEVNULL))
        # It asks anew every 10 ms, and ends with the first answer.
        spaces.run("a", ["ping", "-q", "-i", "0.01", "-c", "1", "-w", "30", ADDRESSES["b"]])

    try:
        benchmark.pedantic(until_answered, setup=end, rounds=5)  # type: ignore[no-untyped-call]
        spaces.run("a", ["ping", "-q", "-f", "-c", "20000", "-w", "30", "-s", "1400", ADDRESSES["b"]])
        pids = family(links[0].pid)
        pss = sum(mib(pid, "Pss") for pid in pids)
        benchmark.extra_info |= {"pss_mib": round(pss), "rss_mib": [round(mib(pid, "Rss")) for pid in pids]}
        assert pss < MOST_MIB
    finally:
        end()
