"""Guests, and the back ends that they attach to, as processes that a test owns: each ends with its `with` block."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from vnetdp.bench.netns import NetnsPair

from . import images

REPOSITORY = Path(__file__).parents[3]
FIGURES = logging.getLogger("guests")  # what was measured: shown with --log-cli-level=info

BOOT_S = 60
COMMAND_S = 60
END_S = 10
START_S = 240  # the first command of a cold cache compiles


class GuestError(AssertionError):
    """A guest did not boot, died, or a command in it failed; the text ends with what its console said."""


class Console:
    """The line on which a guest takes commands, one at a time."""

    def __init__(self, line: socket.socket) -> None:
        self._line = line
        self._line.setblocking(False)
        self._buffer = b""

    def wait_for(self, mark: bytes, timeout: float) -> bytes:
        """Return what comes before *mark*; TimeoutError, or EOFError if the guest has ended."""
        until = time.monotonic() + timeout
        while mark not in self._buffer:
            left = until - time.monotonic()
            if left <= 0 or not select.select([self._line], [], [], left)[0]:
                raise TimeoutError(f"no {mark.decode()} in {timeout:.0f} s, but: {self._buffer[-500:]!r}")
            data = self._line.recv(1 << 16)
            if not data:
                raise EOFError(f"the guest ended after: {self._buffer[-500:]!r}")
            self._buffer += data
        before, _, self._buffer = self._buffer.partition(mark)
        return before

    def send(self, command: str) -> None:
        self._line.sendall(command.encode() + b"\n")

    def result(self, timeout: float) -> tuple[int, str]:
        """Return the exit status of the command under way, and what it printed."""
        said = self.wait_for(b"@@EXIT ", timeout).replace(b"\r", b"").decode(errors="replace")
        return int(self.wait_for(b"\n", END_S)), said

    def close(self) -> None:
        self._line.close()


class Guest:
    """A guest that has booted. `run` runs a shell command in it."""

    def __init__(self, folder: Path, name: str) -> None:
        self.log = folder / f"{name}.log"
        self.process: subprocess.Popen[bytes] | None = None
        self.console: Console | None = None

    def run(self, command: str, timeout: float = COMMAND_S, check: bool = True) -> str:
        """Return what *command* prints; GuestError if it fails, unless *check* is false."""
        console = self._console()
        try:
            console.send(command)
            status, said = console.result(timeout)
        except (TimeoutError, EOFError, OSError) as e:
            raise GuestError(f"{command}: {e}\n{self.last_words()}") from e
        if check and status != 0:
            raise GuestError(f"{command}: exit status {status}\n{said}\n{self.last_words()}")
        return said

    def boot(self, timeout: float = BOOT_S) -> None:
        """Wait until the guest takes commands."""
        try:
            self._console().wait_for(b"@@UP", timeout)
        except (TimeoutError, EOFError, OSError) as e:
            raise GuestError(f"the guest did not boot: {e}\n{self.last_words()}") from e

    def _console(self) -> Console:
        assert self.console is not None
        return self.console

    def last_words(self) -> str:
        return self.log.read_text(errors="replace")[-3000:] if self.log.exists() else ""

    def close(self) -> None:
        if self.console is not None:
            self.console.close()
        if self.process is not None:
            end(self.process, signal.SIGKILL)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def end(process: subprocess.Popen[bytes], first: int = signal.SIGTERM) -> int:
    """End a process that leads a session of its own, and whatever it left there."""
    with suppress(ProcessLookupError):
        if process.poll() is None:
            process.send_signal(first)
    try:
        process.wait(END_S)
    except subprocess.TimeoutExpired:
        process.kill()
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    return process.wait()


# --- User Mode Linux ---


class Uml(Guest):
    """User Mode Linux: virtio-net and a vhost-user front end as the kernel has them, at native speed."""

    def __init__(self, folder: Path, sock: Path, memory_mb: int = 128, prefix: Sequence[str] = ()) -> None:
        """*prefix*: the words of a command that runs it."""
        super().__init__(folder, "uml")
        image = images.uml()
        ours, theirs = socket.socketpair()
        shm = Path("/dev/shm")
        with self.log.open("wb") as log, theirs:
            self.process = subprocess.Popen(
                [
                    *(*prefix, str(image.kernel), f"mem={memory_mb}M", f"initrd={image.initrd}"),
                    *(f"virtio_uml.device={sock}:1", f"uml_dir={folder}", "umid=uml", "net.ifnames=0", "panic=-1"),
                    *("con=null", "con0=null,fd:2", "con1=fd:0,fd:1", "ssl=null", "quiet", "loglevel=4"),
                    "vnetdp.commands",
                ],
                stdin=theirs.fileno(),
                stdout=theirs.fileno(),
                stderr=log,
                env={**os.environ, "TMPDIR": str(shm if shm.is_dir() else folder)},
                start_new_session=True,
            )
        self.console = Console(ours)

    def close(self) -> None:
        # UML's helpers lead groups of their own, all in the session of its process.
        session = _session_of(self.process.pid) if self.process is not None else []
        super().close()
        for pid in session:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def _session_of(leader: int) -> list[int]:
    """Return the processes of the session that *leader* leads."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with suppress(OSError):
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
                if int(fields[3]) == leader:
                    found.append(int(entry.name))
    return found


# --- QEMU ---


class Qmp:
    """QEMU's monitor."""

    def __init__(self, path: Path) -> None:
        self._socket = _connect(path)
        self._socket.settimeout(30)
        self._file = self._socket.makefile("rw")
        self._file.readline()
        self("qmp_capabilities")

    def __call__(self, command: str, **arguments: object) -> dict[str, Any]:
        self._file.write(json.dumps({"execute": command, "arguments": arguments}) + "\n")
        self._file.flush()
        while True:
            answer = json.loads(self._file.readline())
            if "event" in answer:
                continue
            if "error" in answer:
                raise GuestError(f"{command}: {answer['error']['desc']}")
            result: dict[str, Any] = answer["return"]
            return result

    def close(self) -> None:
        self._file.close()
        self._socket.close()


def _connect(path: Path, timeout: float = 20) -> socket.socket:
    until = time.monotonic() + timeout
    while True:
        sock = socket.socket(socket.AF_UNIX)
        try:
            sock.connect(str(path))
            return sock
        except (FileNotFoundError, ConnectionRefusedError):
            sock.close()
            if time.monotonic() > until:
                raise GuestError(f"nobody listens on {path}") from None
            time.sleep(0.05)


class QemuGuest(Guest):
    """A PC in QEMU under TCG. Its network device is vhost-user on *sock*; None = it has none.

    device: more properties of virtio-net-pci. generic: QEMU's generic vhost-user device in its place, in the newest QEMU.
    machine: of the machine. listen: QEMU owns the socket. incoming: the guest is to arrive by migration, on a socket of
    that path. more: arguments of QEMU.
    """

    def __init__(
        self,
        folder: Path,
        sock: Path | None,
        *,
        name: str = "qemu",
        device: str = "",
        generic: bool = False,
        machine: str = "q35",
        memory_mb: int = 256,
        cpus: int = 1,
        queue_pairs: int = 1,
        listen: bool = False,
        incoming: Path | None = None,
        mac: str = "52:54:00:00:00:02",
        more: Sequence[str] = (),
    ) -> None:
        super().__init__(folder, name)
        emulator, image = images.newest_qemu() if generic else images.qemu(), images.pc()
        line, monitor = folder / f"{name}.line", folder / f"{name}.qmp"
        argv = [
            *(str(emulator.binary), *emulator.arguments, "-accel", "tcg", "-M", machine, "-m", str(memory_mb)),
            *("-smp", str(cpus), "-nodefaults", "-no-reboot", "-display", "none", "-monitor", "none"),
            *("-object", f"memory-backend-memfd,id=mem,size={memory_mb}M,share=on", "-numa", "node,memdev=mem"),
            *("-serial", f"file:{self.log}", "-serial", f"unix:{line},server=on,wait=off"),
            *("-qmp", f"unix:{monitor},server=on,wait=off", *more),
            *("-kernel", str(image.kernel), "-initrd", str(image.initrd)),
            *(
                "-append",
                "console=ttyS0 quiet loglevel=4 panic=-1 mitigations=off tsc=reliable net.ifnames=0 vnetdp.commands",
            ),
        ]
        if sock is not None:
            argv += ["-chardev", f"socket,id=vu,path={sock}{',server=on' if listen else ''}"]
            if generic:
                card = f"vhost-user-test-device-pci,chardev=vu,virtio-id=1,num_vqs={2 * queue_pairs},config_size=12"
            else:
                queues, several = (f",queues={queue_pairs}", ",mq=on") if queue_pairs > 1 else ("", "")
                argv += ["-netdev", f"vhost-user,id=net,chardev=vu{queues}"]
                card = f"virtio-net-pci,netdev=net,mac={mac},romfile={several}"
            argv += ["-device", f"{card}{',' if device else ''}{device}"]
        if incoming is not None:
            argv += ["-incoming", f"unix:{incoming}"]
        with (folder / f"{name}.err").open("wb") as errors:
            self.process = subprocess.Popen(
                ["nice", "-n", "5", *argv],
                stdin=subprocess.DEVNULL,
                stdout=errors,
                stderr=errors,
                env={**os.environ, **emulator.environment},
                start_new_session=True,
            )
        self._errors = folder / f"{name}.err"
        self._monitor_path = monitor
        self._monitor: Qmp | None = None
        try:
            self.console = Console(_connect(line, 60 if listen else 20))
        except GuestError as e:
            self.close()
            raise GuestError(f"{e}\n{self.last_words()}") from e

    @property
    def qmp(self) -> Qmp:
        if self._monitor is None:
            self._monitor = Qmp(self._monitor_path)
        return self._monitor

    def last_words(self) -> str:
        errors = self._errors.read_text(errors="replace") if self._errors.exists() else ""
        return f"{super().last_words()}\nqemu: {errors}"

    def close(self) -> None:
        if self._monitor is not None:
            self._monitor.close()
        super().close()


# --- back ends ---


class Serve:
    """A `vnetdp serve` of this checkout. With *connect* it is ready when it has started, else when it listens."""

    def __init__(self, folder: Path, endpoint: str, sock: Path, *arguments: str, connect: bool = False) -> None:
        self.sock = sock
        self.log = folder / f"{sock.name}.serve.log"
        self.report = folder / f"{sock.name}.serve.json"
        self._argv = [
            *(sys.executable, "-m", "vnetdp", "-v", "serve", endpoint, "--socket", str(sock)),
            *("--json", str(self.report), *arguments, *(["--connect"] if connect else [])),
        ]
        self.process = self.start()

    def start(self) -> subprocess.Popen[bytes]:
        """Start it (again, if it has ended)."""
        with self.log.open("ab") as log:
            began = log.tell()
            self.process = subprocess.Popen(
                self._argv, cwd=REPOSITORY, stdout=log, stderr=log, stdin=subprocess.DEVNULL, start_new_session=True
            )
        until = time.monotonic() + START_S
        while b"ends it" not in self.log.read_bytes()[began:]:
            if self.process.poll() is not None or time.monotonic() > until:
                raise AssertionError(f"serve did not start: {self.log.read_text()}")
            time.sleep(0.05)
        return self.process

    def kill(self) -> None:
        """End it as a crash does."""
        self.process.kill()
        self.process.wait()

    def stop(self) -> dict[str, Any]:
        """End it as a user does, and return its report."""
        status = end(self.process)
        assert status == 0, f"serve ended with {status}: {self.log.read_text()}"
        report: dict[str, Any] = json.loads(self.report.read_text())
        return report

    def said(self) -> str:
        return self.log.read_text(errors="replace")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        end(self.process)
        if error is not None:
            error.add_note(f"serve said:\n{self.said()[-3000:]}")


@contextmanager
def process(argv: Sequence[str], log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """Run some other program for the length of the block."""
    with log.open("ab") as output:
        running = subprocess.Popen(
            argv, stdout=output, stderr=output, stdin=subprocess.DEVNULL, cwd=REPOSITORY, start_new_session=True
        )
    try:
        yield running
    finally:
        end(running)


def why_no_guest(*tools: str) -> str | None:
    """Return what is missing for guests: to run as root, and programs; None if nothing is."""
    if os.geteuid() != 0:
        return "guests are attached to TAPs in namespaces: run as root"
    missing = [tool for tool in ("ip", "apt-get", "dpkg", "cpio", *tools) if shutil.which(tool) is None]
    return f"not installed: {', '.join(missing)}" if missing else None


# --- the other end of the wire ---


class Host:
    """What guests talk to: a namespace with our TAPs, where iperf3 and an HTTP server can run."""

    ADDRESS = "10.0.0.1"
    GUEST = "10.0.0.2"
    TAP = "guest0"

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._spaces = NetnsPair()
        self.netns = self._spaces.names["a"]

    def tap(self, name: str = TAP) -> str:
        """Return the endpoint to give to `serve`."""
        return f"tap:{name},netns={self.netns}"

    def ip(self, arguments: str) -> str:
        return self._spaces.ip("a", arguments)

    def address(self, interface: str = TAP) -> None:
        """Give the interface our address."""
        self.ip(f"addr replace {self.ADDRESS}/24 dev {interface}")
        self.ip(f"link set dev {interface} up")

    def run(self, *argv: str, timeout: float = 30) -> str:
        return self._spaces.run("a", argv, timeout)

    def start(self, *argv: str) -> subprocess.Popen[bytes]:
        return self._spaces.popen("a", argv)

    def iperf(self, guest: Guest, seconds: float, *, reverse: bool = False, cpu: int | None = None) -> float:
        """Return the Mbit/s that TCP moves from the guest to us, or from us to the guest with *reverse*.

        cpu: the guest's processor that the guest's end is to run on; None = any.
        """
        server = self.start("iperf3", "-s", "-1", "-p", "5201")
        try:
            self._wait_until_listening(5201)
            pin = "" if cpu is None else f"taskset {1 << cpu:x} "
            flags = f"-t {seconds} {'-R' if reverse else ''}"
            said = json.loads(guest.run(f"{pin}iperf3 -J -c {self.ADDRESS} {flags}", timeout=seconds + 30))
        finally:
            self._spaces.stop(server)
        return float(said["end"]["sum_received"]["bits_per_second"]) / 1e6

    def _wait_until_listening(self, port: int) -> None:
        for _ in range(100):
            if f":{port} " in self.run("ss", "-Hltn"):
                return
            time.sleep(0.05)
        raise AssertionError(f"nothing listens on port {port}")

    @contextmanager
    def file(self, megabytes: int) -> Iterator[tuple[str, str]]:
        """Serve a file of random bytes by HTTP; give its URL and its SHA-256."""
        folder = self.folder / "http"
        folder.mkdir(exist_ok=True)
        content = os.urandom(1 << 20)
        digest = hashlib.sha256()
        with (folder / "file").open("wb") as file:
            for number in range(megabytes):
                block = number.to_bytes(8) + content[8:]
                file.write(block)
                digest.update(block)
        server = self.start(sys.executable, "-m", "http.server", "8000", "--bind", "0.0.0.0", "-d", str(folder))
        try:
            self._wait_until_listening(8000)
            yield f"http://{self.ADDRESS}:8000/file", digest.hexdigest()
        finally:
            self._spaces.stop(server)
            (folder / "file").unlink()

    def connect(self, guest: Guest, times: int = 32) -> None:
        """Open connections to the guest, each a flow that the guest has not sent on before."""
        guest.run("pidof httpd || httpd -p 80 -h /")
        one = f"socket.create_connection(('{self.GUEST}', 80), 5).close()"
        self.run(sys.executable, "-c", f"import socket\nfor _ in range({times}): {one}", timeout=5.0 * times)

    def close(self) -> None:
        self._spaces.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def up(guest: Guest) -> None:
    """Give the guest its address."""
    guest.run(f"ip addr add {Host.GUEST}/24 dev eth0 && ip link set eth0 up")


def assert_pings(guest: Guest, count: int = 100, peer: str = Host.ADDRESS) -> None:
    """Ping from the guest with frames of many sizes; none may be lost or answered wrongly."""
    guest.run(f"for i in 1 2 3 4 5; do ping -c 1 -W 1 -q {peer} && break; done")  # ARP
    for size in (0, 1, 200, 1000, 1472):
        said = guest.run(f"probe hold {peer} {count} {size} 500")
        assert f"sent={count} received={count} wrong=0 duplicate=0" in said


def assert_downloads(guest: Guest, host: Host, megabytes: int, timeout: float = COMMAND_S) -> float:
    """Download a file in the guest and check its hash; return the MB/s."""
    with host.file(megabytes) as (url, digest):
        began = time.monotonic()
        said = guest.run(f"wget -q -O - {url} | sha256sum", timeout)
        assert said.split()[0] == digest
        return megabytes / (time.monotonic() - began)
