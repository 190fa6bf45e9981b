"""Two network namespaces to put a link between: for benchmarks, and for tests that need real interfaces.

A pair is side ``a`` (10.203.0.1/24) and side ``b`` (10.203.0.2/24). The namespaces, and every process started
through the pair, go away when it is closed, also after an exception or SIGTERM. Only processes that the pair
started are signalled, by their id.
"""

import functools
import itertools
import os
import shutil
import signal
import subprocess
import threading
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import IO

from vnetdp.errors import VnetdpError
from vnetdp.system import signals
from vnetdp.system.owned import Owned

ADDRESSES = {"a": "10.203.0.1", "b": "10.203.0.2"}
PREFIX_LEN = 24
MTU = 1500

_IPV6_OFF = "for f in /proc/sys/net/ipv6/conf/*/disable_ipv6; do [ ! -e $f ] || echo 1 > $f; done"
_serial = itertools.count()


class NetnsError(VnetdpError):
    """A command that sets up namespaces or interfaces, or that runs in one, failed."""


class NetnsPair(Owned):
    """Namespaces ``vnetdp-PID-N-a`` and ``-b``, and one more for each name in *extra*; IPv6 is off in all.

    *side* is "a", "b" or a name from *extra* throughout. Use it as a context manager, or call `close`. The
    first pair of the main thread also turns SIGTERM into SystemExit until it is closed (unless the program
    has a handler of its own).
    """

    def __init__(self, extra: Sequence[str] = ()) -> None:
        serial = next(_serial)
        self.names: dict[str, str] = {}
        self._processes: list[subprocess.Popen[bytes]] = []
        self._owns_sigterm = (
            threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
        )
        if self._owns_sigterm:
            signal.signal(signal.SIGTERM, _exit)
        signals.at_end(self._delete)
        try:
            for side in ("a", "b", *extra):
                name = f"vnetdp-{os.getpid()}-{serial}-{side}"
                # Recorded before it exists: a signal between the two lines would otherwise leave it behind.
                self.names[side] = name
                _command("ip", "netns", "add", name)
                self.ip(side, "link set lo up")
                # Neighbour discovery and router solicitations would be counted as traffic.
                self.run(side, ["sh", "-c", _IPV6_OFF])
        except BaseException:
            self.close()
            raise

    def run(self, side: str, argv: Sequence[str], timeout: float = 30.0) -> str:
        """Run *argv* in a namespace and return its standard output.

        NetnsError if it fails, or takes longer than *timeout* seconds.
        """
        return _command(*self._inside(side), *argv, timeout=timeout)

    def popen(self, side: str, argv: Sequence[str], output: IO[bytes] | None = None) -> subprocess.Popen[bytes]:
        """Start *argv* in a namespace, both output streams going to *output* (None: nowhere).

        It leads a session of its own, so that Ctrl-C in a terminal reaches it only through `stop` or `close`.
        """
        process = subprocess.Popen(
            [*self._inside(side), *argv],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL if output is None else output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        self._processes.append(process)
        return process

    def stop(self, process: subprocess.Popen[bytes], timeout: float = 10.0) -> int:
        """End a process of this pair and return its exit status, as Popen gives it.

        SIGTERM first; SIGKILL, to its whole group, if it is still there after *timeout* seconds.
        """
        if process.poll() is None:
            process.terminate()
            try:
                process.wait(timeout)
            except subprocess.TimeoutExpired:
                # The group's id is still ours: its leader hasn't been waited for.
                os.killpg(process.pid, signal.SIGKILL)
        return process.wait()

    def ip(self, side: str, arguments: str) -> str:
        """Run ``ip -n NAMESPACE ARGUMENTS``, which are split at spaces; return its output."""
        return _command("ip", "-n", self.names[side], *arguments.split())

    def add_tap(self, side: str, interface: str, multi_queue: bool = False) -> None:
        """Make a persistent TAP: it outlives the programs that open it.

        An opener must ask for IFF_MULTI_QUEUE exactly if *multi_queue*; IFF_VNET_HDR is as the opener likes.
        """
        self.ip(side, f"tuntap add dev {interface} mode tap {'multi_queue' if multi_queue else ''}")

    def move(self, interface: str, source: str, target: str, new_name: str) -> None:
        """Move an interface to another namespace under a new name. It arrives down and without addresses."""
        self.ip(source, f"link set dev {interface} netns {self.names[target]} name {new_name}")

    def has_interface(self, side: str, interface: str) -> bool:
        """Whether *interface* exists in this side's namespace."""
        try:
            self.ip(side, f"link show dev {interface}")
        except NetnsError:
            return False
        return True

    def configure(self, interface: str) -> None:
        """Give *interface*, of that name on both sides, its side's address and MTU 1500, and set it up."""
        for side, address in ADDRESSES.items():
            self.ip(side, f"address add {address}/{PREFIX_LEN} dev {interface}")
            self.ip(side, f"link set dev {interface} mtu {MTU} up")

    def close(self) -> None:
        """Stop every process started through this pair and delete its namespaces. Idempotent."""
        if self.inherited:
            return
        if self._owns_sigterm:
            # A second SIGTERM mustn't cut the clean-up short.
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        try:
            while self._processes:
                self.stop(self._processes.pop(), timeout=5.0)
            self._delete()
            signals.no_more_at_end(self._delete)
        finally:
            if self._owns_sigterm:
                signal.signal(signal.SIGTERM, signal.SIG_DFL)
                self._owns_sigterm = False

    def _delete(self) -> None:
        """Delete its namespaces; each is forgotten only once it is gone."""
        for side, name in tuple(self.names.items()):
            if (Path("/run/netns") / name).exists():
                _command("ip", "netns", "delete", name)
            del self.names[side]

    def _inside(self, side: str) -> tuple[str, ...]:
        # `ip netns exec` replaces itself by the command: the process id that Popen gives is the command's.
        return "ip", "netns", "exec", self.names[side]


@functools.cache
def why_no_netns() -> str | None:
    """Why namespaces with TAPs can't be used here, in words for a skipped test; None if they can.

    Found out by making a pair with one TAP in it: a refusal by the kernel, a container or a missing privilege
    shows at once.
    """
    if shutil.which("ip") is None:
        return "the ip command (iproute2) isn't installed"
    if not Path("/dev/net/tun").exists():
        return "/dev/net/tun doesn't exist"
    try:
        with NetnsPair() as pair:
            pair.add_tap("a", "probe")
    except NetnsError as error:
        hint = "" if os.geteuid() == 0 else "run as root; "
        return f"{hint}network namespaces or TAPs are refused: {error}"
    return None


def _command(*argv: str, timeout: float = 30.0) -> str:
    try:
        done = subprocess.run(
            argv, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=timeout, check=False
        )
    except subprocess.TimeoutExpired:
        raise NetnsError(f"{' '.join(argv)}: still running after {timeout:g} s") from None
    if done.returncode != 0:
        said = done.stderr.strip() or done.stdout.strip() or "(no message)"
        raise NetnsError(f"{' '.join(argv)}: exit status {done.returncode}: {said}")
    return done.stdout


def _exit(signum: int, _frame: FrameType | None) -> None:
    raise SystemExit(128 + signum)
