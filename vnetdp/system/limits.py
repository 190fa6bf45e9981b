"""One line about a limit or a refusal of the machine: the limit, the part of it in use, and the next step."""

from __future__ import annotations

import errno
import os
import resource
import select
import shlex
import socket
import stat
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ..errors import ConfigError, MachineError

_MIB = 1 << 20
_TO_LOAD = {"ulimit -v": 512 * _MIB, "ulimit -d": 192 * _MIB}  # for the kernels, with little beside them
_TO_COMPILE = {"ulimit -v": 768 * _MIB, "ulimit -d": 512 * _MIB}
_LIMITS = {"ulimit -v": (resource.RLIMIT_AS, "VmSize"), "ulimit -d": (resource.RLIMIT_DATA, "VmData")}
_NO_THREAD = "can't start new thread"
_NO_EXECUTABLE = "executable memory"  # as llvmlite has it, when Numba is imported


def fault(error: BaseException) -> str:
    """Return one line about *error*, if the machine is its cause; "" if it may be a defect of vnetdp."""
    if isinstance(error, MachineError):
        return str(error)  # it has its limit, and the next step
    if isinstance(error, MemoryError):
        return f"out of memory: {_memory()}"
    if isinstance(error, RuntimeError):
        return f"no more threads: {tasks()}" if _NO_THREAD in str(error) else ""
    if isinstance(error, ImportError):
        return f"{_first_line(error.__cause__ or error)}{_if_memory_is_limited()}; vnetdp doctor says more"
    if not isinstance(error, OSError):
        return ""
    if _NO_EXECUTABLE in str(error):
        return (
            "compiled kernels need executable memory, which this process may not make: allow it (systemd: "
            "MemoryDenyWriteExecute=no; SELinux: the permission execmem; seccomp: mprotect with PROT_EXEC)"
        )
    if isinstance(error.filename, str | bytes):
        path = os.fsdecode(error.filename)
        return f"{path}: {of_path(path, error)}"
    text = error.strerror or str(error)
    step = _next_step(error)
    return f"{_first_line(text)}: {step}" if step else _first_line(text) + _if_memory_is_limited()


def of_path(path: str | Path, error: OSError | ValueError, to_make: bool = False) -> str:
    """Return why the file *path* can't be used: the error, the part of the path at fault, and the next step.

    to_make: whether it was to be made, and not only to be opened.
    """
    if not isinstance(error, OSError) or not error.strerror:
        return _first_line(error)  # such as a null byte in its name
    step = _step_for_path(Path(path), error.errno, to_make) or _next_step(error)
    return f"{error.strerror}: {step}" if step else _first_line(error.strerror) + _if_memory_is_limited()


def _step_for_path(path: Path, code: int | None, to_make: bool) -> str:
    parents = list(reversed(path.parents))
    try:
        match code:
            case errno.ENOENT if not path.is_absolute() and (gone := _no_current_folder()):
                return gone
            case errno.ENOENT:
                missing = next((parent for parent in parents if not parent.exists()), None)
                if missing is None:
                    return "no file can be made there: take another folder" if to_make else "name an existing file"
                return f"there is no folder {missing}: mkdir -p {shlex.quote(str(path.parent))}"
            case errno.ENOTDIR:
                return next(
                    (f"{parent} is not a folder: take another path" for parent in parents if not parent.is_dir()), ""
                )
            case errno.EISDIR:
                return "it is a folder: name a file"
            case errno.EACCES | errno.EPERM:
                return _who_may(path)
            case errno.ENAMETOOLONG:
                longest = max(len(os.fsencode(part)) for part in path.parts)
                return f"a name in it is too long: {longest} bytes, of at most 255: take a shorter one"
    except OSError:
        pass
    return ""


def _no_current_folder() -> str:
    """Return the next step if the current folder was deleted; "" if it is there."""
    try:
        Path.cwd()
    except FileNotFoundError:
        return "the current folder was deleted: cd to an existing one"
    return ""


def _who_may(path: Path) -> str:
    """Return the owner and mode of the file that denies access: *path*, or a folder on the way to it."""
    parents = list(reversed(path.absolute().parents))
    barred = next((parent for parent in parents if not os.access(parent, os.X_OK)), None)
    there = barred or (path if os.path.lexists(path) else parents[-1])
    status = there.stat()
    return (
        f"{there} belongs to user {status.st_uid}, with mode {stat.S_IMODE(status.st_mode):04o}, and this is user "
        f"{os.geteuid()}: take another path, or have the right given (chmod)"
    )


def _next_step(error: OSError) -> str:
    """Return the limit that *error* ran into, if it is known, and how to raise it; else ""."""
    match error.errno:
        case errno.ENOENT if error.filename is None:
            return _no_current_folder()
        case errno.EMFILE:
            return f"{descriptors()}; raise the limit: ulimit -n 65536"
        case errno.ENFILE:
            return f"the system's limit is {_read('/proc/sys/fs/file-max')} open files; raise it: sysctl fs.file-max"
        case errno.ENOMEM:
            return _memory()
        case errno.EAGAIN:
            return tasks()
        case errno.EFBIG:
            return f"the limit of a file's length is {_size(resource.RLIMIT_FSIZE)}; raise it: ulimit -f unlimited"
        case errno.ENOSPC:
            return "make room on that file system (df and df -i show its free space and inodes)"
        case errno.EDQUOT:
            return "make room, or have the quota raised"
        case errno.EROFS:
            return "that file system is read-only: name a path on a writable one"
        case errno.ENOSYS:
            return (
                "the kernel, or a container's seccomp filter, lacks that system call: use a newer kernel, or allow it"
            )
    return ""


def _first_line(error: object) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def _read(path: str) -> str:
    with suppress(OSError):
        return Path(path).read_text().strip()
    return ""


def _size(which: int) -> str:
    limit = resource.getrlimit(which)[0]
    return (
        "not set" if limit == resource.RLIM_INFINITY else f"{limit} bytes" if limit < _MIB else f"{limit // _MIB} MiB"
    )


def descriptors() -> str:
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    # To list a folder of descriptors takes a descriptor, which may not be had.
    open_ones = sum(1 for fd in range(min(limit, 1 << 20)) if _is_open(fd))
    return f"{open_ones} of {limit} descriptors are in use"


def _is_open(fd: int) -> bool:
    with suppress(OSError):
        os.fstat(fd)
        return True
    return False


def _status(name: str) -> int:
    """Return a line of /proc/self/status, bytes."""
    for line in _read("/proc/self/status").splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    return 0


def _memory_limits() -> list[str]:
    return [
        f"{_status(line) // _MIB} MiB of {_size(which)} are in use ({command}); raise the limit: {command} unlimited"
        for command, (which, line) in _LIMITS.items()
        if resource.getrlimit(which)[0] != resource.RLIM_INFINITY
    ]


def memory_in_use() -> str:
    """Return each limit of memory, with how much of it is in use; "" if there is none."""
    return "; ".join(_memory_limits())


def _memory() -> str:
    return memory_in_use() or (
        "free memory, or take a smaller ring or fewer queue pairs (free -m shows the free memory; sysctl "
        "vm.overcommit_memory and vm.max_map_count are limits, too)"
    )


def _if_memory_is_limited() -> str:
    """Return the limits of memory, if there are any: a library that can't be loaded does not say that they are why."""
    return "".join(f"; {limit}" for limit in _memory_limits())


def tasks() -> str:
    limits = []
    most = resource.getrlimit(resource.RLIMIT_NPROC)[0]
    if most != resource.RLIM_INFINITY:
        limits.append(f"this user may have {most} threads and processes (raise it: ulimit -u unlimited)")
    group = _read("/proc/self/cgroup").rpartition("::")[2].splitlines()[:1]
    for path in {f"/sys/fs/cgroup{group[0] if group else ''}/pids.max", "/sys/fs/cgroup/pids/pids.max"}:
        most_in_group = _read(path)
        if most_in_group.isdecimal():
            limits.append(f"this container may have {most_in_group} (raise its pids limit)")
    limits.append(f"the system may have {_read('/proc/sys/kernel/threads-max') or 'an unknown number'}")
    return "; ".join(limits)


@contextmanager
def giving(what: str) -> Iterator[None]:
    """Turn the machine's refusal to give *what* into a MachineError, with the limit and the next step."""
    try:
        yield
    except MachineError:
        raise
    except (OSError, MemoryError, RuntimeError) as e:
        said = fault(e)
        if not said:
            raise
        code = errno.ENOMEM if isinstance(e, MemoryError) else getattr(e, "errno", None) or errno.EAGAIN
        raise MachineError(code, f"cannot make {what}: {said}") from e


def start(thread: threading.Thread) -> None:
    """Start *thread*; MachineError if the machine has no more of them."""
    with giving(f"the thread {thread.name}"):
        thread.start()


def dup(fd: int) -> int:
    """Return another descriptor of the same file; MachineError if there are no more."""
    with giving("a descriptor"):
        return os.dup(fd)


def socket_pair(kind: socket.SocketKind) -> tuple[socket.socket, socket.socket]:
    """Return two Unix sockets that are connected; MachineError if there are no more descriptors."""
    with giving("a pair of sockets"):
        return socket.socketpair(socket.AF_UNIX, kind)


def epoll() -> select.epoll:
    """Return an epoll; MachineError if there are no more descriptors."""
    with giving("an epoll"):
        return select.epoll()


def leave_room(fd: int) -> None:
    """Raise the limit of descriptors as far as this process may once *fd*, a new one, is in its upper half."""
    if 2 * fd > resource.getrlimit(resource.RLIMIT_NOFILE)[0]:
        raise_descriptor_limit()


def raise_descriptor_limit(enough: int = 1 << 16) -> None:
    """Allow this process *enough* descriptors, or as many as it may allow itself: a queue pair takes eight or so."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY:
        enough = min(hard, enough)
    if soft != resource.RLIM_INFINITY and soft < enough:
        resource.setrlimit(resource.RLIMIT_NOFILE, (enough, hard))


def check_memory(to_compile: bool = False) -> None:
    """Raise ConfigError if a limit of memory is too low for the compiler, which would end the process."""
    for command, (which, _) in _LIMITS.items():
        limit, least = resource.getrlimit(which)[0], (_TO_COMPILE if to_compile else _TO_LOAD)[command]
        if limit != resource.RLIM_INFINITY and limit < least:
            work = "to compile the kernels" if to_compile else "to load the kernels"
            raise ConfigError(
                f"the limit of memory is {_size(which)} ({command}), and {work} takes {least // _MIB} MiB: "
                f"raise it: {command} unlimited"
            )
