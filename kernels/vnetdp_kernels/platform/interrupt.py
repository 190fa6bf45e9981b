"""Getting a thread out of a system call: a signal whose handler does nothing of note, so that the call ends with EINTR.

A descriptor that came from a peer may be blocking, and the peer may fill or empty it between our poll() and our call.
"""

from __future__ import annotations

import ctypes
import signal
from typing import Final

SA_ONSTACK: Final = 0x0800_0000
_SIGNAL: Final = signal.SIGRTMIN + 10

_libc = ctypes.CDLL(None, use_errno=True)
_installed = False


class SigAction(ctypes.Structure):
    """struct sigaction of glibc: handler, mask, flags, restorer."""

    _fields_ = (
        ("handler", ctypes.c_void_p),
        ("mask", ctypes.c_ulong * 16),
        ("flags", ctypes.c_int),
        ("restorer", ctypes.c_void_p),
    )


def install() -> None:
    """Install the handler, once a process; it comes before `interrupt`."""
    global _installed
    if not _installed:
        # Not with the signal module: its handlers are Python, and only the main thread may install them.
        nothing = ctypes.cast(_libc.getpid, ctypes.c_void_p).value  # machine code that a handler may call, and no more
        action = SigAction(handler=nothing, flags=SA_ONSTACK)  # without SA_RESTART
        if _libc.sigaction(int(_SIGNAL), ctypes.byref(action), None):
            raise OSError(ctypes.get_errno(), "sigaction")
        _installed = True


def interrupt(ident: int) -> None:
    """Interrupt the system call that a thread (`threading.Thread.ident`) may be in."""
    signal.pthread_kill(ident, _SIGNAL)
