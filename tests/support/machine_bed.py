"""Machines that lack something, for a child: less memory, no system call of some name, another user, a full disk."""

from __future__ import annotations

import ctypes
import os
import platform
import resource
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

_PR_SET_SECCOMP, _SECCOMP_MODE_FILTER = 22, 2
_PR_SET_NO_NEW_PRIVS = 38
_PR_SET_MDWE = 65
_LOAD, _JUMP_IF_EQUAL, _RETURN = 0x20, 0x15, 0x06
_ALLOW, _ERRNO = 0x7FFF0000, 0x00050000
_NUMBERS = {
    "x86_64": {"flock": 73, "eventfd2": 290, "memfd_create": 319},
    "aarch64": {"flock": 32, "eventfd2": 19, "memfd_create": 279},
}.get(platform.machine(), {})

OTHER_USER = 54321  # nobody's
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can give up rights for a child")
needs_seccomp = pytest.mark.skipif(not _NUMBERS, reason="system calls have other numbers on this processor")

_libc = ctypes.CDLL(None, use_errno=True)


class _Filter(ctypes.Structure):
    _fields_ = (("code", ctypes.c_ushort), ("jt", ctypes.c_ubyte), ("jf", ctypes.c_ubyte), ("k", ctypes.c_uint))


class _Program(ctypes.Structure):
    _fields_ = (("length", ctypes.c_ushort), ("filter", ctypes.POINTER(_Filter)))


def refusing(call: str, code: int) -> Callable[[], None]:
    """Return what has the kernel answer the system call *call* with the error *code*, in this process from then on."""
    lines = (
        _Filter(_LOAD, 0, 0, 0),
        _Filter(_JUMP_IF_EQUAL, 0, 1, _NUMBERS[call]),
        _Filter(_RETURN, 0, 0, _ERRNO | code),
        _Filter(_RETURN, 0, 0, _ALLOW),
    )
    program = _Program(len(lines), (_Filter * len(lines))(*lines))

    def refuse() -> None:
        _libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
        if _libc.prctl(_PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, ctypes.byref(program)):
            raise OSError(ctypes.get_errno(), "seccomp")

    return refuse


def limited(which: int, limit: int) -> Callable[[], None]:
    """Return what sets a limit (resource.RLIMIT_…) of this process."""
    return lambda: resource.setrlimit(which, (limit, limit))


def without_executable_memory() -> Callable[[], None]:
    """Return what has the kernel refuse to make memory executable; skip the test if this kernel can't."""
    if Path("/proc/self/status").read_text().find("THP_enabled") < 0 or _mdwe_missing():
        pytest.skip("PR_SET_MDWE is Linux 6.3's")
    return lambda: _libc.prctl(_PR_SET_MDWE, 1, 0, 0, 0)


def _mdwe_missing() -> bool:
    return bool(_libc.prctl(_PR_SET_MDWE + 1, 0, 0, 0, 0) < 0)


def as_user(uid: int, *capabilities: str) -> list[str]:
    """Return what comes before a command for it to run as user *uid*, with nothing but *capabilities* of root's."""
    kept = ",".join(["-all", *(f"+{name}" for name in ("dac_read_search", *capabilities))])
    ids = [f"--reuid={uid}", f"--regid={uid}", "--clear-groups"]
    return ["setpriv", *ids, f"--inh-caps={kept}", f"--ambient-caps={kept}", f"--bounding-set={kept}", "--"]


def on_a_disk(folder: Path, options: str, command: Sequence[str]) -> list[str]:
    """Return *command* with *folder* being a tmpfs mounted with *options*, which is gone with the command."""
    if shutil.which("unshare") is None:
        pytest.skip("unshare is not installed")
    script = f'mount -t tmpfs -o {options} tmpfs "$0" && exec "$@"'
    return ["unshare", "--mount", "sh", "-c", script, str(folder), *command]
