"""Getting a thread out of a system call: a signal whose handler does nothing, so that the call ends with EINTR.

A descriptor that came from a peer may be blocking, and the peer may fill or empty it between our poll() and our call.
"""

from __future__ import annotations

import ctypes
import signal
from typing import Final

from numba import cfunc, types

from .sigbus import SA_ONSTACK, SigAction

_SIGNAL: Final = signal.SIGRTMIN + 10

_installed = False


@cfunc(types.void(types.int32), cache=True)  # type: ignore[untyped-decorator]
def _on_signal(number: int) -> None:
    pass


def install() -> None:
    """Install the handler, once a process; it comes before `interrupt`."""
    global _installed
    if not _installed:
        # Not with the signal module: its handlers are Python, and only the main thread may install them.
        action = SigAction(handler=_on_signal.address, flags=SA_ONSTACK)  # without SA_RESTART
        if ctypes.CDLL(None, use_errno=True).sigaction(int(_SIGNAL), ctypes.byref(action), None):
            raise OSError(ctypes.get_errno(), "sigaction")
        _installed = True


def interrupt(ident: int) -> None:
    """Interrupt the system call that a thread (`threading.Thread.ident`) may be in."""
    signal.pthread_kill(ident, _SIGNAL)
