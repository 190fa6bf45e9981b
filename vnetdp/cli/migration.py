"""The commands `migrate`, one migration or several, and `faults`, the fault matrix."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

from ..errors import ConfigError
from ..system.output import human, say
from ..system.signals import Ending
from .commands import compile_kernels, counted

if TYPE_CHECKING:
    from distributed import Client

    from ..lab.couple import Result
    from ..lab.matrix import Row
    from ..migration.machine import MachineConfig

_PROGRESS_S = 10.0  # between two lines that say how far long work is
_CONNECT_S = 10  # for a Dask scheduler to answer


def migrate(args: argparse.Namespace, ending: Ending) -> int:
    from ..lab.couple import Couple
    from ..lab.host import Orders
    from ..migration.machine import MachineConfig, check_endpoints

    config = MachineConfig(
        queue_pairs=args.queue_pairs,
        num=args.ring,
        size=args.size,
        rate=100_000 / args.queue_pairs if args.rate is None else args.rate,
        traffic=args.traffic,
        first_idx=args.first_idx,
        vhost=not args.source_userspace,
        endpoint=args.endpoint,
        faulty=bool(args.fault),
    )
    prefix = "source:"
    here = tuple(fault.removeprefix(prefix) for fault in args.fault if fault.startswith(prefix))
    there = tuple(fault for fault in args.fault if not fault.startswith(prefix))
    for fault in (*here, *there):
        _check_fault(fault, args.queue_pairs)
    changes = tuple((name, "stopping") for name in args.change)
    source = Orders(faults=here, changes=changes, churn=args.churn or "", check=not args.no_check)
    results: list[Result] = []
    there_endpoint = args.target_endpoint or args.endpoint
    check_endpoints(args.endpoint, there_endpoint, args.queue_pairs, say)
    compile_kernels(ending)
    with (
        Couple() as couple,
        ending.reporting(lambda: _migrated(results), lambda report: _print_migration(report, human(args))),
    ):
        couple.start(config)
        for n in range(args.repeat):
            time.sleep(0.05)
            result = couple.migrate(
                args.policy,
                source=source,
                target=Orders(faults=there),
                target_vhost=not args.target_userspace,
                target_endpoint=args.endpoint if n % 2 else there_endpoint,
                tcp=args.tcp,
            )
            results.append(result)
            if n % 50 == 49:
                say(f"{n + 1} migrations")
            if result.outcome not in ("vhost", "userspace"):
                break
        if result.outcome != "lost":
            couple.settle(result)
    report = ending.finish()
    if args.plot:
        from ..lab.plot import draw

        draw(result, args.plot)
    missed = args.fault and not any(each.counts.get("hits") for each in results)
    if missed:
        human(args)(f"no verb of --fault was called: {', '.join(args.fault)}")
    may_fall_back = there or args.target_userspace or "link" in (*args.change, args.churn)
    wanted = ("vhost", "userspace") if may_fall_back else ("vhost",)
    well = all(each.outcome in wanted and not each.error for each in results)
    return 0 if well and not report["violations"] and not missed else 1


def _migrated(results: list[Result]) -> dict[str, Any]:
    report: dict[str, Any] = results[-1].as_dict() if results else {}
    report["violations"] = [text for each in results for text in each.violations]
    report["migrations"] = len(results)
    return report


def _check_fault(text: str, pairs: int) -> None:
    from ..backends.faulty import Fault

    fault = Fault.parse(text)
    if fault.phase not in ("", "early", "final", "retry"):
        raise ConfigError(f"fault {text!r}: the phase {fault.phase} is not early, final or retry")
    if (fault.pair or 0) >= pairs:
        raise ConfigError(
            f"fault {text!r}: its ring is none of 0,0 to {pairs - 1},1 (PAIR,VRING) with --queue-pairs {pairs}"
        )


def _print_migration(report: dict[str, Any], tell: Callable[[str], None]) -> None:
    if not report["migrations"]:
        return
    times = f"{report['migrations']} migrations, the last: " if report["migrations"] > 1 else ""
    tell(f"{times}policy {report['policy']}, outcome {report['outcome']}")
    if report["error"]:
        tell(f"error: {report['error']}")
    for name, us in report["spans_us"].items():
        tell(f"  {name:<20} {us:>10,.0f} µs")
    us = report["blackout_us"]
    without = (
        "no packet moved after the stop" if us is None else f"blackout (longest time without a packet): {us:,.0f} µs"
    )
    tell(f"work at the destination while the machine was stopped: {report['destination_us']:,.0f} µs; {without}")
    tell("ledger: " + ", ".join(f"{value:,} {key}" for key, value in report["ledger"].items()))
    for text in report["violations"]:
        tell(f"violation: {text}")


def faults(args: argparse.Namespace, ending: Ending) -> int:
    from ..lab.campaigns import Finding, campaign
    from ..lab.fault_cases import FaultCase, give_up, lost_row, run_case
    from ..lab.matrix import cases, chosen

    tell = human(args)
    traffics = ("idle", "both") if args.traffic is None else (args.traffic,)
    plan = chosen(args.queue_pairs or (1, 4), traffics, args.only)
    if not plan:
        names = dict.fromkeys(case.id.partition("/")[0] for case in cases(1))
        raise ConfigError(f"no row of the fault matrix begins with {args.only!r}; rows are {', '.join(names)}")
    if args.list:
        for name, says in {case.id: case.says for _, case in plan}.items():
            tell(f"{name}: {says}")
        return 0
    began = said = time.monotonic()
    rows: list[tuple[MachineConfig, Row]] = []

    def one(found: Finding[FaultCase, Row]) -> None:
        nonlocal said
        config, row = found.case.config, found.result or lost_row(found)
        rows.append((config, row))
        if time.monotonic() - said > _PROGRESS_S:
            said = time.monotonic()
            say(f"{len(rows)} of {len(plan)} cases, {said - began:.0f} s")
        if not row.ok or args.verbose_rows:
            foreseen = (
                "" if row.ok or args.policy != "seed" else " (predicted)" if row.predicted else " (not predicted)"
            )
            machine = f"{config.traffic}, {counted(config.queue_pairs, 'pair')}"
            tell(f"{row.case.id} ({machine}): {row.case.says}: {row.outcome}{foreseen}"
                 + "".join(f"\n    {text}" for text in row.violations))  # fmt: skip

    def report() -> dict[str, Any]:
        shown = [{**row.as_dict(), "traffic": made.traffic, "queue_pairs": made.queue_pairs} for made, row in rows]
        return {"policy": args.policy, "ok": len(rows) == len(plan) and all(row.ok for _, row in rows), "rows": shown}

    compile_kernels(ending)
    with ending.reporting(report, lambda _: _print_faults(args.policy, [row for _, row in rows], began, tell)):
        with _cluster(args.dask) as client:
            each = [FaultCase(args.policy, config, case) for config, case in plan]
            campaign(run_case, each, jobs=args.jobs, client=client, done=one)
        give_up()
    return 0 if ending.finish()["ok"] else 1


def _cluster(address: str | None) -> AbstractContextManager[Client | None]:
    """Return the client of the Dask scheduler at *address*, or of none."""
    if address is None:
        return nullcontext()
    try:
        from distributed import Client
    except ImportError:
        raise ConfigError("--dask needs Dask's distributed: pip install 'vnetdp[campaign]'") from None
    try:
        client: AbstractContextManager[Client] = Client(address, timeout=_CONNECT_S, set_as_default=False)
    except (OSError, ValueError) as e:
        raise ConfigError(f"--dask {address}: no Dask scheduler answers there within {_CONNECT_S} s ({e})") from None
    return client


def _print_faults(policy: str, rows: list[Row], began: float, tell: Callable[[str], None]) -> None:
    from ..lab.matrix import DEFECTS

    wrong = [row for row in rows if not row.ok]
    tell(f"{counted(len(rows), 'case')}, {len(wrong)} failed, {time.monotonic() - began:.0f} s")
    if policy == "seed":
        unseen = [name for name in DEFECTS if not any(row.predicted == name for row in wrong)]
        foreseen = sum(bool(row.predicted) for row in wrong)
        tell(f"of the failed cases {foreseen} were predicted, and {len(wrong) - foreseen} were not; "
             f"predicted but not seen: {', '.join(unseen) or 'none'}")  # fmt: skip
