"""The demo: numbered packets both ways, while the rings go from owner to owner, a vhost fails, and a machine migrates."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

from vnetdp_kernels import rows as r

from ..backends.faulty import Fault, Faults
from ..backends.worker import Worker
from ..device.device import NetDevice
from ..endpoints.loopback import GenerateEndpoint, Ledger, drained
from ..errors import VnetdpError, WorkError
from ..guest.driver import Driver, memory_for
from ..lab.couple import Couple, Result
from ..migration.machine import MachineConfig

_FRAME_LEN = 64
_HERE = 5  # phases before the migration to another process
_PATIENCE_S = 30.0  # for a core to give a thread time


def run(seconds: float, say: Callable[[str], None], report: dict[str, Any]) -> None:
    """Run each phase for *seconds*, and *say* its result; fill in the report that `vnetdp demo --json` writes."""
    faults = Faults()
    phases: list[dict[str, Any]] = report["phases"]
    with ExitStack() as stack:
        memory = stack.enter_context(memory_for())
        wire = stack.enter_context(GenerateEndpoint(size=_FRAME_LEN))
        guest = stack.enter_context(GenerateEndpoint(size=_FRAME_LEN))
        worker = Worker(1)
        stack.callback(worker.close)
        device = stack.enter_context(NetDevice(memory, wire, vhost=faults.wrap(worker)))
        device.set_use_vhost(False)
        driver = stack.enter_context(Driver(device, memory, guest))
        driver.start()

        def phase(name: str) -> None:
            packets, took = _moved(seconds, lambda: _received(device))
            _enter(phases, say, name, device.owner.value, packets, took)

        say(f"{_FRAME_LEN}-byte frames, numbered, both ways at once, through one queue pair:")
        phase("userspace")
        device.set_use_vhost(True)
        phase("vhost")
        faults.append(Fault("set_vring_base", times=1))
        device.set_running(False)
        device.set_running(True)
        phase("vhost failed (injected): fallback")
        fell_back = device.fallbacks == 1 and phases[-1]["owner"] == "userspace"
        device.set_status(device.status)
        phase("vhost, after one retry")
        device.set_use_vhost(False)
        phase("userspace again")

        ledger = drained(wire, guest)
        handovers_us = sorted(ns / 1e3 for ns in device.handovers_ns)
    migrated = _migrate(seconds, phases, say)
    _conclude(report, fell_back, handovers_us, ledger, migrated, say)


def _conclude(
    report: dict[str, Any],
    fell_back: bool,
    handovers_us: list[float],
    ledger: Ledger,
    migrated: Result,
    say: Callable[[str], None],
) -> None:
    """Say whether all went well, the migration too, and enter it into the report."""
    owners = [p["owner"] for p in report["phases"][:_HERE]]
    ledger += migrated.ledger
    right = {
        "the injected failure led to no fallback": fell_back,
        "frames were not delivered as they were sent": ledger.clean,
        f"owners were {', '.join(owners)}": owners == ["userspace", "vhost", "userspace", "vhost", "userspace"],
        f"the migration's outcome is {migrated.outcome}": migrated.outcome == "vhost",
        "the migration met an error": not migrated.error,
        "the migration broke an invariant": not migrated.violations,
        "no packet moved after the migration": migrated.blackout_us is not None,
        "no packet moved in a phase": all(p["packets"] for p in report["phases"]),
    }
    ok = all(right.values())
    verdict = "none was lost" if ok else "NOT OK: " + "; ".join(text for text, holds in right.items() if not holds)
    say(f"ledger: {ledger}")
    median = handovers_us[len(handovers_us) // 2]
    migration = migrated.as_dict()
    without_ms = (migrated.blackout_us or math.inf) / 1000
    say(f"{len(handovers_us)} changes of owner, median {median:.0f} µs, and a migration to another process, "
        f"{without_ms:.1f} ms without a packet: {verdict}")  # fmt: skip
    if migrated.error:
        say(f"error: {migrated.error}")
    for text in migrated.violations:
        say(f"violation: {text}")
    report |= {
        "ok": ok,
        "ledger": ledger.as_dict(),
        "handover_us": handovers_us,
        "migration": {
            key: migration[key] for key in ("policy", "outcome", "error", "spans_us", "blackout_us", "violations")
        },
    }


def _migrate(seconds: float, phases: list[dict[str, Any]], say: Callable[[str], None]) -> Result:
    """Migrate a machine of the same kind, under the same traffic, from one process to another; add its two phases."""
    try:
        with Couple() as couple:
            couple.start(MachineConfig(size=_FRAME_LEN))

            def phase(name: str) -> None:
                assert couple.wire is not None
                rows = couple.wire.rows
                packets, took = _moved(seconds, lambda: int(rows[:, [r.EP_TO_WIRE, r.EP_FROM_WIRE]].sum()))
                _enter(phases, say, name, couple.source.call("look")["owner"], packets, took)

            phase("vhost, in a process of its own")
            result = couple.migrate("delta")
            phase("migrated to a second process")
            return result if result.outcome == "lost" else couple.settle(result)
    except VnetdpError as e:
        raise WorkError(str(e)) from e  # the phases before were run


def _enter(
    phases: list[dict[str, Any]], say: Callable[[str], None], name: str, owner: str, packets: int, took: float
) -> None:
    """Enter a phase that *took* so many seconds into the report, and say it."""
    phases.append({"name": name, "owner": owner, "packets": packets, "mpps": packets / took / 1e6})
    say(f"  {name:<34} {owner:<10} {packets:>12,} packets  {packets / took / 1e6:6.2f} Mpps")


def _moved(seconds: float, count: Callable[[], int]) -> tuple[int, float]:
    """Return the packets that *count* counts within *seconds*, and how long that took.

    It takes longer while there is none: on a busy machine a thread may get no core for as long.
    """
    before, began = count(), time.perf_counter()
    while True:
        time.sleep(seconds)
        packets, took = count() - before, time.perf_counter() - began
        if packets or took > _PATIENCE_S:
            return packets, took


def _received(device: NetDevice) -> int:
    """Packets through the device so far, both ways."""
    return sum(queue["packets"] for queue in device.counters())
