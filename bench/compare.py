"""Compare the speed of two checkouts: the rows of `vnetdp bench ring`, or those of `bench peers`, in turns.

    python bench/compare.py OLD NEW ring --rounds 9

OLD and NEW are checkouts with an environment (`make .venv/installed`). A round of `ring` starts a process of each, and both
measure each row a few times in turns; a round of `peers` runs the command of each. The time that a cache line takes from
core to core changes within seconds on some machines: it is measured around each sample on two cores, and samples are
compared only with samples of the same state of the line, near or far.
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
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from vnetdp.system.output import tell
from vnetdp_kernels.platform.atomic import Bytes, load_u16_acquire, store_u16_release
from vnetdp_kernels.platform.jit import kernel

_PASSES = 50_000
_NEAR_NS = 100  # a line that takes less is near, otherwise far
_SIDES = ("old", "new")
_Samples = dict[tuple[str, str], dict[str, list[float]]]  # by row and state of the line: the rates of either side

# The rows of `bench ring`, by the functions of vnetdp.bench.ring that both checkouts have.
_ONE_CORE = [f"device alone, {name}, {size} B" for size in (64, 1500) for name in ("null", "generate", "echo", "log")]
_TWO_CORES = [f"two cores, {size} B" for size in (64, 1500)]
_OWNERS = "change of owner, 64 B"

# A process of one checkout: it reads the name of a row and seconds, and writes the rates of that row as JSON. Where arrays
# come to lie changes a rate by up to a fifth: the objects are made anew for each sample, behind a block of random size.
_SERVER = """
import json, random, sys
from vnetdp.bench import ring
from vnetdp.warmup import warm_up
warm_up(lambda text: None)
quiet = lambda text: None
blocks = []
def measure(row, seconds):
    blocks.append(bytearray(16 * random.randrange(4096)))
    kind, *rest, size = row.removesuffix(" B").split(", ")
    if kind == "device alone":
        name = rest[0]
        endpoint = ring.ENDPOINTS["generate" if name == "log" else name](int(size))
        contender = ring.OneCore(endpoint, int(size), logged=name == "log")
        contender.alternate(50)
        ns, frames = contender.alternate(2000)
        contender.close()
        return {row: 1e3 * frames / ns}
    if kind == "two cores":
        rows = ring.two_cores(int(size), 1, seconds, quiet)
        return {f"{each['name']}, {size} B": each["mpps"] for each in rows}
    return {row: 1e3 / ring.handovers(200, quiet)["us"]}
print("ready", flush=True)
for line in sys.stdin:
    row, seconds = json.loads(line)
    print(json.dumps(measure(row, seconds)), flush=True)
"""


@kernel
def _pass_line(word: Bytes, turn: int, passes: int) -> None:
    """Pass a cache line to the other thread and have it back, *passes* times: *turn* is 0 here, and 1 there."""
    for i in range(passes):
        mine = (2 * i + turn) & 0xFFFF
        while load_u16_acquire(word, 0) != mine:
            pass
        store_u16_release(word, 0, (mine + 1) & 0xFFFF)


def line_ns() -> float:
    """Return the ns that a cache line takes from one of two cores to the other; 0 if there is but one core."""
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


def state_of(before: float, after: float) -> str | None:
    """Return the state of the line during a sample, by its ns before and after; None if it changed."""
    near = {ns < _NEAR_NS for ns in (before, after)}
    return None if len(near) > 1 else "near" if near.pop() else "far"


@contextmanager
def servers(trees: dict[str, Path]) -> Iterator[dict[str, subprocess.Popen[str]]]:
    """Start the process that measures of each checkout, and end both with the block."""
    started: dict[str, subprocess.Popen[str]] = {}
    try:
        for side, tree in trees.items():
            command = [str(python_of(tree)), "-c", _SERVER]
            pipe = subprocess.PIPE
            started[side] = subprocess.Popen(command, cwd=tree, stdin=pipe, stdout=pipe, text=True)
        for side in started:
            _read(started[side], trees[side])
        yield started
    finally:
        for process in started.values():
            process.communicate()


def _read(server: subprocess.Popen[str], tree: Path) -> str:
    assert server.stdout is not None
    line = server.stdout.readline()
    if not line:
        sys.exit(f"the measurements of {tree} ended with exit status {server.wait()}")
    return line


def sample(server: subprocess.Popen[str], tree: Path, row: str, seconds: float) -> dict[str, float]:
    """Return the rates of a row, measured once, in million packets, or thousand changes of owner, a second."""
    assert server.stdin is not None
    server.stdin.write(json.dumps([row, seconds]) + "\n")
    server.stdin.flush()
    rates: dict[str, float] = json.loads(_read(server, tree))
    return rates


def compare_ring(trees: dict[str, Path], rounds: int, seconds: float, samples: int) -> _Samples:
    """Measure each row *rounds* times *samples* times in both checkouts, each time in new processes."""
    found: _Samples = defaultdict(lambda: {side: [] for side in _SIDES})
    for turn in range(rounds):
        lines: list[float] = []
        with servers(trees) as running:
            for row in (*_ONE_CORE, *_TWO_CORES, _OWNERS):
                for n in range(samples):
                    for side in _SIDES[:: 1 if (turn + n) % 2 else -1]:
                        two = row not in _ONE_CORE
                        before = line_ns() if two else 0.0
                        rates = sample(running[side], trees[side], row, seconds)
                        after = line_ns() if two else 0.0
                        lines += [before, after] if two else []
                        if (state := state_of(before, after)) is not None:
                            for name, rate in rates.items():
                                found[name, state if two else ""][side].append(rate)
        tell(f"round {turn + 1}: line {min(lines):.0f} to {max(lines):.0f} ns")
    return found


def compare_peers(trees: dict[str, Path], rounds: int, seconds: float) -> _Samples:
    """Run `bench peers` of both checkouts *rounds* times in turns."""
    found: _Samples = defaultdict(lambda: {side: [] for side in _SIDES})
    for turn in range(rounds):
        lines = [line_ns()]
        for side in _SIDES[:: 1 if turn % 2 else -1]:
            rates = peers_rates(trees[side], seconds)
            lines.append(line_ns())
            state = state_of(lines[-2], lines[-1])
            for name, rate in rates.items() if state is not None else ():
                found[name, str(state)][side].append(rate)
        tell(f"round {turn + 1}: line {', '.join(f'{ns:.0f}' for ns in lines)} ns")
    return found


def peers_rates(tree: Path, seconds: float) -> dict[str, float]:
    """Return the rate of each row of one run of `bench peers`, in million packets a second."""
    command = [str(python_of(tree)), "-m", "vnetdp", "bench", "peers", "--rounds", "1", "--seconds", str(seconds)]
    done = subprocess.run([*command, "--json", "-"], cwd=tree, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(command)} in {tree}: exit status {done.returncode}\n{done.stderr}")
    rows: list[dict[str, Any]] = json.loads(done.stdout)["results"]
    for row in rows:
        if "skipped" in row:
            sys.exit(f"bench peers in {tree}: {row['name']}: skipped: {row['skipped']}")
    return {f"{row['name']}, {row.get('size', '')} B": row["mpps"] for row in rows}


def python_of(tree: Path) -> Path:
    python = tree / ".venv/bin/python"
    if not python.exists():
        sys.exit(f"there is no {python}: make -C {tree} .venv/installed")
    return python


def interval(old: list[float], new: list[float]) -> tuple[float, float]:
    """Return the bounds between which the ratio of the medians lies nine times in ten, by resampling either side."""
    draw = np.random.default_rng(0)
    medians = [np.median(draw.choice(rates, (2000, len(rates))), axis=1) for rates in (old, new)]
    low, high = np.quantile(medians[1] / medians[0], (0.05, 0.95))
    return float(low), float(high)


def report(found: _Samples) -> None:
    """Print the medians of both sides, and their ratio, for each row and state of the line that both sides met."""
    tell(f"{'medians':<48} {'line':<5} {'samples':>9} {'old':>9} {'new':>9}  new/old  nine in ten")
    for (row, state), rates in found.items():
        if all(rates.values()):
            old, new = (statistics.median(rates[side]) for side in _SIDES)
            counts = "+".join(str(len(rates[side])) for side in _SIDES)
            low, high = interval(*rates.values())
            tell(f"{row:<48} {state:<5} {counts:>9} {old:9.4f} {new:9.4f}  {new / old:7.3f}  {low:.3f}-{high:.3f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("old", type=Path, metavar="OLD", help="checkout to compare with")
    parser.add_argument("new", type=Path, metavar="NEW", help="checkout to judge")
    parser.add_argument("bench", choices=("ring", "peers"), help="benchmark to run")
    parser.add_argument("--rounds", type=int, default=9, metavar="N", help="make N rounds (default: %(default)s)")
    parser.add_argument(
        "--samples", type=int, default=3, metavar="N", help="ring: N samples of a row a round (default: %(default)s)"
    )
    parser.add_argument(
        "--seconds", type=float, default=0.2, metavar="N", help="measure for N seconds each (default: %(default)s)"
    )
    args = parser.parse_args()
    trees = {"old": args.old.resolve(), "new": args.new.resolve()}
    if args.bench == "ring":
        report(compare_ring(trees, args.rounds, args.seconds, args.samples))
    else:
        report(compare_peers(trees, args.rounds, args.seconds))


if __name__ == "__main__":
    main()
