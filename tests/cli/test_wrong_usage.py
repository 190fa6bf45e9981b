"""What the arguments alone have wrong: refused in one line, before anything is compiled or made."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.cli import test_cli
from tests.cli.test_cli import interfaces
from tests.support.shell import Shell
from vnetdp.cli import commands, migration
from vnetdp.endpoints.names import ENDPOINTS
from vnetdp.endpoints.spec import _KINDS
from vnetdp.system import output

shell = test_cli.shell

BRIDGE: list[str | bytes] = ["vhost-user:left", "vhost-user:right"]
WRONG: dict[str, tuple[list[str | bytes], str]] = {
    "no command": ([], "a COMMAND is required"),
    "unknown option, and no command": (["--nosuch"], "unrecognized arguments: --nosuch (try vnetdp --help)"),
    "unknown option, and nothing that is required": (["link", "--nosuch=1"], "unrecognized arguments: --nosuch (try "),
    "misspelt option that is required": (["serve", "echo", "--sokcet", "x"], "unrecognized arguments: --sokcet (try "),
    "socket where no file can be": (
        ["serve", "echo", "--socket", "/proc/x"],
        "cannot listen on /proc/x: No such file or directory: no file can be made there: take another folder",
    ),
    "unknown command": (["teleport"], "teleport"),
    "unknown option": (["demo", "--fast"], "--fast"),
    "missing endpoint": (["link", "null"], "RIGHT"),
    "unknown endpoint": (["link", "null", "ethernet:0"], "unknown endpoint 'ethernet:0'; known are null, "),
    "unknown datapath": (["link", "null", "null", "--datapath", "kernel"], "kernel"),
    "unknown benchmark": (["bench", "everything"], "everything"),
    "no ring at all": (["link", "null", "null", "--ring", "0"], "power of two"),
    "ring not a power of two": (["link", "null", "null", "--ring", "100"], "power of two"),
    "ring too large": (["link", "null", "null", "--ring", "65536"], "32768"),
    "ring no number": (["link", "null", "null", "--ring", "many"], "many"),
    "no queue pairs": (["link", "null", "null", "--queue-pairs", "0"], "between 1 and 256"),
    "negative time": (["demo", "--seconds", "-1"], "above 0"),
    "time no number": (["demo", "--seconds", "soon"], "soon"),
    "time not a number": (["demo", "--seconds", "nan"], "above 0"),
    "small MTU": (["link", "null", "null", "--mtu", "67"], "between 68 and 65535"),
    "generate, short frame": (["link", "generate:size=5", "null"], "size 5"),
    "generate, unknown option": (["link", "generate:speed=5", "null"], "speed=5"),
    "one TAP, twice": (["link", "tap:t0", "fault:drop=0:tap:t0"], "both ends of the link are the interface t0"),
    "one TAP, by other names": (
        ["link", "tap:t0", "tap:t0,netns=/proc/self/ns/net"],
        "both ends of the link are the interface",
    ),
    "option for null": (["link", "null:5", "null"], "'5'"),
    "TAP without a name": (["link", "tap:", "null"], "tap:NAME"),
    "TAP name too long": (["link", "tap:an-interface-name", "null"], "an-interface-name"),
    "TAP name with a blank": (["link", "tap:a b", "null"], "'a b'"),
    "TAP in no namespace": (["link", "tap:t0,netns=nowhere-at-all", "null"], "ip netns add nowhere-at-all"),
    "pcap not there": (["link", "pcap:not-there.pcap", "null"], "not-there.pcap: No such file"),
    "pcap, a folder": (["link", "pcap:/tmp", "null"], "/tmp is a folder: name a capture file"),
    "pcap, no folder": (
        ["link", "null", "pcap:,no/such/f"],
        "cannot write no/such/f: No such file or directory: there is no folder no: mkdir -p no/such",
    ),
    "pcap, written to a folder": (["link", "null", "pcap:,/tmp"], "Is a directory: it is a folder: name a file"),
    "pcap, below a file": (["link", "pcap:/bin/sh/f", "null"], "Not a directory: /bin/sh is not a folder"),
    "pcap, a long name": (["link", f"pcap:{'n' * 300}", "null"], "a name in it is too long: 300 bytes, of at most 255"),
    "pcap not a capture": (["link", "pcap:/proc/self/stat", "null"], "not a pcap"),
    "pcap without a file": (["link", "pcap:", "null"], "pcap:IN[,OUT]"),
    "scapy without a callable": (["link", "scapy:os", "null"], "scapy:MODULE:CALLABLE"),
    "scapy, no such module": (["link", "scapy:no_such_module:f", "null"], "no_such_module"),
    "scapy, no such callable": (
        ["link", "scapy:colorsys:none", "null"],
        "colorsys.py are hls_to_rgb, hsv_to_rgb, rgb_to_hls, rgb_to_hsv, rgb_to_yiq, yiq_to_rgb",
    ),
    "scapy, not callable": (
        ["link", "scapy:colorsys:ONE_THIRD", "null"],
        "is no callable, but of type float; the functions of",
    ),
    "scapy, a file": (["link", "scapy:mk.py:f", "null"], "without .py: scapy:mk:f"),
    "python without a class": (["link", "python:os", "null"], "python:MODULE:CLASS"),
    "python, no such module": (["link", "null", "python:no_such_module:C"], "cannot import no_such_module"),
    "python, no endpoint": (["serve", "python:json:loads", "--socket", "s"], "json:loads is no class of endpoints"),
    "python, unknown option": (["link", "python:vnetdp:FrameEndpoint,n=1", "null"], "known are limit="),
    "switches, none": (["link", "null", "null", "--switch-ms", "1", "--switches", "0"], "a count is between 1 and"),
    "switches, no number": (
        ["link", "null", "null", "--switch-ms", "1", "--switches", "x"],
        "a count is between 1 and",
    ),
    "switches without their time": (["link", "null", "null", "--switches", "3"], "--switches needs --switch-ms N"),
    "fault of no verb": (["link", "null", "null", "--fault", "set_colour"], "verbs are set_mtu, set_features"),
    "fault of a migration": (["link", "null", "null", "--fault", "final.set_backend"], "are for vnetdp migrate"),
    "fault of the machine": (["link", "null", "null", "--fault", "grab_ioeventfd"], "are for vnetdp migrate"),
    "fault of no ring": (["link", "null", "null", "--fault", "set_backend:1"], "none of 0,0 to 0,1 (PAIR,VRING)"),
    "fault without vhost": (
        ["link", "null", "null", "--datapath", "userspace", "--fault", "set_backend"],
        "--fault needs vhost, whose verbs fail: take --datapath vhost",
    ),
    "fault of no errno": (["serve", "null", "--socket", "s", "--fault", "set_backend:EBUSSY"], "'EBUSSY' is none of"),
    "bridge, and a fault": (["link", *BRIDGE, "--fault", "set_backend"], "--fault means nothing between two guests"),
    "bridge of one side": (["link", "vhost-user:s", "null"], "both sides"),
    "bridge, the other way round": (["link", "null", "vhost-user:s"], "vnetdp serve null --socket s"),
    "bridge without a socket": (["link", "vhost-user:s", "vhost-user:"], "'vhost-user:' names no socket"),
    "bridge, one word": (["link", "vhost-user", "vhost-user:s"], "'vhost-user' names no socket"),
    "bridge of one socket": (
        ["link", "vhost-user:s", "vhost-user:./s"],
        "both guests are to attach to s: name another",
    ),
    "bridge, a long path": (
        ["link", "vhost-user:s", f"vhost-user:{'s' * 108}"],
        "too long for a socket: 108 bytes, of at most 107",
    ),
    "bridge in no folder": (
        ["link", "vhost-user:s", "vhost-user:no/such/s"],
        "there is no folder no: mkdir -p no/such",
    ),
    "bridge, and a report in its socket": (
        ["link", *BRIDGE, "--json", "./left"],
        "--json ./left and left are one file",
    ),
    "bridge, options of rings": (
        ["link", *BRIDGE, "--ring", "256"],
        "--ring means nothing between two guests, which bring their own rings: leave it out",
    ),
    "bridge, options of hand-overs": (["link", *BRIDGE, "--switch-ms", "5"], "--switch-ms means nothing"),
    "bridge, queue pairs": (["link", *BRIDGE, "--queue-pairs", "129"], "vhost-user has 1 to 128"),
    "serve without a socket": (["serve", "null"], "--socket"),
    "serve in no folder": (["serve", "null", "--socket", "no/such/folder/s"], "no/such/folder/s"),
    "serve, a long path": (
        ["serve", "null", "--socket", "s" * 108],
        "too long for a socket: 108 bytes, of at most 107: take a shorter",
    ),
    "serve, an empty path": (
        ["serve", "null", "--socket", ""],
        "cannot listen on a socket with an empty path: name a file",
    ),
    "serve, a folder": (["serve", "null", "--socket", "/tmp"], "/tmp exists and is not a socket"),
    "serve, a guest": (
        ["serve", "vhost-user:g", "--socket", "s"],
        "vhost-user:SOCKET is an endpoint of link, on both sides",
    ),
    "serve, and a report": (["serve", "null", "--socket", "s", "--json", "s"], "--json s and s are one file"),
    "serve, connecting to a file": (
        ["serve", "null", "--connect", "--socket", "/bin/sh"],
        "it is a file, not a socket",
    ),
    "serve, connecting by a long path": (
        ["serve", "null", "--connect", "--socket", "s" * 108],
        "too long for a socket: 108 bytes, of at most 107",
    ),
    "serve, unknown feature": (["serve", "null", "--socket", "s", "--features=-teleport"], "teleport"),
    "serve, two kinds of lists": (["serve", "null", "--socket", "s", "--features", "-csum,mq"], "with a minus"),
    "drive, nobody there": (["drive", "null", "--socket", "s", "--wait", "0.1"], "s"),
    "drive, a file": (["drive", "null", "--socket", "/bin/sh"], "it is a file, not a socket: take another path"),
    "drive, unknown feature": (["drive", "null", "--socket", "s", "--features=-teleport"], "teleport"),
    "drive, listening in no folder": (["drive", "null", "--listen", "--socket", "no/such/s"], "mkdir -p no/such"),
    "drive, count without generate": (
        ["drive", "null", "--socket", "s", "--count", "5"],
        "--count needs the endpoint generate, not null",
    ),
    "drive, ring not a power of two": (["drive", "null", "--socket", "s", "--ring", "100"], "power of two"),
    "report nowhere": (["link", "null", "null", "--json", "no/such/folder/report.json"], "no/such/folder"),
    "report below a file": (["link", "null", "null", "--json", "/bin/sh/r"], "/bin/sh is not a folder"),
    "report in a capture's place": (["link", "null", "pcap:,r", "--json", "r"], "--json r and r are one file"),
    "report in a folder's place": (["link", "null", "null", "--json", "/tmp"], "/tmp: it is a folder"),
    "a capture, and an error": (["link", "pcap:,out.pcap", "nonsense"], "unknown endpoint 'nonsense'"),
    "a capture, and none": (["link", "pcap:,out.pcap", "pcap:missing.pcap"], "missing.pcap: No such file"),
    "a capture, and none behind faults": (
        ["link", "fault:drop=0:pcap:,out.pcap", "pcap:missing.pcap,other.pcap"],
        "missing.pcap: No such file",
    ),
    "a capture, and a TAP nowhere": (["link", "pcap:,out.pcap", "tap:t0,netns=nowhere-at-all"], "ip netns add"),
    "a capture, and a value": (["link", "pcap:,out.pcap", "generate:size=5"], "size 5"),
    "a capture, twice": (
        ["link", "pcap:,out.pcap", "fault:drop=0:pcap:,./out.pcap"],
        "out.pcap is both read and written, or",
    ),
    "TAP name not UTF-8": (["link", b"tap:\xff", "null"], "\\udcff"),
    "rate too small": (["link", "generate:rate=0.00000000001", "null"], "rate 1e-11"),
    "count too large": (["link", f"generate:count={'9' * 400}", "null"], "is not a finite number"),
    "Python in another process": (["link", "fault::echo", "null", "--datapath=vhost-process"], "runs in Python"),
    "picture nowhere": (["bench", "ring", "--plot", "no/such/folder/picture.png"], "no/such/folder"),
}


# What nobody can tell before the kernels run.
AFTER_COMPILING = ("drive, nobody there",)


@pytest.mark.parametrize("name", WRONG)
def test_wrong_usage_is_told_in_one_line_before_anything_is_compiled(
    shell: Shell, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    args, told = WRONG[name]
    if name not in AFTER_COMPILING:
        for module in (commands, migration):
            monkeypatch.setattr(module, "compile_kernels", lambda *_: output.say("compiling the kernels"))
    before = interfaces()
    done = shell.run_forked(*args)
    assert done.returncode == 2
    assert not done.stdout
    lines = done.stderr.splitlines()
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith("vnetdp")
    assert told in lines[0]
    assert not list(shell.folder.iterdir())
    assert not (interfaces() - before) & {"t0", "a b"}


def test_every_endpoint_is_in_the_help_in_the_error_and_in_the_documents(shell: Shell) -> None:
    told = shell.run_forked("link", "null", "teleport").stderr
    shown = shell.run_forked("link", "--help").stdout
    table = (Path(__file__).parents[2] / "docs" / "commands.md").read_text().partition("\n## Endpoints\n")[2]
    assert list(ENDPOINTS) == list(_KINDS)
    for kind, (syntax, _) in ENDPOINTS.items():
        assert f", {syntax}" in told or f"are {syntax}," in told
        assert f"\n  {syntax}" in shown
        assert re.search(rf"^\|.*`{kind}[:`]", table, re.MULTILINE)
