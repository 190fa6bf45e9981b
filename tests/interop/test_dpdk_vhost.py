"""`vnetdp drive` on DPDK's own back end, net_vhost, whose testpmd sends back what it receives.

It tries again where a ring is full, so nothing may be lost, whatever the speed. The generator checks each frame that
comes back but for its addresses; those are seen in captures, which are compared byte for byte. What was negotiated is
read from DPDK's log.
"""

from __future__ import annotations

import itertools
import os
import random
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.interop.peers import SIZES, Command, driven, exchanged, read_pcap, write_pcap
from vnetdp.bench.dpdk import Dpdk, cpu_list
from vnetdp.endpoints.loopback import GenerateEndpoint
from vnetdp.endpoints.pcap import PcapEndpoint
from vnetdp.virtio import features as f

pytestmark = [pytest.mark.interop, pytest.mark.usefixtures("dpdk")]

CAMPAIGN = os.environ.get("VNETDP_CAMPAIGN") == "1"
FRAMES = 50_000  # a queue

# Everything, or a slice in which each value of a setting meets each value of every other.
SETTINGS: dict[str, list[Any]] = {
    "forward": ["io", "macswap"],
    "mrg_rxbuf": [True, False],
    "in_order": [True, False],
    "pairs": [1, 2],
    "ring": [256, 1024],
    "size": [64, 1500, 9000],
    "listener": ["testpmd", "drive"],
}
SLICE = [
    ("io", True, True, 1, 256, 64, "testpmd"),
    ("macswap", False, False, 2, 1024, 64, "drive"),
    ("io", False, True, 2, 256, 1500, "drive"),
    ("macswap", True, False, 1, 1024, 1500, "testpmd"),
    ("io", False, False, 1, 1024, 9000, "drive"),
    ("macswap", True, True, 2, 256, 9000, "testpmd"),
    ("io", True, False, 2, 256, 64, "drive"),
    ("macswap", False, True, 1, 1024, 64, "testpmd"),
    ("macswap", False, False, 1, 256, 1500, "drive"),
    ("io", True, True, 2, 1024, 1500, "testpmd"),
    ("io", False, False, 2, 1024, 9000, "testpmd"),
    ("macswap", True, True, 1, 256, 9000, "drive"),
]


def test_the_slice_has_every_pair_of_values() -> None:
    for (i, a), (j, b) in itertools.combinations(enumerate(SETTINGS.values()), 2):
        assert set(itertools.product(a, b)) == {(row[i], row[j]) for row in SLICE}


@contextmanager
def back_end(folder: Path, forward: str, pairs: int = 1, connect: bool = False, retry: bool = True) -> Iterator[Dpdk]:
    """Run testpmd as a back end on the socket `s` in *folder*, forwarding."""
    vdev = f"net_vhost0,iface={folder}/s,queues={pairs},client={int(connect)}"
    args = [f"--rxq={pairs}", f"--txq={pairs}", "--disable-link-check"]
    with Dpdk([vdev], folder, [cpu_list()] * pairs, args=args, eal=["--log-level=lib.vhost.config:info"]) as testpmd:
        testpmd.wait()
        testpmd.ask(f"set fwd {forward}{' retry' if retry else ''}")
        if retry:
            testpmd.ask("set burst tx delay 1 retry 10000000")
        testpmd.ask("start")
        yield testpmd
        testpmd.ask("stop")


def without(mrg_rxbuf: bool, in_order: bool) -> str:
    names = [name for name, wanted in (("mrg_rxbuf", mrg_rxbuf), ("in_order", in_order)) if not wanted]
    return ",".join(f"-{name}" for name in names)


def negotiated(log: str) -> int:
    found = re.findall(r"negotiated Virtio features: (0x[0-9a-f]+)", log)
    assert found, log
    return int(found[0], 16)


@pytest.mark.parametrize(tuple(SETTINGS), list(itertools.product(*SETTINGS.values())) if CAMPAIGN else SLICE)
def test_every_frame_comes_back(
    tmp_path: Path, forward: str, mrg_rxbuf: bool, in_order: bool, pairs: int, ring: int, size: int, listener: str
) -> None:
    listen = listener == "drive"
    features = without(mrg_rxbuf, in_order)
    with back_end(tmp_path, forward, pairs, listen) as testpmd, GenerateEndpoint(pairs, size, count=FRAMES) as guest:
        report = driven(guest, tmp_path / "s", features, listen=listen, queue_pairs=pairs, num=ring)
        assert testpmd.figures(0)["RX-packets"] == testpmd.figures(0)["TX-packets"] == FRAMES * pairs
    assert report["tx_packets"] == report["rx_packets"] == FRAMES * pairs
    assert report["bad_packets"] == 0
    assert {key: report["ledger"][key] for key in ("lost", "reordered")} == {"lost": 0, "reordered": 0}
    agreed = negotiated(testpmd.log)
    assert bool(agreed & f.VIRTIO_NET_F_MRG_RXBUF) == mrg_rxbuf
    assert bool(agreed & f.VIRTIO_F_IN_ORDER) == in_order


@pytest.mark.parametrize("mrg_rxbuf", [True, False])
@pytest.mark.parametrize("forward", ["io", "macswap"])
def test_a_capture_comes_back_byte_for_byte(tmp_path: Path, forward: str, mrg_rxbuf: bool) -> None:
    chance = random.Random(1)
    frames = [chance.randbytes(SIZES[n % len(SIZES)]) for n in range(3000)]
    write_pcap(tmp_path / "in.pcap", frames)
    with back_end(tmp_path, forward), PcapEndpoint(tmp_path / "in.pcap", tmp_path / "out.pcap") as guest:
        report = driven(guest, tmp_path / "s", without(mrg_rxbuf, True))
    assert report["tx_packets"] == report["rx_packets"] == len(frames)
    assert read_pcap(tmp_path / "out.pcap") == ([exchanged(x) for x in frames] if forward == "macswap" else frames)


def test_nothing_is_lost_below_saturation_though_nobody_tries_again(tmp_path: Path) -> None:
    # A ring of 1024 at this rate holds what comes in a tenth of a second: either side may be kept from running so long.
    with back_end(tmp_path, "macswap", retry=False), GenerateEndpoint(rate=10_000, count=20_000) as guest:
        report = driven(guest, tmp_path / "s", num=1024)
    assert (report["tx_packets"], report["rx_packets"], report["bad_packets"]) == (20_000, 20_000, 0)


def test_front_ends_come_and_go(tmp_path: Path) -> None:
    with back_end(tmp_path, "macswap", pairs=2):
        for pairs in (1, 2, 1):
            args = [f"--queue-pairs={pairs}", "--count=5000", "--socket", str(tmp_path / "s")]
            with Command(tmp_path, "drive", "drive", "generate", *args) as command:
                report = command.finish()
            assert (report["rx_packets"], report["bad_packets"]) == (5000 * pairs, 0)
