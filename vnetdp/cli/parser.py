"""The command line: its commands and options, and the checks of their values."""

from __future__ import annotations

import argparse
import errno
import importlib.util
import logging
import math
import os
import signal
import stat
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from vnetdp_kernels import spec

from .._version import __version__
from ..endpoints.names import explained
from ..errors import ConfigError, OutputError, VnetdpError, WorkError
from ..system import limits, output, signals
from . import commands, migration

_log = logging.getLogger(__name__)

_STATUS = """\
exit status, of every command:
  0        done; a fallback that lost no frame is in the report and the log, and is no failure
  1        done, and an error is reported: frames were lost, duplicated, reordered or corrupted, an endpoint or the back end
           failed, a check failed, or the report can't be written
  2        not begun: wrong usage or input, or a part of the machine is missing
  128 + N  ended by signal N (130: ^C) before the work was done, or at once by a second signal; link, serve and drive work
           until they are asked to end: a first signal ends them with status 0 or 1
"""

_Command = Callable[..., argparse.ArgumentParser]  # adds a command to the parser, and returns its own

_VERBOSE = "log each event, not only warnings and errors"
_FEATURE_LISTS = ("--features", "--protocol-features")
_FEATURES_SYNTAX = "-mrg_rxbuf,-event_idx: all but these; mrg_rxbuf,version_1: these and the features that they need"


def _number(low: int, high: int, what: str) -> Callable[[str], int]:
    def convert(text: str) -> int:
        if not text.isdecimal() or not low <= int(text) <= high:
            raise argparse.ArgumentTypeError(f"{what} is between {low} and {high}, not {text!r}")
        return int(text)

    return convert


_mtu = _number(spec.MIN_MTU, spec.MAX_MTU, "an MTU")


def _ring(text: str) -> int:
    from ..virtio.queue import check_num

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
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0")
    return value


def _file(text: str) -> str:
    """Refuse a file that can't be written before any work is done for it."""
    try:
        why = _why_not_written(text)
    except OSError as e:  # no folder, too long a name, a folder without the right to look into it
        why = limits.of_path(text, e, to_make=True)
    if why:
        raise argparse.ArgumentTypeError(f"cannot write {text}: {why}")
    return text


def _why_not_written(text: str) -> str | None:
    if text == "-":
        return "standard output is closed: name a file" if sys.stdout is None else None
    path = Path(text)
    if path.is_dir():
        return "it is a folder: name a file"
    there = path if path.exists() else path.parent
    if not stat.S_ISDIR(path.parent.stat().st_mode):
        code = errno.ENOTDIR
    elif not os.access(there, os.W_OK):
        code = errno.EROFS if os.statvfs(there).f_flag & os.ST_RDONLY else errno.EACCES
    else:
        return None
    return limits.of_path(path, OSError(code, os.strerror(code)))


def _picture(text: str) -> str:
    if importlib.util.find_spec("matplotlib") is None:
        raise argparse.ArgumentTypeError("a picture needs matplotlib: pip install 'vnetdp[plot]'")
    if Path(text).suffix not in (".png", ".svg", ".pdf"):
        raise argparse.ArgumentTypeError(f"{text!r} does not end in .png, .svg or .pdf")
    return _file(text)


class _Parser(argparse.ArgumentParser):
    """An error is one line: the usage is a page, and --help shows it."""

    def _print_message(self, message: str, file: Any = None) -> None:
        # argparse heeds no error; that of Python 3.11.2 (Debian 12) fails at a standard error that is closed.
        if message:
            (output.say if file in (None, sys.stderr) else output.tell)(message.removesuffix("\n"))

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        self._given = list(args) if args is not None else sys.argv[1:]
        return super().parse_known_args(args, namespace)

    def error(self, message: str) -> NoReturn:
        if message.startswith("the following arguments are required"):
            # argparse reports a missing argument before a misspelt option, which may be the reason that it is missing.
            options = [text.partition("=")[0] for text in self._given if text.startswith("--") and text != "--"]
            known = self._option_string_actions
            unknown = [text for text in options if not any(name.startswith(text) for name in known)]
            message = f"unrecognized arguments: {' '.join(unknown)}" if unknown else message
        self.exit(2, f"{self.prog}: {message} (try {self.prog} --help)\n")


def _polling(command: argparse.ArgumentParser) -> None:
    command.add_argument("--poll", action="store_true", help="busy-poll, and never sleep")
    command.add_argument("--poll-us", type=_number(0, 10_000_000, "a time in µs"), default=0, metavar="N",
                         help="busy-poll N µs before sleeping (default: 0)")  # fmt: skip


def _worker_timeout(command: argparse.ArgumentParser, then: str) -> None:
    command.add_argument("--worker-timeout", type=_positive, metavar="N",
                         help=f"give up a worker that does not answer for N seconds: {then} (default: 10)")  # fmt: skip


def _queue_pairs(command: argparse.ArgumentParser, most: int) -> None:
    command.add_argument("--queue-pairs", type=_number(1, most, "the number of queue pairs"), default=1, metavar="N",
                         help=f"use N queue pairs, 1 to {most} (default: 1)")  # fmt: skip


def _ring_size(command: argparse.ArgumentParser, default: int | None = 256) -> None:
    command.add_argument("--ring", type=_ring, default=default, metavar="N",
                         help="make queues of N descriptors, a power of two from 1 to 32768 (default: 256)")  # fmt: skip


def _offered_mtu(command: argparse.ArgumentParser) -> None:
    command.add_argument("--mtu", type=_mtu, metavar="N",
                         help="offer VIRTIO_NET_F_MTU, with N bytes (default: not offered)")  # fmt: skip


def _fault(command: argparse.ArgumentParser, what: str) -> None:
    from ..backends.names import FAULT, FAULT_PARTS, UNBIND, VERBS

    command.add_argument("--fault", action="append", metavar="FAULT",
                         help=f"{what}: {FAULT.removeprefix('[PHASE.]')}; {FAULT_PARTS}; may be repeated; verbs are "
                              f"{', '.join((*VERBS, UNBIND))} (default: none)")  # fmt: skip


def _socket(command: argparse.ArgumentParser) -> None:
    command.add_argument("--socket", required=True, metavar="PATH", help="the Unix socket of vhost-user (required)")


def _plot(command: argparse.ArgumentParser) -> None:
    command.add_argument("--plot", type=_picture, metavar="FILE",
                         help="draw the results into FILE, .png, .svg or .pdf; needs the plot extra (default: no "
                              "picture)")  # fmt: skip


def _demo(command: _Command) -> None:
    demo = command(
        "demo",
        commands.demo,
        "Show traffic move from userspace to vhost, through a failure, back, and to another process.",
    )
    demo.add_argument("--seconds", type=_positive, default=1.0, metavar="N",
                      help="run each phase for N seconds (default: 1)")  # fmt: skip


def _link(command: _Command) -> None:
    link = command(
        "link",
        commands.link,
        "Join two endpoints through an emulated device and driver.",
        epilog=explained(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    link.add_argument("left", metavar="LEFT", help="the device's endpoint")
    link.add_argument("right", metavar="RIGHT", help="the guest's endpoint")
    link.add_argument("--datapath", choices=("userspace", "vhost", "vhost-process"),
                      help="give the rings to the device's own loop, a worker thread, or a worker process (default: "
                           "vhost)")  # fmt: skip
    _queue_pairs(link, 256)
    _ring_size(link, None)
    _offered_mtu(link)
    _polling(link)
    _worker_timeout(link, "userspace goes on with its rings; once the link is to end, a worker process has 2 seconds")
    _fault(link, "make a verb of the vhost worker fail")
    link.add_argument("--switch-ms", type=_number(1, 3_600_000, "a time in ms"), metavar="N",
                      help="hand the rings to the other owner every N ms (default: never)")  # fmt: skip
    link.add_argument("--switches", type=_number(1, 1 << 62, "a count"), metavar="N",
                      help="stop switching after N hand-overs; needs --switch-ms (default: no limit)")  # fmt: skip
    link.add_argument("--seconds", type=_positive, metavar="N",
                      help="end after N seconds (default: at a signal, or when all frames of finite endpoints are "
                           "through)")  # fmt: skip


def _serve(command: _Command) -> None:
    serve = command(
        "serve",
        commands.serve,
        "Be a vhost-user back end: QEMU, User Mode Linux and DPDK attach to PATH.",
        epilog=explained(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    serve.add_argument("endpoint", metavar="ENDPOINT", help="the device's endpoint")
    _socket(serve)
    serve.add_argument(
        "--connect",
        action="store_true",
        help="connect to the socket, on which the front end listens, again after each connection",
    )
    serve.add_argument("--features", metavar="LIST", help=f"offer fewer features: {_FEATURES_SYNTAX} (default: all)")
    serve.add_argument("--protocol-features", metavar="LIST", default="",
                       help="offer other protocol features: -inflight_shmfd,-status: all but these; mq,config: only "
                            "these; +device_state: this one too, which QEMU then needs from each back end that it "
                            "migrates to (default: all but device_state)")  # fmt: skip
    _queue_pairs(serve, 128)
    _offered_mtu(serve)
    serve.add_argument("--inband", action="store_true",
                       help="offer notifications as messages, for UML's time travel; they are slow")  # fmt: skip
    _polling(serve)
    _worker_timeout(serve, "the front end's connection is closed, and the front end is served anew when it comes back")
    _fault(serve, "make a verb of the worker fail, and with it the front end's request")


def _drive(command: _Command) -> None:
    drive = command(
        "drive",
        commands.drive,
        "Be a vhost-user front end: a guest's driver against any back end.",
        epilog=explained(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    drive.add_argument("endpoint", metavar="ENDPOINT", help="the guest's endpoint")
    _socket(drive)
    drive.add_argument("--listen", action="store_true", help="listen on the socket, to which the back end connects")
    drive.add_argument(
        "--count",
        type=_number(1, 1 << 62, "a count"),
        metavar="N",
        help="send N frames a queue pair, then end; needs the endpoint generate (default: no limit)",
    )
    drive.add_argument("--seconds", type=_positive, metavar="N",
                       help="end after N seconds (default: at a signal, or when all frames of a finite endpoint are "
                            "through)")  # fmt: skip
    drive.add_argument("--wait", type=_positive, default=30.0, metavar="N",
                       help="wait up to N seconds for a back end, at first and after each loss of its connection "
                            "(default: 30)")  # fmt: skip
    drive.add_argument(
        "--mtu",
        type=_mtu,
        default=1500,
        metavar="N",
        help="take frames of an MTU of N bytes, if the back end tells no larger one (default: 1500)",
    )
    drive.add_argument(
        "--features",
        metavar="LIST",
        help=f"accept fewer features: {_FEATURES_SYNTAX} (default: all that the back end offers)",
    )
    _queue_pairs(drive, 128)
    _ring_size(drive)
    _polling(drive)


def _bench(command: _Command) -> None:
    bench = command("bench", commands.bench, "Measure, and compare with peers in the same run.")
    bench.add_argument("what", choices=("ring", "link", "peers", "migration"), help="the benchmark to run")
    bench.add_argument("--rounds", type=_number(1, 1000, "the number of rounds"), metavar="N",
                       help="make N rounds of each measurement (default: 5; migration 20)")  # fmt: skip
    bench.add_argument("--seconds", type=_positive, default=2.0, metavar="N",
                       help="measure for N seconds each time (default: 2)")  # fmt: skip
    _plot(bench)


def _migrate(command: _Command) -> None:
    from ..backends.names import FAULT, FAULT_PARTS, FAULT_POINTS
    from ..lab.names import CHANGES
    from ..migration.names import POLICIES, TRAFFIC

    migrate = command("migrate", migration.migrate, "Migrate a machine under traffic from one process to another.")
    migrate.add_argument("--policy", choices=POLICIES, default="delta",
                         help="do this much early: nothing; as the posted patch, bugs included; or also the patch's "
                              "future work (default: delta)")  # fmt: skip
    _queue_pairs(migrate, 256)
    _ring_size(migrate)
    migrate.add_argument("--traffic", choices=TRAFFIC, default="both",
                         help="send frames in these directions, as the guest sees them (default: both)")  # fmt: skip
    migrate.add_argument("--size", type=_number(64, 9000, "a frame's size"), default=64, metavar="N",
                         help="send frames of N bytes, 64 to 9000 (default: 64)")  # fmt: skip
    migrate.add_argument("--rate", type=_rate, metavar="N",
                         help="send N frames a second in each direction of each queue pair; 0: as many as pass "
                              "(default: 100000, divided by the number of queue pairs)")  # fmt: skip
    migrate.add_argument("--first-idx", type=_number(0, 65535, "an index"), default=0, metavar="N",
                         help="begin the rings at the index N, 0 to 65535 (default: 0)")  # fmt: skip
    migrate.add_argument("--change", action="append", default=[], choices=CHANGES, metavar="FIELD",
                         help="change a field between the early state and the stop; may be repeated; FIELD is one of "
                              f"{', '.join(CHANGES)} (default: none)")  # fmt: skip
    migrate.add_argument("--churn", choices=CHANGES, metavar="FIELD",
                         help="change a field 1,000 times a second until the stop (default: none)")  # fmt: skip
    migrate.add_argument("--fault", action="append", default=[], metavar="FAULT",
                         help=f"make a verb fail at the destination: {FAULT}, or, as source:FAULT, at the source; "
                              f"{FAULT_PARTS}; may be repeated; phases are early, final and retry; verbs are "
                              f"{', '.join(FAULT_POINTS)} (default: none)")  # fmt: skip
    migrate.add_argument("--endpoint", default="generate", metavar="ENDPOINT",
                         help="the device's endpoint: generate, echo or tap:NAME (default: generate)")  # fmt: skip
    migrate.add_argument(
        "--target-endpoint",
        metavar="ENDPOINT",
        help="the endpoint at the destination, such as a second TAP (default: that of --endpoint)",
    )
    migrate.add_argument("--source-userspace", action="store_true", help="use no vhost at the source")
    migrate.add_argument("--target-userspace", action="store_true", help="use no vhost at the destination")
    migrate.add_argument("--repeat", type=_number(1, 1_000_000, "a count"), default=1, metavar="N",
                         help="make N migrations, back and forth (default: 1)")  # fmt: skip
    migrate.add_argument("--tcp", action="store_true", help="migrate over TCP on loopback, not over a Unix socket")
    migrate.add_argument(
        "--no-check",
        action="store_true",
        help="don't compare guest memory of source and destination while the machine is stopped",
    )
    _plot(migrate)


def _faults(command: _Command) -> None:
    from ..migration.names import POLICIES, TRAFFIC

    faults = command("faults", migration.faults, "Run the fault matrix: each fault at each point of a migration.")
    faults.add_argument("--policy", choices=POLICIES, default="delta",
                        help="migrate by this policy: see migrate --help (default: delta)")  # fmt: skip
    faults.add_argument(
        "--only",
        default="",
        metavar="ID",
        help="run the rows whose id begins with these parts, such as D1 or A6/mac (default: all rows)",
    )
    faults.add_argument("--list", action="store_true", help="show the ids of the rows, and run none")
    faults.add_argument("--queue-pairs", type=_number(1, 64, "the number of queue pairs"), action="append", metavar="N",
                        help="use N queue pairs, 1 to 64; may be repeated (default: 1, then 4)")  # fmt: skip
    faults.add_argument(
        "--traffic",
        choices=TRAFFIC,
        help="send frames in these directions, as the guest sees them (default: idle, then both)",
    )
    faults.add_argument("--all", dest="verbose_rows", action="store_true", help="show each row, not only failed ones")
    where = faults.add_mutually_exclusive_group()
    where.add_argument("--jobs", type=_number(1, 256, "the number of jobs"), default=1, metavar="N",
                       help="run cases in N processes, 1 to 256 (default: 1)")  # fmt: skip
    where.add_argument("--dask", metavar="ADDRESS",
                       help="run cases on the Dask cluster whose scheduler is at ADDRESS (default: none)")  # fmt: skip


def _rate(text: str) -> float:
    return 0.0 if text == "0" else _positive(text)


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="vnetdp",
        description="A userspace virtio-net datapath at native speed, with vhost offload.",
        epilog=_STATUS,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"vnetdp {__version__}")
    parser.add_argument("-v", "--verbose", action="store_true", help=_VERBOSE)
    verbs = parser.add_subparsers(dest="command", metavar="COMMAND")

    def command(
        name: str, run: Callable[[argparse.Namespace, signals.Ending], int], text: str, **kw: Any
    ) -> argparse.ArgumentParser:
        sub: argparse.ArgumentParser = verbs.add_parser(name, help=text, description=text, **kw)
        sub.add_argument(
            "--json",
            type=_file,
            metavar="PATH",
            help="write the report as JSON to PATH, or to standard output for - (default: no JSON)",
        )
        # As before the command, which it does not undo.
        sub.add_argument("-v", "--verbose", action="store_true", default=argparse.SUPPRESS, help=_VERBOSE)
        sub.set_defaults(run=run, parser=sub)
        return sub

    _demo(command)
    _link(command)
    _serve(command)
    _drive(command)
    _bench(command)
    _migrate(command)
    _faults(command)
    command("doctor", commands.doctor, "Say what this machine can run, and what to do about the rest.")
    return parser


def _joined(argv: list[str]) -> list[str]:
    """Return *argv* with lists of features joined to their options: argparse takes `-mrg_rxbuf` for another option."""
    joined: list[str] = []
    for word in argv:
        if joined and joined[-1] in _FEATURE_LISTS and word.startswith("-") and not word.startswith("--"):
            joined[-1] += f"={word}"
        else:
            joined.append(word)
    return joined


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = _parser()
    parser.set_defaults(parser=parser)  # until a command puts its own in the place
    args, unknown = parser.parse_known_args(_joined(argv))
    if unknown:
        args.parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    if args.command is None:  # told here, as argparse would tell it in place of an option that is unknown
        parser.error("a COMMAND is required")
    return args


def main(argv: list[str] | None = None) -> int:
    """Run a command; return its exit status (see _STATUS)."""
    output.open_streams()
    try:
        try:
            return _run(_parse(sys.argv[1:] if argv is None else argv), program=argv is None)
        finally:
            output.flush()
    except BrokenPipeError:
        return 128 + signal.SIGPIPE
    except OutputError as e:
        output.say(f"vnetdp: {e}")
        return 1
    except KeyboardInterrupt:
        return 128 + signal.SIGINT


def _run(args: argparse.Namespace, program: bool) -> int:
    logging.basicConfig(level=logging.INFO if args.verbose else logging.WARNING, format="%(name)s: %(message)s")
    run: Callable[[argparse.Namespace, signals.Ending], int] = args.run
    try:
        limits.raise_descriptor_limit()
        if args.command != "doctor":  # it reports that
            limits.check_memory()
        # Nothing here multiplies matrices; each thread of OpenBLAS takes memory, a task, and time to start.
        os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
        with signals.handled(program) as ending:
            ending.writers.append(output.json_writer(args))
            try:
                return run(args, ending)
            except signals.Ended as e:
                return ending.give_up(e.number)
            except WorkError as e:
                error = str(e)
                output.say(f"vnetdp: {error}")
                ending.finish(lambda report: report.update(error=error))
                return 1
    except (OutputError, BrokenPipeError):
        raise
    except VnetdpError as e:
        output.say(f"vnetdp: {e}")
        return 2
    except (OSError, MemoryError, ImportError, RuntimeError) as e:
        said = limits.fault(e)
        if not said:
            raise
        _log.info("%s", said, exc_info=True)
        output.say(f"vnetdp: {said}")
        return 2
