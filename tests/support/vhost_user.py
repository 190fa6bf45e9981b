"""What the vhost-user tests share: a front end by hand, a guest behind it, and back ends in a thread and in a process.

Messages and rings are packed here with `struct`, never with the code under test.
"""

from __future__ import annotations

import array
import gc
import logging
import os
import resource
import select
import signal
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Protocol, Self

from tests.support.by_hand import PATIENCE, frame, wait_for
from tests.support.zygote import popen
from vnetdp.device.device import NetDevice
from vnetdp.device.owners import Owner
from vnetdp.endpoints.loopback import EchoEndpoint, NullEndpoint
from vnetdp.guest.driver import Driver, memory_for
from vnetdp.shared.memory import GuestMemory
from vnetdp.shared.notify import EventFd
from vnetdp.testing import HandRing
from vnetdp.vhost_user.back_end.server import Server
from vnetdp.vhost_user.front_end.front_end import VhostUserFrontEnd
from vnetdp.vhost_user.message import ProtocolFeature, Request

PAIRS = 2
VERSION_1 = 1 << 32
LOG_ALL = 1 << 26
PROTOCOL_FEATURES = 1 << 30
EVENT_IDX = 1 << 29
FEATURES = VERSION_1 | PROTOCOL_FEATURES
ALL = (1 << 64) - 1
NO_FD = 0x100
NEED_REPLY = 1 << 3
OK = struct.pack("<Q", 0)
NUM = 16
GPA = 0x10000
MEMORY_LEN = 1 << 20
UVA = 0x7F00_0000_0000  # where the guest's memory seems to be in the front end

P = ProtocolFeature
# What is offered to everybody.
SPOKEN = (
    P.MQ | P.LOG_SHMFD | P.RARP | P.REPLY_ACK | P.MTU | P.BACKEND_REQ | P.CONFIG | P.INFLIGHT_SHMFD
    | P.RESET_DEVICE | P.CONFIGURE_MEM_SLOTS | P.STATUS
)  # fmt: skip
UNTOLD = SPOKEN & ~P.STATUS  # the same, of a front end that doesn't tell the device status
MOVABLE = SPOKEN | P.DEVICE_STATE  # what these back ends are asked to offer


class Left(Exception):  # noqa: N818 - it is no error
    """The back end closed the connection."""


def u64(value: int) -> bytes:
    return struct.pack("<Q", value)


def state(index: int, num: int) -> bytes:
    return struct.pack("<II", index, num)


def region(gpa: int, size: int, uva: int, offset: int = 0) -> bytes:
    return struct.pack("<QQQQ", gpa, size, uva, offset)


def table(*regions: bytes) -> bytes:
    return struct.pack("<II", len(regions), 0) + b"".join(regions)


def inflight(size: int, offset: int, num_queues: int, queue_size: int) -> bytes:
    return struct.pack("<QQHHI", size, offset, num_queues, queue_size, 0)


class ByHand:
    """A front end that sends what it is told, byte for byte, on *sock*, which becomes its own."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        sock.settimeout(PATIENCE)

    @classmethod
    def dial(cls, path: str) -> ByHand:
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        sock.connect(path)
        return cls(sock)

    def send(
        self, request: int, payload: bytes = b"", fds: Sequence[int] = (), flags: int = 1, size: int | None = None
    ) -> None:
        """Send a message; *size*: what its header says, if not the truth. Left if nobody takes it any more."""
        data = struct.pack("<III", request, flags, len(payload) if size is None else size) + payload
        try:
            socket.send_fds(self.sock, [data], fds)
        except (BrokenPipeError, ConnectionResetError) as e:
            raise Left from e

    def read(self, length: int, fds: list[int] | None = None) -> bytes:
        data = b""
        while len(data) < length:
            try:
                part, ancillary, _, _ = self.sock.recvmsg(length - len(data), socket.CMSG_SPACE(4 * 16))
            except ConnectionResetError as e:
                raise Left from e
            for _, _, content in ancillary:
                got = array.array("i", content)
                if fds is None:
                    for fd in got:
                        os.close(fd)
                else:
                    fds.extend(got)
            if not part:
                raise Left
            data += part
        return data

    def answer(self, request: int, fds: list[int] | None = None) -> bytes:
        """Return the payload of the next answer, which is to be one to *request*."""
        got, flags, size = struct.unpack("<III", self.read(12, fds))
        assert (got, flags) == (request, 5)
        return self.read(size, fds)

    def ask(self, request: int, payload: bytes = b"", fds: Sequence[int] = ()) -> bytes:
        """Send a request that is answered by itself; return the answer."""
        self.send(request, payload, fds)
        return self.answer(request)

    def tell(self, request: int, payload: bytes = b"", fds: Sequence[int] = ()) -> bool:
        """Send a request that is answered by an acknowledgement (REPLY_ACK); return whether that says yes."""
        self.send(request, payload, fds, 1 | NEED_REPLY)
        return self.answer(request) == OK

    def shake_hands(self, features: int = FEATURES, protocol: int = UNTOLD) -> None:
        self.send(Request.SET_OWNER)
        assert struct.unpack("<Q", self.ask(Request.GET_FEATURES))[0] & features == features
        if features & PROTOCOL_FEATURES:
            assert struct.unpack("<Q", self.ask(Request.GET_PROTOCOL_FEATURES))[0] & protocol == protocol
            self.send(Request.SET_PROTOCOL_FEATURES, u64(protocol))
        self.send(Request.SET_FEATURES, u64(features))

    def leave(self) -> None:
        """Say no more, and wait until the back end has let go of everything: it closes the connection last."""
        with suppress(OSError):
            self.sock.shutdown(socket.SHUT_WR)
        with suppress(Left):
            while True:
                self.read(1)
        self.sock.close()

    def left(self) -> bool:
        """Wait for the back end to close the connection; what it said is not read, and thrown away."""
        poll = select.poll()
        poll.register(self.sock, select.POLLRDHUP)
        return bool(poll.poll(PATIENCE * 1000))

    def close(self) -> None:
        self.sock.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


class Guest:
    """Guest memory with the rings of all pairs by hand, and what a front end tells of them."""

    def __init__(self, end: ByHand, pairs: int = PAIRS, sealed: bool = True) -> None:
        self.end = end
        self._own = ExitStack()
        if sealed:
            self.memory = GuestMemory.create([(GPA, MEMORY_LEN)])
        else:
            fd = os.memfd_create("shrinks")
            os.ftruncate(fd, MEMORY_LEN)
            from vnetdp.shared.memory import Region

            self.memory = GuestMemory([Region(GPA, MEMORY_LEN, fd)], foreign=True)
            self._own.callback(os.close, fd)
        self.rings: list[HandRing] = []
        at = GPA
        for _ in range(2 * pairs):
            self.rings.append(HandRing(self.memory, at, NUM))
            at = self.rings[-1].end
        self.kicks = [EventFd() for _ in self.rings]
        self.calls = [EventFd() for _ in self.rings]

    @property
    def fd(self) -> int:
        return self.memory.regions[0].fd

    @property
    def table(self) -> bytes:
        return table(region(GPA, MEMORY_LEN, UVA))

    def share(self) -> None:
        self.end.send(Request.SET_MEM_TABLE, self.table, [self.fd])

    def addr(self, index: int, flags: int = 0, log: int = 0, **other: int) -> bytes:
        ring = self.rings[index]
        at = {"desc": ring.desc, "used": ring.used, "avail": ring.avail}
        places = [other.get(part, gpa - GPA + UVA) for part, gpa in at.items()]
        return struct.pack("<IIQQQQ", index, flags, *places, log)

    def describe(self, index: int, base: int = 0) -> None:
        """Tell all of a ring but its kick."""
        self.end.send(Request.SET_VRING_NUM, state(index, NUM))
        self.end.send(Request.SET_VRING_BASE, state(index, base))
        self.end.send(Request.SET_VRING_ADDR, self.addr(index))
        self.end.send(Request.SET_VRING_CALL, u64(index), [self.calls[index].fd])

    def start(self, *indices: int) -> None:
        """Describe rings, start them, and enable them."""
        for index in indices:
            self.describe(index)
            self.end.send(Request.SET_VRING_KICK, u64(index), [self.kicks[index].fd])
            self.end.send(Request.SET_VRING_ENABLE, state(index, 1))

    def echo(self, n: int = 0, pair: int = 0) -> None:
        """Send a frame on a pair that runs, and wait until it came back whole."""
        receiveq, transmitq = self.rings[2 * pair : 2 * pair + 2]
        head = receiveq.avail_idx % NUM
        was = receiveq.used_idx
        receiveq.taken_from(was)
        receiveq.post(head)
        transmitq.send(head, frame(n))
        self.kicks[2 * pair + 1].signal()
        self.kicks[2 * pair].signal()
        wait_for(lambda: receiveq.used_idx != was, "the frame came back")
        assert receiveq.taken() == [(head, 12 + len(frame(n)))]
        assert self.memory.read(receiveq.buffer(head) + 12, len(frame(n))) == frame(n)

    def close(self) -> None:
        self.memory.close()
        self._own.close()
        for event in (*self.kicks, *self.calls):
            event.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def ping(back_end: BackEnd, frames: int = 8) -> None:
    """Be a well-behaved front end with a real driver, and have frames come back from the echo."""
    path = back_end.path

    def attached() -> bool:
        assert back_end.alive(), back_end.lines()
        return front_end.connect(PATIENCE)

    with ExitStack() as stack:
        front_end = VhostUserFrontEnd(path, PAIRS, queue_size=NUM)
        stack.callback(front_end.close)
        wait_for(attached, "the back end takes a front end")
        memory = stack.enter_context(memory_for(PAIRS, NUM))
        nowhere = stack.enter_context(NullEndpoint(PAIRS))
        device = stack.enter_context(
            NetDevice(
                memory, nowhere, queue_pairs=PAIRS, offered=front_end.features, vhost=front_end.backends, max_num=NUM,
                fallback=False, threaded=False,
            )
        )  # fmt: skip
        driver = stack.enter_context(Driver(device, memory, queue_pairs=PAIRS, num=NUM))
        assert device.owner is Owner.VHOST, device.last_error
        for pair in range(PAIRS):
            sent = [frame(n) for n in range(frames)]
            for data in sent:
                assert driver.send(data, pair)
            got: list[bytes] = []

            def all_came(got: list[bytes] = got) -> bool:
                driver.step()
                got += driver.receive()
                return len(got) >= frames

            wait_for(all_came, "the frames came back")
            assert got == sent
        device.set_status(0)
    settle(path)


def settle(path: str) -> None:
    """Wait until the back end is through with every front end before: it serves one at a time."""
    ByHand.dial(path).leave()


# --- what a process holds ---


def descriptors(pid: int | str = "self") -> dict[int, str]:
    """Return the open descriptors of a process, by what they are of."""
    found = {}
    for entry in os.scandir(f"/proc/{pid}/fd"):
        with suppress(FileNotFoundError):
            found[int(entry.name)] = str(Path(entry.path).readlink())
    return {fd: name for fd, name in found.items() if "/proc/" not in name}


def mappings(pid: int | str = "self") -> list[str]:
    """Return what a process has mapped shared, or reserved without access: windows, logs, areas."""
    found = []
    for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
        words = line.split()
        if words[1][3] == "s":
            found.append(" ".join(words[5:]))
    return sorted(found)


class BackEnd(Protocol):
    """An echo of two queue pairs behind a socket."""

    path: str

    def alive(self) -> bool: ...

    def lines(self) -> list[str]:
        """Return the lines logged since this was last asked."""

    def holds(self) -> tuple[int, int]:
        """Return how many descriptors and mappings it has."""

    def close(self) -> None: ...


class _Lines(logging.Handler):
    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.got: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.got.append(self.format(record))  # with its traceback, if it has one
        # Whoever keeps the record for later must not keep what the frames of an exception had mapped.
        record.msg, record.args, record.exc_info = record.getMessage(), None, None


class InThread:
    """The server in a thread of this process."""

    def __init__(self, folder: Path, inband: bool = False) -> None:
        self.path = str(folder / "thread")
        self._lines = _Lines()
        logging.getLogger("vnetdp").addHandler(self._lines)
        self._endpoint = EchoEndpoint(PAIRS)
        self.server = Server(
            self._endpoint, self.path, queue_pairs=PAIRS, inband=inband, protocol_features=int(MOVABLE)
        )
        self._stop = threading.Event()
        self._wake = EventFd()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self.server.run(self._stop.is_set, self._wake.fd)
        except Exception:
            logging.getLogger("vnetdp").exception("the server ended")
            raise

    def alive(self) -> bool:
        return self._thread.is_alive()

    def echoed(self) -> int:
        """Return how many frames came and went so far."""
        return self._endpoint.counters()["to_wire"]

    def lines(self) -> list[str]:
        got, self._lines.got = self._lines.got, []
        return got

    def holds(self) -> tuple[int, int]:
        gc.collect()  # what only waits for that is no leak
        return len(descriptors()), len(mappings())

    def close(self) -> None:
        self._stop.set()
        self._wake.signal()
        self._thread.join(PATIENCE)
        assert not self._thread.is_alive()
        self.server.close()
        self._wake.close()
        self._endpoint.close()
        logging.getLogger("vnetdp").removeHandler(self._lines)


class InProcess:
    """`vnetdp serve`."""

    def __init__(self, folder: Path, *options: str) -> None:
        self.path = str(folder / "process")
        self._log = folder / "process.log"
        self._seen = 0
        self.process = serve(self.path, self._log, *options)
        wait_for(lambda: "serving" in self._log.read_text(), "the back end serves")
        self.lines()

    def alive(self) -> bool:
        return self.process.poll() is None

    def lines(self) -> list[str]:
        text = self._log.read_text()
        new, self._seen = text[self._seen :], len(text)
        return new.splitlines()

    def holds(self) -> tuple[int, int]:
        return len(descriptors(self.process.pid)), len(mappings(self.process.pid))

    def close(self) -> None:
        assert self.process.poll() is None, self._log.read_text()
        self.process.send_signal(signal.SIGTERM)
        assert self.process.wait(PATIENCE) == 0
        assert not Path(self.path).exists()
        assert "Traceback" not in self._log.read_text()


def serve(path: str, log: Path, *options: str) -> subprocess.Popen[bytes]:
    """Start `vnetdp serve echo` on *path*, what it says going into *log*; it may not serve yet."""
    command = [
        *(sys.executable, "-m", "vnetdp", "serve", "echo", "--socket", path, "--queue-pairs", str(PAIRS)),
        *("--protocol-features", "+device_state", *options),
    ]
    with log.open("ab") as out:
        return popen(command, stdout=subprocess.DEVNULL, stderr=out)


@contextmanager
def open_files(limit: int) -> Iterator[None]:
    """Have this process, and those that it starts, open no more than so many descriptors each: 1024 is usual."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@contextmanager
def spare(n: int) -> Iterator[list[int]]:
    """Give *n* descriptors of no particular use."""
    fds = [os.eventfd(0) for _ in range(n)]
    try:
        yield fds
    finally:
        for fd in fds:
            os.close(fd)


@contextmanager
def costs_nothing(back_end: BackEnd, refusals: int | None = 1) -> Iterator[None]:
    """Check that the block leaves a back end that serves, holds what it held, and logged so many lines (None = any)."""
    settle(back_end.path)
    back_end.lines()
    before = back_end.holds()
    yield
    ping(back_end)
    after = back_end.holds()
    # A process may have held more before: what its own collector had not come to yet.
    less = isinstance(back_end, InProcess) and all(now <= then for now, then in zip(after, before, strict=True))
    assert after == before or less, (after, before, mappings())
    lines = back_end.lines()
    assert not any("Traceback" in line for line in lines), lines
    assert refusals is None or len(lines) == refusals, lines
