"""Compare the speed of two checkouts: `vnetdp bench ring` or `bench peers` of each, in turns, row by row.

    python bench/compare.py OLD NEW ring --rounds 9

OLD and NEW are checkouts with an environment (`make .venv/installed`). A round runs both, in changing order, and takes the
ratio of their rates. The median of the rounds counts; beside it is the ratio of the best rates, which compares the machine's
best moments. The time that a cache line takes from core to core changes within seconds on some machines: it is measured
around each run, and rounds whose runs differ in it are left out.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np

from vnetdp.system.output import tell
from vnetdp_kernels.platform.atomic import Bytes, load_u16_acquire, store_u16_release
from vnetdp_kernels.platform.jit import kernel

_PASSES = 100_000
_UNLIKE = 2  # lines that differ by more than this are of two states
_Rates = dict[str, float]


@kernel
def _pass_line(word: Bytes, turn: int, passes: int) -> None:
    """Pass a cache line to the other thread and have it back, *passes* times: *turn* is 0 here, and 1 there."""
    for i in range(passes):
        mine = (2 * i + turn) & 0xFFFF
        while load_u16_acquire(word, 0) != mine:
            pass
        store_u16_release(word, 0, (mine + 1) & 0xFFFF)


def line_ns() -> float:
    """Return the ns that a cache line takes from one of two cores to the other."""
    word = np.zeros(128, np.uint8)
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < 2:
        return 0.0

    def pass_it(turn: int, passes: int) -> None:
        os.sched_setaffinity(0, {cores[turn]})
        _pass_line(word, turn, passes)

    for passes in (1, _PASSES):  # the first one compiles
        word[:] = 0
        threads = [threading.Thread(target=pass_it, args=(turn, passes)) for turn in (0, 1)]
        began = time.monotonic_ns()
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    return (time.monotonic_ns() - began) / _PASSES / 2


def rates(checkout: Path, bench: str, seconds: str) -> _Rates:
    """Return the rate of each row of one run, in million packets, or changes of owner, a second."""
    rounds = {"ring": "5", "peers": "1"}[bench]  # those of the rings on one core take 10 ms each
    vnetdp = checkout / ".venv/bin/vnetdp"
    if not vnetdp.exists():
        sys.exit(f"there is no {vnetdp}: make -C {checkout} .venv/installed")
    command = [str(vnetdp), "bench", bench, "--rounds", rounds, "--seconds", seconds, "--json", "-"]
    done = subprocess.run(command, cwd=checkout, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{vnetdp} bench {bench}: exit status {done.returncode}\n{done.stderr}")
    rows: list[dict[str, Any]] = json.loads(done.stdout)["results"]
    for row in rows:
        if "skipped" in row:
            sys.exit(f"{vnetdp} bench {bench}: {row['name']}: skipped: {row['skipped']}")
    return {f"{row['name']}, {row.get('size', '')} B": row.get("mpps") or 1 / row["us"] for row in rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("old", type=Path, metavar="OLD", help="checkout to compare with")
    parser.add_argument("new", type=Path, metavar="NEW", help="checkout to judge")
    parser.add_argument("bench", choices=("ring", "peers"), help="benchmark to run")
    parser.add_argument("--rounds", type=int, default=9, metavar="N", help="make N rounds (default: %(default)s)")
    parser.add_argument(
        "--seconds", default="0.5", metavar="N", help="measure for N seconds each (default: %(default)s)"
    )
    args = parser.parse_args()
    trees = {"old": args.old.resolve(), "new": args.new.resolve()}
    samples: list[dict[str, _Rates]] = []
    while len(samples) < args.rounds:
        round_: dict[str, _Rates] = {}
        lines = [line_ns()]
        for name in list(trees)[:: -1 if len(samples) % 2 else 1]:
            round_[name] = rates(trees[name], args.bench, args.seconds)
            lines.append(line_ns())
        like = max(lines) < _UNLIKE * min(lines) or min(lines) == 0
        told = f"round {len(samples) + 1}: line {', '.join(f'{ns:.0f}' for ns in lines)} ns"
        tell(told if like else f"{told} (left out)")
        if like:
            samples.append(round_)
    tell(
        f"{'medians, ' + str(len(samples)) + ' rounds; ratio of the best':<58} {'old':>10} {'new':>10}  new/old     best"
    )
    for row in samples[0]["old"]:
        old, new = ([each[tree][row] for each in samples] for tree in trees)
        ratio = statistics.median(n / o for n, o in zip(new, old, strict=True))
        best = max(new) / max(old)
        tell(f"{row:<58} {statistics.median(old):10.4f} {statistics.median(new):10.4f}  {ratio:7.3f} {best:8.3f}")


if __name__ == "__main__":
    main()
