"""How long does a whole migration take by policy, between two machines in one process, and does it lose a packet?"""

from __future__ import annotations

import threading
import time

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from vnetdp.lab.couple import socket_pair
from vnetdp.lab.invariants import violations
from vnetdp.migration.channel import POLICIES, Channel
from vnetdp.migration.machine import Machine, MachineConfig, make_wire
from vnetdp.migration.seed import SeedTarget
from vnetdp.migration.source import Source
from vnetdp.migration.target import Target
from vnetdp_kernels import rows as r

RATE = 20_000.0  # packets a second each way: enough to lose one, too few to be in the way
BETWEEN = 100  # packets each way, at least, between two migrations
MIGRATIONS = 10
PATIENCE_S = 30.0


class Moving:
    """A machine under traffic that moves: `here` it runs, it came from the other."""

    def __init__(self, policy: str) -> None:
        self.policy = policy
        self.config = MachineConfig(rate=RATE)
        self.wire = make_wire(self.config)
        self.here = Machine(self.config, self.wire.block.fd)
        self.other = Machine(self.config, self.wire.block.fd)
        self.migrations = 0
        self.moved = 0  # packets that passed while it migrated
        self.here.boot()
        self.here.run()

    def counts(self) -> list[int]:
        """Return the packets that went to the wire, and that came from it."""
        return [int(self.wire.rows[:, slot].sum()) for slot in (r.EP_TO_WIRE, r.EP_FROM_WIRE)]

    def prepare(self) -> None:
        """Wait until packets have passed each way, and make a place to go to in place of the one that it left."""
        before, until = self.counts(), time.monotonic() + PATIENCE_S
        while any(now - then < BETWEEN for now, then in zip(self.counts(), before, strict=True)):
            assert time.monotonic() < until, f"no packet passes: {before}, then {self.counts()}"
            time.sleep(0.001)
        found = violations(self.here)
        assert not found, found
        self.other.close()
        self.other = Machine(self.config, self.wire.block.fd)

    def migrate(self) -> None:
        before = sum(self.counts())
        ours, theirs = socket_pair()
        with ours, theirs:
            target = (SeedTarget if self.policy == "seed" else Target)(self.other, Channel(theirs), self.policy)
            thread = threading.Thread(target=target.run)
            thread.start()
            report = Source(self.here, Channel(ours), self.policy).run()
            thread.join()
        assert report.outcome == target.report.outcome == "vhost", f"{report.error} {target.report.error}"
        self.here, self.other = self.other, self.here
        self.moved += sum(self.counts()) - before
        self.migrations += 1

    def close(self) -> None:
        self.here.close()
        self.other.close()
        self.wire.close()


@pytest.mark.parametrize("policy", POLICIES)
def test_migration(policy: str, benchmark: BenchmarkFixture) -> None:
    moving = Moving(policy)
    try:
        benchmark.pedantic(  # type: ignore[no-untyped-call]
            moving.migrate, setup=moving.prepare, rounds=MIGRATIONS
        )
        moving.prepare()
        assert moving.here.drain()
        ledgers = moving.here.ledgers()
    finally:
        moving.close()
    assert moving.migrations == (MIGRATIONS if benchmark.enabled else 1)
    for ledger in ledgers:
        assert ledger.clean, ledger
        assert ledger.delivered >= BETWEEN * (moving.migrations + 1)
    if benchmark.stats is not None:
        benchmark.extra_info["packets_per_s"] = round(moving.moved / benchmark.stats.stats.total)
    benchmark.extra_info["packets"] = sum(ledger.delivered for ledger in ledgers)
