"""Objects that own descriptors, memory or threads: none is copied, each is closed once, a forked child leaves them be."""

from __future__ import annotations

import copy
import os
import pickle
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.support.by_hand import no_descriptor_leaks
from tests.system.test_exhaustion import KINDS, LATER, Given, Shared
from vnetdp.bench.netns import NetnsPair, why_no_netns
from vnetdp.device.device import NetDevice
from vnetdp.guest.driver import memory_for
from vnetdp.migration.machine import MachineConfig, make_wire
from vnetdp.shared.memory import DirtyLog, SharedBlock
from vnetdp.shared.notify import EventFd

MORE: dict[str, Callable[[Given], Any]] = {
    "memory": lambda _: memory_for(),
    "log": lambda _: DirtyLog(1 << 20),
    "block": lambda _: SharedBlock(4096),
    "eventfd": lambda _: EventFd(),
}
COPIES: tuple[Callable[[Any], object], ...] = (copy.copy, copy.deepcopy, pickle.dumps)


@pytest.mark.parametrize("kind", [*MORE, *KINDS, *LATER])
def test_none_can_be_copied_or_pickled_and_closing_twice_is_closing_once(kind: str, tmp_path: Path) -> None:
    with (
        memory_for(2) as memory,
        Shared(2) as endpoint,
        make_wire(MachineConfig()) as wire,
        NetDevice(memory, wire, threaded=False) as device,
    ):
        make = (MORE | KINDS | LATER)[kind]
        given = Given(memory, endpoint, device, tmp_path)
        make(given).close()  # what is opened once for all is opened by the first of a kind
        with no_descriptor_leaks():
            made = make(given)
            for copied in COPIES:
                with pytest.raises(TypeError, match=f"^a {type(made).__name__} can be neither copied nor pickled: "):
                    copied(made)
            made.close()
            made.close()
        memory.write(0, b"there")
        assert memory.read(0, 5) == b"there"
        Shared.__mro__[1].close(endpoint)  # type: ignore[attr-defined]


@pytest.mark.parametrize("kind", [*MORE, *KINDS, *LATER])
def test_closing_it_while_it_is_being_closed_closes_no_descriptor_twice(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By then the number may be the descriptor of somebody else. Each is closed here while the first one is at it."""
    with (
        memory_for(2) as memory,
        Shared(2) as endpoint,
        make_wire(MachineConfig()) as wire,
        NetDevice(memory, wire, threaded=False) as device,
    ):
        made = (MORE | KINDS | LATER)[kind](Given(memory, endpoint, device, tmp_path))
        closes, closer = os.close, threading.get_ident()

        def close(fd: int) -> None:
            if threading.get_ident() == closer:
                made.close()
            closes(fd)

        monkeypatch.setattr(os, "close", close)
        made.close()
        monkeypatch.undo()
        Shared.__mro__[1].close(endpoint)  # type: ignore[attr-defined]


def run(code: str, *args: str) -> list[str]:
    """Return the lines that a Python of its own prints."""
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "PYTHONWARNINGS": "ignore"}
    done = subprocess.run(
        [sys.executable, "-c", _SHARED + code, *args], env=env, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return done.stdout.splitlines()


_SHARED = """
import gc, os, select, sys
from contextlib import ExitStack
from vnetdp import Driver, NetDevice
from vnetdp.backends.process import WorkerProcess
from vnetdp.backends.worker import Worker
from vnetdp.guest.driver import memory_for
from vnetdp.endpoints.loopback import MacswapEndpoint
from vnetdp.endpoints.mailbox import MailboxEndpoint
from vnetdp.errors import ConfigError, VnetdpError

def echo(text):
    guest.send(bytes.fromhex("020000000002 020000000001 88b5") + text)
    select.select([guest], [], [], 30)
    return [one[14:] for one in guest.receive()] == [text]

def ends(child):
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

def fork_to_live_on(read, write):
    # It lives until `read` can be read; the parent goes on once it gave up what a forked child gives up first.
    ready, say = os.pipe()
    if not (child := os.fork()):
        os.close(write)
        os.write(say, b"x")
        os.read(read, 1)
        os._exit(0)
    os.read(ready, 1)
    return child

def refused(use):
    try:
        use()
    except ConfigError as e:
        return "its forked child" in str(e)
    return False
"""

_LEAVES = """
import multiprocessing

def leave():
    sys.exit(0)

def close():
    guest.close()
    device.close()
    wire.close()
    memory.close()
    worker.close()
    os._exit(0)

def collect():
    global device, guest, wire, worker
    del device, guest, wire, worker
    gc.collect()
    os._exit(0)

def use():
    uses = [
        lambda: device.set_use_vhost(False), lambda: device.set_status(0), device.save_state, device.check_rings,
        lambda: guest.send(bytes(60)), guest.receive, guest.start, guest.reset,
        lambda: worker.backends[0].set_backend(0, None), lambda: worker.backends[0].get_vring_base(1),
    ]
    print(*(refused(one) for one in uses), flush=True)
    os._exit(0)

kind = sys.argv[1]
worker = {"thread": Worker, "process": WorkerProcess}[kind](1)
with (
    memory_for() as memory,
    MacswapEndpoint() as wire,
    NetDevice(memory, wire, vhost=worker) as device,
    Driver(device, memory) as guest,
):
    guest.start()
    assert echo(b"before") and device.owner.value == "vhost"
    for ending in (leave, close, collect, use):
        if not (child := os.fork()):
            ending()
        assert ends(child) == 0
        assert echo(b"after")
    child = multiprocessing.get_context("fork").Process(target=leave)
    child.start()
    child.join()
    assert child.exitcode == 0
    device.set_use_vhost(False)
    assert echo(b"userspace")
    device.set_use_vhost(True)
    assert echo(b"vhost") and device.owner.value == "vhost"
worker.close()
"""


@pytest.mark.parametrize("worker", ["thread", "process"])
def test_a_forked_child_leaves_its_parents_rings_alone(worker: str) -> None:
    assert run(_LEAVES, worker) == [" ".join(["True"] * 10)]


_LIVES_ON = """
worker = WorkerProcess(1)
read, write = os.pipe()
child = fork_to_live_on(read, write)
os.kill(worker.pid, 0)
worker.close()
print(worker._child.process.returncode)
os.close(write)
print(ends(child))
"""


def test_a_worker_process_ends_at_once_though_a_forked_child_lives_on() -> None:
    assert run(_LIVES_ON) == ["0", "0"]


_FUNCTION_FORKS = """
from scapy.layers.l2 import Ether
from vnetdp.endpoints.scapy import ScapyEndpoint

children = []
def answer(packet):
    if b"fork" in bytes(packet):
        child = os.fork()
        if not child:
            if b"exit" in bytes(packet):
                sys.exit(3)
            return packet
        children.append(child)
    return packet

with (
    memory_for() as memory,
    ScapyEndpoint(answer) as wire,
    NetDevice(memory, wire) as device,
    Driver(device, memory) as guest,
):
    guest.start()
    for text in (b"plain", b"fork", b"again", b"fork exit", b"again"):
        assert echo(text), text
    print([ends(child) for child in children], guest.counters()[0]["packets"])
"""


def test_a_users_function_may_fork_and_its_child_does_not_go_on_to_the_rings() -> None:
    assert run(_FUNCTION_FORKS) == ["[0, 0] 5"]


_SERVES = """
import socket
from pathlib import Path
from vnetdp.endpoints.loopback import EchoEndpoint
from vnetdp.vhost_user.back_end.server import Server
path = sys.argv[1]
with EchoEndpoint() as wire, Server(wire, path) as server:
    if not (child := os.fork()):
        print(refused(lambda: server.run(lambda: True, 0)), flush=True)
        sys.exit(0)
    assert ends(child) == 0
    assert Path(path).is_socket()
    fork_to_live_on(0, os.pipe()[1])  # it lives on while its parent dies
    socket.socket(socket.AF_UNIX).connect(path)
    os._exit(0)
"""


def test_a_forked_child_neither_removes_its_parents_socket_nor_keeps_it_open(tmp_path: Path) -> None:
    path = str(tmp_path / "net.sock")
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "PYTHONWARNINGS": "ignore"}
    with subprocess.Popen(
        [sys.executable, "-c", _SHARED + _SERVES, path], env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as parent:
        assert parent.stdout is not None
        assert parent.stdout.readline() == b"True\n"
        assert parent.wait(60) == 0
        with socket.socket(socket.AF_UNIX) as front_end, pytest.raises(ConnectionRefusedError):
            front_end.connect(path)


_TAP = """
import struct, fcntl
from vnetdp.endpoints.tap import TapEndpoint
from vnetdp.errors import EndpointError
name = sys.argv[1]
tap = TapEndpoint("vtap", netns=name)
tap.set_mtu(1400)
tap.set_offloads(1)
if not (child := os.fork()):
    for use in (lambda: tap.set_mtu(1300), lambda: tap.set_offloads(0)):
        try:
            use()
        except EndpointError as e:
            print(e, flush=True)
    tap.close()
    sys.exit(0)
assert ends(child) == 0
print(tap.mtu)
read, write = os.pipe()
child = fork_to_live_on(read, write)
tap.close()
with TapEndpoint("vtap", netns=name) as again:  # not: another program has it open
    print(again.mtu)
os.close(write)
print(ends(child))
"""


def test_a_forked_child_neither_changes_nor_keeps_its_parents_tap() -> None:
    if (missing := why_no_netns()) is not None:
        pytest.skip(missing)
    with NetnsPair() as spaces:
        closed = "tap:vtap: the endpoint is closed"
        assert run(_TAP, spaces.names["a"]) == [closed, closed, "1400", "1500", "0"]


_CAPTURE = """
from vnetdp.endpoints.pcap import PcapEndpoint
path = sys.argv[1]
os.mkfifo(path)
reader = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
wire = PcapEndpoint(None, path)
sent = 0
while wire.takes_frames(0):
    wire.transmit_frames(0, [bytes(12) + sent.to_bytes(4, "big") + bytes(1000)])
    sent += 1
if not (child := os.fork()):
    got = os.read(reader, 1 << 20)  # there is room now
    wire.close()
    os.write(1, b"%d\\n" % len(got))
    os._exit(0)
assert ends(child) == 0
assert wire.takes_frames(0)
wire.close()
got = 0
while data := os.read(reader, 1 << 20):
    got += len(data)
print(24 + sent * (16 + 1004) - got)
"""


def test_a_forked_child_writes_no_frame_a_second_time(tmp_path: Path) -> None:
    in_child, missing = run(_CAPTURE, str(tmp_path / "fifo"))
    assert in_child == missing


_MEMORY_GONE = """
import logging
logging.disable()
with MacswapEndpoint() as wire, ExitStack() as stack:
    memory = memory_for()
    worker = Worker(1)
    device = NetDevice(memory, wire, vhost=worker)
    guest = Driver(device, memory)
    guest.start()
    assert echo(b"before")
    memory.close()  # under everybody's feet
    device.set_use_vhost(False)
    print(device.owner.value, device.last_error)
    guest.close()
    device.close()
    worker.close()
    memory = memory_for()
    device = NetDevice(memory, wire, threaded=False)
    guest = Driver(device, memory)
    memory.close()
    for use in (device.step, guest.step, guest.reset, lambda: Driver(device, memory)):
        try:
            use()
            print("no error")
        except VnetdpError as e:
            print(e)
    device.close()
    guest.close()
"""


def test_guest_memory_that_is_closed_in_use_is_an_error_and_no_crash() -> None:
    said = run(_MEMORY_GONE)
    assert said[0].startswith("nobody set_")
    assert all("the guest memory is closed" in line for line in said), said
