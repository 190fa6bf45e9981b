"""The main job on real input: two namespaces, two TAPs, and TCP that does not notice who runs the rings.

The owner is switched all the time. A slice by default; with VNETDP_CAMPAIGN=1 a minute of TCP both ways, 200 MB by HTTP,
and 1,000 hand-overs.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.support.by_hand import wait_for
from vnetdp.bench.netns import ADDRESSES, NetnsPair, why_no_netns
from vnetdp.device.owners import Owner
from vnetdp.endpoints.tap import TapEndpoint
from vnetdp.programs.link import Link

CAMPAIGN = os.environ.get("VNETDP_CAMPAIGN") == "1"
SECONDS = 60 if CAMPAIGN else 2
SWITCHES = 1000 if CAMPAIGN else 60
FILE_MB = 200 if CAMPAIGN else 20
INTERFACE = "link0"


@pytest.fixture
def spaces() -> Iterator[NetnsPair]:
    if (missing := why_no_netns()) is not None:
        pytest.skip(missing)
    with NetnsPair() as pair:
        yield pair


@pytest.fixture(params=["vhost", "vhost-process"])
def link(spaces: NetnsPair, request: pytest.FixtureRequest) -> Iterator[Link]:
    with ExitStack() as stack:
        ends = [stack.enter_context(TapEndpoint(INTERFACE, netns=spaces.names[side])) for side in ("a", "b")]
        link = stack.enter_context(Link(ends[0], ends[1], request.param))
        spaces.configure(INTERFACE)
        yield link


class Switching:
    """Switches the owner evenly over *seconds*, *count* times, in a thread."""

    def __init__(self, link: Link, count: int, seconds: float) -> None:
        self._link = link
        self._pause = seconds / count
        self._count = count
        self._thread = threading.Thread(target=self._run)

    def _run(self) -> None:
        for _ in range(self._count):
            self._link.switch()
            time.sleep(self._pause)

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *exc: object) -> None:
        self._thread.join()


def serve_iperf3(spaces: NetnsPair) -> None:
    """Start an iperf3 server for one client, and wait until it listens."""
    spaces.popen("b", ["iperf3", "-s", "-1"])

    def listens() -> bool:
        lines = [line.split() for line in spaces.run("b", ["sh", "-c", "cat /proc/net/tcp*"]).splitlines()]
        return any((words[1][-5:], words[3]) == (":1451", "0A") for words in lines)

    wait_for(listens, "iperf3 listens on port 5201")


def tcp_trouble(spaces: NetnsPair) -> dict[str, int]:
    """Resets and failures that TCP counted, both sides.

    A SYN+ACK that is sent again after a second, as on a busy machine, is counted as an error, and as TCPSYNChallenge too.
    """
    told = ("EstabResets", "OutRsts", "AttemptFails", "InErrs", "InCsumErrors")
    counters = dict.fromkeys(told, 0)
    for side in ("a", "b"):
        lines = [line.split() for line in spaces.run(side, ["cat", "/proc/net/snmp", "/proc/net/netstat"]).splitlines()]
        counted: dict[str, int] = {}
        for table in ("Tcp:", "TcpExt:"):
            names, values = (line[1:] for line in lines if line[0] == table)
            counted.update(zip(names, map(int, values), strict=True))
        for name in told:
            counters[name] += counted[name]
        counters["InErrs"] -= counted["TCPSYNChallenge"]
    return counters


def assert_healthy(link: Link, handovers: int) -> None:
    report = link.report()
    assert report["errors"] == []
    assert report["fallbacks"] == 0
    assert report["handovers"] >= handovers
    for side in ("left", "right"):
        dropped = {key: value for key, value in report[side].items() if key.startswith("dropped_") and value}
        # Frames that arrive before the other interface is up are refused by it (EIO).
        assert not set(dropped) - {"dropped_error"}, dropped


def test_ping_both_ways(spaces: NetnsPair, link: Link) -> None:
    if shutil.which("ping") is None:
        pytest.skip("ping (iputils-ping) isn't installed")
    with Switching(link, 40, 2.0):
        for side, other in (("a", "b"), ("b", "a")):
            # With a deadline it goes on until so many are answered: else it gives the last ones two round trips, no more.
            ping = ["ping", "-c", "100", "-w", "60", "-i", "0.01", "-s", "1400", ADDRESSES[other]]
            said = spaces.run(side, ping, timeout=120)
            answered = [int(number) for number in re.findall(r"icmp_seq=(\d+)", said)]
            assert answered == list(range(1, len(answered) + 1)), said
            assert len(answered) >= 100, said
    assert_healthy(link, 40)


def test_tcp_both_ways_at_once(spaces: NetnsPair, link: Link) -> None:
    if shutil.which("iperf3") is None:
        pytest.skip("iperf3 isn't installed")
    serve_iperf3(spaces)
    client = spaces.popen("a", ["iperf3", "-c", ADDRESSES["b"], "-t", "3600", "--bidir"])
    with Switching(link, SWITCHES, SECONDS):
        pass
    enough = 10_000_000 * SECONDS
    ends = (link.left, link.right)
    wait_for(lambda: all(end.counters()["bytes_from_wire"] > enough for end in ends), f"{enough} bytes each way")
    # Before its end: iperf3 itself resets connections whose other side still sends.
    assert client.poll() is None
    assert not any(tcp_trouble(spaces).values()), tcp_trouble(spaces)
    assert_healthy(link, SWITCHES)


def test_a_file_by_http(spaces: NetnsPair, link: Link, tmp_path: Path) -> None:
    content = os.urandom(1 << 20) * FILE_MB
    (tmp_path / "file").write_bytes(content)
    spaces.popen("b", [sys.executable, "-m", "http.server", "8000", "--bind", "0.0.0.0", "-d", str(tmp_path)])
    fetch = (
        "import hashlib, sys, time, urllib.error, urllib.request\n"
        "for attempt in range(300):\n"
        "    try:\n"
        "        response = urllib.request.urlopen(sys.argv[1], timeout=60)\n"
        "        break\n"
        "    except urllib.error.URLError:\n"
        "        time.sleep(0.1)\n"
        "sha = hashlib.sha256()\n"
        "while block := response.read(1 << 18):\n"
        "    sha.update(block)\n"
        "    time.sleep(0.002)\n"
        "print(sha.hexdigest())\n"
    )
    url = f"http://{ADDRESSES['b']}:8000/file"
    with Switching(link, SWITCHES, FILE_MB / 50):
        said = spaces.run("a", [sys.executable, "-c", fetch, url], timeout=120)
    assert said.strip() == hashlib.sha256(content).hexdigest()
    assert tcp_trouble(spaces)["EstabResets"] == 0
    assert_healthy(link, SWITCHES)


def test_several_queue_pairs(spaces: NetnsPair) -> None:
    if shutil.which("iperf3") is None:
        pytest.skip("iperf3 isn't installed")
    with ExitStack() as stack:
        ends = [stack.enter_context(TapEndpoint(INTERFACE, 2, netns=spaces.names[side])) for side in ("a", "b")]
        link = stack.enter_context(Link(ends[0], ends[1], "vhost", queue_pairs=2))
        spaces.configure(INTERFACE)
        serve_iperf3(spaces)
        client = ["iperf3", "-c", ADDRESSES["b"], "-n", "64M", "-P", "16", "-J"]
        with Switching(link, 20, 1.0):
            said = json.loads(spaces.run("a", client, timeout=120))
        # All was given to the sockets; the count of received bytes may be taken while most of it waits there.
        assert said["end"]["sum_sent"]["bytes"] >= 64 << 20
        assert link.device.owner in (Owner.VHOST, Owner.USERSPACE)
        used = [index for index, queue in enumerate(link.device.counters()) if queue["packets"] > 100]
        assert len(used) >= 3, "sixteen flows stayed on one queue pair"
        assert_healthy(link, 20)


def test_a_tap_that_goes_down_or_away_costs_only_its_frames(spaces: NetnsPair) -> None:
    with ExitStack() as stack:
        ends = [stack.enter_context(TapEndpoint(INTERFACE, netns=spaces.names[side])) for side in ("a", "b")]
        link = stack.enter_context(Link(ends[0], ends[1], "vhost"))
        spaces.configure(INTERFACE)
        ping = ["ping", "-q", "-c", "20", "-i", "0.01", "-w", "60", ADDRESSES["b"]]
        spaces.run("a", ping, timeout=120)
        spaces.ip("b", f"link set dev {INTERFACE} down")
        with pytest.raises(Exception, match=r"100% packet loss|exit status"):
            spaces.run("a", ["ping", "-q", "-c", "20", "-i", "0.01", "-w", "1", ADDRESSES["b"]])
        spaces.ip("b", f"link set dev {INTERFACE} up")
        spaces.run("a", ping, timeout=120)
        assert link.report()["errors"] == []
        spaces.ip("b", f"link delete {INTERFACE}")
        sleeps = int(link.driver.ctl[2])
        time.sleep(0.3)
        assert int(link.driver.ctl[2]) - sleeps < 100, "the driver's loop does not sleep any more"
        assert link.switch() is Owner.USERSPACE
