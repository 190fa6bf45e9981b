"""DPDK's own driver, virtio_user, on `vnetdp serve`: testpmd sends captures through it, and records what comes back.

testpmd joins two ports: net_pcap, which reads a capture a queue and writes another, and net_virtio_user. It tries again
where a ring is full, each stream in a thread of its own: so every frame must come back, whatever the speed, in order
and byte for byte. What was negotiated is read from DPDK's log.
"""

from __future__ import annotations

import itertools
import os
import random
import re
import time
from pathlib import Path
from typing import Any

import pytest

from tests.interop.conftest import Serve
from tests.interop.peers import SIZES, exchanged, read_pcap, write_pcap
from vnetdp.bench.dpdk import Dpdk, cpu_list
from vnetdp.virtio import features as f

pytestmark = pytest.mark.interop

CAMPAIGN = os.environ.get("VNETDP_CAMPAIGN") == "1"
FRAMES = 3000  # a queue
PATIENCE = 60.0
SETS = {"small": [size for size in SIZES if size <= 1514], "jumbo": list(SIZES)}

# Everything, or a slice in which each value of a setting meets each value of every other.
SETTINGS: dict[str, list[Any]] = {
    "endpoint": ["echo", "macswap"],
    "mrg_rxbuf": [1, 0],
    "in_order": [0, 1],
    "queues": [1, 2],
    "queue_size": [256, 1024],
    "sizes": ["small", "jumbo"],
    "listener": ["serve", "testpmd"],
}
SLICE = [
    ("echo", 1, 0, 1, 256, "small", "serve"),
    ("macswap", 0, 1, 2, 1024, "jumbo", "serve"),
    ("echo", 0, 0, 2, 1024, "small", "testpmd"),
    ("macswap", 1, 1, 1, 256, "jumbo", "testpmd"),
    ("macswap", 0, 0, 1, 256, "small", "testpmd"),
    ("echo", 1, 1, 2, 1024, "jumbo", "testpmd"),
    ("macswap", 1, 0, 2, 256, "jumbo", "serve"),
    ("echo", 0, 1, 1, 1024, "small", "serve"),
    ("echo", 0, 0, 2, 256, "jumbo", "serve"),
    ("macswap", 1, 1, 1, 1024, "small", "serve"),
    ("echo", 0, 1, 2, 256, "small", "testpmd"),
    ("macswap", 1, 0, 1, 1024, "jumbo", "testpmd"),
]


def captures(folder: Path, queues: int, sizes: list[int]) -> list[list[bytes]]:
    """Write a capture for each queue, all bytes random, and return its frames."""
    chance = random.Random(1)
    written = []
    for queue in range(queues):
        frames = [chance.randbytes(sizes[n % len(sizes)]) for n in range(FRAMES)]
        write_pcap(folder / f"in{queue}.pcap", frames)
        written.append(frames)
    return written


def negotiated(log: str) -> int:
    found = re.search(r"features after negotiate = ([0-9a-f]+)", log)
    assert found, log
    return int(found[1], 16)


def test_the_slice_has_every_pair_of_values() -> None:
    for (i, a), (j, b) in itertools.combinations(enumerate(SETTINGS.values()), 2):
        assert set(itertools.product(a, b)) == {(row[i], row[j]) for row in SLICE}


@pytest.mark.parametrize(tuple(SETTINGS), list(itertools.product(*SETTINGS.values())) if CAMPAIGN else SLICE)
def test_every_frame_comes_back_byte_for_byte(
    serve: Serve,
    tmp_path: Path,
    *,
    endpoint: str,
    mrg_rxbuf: int,
    in_order: int,
    queues: int,
    queue_size: int,
    sizes: str,
    listener: str,
) -> None:
    frames = captures(tmp_path, queues, SETS[sizes])
    _, socket = serve(endpoint, listener == "testpmd")
    files = ",".join(f"rx_pcap={tmp_path}/in{q}.pcap,tx_pcap={tmp_path}/out{q}.pcap" for q in range(queues))
    device = f"net_virtio_user0,path={socket},queue_size={queue_size},mrg_rxbuf={mrg_rxbuf},in_order={in_order}"
    device += f",queues={queues},cq={int(queues > 1)}"
    args = [f"--rxq={queues}", f"--txq={queues}"]
    if listener == "testpmd":
        device += ",server=1"
    if sizes == "jumbo" and not mrg_rxbuf:
        args += ["--max-pkt-len=9000", "--mbuf-size=9600"]
    with Dpdk(
        [f"net_pcap0,{files}", device], tmp_path, [cpu_list()] * 2 * queues, args=args,
        eal=["--log-level=pmd.net.virtio.init:debug"],
    ) as testpmd:  # fmt: skip
        testpmd.wait()
        testpmd.ask("set fwd io retry")
        testpmd.ask("set burst tx delay 1 retry 10000000")
        started = testpmd.ask("start")
        assert "streams=" + str(2 * queues) in started, started
        until = time.monotonic() + PATIENCE
        while (back := testpmd.figures(0)["TX-packets"]) < FRAMES * queues:
            assert time.monotonic() < until, f"only {back} frames are back; {testpmd.figures(1)}"
            time.sleep(0.05)
        assert testpmd.figures(1)["RX-packets"] == testpmd.figures(1)["TX-packets"] == FRAMES * queues
    features = negotiated(testpmd.log)
    assert bool(features & f.VIRTIO_NET_F_MRG_RXBUF) == bool(mrg_rxbuf)
    assert bool(features & f.VIRTIO_F_IN_ORDER) == bool(in_order)
    assert bool(features & f.VIRTIO_NET_F_MQ) == (queues > 1)
    for queue, sent in enumerate(frames):
        wanted = [exchanged(frame) for frame in sent] if endpoint == "macswap" else sent
        assert read_pcap(tmp_path / f"out{queue}.pcap") == wanted
