"""Zygote: a process that has vnetdp imported and its kernels loaded, and forks processes at a tenth of the cost of a start.

A process that it forks runs `python -m vnetdp ...` or `python -c ...` as a new one would, and is a child of the test's; the
processes that it starts in turn are forks of itself, while no other thread of it does anything. With VNETDP_CAMPAIGN=1, and
where its surroundings are not those of the tests (a namespace, another Python), a new one is started.
"""

from __future__ import annotations

import atexit
import ctypes
import fcntl
import gc
import importlib
import json
import logging
import os
import pkgutil
import resource
import runpy
import signal
import socket
import subprocess
import sys
import threading
import traceback
import warnings
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

import vnetdp
from tests.support.by_hand import CAMPAIGN
from vnetdp.system import child
from vnetdp.warmup import warm_up

MARK = "VNETDP_TEST"  # an environment variable; of a process that was forked, its name
_MAX_MESSAGE = 1 << 18
_MAX_FDS = 250
_MOVED = 600  # descriptors are out of the way from here on
_PR_SET_NAME, _PR_SET_CHILD_SUBREAPER = 15, 36
_LEFT_OUT = ("vnetdp.__main__", "vnetdp.bench")
_KINDS = ("net", "mnt", "pid", "user")  # of namespaces
_LIMITS = (resource.RLIMIT_NOFILE, resource.RLIMIT_AS, resource.RLIMIT_FSIZE, resource.RLIMIT_MEMLOCK)

_start = child.start
_lock = threading.Lock()
_zygote: _Zygote | None = None
_branching = False  # this process was forked to be another: a process that it starts is a fork of it


def popen(args: Sequence[str | bytes], **options: Any) -> subprocess.Popen[Any]:
    """Be `subprocess.Popen`, by way of the zygote if that makes no difference."""
    if "preexec_fn" not in options and _serves(options.get("env") or os.environ):
        return _Forked(args, **options)
    return subprocess.Popen(args, **options)


def start(
    code: str, parent: socket.socket, passed: Sequence[int], env: Mapping[str, str] | None = None
) -> subprocess.Popen[bytes]:
    """Be `vnetdp.system.child.start`."""
    plain = not env
    kind = _Forked if plain and _serves(os.environ) else _Branch if plain and _branches() else None
    if kind is None:
        return _start(code, parent, passed, env)
    fd = parent.fileno()
    text = f"from {child.__name__} import follow; follow({fd}); {code}"
    return kind([sys.executable, "-c", text], pass_fds=(fd, *passed), process_group=0)


def begin() -> None:
    """Start this test process's zygote."""
    global _zygote
    _zygote = _Zygote()


def branch() -> None:
    """Have the processes that vnetdp starts in this one, which was forked to be another, be forks of it."""
    global _branching
    _branching = True
    child.start = start
    gc.freeze()  # what was there before is not looked through again, nor copied for that


def _branches() -> bool:
    """Return whether a process may be a fork of this one, in which no other thread may hold a lock."""
    idle = (threading.current_thread().name, "signals")  # which waits for a byte, all of its life
    return _branching and all(thread.name in idle for thread in threading.enumerate())


def _serves(env: Mapping[str, str]) -> bool:
    """Return whether a process with *env* may be the zygote's."""
    return _zygote is not None and not CAMPAIGN and _zygote.surroundings == _surroundings(env)


def _surroundings(env: Mapping[str, str]) -> list[object]:
    """Return what a process that is forked elsewhere does not get from the one that asks for it."""
    names = sorted(name for name in env if name.startswith(("NUMBA_", "PYTHON", "LC_", "LANG")))
    namespaces = [str(Path(f"/proc/thread-self/ns/{kind}").readlink()) for kind in _KINDS]
    return [os.getpid(), os.geteuid(), [(name, env[name]) for name in names], namespaces]


class _Zygote:
    def __init__(self) -> None:
        ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)  # a process whose parent ends becomes our child
        self.surroundings = _surroundings(os.environ)
        self._sock, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        code = f"from {__name__} import main; main({theirs.fileno()})"
        root = str(Path(__file__).parents[2])
        self._process = subprocess.Popen([sys.executable, "-c", code], pass_fds=[theirs.fileno()], cwd=root)
        theirs.close()

    def fork(self, job: dict[str, Any], fds: Sequence[int]) -> int:
        """Fork a process, and return its id."""
        with _lock:
            socket.send_fds(self._sock, [json.dumps(job).encode()], fds)
            return int(self._sock.recv(64))


class _Forked(subprocess.Popen[Any]):
    """A process of the zygote's, and a child of ours."""

    def _execute_child(  # type: ignore[no-untyped-def]
        self, args, _executable, _preexec_fn, _close_fds, pass_fds, cwd, env, *rest
    ) -> None:
        pipes = rest[3:9]  # stdin: read, write; stdout: read, write; stderr: read, write
        streams = [given if given >= 0 else fd for fd, given in enumerate((pipes[0], pipes[3], pipes[5]))]
        mask = os.umask(0)
        os.umask(mask)
        job = {
            "args": [os.fsdecode(arg) for arg in args[1:]],
            "cwd": os.fspath(cwd or Path.cwd()),
            "env": dict(env if env is not None else os.environ),
            "session": bool(rest[-2]),
            "group": rest[-1],
            "fds": [0, 1, 2, *pass_fds],
            "umask": mask,
            "limits": [resource.getrlimit(limit) for limit in _LIMITS],
        }
        self.pid = self._fork(job, [*streams, *pass_fds])
        self._child_created = True
        self._close_pipe_fds(*pipes)  # type: ignore[attr-defined]

    @staticmethod
    def _fork(job: dict[str, Any], fds: list[int]) -> int:
        assert _zygote is not None
        return _zygote.fork(job, fds)


class _Branch(_Forked):
    """A process that is a fork of this one."""

    @staticmethod
    def _fork(job: dict[str, Any], fds: list[int]) -> int:
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
        pid = os.fork()
        if pid == 0:
            status: object = 1
            try:
                _forget()
                signal.pthread_sigmask(signal.SIG_SETMASK, mask)
                status = _run(job, fds)
            except BaseException:  # noqa: BLE001 - nothing may pass: behind it is what the parent does
                traceback.print_exc()
            _end(status)
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        return pid


def _forget() -> None:
    """Give up what the parent was set to do, and a new process would not. All signals are blocked meanwhile."""
    atexit._clear()
    signal.set_wakeup_fd(-1)
    os.setpgid(0, 0)
    for number in signal.valid_signals():
        if callable(signal.getsignal(number)):
            signal.signal(number, signal.SIG_IGN)  # one that came before was for the parent
            signal.signal(number, signal.SIG_DFL)
    for logger in (logging.root, logging.getLogger("vnetdp")):
        logger.handlers.clear()
        logger.setLevel(logging.WARNING if logger is logging.root else logging.NOTSET)


# --- in the zygote ---


def main(fd: int) -> None:
    """Fork a process for each message that comes through the socket *fd*, until that is closed."""
    for module in pkgutil.walk_packages(vnetdp.__path__, "vnetdp."):
        if not module.name.startswith(_LEFT_OUT):
            importlib.import_module(module.name)
    warm_up()
    warnings.filterwarnings("ignore", "This process .* is multi-threaded", DeprecationWarning)  # NumPy's, which rest
    gc.collect()
    gc.freeze()
    sock = socket.socket(fileno=fd)
    while True:
        data, fds, _, _ = socket.recv_fds(sock, _MAX_MESSAGE, _MAX_FDS)
        if not data:
            return
        said, says = os.pipe()
        between = os.fork()
        if between == 0:
            parent = os.getpid()
            pid = os.fork()
            if pid == 0:
                while os.getppid() == parent:
                    os.sched_yield()
                _end(_run(json.loads(data), list(fds)))
            os.write(says, b"%d" % pid)
            os._exit(0)
        os.waitpid(between, 0)  # so that the child has gone over to the tests' process
        sock.send(os.read(said, 64))
        for one in (said, says, *fds):
            os.close(one)


def _run(job: dict[str, Any], fds: list[int]) -> object:
    """Become a process of its own, and do the job; return the exit status."""
    _be_apart(job, fds)
    branch()
    os.environ.clear()
    os.environ.update(job["env"])
    if MARK in job["env"]:
        ctypes.CDLL(None).prctl(_PR_SET_NAME, name_of(job["env"][MARK]).encode(), 0, 0, 0)
    sys.path[:0] = [job["cwd"], *filter(None, job["env"].get("PYTHONPATH", "").split(os.pathsep))]
    how, what, *args = job["args"]
    sys.argv = ["-c" if how == "-c" else what, *args]
    try:
        if how == "-c":
            exec(what, {"__name__": "__main__"})
        else:
            runpy.run_module(what, run_name="__main__", alter_sys=True)
    except SystemExit as e:
        return e.code
    return 0


def _end(status: object) -> NoReturn:
    """End as the interpreter does, but for taking all apart: to copy every page for that takes the most of the time."""
    if status is not None and not isinstance(status, int):
        sys.stderr.write(f"{status}\n")
        status = 1
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):
            stream.flush()
    os._exit((status or 0) & 0xFF)


def _be_apart(job: dict[str, Any], fds: list[int]) -> None:
    """Take nothing along but the descriptors that were passed, each in its place."""
    if job["session"]:
        os.setsid()
    elif job["group"] not in (None, -1):
        os.setpgid(0, job["group"])
    moved = [fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, _MOVED) for fd in fds]
    for fd, place in zip(moved, job["fds"], strict=True):
        os.dup2(fd, place)
    kept = sorted(set(job["fds"]))
    for low, high in zip(kept, [*kept[1:], os.sysconf("SC_OPEN_MAX")], strict=True):
        os.closerange(low + 1, high)
    for limit, (soft, hard) in zip(_LIMITS, job["limits"], strict=True):
        resource.setrlimit(limit, (soft, hard))
    os.umask(job["umask"])
    os.chdir(job["cwd"])
    sys.stdin = os.fdopen(0, closefd=False)
    sys.stdout = os.fdopen(1, "w", closefd=False)
    sys.stderr = os.fdopen(2, "w", buffering=1, errors="backslashreplace", closefd=False)


def name_of(mark: str) -> str:
    """Return the name of a forked process that has *mark* as its MARK."""
    return "t:" + mark[:13]
