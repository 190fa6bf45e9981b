"""The command line, run as its user runs it: exit status, what it prints and writes, and that nothing stays behind."""

from __future__ import annotations

import ctypes
import importlib.metadata
import json
import os
import re
import resource
import signal
import struct
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import vnetdp
from tests.support.by_hand import COMPILED, scaled
from tests.support.shell import TIMEOUT, Shell
from vnetdp.programs import link as link_module

_SHORT = ("link", "null", "null", "--seconds", "0.1")
_PR_CAPBSET_DROP = 24
_CAP_NET_ADMIN = 12
_LEDGER = {"sent", "delivered", "lost", "duplicated", "reordered", "corrupted"}


@pytest.fixture
def shell(tmp_path: Path) -> Iterator[Shell]:
    folder = tmp_path / "here"
    folder.mkdir()
    shell = Shell(folder)
    yield shell
    for pid in shell.processes():
        os.kill(pid, signal.SIGKILL)


def interfaces() -> set[str]:
    return {path.name for path in Path("/sys/class/net").iterdir()}


def write_pcap(path: Path, frames: list[bytes]) -> None:
    """Write a capture file: little endian, microseconds, Ethernet."""
    records = b"".join(struct.pack("<IIII", k, 0, len(f), len(f)) + f for k, f in enumerate(frames))
    path.write_bytes(struct.pack("<IHHiIII", 0xA1B2C3D4, 2, 4, 0, 0, 65535, 1) + records)


# --- usage ---


def test_every_command_explains_itself(shell: Shell) -> None:
    top = shell.run("--help")
    assert top.returncode == 0
    commands = re.findall(r"^ {4}(\w+) ", top.stdout, re.MULTILINE)
    assert {"demo", "link", "bench", "doctor"} <= set(commands)
    for command in commands:
        done = shell.run_forked(command, "--help")
        assert done.returncode == 0
        assert done.stdout.startswith(f"usage: vnetdp {command}")
        assert "--json" in done.stdout
        assert not done.stderr


def test_version(shell: Shell) -> None:
    done = shell.run("--version")
    assert (done.returncode, done.stdout) == (0, f"vnetdp {vnetdp.__version__}\n")


def test_the_installed_command_is_this_one() -> None:
    (entry,) = importlib.metadata.entry_points(group="console_scripts", name="vnetdp")
    assert entry.value == "vnetdp.__main__:main"


@pytest.mark.parametrize(
    ("left", "right"),
    [("pcap:a.pcap", "pcap:,b.pcap"), ("pcap:,b.pcap", "fault:drop=0:pcap:a.pcap"), ("pcap:,a.pcap", "pcap:a.pcap")],
)
def test_what_one_end_reads_the_other_does_not_overwrite(shell: Shell, left: str, right: str) -> None:
    write_pcap(shell.folder / "a.pcap", [bytes(60)] * 2000)
    (shell.folder / "b.pcap").symlink_to("a.pcap")
    before = (shell.folder / "a.pcap").read_bytes()
    done = shell.run_forked("link", left, right, "--seconds", "0.1")
    assert (done.returncode, len(done.stderr.splitlines())) == (2, 1)
    assert "is both read and written" in done.stderr
    assert (shell.folder / "a.pcap").read_bytes() == before


def test_a_capture_that_is_cut_short_is_said_once_and_is_in_the_report(shell: Shell) -> None:
    write_pcap(shell.folder / "cut.pcap", [bytes(60)] * 9)
    os.truncate(shell.folder / "cut.pcap", 500)
    done = shell.run_forked("link", "pcap:cut.pcap", "fault:drop=0:pcap:,out.pcap", "--json", "report.json")
    assert done.returncode == 1
    said = "pcap: cut.pcap: the capture is cut short or damaged after 6 frames: it ends inside a record"
    assert (done.stdout + done.stderr).count("cut.pcap: ") == 1
    assert f"vnetdp.endpoints: {said}\n" in done.stderr
    assert json.loads((shell.folder / "report.json").read_text())["errors"] == [said]


def test_what_is_lost_when_a_capture_is_closed_is_a_failure_too(shell: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    """The reader of a FIFO takes nothing: once the time is up, what it did not take is lost."""
    monkeypatch.setattr(link_module, "_PATIENCE_S", 0.2)
    os.mkfifo(shell.folder / "fifo")
    reader = os.open(shell.folder / "fifo", os.O_RDONLY | os.O_NONBLOCK)
    done = shell.run_forked("link", "generate:count=200,size=1514", "pcap:,fifo", "--seconds", "0.5", "--json", "r")
    os.close(reader)
    assert done.returncode == 1
    (error,) = json.loads((shell.folder / "r").read_text())["errors"]
    assert "nobody reads fifo any more" in error
    assert (done.stdout + done.stderr).count("nobody reads fifo") == 1


def test_two_ends_may_write_to_nowhere(shell: Shell) -> None:
    done = shell.run_forked("link", "pcap:,/dev/null", "pcap:,/dev/null", "--seconds", "0.1")
    assert done.returncode == 0, done.stderr


def test_tap_without_the_right_to_it(shell: Shell) -> None:
    libc = ctypes.CDLL(None)

    def give_up() -> None:
        # Of no effect, and not needed, for a user without it.
        libc.prctl(_PR_CAPBSET_DROP, _CAP_NET_ADMIN, 0, 0, 0)

    done = shell.run("link", "tap:vnetdp-cli0", "null", preexec_fn=give_up)
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
    assert "tap:vnetdp-cli0" in done.stderr
    assert "vnetdp-cli0" not in interfaces()


def test_too_few_descriptors(shell: Shell) -> None:
    def allow(soft: int, hard: int) -> Callable[[], None]:
        return lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))

    # The soft limit is ours to raise.
    done = shell.run("link", "null", "null", "--queue-pairs", "64", "--seconds", "0.1", preexec_fn=allow(256, 4096))
    assert done.returncode == 0, done.stderr
    done = shell.run("link", "null", "null", "--queue-pairs", "64", preexec_fn=allow(256, 256))
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith("vnetdp: cannot make an eventfd: Too many open files: 256 of 256 descriptors are in use")
    assert line.endswith("raise the limit: ulimit -n 65536")


@pytest.mark.parametrize("args", [["doctor"], ["--help"], [*_SHORT], [*_SHORT, "--json=-"]])
@pytest.mark.parametrize("streams", [["stdout"], ["stdout", "stderr"]])
def test_nobody_reads_what_it_prints(shell: Shell, args: list[str], streams: list[str]) -> None:
    process = shell.start(*args)
    for name in streams:
        getattr(process, name).close()
        setattr(process, name, None)
    done = shell.finish(process)
    assert done.returncode == 128 + signal.SIGPIPE or args == ["--help"]
    assert not re.search("pipe|Exception", done.stderr, re.IGNORECASE)


# --- demo ---


def test_demo(shell: Shell) -> None:
    done = shell.run("demo", "--seconds", "0.2", "--json", "report.json")
    assert done.returncode == 0, done.stderr
    report = json.loads((shell.folder / "report.json").read_text())
    assert {"ok", "phases", "ledger"} <= set(report)
    assert report["ok"] is True
    for phase in report["phases"]:
        assert {"name", "owner", "packets", "mpps"} <= set(phase)
        assert phase["packets"] > 0
    owners = [phase["owner"] for phase in report["phases"]]
    assert owners[:4] == ["userspace", "vhost", "userspace", "vhost"]
    assert set(report["ledger"]) == _LEDGER
    assert report["ledger"]["sent"] == report["ledger"]["delivered"] > 0
    assert not any(report["ledger"][key] for key in ("lost", "duplicated", "reordered", "corrupted"))
    for phase in report["phases"]:
        assert phase["name"] in done.stdout
    assert "Mpps" not in done.stderr  # which is for progress, and what goes wrong


# --- link ---


@pytest.mark.parametrize("datapath", ["userspace", "vhost", "vhost-process"])
def test_link_ends_by_itself_when_all_is_delivered(shell: Shell, datapath: str) -> None:
    count = scaled(100_000, 500)
    end = f"generate:count={count}"
    done = shell.run("link", end, end, "--datapath", datapath, "--queue-pairs", "2", "--json", "report.json")
    assert done.returncode == 0, done.stderr
    report = json.loads((shell.folder / "report.json").read_text())
    assert {"datapath", "owner", "seconds", "handovers", "fallbacks", "errors", "left", "right"} <= set(report)
    assert report["datapath"] == datapath
    assert report["owner"] == datapath.partition("-")[0]
    assert report["errors"] == []
    assert report["ledger"] == {**dict.fromkeys(_LEDGER, 0), "sent": 4 * count, "delivered": 4 * count}
    assert report["left"]["from_wire"] == report["right"]["to_wire"] == 2 * count
    assert len(report["queues"]) == 4
    assert f"{2 * count:,} frames" in done.stdout


@pytest.mark.parametrize("num", [2, 32768])
def test_link_with_the_smallest_and_the_largest_ring(shell: Shell, num: int) -> None:
    done = shell.run_forked("link", "generate:count=100", "generate:count=100", "--ring", str(num))
    assert done.returncode == 0, done.stderr
    assert "200 delivered, 0 lost" in done.stdout


def test_link_for_a_time_while_the_rings_change_hands(shell: Shell) -> None:
    command = ("link", "generate", "generate:size=1514", "--seconds", "0.3", "--switch-ms", "5", "--json", "r")
    done = shell.run_forked(*command)
    assert done.returncode == 0, done.stderr
    report = json.loads((shell.folder / "r").read_text())
    assert report["handovers"] >= 2  # to vhost at first, and from there: a slow machine comes to no more
    assert report["fallbacks"] == 0
    assert report["ledger"]["sent"] == report["ledger"]["delivered"] > 0
    assert not report["ledger"]["reordered"]


def test_link_tells_how_often_each_fault_struck(shell: Shell) -> None:
    end = "generate:count=100"
    faults = ("set_vring_base:#2:ENOMEM", "set_memory:delay=0.01", "set_backend")
    options = [word for fault in faults for word in ("--fault", fault)]
    done = shell.run_forked("link", end, end, *options, "--json", "report.json")
    assert done.returncode == 0, done.stderr
    report = json.loads((shell.folder / "report.json").read_text())
    assert report["faults"] == [{"fault": fault, "hits": hits} for fault, hits in zip(faults, (1, 1, 0), strict=True)]
    assert (report["owner"], report["fallbacks"]) == ("userspace", 1)
    assert "ENOMEM" in report["fallback"]
    assert "fault set_vring_base:#2:ENOMEM: struck 1 time\n" in done.stdout
    assert "fault set_backend: struck 0 times\n" in done.stdout


def test_link_of_two_guests_for_a_time(shell: Shell) -> None:
    done = shell.run_forked("link", "vhost-user:left", "vhost-user:right", "--seconds", "0.3")
    assert done.returncode == 0, done.stderr
    assert done.stdout == "left to right: 0 packets\nright to left: 0 packets\n"
    assert not list(shell.folder.iterdir())


def test_link_json_on_standard_output_is_json_alone(shell: Shell) -> None:
    done = shell.run("link", "generate:count=5", "null", "--json", "-")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["right"]["to_wire"] == 5


def test_link_reads_a_capture_to_its_end(shell: Shell) -> None:
    frames = [bytes(range(60)), bytes(1514), bytes(range(100))]
    write_pcap(shell.folder / "in.pcap", frames)
    done = shell.run_forked("link", "pcap:in.pcap", "pcap:,out.pcap", "--json", "-")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["left"]["from_wire"] == report["right"]["to_wire"] == len(frames)
    captured = (shell.folder / "out.pcap").read_bytes()
    at = [captured.index(frame) for frame in frames]
    assert at == sorted(at)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("datapath", ["userspace", "vhost", "vhost-process"])
def test_a_signal_ends_a_link_and_it_reports(shell: Shell, datapath: str, number: signal.Signals) -> None:
    args = ("link", "generate", "generate", "--datapath", datapath, "--json", "report.json")
    process = shell.start(*args, start_new_session=True)
    assert process.stderr is not None
    while "linked" not in process.stderr.readline():
        assert process.poll() is None, "it ended before it was linked"
    os.killpg(process.pid, number)  # as ^C at a terminal does
    done = shell.finish(process)
    assert done.returncode == 0, done.stderr
    assert "left to right" in done.stdout
    report = json.loads((shell.folder / "report.json").read_text())
    assert report["ledger"]["lost"] == 0
    assert report["errors"] == []
    assert (report["owner"], report["fallbacks"]) == (datapath.partition("-")[0], 0)


def test_a_worker_process_that_is_killed_is_one_line_and_costs_no_success(shell: Shell) -> None:
    args = ("link", "generate:rate=100", "null", "--datapath", "vhost-process", "--queue-pairs", "2")
    process = shell.start(*args, "--json", "report.json")
    assert process.stderr is not None
    while "linked" not in process.stderr.readline():
        assert process.poll() is None, "it ended before it was linked"
    (child,) = set(shell.processes()) - {process.pid}
    os.kill(child, signal.SIGKILL)
    said = process.stderr.readline()
    assert f"the worker process {child} was killed by SIGKILL (restart the program to use vhost again)" in said
    assert "falling back on userspace virtio (rings 0 to 3)" in said
    process.send_signal(signal.SIGTERM)
    done = shell.finish(process)
    assert (done.returncode, done.stderr) == (0, "")
    report = json.loads((shell.folder / "report.json").read_text())
    assert (report["owner"], report["fallbacks"]) == ("userspace", 1)
    assert "was killed by SIGKILL" in report["fallback"]
    assert "owner userspace" in done.stdout


def test_link_with_an_end_that_answers_counts_both_ways(shell: Shell) -> None:
    done = shell.run_forked("link", "generate:count=100", "macswap", "--seconds", "1", "--json", "-")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    for side, way in (("left", "from_wire"), ("left", "to_wire"), ("right", "to_wire"), ("right", "from_wire")):
        assert (report[side][way], report[side][f"bytes_{way}"]) == (100, 6400)
    assert "right to left: 100 frames" in done.stderr
    assert "no ledger: the frames of macswap have no numbers; with generate at both ends there is one\n" in done.stderr


def test_frames_that_a_fault_drops_are_lost(shell: Shell) -> None:
    end = "generate:count=1000"
    done = shell.run_forked("link", f"fault:drop=0.1:{end}", end, "--json", "report.json")
    assert done.returncode == 1, done.stderr
    report = json.loads((shell.folder / "report.json").read_text())
    dropped = report["left"]["fault_drop"]
    assert report["ledger"] == {**dict.fromkeys(_LEDGER, 0), "sent": 2000, "delivered": 2000 - dropped, "lost": dropped}
    assert f"injected faults: left {dropped} drop\n" in done.stdout


def test_more_is_logged_wherever_that_is_asked_for(shell: Shell) -> None:
    for args in (("-v", *_SHORT), (*_SHORT, "-v")):
        assert shell.run_forked(*args).returncode == 0


# --- serve, drive ---


def test_drive_against_serve(shell: Shell) -> None:
    count = scaled(50_000, 500)
    server = shell.start("serve", "echo", "--socket", "s", "--json", "served.json")
    try:
        driven = shell.start("drive", "generate", "--socket", "s", "--count", str(count), "--json", "-")
        out, err = driven.communicate(timeout=TIMEOUT)
        assert driven.returncode == 0, err
    finally:
        server.send_signal(signal.SIGTERM)
        served = shell.finish(server)
    assert served.returncode == 0, served.stderr
    report = json.loads(out)
    assert {"tx_packets", "rx_packets", "bad_packets", "mpps"} <= set(report)
    assert (report["tx_packets"], report["rx_packets"], report["bad_packets"]) == (count, count, 0)
    assert json.loads((shell.folder / "served.json").read_text())["served"] == 1
    assert not (shell.folder / "s").exists()


@pytest.mark.parametrize("count", ["", ",count=1000"])
def test_frames_that_do_not_come_back_are_lost_if_so_many_are_expected(shell: Shell, count: str) -> None:
    server = shell.start("serve", "null", "--socket", "s", "--features", "-mrg_rxbuf")
    try:
        driven = shell.start("drive", f"generate:rate=10k{count}", "--socket", "s", "--seconds", "0.5", "--json", "r")
        out, err = driven.communicate(timeout=TIMEOUT)
        assert driven.returncode == (1 if count else 0), err
    finally:
        server.send_signal(signal.SIGTERM)
        served = shell.finish(server)
    report = json.loads((shell.folder / "r").read_text())
    assert report["tx_packets"] > 0
    if count:
        assert report["ledger"]["lost"] == report["tx_packets"]
        assert f", lost {report['tx_packets']:,}\n" in out
    else:
        assert "ledger" not in report
        assert "lost" not in out
    assert "served 1 front end, " in served.stdout


def test_a_capture_that_fails_is_a_failure_of_drive_and_of_serve(shell: Shell) -> None:
    write_pcap(shell.folder / "cut.pcap", [bytes(1500)] * 100)
    os.truncate(shell.folder / "cut.pcap", 24 + 90 * 1516 + 20)
    os.mkfifo(shell.folder / "fifo")
    reader = os.open(shell.folder / "fifo", os.O_RDONLY | os.O_NONBLOCK)
    server = shell.start("serve", "pcap:,fifo", "--socket", "s", "--json", "served")
    try:
        process = shell.start("drive", "pcap:cut.pcap", "--socket", "s", "--wait", str(TIMEOUT), "--json", "driven")
        out, err = process.communicate(timeout=TIMEOUT)
    finally:
        server.send_signal(signal.SIGTERM)
        served = shell.finish(server)
        os.close(reader)
    for name, status, said, says in (
        ("driven", process.returncode, out + err, "cut.pcap: the capture is cut"),
        ("served", served.returncode, served.stdout + served.stderr, "reads fifo any"),
    ):
        assert status == 1
        (error,) = json.loads((shell.folder / name).read_text())["errors"]
        assert says in error
        assert said.count(says) == 1


def test_the_rule_for_exit_statuses_is_in_the_help(shell: Shell) -> None:
    said = shell.run_forked("--help").stdout
    assert all(f"\n  {status}  " in said for status in ("0", "1", "2", "128 + N"))


# --- bench, doctor ---


@pytest.mark.skipif(not COMPILED, reason="a benchmark of plain Python measures nothing")
def test_bench_ring(shell: Shell) -> None:
    done = shell.run("bench", "ring", "--rounds", "1", "--seconds", "0.1", "--json", "-")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["results"]
    for row in report["results"]:
        assert row["name"]
        assert {"mpps", "gbps", "us", "skipped"} & set(row)


def test_doctor(shell: Shell) -> None:
    done = shell.run("doctor", "--json", "-")
    assert done.returncode == 0
    assert json.loads(done.stdout)["ok"]
    assert "python-pytun" in shell.run("doctor").stdout
