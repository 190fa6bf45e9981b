"""The command line: what can be asked for, and what is wrong with how it was asked."""

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

from . import commands, limits, migration_commands, output, signals
from ._version import __version__
from .endpoints.names import explained
from .errors import ConfigError, OutputError, VnetdpError, WorkError

_log = logging.getLogger(__name__)

_STATUS = """\
exit status, of every command:
  0        done; a fallback that lost no frame is in the report and the log, and no failure
  1        done, and something went wrong, which is said: frames were lost, duplicated, reordered or corrupted, an endpoint
           or the back end failed, a check failed, or the report can't be written
  2        not begun: wrong usage or input, or something is missing here
  128 + N  signal N (130: ^C) ended it before its work was done, or a second signal did at once; link, serve and drive, which
           work until they are asked to end, are done when the first signal comes, and end with 0 or 1
"""

_Command = Callable[..., argparse.ArgumentParser]  # adds a command to the parser, and returns its own

_VERBOSE = "log what happens, not only what goes wrong"
_FEATURE_LISTS = ("--features", "--protocol-features")


def _number(low: int, high: int, what: str) -> Callable[[str], int]:
    def convert(text: str) -> int:
        if not text.isdecimal() or not low <= int(text) <= high:
            raise argparse.ArgumentTypeError(f"{what} is between {low} and {high}, not {text!r}")
        return int(text)

    return convert


_mtu = _number(spec.MIN_MTU, spec.MAX_MTU, "an MTU")


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
    try:
        why = _why_not_written(text)
    except OSError as e:  # no folder, too long a name, a folder that nobody lets us look into
        why = limits.of_path(text, e)
    if why:
        raise argparse.ArgumentTypeError(f"cannot write {text}: {why}")
    return text


def _why_not_written(text: str) -> str | None:
    if text == "-":
        return "standard output is closed" if sys.stdout is None else None
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
        raise argparse.ArgumentTypeError("it needs matplotlib: pip install 'vnetdp[plot]'")
    if Path(text).suffix not in (".png", ".svg", ".pdf"):
        raise argparse.ArgumentTypeError(f"a picture's name ends in .png, .svg or .pdf; {text!r} does not")
    return _file(text)


class _Parser(argparse.ArgumentParser):
    """An error is one line: the usage is a page, and --help shows it."""

    def _print_message(self, message: str, file: Any = None) -> None:
        # argparse heeds no error; that of Python 3.11.2 (Debian 12) fails at a standard error that is closed.
        if message:
            (output.say if file in (None, sys.stderr) else output.tell)(message.removesuffix("\n"))

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message} (try {self.prog} --help)\n")


def _polling(command: argparse.ArgumentParser) -> None:
    command.add_argument("--poll", action="store_true", help="busy-poll, and never sleep")
    command.add_argument("--poll-us", type=_number(0, 10_000_000, "a time in µs"), default=0, metavar="N",
                         help="busy-poll so long before sleeping")  # fmt: skip


def _worker_timeout(command: argparse.ArgumentParser, then: str) -> None:
    command.add_argument("--worker-timeout", type=_positive, metavar="S",
                         help=f"a worker that does not answer for S seconds (default 10) is given up: {then}")  # fmt: skip


def _demo(command: _Command) -> None:
    demo = command(
        "demo",
        commands.demo,
        "Show traffic move from userspace to vhost, through a failure, back, and to another process.",
    )
    demo.add_argument("--seconds", type=_positive, default=1.0, help="of each phase (default 1)")


def _link(command: _Command) -> None:
    link = command(
        "link",
        commands.link,
        "Join two endpoints through an emulated device and driver: LEFT is the device's, RIGHT the guest's.",
        epilog=explained(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    link.add_argument("left", metavar="LEFT")
    link.add_argument("right", metavar="RIGHT")
    link.add_argument("--datapath", choices=("userspace", "vhost", "vhost-process"), help="(default vhost)")
    link.add_argument("--queue-pairs", type=_number(1, 256, "the number of queue pairs"), default=1, metavar="N")
    link.add_argument("--ring", type=_ring, metavar="N", help="queue size (default 256)")
    link.add_argument("--mtu", type=_mtu, metavar="N", help="offer VIRTIO_NET_F_MTU")
    _polling(link)
    _worker_timeout(link, "userspace goes on with its rings; once the link is to end, a worker process has 2 s")
    link.add_argument("--switch-ms", type=_number(1, 3_600_000, "a time in ms"), metavar="N",
                      help="hand the rings to the other owner every N ms")  # fmt: skip
    link.add_argument("--switches", type=_number(1, 1 << 62, "a count"), metavar="N",
                      help="stop switching after N hand-overs (with --switch-ms)")  # fmt: skip
    link.add_argument("--seconds", type=_positive, help="end after so long (default: a signal ends it)")


def _serve(command: _Command) -> None:
    serve = command(
        "serve",
        commands.serve,
        "Be a vhost-user back end: QEMU, User Mode Linux and DPDK attach to SOCKET.",
        epilog=explained(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    serve.add_argument("endpoint", metavar="ENDPOINT")
    serve.add_argument("--socket", required=True, metavar="PATH")
    serve.add_argument("--connect", action="store_true", help="the front end listens: connect, again and again")
    serve.add_argument("--features", metavar="LIST",
                       help="offer less: -mrg_rxbuf,-event_idx,... all but these; mrg_rxbuf,version_1,... "
                            "only these, and what they need")  # fmt: skip
    serve.add_argument("--protocol-features", metavar="LIST", default="",
                       help="offer more or less: -inflight_shmfd,-status,... all but these; mq,config,... only these; "
                            "+device_state: that, too, which QEMU then needs wherever it migrates")  # fmt: skip
    serve.add_argument("--queue-pairs", type=_number(1, 128, "the number of queue pairs"), default=1, metavar="N")
    serve.add_argument("--mtu", type=_mtu, metavar="N", help="offer VIRTIO_NET_F_MTU")
    serve.add_argument(
        "--inband", action="store_true", help="offer notifications as messages: slow; for UML's time travel"
    )
    _polling(serve)
    _worker_timeout(serve, "its front end is hung up on, and served anew when it comes back")


def _drive(command: _Command) -> None:
    drive = command(
        "drive",
        commands.drive,
        "Be a vhost-user front end: a guest's driver against any back end.",
        epilog=explained(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    drive.add_argument("endpoint", metavar="ENDPOINT")
    drive.add_argument("--socket", required=True, metavar="PATH")
    drive.add_argument("--listen", action="store_true", help="own the socket: the back end connects")
    drive.add_argument(
        "--count", type=_number(1, 1 << 62, "a count"), metavar="N", help="send N frames a queue, then end"
    )
    drive.add_argument("--seconds", type=_positive, help="end after so long")
    drive.add_argument("--wait", type=_positive, default=30.0, metavar="S",
                       help="for a back end, at first and whenever its connection is lost (default 30 s)")  # fmt: skip
    drive.add_argument("--mtu", type=_mtu, default=1500, metavar="N",
                       help="of what the other side sends (default 1500)")  # fmt: skip
    drive.add_argument("--features", metavar="LIST",
                       help="take less: -mrg_rxbuf,-event_idx,... all but these; mrg_rxbuf,version_1,... "
                            "only these, and what they need")  # fmt: skip
    drive.add_argument("--queue-pairs", type=_number(1, 128, "the number of queue pairs"), default=1, metavar="N")
    drive.add_argument("--ring", type=_ring, default=256, metavar="N", help="queue size (default 256)")
    _polling(drive)


def _bench(command: _Command) -> None:
    bench = command("bench", commands.bench, "Measure, and compare with peers in the same run.")
    bench.add_argument("what", choices=("ring", "link", "peers", "migration"))
    bench.add_argument("--rounds", type=_number(1, 1000, "the number of rounds"), metavar="N",
                       help="measure each N times (default 5; migration 20)")  # fmt: skip
    bench.add_argument("--seconds", type=_positive, default=2.0, help="of each measurement (default 2)")
    bench.add_argument("--plot", type=_picture, metavar="FILE", help="draw the results (needs the plot extra)")


def _migration(command: _Command) -> None:
    from .migration.names import CHANGES, FAULT_POINTS, POLICIES, TRAFFIC

    migrate = command(
        "migrate", migration_commands.migrate, "Migrate a machine under traffic from one process to another."
    )
    migrate.add_argument("--policy", choices=POLICIES, default="delta", help="how much is done early (default delta)")
    migrate.add_argument("--queue-pairs", type=_number(1, 256, "the number of queue pairs"), default=1, metavar="N")
    migrate.add_argument("--ring", type=_ring, default=256, metavar="N", help="queue size (default 256)")
    migrate.add_argument("--traffic", choices=TRAFFIC, default="both", help="as the guest sees it (default both)")
    migrate.add_argument("--size", type=_number(64, 9000, "a frame's size"), default=64, metavar="N")
    migrate.add_argument("--rate", type=_rate, metavar="N",
                         help="frames a second, queue and way; 0 = all that pass (default 100,000 in all)")  # fmt: skip
    migrate.add_argument("--first-idx", type=_number(0, 65535, "an index"), default=0, metavar="N",
                         help="where the rings' indices begin (default 0)")  # fmt: skip
    migrate.add_argument("--change", action="append", default=[], choices=CHANGES, metavar="FIELD",
                         help=f"change it between the early state and the stop: {', '.join(CHANGES)}")  # fmt: skip
    migrate.add_argument("--churn", choices=CHANGES, metavar="FIELD", help="change it 1,000 times a second")
    migrate.add_argument("--fault", action="append", default=[], metavar="FAULT",
                         help="a verb that fails at the destination: [PHASE.]VERB[:PAIR[,VRING]][:once|always]; phases "
                              "are early, final and retry; verbs are " + ", ".join(FAULT_POINTS) +
                              "; source:FAULT is one at the source")  # fmt: skip
    migrate.add_argument("--endpoint", default="generate", metavar="ENDPOINT",
                         help="of the device: generate (default), echo, tap:NAME")  # fmt: skip
    migrate.add_argument("--target-endpoint", metavar="ENDPOINT", help="the destination's, such as a second TAP")
    migrate.add_argument("--source-userspace", action="store_true", help="no vhost at the source")
    migrate.add_argument("--target-userspace", action="store_true", help="no vhost at the destination")
    migrate.add_argument("--repeat", type=_number(1, 1_000_000, "a count"), default=1, metavar="N",
                         help="back and forth, N migrations")  # fmt: skip
    migrate.add_argument("--tcp", action="store_true", help="over TCP on loopback, not a Unix socket")
    migrate.add_argument("--no-check", action="store_true", help="don't compare all of guest memory while nobody runs")
    migrate.add_argument("--plot", type=_picture, metavar="FILE", help="draw the timeline (needs the plot extra)")

    faults = command(
        "faults", migration_commands.faults, "Run the fault matrix: each thing that can go wrong in a migration."
    )
    faults.add_argument("--policy", choices=POLICIES, default="delta")
    faults.add_argument(
        "--only", default="", metavar="ID", help="rows whose id begins with these parts, such as D1 or A6/mac"
    )
    faults.add_argument("--list", action="store_true", help="show the ids of the rows, and run none")
    faults.add_argument("--queue-pairs", type=_number(1, 64, "the number of queue pairs"), action="append", metavar="N",
                        help="may be given more than once (default 1 and 4)")  # fmt: skip
    faults.add_argument("--traffic", choices=TRAFFIC, help="(default: idle, then both)")
    faults.add_argument(
        "--all", dest="verbose_rows", action="store_true", help="show rows that are as they have to be, too"
    )


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
    verbs = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(
        name: str, run: Callable[[argparse.Namespace, signals.Ending], int], text: str, **kw: Any
    ) -> argparse.ArgumentParser:
        sub: argparse.ArgumentParser = verbs.add_parser(name, help=text, description=text, **kw)
        sub.add_argument(
            "--json", type=_file, metavar="PATH", help="write the report as JSON to PATH; - is standard output"
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
    _migration(command)
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
    args, unknown = _parser().parse_known_args(_joined(argv))
    if unknown:
        args.parser.error(f"unrecognized arguments: {' '.join(unknown)}")
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
