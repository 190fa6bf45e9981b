"""`parse_endpoint`: what a command line may say, and what it is told when it says something else."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.by_hand import frame, no_descriptor_leaks
from tests.support.captures import pcap
from vnetdp.endpoints.base import Endpoint
from vnetdp.endpoints.fault import FaultEndpoint, FrameFaults
from vnetdp.endpoints.loopback import EchoEndpoint, GenerateEndpoint, MacswapEndpoint, NullEndpoint, ReflectEndpoint
from vnetdp.endpoints.scapy import ScapyEndpoint
from vnetdp.endpoints.spec import endpoint_opener, parse_endpoint
from vnetdp.errors import ConfigError, VnetdpError
from vnetdp_kernels import rows as r


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("null", NullEndpoint),
        ("echo", EchoEndpoint),
        ("macswap", MacswapEndpoint),
        ("reflect", ReflectEndpoint),
        ("generate", GenerateEndpoint),
    ],
)
def test_a_kind_alone_is_enough(text: str, kind: type[Endpoint]) -> None:
    with parse_endpoint(text, 3) as endpoint:
        assert type(endpoint) is kind
        assert endpoint.queues == 3


@pytest.mark.parametrize(
    ("text", "size", "interval_ns", "limit"),
    [
        ("generate:size=128", 128, 0, -1),
        ("generate:rate=1M,count=10k", 64, 1000, 10_000),
        ("generate:count=7,rate=2.5k,size=1500", 1500, 400_000, 7),
        ("generate:rate=.5G", 64, 2, -1),
        ("generate:rate=0,count=0", 64, 0, 0),
    ],
)
def test_numbers_take_suffixes(text: str, size: int, interval_ns: int, limit: int) -> None:
    with parse_endpoint(text) as endpoint:
        row = endpoint.rows[0]
        assert (row[r.EP_SIZE], row[r.EP_INTERVAL_NS], row[r.EP_LIMIT]) == (size, interval_ns, limit)


def test_fault_wraps_any_other() -> None:
    with parse_endpoint("fault:drop=0.1,delay_ms=5,seed=9:fault:eio=1:generate:size=99", 2) as outer:
        assert isinstance(outer, FaultEndpoint)
        assert outer.faults == FrameFaults(drop=0.1, delay_ms=5, seed=9)
        assert isinstance(outer.inner, FaultEndpoint)
        assert outer.inner.faults == FrameFaults(eio=1)
        assert isinstance(outer.inner.inner, GenerateEndpoint)
        assert outer.queues == outer.inner.inner.queues == 2
        assert outer.name == "fault:fault:generate"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "unknown endpoint ''; known are null, echo, macswap, reflect, generate"),
        ("tpa:x", "unknown endpoint 'tpa:x'; known are null, echo"),
        ("NULL", "unknown endpoint 'NULL'"),
        ("echo:fast", "echo takes no options, but got 'fast'"),
        ("generate:size", "generate: unknown option 'size'; known are size=, rate=, count="),
        ("generate:colour=1", "generate: unknown option 'colour=1'; known are size=, rate=, count="),
        ("generate:size=64,", "generate: unknown option ''; known are"),
        ("generate:size=64,size=65", "generate: size is given twice"),
        ("generate:size=big", "generate: size=big is not a number"),
        ("generate:size=-1", "generate: size=-1 is not a number"),
        ("generate:size=1.5", "generate: size=1.5 is not a whole number"),
        ("generate:rate=nan", "generate: rate=nan is not a number"),
        ("generate:rate=1e400", "generate: rate=1e400 is not a number"),
        ("generate:rate=1T", "generate: rate=1T is not a number"),
        ("generate:size=5", "generate: size 5 is not between"),
        ("generate:rate=2G", "generate: rate 2000000000.0 is not between"),
        ("generate:rate=0.00000000001", "generate: rate 1e-11 is not between"),
        ("generate:count=99999999999999999999", "generate: count 100000000000000000000 is not between 0 and 2^62"),
        (f"generate:count={'9' * 400}", f"generate: count={'9' * 400} is not a finite number"),
        (f"generate:rate={'9' * 308}G", f"generate: rate={'9' * 308}G is not a finite number"),
        ("tap", "tap: no interface is named: write tap:NAME[,netns=NS]"),
        ("tap:,netns=x", "tap: no interface is named"),
        ("tap:x,queues=2", "tap: unknown option 'queues=2'; known are netns="),
        ("pcap", "pcap: '' is not pcap:IN[,OUT]"),
        ("pcap:a,b,c", "pcap: 'a,b,c' is not pcap:IN[,OUT]"),
        ("pcap:,,", "pcap: cannot read ,: No such file"),
        ("pcap:none,,such,b", "pcap: cannot read none,such: No such file"),
        ("generate:size=64,,count=1", "generate: size=64,count=1 is not a number"),
        ("pcap:,", "pcap: no capture is named: write pcap:IN[,OUT]"),
        ("scapy:json", "scapy: 'json' is not scapy:MODULE:CALLABLE"),
        ("scapy::loads", "scapy: ':loads' is not scapy:MODULE:CALLABLE"),
        ("scapy:mk.py:echo", "scapy: a module is named without .py: scapy:mk:echo"),
        ("scapy:no_such_module:f", "scapy: cannot import no_such_module: ModuleNotFoundError"),
        ("scapy:json:no_such_name", "scapy: module json has no no_such_name"),
        ("scapy:json:__name__", "scapy: json:__name__ is no callable"),
        ("python:json", "python: 'json' is not python:MODULE:CLASS"),
        ("python:,times=2", "python: '' is not python:MODULE:CLASS"),
        ("python:mk.py:Echo", "python: a module is named without .py: python:mk:Echo"),
        ("python:no_such_module:Echo", "python: cannot import no_such_module: ModuleNotFoundError"),
        ("python:json:Echo", "python: module json has no Echo; the endpoints of"),
        ("python:json:loads", "python: json:loads is no class of endpoints, but of type function; the endpoints of"),
        ("python:json:JSONDecoder", "python: json:JSONDecoder is no class of endpoints, but another class; the end"),
        ("python:vnetdp:FrameEndpoint,size=2", "python: unknown option 'size=2'; known are limit="),
        ("python:vnetdp:FrameEndpoint,limit=2,limit=3", "python: limit is given twice"),
        ("python:vnetdp:NullEndpoint,1", "python: unknown option '1'; known are block_fd="),
        ("fault", "fault: no endpoint is named: write fault:drop=0.1:ENDPOINT"),
        ("fault:drop=0.1", "fault: no endpoint is named: write fault:drop=0.1:ENDPOINT"),
        ("fault:lose=0.1:echo", "fault: unknown option 'lose=0.1'; known are drop=, corrupt=, eio="),
        ("fault:drop=1.1:echo", "fault: drop 1.1 is not a probability between 0 and 1"),
        ("fault:delay_ms=1G:echo", "fault: delay_ms 1000000000.0 is not between 0 and 60000"),
        ("fault:drop=0.1:", "unknown endpoint ''"),
        ("fault:drop=0.1:ech", "unknown endpoint 'ech'"),
    ],
)
def test_what_cannot_be_is_said_in_one_line(text: str, says: str) -> None:
    with no_descriptor_leaks(), pytest.raises(VnetdpError) as raised:
        endpoint_opener(text)()
    assert str(raised.value).startswith(says)
    assert "\n" not in str(raised.value)


def test_a_comma_in_a_name_is_written_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("run,eth0.pcap", "a,", "a,,b", ",a"):
        (tmp_path / name).write_bytes(pcap([frame(1)]))
        spelled = name.replace(",", ",,")
        with parse_endpoint(f"pcap:{spelled},out{spelled}") as endpoint:
            assert list(endpoint.files) == [Path(name), Path(f"out{name}")]
            assert list(endpoint.receive_frames(0, 9)) == [bytes(12) + frame(1)]
        assert (tmp_path / f"out{name}").exists()
    with parse_endpoint("pcap:,a,,b") as endpoint:
        assert list(endpoint.files) == [Path("a,b")]


def test_the_rest_of_a_files_name_is_not_overwritten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("run", "eth0.pcap", "run,eth0.pcap"):
        (tmp_path / name).write_bytes(pcap([frame(1)]))
    with pytest.raises(ConfigError) as raised:
        parse_endpoint("pcap:run,eth0.pcap")
    assert str(raised.value) == (
        "pcap: run,eth0.pcap is a file: pcap:run,,eth0.pcap names it; to overwrite eth0.pcap, name that ./eth0.pcap"
    )
    assert (tmp_path / "eth0.pcap").read_bytes() == pcap([frame(1)])
    with parse_endpoint("pcap:run,./eth0.pcap") as endpoint:
        assert list(endpoint.files) == [Path("run"), Path("eth0.pcap")]


def test_commas_in_the_names_of_interfaces_and_namespaces_too() -> None:
    with pytest.raises(VnetdpError, match="ip netns add x,y"):
        parse_endpoint("tap:a,,b,netns=x,,y")


def test_a_scapy_module_is_found_where_one_stands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = tmp_path / "answers_of_mine.py"
    module.write_text("class Host:\n    def answer(self, packet): return packet\nhost = Host()\n")
    broken = tmp_path / "broken_of_mine.py"
    broken.write_text("1 / 0\n")
    script = tmp_path / "script_of_mine.py"
    script.write_text("import sys; sys.exit('this is a script')\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    with parse_endpoint("scapy:answers_of_mine:host.answer", 2) as endpoint:
        assert isinstance(endpoint, ScapyEndpoint)
        assert endpoint.name == "scapy:answers_of_mine:host.answer"
        assert endpoint.queues == 2
    with pytest.raises(ConfigError, match="cannot import broken_of_mine: ZeroDivisionError"):
        parse_endpoint("scapy:broken_of_mine:f")
    with pytest.raises(ConfigError, match="cannot import script_of_mine: SystemExit: this is a script"):
        parse_endpoint("scapy:script_of_mine:f")


ENDPOINTS_OF_MINE = """
from vnetdp import EndpointError, FrameEndpoint

class Mine(FrameEndpoint):
    def __init__(self, queues, times=1, *, word="", **others):
        super().__init__(queues)
        self.got = times, word, others

class Plain(FrameEndpoint):
    name = "plain"

class Broken(FrameEndpoint):
    def __init__(self, queues, how):
        if how == "raises":
            raise ValueError("no such\\nhost")
        if how == "exits":
            raise SystemExit(3)
        if how == "refuses":
            raise EndpointError("broken: take another")
"""


@pytest.fixture
def endpoints_of_mine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "endpoints_of_mine.py").write_text(ENDPOINTS_OF_MINE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "endpoints_of_mine", raising=False)


@pytest.mark.usefixtures("endpoints_of_mine")
def test_an_endpoint_of_one_s_own_gets_its_queues_and_its_options() -> None:
    for options, got in {
        "": (1, "", {}),
        ",times=2,word=a,,b": (2, "a,b", {}),
        ",times=-1.5e3,word=": (-1500.0, "", {}),
        ",word=1_0,other=nan,third=1k": (1, "1_0", {"other": "nan", "third": "1k"}),
    }.items():
        with parse_endpoint(f"python:endpoints_of_mine:Mine{options}", 3) as endpoint:
            assert endpoint.queues == 3
            assert endpoint.name == "python:endpoints_of_mine:Mine"
            assert vars(endpoint)["got"] == got
    with parse_endpoint("fault:drop=0:python:endpoints_of_mine:Plain,limit=2") as endpoint:
        assert endpoint.name == "fault:plain"
        assert vars(endpoint.innermost)["limit"] == 2


@pytest.mark.usefixtures("endpoints_of_mine")
@pytest.mark.parametrize(
    ("options", "says"),
    [
        ("Broken,how=raises", r"python: cannot make .*_of_mine:Broken: ValueError: no such host at .*_of_mine.py:\d+"),
        ("Broken,how=exits", r"python: cannot make .*_of_mine:Broken: SystemExit: 3 at .*_of_mine.py:\d+"),
        ("Broken,how=refuses", "broken: take another"),
        ("Broken", r"python: cannot make .*_of_mine:Broken: TypeError: .*'how'"),
        ("Broken,how=", r"python: .*_of_mine:Broken is no endpoint yet: .* super\(\).__init__\(queues\)"),
        ("Other", "python: module .*_of_mine has no Other; the endpoints of .*_of_mine.py are Broken, Mine, Plain"),
        ("Mine,1x=2", "python: unknown option '1x=2'; known are times=, word="),
    ],
)
def test_an_endpoint_of_one_s_own_that_cannot_be_made_is_said_in_one_line(options: str, says: str) -> None:
    with no_descriptor_leaks(), pytest.raises(VnetdpError) as raised:
        parse_endpoint(f"python:endpoints_of_mine:{options}")
    assert re.fullmatch(says, str(raised.value)), raised.value


@pytest.mark.parametrize("text", ["null", "generate:count=3", "pcap:,out.pcap", "tap:never0", "fault:drop=1:pcap:,o"])
def test_to_read_is_not_yet_to_open(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with no_descriptor_leaks():
        endpoint_opener(text)
    assert not list(tmp_path.iterdir())


def test_scapy_is_imported_only_where_it_is_used() -> None:
    code = (
        "import sys; from vnetdp.endpoints.spec import parse_endpoint; parse_endpoint('fault:drop=1:echo').close();"
        "assert not any(name.split('.')[0] == 'scapy' for name in sys.modules)"
    )
    path = [str(entry) for entry in sys.path if entry]
    subprocess.run([sys.executable, "-c", f"import sys; sys.path[:0] = {path!r}; {code}"], check=True, timeout=120)
