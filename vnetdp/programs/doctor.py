"""The doctor: which parts of vnetdp this machine can run, found out by trying, and the next step for each other part.

Nothing stays behind: no interface, no namespace, no file.
"""

from __future__ import annotations

import fcntl
import importlib.metadata
import os
import platform
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from ..errors import ConfigError
from ..system import limits
from ..system.output import tell

_MIN_PYTHON = (3, 11)
_MIN_NUMBA = (0, 62)
_CAP_NET_ADMIN = 12
_CACHE_ROOM = 16 << 20  # of compiled kernels: more than they take
_ENOUGH_DESCRIPTORS = 4096  # for 128 queue pairs or more
_SIGNS = "µ"  # of reports, which ASCII lacks
_TUN = Path("/dev/net/tun")
_VHOST_NET = Path("/dev/vhost-net")

# A program that vnetdp runs or attaches to, its purpose, and Debian's package.
_PEERS = (
    ("ip", "makes namespaces and interfaces, for the tests and `vnetdp bench link`", "iproute2"),
    ("iperf3", "sends the TCP of `vnetdp bench link`", "iperf3"),
    ("dpdk-testpmd", "is measured beside vnetdp by `vnetdp bench link`, and a peer in `make interop`", "dpdk-dev"),
    ("ethtool", "turns off the offloads of a peer in `vnetdp bench link`", "ethtool"),
    ("tshark", "reads the captures that the tests write", "tshark"),
    ("qemu-system-x86_64", "attaches to `vnetdp serve`; `make interop` fetches one of its own", "qemu-system-x86"),
)


@dataclass(frozen=True)
class Check:
    """One check. required: userspace traffic needs it; advice: the next step, "" if all is well."""

    name: str
    ok: bool
    required: bool
    detail: str
    advice: str = ""


def run(say: Callable[[str], None] = tell) -> dict[str, Any]:
    """Try everything, tell *say* line by line, and return the report that `vnetdp doctor --json` writes."""
    checks: list[Check] = []
    looks: list[Callable[[], Check]] = [
        _python,
        _memory,
        _limits,
        _terminal,
        _numba,
        _memfd,
        _cache,
        _cores,
        _pytun,
        _tun,
    ]
    looks += [_namespaces, _hugepages, _vhost_net, *(partial(_peer, *peer) for peer in _PEERS)]
    for look in looks:
        checks.append(look())
        _tell(checks[-1], say)
        if checks[-1].name == "memory" and not checks[-1].ok:
            break  # to load the compiler would end this process, too
    ok = all(check.ok for check in checks if check.required)
    missing = [check.name for check in checks if check.required and not check.ok]
    say(
        "all that userspace traffic needs is here: try `vnetdp demo`"
        if ok
        else f"userspace traffic can't run: missing {', '.join(missing)}"
    )
    return {"ok": ok, "checks": [asdict(check) for check in checks]}


def _tell(check: Check, say: Callable[[str], None]) -> None:
    word = "ok" if check.ok else "MISSING" if check.required else "without"
    say(f"{word:<8} {check.name:<20} {check.detail}")
    if check.advice:
        say(f"{'':<29} -> {check.advice}")


def _python() -> Check:
    ok = sys.version_info >= _MIN_PYTHON
    advice = "" if ok else f"install Python {_MIN_PYTHON[0]}.{_MIN_PYTHON[1]} or newer, and vnetdp into it"
    return Check("python", ok, True, f"{platform.python_version()} on {platform.system()} {platform.release()}", advice)


def _memory() -> Check:
    try:
        limits.check_memory()
    except ConfigError as e:
        detail, _, advice = str(e).rpartition(": raise it: ")
        return Check("memory", False, True, detail, f"raise it: {advice}")
    return Check("memory", True, True, limits.memory_in_use() or "no limit of address space or data")


def _limits() -> Check:
    descriptors = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    detail = f"{limits.descriptors()}; threads and processes: {limits.tasks()}"
    if 0 <= descriptors < _ENOUGH_DESCRIPTORS:
        return Check(
            "limits", False, False, detail, "for many queue pairs, raise the limit of descriptors: ulimit -n 65536"
        )
    return Check("limits", True, False, detail)


def _terminal() -> Check:
    stream = sys.stdout
    if stream is None:
        return Check("terminal", False, False, "standard output is closed", "open it, or redirect it to a file")
    try:
        _SIGNS.encode(stream.encoding)
    except (UnicodeEncodeError, LookupError):
        detail = (
            f"standard output is {stream.encoding}, which lacks signs of reports, such as that of micro: ? is printed"
        )
        return Check("terminal", False, False, detail, "LC_ALL=C.UTF-8, or PYTHONIOENCODING=utf-8")
    return Check("terminal", True, False, f"standard output is {stream.encoding}")


def _numba() -> Check:
    fix = f"{sys.executable} -m pip install --upgrade numba"
    try:
        import numba
    except ImportError as e:  # NumPy too new for it, no wheel for this Python: its text says which
        return Check("numba", False, True, f"can't be imported: {e}", fix)
    except (OSError, MemoryError) as e:  # no executable memory, or not enough of the other
        detail, _, advice = limits.fault(e).partition(": ")
        return Check("numba", False, True, f"can't be imported: {detail}", advice or fix)
    versions = f"{numba.__version__}, llvmlite {_version('llvmlite')}, NumPy {_version('numpy')}"
    if tuple(int(part) for part in numba.__version__.split(".")[:2]) < _MIN_NUMBA:
        return Check(
            "numba", False, True, f"{versions}: vnetdp needs Numba {_MIN_NUMBA[0]}.{_MIN_NUMBA[1]} or newer", fix
        )
    if numba.config.DISABLE_JIT:
        advice = "unset NUMBA_DISABLE_JIT"
        return Check("numba", True, True, f"{versions}; NUMBA_DISABLE_JIT is set: some hundred times slower", advice)
    return Check("numba", True, True, versions)


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "(not installed)"


def _memfd() -> Check:
    from ..shared.mapping import create_memfd

    try:
        fd = create_memfd("vnetdp-doctor", 4096)
    except (OSError, ConfigError, AttributeError) as e:
        advice = "use Linux 3.17 or newer, and a container that allows memfd_create and fcntl(F_ADD_SEALS)"
        return Check("memfd", False, True, f"no shared memory with a seal against shrinking: {e}", advice)
    sealed = fcntl.fcntl(fd, fcntl.F_GET_SEALS) & fcntl.F_SEAL_SHRINK
    os.close(fd)
    if not sealed:
        return Check("memfd", False, True, "F_SEAL_SHRINK has no effect", "use a kernel with file seals")
    return Check("memfd", True, True, "shared memory, sealed against shrinking")


def _cache() -> Check:
    """Check the cache of compiled kernels."""
    try:
        from vnetdp_kernels.loops.drive import drive
        from vnetdp_kernels.loops.serve import serve
        from vnetdp_kernels.platform import cache, jit
    except (ImportError, OSError, MemoryError) as e:
        return Check("numba cache", False, True, f"the kernels can't be loaded: {limits.fault(e)}", "see numba, above")
    if not hasattr(serve, "stats"):
        return Check("numba cache", True, True, "not used: NUMBA_DISABLE_JIT is set")
    folder = cache.writable()
    trouble = cache.trouble()
    if jit.cache_is_warm(serve) and jit.cache_is_warm(drive):
        # That it can't be written to matters to the next version only.
        found = jit.found(serve)
        return Check("numba cache", True, True, f"warm, in {found}", cache.passed_over(found))
    if folder is None:
        return Check(
            "numba cache",
            False,
            False,
            "cold, and no folder for it can be written: each run compiles the kernels",
            trouble,
        )
    cold = f"cold, in {folder.path}: the next command compiles the kernels, in about a minute of one core"
    return Check("numba cache", True, True, cold, trouble or _cache_advice(folder.path))


def _cache_advice(folder: Path) -> str:
    there = os.statvfs(folder)
    if there.f_bavail * there.f_frsize < _CACHE_ROOM or (there.f_files and not there.f_favail):
        return "make room there, or set NUMBA_CACHE_DIR to another folder: without room each run compiles the kernels"
    try:
        with open(folder / "compiling.lock", "a") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return "wait: another process is compiling"
    except OSError as e:
        return f"start one command first: there are no locks ({e.strerror}), and commands started together each compile"
    return "vnetdp demo"


def _cores() -> Check:
    n = len(os.sched_getaffinity(0))
    if n >= 2:
        return Check("cores", True, False, f"{n} usable")
    return Check(
        "cores", False, False, "1 usable: device and guest take turns", "allow two cores or more (taskset, cpuset)"
    )


def _pytun() -> Check:
    try:
        import pytun
    except ImportError as e:
        fix = f"{sys.executable} -m pip install python-pytun  (it may need Debian's gcc and python3-dev)"
        return Check("python-pytun", False, False, f"no tap: endpoints: {e}", fix)
    return Check("python-pytun", True, False, f"{_version('python-pytun')}, {Path(pytun.__file__).name}")


def _tun() -> Check:
    try:
        os.close(os.open(_TUN, os.O_RDWR | os.O_CLOEXEC))
    except FileNotFoundError:
        advice = "sudo modprobe tun; into a container: --device /dev/net/tun"
        return Check("tun", False, False, f"no tap: endpoints: {_TUN} is not there", advice)
    except OSError as e:
        return Check("tun", False, False, f"no tap: endpoints: {_TUN}: {e.strerror}", f"sudo chmod 666 {_TUN}")
    if _has_capability(_CAP_NET_ADMIN):
        return Check("tun", True, False, f"{_TUN} opens, and TAP interfaces can be made")
    made = "sudo ip tuntap add dev tap0 mode tap user $USER && sudo ip link set tap0 up"
    advice = f"run as root, or make one as root: {made}"
    return Check("tun", False, False, f"{_TUN} opens, but without CAP_NET_ADMIN only for TAPs of this user", advice)


def _has_capability(number: int) -> bool:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("CapEff:"):
            return bool(int(line.split()[1], 16) >> number & 1)
    return False


# A child tries this, so that we stay in our namespace and the TAP disappears with the child's.
_TRY_NAMESPACE = """
import ctypes, fcntl, os, struct, sys
if ctypes.CDLL(None, use_errno=True).unshare(0x40000000):
    sys.exit(os.strerror(ctypes.get_errno()))
try:
    fcntl.ioctl(os.open("/dev/net/tun", os.O_RDWR), 0x400454CA, struct.pack("16sH22x", b"doctor0", 0x5002))
except OSError as e:
    sys.exit("a TAP in it: " + e.strerror)
"""


def _namespaces() -> Check:
    child = subprocess.run(
        [sys.executable, "-I", "-S", "-c", _TRY_NAMESPACE], capture_output=True, text=True, check=False
    )
    if child.returncode == 0:
        return Check("network namespaces", True, False, "can be made, with TAPs in them")
    reason = (child.stderr.strip().splitlines() or ["no reason given"])[-1]
    advice = "run as root; into a container: --cap-add NET_ADMIN --cap-add SYS_ADMIN"
    return Check(
        "network namespaces", False, False, f"tests and benchmarks with namespaces are skipped: {reason}", advice
    )


def _hugepages() -> Check:
    counts = {}
    with suppress(OSError):
        for line in Path("/proc/meminfo").read_text().splitlines():
            name, _, rest = line.partition(":")
            if name in ("HugePages_Total", "HugePages_Free", "Hugepagesize"):
                counts[name] = int(rest.split()[0])
    total, free = counts.get("HugePages_Total", 0), counts.get("HugePages_Free", 0)
    size = f"{counts.get('Hugepagesize', 2048) // 1024} MiB"
    if total:
        return Check("hugepages", True, False, f"{free} of {total} free, {size} each")
    advice = "for DPDK at its best: echo 512 | sudo tee /proc/sys/vm/nr_hugepages"
    return Check("hugepages", False, False, "none reserved: vnetdp needs none, and starts DPDK with --no-huge", advice)


def _vhost_net() -> Check:
    note = "not used by this version: vhost is a worker of vnetdp's own"
    try:
        os.close(os.open(_VHOST_NET, os.O_RDWR | os.O_CLOEXEC))
    except FileNotFoundError:
        return Check("vhost-net", False, False, f"no {_VHOST_NET}; {note}", "sudo modprobe vhost_net")
    except OSError as e:
        return Check("vhost-net", False, False, f"{_VHOST_NET}: {e.strerror}; {note}", f"sudo chmod 666 {_VHOST_NET}")
    return Check("vhost-net", True, False, f"{_VHOST_NET} opens; {note}")


def _peer(program: str, purpose: str, package: str) -> Check:
    path = shutil.which(program) or shutil.which(program, path="/usr/sbin:/sbin")
    if path:
        return Check(program, True, False, f"{path}: {purpose}")
    return Check(program, False, False, f"not installed: {purpose}", f"sudo apt-get install {package}")
