"""vnetdp: a userspace virtio-net datapath at native speed, with vhost offload and live migration.

Names are loaded when they are first used: importing the package costs nothing, and Numba is imported only when a
kernel is needed.
"""

from __future__ import annotations

from ._version import __version__

TYPE_CHECKING = False  # as typing has it, which takes longer to import than all else that a command does first
if TYPE_CHECKING:
    from typing import Any

    from .device import NetDevice
    from .driver import Driver
    from .memory import DirtyLog, GuestMemory, Region

_HOME = {
    "DirtyLog": "memory",
    "Driver": "driver",
    "GuestMemory": "memory",
    "NetDevice": "device",
    "Region": "memory",
}

__all__ = ["DirtyLog", "Driver", "GuestMemory", "NetDevice", "Region", "__version__"]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        import importlib

        return getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
