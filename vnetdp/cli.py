"""The command line. Numba and the rest are imported only by the command that needs them."""

from __future__ import annotations

import argparse
import importlib.util
import json
import logging
import math
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from ._version import __version__
from .errors import ConfigError, VnetdpError

_ENDPOINTS = """\
endpoints:
  null                        takes every frame, gives none
  echo, macswap               send every frame back, as it came or with its addresses exchanged
  reflect                     a host with every IPv4 address: answers ARP and ICMP echo
  generate:size=64,rate=1M,count=100
                              numbered frames, checked at the other end
  tap:NAME[,netns=NS]         a TAP interface, made if it is not there
  pcap:IN[,OUT]               frames from one capture file, and into another
  scapy:MODULE:CALLABLE       a Python function on Scapy packets
  fault:drop=0.01,...:ENDPOINT
                              any other, with faults
  vhost-user:SOCKET           in link, on both sides: two guests, copied once from ring to ring
"""


_VHOST_USER = "vhost-user:"


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _human(args: argparse.Namespace) -> Callable[[str], None]:
    """Return what prints a report for people: standard output, unless that is asked to hold JSON alone."""
    return _say if args.json == "-" else print


def _write_json(path: str, report: dict[str, Any]) -> None:
    text = json.dumps(report, indent=2) + "\n"
    if path == "-":
        sys.stdout.write(text)
    else:
        try:
            Path(path).write_text(text)
        except OSError as e:
            raise ConfigError(f"cannot write {path}: {e.strerror}") from e


@contextmanager
def _until_signal() -> Iterator[threading.Event]:
    """Give an event that SIGINT and SIGTERM set, for the length of the block."""
    event = threading.Event()

    def on_signal(_number: int, _frame: FrameType | None) -> None:
        event.set()

    before = {number: signal.signal(number, on_signal) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield event
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def _woken_by_signals() -> Iterator[int]:
    """Give a descriptor that any signal makes readable, for the length of the block."""
    reader, writer = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    before = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    try:
        yield reader
    finally:
        signal.set_wakeup_fd(before)
        os.close(reader)
        os.close(writer)


def _demo(args: argparse.Namespace) -> int:
    from .demo import run

    report = run(seconds=args.seconds, say=_say)
    if args.json:
        _write_json(args.json, report)
    return 0 if report["ok"] else 1


def _bridge(args: argparse.Namespace) -> int:
    from .bridge import Bridge

    left, right = (text.removeprefix(_VHOST_USER) for text in (args.left, args.right))
    if not args.left.startswith(_VHOST_USER) or not args.right.startswith(_VHOST_USER):
        raise ConfigError(
            "vhost-user:SOCKET stands on both sides of a link, or use: vnetdp serve ENDPOINT --socket SOCKET"
        )
    poll_us = -1 if args.poll else args.poll_us
    with _until_signal() as stop, Bridge(left, right, queue_pairs=args.queue_pairs, poll_us=poll_us) as bridge:
        _say(f"joining the guests on {left} and {right}; ^C or SIGTERM ends it")
        bridge.serve(stop.is_set)
        report = bridge.report()
    for name in ("left_to_right", "right_to_left"):
        _human(args)(f"{name.replace('_', ' ')}: {report[name]['packets']:,} packets")
    if args.json:
        _write_json(args.json, report)
    return 0


def _link(args: argparse.Namespace) -> int:
    if _VHOST_USER in (args.left[: len(_VHOST_USER)], args.right[: len(_VHOST_USER)]):
        return _bridge(args)
    from .endpoints.spec import parse_endpoint
    from .link import Link
    from .warmup import warm_up

    with _until_signal() as stop, ExitStack() as stack:
        left = stack.enter_context(parse_endpoint(args.left, args.queue_pairs))
        right = stack.enter_context(parse_endpoint(args.right, args.queue_pairs))
        warm_up(_say)
        link = stack.enter_context(
            Link(
                left,
                right,
                args.datapath,
                queue_pairs=args.queue_pairs,
                num=args.ring,
                poll_us=-1 if args.poll else args.poll_us,
                mtu=args.mtu,
                switchable=args.switch_ms is not None,
            )
        )
        _say(f"linked {args.left} and {args.right} through {link.device.owner.value}; ^C or SIGTERM ends it")
        _run_link(link, stop, args)
        link.drain()
        report = link.report()
    _print_link(report, _human(args))
    if args.json:
        _write_json(args.json, report)
    ledger = report.get("ledger")
    clean = ledger is None or not any(ledger[key] for key in ("lost", "duplicated", "reordered", "corrupted"))
    return 0 if clean and not report["errors"] else 1


def _run_link(link: Any, stop: threading.Event, args: argparse.Namespace) -> None:
    """Wait for a signal, the time asked for, or the end of what the endpoints have to give; switch on the way."""
    import time

    until = time.monotonic() + args.seconds if args.seconds else None
    tick = args.switch_ms / 1000 if args.switch_ms is not None else 0.2
    while not stop.wait(tick):
        if args.switch_ms is not None and (not args.switches or link.device.handovers <= args.switches):
            link.switch()
        if until is not None and time.monotonic() >= until:
            return
        ends = (link.left, link.right)
        if any(end.finished for end in ends) and all(end.finished or not end.gives for end in ends):
            return


def _serve(args: argparse.Namespace) -> int:
    from .endpoints.spec import parse_endpoint
    from .features import parse
    from .server import Server
    from .vhost_user.message import ProtocolFeature
    from .warmup import warm_up

    features = None if args.features is None else parse(args.features, (1 << 64) - 1)
    protocol_features = None
    if args.protocol_features is not None:
        known = {str(feature.name).lower(): feature.value for feature in ProtocolFeature}
        protocol_features = parse(args.protocol_features, (1 << 64) - 1, known)
    with _until_signal() as stop, ExitStack() as stack:
        endpoint = stack.enter_context(parse_endpoint(args.endpoint, args.queue_pairs))
        warm_up(_say)
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
            )
        )
        wake = stack.enter_context(_woken_by_signals())
        _say(f"serving {args.endpoint} {'to' if args.connect else 'on'} {args.socket}; ^C or SIGTERM ends it")
        server.run(stop.is_set, wake)
        counters = endpoint.counters()
        report = {"served": server.served, "refused": server.refused, "endpoint": counters}
    _human(args)(f"served {report['served']} front ends, {counters['to_wire']:,} frames to the endpoint, "
          f"{counters['from_wire']:,} from it")  # fmt: skip
    if args.json:
        _write_json(args.json, report)
    return 0


def _drive(args: argparse.Namespace) -> int:
    from .drive import drive
    from .endpoints.spec import parse_endpoint
    from .features import parse
    from .warmup import warm_up

    spec = args.endpoint
    if args.count is not None:
        kind, _, options = spec.partition(":")
        if kind != "generate":
            raise ConfigError("--count goes with the endpoint generate")
        spec = f"{kind}:{options + ',' if options else ''}count={args.count}"
    with _until_signal() as stop, parse_endpoint(spec, args.queue_pairs) as endpoint:
        warm_up(_say)
        report = drive(
            endpoint,
            args.socket,
            stop.is_set,
            _say,
            listen=args.listen,
            queue_pairs=args.queue_pairs,
            num=args.ring,
            features=None if args.features is None else parse(args.features, (1 << 64) - 1),
            mtu=args.mtu,
            wait_s=args.wait,
            seconds=args.seconds,
            poll_us=-1 if args.poll else args.poll_us,
        )
    _human(args)(f"sent {report['tx_packets']:,}, received {report['rx_packets']:,} ({report['mpps']:.3f} Mpps), "
          f"bad {report['bad_packets']:,}")  # fmt: skip
    if args.json:
        _write_json(args.json, report)
    return 1 if report["bad_packets"] else 0


def _print_link(report: dict[str, Any], say: Callable[[str], None]) -> None:
    seconds = report["seconds"]
    for side, other in (("left", "right"), ("right", "left")):
        counters = report[side]
        frames, size = counters["from_wire"], counters["bytes_from_wire"]
        say(
            f"{side} to {other}: {frames:,} frames, {frames / seconds / 1e6:.3f} Mpps, {size * 8 / seconds / 1e9:.3f} Gbit/s"
        )
    dropped = {
        f"{side} {key.removeprefix('dropped_')}": report[side][key]
        for side in ("left", "right")
        for key in report[side]
        if key.startswith("dropped_") and report[side][key]
    }
    if dropped:
        say("dropped: " + ", ".join(f"{count:,} {reason}" for reason, count in dropped.items()))
    say(f"owner {report['owner']}, {report['handovers']} hand-overs, {report['fallbacks']} fallbacks")
    if "ledger" in report:
        say("ledger: " + ", ".join(f"{value:,} {key}" for key, value in report["ledger"].items()))
    for error in report["errors"]:
        say(f"error: {error}")


def _bench(args: argparse.Namespace) -> int:
    from .bench.report import finish

    if args.what == "ring":
        from .bench.ring import run as run_ring

        results = run_ring(rounds=args.rounds, seconds=args.seconds, say=_say)
    elif args.what == "peers":
        from .bench.peers import run as run_peers

        results = run_peers(args.rounds, args.seconds, _say)
    else:
        from .bench.link import run as run_link

        results = run_link(args.seconds, args.rounds, None, _say)
    report = finish(args.what, results, args.plot, _human(args))
    if args.json:
        _write_json(args.json, report)
    return 0


def _doctor(args: argparse.Namespace) -> int:
    from .doctor import run

    report = run(_human(args))
    if args.json:
        _write_json(args.json, report)
    return 0 if report["ok"] else 1


def _number(low: int, high: int, what: str) -> Callable[[str], int]:
    def convert(text: str) -> int:
        if not text.isdecimal() or not low <= int(text) <= high:
            raise argparse.ArgumentTypeError(f"{what} is between {low} and {high}, not {text!r}")
        return int(text)

    return convert


def _ring(text: str) -> int:
    from .virtqueue import check_num

    num = int(text) if text.isdecimal() else 0
    try:
        check_num(num)
    except ConfigError as e:
        raise argparse.ArgumentTypeError(str(e) if num else f"{text!r} is not a power of two from 1 to 32768") from e
    return num


def _positive(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"a number above 0, not {text!r}")
    return value


def _file(text: str) -> str:
    """Refuse a file that can't be written before any work is done for it."""
    if text != "-" and not Path(text).parent.is_dir():
        raise argparse.ArgumentTypeError(f"cannot write {text}: there is no folder {Path(text).parent}")
    return text


def _picture(text: str) -> str:
    if importlib.util.find_spec("matplotlib") is None:
        raise argparse.ArgumentTypeError("it needs matplotlib: pip install 'vnetdp[plot]'")
    return _file(text)


class _Parser(argparse.ArgumentParser):
    """An error is one line: the usage is a page, and --help shows it."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message} (try {self.prog} --help)\n")


def _polling(command: argparse.ArgumentParser) -> None:
    command.add_argument("--poll", action="store_true", help="busy-poll, and never sleep")
    command.add_argument("--poll-us", type=_number(0, 10_000_000, "a time in µs"), default=0, metavar="N",
                         help="busy-poll so long before sleeping")  # fmt: skip


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="vnetdp",
        description="A userspace virtio-net datapath at native speed, with vhost offload.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"vnetdp {__version__}")
    parser.add_argument("-v", "--verbose", action="store_true", help="log what happens, not only what goes wrong")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, run: Callable[[argparse.Namespace], int], text: str, **kw: Any) -> argparse.ArgumentParser:
        sub: argparse.ArgumentParser = commands.add_parser(name, help=text, description=text, **kw)
        sub.add_argument(
            "--json", type=_file, metavar="PATH", help="write the report as JSON to PATH; - is standard output"
        )
        sub.set_defaults(run=run)
        return sub

    demo = command("demo", _demo, "Show traffic move from userspace to vhost, through a failure, and back.")
    demo.add_argument("--seconds", type=_positive, default=1.0, help="of each phase (default 1)")

    link = command(
        "link",
        _link,
        "Join two endpoints through an emulated device and driver: LEFT is the device's, RIGHT the guest's.",
        epilog=_ENDPOINTS,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    link.add_argument("left", metavar="LEFT")
    link.add_argument("right", metavar="RIGHT")
    link.add_argument("--datapath", choices=("userspace", "vhost", "vhost-process"), default="vhost")
    link.add_argument("--queue-pairs", type=_number(1, 256, "the number of queue pairs"), default=1, metavar="N")
    link.add_argument("--ring", type=_ring, default=256, metavar="N", help="queue size (default 256)")
    link.add_argument("--mtu", type=_number(68, 65535, "an MTU"), metavar="N", help="offer VIRTIO_NET_F_MTU")
    _polling(link)
    link.add_argument("--switch-ms", type=_number(1, 3_600_000, "a time in ms"), metavar="N",
                      help="hand the rings to the other owner every N ms")  # fmt: skip
    link.add_argument("--switches", type=int, metavar="N", help="stop switching after N hand-overs")
    link.add_argument("--seconds", type=_positive, help="end after so long (default: a signal ends it)")

    serve = command(
        "serve",
        _serve,
        "Be a vhost-user back end: QEMU, User Mode Linux and DPDK attach to SOCKET.",
        epilog=_ENDPOINTS,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    serve.add_argument("endpoint", metavar="ENDPOINT")
    serve.add_argument("--socket", required=True, metavar="PATH")
    serve.add_argument("--connect", action="store_true", help="the front end listens: connect, again and again")
    serve.add_argument("--features", metavar="LIST", help="offer less: -mrg_rxbuf,-event_idx,...")
    serve.add_argument("--protocol-features", metavar="LIST", help="offer less: -inflight_shmfd,-status,...")
    serve.add_argument("--queue-pairs", type=_number(1, 128, "the number of queue pairs"), default=1, metavar="N")
    serve.add_argument("--mtu", type=_number(68, 65535, "an MTU"), metavar="N", help="offer VIRTIO_NET_F_MTU")
    serve.add_argument(
        "--inband", action="store_true", help="offer notifications as messages: slow; for UML's time travel"
    )
    _polling(serve)

    drive = command(
        "drive",
        _drive,
        "Be a vhost-user front end: a guest's driver against any back end.",
        epilog=_ENDPOINTS,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    drive.add_argument("endpoint", metavar="ENDPOINT")
    drive.add_argument("--socket", required=True, metavar="PATH")
    drive.add_argument("--listen", action="store_true", help="own the socket: the back end connects")
    drive.add_argument(
        "--count", type=_number(1, 1 << 62, "a count"), metavar="N", help="send N frames a queue, then end"
    )
    drive.add_argument("--seconds", type=_positive, help="end after so long")
    drive.add_argument("--wait", type=_positive, default=30.0, metavar="S", help="for a back end (default 30 s)")
    drive.add_argument("--mtu", type=_number(68, 65535, "an MTU"), default=1500, metavar="N",
                       help="of what the other side sends (default 1500)")  # fmt: skip
    drive.add_argument("--features", metavar="LIST", help="take less: -mrg_rxbuf,-event_idx,...")
    drive.add_argument("--queue-pairs", type=_number(1, 128, "the number of queue pairs"), default=1, metavar="N")
    drive.add_argument("--ring", type=_ring, default=256, metavar="N", help="queue size (default 256)")
    _polling(drive)

    bench = command("bench", _bench, "Measure, and compare with peers in the same run.")
    bench.add_argument("what", choices=("ring", "link", "peers"))
    bench.add_argument("--rounds", type=_number(1, 1000, "the number of rounds"), default=5, metavar="N")
    bench.add_argument("--seconds", type=_positive, default=2.0, help="of each measurement (default 2)")
    bench.add_argument("--plot", type=_picture, metavar="FILE", help="draw the results (needs the plot extra)")

    command("doctor", _doctor, "Say what this machine can run, and what to do about the rest.")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run a command; return its exit status: 0 done, 1 done and something is not as it must be, 2 wrong usage or input."""
    args = _parser().parse_args(argv)
    logging.basicConfig(level=logging.INFO if args.verbose else logging.WARNING, format="%(name)s: %(message)s")
    run: Callable[[argparse.Namespace], int] = args.run
    try:
        return run(args)
    except VnetdpError as e:
        _say(f"vnetdp: {e}")
        return 2
    except KeyboardInterrupt:
        return 130
