"""The cost of a migration: the destination's work while the machine is stopped, by policy and pairs; the source's rate.

Policies take turns, so that a disturbance of the machine meets them alike; medians are given.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from typing import Any

from vnetdp_kernels import rows as r

from ..errors import WorkError
from ..lab.couple import Couple, Result
from ..lab.host import Orders
from ..migration.machine import Machine, MachineConfig, make_wire
from ..shared.memory import DirtyLog

PAIRS = (1, 4, 16, 64, 128)
_WAYS = (
    ("none", "none", ()),
    ("seed", "seed", ()),
    ("delta", "delta", ()),
    ("seed, one field changed", "seed", (("rx_mode", "stopping"),)),
    ("delta, one field changed", "delta", (("rx_mode", "stopping"),)),
)
_RATE = 20_000.0  # frames a second in all, each way: enough to see the blackout, too little to be in the way


def run(rounds: int, say: Callable[[str], None], pairs: tuple[int, ...] = PAIRS) -> list[dict[str, Any]]:
    """Return results of *rounds* migrations for each policy and number of pairs, rings of 256."""
    results: list[dict[str, Any]] = []
    with Couple() as couple:
        for n in pairs:
            say(f"{rounds} migrations of {n} queue pairs for each policy ...")
            results += _of(couple, n, rounds)
    say("the packet rate of the source in pre-copy ...")
    results.append(_slowdown(rounds))
    return results


def _of(couple: Couple, pairs: int, rounds: int) -> list[dict[str, Any]]:
    seen: dict[str, list[Result]] = {name: [] for name, _, _ in _WAYS}
    couple.start(MachineConfig(queue_pairs=pairs, rate=_RATE / pairs))
    for _ in range(rounds):
        for name, policy, changes in _WAYS:
            time.sleep(0.01)
            result = couple.migrate(policy, source=Orders(check=False, changes=changes))
            if result.outcome != "vhost" or result.violations:
                raise WorkError(f"{name}, {pairs} pairs: {result.outcome}: {result.error} {result.violations}")
            seen[name].append(result)
    final = couple.settle(result)
    if final.violations:
        raise WorkError(f"{pairs} pairs: {final.violations}")
    base = statistics.median(result.destination_us for result in seen["none"])
    rows = []
    for name, results in seen.items():
        us = statistics.median(result.destination_us for result in results)
        rows.append(
            {
                "name": f"destination work, {name}, {pairs} pairs",
                "queue_pairs": pairs,
                "us": us,
                "blackout_us": statistics.median(result.blackout_us or math.inf for result in results),
                "bytes": statistics.median(sum(result.bytes[k] for k in ("early", "final")) for result in results),
                "peer": "none",
                "ratio": base / us,
            }
        )
    return rows


def _slowdown(rounds: int) -> dict[str, Any]:
    """Return the packet rate with pages being read and the dirty log on, beside the rate without, in turns."""
    config = MachineConfig()
    wire = make_wire(config)
    with wire, Machine(config, wire.block.fd) as machine:
        machine.boot()
        machine.run()
        rates: dict[bool, list[float]] = {False: [], True: []}
        for turn in range(2 * rounds):
            sent = turn % 2 == 1
            rates[sent].append(_rate(machine, sent))
        machine.drain()
        ledgers = machine.ledgers()
        if not all(ledger.clean for ledger in ledgers):
            raise WorkError(f"frames were lost: {ledgers}")
    without, while_sent = (statistics.median(rates[key]) for key in (False, True))
    return {"name": "packet rate of the source in pre-copy", "queue_pairs": 1, "mpps": while_sent, "peer": "not migrating",
            "ratio": while_sent / without}  # fmt: skip


def _rate(machine: Machine, sent: bool) -> float:
    """Return Mpps over a fifth of a second, with rounds of pre-copy beside it if *sent*."""
    from ..migration.ram import RamSource

    log = DirtyLog(machine.memory.end)
    rows = machine.wire.rows

    def count() -> int:
        return int(rows[:, r.EP_TO_WIRE].sum() + rows[:, r.EP_FROM_WIRE].sum())

    ram = RamSource(machine.memory, machine.private_ranges())
    if sent:
        machine.device.set_log(log)
    began, before = time.perf_counter(), count()
    while time.perf_counter() - began < 0.2:
        if sent:
            for _ in ram.payloads(ram.changed(log)):
                pass
        # As over a link that carries one round in so long: to copy in a loop would measure the loop.
        time.sleep(0.02)
    took, moved = time.perf_counter() - began, count() - before
    machine.device.set_log(None)
    log.close()
    return moved / took / 1e6
