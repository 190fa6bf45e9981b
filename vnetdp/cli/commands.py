"""The commands, one function each. Numba and other libraries are imported only by the command that needs them."""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..endpoints.names import VHOST_USER
from ..errors import ConfigError
from ..system.output import human, is_same_file, say
from ..system.signals import Asked, Ending

if TYPE_CHECKING:
    from ..backends.faulty import Faults
    from ..endpoints.base import Endpoint
    from ..programs.link import Link

_LOOK_S = (0.001, 0.02)  # between two looks at the frames of a link: at first, and later


def counted(count: int, what: str) -> str:
    return f"{count:,} {what}{'' if count == 1 else 's'}"


def compile_kernels(ending: Ending, of_command: Callable[[Callable[[str], None]], object] | None = None) -> None:
    """Have the kernels compiled, so that nothing waits for that later, and a signal ends it.

    Check the arguments first: this takes half a minute. of_command: compiles in place of `warm_up`.
    """
    from ..warmup import warm_up

    with ending.compiling():
        (of_command or warm_up)(say)


def _check_report(args: argparse.Namespace, *others: Path | str) -> None:
    """Raise ConfigError if the report would overwrite a capture, or a socket."""
    for other in others:
        if args.json not in (None, "-") and is_same_file(Path(args.json), Path(other)):
            raise ConfigError(f"--json {args.json} and {other} are one file: name another file for the report")


def _faults(args: argparse.Namespace) -> Faults | None:
    """Return the faults of `--fault`; None if there is none. ConfigError if one could never strike."""
    if args.fault is None:
        return None
    from ..backends.faulty import Fault, Faults
    from ..backends.names import UNBIND, VERBS

    faults = Faults(Fault.parse(text) for text in args.fault)
    for fault in faults:
        if fault.phase or fault.verb not in (*VERBS, UNBIND):
            raise ConfigError(
                f"fault {fault.text!r}: phases, and verbs that are not vhost's, are for vnetdp migrate; verbs here are "
                f"{', '.join((*VERBS, UNBIND))}"
            )
        if (fault.pair or 0) >= args.queue_pairs:
            raise ConfigError(
                f"fault {fault.text!r}: its ring is none of 0,0 to {args.queue_pairs - 1},1 (PAIR,VRING) with "
                f"--queue-pairs {args.queue_pairs}"
            )
    return faults


def _print_faults(report: dict[str, Any], tell: Callable[[str], None]) -> None:
    for fault in report.get("faults", ()):
        tell(f"fault {fault['fault']}: struck {counted(fault['hits'], 'time')}")


def demo(args: argparse.Namespace, ending: Ending) -> int:
    from ..programs.demo import run

    compile_kernels(ending)
    report: dict[str, Any] = {"ok": False, "phases": []}
    with ending.reporting(lambda: report):
        run(args.seconds, human(args), report)
    return 0 if ending.finish()["ok"] else 1


def _bridge(args: argparse.Namespace, ending: Ending) -> int:
    from ..programs.bridge import Bridge, check_sockets, warm_up
    from ..vhost_user.back_end.server import check_queue_pairs

    left, right = (text.partition(":")[2] for text in (args.left, args.right))
    for kind, other, socket in (
        (args.left.partition(":")[0], args.left, right),
        (args.right.partition(":")[0], args.right, left),
    ):
        if kind != VHOST_USER:
            raise ConfigError(
                f"{VHOST_USER}:SOCKET is needed on both sides of a link; to serve {other} to one guest: "
                f"vnetdp serve {other} --socket {socket or 'SOCKET'}"
            )
    for text, socket in ((args.left, left), (args.right, right)):
        if not socket:
            raise ConfigError(
                f"{text!r} names no socket: write {VHOST_USER}:SOCKET, such as {VHOST_USER}:/tmp/net.sock"
            )
    for option in ("datapath", "ring", "mtu", "switch_ms", "switches", "worker_timeout", "fault"):
        if getattr(args, option) is not None:
            raise ConfigError(
                f"--{option.replace('_', '-')} means nothing between two guests, which bring their own rings: leave it out"
            )
    poll_us = -1 if args.poll else args.poll_us
    until = time.monotonic() + args.seconds if args.seconds else math.inf
    check_queue_pairs(args.queue_pairs)
    check_sockets(left, right)
    _check_report(args, left, right)
    compile_kernels(ending, warm_up)
    with (
        Bridge(left, right, queue_pairs=args.queue_pairs, poll_us=poll_us) as bridge,
        ending.at_work(bridge.report, lambda report: _print_bridge(report, human(args))),
    ):
        say(f"joining the guests on {left} and {right}; ^C or SIGTERM ends it")
        bridge.serve(lambda: ending.asked.is_set() or time.monotonic() >= until)
    ending.finish()
    return 0


def _print_bridge(report: dict[str, Any], tell: Callable[[str], None]) -> None:
    for name in ("left_to_right", "right_to_left"):
        dropped = [
            f"{count:,} {key.removeprefix('dropped_')}"
            for key, count in report[name].items()
            if key.startswith("dropped_") and count
        ]
        tell(f"{name.replace('_', ' ')}: {counted(report[name]['packets'], 'packet')}"
             + (f", dropped: {', '.join(dropped)}" if dropped else ""))  # fmt: skip


def link(args: argparse.Namespace, ending: Ending) -> int:
    if VHOST_USER in (text.partition(":")[0] for text in (args.left, args.right)):
        return _bridge(args, ending)
    if args.switches is not None and args.switch_ms is None:
        raise ConfigError("--switches needs --switch-ms N, the time between two hand-overs in ms")
    faults = _faults(args)
    if faults is not None and args.datapath == "userspace" and args.switch_ms is None:
        raise ConfigError("--fault needs vhost, whose verbs fail: take --datapath vhost, or --switch-ms N")
    from ..endpoints.spec import endpoint_opener
    from ..programs.link import Link, check_datapath

    # Both are read before either is opened, and both are opened before a capture is overwritten, which neither may read.
    openers = [endpoint_opener(text, args.queue_pairs) for text in (args.left, args.right)]
    if openers[0].tap is not None and openers[0].tap == openers[1].tap:
        raise ConfigError(
            f"both ends of the link are the interface {openers[0].tap[0]}: name another interface for one of them"
        )
    with ExitStack() as stack:
        left, right = (stack.enter_context(opener()) for opener in openers)
        check_datapath(args.datapath or "vhost", left)
        _check_report(args, *left.files, *right.files)
        for end, other in ((left, right), (right, left)):
            end.open_sink(other.files)
        compile_kernels(ending)
        link = stack.enter_context(
            Link(
                left,
                right,
                args.datapath or "vhost",
                queue_pairs=args.queue_pairs,
                num=args.ring or 256,
                poll_us=-1 if args.poll else args.poll_us,
                mtu=args.mtu,
                switchable=args.switch_ms is not None,
                worker_timeout_s=args.worker_timeout or 10.0,
                ending=ending.asked.is_set,
                faults=faults,
            )
        )
        with ending.at_work(
            link.report,
            lambda report: _print_link(report, human(args), _failures(left, right), link.why_no_ledger),
        ):
            say(f"linked {args.left} and {args.right} through {link.device.owner.value}; ^C or SIGTERM ends it")
            until = time.monotonic() + args.seconds if args.seconds else math.inf
            _run_link(link, ending.asked, args, until)
            link.drain(lambda: ending.asked.is_set() or time.monotonic() >= until)
    return _status(ending.finish(partial(_add_failures, ends=(left, right))))


def _failures(*ends: Endpoint) -> list[str]:
    """Return the failures of *ends*, which have logged them."""
    return [failure for end in ends for failure in end.failures]


def _add_failures(report: dict[str, Any], ends: Sequence[Endpoint]) -> None:
    """Add the failures of *ends* at their close, such as of the last writes, to the report's errors."""
    report["errors"] += [failure for failure in _failures(*ends) if failure not in report["errors"]]


def _status(report: dict[str, Any]) -> int:
    """Return the exit status after work: 1 if frames were not delivered as they have to be, or something failed."""
    ledger = report.get("ledger", {})
    wrong = any(ledger.get(key) for key in ("lost", "duplicated", "reordered", "corrupted"))
    return 1 if wrong or report.get("bad_packets") or report["errors"] else 0


def _run_link(link: Link, stop: Asked, args: argparse.Namespace, until: float) -> None:
    """Wait for a signal, *until* (time.monotonic()), or the last frame of the endpoints; switch on the way."""
    began = now = time.monotonic()
    tick = args.switch_ms / 1000 if args.switch_ms is not None else math.inf
    switch = began + tick
    while now < until and not link.done and not link.dead:
        # Often at first, when much happens in little time.
        look = min(_LOOK_S[1], max(_LOOK_S[0], (now - began) / 100))
        if stop.wait(max(0.0, min(look, switch - now, until - now))):
            return
        link.look()
        now = time.monotonic()
        if now >= switch:
            switch = now + tick
            if not args.switches or link.device.handovers <= args.switches:
                link.switch()


def serve(args: argparse.Namespace, ending: Ending) -> int:
    from ..endpoints.spec import parse_endpoint
    from ..system.dial import why_not_there
    from ..system.listener import check_free
    from ..vhost_user.back_end.server import Server
    from ..vhost_user.back_end.session import USUAL_PROTOCOL_FEATURES
    from ..vhost_user.message import ProtocolFeature
    from ..virtio.features import parse, with_needs

    features = None if args.features is None else with_needs(parse(args.features))
    known = {str(feature.name).lower(): feature.value for feature in ProtocolFeature}
    protocol_features = parse(args.protocol_features, known, USUAL_PROTOCOL_FEATURES)
    faults = _faults(args)
    (why_not_there if args.connect else check_free)(args.socket)
    with ExitStack() as stack:
        endpoint = stack.enter_context(parse_endpoint(args.endpoint, args.queue_pairs))
        _check_report(args, *endpoint.files, args.socket)
        compile_kernels(ending)
        server = stack.enter_context(
            Server(
                endpoint,
                args.socket,
                connect=args.connect,
                queue_pairs=args.queue_pairs,
                features=features,
                protocol_features=protocol_features,
                mtu=args.mtu,
                poll_us=-1 if args.poll else args.poll_us,
                inband=args.inband,
                worker_timeout_s=args.worker_timeout or 10.0,
                faults=faults,
            )
        )

        def report() -> dict[str, Any]:
            struck = {} if faults is None else {"faults": faults.report()}
            return struck | {
                "served": server.served,
                "refused": server.refused,
                "errors": _failures(endpoint),
                "endpoint": endpoint.counters(),
            }

        with ending.at_work(report, lambda report: _print_served(report, human(args))):
            begins = f"connecting to {args.socket}" if args.connect else f"serving {args.endpoint} on {args.socket}"
            say(f"{begins}; ^C or SIGTERM ends it")
            server.run(ending.asked.is_set, ending.asked.fileno(), say)
    return _status(ending.finish(partial(_add_failures, ends=(endpoint,))))


def _print_served(report: dict[str, Any], tell: Callable[[str], None]) -> None:
    counters = report["endpoint"]
    tell(f"served {counted(report['served'], 'front end')}, {counted(counters['to_wire'], 'frame')} to the "
         f"endpoint, {counters['from_wire']:,} from it")  # fmt: skip
    _print_faults(report, tell)


def drive(args: argparse.Namespace, ending: Ending) -> int:
    from ..endpoints.spec import parse_endpoint
    from ..programs.drive import drive
    from ..system.dial import why_not_there
    from ..system.listener import check_free
    from ..virtio.features import parse, with_needs

    spec = args.endpoint
    if args.count is not None:
        kind, _, options = spec.partition(":")
        if kind != "generate":
            raise ConfigError(f"--count needs the endpoint generate, not {args.endpoint}")
        spec = f"{kind}:{options + ',' if options else ''}count={args.count}"
    features = None if args.features is None else with_needs(parse(args.features))
    (check_free if args.listen else why_not_there)(args.socket)
    with parse_endpoint(spec, args.queue_pairs) as endpoint:
        _check_report(args, *endpoint.files, args.socket)
        compile_kernels(ending)
        drive(
            endpoint,
            args.socket,
            ending.asked.is_set,
            say,
            listen=args.listen,
            queue_pairs=args.queue_pairs,
            num=args.ring,
            features=features,
            mtu=args.mtu,
            wait_s=args.wait,
            seconds=args.seconds,
            poll_us=-1 if args.poll else args.poll_us,
            at_work=lambda make: ending.at_work(make, lambda report: _print_driven(report, human(args))),
        )
    return _status(ending.finish(partial(_add_failures, ends=(endpoint,))))


def _print_driven(report: dict[str, Any], tell: Callable[[str], None]) -> None:
    lost = report.get("ledger", {}).get("lost", 0)
    sides = f"sent {report['tx_packets']:,}, received {report['rx_packets']:,} ({report['mpps']:.3f} Mpps)"
    tell(f"{sides}, bad {report['bad_packets']:,}" + (f", lost {lost:,}" if lost else ""))


def _print_link(report: dict[str, Any], tell: Callable[[str], None], said: Sequence[str], why_no_ledger: str) -> None:
    """Tell the report of a link. said: its errors that have been told. why_no_ledger: empty if that is no news."""
    for side, other in (("left", "right"), ("right", "left")):
        counters = report[side]
        gbps = counters["bytes_from_wire"] * 8 / counters["seconds"] / 1e9 if counters["seconds"] else 0.0
        tell(
            f"{side} to {other}: {counted(counters['from_wire'], 'frame')}, {counters['mpps']:.3f} Mpps, "
            f"{gbps:.3f} Gbit/s"
        )
    dropped = {
        f"{side} {key.removeprefix('dropped_')}": report[side][key]
        for side in ("left", "right")
        for key in report[side]
        if key.startswith("dropped_") and report[side][key]
    }
    faults = [
        f"{side} {report[side][key]:,} {key.removeprefix('fault_')}"
        for side in ("left", "right")
        for key in report[side]
        if key.startswith("fault_") and report[side][key]
    ]
    if faults:
        tell("injected faults: " + ", ".join(faults))
    if dropped:
        tell("dropped: " + ", ".join(f"{count:,} {reason}" for reason, count in dropped.items()))
    changes = f"{counted(report['handovers'], 'hand-over')}, {counted(report['fallbacks'], 'fallback')}"
    tell(f"owner {report['owner']}, {changes}")
    _print_faults(report, tell)
    if "ledger" in report:
        tell("ledger: " + ", ".join(f"{value:,} {key}" for key, value in report["ledger"].items()))
    elif why_no_ledger:
        tell(why_no_ledger)
    for error in report["errors"]:
        if error not in said:
            tell(f"error: {error}")


def bench(args: argparse.Namespace, ending: Ending) -> int:
    from ..bench.report import finish

    rounds = args.rounds or (20 if args.what == "migration" else 5)
    report: dict[str, Any] = {"bench": args.what, "results": []}
    with ending.reporting(lambda: report):
        if args.what == "ring":
            from ..bench.ring import run as run_ring

            compile_kernels(ending)
            results = run_ring(rounds=rounds, seconds=args.seconds, say=say)
        elif args.what == "peers":
            from ..bench.peers import run as run_peers

            results = run_peers(rounds, args.seconds, say)
        elif args.what == "migration":
            from ..bench.migration import run as run_migration

            compile_kernels(ending)
            results = run_migration(rounds, say)
        else:
            from ..bench.link import run as run_link

            results = run_link(args.seconds, rounds, None, say)
        if results and all(row.get("skipped") for row in results):
            raise ConfigError(f"nothing can be measured here: {results[0]['skipped']}")
        report |= finish(args.what, results, args.plot, human(args))
    ending.finish()
    return 1 if any(row.get("failed") for row in results) else 0


def doctor(args: argparse.Namespace, ending: Ending) -> int:
    from ..programs.doctor import run

    report: dict[str, Any] = {"ok": False}
    with ending.reporting(lambda: report):
        report |= run(human(args))
    return 0 if ending.finish()["ok"] else 1
