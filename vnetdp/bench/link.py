"""`vnetdp link` beside its peers: TCP throughput and small frames per second between two network namespaces.

Every contender joins the same two namespaces, alone and freshly started, in every round; every second round
goes through them backwards, so that a machine that slows down meanwhile favours none. To read the figures:

* `kernel bridge` is veth, which passes 64 KiB segments on without cutting or copying them: the upper bound
  for TCP, and no equal. It runs on the sender's core, and so slows the sender down instead of losing frames.
* The TAPs of `DPDK testpmd` and `pytun loop` have no offloads: the kernel cuts TCP into frames of 1514 bytes.
* `DPDK testpmd` (net_tap) has the kernel raise two real-time signals a frame (seen by strace), which wake its
  idle threads. It carried about 0.1 million frames/s under any load, its sender pinned or not. `DPDK testpmd
  af_packet` (mapped packet sockets on veth) carried three times that, so it is measured as well.
* Both testpmd busy-poll one core from start to end; the others sleep when nothing comes.
* The sender of small frames takes a core, and so does each end of TCP: on two cores everything competes.
"""

import contextlib
import dataclasses
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path

from vnetdp.bench.netns import ADDRESSES, MTU, NetnsPair, why_no_netns
from vnetdp.bench.udp_blast import FRAME_LEN, Blast
from vnetdp.errors import ConfigError, VnetdpError

BRIDGE = "kernel bridge"
USERSPACE = "vnetdp userspace"
VHOST = "vnetdp vhost"
TESTPMD = "DPDK testpmd"
TESTPMD_AF_PACKET = "DPDK testpmd af_packet"
PYTUN = "pytun loop"

Row = dict[str, object]

_INTERFACE = "link0"  # on both sides
_WIRE = "wire"  # the namespace between them, where the contenders run
_WIRE_ENDS = {"a": "left", "b": "right"}  # the names of interfaces in it, by the side that each leads to
_FCS_LEN = 4  # bytes that a wire adds to every frame
_IPERF_PORT = 5201


class LinkBenchError(VnetdpError):
    """A contender didn't do its work."""


@dataclasses.dataclass(frozen=True)
class Contender:
    """A way to join the two namespaces.

    `join` makes `_INTERFACE` on both sides and keeps them joined while it is entered; it yields a dict into
    which a contender may put a report of its own when it ends.
    """

    name: str
    join: Callable[[NetnsPair, Path], AbstractContextManager[Row]]
    why_missing: Callable[[], str | None]


def run(
    seconds: float,
    rounds: int,
    contenders: Sequence[str] | None = None,
    progress: Callable[[str], None] = lambda _line: None,
) -> list[Row]:
    """Measure contenders (default: all of CONTENDERS) in *rounds* rounds, *seconds* of each kind of traffic.

    Two rows a contender, both medians over the rounds:

    * "link tcp": `gbps`, 10^9 bits of payload received a second; `size`, the MTU. iperf3 takes whole seconds.
    * "link small frames": `mpps`, 10^6 frames delivered a second; `ns_per_packet`; `sent_mpps`, what was
      offered; `size`, bytes with the frame check sequence; `report`, the report of `vnetdp link` in the
      last round.

    `ratio` is to `vnetdp vhost`, None without it. A contender that can't run here has one row, "link", with
    `skipped`, the reason. A contender that starts and then fails ends the run: LinkBenchError or NetnsError.
    """
    rows: list[Row] = []
    able: list[Contender] = []
    load_missing = why_no_netns() or _why_no_program("iperf3", "iperf3")
    for contender in _choose(contenders):
        reason = load_missing or contender.why_missing()
        if reason is None:
            able.append(contender)
        else:
            if load_missing is None:  # else nothing runs, for one reason, and that is said once
                progress(f"{contender.name}: skipped, {reason}")
            rows.append({"name": "link", "peer": contender.name, "skipped": reason})

    gbps: dict[str, list[float]] = {contender.name: [] for contender in able}
    blasts: dict[str, list[Blast]] = {contender.name: [] for contender in able}
    reports: dict[str, Row] = {}
    for number in range(rounds):
        for contender in able if number % 2 == 0 else reversed(able):
            speed, blast, reports[contender.name] = _measure(contender, seconds)
            gbps[contender.name].append(speed)
            blasts[contender.name].append(blast)
            progress(
                f"round {number + 1}/{rounds}, {contender.name}: TCP {speed:.2f} Gbit/s, "
                f"small frames {blast.mpps:.3f} of {blast.sent_mpps:.3f} million/s"
            )
    return rows + _tcp_rows(gbps) + _small_rows(blasts, reports)


def _choose(names: Sequence[str] | None) -> list[Contender]:
    known = {contender.name: contender for contender in CONTENDERS}
    unknown = [name for name in names or () if name not in known]
    if unknown:
        raise ConfigError(f"unknown contender {', '.join(unknown)}; known are {', '.join(known)}")
    return [known[name] for name in names or known]


def _measure(contender: Contender, seconds: float) -> tuple[float, Blast, Row]:
    with (
        NetnsPair(extra=[_WIRE]) as pair,  # first: from here on SIGTERM cleans up, the scratch folder too
        tempfile.TemporaryDirectory(prefix="vnetdp-bench-") as scratch,
    ):
        with contender.join(pair, Path(scratch)) as report:
            pair.configure(_INTERFACE)
            _wait_until(lambda: _blast(pair, 0.05).delivered > 0, f"{contender.name} delivers frames")
            speed = _tcp_gbps(pair, seconds)
            blast = _blast(pair, seconds)
        if not 0 < blast.delivered <= blast.delivered + blast.late <= blast.sent:
            raise LinkBenchError(f"{contender.name}: frames delivered are not between 1 and those sent: {blast}")
        return speed, blast, report


def _tcp_gbps(pair: NetnsPair, seconds: float) -> float:
    """One TCP stream from a to b; 10^9 bits of payload that b received a second."""
    server = pair.popen("b", f"iperf3 -4 --server --one-off --port {_IPERF_PORT}".split())
    _wait_until(lambda: _listens(server.pid, _IPERF_PORT), "iperf3 listens", server)
    time_arg = max(1, round(seconds))  # 0 would be for ever
    client = f"iperf3 -4 --client {ADDRESSES['b']} --port {_IPERF_PORT} --time {time_arg} --json"
    report = json.loads(pair.run("a", client.split(), timeout=seconds + 30))
    pair.stop(server)
    return float(report["end"]["sum_received"]["bits_per_second"]) / 1e9


def _blast(pair: NetnsPair, seconds: float) -> Blast:
    argv = [sys.executable, "-m", "vnetdp.bench.udp_blast"]
    argv += [pair.names["a"], pair.names["b"], _INTERFACE, str(seconds)]
    return Blast(**json.loads(pair.run("a", argv, timeout=seconds + 30)))


def _listens(pid: int, port: int) -> bool:
    # /proc/PID/net shows the process's own namespace; 0A is TCP_LISTEN.
    lines = Path(f"/proc/{pid}/net/tcp").read_text().splitlines()[1:]
    return any(line.split()[1].endswith(f":{port:04X}") and line.split()[3] == "0A" for line in lines)


def _tcp_rows(gbps: dict[str, list[float]]) -> list[Row]:
    medians = {name: statistics.median(values) for name, values in gbps.items() if values}
    return [
        {"name": "link tcp", "peer": name, "size": MTU, "gbps": value, "ratio": _ratio(value, medians)}
        for name, value in medians.items()
    ]


def _small_rows(blasts: dict[str, list[Blast]], reports: dict[str, Row]) -> list[Row]:
    medians = {name: statistics.median(blast.mpps for blast in runs) for name, runs in blasts.items() if runs}
    return [
        {
            "name": "link small frames",
            "peer": name,
            "size": FRAME_LEN + _FCS_LEN,
            "mpps": value,
            "ns_per_packet": 1e3 / value,
            "sent_mpps": statistics.median(blast.sent_mpps for blast in blasts[name]),
            "ratio": _ratio(value, medians),
            "report": reports[name] or None,
        }
        for name, value in medians.items()
    ]


def _ratio(value: float, medians: dict[str, float]) -> float | None:
    return value / medians[VHOST] if VHOST in medians else None


@contextlib.contextmanager
def _bridge(pair: NetnsPair, _scratch: Path) -> Iterator[Row]:
    pair.ip(_WIRE, "link add bridge type bridge")
    pair.ip(_WIRE, "link set bridge up")
    _add_veths(pair)
    for end in _WIRE_ENDS.values():
        pair.ip(_WIRE, f"link set {end} master bridge")
    yield {}


@contextlib.contextmanager
def _pytun(pair: NetnsPair, scratch: Path) -> Iterator[Row]:
    argv = [sys.executable, "-m", "vnetdp.bench.pytun_loop", *_WIRE_ENDS.values()]
    with _relay(pair, argv, scratch) as relay:
        _wait_until(
            lambda: all(pair.has_interface(_WIRE, end) for end in _WIRE_ENDS.values()),
            "both TAPs exist",
            relay,
        )
        _hand_out_taps(pair)
        yield {}


@contextlib.contextmanager
def _testpmd_tap(pair: NetnsPair, scratch: Path) -> Iterator[Row]:
    with _testpmd(pair, scratch, [f"net_tap{i},iface={end}" for i, end in enumerate(_WIRE_ENDS.values())]):
        # net_tap sets its interfaces up by name, but once it forwards it only reads and writes: they can go.
        _hand_out_taps(pair)
        yield {}


@contextlib.contextmanager
def _testpmd_af_packet(pair: NetnsPair, scratch: Path) -> Iterator[Row]:
    _add_veths(pair)
    for side in _WIRE_ENDS:
        # A packet socket without a virtio-net header carries no "checksum still to do", nor segments to cut.
        pair.run(side, f"ethtool -K {_INTERFACE} tx off tso off gso off".split())
    rings = "blocksz=65536,framesz=2048,framecnt=2048,qdisc_bypass=1"
    vdevs = [f"net_af_packet{i},iface={end},{rings}" for i, end in enumerate(_WIRE_ENDS.values())]
    with _testpmd(pair, scratch, vdevs):
        yield {}


@contextlib.contextmanager
def _testpmd(pair: NetnsPair, scratch: Path, vdevs: Sequence[str]) -> Iterator[None]:
    """DPDK's testpmd, one thread forwarding both ways between two devices; entered when it forwards."""
    cores = ",".join(str(core) for core in sorted(os.sched_getaffinity(0)))
    argv = [
        "env",
        f"RUNTIME_DIRECTORY={scratch}",  # --no-huge leaves files behind
        *("stdbuf", "-oL"),  # into a file it would print by the page, and we wait for a line
        *("dpdk-testpmd", "--no-huge", "--no-pci", "--no-telemetry", "-m", "256"),
        f"--file-prefix=vnetdp-{os.getpid()}",
        # One thread forwards, one waits for a signal. Neither is pinned, as the other contenders aren't.
        f"--lcores=0@({cores}),1@({cores})",
        *(f"--vdev={vdev}" for vdev in vdevs),
        "--",
        *("--forward-mode=io", "--nb-cores=1", "--auto-start", "--no-lsc-interrupt"),
        "--total-num-mbufs=8192",
        "--stats-period=3600",  # without it testpmd ends as soon as its standard input does
    ]
    with _relay(pair, argv, scratch) as relay:
        _wait_until(lambda: "packet forwarding - ports=2" in _log(scratch), "testpmd forwards", relay)
        yield


@contextlib.contextmanager
def _vnetdp(datapath: str, pair: NetnsPair, scratch: Path) -> Iterator[Row]:
    report: Row = {}
    report_path = scratch / "report.json"
    taps = [f"tap:{_INTERFACE},netns={pair.names[side]}" for side in _WIRE_ENDS]
    argv = [sys.executable, "-m", "vnetdp", "link", *taps, "--datapath", datapath, "--json", str(report_path)]
    with _relay(pair, argv, scratch) as relay:
        _wait_until(
            lambda: all(pair.has_interface(side, _INTERFACE) for side in _WIRE_ENDS),
            "both TAPs exist",
            relay,
        )
        yield report
        status = pair.stop(relay)
        if status != 0:
            raise LinkBenchError(f"vnetdp link --datapath {datapath} ended with status {status}")
        report.update(json.loads(report_path.read_text()))


@contextlib.contextmanager
def _relay(pair: NetnsPair, argv: Sequence[str], scratch: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A process that joins the two sides, stopped at the end; an error's notes have its output."""
    with open(scratch / "log", "wb") as output:
        relay = pair.popen(_WIRE, argv, output)
    try:
        yield relay
    except Exception as error:
        error.add_note(f"{' '.join(argv)}\nprinted: {_log(scratch)[-4000:]}")
        raise
    finally:
        pair.stop(relay)


def _log(scratch: Path) -> str:
    return (scratch / "log").read_text(errors="replace")


def _add_veths(pair: NetnsPair) -> None:
    for side, end in _WIRE_ENDS.items():
        pair.ip(_WIRE, f"link add {end} type veth peer name {_INTERFACE} netns {pair.names[side]}")
        pair.ip(_WIRE, f"link set {end} up")


def _hand_out_taps(pair: NetnsPair) -> None:
    """Move the wire's TAPs to their sides. A relay holds them by file descriptor, and doesn't notice."""
    for side, end in _WIRE_ENDS.items():
        pair.move(end, _WIRE, side, _INTERFACE)


def _wait_until(
    condition: Callable[[], bool],
    what: str,
    process: subprocess.Popen[bytes] | None = None,
    seconds: float = 60.0,
) -> None:
    """Poll *condition*; LinkBenchError if *process* ends first, or after *seconds* (Numba may compile)."""
    deadline = time.monotonic() + seconds
    while not condition():
        if process is not None and process.poll() is not None:
            raise LinkBenchError(f"waited until {what}: the process ended with status {process.returncode}")
        if time.monotonic() > deadline:
            raise LinkBenchError(f"waited until {what}: not within {seconds:g} s")
        time.sleep(0.02)


def _why_no_program(program: str, package: str) -> str | None:
    return None if shutil.which(program) else f"{program} isn't installed (Debian's package {package})"


def _why_no_testpmd() -> str | None:
    return _why_no_program("dpdk-testpmd", "dpdk-dev")


CONTENDERS = (
    Contender(BRIDGE, _bridge, lambda: None),
    Contender(USERSPACE, partial(_vnetdp, "userspace"), lambda: None),
    Contender(VHOST, partial(_vnetdp, "vhost"), lambda: None),
    Contender(TESTPMD, _testpmd_tap, _why_no_testpmd),
    Contender(
        TESTPMD_AF_PACKET,
        _testpmd_af_packet,
        lambda: _why_no_testpmd() or _why_no_program("ethtool", "ethtool"),
    ),
    Contender(PYTUN, _pytun, lambda: None),  # python-pytun is a dependency of vnetdp
)
