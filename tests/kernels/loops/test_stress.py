"""Two threads, one ring of each direction between them, real memory order: every packet is numbered and checked.

Linux's ringtest is the model. About a million packets in all; 50 million with VNETDP_CAMPAIGN=1 (`make campaign`).
"""

from __future__ import annotations

import os
import threading
from dataclasses import dataclass

import pytest

from tests.kernels.rig import COMPILED, Rig
from vnetdp_kernels import rows as r
from vnetdp_kernels import spec

FULL = os.environ.get("VNETDP_CAMPAIGN") == "1"
TOTAL = 50_000_000 if FULL else 1_000_000
CORES = len(os.sched_getaffinity(0))
STUCK_MS = 60_000  # a side that has had nothing to do for so long was not woken


@dataclass(frozen=True)
class Shape:
    """How the rings are set up, how both sides wait, and its part of the packets."""

    num: int
    part: float
    size: int = 60
    event_idx: bool = True
    mergeable: bool = True
    hdr_len: int = spec.NET_HDR_LEN
    in_order: bool = False
    poll_us: int = -1  # for ever
    pairs: int = 1
    buf_len: int = 2048
    log: bool = False

    def __str__(self) -> str:
        words = [f"{self.num}", f"{self.size}B"]
        words += ["event_idx"] * self.event_idx + ["mergeable"] * self.mergeable + ["in_order"] * self.in_order
        words += ["legacy"] * (self.hdr_len != spec.NET_HDR_LEN) + ["log"] * self.log
        words.append({-1: "polling", 0: "sleeping"}.get(self.poll_us, f"poll{self.poll_us}us"))
        return "-".join(words + [f"{self.pairs}pairs"] * (self.pairs > 1))


SHAPES = [
    Shape(256, 0.25),
    Shape(256, 0.10, event_idx=False, mergeable=False),
    Shape(1, 0.02, poll_us=50),
    Shape(2, 0.04, event_idx=False, size=61, poll_us=50),
    Shape(8, 0.08, in_order=True, poll_us=200),
    Shape(64, 0.08, mergeable=False, hdr_len=spec.NET_HDR_LEN_LEGACY, size=117),
    Shape(1024, 0.10, size=1514, buf_len=256, log=True),
    Shape(32768, 0.05, buf_len=128),
    Shape(256, 0.10, pairs=3, buf_len=256),
    Shape(256, 0.08, poll_us=0),
    Shape(4, 0.02, poll_us=0),
    Shape(4, 0.02, poll_us=0, event_idx=False),
    Shape(16, 0.02, poll_us=20, in_order=True),
    Shape(64, 0.04, poll_us=0, event_idx=False, mergeable=False, pairs=2),
]


def run(loop: str, rig: Rig, budget: int, poll_us: int, outcomes: dict[str, tuple[int, int]]) -> None:
    outcomes[loop] = getattr(rig, loop)(budget, poll_us, STUCK_MS)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_stress(shape: Shape) -> None:
    """Both sides move all packets both ways; the ledgers know each, once, in order, and whole."""
    total = TOTAL if COMPILED else 40_000
    each = max(100, round(total * shape.part / 2 / shape.pairs))  # packets of a direction and a pair
    rig = Rig(
        shape.num, shape.pairs, event_idx=shape.event_idx, mergeable=shape.mergeable, hdr_len=shape.hdr_len,
        in_order=shape.in_order, buf_len=shape.buf_len if shape.size < shape.buf_len or shape.mergeable else 2048,
        device=r.KIND_GENERATE, guest=r.KIND_GENERATE, start=65500,
    )  # fmt: skip
    rig.open_eventfds()
    if shape.log:
        rig.memory.log_on()
    rig.device.eps[:, r.EP_SIZE] = shape.size
    rig.guest.eps[:, r.EP_SIZE] = min(shape.size, shape.buf_len - spec.NET_HDR_LEN)
    for side in (rig.device, rig.guest):
        side.eps[:, r.EP_LIMIT] = each
    for pair in range(shape.pairs):
        rig.post_receive(pair)
    budget = 2 * each * shape.pairs
    poll_us = shape.poll_us if CORES > 1 else 0  # two that poll on one core wait for the scheduler, not each other
    outcomes: dict[str, tuple[int, int]] = {}
    threads = [
        threading.Thread(target=run, args=(loop, rig, budget, poll_us, outcomes), daemon=True)
        for loop in ("serve", "drive")
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    rig.close()
    clean = [each, each] + [0] * (r.LEDGER_SLOTS - 2)
    for pair in range(shape.pairs):
        assert rig.device.ledger[2 * pair].tolist() == clean
        assert rig.guest.ledger[2 * pair + 1].tolist() == clean
    assert outcomes == {"serve": (r.LOOP_BUDGET, budget), "drive": (r.LOOP_BUDGET, budget)}
    assert rig.vqs[:, r.VQ_PACKETS].tolist() == [each] * len(rig.queues)
    assert rig.memory.intact()
